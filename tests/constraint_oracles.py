"""What each constraint allows, in plain Python, and what a search must then return. Nothing here is flashbeam's.

A rule says of a finished sequence, by naive search, whether it is legal. One that ``looks_ahead`` allows a token
exactly if some legal sequence goes on with it; one that does not judges what has been said so far.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from oracles import log_softmax64

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Setting:
    """All that a hypothesis' legality depends on besides its tokens."""

    vocab: int
    max_length: int
    eos: tuple[int, ...] = ()
    min_length: int = 0

    def body(self, tokens: Tokens) -> Tokens:
        return tokens[:-1] if tokens and tokens[-1] in self.eos else tokens

    def leaves(self) -> list[Tokens]:
        """Everything that can be a hypothesis where nothing is constrained."""
        others = [t for t in range(self.vocab) if t not in self.eos]
        found = list(itertools.product(others, repeat=self.max_length))
        for n in range(max(self.min_length, 1), self.max_length + 1):
            found += [(*body, end) for body in itertools.product(others, repeat=n - 1) for end in self.eos]
        return found


class Rule:
    """``legal(tokens, finished, setting)`` of whole sequences, ``may(prefix, token, setting)`` of the next token."""

    looks_ahead = True

    def legal(self, tokens: Tokens, finished: bool, setting: Setting) -> bool:
        raise NotImplementedError

    def adjust(self, row: np.ndarray, prefix: Tokens) -> np.ndarray:
        return row

    def may(self, prefix: Tokens, token: int, setting: Setting) -> bool:
        if self.looks_ahead:
            return (*prefix, token) in viable(self, setting)
        return self.legal((*prefix, token), token in setting.eos, setting)


@cache
def viable(rule: Rule, setting: Setting) -> frozenset[Tokens]:
    """Every beginning of every legal sequence."""
    return frozenset(
        leaf[:n]
        for leaf in setting.leaves()
        if rule.legal(leaf, leaf[-1] in setting.eos, setting)
        for n in range(1, len(leaf) + 1)
    )


# ---------------------------------------------------------------------------------------------------------------------
# rules


def contains(text: Sequence[int], span: Sequence[int]) -> bool:
    n = len(span)
    return any(tuple(text[i : i + n]) == tuple(span) for i in range(len(text) - n + 1))


@dataclass(frozen=True, eq=False)
class Items(Rule):
    items: list[list[int]]

    def legal(self, tokens, finished, setting):
        return list(setting.body(tokens)) in self.items


@dataclass(frozen=True, eq=False)
class Words(Rule):
    """The automaton as a dict: (state, token) -> state."""

    edges: dict[tuple[int, int], int]
    accepting: frozenset[int]
    start: int = 0

    def legal(self, tokens, finished, setting):
        state = self.start
        for token in setting.body(tokens):
            if (state, token) not in self.edges:
                return False
            state = self.edges[state, token]
        return state in self.accepting


@dataclass(frozen=True, eq=False)
class Matches(Rule):
    pattern: str
    vocabulary: list[str | None]

    def legal(self, tokens, finished, setting):
        parts = [self.vocabulary[token] for token in setting.body(tokens)]
        return all(parts) and re.fullmatch(self.pattern, "".join(parts)) is not None


def alternatives(phrase) -> list[list[int]]:
    return [phrase] if isinstance(phrase[0], int) else phrase


@dataclass(frozen=True, eq=False)
class Contains(Rule):
    phrases: list
    ordered: bool = False

    def legal(self, tokens, finished, setting):
        body = setting.body(tokens)
        if not self.ordered:
            return all(any(contains(body, a) for a in alternatives(phrase)) for phrase in self.phrases)

        def in_order(start: int, phrases: list) -> bool:
            if not phrases:
                return True
            return any(
                list(body[i : i + len(a)]) == a and in_order(i + len(a), phrases[1:])
                for i in range(start, len(body))
                for a in alternatives(phrases[0])
            )

        return in_order(0, self.phrases)


@dataclass(frozen=True, eq=False)
class ContainsNone(Rule):
    phrases: list[list[int]]
    looks_ahead = False

    def legal(self, tokens, finished, setting):
        return not any(contains(tokens, phrase) for phrase in self.phrases)


