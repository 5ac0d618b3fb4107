"""Slow, exact things that tests compare flashbeam with. Nothing here imports flashbeam.

``TableLM``       a language model that is a hash of the prefix, with a stateful batched wrapper
``enumerate_leaves``  every sequence such a model can end with, in float64
``naive_search``  the contract's beam search, one request, written literally over Python lists
``TinyAttention`` a small causal attention model with a key-value cache, for rescoring from scratch
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

FLAG_NAN, FLAG_INF, FLAG_DEAD_END = 1, 2, 4
F32 = np.float32
NEG_INF = F32(-np.inf)
# float32 scores closer than this may be ordered differently by another, equally correct, log-sum-exp
NOISE = 1e-5

Logits = Callable[[tuple[int, ...]], np.ndarray]  # prefix -> float32 [V]


# ---------------------------------------------------------------------------------------------------------------------
# models


class TableLM:
    """Logits are a seeded hash of the prefix, which starts with the request's first token, any integer.

    ``coarse``: quantise the logits to this step, so that exact ties are common. ``eos_bias`` is added to the ids of
    ``eos``. ``forget`` keeps only the length of the prefix, so that all beams of a step see the same row.
    """

    def __init__(
        self,
        vocab: int,
        seed: int = 0,
        *,
        scale: float = 2.0,
        coarse: float | None = None,
        eos: Iterable[int] = (),
        eos_bias: float = 0.0,
        forget: bool = False,
    ):
        self.vocab = vocab
        eos = list(eos)

        @cache
        def logits(prefix: tuple[int, ...]) -> np.ndarray:
            key = (prefix[0], len(prefix)) if forget else prefix
            row = np.random.default_rng([seed, len(prefix), *key]).normal(size=vocab) * scale
            row[eos] += eos_bias
            if coarse is not None:
                row = np.round(row / coarse) * coarse
            row = row.astype(F32)
            row.flags.writeable = False
            return row

        self.logits: Logits = logits

    def __call__(self, tokens: Tensor, cache: dict | None) -> tuple[Tensor, dict]:
        """``tokens [rows]`` -> ``logits [rows, V]``; the cache is a nest on purpose and carries each row's prefix."""
        column = tokens.reshape(-1, 1)
        if cache is None:
            prefix = column
        else:
            prefix = torch.cat([cache["prefix"], column], dim=1)
            # a reorder that moved one part of the nest and not another is caught here, not three steps later
            assert torch.equal(cache["layers"][0][0], -cache["prefix"]), "cache parts disagree"
            assert torch.equal(cache["layers"][1]["key"][:, :, 0], cache["prefix"].float()), "cache parts disagree"
        rows = [self.logits(tuple(p)) for p in prefix.tolist()]
        logits = torch.from_numpy(np.stack(rows))
        layers = [(-prefix, prefix[:, 0].clone()), {"key": prefix.float()[:, :, None].repeat(1, 1, 2)}]
        return logits, {"prefix": prefix, "layers": layers}


