"""Where the nodes of a tree stand in a picture: a column for each step, and as few rows as branches allow.

A branch runs straight on to the child that leads to the best; its other children begin branches of their own, further
down. Branches share a row where they do not meet, so the picture of a search is about as high as its beam is wide,
however long it ran.
"""

from __future__ import annotations

from dataclasses import dataclass

from .tree import Tree


@dataclass(frozen=True)
class Layout:
    """Columns are steps, the root's being 0; rows count from the top."""

    row: list[int]  # by node
    rows: int
    columns: int


def lay_out(tree: Tree) -> Layout:
    """Give every node a row."""
    children, branch_of = tree.children(), [-1] * len(tree)
    branches: list[list[int]] = []
    pending = [0]
    while pending:
        node = pending.pop()
        branch = [node]
        while children[node]:
            pending += children[node][1:]
            node = children[node][0]
            branch.append(node)
        for each in branch:
            branch_of[each] = len(branches)
        branches.append(branch)

    row, taken = [0] * len(tree), _Rows()
    lengths = tree.lengths.tolist()
    pending = [0]  # branches to be placed, the next one last
    while pending:
        branch = branches[pending.pop()]
        begin, end = lengths[branch[0]], lengths[branch[-1]]
        above = row[tree.parent[branch[0]]] + 1 if branch[0] else 0
        # from its parent's column on: the line that leads there needs room too
        place = taken.first_free(max(begin - 1, 0), end, above)
        for node in branch:
            row[node] = place
        # what leaves it late is placed first, nearest, so that lines of what leaves it early pass below and cross none
        pending += [branch_of[child] for node in branch for child in reversed(children[node][1:])]
    return Layout(row, len(taken.intervals), max(*lengths, tree.steps) + 1)


class _Rows:
    """What is taken of each row."""

    def __init__(self) -> None:
        self.intervals: list[list[tuple[int, int]]] = []

    def first_free(self, begin: int, end: int, row: int) -> int:
        """The first row from ``row`` on that is free from ``begin`` to ``end``, which it then is no more."""
        while row < len(self.intervals) and any(a <= end and begin <= b for a, b in self.intervals[row]):
            row += 1
        while row >= len(self.intervals):
            self.intervals.append([])
        self.intervals[row].append((begin, end))
        return row
