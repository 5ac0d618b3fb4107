"""Terms of the score told anew, in float64, from nothing but the model and the tokens returned. No flashbeam here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from oracles import Logits, TableLM, log_softmax64

_LEAST = float(np.finfo(np.float32).tiny)


@dataclass(frozen=True)
class Path:
    """What a term may look at: the surprisals of the tokens, the least that could have followed, the attention paid."""

    tokens: tuple[int, ...]
    surprisals: np.ndarray
    least: np.ndarray
    attention: np.ndarray  # [n, S]
    source: int  # tokens of the source


def path(
    logits: Logits,
    bos: int,
    tokens: Sequence[int],
    *,
    temperature: float = 1.0,
    allowed: Callable[[tuple[int, ...]], np.ndarray] | None = None,
    attention: AttendingLM | None = None,
) -> Path:
    """``allowed(prefix)`` says which tokens may follow; all may by default."""
    surprisals, least, paid, prefix = [], [], [], (bos,)
    for token in tokens:
        row = -log_softmax64(logits(prefix) / np.float32(temperature))
        may = np.ones(len(row), bool) if allowed is None else allowed(prefix)
        surprisals.append(row[token])
        least.append(row[may].min())
        paid.append(np.zeros(1) if attention is None else attention.attention(prefix))
        prefix = (*prefix, token)
    source = 0 if attention is None else attention.sizes[bos]
    return Path(tuple(tokens), np.array(surprisals), np.array(least), np.array(paid), source)


def uid(kind: str, strength: float, counts_start: bool = False) -> Callable[[Path], float]:
    def value(p: Path) -> float:
        u = p.surprisals
        started, steps = np.r_[0.0, u], len(u) + counts_start
        regulariser = {
            "greedy": lambda: ((u - p.least) ** 2).sum(),
            "square": lambda: (u**2).sum(),
            "max": lambda: u.max(),
            "variance": lambda: np.var(started if counts_start else u),
            "local": lambda: (np.diff(started) ** 2).sum() / steps,
        }[kind]()
        return -strength * float(regulariser)

    return value


def token_reward(reward: float, up_to: float = np.inf) -> Callable[[Path], float]:
    return lambda p: reward * min(len(p.tokens), up_to)


def source_reward(reward: float, per_source_token: float) -> Callable[[Path], float]:
    return lambda p: reward * min(len(p.tokens), per_source_token * p.source)


def word_reward(reward: float, starts: Sequence[int]) -> Callable[[Path], float]:
    return lambda p: reward * sum(token in starts for token in p.tokens)


def coverage(beta: float, kind: str = "gnmt") -> Callable[[Path], float]:
    def value(p: Path) -> float:
        paid = p.attention.sum(0)[: p.source]
        if kind == "summary":
            return -beta * (np.maximum(paid, 1.0).sum() - len(paid))
        return beta * float(np.log(np.clip(paid, _LEAST, 1.0)).sum())

    return value


def score(p: Path, norm: float, terms: Sequence[Callable[[Path], float]]) -> float:
    return -float(p.surprisals.sum()) / norm + sum(term(p) for term in terms)


def naive_search(
    logits: Logits,
    bos: int,
    terms: Sequence[Callable[[Path], float]],
    *,
    beams: int,
    longest: int,
    eos: int,
    alpha: float,
) -> tuple[list[tuple[float, tuple[int, ...]]], float]:
    """The K best of the pool by score, run until nothing is left, and the smallest gap that decided anything.

    Every token of every beam is scored from scratch; EOS among the K best candidates finish, the K best others go on.
    """
    live, pool, gap = [()], [], np.inf
    for length in range(1, longest + 1):
        norm = length**alpha
        candidates = sorted(
            (
                (score(path(logits, bos, (*beam, token)), norm, terms), (*beam, token))
                for beam in live
                for token in range(len(logits((bos,))))
            ),
            reverse=True,
        )
        others = [c for c in candidates if c[1][-1] != eos]
        for ranked, cut in ((candidates, beams), (others, beams)):
            if len(ranked) > cut:
                gap = min(gap, ranked[cut - 1][0] - ranked[cut][0])
        pool += [c for c in candidates[:beams] if c[1][-1] == eos or length == longest]
        live = [tokens for _, tokens in others[:beams]]
    pool.sort(reverse=True)
    gaps = [a[0] - b[0] for a, b in pairwise(pool[: beams + 1])]
    return pool[:beams], min([gap, *gaps])


@dataclass
class AttendingLM:
    """A table model that also pays attention, a hash of the prefix, to sources of ``sizes[bos]`` tokens."""

    lm: TableLM
    sizes: dict[int, int]
    pad_to: int = 0  # positions, those beyond the source's are padding
    seed: int = 0
    paid: dict[tuple[int, ...], np.ndarray] = field(default_factory=dict)

    def attention(self, prefix: tuple[int, ...]) -> np.ndarray:
        if prefix not in self.paid:
            size = self.sizes[prefix[0]]
            x = np.exp(2 * np.random.default_rng([self.seed, len(prefix), *prefix]).normal(size=size))
            row = np.zeros(max(self.pad_to, *self.sizes.values()))
            row[:size] = x / x.sum()
            self.paid[prefix] = row.astype(np.float32).astype(np.float64)
        return self.paid[prefix]

    def __call__(self, tokens: Tensor, cache: dict | None) -> tuple[Tensor, dict, Tensor]:
        logits, cache = self.lm(tokens, cache)
        rows = [self.attention(tuple(prefix)) for prefix in cache["prefix"].tolist()]
        return logits, cache, torch.from_numpy(np.stack(rows)).float()
