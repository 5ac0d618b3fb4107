"""Compare beam search with greedy search on 100 prompts from files the model was not trained on.

``python evaluate.py`` prints the table of ``docs/demo.md``; a few minutes on one thread.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from code_corpus import PROMPTS, completes
from codelm import CodeLM, Tokenizer, load
from demo import complete
from report import NOISE

BEAM_SIZES = (4, 16)
MAX_LENGTH = 64  # tokens
BATCH = 25  # prompts; bounds the memory of the cache
SEED = 0  # of the bootstrap: all else is deterministic
RESAMPLES = 10_000


class Best(NamedTuple):
    """The likeliest completion of each of P prompts."""

    log_probs: np.ndarray  # float64 [P]
    finished: np.ndarray  # bool [P], ended with EOS
    tokenises: np.ndarray  # bool [P], prompt and completion are Python tokens


def best_completions(
    model: CodeLM, tokenizer: Tokenizer, prompts: Sequence[str], beam_size: int, max_length: int = MAX_LENGTH
) -> Best:
    """Complete prompts with beams of one width and judge the likeliest completion of each."""
    log_probs: list[float] = []
    finished: list[bool] = []
    tokenises: list[bool] = []
    for start in range(0, len(prompts), BATCH):
        batch = prompts[start : start + BATCH]
        completions = complete(model, [tokenizer.encode(prompt) for prompt in batch], beam_size, max_length)
        for request, prompt in enumerate(batch):
            best = completions.endings(request)[0]
            log_probs.append(best.log_prob)
            finished.append(best.finished)
            tokenises.append(completes(prompt, tokenizer.decode(best.tokens)))
    return Best(np.array(log_probs), np.array(finished), np.array(tokenises))


def mean_and_interval(values: np.ndarray) -> tuple[float, float, float]:
    """Return the mean of ``values [P]`` and the ends of its 95 % confidence interval (percentile bootstrap)."""
    samples = np.random.default_rng(SEED).choice(values, (RESAMPLES, len(values))).mean(1)
    low, high = np.quantile(samples, (0.025, 0.975))
    return float(values.mean()), float(low), float(high)


def describe(values: np.ndarray) -> str:
    mean, low, high = mean_and_interval(values)
    return f"{mean:.2f} ({low:.2f} to {high:.2f})"


def main() -> None:
    torch.set_num_threads(1)
    model, tokenizer = load()
    prompts = json.loads(PROMPTS.read_text())
    greedy = best_completions(model, tokenizer, prompts, 1)
    print(f"{len(prompts)} held-out prompts, at most {MAX_LENGTH} tokens, ranked by log-probability (nats)\n")
    print("| | tokenise | end with EOS | likelier than greedy | mean gain (95 % interval) | where greedy ended |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    print(f"| greedy | {greedy.tokenises.mean():.0%} | {greedy.finished.mean():.0%} | | | |")
    for beam_size in BEAM_SIZES:
        best = best_completions(model, tokenizer, prompts, beam_size)
        gains = best.log_probs - greedy.log_probs
        shares = " | ".join(f"{share.mean():.0%}" for share in (best.tokenises, best.finished, gains > NOISE))
        print(f"| {beam_size} beams | {shares} | {describe(gains)} | {describe(gains[greedy.finished])} |")


if __name__ == "__main__":
    main()
