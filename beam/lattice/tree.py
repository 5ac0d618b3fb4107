"""What a search explored, of one request: a tree of tokens as arrays, and how each of its branches ended."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray[Any, Any]


class Status(IntEnum):
    """How a branch ended. A node that has children has the greatest status of what is below it."""

    DEAD_END = 0  # nothing may follow: a constraint, or logits of -inf
    PRUNED = 1  # left the beam
    FINISHED = 2  # ended with EOS, and is not in the n-best
    LIVE = 3  # in the beam now, or when the search ended, and is not in the n-best
    BEST = 4  # in the n-best

    @property
    def label(self) -> str:
        """In words."""
        return ("dead end", "pruned", "finished", "live", "n-best")[self]


class Path(NamedTuple):
    """A branch, from its first token to where it ended."""

    nodes: list[int]  # the root is not among them
    tokens: list[int]
    token_log_probs: list[float]
    log_prob: float
    score: float
    status: Status
    rank: int  # in the n-best, from 1; 0 if it is not there
    finished: bool  # ends with EOS, or where a criterion of flashbeam.hf stopped it


class Steps(NamedTuple):
    """The statistics of the steps a request has made, S of them: see ``fb.Statistics``."""

    entropy: Array  # float32 [S, K]
    expanded: Array  # bool [S, K]
    width: Array  # int32 [S]
    margin: Array  # float32 [S]
    finished: Array  # int32 [S]


@dataclass(frozen=True, eq=False, repr=False)
class Tree:
    """The n nodes of one request. Node 0 is the root, before the first token; parents come before their children.

    An edge leads from ``parent[i]`` to ``i`` and carries ``token[i]``. Where finished hypotheses stay in their slots,
    one that stays is one node, however long. Copies of a path that a rule keeps apart (samples, groups) are apart.
    """

    request: int  # b, its place in the batch
    beam_size: int
    max_length: int
    steps: int  # steps made
    done: bool
    flags: int  # the sum of fb.FLAG_... that occurred
    parent: Array  # int32 [n]; -1 at the root
    step: Array  # int32 [n], step that chose the token, from 0; -1 at the root
    slot: Array  # int32 [n], slot it took; of an EOS that left the beam, its parent's
    token: Array  # int64 [n]; -1 at the root
    token_log_prob: Array  # float32 [n], natural log; 0 at the root
    log_prob: Array  # float32 [n], cumulative
    score: Array  # float32 [n]: what the search ranked a hypothesis by; elsewhere log_prob over the norm of its length
    status: Array  # int8 [n], of Status
    rank: Array  # int32 [n], place in the n-best of what ends here, from 1; 0 where nothing in it does
    finished: Array  # bool [n], ends with EOS, or where a criterion of flashbeam.hf stopped it
    statistics: Steps | None = None  # where the search recorded them

    def __len__(self) -> int:
        return len(self.parent)

    def __repr__(self) -> str:
        return f"Tree(request={self.request}, {len(self)} nodes, {self.steps} steps)"

    @property
    def edges(self) -> Array:
        """int32 ``[n - 1, 2]``: parent and child."""
        return np.stack([self.parent[1:], np.arange(1, len(self), dtype=np.int32)], 1)

    @property
    def lengths(self) -> Array:
        """int32 ``[n]``: tokens from the root, 0 there."""
        return self.step + 1

    @property
    def leaves(self) -> Array:
        """int64 ``[m]``: the nodes without children, but for a root that is alone."""
        has_children = np.zeros(len(self), bool)
        has_children[self.parent[1:]] = True
        has_children[0] = True
        return np.flatnonzero(~has_children)

    def children(self) -> list[list[int]]:
        """The children of every node, those that lead to the best first."""
        found: list[list[int]] = [[] for _ in range(len(self))]
        for node in self.in_order():
            if node:
                found[self.parent[node]].append(node)
        return found

    def in_order(self) -> list[int]:
        """All nodes, by what they lead to: n-best, live, finished, pruned, dead ends; then by rank and score."""
        best_rank, best_score = self._best_below()
        return sorted(range(len(self)), key=lambda i: (-self.status[i], best_rank[i], -best_score[i], i))

    def _best_below(self) -> tuple[Array, Array]:
        rank = np.where(self.rank > 0, self.rank, np.iinfo(np.int32).max)
        score = np.full(len(self), -np.inf, np.float32)
        leaves = self.leaves
        score[leaves] = np.nan_to_num(self.score[leaves], nan=-np.inf)
        for node in range(len(self) - 1, 0, -1):
            above = self.parent[node]
            rank[above] = min(rank[above], rank[node])
            score[above] = max(score[above], score[node])
        return rank, score

    def path(self, node: int) -> Path:
        """The way from the root to ``node``."""
        nodes = []
        i = node
        while i > 0:
            nodes.append(int(i))
            i = self.parent[i]
        nodes.reverse()
        return Path(
            nodes=nodes,
            tokens=self.token[nodes].tolist(),
            token_log_probs=self.token_log_prob[nodes].tolist(),
            log_prob=float(self.log_prob[node]),
            score=float(self.score[node]),
            status=Status(self.status[node]),
            rank=int(self.rank[node]),
            finished=bool(self.finished[node]),
        )

    def paths(self, *statuses: Status) -> Iterator[Path]:
        """Every branch, or those of some statuses: the n-best in order, then the others, best first."""
        leaves = set(self.leaves.tolist())
        for node in self.in_order():
            if node in leaves and (not statuses or self.status[node] in statuses):
                yield self.path(node)
