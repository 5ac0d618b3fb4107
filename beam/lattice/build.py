"""From the tensors of a search to the trees of what it explored: on the host, once, from the history and the pool."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
from torch import Tensor

from ..hypotheses import ranked_endings
from ..selection import DiverseGroups, DiverseSiblings, TopK
from .tree import Array, Status, Steps, Tree

if TYPE_CHECKING:
    from ..state import State

_TAKE_ALL = (TopK, DiverseGroups, DiverseSiblings)  # they leave a place empty only where there is no candidate for it


class _Host(NamedTuple):
    """What is needed of a state, as numpy arrays. There is a row for each group of each request."""

    steps: Array  # [rows]
    done: Array
    flags: Array  # [B]
    width: Array
    max_length: Array
    norm: Array  # [rows, T + 1], of what has not ended
    ended_norm: Array
    history: tuple[Array, ...]  # tokens, parents, token_log_probs [S, rows, K]
    slots: tuple[Array, Array]  # log_probs, scores [rows, K]
    pool: tuple[Array, ...]  # scores, log_probs, token_log_probs, tokens, parents, steps [rows, F]
    ends: tuple[Array, ...]  # scores, last_step, last_slot, eos, valid [rows, N]: the n-best, best first
    eos: list[int]
    endings: Array | None  # [rows, T, K, E], see fb.Statistics
    stops: Array | None  # [T, rows, K], see State


def _numpy(tensor: Tensor) -> Array:
    return tensor.detach().cpu().numpy()


def _to_host(state: State, num_hypotheses: int | None) -> _Host:
    steps = _numpy(state.requests.steps)
    best, asked, _ = ranked_endings(state, num_hypotheses)
    valid = (best.log_probs > -np.inf) & asked
    limits, record = state.limits, state.record
    return _Host(
        steps=steps,
        done=_numpy(state.requests.done),
        flags=_numpy(state.flags),
        width=_numpy(limits.width),
        max_length=_numpy(limits.max_length),
        norm=_numpy(state.live_norm),
        ended_norm=_numpy(limits.length_norm),
        history=tuple(_numpy(field[: int(steps.max())]) for field in state.history),
        slots=(_numpy(state.slots.log_probs), _numpy(state.slots.scores)),
        pool=tuple(_numpy(field) for field in state.pool[:6]),
        ends=tuple(map(_numpy, (best.scores, best.last_step, best.last_slot, best.eos, valid))),
        eos=[] if state.eos is None else state.eos.tolist(),
        endings=None if record is None else _numpy(record.endings),
        stops=None if state.stops is None else _numpy(state.stops),
    )


def trees(state: State, num_hypotheses: int | None, requests: Sequence[int]) -> tuple[Tree, ...]:
    """The trees of some requests. Waits for the device."""
    host = _to_host(state, num_hypotheses)
    return tuple(_tree(state, host, request, num_hypotheses) for request in requests)


def _tree(state: State, host: _Host, request: int, num_hypotheses: int | None) -> Tree:
    rows, beams = range(request * state.groups, (request + 1) * state.groups), host.slots[0].shape[1]
    nodes = _Nodes()
    grown = [_Growth(state, host, row, nodes, (row - rows[0]) * beams) for row in rows]
    columns = nodes.columns
    rank = np.zeros(len(nodes), np.int32)
    for place, (row, n) in enumerate(_n_best(state, host, rows, num_hypotheses), 1):
        score, last_step, last_slot, eos, _ = (field[row, n] for field in host.ends)
        node = grown[row - rows[0]].find(int(last_step), int(last_slot), int(eos))
        rank[node], columns["score"][node], columns["status"][node] = place, score, Status.BEST
    steps = int(host.steps[rows].max())
    return Tree(
        request=request,
        beam_size=int(host.width[rows].sum()),
        max_length=int(host.max_length[rows[0]]),
        steps=steps,
        done=bool(host.done[rows].all()),
        flags=int(host.flags[request]),
        rank=rank,
        statistics=_steps(state, request, steps),
        **nodes.arrays(),
    )


def _steps(state: State, request: int, steps: int) -> Steps | None:
    statistics = state.statistics
    if statistics is None:
        return None
    return Steps(*(_numpy(getattr(statistics, name)[request, :steps]) for name in Steps._fields))


def _n_best(state: State, host: _Host, rows: range, num_hypotheses: int | None) -> list[tuple[int, int]]:
    """Row and place of the hypotheses, best first; equal ones of several groups in the order of the groups."""
    scores, valid = host.ends[0], host.ends[-1]
    found = [(row, int(n)) for row in rows for n in np.flatnonzero(valid[row])]
    found.sort(key=lambda place: -scores[place])
    return found[: state.beam_size if num_hypotheses is None else num_hypotheses]


class _Nodes:
    """Nodes of a tree that grows, column by column."""

    dtypes: ClassVar[dict[str, type]] = {
        "parent": np.int32,
        "step": np.int32,
        "slot": np.int32,
        "token": np.int64,
        "token_log_prob": np.float32,
        "log_prob": np.float32,
        "score": np.float32,
        "status": np.int8,
        "finished": bool,
    }

    def __init__(self) -> None:
        self.columns: dict[str, list[Any]] = {name: [] for name in self.dtypes}
        self.add(-1, -1, -1, -1, 0.0, 1.0, Status.PRUNED)

    def __len__(self) -> int:
        return len(self.columns["parent"])

    def add(
        self, parent: int, step: int, slot: int, token: int, token_log_prob: float, norm: float, status: Status
    ) -> int:
        above = self.columns["log_prob"][parent] if parent >= 0 else np.float32(0.0)
        log_prob = above + np.float32(token_log_prob)  # in float32, step by step: as the search adds
        score, finished = log_prob / np.float32(norm), status == Status.FINISHED
        node = (parent, step, slot, token, token_log_prob, log_prob, score, status, finished)
        for column, value in zip(self.columns.values(), node, strict=True):
            column.append(value)
        return len(self) - 1

    def arrays(self) -> dict[str, Array]:
        found: dict[str, Array] = {name: np.array(self.columns[name], dtype) for name, dtype in self.dtypes.items()}
        parent, status = found["parent"], found["status"]
        status[parent[1:]] = Status.DEAD_END  # what has children is judged by them
        for node in range(len(self) - 1, 0, -1):
            status[parent[node]] = max(status[parent[node]], status[node])
        return found


class _Growth:
    """The nodes of one group of a request."""

    def __init__(self, state: State, host: _Host, row: int, nodes: _Nodes, first_slot: int) -> None:
        self.state, self.host, self.row, self.nodes, self.first_slot = state, host, row, nodes, first_slot
        self.slots: list[list[int]] = []  # by step: the node in each slot, -1 where there is none
        self.ends: dict[tuple[int, int, int], int] = {}  # by step, parent's slot and token: EOS that left the beam
        beams = host.slots[0].shape[1]
        before = [0] * beams  # at the root all slots are alike
        ends = self._ends()
        for step in range(int(host.steps[row])):
            now = self._fill(step, before)
            for parent, token, log_prob, score in ends.get(step, []):
                self._finish(step, parent, token, log_prob, score, before)
            self.slots.append(now)
            before = now
        if self.slots:
            self._score_slots()
            self._mark_dead_ends()

    def find(self, last_step: int, last_slot: int, eos: int) -> int:
        """The node where a hypothesis ends; ``eos`` is -1 where it does not end behind its last slot."""
        return self.slots[last_step][last_slot] if eos < 0 else self.ends[last_step + 1, last_slot, eos]

    def _fill(self, step: int, before: list[int]) -> list[int]:
        """Add what a step put into the slots."""
        host, row, columns = self.host, self.row, self.nodes.columns
        tokens, parents, log_probs = (field[step, row].tolist() for field in host.history)
        now = [-1] * len(before)
        for slot, (token, parent, log_prob) in enumerate(zip(tokens, parents, log_probs, strict=True)):
            above = before[parent]
            if log_prob == -np.inf or above < 0:
                continue
            if self.state.in_place and columns["finished"][above]:
                now[slot] = above  # it stays as it is
                continue
            stopped = host.stops is not None and bool(host.stops[step, row, slot])
            ends = self.state.in_place and (token in host.eos or stopped)
            norm = (host.ended_norm if ends else host.norm)[row, step + 1]
            status = Status.FINISHED if ends else self._status(step, slot)
            now[slot] = self.nodes.add(above, step, self.first_slot + slot, token, log_prob, norm, status)
        return now

    def _status(self, step: int, slot: int) -> Status:
        """Of a slot that has not ended, should nothing follow it."""
        host, row = self.host, self.row
        if step + 1 < host.steps[row]:
            return Status.PRUNED
        # at max_length a constraint may have refused what the step put there; a rule that ends a search empties slots
        refused = step + 1 == host.max_length[row] and host.slots[0][row, slot] == -np.inf
        return Status.DEAD_END if refused else Status.LIVE

    def _ends(self) -> dict[int, list[tuple[int, int, float, float | None]]]:
        """EOS that left the beam, by step: parent's slot, token, its log-probability, and the score if it is known."""
        host, row = self.host, self.row
        if self.state.in_place:
            return {}
        found: dict[tuple[int, int, int], tuple[float, float | None]] = {}
        if host.endings is not None:  # all of them; the pool may have dropped some
            for step, parent, number in np.argwhere(host.endings[row] > -np.inf).tolist():
                found[step, parent, host.eos[number]] = float(host.endings[row, step, parent, number]), None
        for score, log_prob, last, token, parent, step in zip(
            *(field[row].tolist() for field in host.pool), strict=True
        ):
            if log_prob > -np.inf:
                found[step, parent, token] = last, score
        by_step: dict[int, list[tuple[int, int, float, float | None]]] = {}
        for (step, parent, token), (last, score) in sorted(found.items(), key=lambda end: end[0]):
            by_step.setdefault(step, []).append((parent, token, last, score))
        return by_step

    def _finish(
        self, step: int, parent: int, token: int, log_prob: float, score: float | None, before: list[int]
    ) -> None:
        norm, slot = self.host.ended_norm[self.row, step + 1], self.first_slot + parent
        node = self.nodes.add(before[parent], step, slot, token, log_prob, norm, Status.FINISHED)
        if score is not None:
            self.nodes.columns["score"][node] = np.float32(score)
        self.ends[step, parent, token] = node

    def _score_slots(self) -> None:
        """What is still in the slots has the score that the search gives it."""
        host, row = self.host, self.row
        for slot, node in enumerate(self.slots[-1]):
            if node >= 0 and host.slots[0][row, slot] > -np.inf:
                length = self.nodes.columns["step"][node] + 1
                self.nodes.columns["score"][node] = host.slots[1][row, slot] / host.norm[row, length]

    def _mark_dead_ends(self) -> None:
        """Beams that nothing follows at a step where places stayed empty: nothing may follow them."""
        host, row, columns = self.host, self.row, self.nodes.columns
        width = int(host.width[row])
        pool_dropped_none = host.endings is not None or self.state.in_place or not host.eos
        pool_dropped_none = pool_dropped_none or int((host.pool[1][row] > -np.inf).sum()) < width
        if not isinstance(self.state.selection, _TAKE_ALL) or not pool_dropped_none:
            return
        parents = set(columns["parent"])
        for step in range(1, len(self.slots)):
            filled = sum(node >= 0 for node in self.slots[step]) + sum(end[0] == step for end in self.ends)
            if filled >= width:
                continue
            for node in self.slots[step - 1]:
                if node >= 0 and node not in parents and not columns["finished"][node]:
                    columns["status"][node] = Status.DEAD_END
