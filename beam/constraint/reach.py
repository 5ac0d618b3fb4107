"""After how many more tokens each state of an automaton can accept: the table that lets a search look ahead exactly.

reach[s, n // 32] has bit n % 32 set  <=>  some word of exactly n tokens leads from state s to an accepting state
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int32]
Bools = NDArray[np.bool_]


def words_for(longest: int) -> int:
    """L, words of a table that has bits ``0 .. longest``."""
    return longest // 32 + 1


def reach_of_tree(sizes: list[int], children: Ints, accepting: Bools) -> Ints:
    """The table of a tree in breadth-first order, for every length that it has.

    Args:
        sizes: number of nodes of each level.
        children: int32 ``[S]``, how many children each node has.
        accepting: bool ``[S]``.

    Returns:
        int32 ``[S, L]``.
    """
    reach = np.zeros((len(accepting), words_for(len(sizes) - 1)), np.uint32)
    reach[:, 0] = accepting
    end = len(accepting)
    for size, above in zip(sizes[:0:-1], sizes[-2::-1], strict=True):
        level, parents = reach[end - size : end], slice(end - size - above, end - size)
        one_more = level << 1
        one_more[:, 1:] |= level[:, :-1] >> 31
        count = children[parents]
        first = (np.cumsum(count) - count)[count > 0]
        reach[parents][count > 0] |= np.bitwise_or.reduceat(one_more, first, axis=0)
        end -= size
    return reach.view(np.int32)


def reach_of_graph(indptr: Ints, targets: Ints, accepting: Bools, words: int) -> Ints:
    """The table of any automaton, for lengths below ``32 * words``: int32 ``[S, words]``."""
    reach = np.zeros((len(accepting), words), np.uint32)
    leaving = np.flatnonzero(np.diff(indptr))  # reduceat has no empty segments
    first = indptr[leaving]
    now = accepting
    for n in range(32 * words):
        reach[:, n // 32] |= now.astype(np.uint32) << np.uint32(n % 32)
        before = np.zeros_like(now)
        if len(leaving):
            before[leaving] = np.logical_or.reduceat(now[targets], first)
        if np.array_equal(before, now):  # and so from here on
            rest = np.where(now, np.uint32(0xFFFFFFFF), np.uint32(0))
            reach[:, n // 32] |= rest << np.uint32(n % 32)
            reach[:, n // 32 + 1 :] = rest[:, None]
            break
        now = before
    return reach.view(np.int32)


def reachable(indptr: NDArray[Any], targets: NDArray[Any], sources: Bools) -> Bools:
    """bool ``[S]``: the states that some word, the empty one included, leads to from ``sources``."""
    found = sources.copy()
    frontier: NDArray[Any] = np.flatnonzero(sources)
    while len(frontier):
        following = np.unique(targets[edges_of(indptr, frontier)])
        frontier = following[~found[following]]
        found[frontier] = True
    return found


def leads_to(sources: NDArray[np.int64], targets: NDArray[np.int64], accepting: Bools) -> Bools:
    """bool ``[S]``: the states from which edges, given in any order, lead to an accepting one."""
    count = np.bincount(targets, minlength=len(accepting))
    indptr = np.concatenate(([0], np.cumsum(count)))
    return reachable(indptr, sources[np.argsort(targets)], accepting)


def edges_of(indptr: NDArray[Any], states: NDArray[Any]) -> NDArray[np.int64]:
    """The numbers of the edges of ``states``, in their order."""
    count = (indptr[states + 1] - indptr[states]).astype(np.int64)
    last = np.cumsum(count)
    within: NDArray[np.int64] = np.repeat(indptr[states] - last + count, count)
    return within + np.arange(len(within))
