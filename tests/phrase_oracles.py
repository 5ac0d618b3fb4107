"""What phrases ask for, by plain search in lists of tokens. Nothing here imports flashbeam."""

from __future__ import annotations

import random
from functools import cache

Word = tuple[int, ...]
Phrase = tuple[Word, ...]  # alternatives


def contains(text: Word, word: Word) -> bool:
    return any(text[i : i + len(word)] == word for i in range(len(text) - len(word) + 1))


def in_order(text: Word, phrases: tuple[Phrase, ...]) -> bool:
    """Whether there are disjoint occurrences, one of each phrase, one after the other: all are tried."""
    if not phrases:
        return True
    ends = {i + len(w) for w in phrases[0] for i in range(len(text)) if text[i : i + len(w)] == w}
    return any(in_order(text[end:], phrases[1:]) for end in ends)


def satisfied(text: Word, phrases: tuple[Phrase, ...], ordered: bool = False) -> bool:
    if ordered:
        return in_order(text, phrases)
    return all(any(contains(text, word) for word in phrase) for phrase in phrases)


@cache
def fewest(text: Word, phrases: tuple[Phrase, ...], ordered: bool = False) -> int:
    """The fewest tokens that satisfy ``phrases`` after ``text``: breadth first, over what of a text matters."""
    reach = max(len(word) for phrase in phrases for word in phrase)
    tokens = sorted({token for phrase in phrases for word in phrase for token in word})

    def essence(text: Word) -> object:
        if ordered:
            return text
        return text[max(0, len(text) - reach + 1) :], tuple(any(contains(text, w) for w in p) for p in phrases)

    seen, texts, count = {essence(text)}, [text], 0
    while not any(satisfied(each, phrases, ordered) for each in texts):
        following = []
        for longer in ((*each, token) for each in texts for token in tokens):
            if essence(longer) not in seen:
                seen.add(essence(longer))
                following.append(longer)
        texts, count = following, count + 1
    return count


def random_phrases(
    rng: random.Random, tokens: list[int], count: int, longest: int = 3, alternatives: int = 1
) -> tuple[Phrase, ...]:
    """Few tokens, so that phrases overlap, repeat themselves and lie inside one another."""

    def word() -> Word:
        return tuple(rng.choice(tokens) for _ in range(rng.randint(1, longest)))

    return tuple(tuple(word() for _ in range(rng.randint(1, alternatives))) for _ in range(count))
