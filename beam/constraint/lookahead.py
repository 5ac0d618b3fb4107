"""How few tokens can still complete what is missing: shortest paths through an automaton of words.

Let d(q, w) be the fewest tokens that complete word w from state q: ``len(w)`` less the longest suffix of q's string
that is a prefix of w. With a set m of satisfied phrases, each a set of words,

    D[q, m] = min over words w of phrases not in m of  d(q, w) + D[end(w), m | phrases inside w]          D[q, all] = 0

which is exact: in a shortest continuation, take the occurrences that satisfy each phrase first and drop those that lie
inside another; the others come in order, each completed from the end of the one before. A state that the text is in has
everything inside its string in m, so phrases inside w may be added whole.
"""

import numpy as np

from .aho_corasick import Ints, Tree, along_failures

FAR = 1 << 20  # more tokens than any phrase has
EXACT_PHRASES = 10  # 2 ** 10 sets of them for each state


def least(tree: Tree, words: Ints, costs: Ints) -> Ints:
    """The minimum over words w of ``d(q, w) + costs[w]``: int32 ``[S, M]``.

    Args:
        tree: the automaton.
        words: ``[W]``, the state at the end of each.
        costs: int32 ``[W, M]``.
    """
    through = np.full((tree.size, costs.shape[1]), FAR, dtype=np.int32)  # by way of a state to the end of a word
    for end, cost in zip(words, costs, strict=True):
        through[end] = np.minimum(through[end], cost + tree.depth[end])
    for level in reversed(list(tree.by_level())):
        parents = tree.parent[level]
        first = np.flatnonzero(np.diff(parents, prepend=-1))  # siblings are neighbours
        above = parents[first]
        through[above] = np.minimum(through[above], np.minimum.reduceat(through[level], first, axis=0))
    return along_failures(tree, (through - tree.depth[:, None]).astype(np.int32), np.minimum)


def inside(tree: Tree, found: Ints) -> Ints:
    """The phrases inside each state's string, from those that end at it, ``found [S]`` bits of int64."""
    contained = found.copy()
    for level in tree.by_level():
        contained[level] |= contained[tree.parent[level]]
    return contained


def least_of_each(tree: Tree, phrase: Ints, count: int) -> Ints:
    """The fewest tokens that complete each phrase: int32 ``[S, count]``; ``phrase [W]`` is each word's."""
    costs = np.where(phrase[:, None] == np.arange(count), 0, FAR).astype(np.int32)
    return least(tree, tree.ends, costs)


def least_of_all(tree: Tree, found: Ints, phrase: Ints, count: int) -> Ints:
    """``D[q, m]`` for every set m of ``count`` phrases, a number of ``count`` bits: int32 ``[S, 2 ** count]``."""
    sets = np.arange(1 << count)
    size = sum((sets >> bit) & 1 for bit in range(count)) + np.zeros_like(sets)
    contained = inside(tree, found)[tree.ends]
    needed = np.zeros((tree.size, len(sets)), dtype=np.int32)
    for missing in range(1, count + 1):
        now = sets[size == count - missing]
        unmet = ((now >> phrase[:, None]) & 1) == 0  # [W, sets]
        after = needed[tree.ends[:, None], now | contained[:, None]]
        needed[:, now] = least(tree, tree.ends, np.where(unmet, after, FAR).astype(np.int32))
    return needed
