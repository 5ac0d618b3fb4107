"""What the studies of ``effects.py`` compute from what was found, and with what confidence."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

import flashbeam as fb
from effects_search import Found

RESAMPLES = 2000
BOOTSTRAP_SEED = 0


def distinct_ngrams(sequences: Sequence[Sequence[int]]) -> float:
    """Distinct n-grams of a set of completions, n = 2, 3, 4, as a share of all of them."""
    ngrams = [
        tuple(sequence[start : start + n])
        for n in (2, 3, 4)
        for sequence in sequences
        for start in range(len(sequence) - n + 1)
    ]
    return len(set(ngrams)) / max(len(ngrams), 1)


def interval(values: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray], paired: bool = False) -> list[float]:
    """A statistic and its 95 % interval: percentile bootstrap over the last axis of ``values``.

    Args:
        values: float64 ``[..., n]``; each row is resampled on its own, or all alike if ``paired``.
        statistic: of ``[..., n]``, possibly with resamples in front: a number, or one for each of them.
    """
    random = np.random.default_rng(BOOTSTRAP_SEED)
    shape = (RESAMPLES, *(1 for _ in values.shape[:-1]), values.shape[-1]) if paired else (RESAMPLES, *values.shape)
    samples = np.take_along_axis(values[None], random.integers(0, values.shape[-1], shape), -1)
    low, high = np.quantile(statistic(samples), (0.025, 0.975))
    return [float(statistic(values)), float(low), float(high)]


def mean_and_interval(values: np.ndarray) -> list[float]:
    """The mean of ``values [n]`` and its 95 % interval."""
    return interval(values, lambda samples: samples.mean(-1))


def estimates(found: Found, normalized: bool) -> np.ndarray:
    """The estimated entropy, ``E[-log p]``, of each run."""
    hyps = found.hypotheses
    return fb.estimate(hyps, -hyps.sampling_log_probs.masked_fill(~hyps.valid, 0.0), normalized).numpy()


def rmse(errors: np.ndarray) -> np.ndarray:
    """Root mean square over prompts and runs, the last two axes."""
    return np.sqrt((errors**2).mean((-2, -1)))


def over_fixed(samples: np.ndarray, column: int) -> np.ndarray:
    """How far the last of ``[..., widths + 1, 3, prompts]`` scores above a fixed width of equal cost.

    Between two fixed widths the mean score is interpolated over the logarithm of the mean cost, ``column``.
    """
    means = samples.mean(-1)
    gains = []
    for *fixed, own in means.reshape(-1, *means.shape[-2:]):
        costs, scores = np.log([one[column] for one in fixed]), [one[2] for one in fixed]
        gains.append(own[2] - np.interp(np.log(own[column]), costs, scores))
    return np.array(gains).reshape(means.shape[:-2])
