"""The trees of p-exact search: what is pending in each request, whose turn it is, and the caches they wait with.

Kept on the host, as arrays: how large a tree grows depends on what is found in it.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .cache import leaves_of, rebuild, reorder

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]


class Caches:
    """The caches of the rows of one call, for as long as nodes wait for them."""

    def __init__(self, nest: Any, size: int):
        self.nest, self.size = nest, size
        self.waiting: list[Nodes] = []

    def take(self, rows: Ints, device: torch.device) -> Any:
        return reorder(self.nest, torch.from_numpy(rows).to(device))

    def compact(self, device: torch.device) -> None:
        """Forget the rows that no node waits for, once they are half of the rows or more."""
        self.waiting = [nodes for nodes in self.waiting if len(nodes.tokens)]
        if not self.waiting:
            self.nest = None
            return
        rows = np.unique(np.concatenate([nodes.rows[nodes.parents] for nodes in self.waiting]))
        if 2 * len(rows) <= self.size:
            self.nest, self.size = self.take(rows, device), len(rows)
            for nodes in self.waiting:
                nodes.rows = np.searchsorted(rows, nodes.rows)  # anything where the row is forgotten


@dataclass
class Turn:
    """Nodes of a request at one depth d whose rows are read, r of them."""

    request: Request
    prefixes: Ints  # [r, d]
    prefix_log_probs: Floats  # [r, d], of each token
    log_probs: Floats  # [r], cumulative
    caches: Caches | None  # of the parents; None for the root, which has none
    rows: Ints  # [r] in the caches


@dataclass
class Nodes:
    """The children of a turn's r rows that wait for theirs to be read, n of them, best first."""

    turn: Turn
    caches: Caches  # that the call of the turn returned
    rows: Ints  # [r] in the caches
    parents: Ints  # [n] in 0 .. r - 1
    tokens: Ints  # [n]
    token_log_probs: Floats  # [n]
    log_probs: Floats  # [n], cumulative

    @property
    def depth(self) -> int:
        return int(self.turn.prefixes.shape[1]) + 1

    def keep(self, which: Any) -> None:
        for name in ("parents", "tokens", "token_log_probs", "log_probs"):
            setattr(self, name, getattr(self, name)[which])

    def path(self, i: Any) -> tuple[int, ...]:
        return (*self.turn.prefixes[self.parents[i]].tolist(), int(self.tokens[i]))


class Request:
    """What one request has found, and what it has yet to look at."""

    def __init__(self) -> None:
        self.log_prob = np.float32(-np.inf)
        self.tokens: tuple[int, ...] = ()
        self.token_log_probs: Floats = np.empty(0, np.float32)
        self.exact = True
        self.nodes = 0
        self.greedy = True  # on the way to the hypothesis of greedy search
        self.pending: list[Nodes] = []  # deeper and deeper

    def root(self) -> Turn:
        nothing = np.empty((1, 0))
        zero = np.zeros(1, np.int64)
        return Turn(self, nothing.astype(np.int64), nothing.astype(np.float32), zero.astype(np.float32), None, zero)

    def due(self, batch_rows: int, node_budget: int) -> int:
        """Rows of the next turn."""
        one = self.greedy or not self.tokens
        return min(1 if one else batch_rows, len(self.pending[-1].tokens), node_budget - self.nodes)

    def take(self, count: int) -> Turn:
        nodes = self.pending[-1]
        parents = nodes.parents[:count]
        turn = Turn(
            self,
            np.column_stack([nodes.turn.prefixes[parents], nodes.tokens[:count]]),
            np.column_stack([nodes.turn.prefix_log_probs[parents], nodes.token_log_probs[:count]]),
            nodes.log_probs[:count],
            nodes.caches,
            nodes.rows[parents],
        )
        nodes.keep(slice(count, None))
        return turn

    def receive(self, new: Nodes, eos_ids: list[int], max_length: int, node_budget: int) -> None:
        """Enter the children of a turn's rows: those of a row best first, the rows one after the other."""
        self.nodes += len(new.rows)
        ends = np.isin(new.tokens, eos_ids) | (new.depth == max_length)
        best = new.log_probs[ends].max(initial=-np.inf)
        for i in np.flatnonzero(ends & (new.log_probs == best)):
            path = new.path(i)
            if not self.tokens or (-best, len(path), path) < (-self.log_prob, len(self.tokens), self.tokens):
                self.log_prob, self.tokens = best, path
                steps = new.turn.prefix_log_probs[new.parents[i]]
                self.token_log_probs = np.append(steps, new.token_log_probs[i])
        new.keep(~ends)
        new.keep(np.argsort(-new.log_probs, kind="stable"))
        self.pending.append(new)
        for nodes in self.pending:
            nodes.keep(self._may_win(nodes))
        self.greedy = self.greedy and len(new.tokens) > 0 and not ends[0]
        self.pending = [nodes for nodes in self.pending if len(nodes.tokens)]
        if self.pending and self.nodes == node_budget:
            self.exact = False
            for nodes in self.pending:
                nodes.keep(slice(0))
            self.pending = []

    def _may_win(self, nodes: Nodes) -> NDArray[np.bool_]:
        """Which nodes can lead to a better hypothesis, given that no increment is above 0."""
        if not self.tokens:
            return np.ones(len(nodes.tokens), bool)
        may_win: NDArray[np.bool_] = nodes.log_probs > self.log_prob
        for i in np.flatnonzero(nodes.log_probs == self.log_prob):
            may_win[i] = (nodes.depth + 1, nodes.path(i)) < (len(self.tokens), self.tokens)
        return may_win


def _concatenated(nests: list[Any]) -> Any:
    """The rows of nests of one structure in one; plain values are those of the first."""
    done: dict[tuple[int, ...], Tensor] = {}  # a tensor that appears twice stays one
    results: list[Any] = []
    for leaves in zip(*([leaf for _, leaf in leaves_of(nest, "cache")] for nest in nests), strict=True):
        result = leaves[0]
        if isinstance(result, Tensor):
            key = tuple(map(id, leaves))
            if key not in done:
                done[key] = torch.cat(leaves)
            result = done[key]
        results.append(result)
    return rebuild(nests[0], iter(results))


def next_turns(requests: list[Request], batch_rows: int, node_budget: int) -> list[Turn]:
    """Turns at the depth that fills a call best, the deepest such, with those on the same caches side by side."""
    takers: dict[int, list[tuple[Request, int]]] = {}
    room: dict[int, int] = {}
    for request in requests:
        if request.pending:
            depth, due = request.pending[-1].depth, request.due(batch_rows, node_budget)
            if due <= room.setdefault(depth, batch_rows):
                room[depth] -= due
                takers.setdefault(depth, []).append((request, due))
    if not takers:
        return []
    depth = min(takers, key=lambda depth: (room[depth], -depth))
    by_caches: dict[Caches | None, list[Turn]] = {}
    for request, due in takers[depth]:
        turn = request.take(due)
        by_caches.setdefault(turn.caches, []).append(turn)
    return [turn for turns in by_caches.values() for turn in turns]


def gathered(turns: list[Turn], device: torch.device) -> Any:
    """The caches of the rows of ``turns``."""
    nests = []
    for caches, group in groupby(turns, lambda turn: turn.caches):
        assert caches is not None
        nests.append(caches.take(np.concatenate([turn.rows for turn in group]), device))
    return nests[0] if len(nests) == 1 else _concatenated(nests)