class TinyAttention:
    """One layer of causal attention, fixed random weights, float64 inside; logits leave as float32.

    The cache is ``(key, value)`` of shape ``[rows, heads, t, d]``, the layout of real decoders.
    """

    def __init__(self, vocab: int, seed: int = 0, heads: int = 2, width: int = 8):
        rng = np.random.default_rng(seed)

        def weight(*shape: int) -> Tensor:
            return torch.from_numpy(rng.normal(size=shape) / math.sqrt(shape[0]))

        self.heads, self.width, self.vocab = heads, width, vocab
        d = heads * width
        self.embedding, self.position = weight(vocab, d) * math.sqrt(vocab), weight(64, d) * 4
        self.query, self.key, self.value, self.head = weight(d, d), weight(d, d), weight(d, d), weight(d, vocab) * 4

    def __call__(self, tokens: Tensor, cache: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        t = 0 if cache is None else cache[0].shape[2]
        x = self.embedding[tokens.reshape(-1)] + self.position[t]

        def heads(w: Tensor) -> Tensor:
            return (x @ w).reshape(-1, self.heads, 1, self.width)

        key, value = heads(self.key), heads(self.value)
        if cache is not None:
            key, value = torch.cat([cache[0], key], dim=2), torch.cat([cache[1], value], dim=2)
        attention = torch.softmax(heads(self.query) @ key.transpose(2, 3) / math.sqrt(self.width), dim=-1)
        y = torch.tanh((attention @ value).reshape(x.shape) + x)
        return (y @ self.head).float(), (key, value)

    def rescore(self, bos: int, tokens: list[int], temperature: float = 1.0) -> list[float]:
        """The log-probability of each token, in float64, from an empty cache."""
        cache, previous, out = None, bos, []
        for token in tokens:
            logits, cache = self(torch.tensor([previous]), cache)
            out.append(float(torch.log_softmax(logits[0].double() / temperature, 0)[token]))
            previous = token
        return out


# ---------------------------------------------------------------------------------------------------------------------
# enumeration


@dataclass
class Leaf:
    tokens: tuple[int, ...]
    log_prob: float
    finished: bool


def log_softmax64(row: np.ndarray, allowed: np.ndarray | None = None) -> np.ndarray:
    """float64 log-softmax of one row; ``allowed`` restricts the normaliser, not the result."""
    x = row.astype(np.float64)
    y = x if allowed is None else x[allowed]
    y = y[np.isfinite(y)]
    m = y.max()
    return x - (m + math.log(np.exp(y - m).sum()))


def enumerate_leaves(
    logits: Logits,
    bos: int,
    *,
    eos: Iterable[int],
    max_length: int,
    min_length: int = 0,
    temperature: float = 1.0,
    mask: Callable[[tuple[int, ...]], np.ndarray] | None = None,
    normalize: str = "vocab",
) -> list[Leaf]:
    """Every hypothesis an unbounded beam can end with: up to an EOS, or ``max_length`` tokens without one."""
    eos = set(eos)
    leaves = []

    def visit(prefix: tuple[int, ...], log_prob: float) -> None:
        row = logits((bos, *prefix)) / F32(temperature)
        allowed = np.ones(len(row), bool) if mask is None else mask((bos, *prefix)).copy()
        if len(prefix) + 1 < min_length:
            allowed[list(eos)] = False
        if not allowed.any():
            return
        log_probs = log_softmax64(row, allowed if normalize == "allowed" else None)
        for token in np.flatnonzero(allowed & np.isfinite(row)):
            child, phi = (*prefix, int(token)), log_prob + log_probs[token]
            if int(token) in eos or len(child) == max_length:
                leaves.append(Leaf(child, phi, int(token) in eos))
            else:
                visit(child, phi)

    visit((), 0.0)
    return leaves


# ---------------------------------------------------------------------------------------------------------------------
# length penalties


@dataclass(frozen=True)
class Power:
    """score = log_prob / length**alpha."""

    alpha: float

    def __call__(self, length: int) -> float:
        return float(length) ** self.alpha


@dataclass(frozen=True)
class Gnmt:
    """score = log_prob / ((5 + length) / 6)**alpha."""

    alpha: float

    def __call__(self, length: int) -> float:
        return ((5.0 + length) / 6.0) ** self.alpha


Penalty = Power | Gnmt


# ---------------------------------------------------------------------------------------------------------------------
# the contract's search, written literally


@dataclass
class Hypothesis:
    tokens: tuple[int, ...]
    log_prob: np.float32
    score: np.float32
    finished: bool
    rank: int = 0  # place in the total order of the step it ended at


@dataclass
class Beam:
    tokens: tuple[int, ...]
    log_prob: np.float32
    frozen: bool = False  # in place: ended, keeps its slot
    rank: int = 0  # place in the total order of the step that made it


@dataclass
class NaiveStep:
    tokens: list[int]  # of the new beams, best first; invalid slots are absent
    parents: list[int]
    frozen: list[bool]  # ended before this step (in place)
    ended: list[bool]  # took EOS in this step and kept its slot (in place)
    done: bool


@dataclass
class NaiveResult:
    hypotheses: list[Hypothesis]
    steps: int
    done: bool
    flags: int
    margin: float  # the smallest gap that decided anything; below NOISE another float32 lse may decide otherwise
    trace: list[NaiveStep] = field(default_factory=list)


def lse64(row: np.ndarray, temperature: float = 1.0) -> np.float32:
    """The float32 nearest to the log-sum-exp of ``row / temperature`` (-inf ignored), and -inf for an empty row."""
    x = (row / F32(temperature)).astype(np.float64)
    x = x[x > -np.inf]
    if not len(x):
        return NEG_INF
    m = x.max()
    return F32(m + math.log(np.exp(x - m).sum()))


@dataclass
class _Candidate:
    score: np.float32
    parent: int
    adjusted: np.float32
    token: int  # -1: a frozen hypothesis' only continuation
    log_prob: np.float32
    identity: tuple = ()  # equal identities tie exactly, whatever the log-sum-exp

    def key(self) -> tuple:
        return (-self.score, self.parent, -self.adjusted + F32(0), self.token)


def naive_search(
    logits: Logits,
    bos: int,
    *,
    beam_size: int,
    max_length: int,
    eos: Iterable[int],
    min_length: int = 0,
    penalty: Penalty = Power(1.0),
    stopping: str | float = 1.0,  # "exact", "exhausted" or the patience
    finished: str = "pool",
    temperature: float = 1.0,
    vocab_size: int | None = None,
    normalize: str = "vocab",
    mask: Callable[[tuple[int, ...]], np.ndarray] | None = None,
    num_hypotheses: int | None = None,
    stop_after: int | None = None,  # finalize early, after this many steps
    lse: Callable[[np.ndarray, float], np.float32] = lse64,
    exact_lse: bool = False,  # `lse` is bitwise the library's: only penalties can be decided by noise
) -> NaiveResult:
    eos = set(eos)
    beams = [Beam((), F32(0))]
    pool: list[Hypothesis] = []
    capacity = beam_size if isinstance(stopping, str) else math.ceil(stopping * beam_size - 1e-9)
    flags, steps, done, margin, trace = 0, 0, False, math.inf, []

    def score_of(log_prob: np.float32, length: int) -> np.float32:
        return F32(np.float64(log_prob) / penalty(length))

    def by_score(hypotheses: list[Hypothesis]) -> list[Hypothesis]:
        return sorted(hypotheses, key=lambda h: (-h.score, len(h.tokens), h.rank))

    def note_gaps(ordered: list[tuple[float, object]], exact: bool) -> None:
        nonlocal margin
        for (a, same_a), (b, same_b) in pairwise(ordered):
            if same_a != same_b and not exact:
                margin = min(margin, abs(float(a) - float(b)))

    def note_hypotheses(hypotheses: list[Hypothesis]) -> None:
        ordered = by_score(hypotheses)
        note_gaps([(h.score, (h.log_prob, len(h.tokens), exact_lse or h.tokens[:-1])) for h in ordered], False)

    limit = max_length if stop_after is None else min(stop_after, max_length)
    while not done and steps < limit:
        length = steps + 1
        last = length == max_length
        candidates: list[_Candidate] = []
        for slot, beam in enumerate(beams):
            if beam.frozen:
                score = score_of(beam.log_prob, len(beam.tokens))
                candidates.append(_Candidate(score, slot, F32(0), -1, beam.log_prob, ("frozen", slot)))
                continue
            row = logits((bos, *beam.tokens))[:vocab_size].copy()
            if np.isnan(row).any():
                flags |= FLAG_NAN
                row[np.isnan(row)] = NEG_INF
            if np.isposinf(row).any():
                flags |= FLAG_INF
                continue
            allowed = np.ones(len(row), bool)
            if mask is not None:
                allowed &= mask((bos, *beam.tokens))[:vocab_size]
            if length < min_length:
                allowed[sorted(eos)] = False
            normalised = np.where(allowed, row, NEG_INF).astype(F32) if normalize == "allowed" else row
            total = lse(normalised, temperature)
            row = (row / F32(temperature)).astype(F32)
            for token in np.flatnonzero(allowed & (row > -np.inf)):
                log_prob = F32(beam.log_prob + min(F32(row[token] - total), F32(0)))
                # pooled beams all have one length, so the log-probability ranks them
                score = log_prob if finished == "pool" else score_of(log_prob, length)
                identity = (slot, float(row[token]) + 0.0)
                candidates.append(_Candidate(score, slot, row[token], int(token), log_prob, identity))
        candidates.sort(key=_Candidate.key)
        # every rank that can matter: the K best, and the K best that are not EOS
        others = [i for i, c in enumerate(candidates) if c.token not in eos]
        reach = max(beam_size, *(i + 1 for i in others[:beam_size]), 0) if others else beam_size
        ranks_by_log_prob = finished == "pool" or penalty.alpha == 0
        note_gaps(
            [(c.score, c.identity) for c in candidates[: reach + 1]],
            exact_lse and ranks_by_log_prob,
        )

        best = candidates[:beam_size]
        steps = length
        if finished == "in_place":
            new = []
            for c in best:
                tokens = beams[c.parent].tokens
                if c.token < 0:
                    new.append(beams[c.parent])
                else:
                    new.append(Beam((*tokens, c.token), c.log_prob, frozen=c.token in eos))
            beams = new
            done = last or all(b.frozen for b in beams)
            trace.append(
                NaiveStep(
                    [c.token for c in best],
                    [c.parent for c in best],
                    [c.token < 0 for c in best],
                    [c.token in eos for c in best],
                    done,
                )
            )
            if not beams:
                flags |= FLAG_DEAD_END
            continue

        arrivals = [
            Hypothesis(
                (*beams[c.parent].tokens, c.token), c.log_prob, score_of(c.log_prob, length), c.token in eos, rank
            )
            for rank, c in enumerate(best)
            if c.token in eos or last
        ]
        if last:
            # the K best candidates become hypotheses whether EOS or not, and compete with the pool by score
            pool = pool + arrivals
            beams, kept = [], []
        else:
            pool = pool + arrivals
            pool = (by_score(pool) if isinstance(stopping, str) else pool)[:capacity]
            kept = [candidates[i] for i in others[:beam_size]]
            beams = [
                Beam((*beams[c.parent].tokens, c.token), c.log_prob, rank=i) for i, c in zip(others, kept, strict=False)
            ]
        done = last or not beams
        if not done and len(pool) >= capacity:
            if stopping == "exact":
                ends = (max(length + 1, min_length), max_length)
                bound = max(float(b.log_prob) / penalty(n) for b in beams for n in ends)
                worst = float(pool[-1].score)
                margin = min(margin, abs(worst - bound)) if worst != bound else margin
                done = worst >= bound
            else:
                done = stopping != "exhausted"
        if not beams and not pool:
            flags |= FLAG_DEAD_END
        trace.append(
            NaiveStep([c.token for c in kept], [c.parent for c in kept], [False] * len(kept), [False] * len(kept), done)
        )

    if finished == "in_place":
        hypotheses = [
            Hypothesis(b.tokens, b.log_prob, score_of(b.log_prob, len(b.tokens)), b.frozen, slot)
            for slot, b in enumerate(beams)
        ]
    elif done:
        hypotheses = pool
    else:
        hypotheses = pool + [
            Hypothesis(b.tokens, b.log_prob, score_of(b.log_prob, len(b.tokens)), False, b.rank) for b in beams
        ]
    note_hypotheses(hypotheses)
    hypotheses = by_score(hypotheses)[: beam_size if num_hypotheses is None else num_hypotheses]
    return NaiveResult(hypotheses, steps, done, flags, margin, trace)


# ---------------------------------------------------------------------------------------------------------------------
# top-k of one request, by sorting everything


@dataclass
class Selected:
    log_probs: np.ndarray  # float32 [k], -inf padded
    parents: np.ndarray  # int64 [k]
    tokens: np.ndarray  # int64 [k]
    valid: np.ndarray  # bool [k]


def adjusted_logits(logits: np.ndarray, temperature: np.ndarray | float | None = None) -> np.ndarray:
    """float32 ``logits / temperature`` with NaN as -inf; rows with +inf become all -inf."""
    x = logits.astype(F32)
    with np.errstate(over="ignore"):
        if temperature is not None:
            x = (x / np.broadcast_to(np.asarray(temperature, F32).reshape(-1, 1), x.shape)).astype(F32)
    x = np.where(np.isnan(x), NEG_INF, x)
    return np.where(np.isposinf(x).any(-1, keepdims=True), NEG_INF, x).astype(F32)


def select_by_sorting(
    adjusted: np.ndarray,  # float32 [K, V], as of adjusted_logits
    log_probs: np.ndarray,  # float32 [K], -inf = invalid slot
    lse: np.ndarray,  # float32 [K]
    k: int,
    allowed: np.ndarray | None = None,  # bool [K, V]
) -> Selected:
    """The k best of K*V candidates: (score desc, parent asc, adjusted logit desc, token asc)."""
    K, V = adjusted.shape
    live = (adjusted > -np.inf) & (log_probs > -np.inf)[:, None]
    if allowed is not None:
        live &= allowed
    with np.errstate(invalid="ignore"):
        increment = np.minimum((adjusted - lse[:, None]).astype(F32), F32(0))
        scores = np.where(live, (log_probs[:, None] + increment).astype(F32), NEG_INF)
    parents, tokens = np.divmod(np.arange(K * V), V)
    negated_adjusted = -np.where(live, adjusted, NEG_INF).ravel() + F32(0)  # -0.0 becomes +0.0
    # invalid candidates last whatever their score is; then the contract's order; lexsort's last key is the first
    order = np.lexsort((tokens, negated_adjusted, parents, -scores.ravel(), ~live.ravel()))[:k]
    order = order[live.ravel()[order]]
    pad = k - len(order)

    def padded(x: np.ndarray, fill: float) -> np.ndarray:
        return np.concatenate([x[order], np.full(pad, fill, x.dtype)])

    return Selected(padded(scores.ravel(), -np.inf), padded(parents, 0), padded(tokens, 0), np.arange(k) < len(order))


def pack_by_hand(mask: np.ndarray) -> np.ndarray:
    """bool [..., V] -> int32 [..., ceil(V / 32)]: bit ``j % 32`` of word ``j // 32``."""
    V = mask.shape[-1]
    words = np.zeros((*mask.shape[:-1], (V + 31) // 32), np.uint32)
    for j in range(V):
        words[..., j // 32] |= mask[..., j].astype(np.uint32) << np.uint32(j % 32)
    return words.view(np.int32)
