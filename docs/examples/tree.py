"""The tree that a beam search grew, drawn in text.

All that a search ever tried is a tree of tokens: paths with a common beginning share a branch. Hypotheses are where it
ended; a branch that left the beam before it ended was pruned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

Decode = Callable[[Sequence[int]], str]


class Ending(NamedTuple):
    """A hypothesis."""

    tokens: Sequence[int]
    log_prob: float
    finished: bool  # ended with EOS; else the search did before it


@dataclass
class Node:
    """A path of tokens from the root."""

    children: dict[int, Node] = field(default_factory=dict)  # by token
    ending: Ending | None = None
    rank: int = 0  # of the ending, 1 = best
    live: bool = False  # still in the beam when the search ended

    def child(self, token: int) -> Node:
        return self.children.setdefault(token, Node())

    def best_rank(self) -> float:
        """The rank of the best hypothesis at or below this node; infinite if there is none."""
        below = min((child.best_rank() for child in self.children.values()), default=float("inf"))
        return min(below, self.rank or float("inf"))

    def survives(self) -> bool:
        return self.live or self.ending is not None or any(child.survives() for child in self.children.values())


class Line(NamedTuple):
    """One line of the drawing."""

    rank: int  # of the hypothesis that ends here; 0 = none does
    ending: Ending | None
    branch: str  # the lines of the tree
    text: str  # of its tokens
    live: bool = False  # the search ended before this branch did
    pruned: int = 0  # how many pruned branches the text lists; 0 = the text is one branch that survived


def grow(steps: Iterable[tuple[list[int], list[int], list[bool]]], endings: Sequence[Ending]) -> Node:
    """Build the tree of one request.

    Args:
        steps: tokens, parents and valid of each step, ``[K]`` each, as ``BeamSearch.step`` returns them.
        endings: the hypotheses, best first.
    """
    root = Node()
    slots: list[Node | None] = [root]
    for tokens, parents, valid in steps:
        if not any(valid):
            break  # this request is done, others of its batch go on
        before = slots
        slots = []
        for token, parent, is_valid in zip(tokens, parents, valid, strict=True):
            origin = before[parent] if is_valid else None
            slots.append(origin.child(token) if origin else None)
    for node in slots:
        if node:
            node.live = True
    for rank, ending in enumerate(endings, 1):
        node = root
        for token in ending.tokens:
            node = node.child(token)
        node.ending, node.rank = ending, rank
    return root


def draw(root: Node, decode: Decode) -> Iterator[Line]:
    """Yield the lines below the root: each surviving branch, best hypothesis first, and what was pruned from it."""
    yield from _draw(root, [], "", decode)


def _draw(node: Node, pruned: list[list[int]], indent: str, decode: Decode) -> Iterator[Line]:
    survivors = [(token, child) for token, child in node.children.items() if child.survives()]
    pruned = pruned + [_longest(*pair) for pair in node.children.items() if pair not in survivors]
    survivors.sort(key=lambda pair: pair[1].best_rank())
    for i, pair in enumerate(survivors, 1):
        chain = _follow(*pair)
        last = i == len(survivors) and not pruned
        branch = indent + ("└─ " if last else "├─ ")
        yield Line(chain.end.rank, chain.end.ending, branch, decode(chain.tokens), live=chain.end.live)
        # what left the chain on its way stands beside what follows it
        yield from _draw(chain.end, chain.pruned, indent + ("   " if last else "│  "), decode)
    if pruned:
        yield Line(0, None, indent + "╰╌ ", " ╌ ".join(map(decode, pruned)), pruned=len(pruned))


class _Chain(NamedTuple):
    """A branch up to where it ends or forks into branches that survive."""

    tokens: list[int]
    end: Node
    pruned: list[list[int]]  # branches that left it on the way


def _follow(token: int, node: Node) -> _Chain:
    tokens, pruned = [token], []
    while node.ending is None and not node.live:
        survivors = [(next_token, child) for next_token, child in node.children.items() if child.survives()]
        if len(survivors) > 1:
            break
        pruned += [_longest(other, child) for other, child in node.children.items() if not child.survives()]
        [(token, node)] = survivors
        tokens.append(token)
    return _Chain(tokens, node, pruned)


def _longest(token: int, node: Node) -> list[int]:
    """The longest path that begins with this token."""
    return [token, *max((_longest(*pair) for pair in node.children.items()), key=len, default=[])]