@dataclass(frozen=True, eq=False)
class NoNgramTwice(Rule):
    n: int
    prompt: tuple[int, ...] = ()
    looks_ahead = False

    def legal(self, tokens, finished, setting):
        said = self.prompt + setting.body(tokens)
        ngrams = [said[i : i + self.n] for i in range(len(said) - self.n + 1)]
        first = max(0, len(self.prompt) - self.n + 1)  # what the prompt says twice itself is not held against it
        return all(ngrams[i] not in ngrams[:i] for i in range(first, len(ngrams)))


@dataclass(frozen=True, eq=False)
class Begins(Rule):
    prefix: list[int]
    looks_ahead = False

    def legal(self, tokens, finished, setting):
        n = min(len(tokens), len(self.prefix))
        return list(tokens[:n]) == self.prefix[:n]


@dataclass(frozen=True, eq=False)
class NoLongSpan(Rule):
    """No span of more than ``longest`` tokens of any document."""

    documents: list[list[int]]
    longest: int
    looks_ahead = False

    def legal(self, tokens, finished, setting):
        body = setting.body(tokens)
        spans = [body[i : i + self.longest + 1] for i in range(len(body) - self.longest)]
        return not any(contains(document, span) for document in self.documents for span in spans)


@dataclass(frozen=True, eq=False)
class Copied(Rule):
    """Spans of the source one after the other, each of ``min_span`` tokens or more, in the source's order or in any."""

    source: list[int]
    monotone: bool = False
    min_span: int = 1

    def legal(self, tokens, finished, setting):
        body = list(setting.body(tokens))

        @cache
        def rest(said: int, after: int) -> bool:
            if said == len(body):
                return True
            for start in range(after, len(self.source)):
                for n in range(1, len(body) - said + 1):
                    if self.source[start : start + n] != body[said : said + n]:
                        break
                    if n >= self.min_span and rest(said + n, start + n if self.monotone else 0):
                        return True
            return False

        return rest(0, 0)


@dataclass(frozen=True, eq=False)
class Penalised(Rule):
    """Nothing is barred; what was said has another logit."""

    penalty: float
    prompt: tuple[int, ...] = ()
    looks_ahead = False

    def legal(self, tokens, finished, setting):
        return True

    def adjust(self, row, prefix):
        row = row.copy()
        for token in {*self.prompt, *prefix}:
            row[token] = (
                row[token] / np.float32(self.penalty) if row[token] > 0 else row[token] * np.float32(self.penalty)
            )
        return row


@dataclass(frozen=True, eq=False)
class Together(Rule):
    """Each looks ahead, or does not, on its own."""

    rules: list[Rule]

    def legal(self, tokens, finished, setting):
        return all(rule.legal(tokens, finished, setting) for rule in self.rules)

    def may(self, prefix, token, setting):
        return all(rule.may(prefix, token, setting) for rule in self.rules)

    def adjust(self, row, prefix):
        for rule in self.rules:
            row = rule.adjust(row, prefix)
        return row


class Anything(Rule):
    looks_ahead = False

    def legal(self, tokens, finished, setting):
        return True


# ---------------------------------------------------------------------------------------------------------------------
# what a search must return


@dataclass
class Enumerated:
    log_probs: dict[Tokens, float]  # of every legal sequence, cumulative
    token_log_probs: dict[Tokens, list[float]]
    widest: int  # leaves of the tree of what may follow, lost ones included: so many beams keep everything


def enumerate_legal(
    logits: Callable[[Tokens], np.ndarray],
    bos: int,
    rule: Rule,
    setting: Setting,
    *,
    normalize: str = "vocab",
    temperature: float = 1.0,
) -> Enumerated:
    """Every legal sequence with its log-probability in float64."""
    found, widest = {}, 0

    def visit(prefix: Tokens, log_probs: list[float]) -> None:
        nonlocal widest
        row = rule.adjust(logits((bos, *prefix)), prefix) / np.float32(temperature)
        allowed = np.array([rule.may(prefix, token, setting) for token in range(setting.vocab)])
        if len(prefix) + 1 < setting.min_length:
            allowed[list(setting.eos)] = False
        if not allowed.any():
            widest += 1
            return
        step = log_softmax64(row, allowed if normalize == "allowed" else None)
        for token in np.flatnonzero(allowed).tolist():
            leaf, path = (*prefix, token), [*log_probs, float(step[token])]
            if token in setting.eos or len(leaf) == setting.max_length:
                widest += 1
                if rule.legal(leaf, token in setting.eos, setting):
                    found[leaf] = path
            else:
                visit(leaf, path)

    visit((), [])
    return Enumerated({leaf: math.fsum(path) for leaf, path in found.items()}, found, widest)
