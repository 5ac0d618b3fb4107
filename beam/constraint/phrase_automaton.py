"""Phrases as an automaton: which token leads where, what is satisfied there, and how much is still missing."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .aho_corasick import Ints, Word, along_failures, build, transitions
from .lookahead import EXACT_PHRASES, least_of_all, least_of_each

Phrase = tuple[Word, ...]  # alternatives, any of which satisfies it


@dataclass(frozen=True)
class PhraseAutomaton:
    """S states over A tokens, state 0 first; n phrases whose being satisfied is not in the state but in a set."""

    alphabet: Ints  # int64 [A], ascending
    following: Ints  # int64 [S, A + 1], state after each of them, and after any other token
    found: Ints  # int64 [S], bits of the phrases that end here
    needed: Ints  # int32 [S, 2 ** n], fewest tokens that satisfy the rest; one 0 where distance is used
    distance: Ints | None  # int32 [S, n], fewest tokens that complete each phrase
    lengths: Ints  # int64 [n], of each phrase's shortest alternative, where distance is used

    @property
    def total(self) -> int:
        """What is needed at the start; where that is not known exactly, without any overlap."""
        return int(self.needed[0, 0]) + int(self.lengths.sum())


def unordered(phrases: Sequence[Phrase]) -> PhraseAutomaton:
    """All phrases, anywhere, in one Aho-Corasick automaton; exact for few phrases."""
    phrases = list(dict.fromkeys(tuple(sorted(set(phrase))) for phrase in phrases))  # those that are the same are one
    words = [word for phrase in phrases for word in phrase]
    phrase = np.repeat(np.arange(len(phrases)), [len(alternatives) for alternatives in phrases])
    tree = build(words)
    alphabet = np.unique(np.concatenate([np.array(word, dtype=np.int64) for word in words]))
    ending = np.zeros(tree.size, dtype=np.int64)
    np.bitwise_or.at(ending, tree.ends, np.int64(1) << phrase)
    found = along_failures(tree, ending, np.bitwise_or)
    needed, distance, lengths = np.zeros((1, 1), dtype=np.int32), None, np.zeros(0, dtype=np.int64)
    if len(phrases) <= EXACT_PHRASES:
        needed = least_of_all(tree, found, phrase, len(phrases))
    else:
        distance = least_of_each(tree, phrase, len(phrases))
        lengths = distance[0].astype(np.int64)
    return PhraseAutomaton(alphabet, transitions(tree, alphabet), found, needed, distance, lengths)


def ordered(phrases: Sequence[Phrase]) -> PhraseAutomaton:
    """One automaton after the other: each looks for its phrase from the end of the one before, the last for nothing.

    The occurrence that ends first leaves most room for the rest, so no other need be considered.
    """
    alphabet = np.unique(np.concatenate([np.array(word, dtype=np.int64) for phrase in phrases for word in phrase]))
    followings, needed = [], []
    start = 0
    rest = sum(min(map(len, phrase)) for phrase in phrases)
    for phrase in phrases:
        tree = build(phrase)
        complete = np.zeros(tree.size, dtype=bool)
        complete[tree.ends] = True
        complete = along_failures(tree, complete, np.logical_or)
        following = transitions(tree, alphabet)
        followings.append(np.where(complete[following], tree.size, following) + start)
        rest -= min(map(len, phrase))
        needed.append(least_of_each(tree, np.zeros(len(phrase), dtype=np.int64), 1)[:, 0] + rest)
        start += tree.size
    followings.append(np.full((1, len(alphabet) + 1), start))  # all is satisfied, and stays so
    needed.append(np.zeros(1, dtype=np.int32))
    states = start + 1
    return PhraseAutomaton(
        alphabet,
        np.concatenate(followings),
        np.zeros(states, dtype=np.int64),
        np.concatenate(needed).astype(np.int32)[:, None],
        None,
        np.zeros(0, dtype=np.int64),
    )


def anything() -> PhraseAutomaton:
    """No phrase at all."""
    none = np.zeros(0, dtype=np.int64)
    zero = np.zeros((1, 1), dtype=np.int64)
    return PhraseAutomaton(none, zero, np.zeros(1, dtype=np.int64), zero.astype(np.int32), None, none)
