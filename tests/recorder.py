"""A beam search over Python lists, in float64, that keeps a record of all it does. Nothing here imports flashbeam."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from oracles import Logits, log_softmax64

Tokens = tuple[int, ...]


@dataclass
class RecordedStep:
    entropies: list[float]  # of the beams expanded, in their order
    margin: float  # score of the last kept less that of the first rejected
    width: int  # live beams after it
    finished: int


@dataclass
class Record:
    """What a search of one request did; tokens are those behind ``bos``."""

    log_probs: dict[Tokens, float] = field(default_factory=dict)  # of all that a step kept or finished
    finished: set[Tokens] = field(default_factory=set)
    live: set[Tokens] = field(default_factory=set)  # kept by the last step, not ended
    dead_ends: set[Tokens] = field(default_factory=set)
    steps: list[RecordedStep] = field(default_factory=list)
    n_best: list[Tokens] = field(default_factory=list)
    closest: float = math.inf  # least gap between neighbours in a ranking: below 1e-5, float32 may decide otherwise


def record(
    logits: Logits,
    bos: int,
    *,
    beam_size: int,
    max_length: int,
    eos: Iterable[int],
    alpha: float = 1.0,
    patience: float | None = None,  # None: run until nothing is left
    in_place: bool = False,
    allowed: Callable[[Tokens], np.ndarray] | None = None,
    normalize: str = "vocab",
) -> Record:
    """Beam search with ``score = log_prob / length ** alpha``."""
    eos, found = set(eos), Record()
    beams: list[tuple[Tokens, float]] = [((), 0.0)]  # in place also those that have ended
    pool: list[tuple[Tokens, float]] = []

    def score(entry: tuple[Tokens, float]) -> float:
        return entry[1] / len(entry[0]) ** alpha

    def by_score(entries: list[tuple[Tokens, float]]) -> list[tuple[Tokens, float]]:
        ordered = sorted(entries, key=score, reverse=True)
        gaps = [score(a) - score(b) for a, b in pairwise(ordered)]
        found.closest = min([found.closest, *gaps])
        return ordered

    def ended(tokens: Tokens) -> bool:
        return bool(tokens) and tokens[-1] in eos

    for length in range(1, max_length + 1):
        entropies, candidates = [], [beam for beam in beams if ended(beam[0])]
        for tokens, log_prob in beams:
            if ended(tokens):
                continue
            row = logits((bos, *tokens))
            mask = np.ones(len(row), bool) if allowed is None else allowed(tokens)
            log_probs = log_softmax64(row, mask if normalize == "allowed" and mask.any() else None)
            counted = log_probs[mask] if normalize == "allowed" else log_probs
            entropies.append(-float(np.sum(np.exp(counted) * counted)))
            candidates += [((*tokens, int(token)), log_prob + log_probs[token]) for token in np.flatnonzero(mask)]
            if not mask.any():
                found.dead_ends.add(tokens)
        ranked = by_score(candidates)
        best, last = ranked[:beam_size], length == max_length
        competing = ranked if in_place or last else [entry for entry in ranked if not ended(entry[0])]
        kept, rejected = competing[:beam_size], competing[beam_size : beam_size + 1]
        now_finished = [entry for entry in best if ended(entry[0]) and len(entry[0]) == length]
        margin = score(kept[-1]) - score(rejected[0]) if rejected else math.inf
        if not in_place:
            pool += now_finished
            kept = [entry for entry in kept if not ended(entry[0])]
        found.log_probs |= dict(kept) | dict(now_finished)
        found.finished |= {tokens for tokens, _ in now_finished}
        beams, live = kept, [entry for entry in kept if not ended(entry[0])]
        stop = patience is not None and len(pool) >= math.ceil(patience * beam_size - 1e-9)
        found.steps.append(RecordedStep(entropies, margin, 0 if stop and not last else len(live), len(now_finished)))
        found.live = {tokens for tokens, _ in live}
        if stop or not live:
            break
    if stop and patience is not None:  # in order of arrival; those at the last step all came in time
        pool = pool if last else pool[: math.ceil(patience * beam_size - 1e-9)]
        beams = beams if last else []
    found.n_best = [tokens for tokens, _ in by_score(beams if in_place else pool + beams)[:beam_size]]
    return found
