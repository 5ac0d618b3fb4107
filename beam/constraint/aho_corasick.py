"""The automaton that finds every occurrence of many words in a text: Aho, Corasick 1975, "Efficient string matching".

A state is a prefix of a word, the longest that the text so far ends with; the root, 0, is the empty one. States are
numbered by depth and, within a depth, in lexicographic order: a state's failure link and its parent have lower numbers,
and siblings are neighbours. Built once, on the host.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Word = tuple[int, ...]
Ints = NDArray[Any]


@dataclass(frozen=True)
class Tree:
    """The prefixes of words; S states, W words. Arrays are int64."""

    parent: Ints  # [S], the root is its own
    token: Ints  # [S], the last; of the root -1
    depth: Ints  # [S]
    failure: Ints  # [S], the longest proper suffix that is a state; the root is its own
    ends: Ints  # [W], state of each word
    levels: Ints  # [depths + 1], states levels[d] to levels[d + 1] have depth d

    @property
    def size(self) -> int:
        """S."""
        return len(self.parent)

    def by_level(self) -> Iterator[slice]:
        """The states of each depth from 1 on."""
        for start, end in zip(self.levels[1:], self.levels[2:], strict=False):
            yield slice(int(start), int(end))


def build(words: Sequence[Word]) -> Tree:
    """The tree of ``words``, none of them empty."""
    order = sorted(range(len(words)), key=words.__getitem__)
    parent, token, depth, levels = [0], [-1], [0], [0, 1]
    children: list[dict[int, int]] = [{}]
    at = dict.fromkeys(order, 0)  # how far each word has come; a word that is done is left out
    ends = np.zeros(len(words), dtype=np.int64)
    while at:
        reached = {}
        for word, state in at.items():
            following = words[word][depth[state]]
            child = children[state].get(following)
            if child is None:
                child = children[state][following] = len(parent)
                parent.append(state)
                token.append(following)
                depth.append(depth[state] + 1)
                children.append({})
            ends[word] = child
            if depth[child] < len(words[word]):
                reached[word] = child
        at = reached
        levels.append(len(parent))
    failure = [0] * len(parent)
    for state in range(levels[2] if len(levels) > 2 else 1, len(parent)):
        shorter = failure[parent[state]]
        while shorter and token[state] not in children[shorter]:
            shorter = failure[shorter]
        failure[state] = children[shorter].get(token[state], 0)
    return Tree(np.array(parent), np.array(token), np.array(depth), np.array(failure), ends, np.array(levels))


def along_failures(tree: Tree, values: Ints, join: Callable[[Ints, Ints], Ints]) -> Ints:
    """``values [S, ...]`` of each state joined with those of all states that are its suffixes."""
    values = values.copy()
    for level in tree.by_level():
        values[level] = join(values[level], values[tree.failure[level]])
    return values


def transitions(tree: Tree, alphabet: Ints) -> Ints:
    """The state after each token of ``alphabet [A]``, ascending, and after any other: int64 ``[S, A + 1]``."""
    column = np.searchsorted(alphabet, tree.token)
    following = np.zeros((tree.size, len(alphabet) + 1), dtype=np.int64)
    levels = [slice(0, 1), *tree.by_level()]
    for level, below in zip(levels, [*levels[1:], slice(0, 0)], strict=True):
        following[level] = following[tree.failure[level]]
        following[tree.parent[below], column[below]] = np.arange(below.start, below.stop)
    return following
