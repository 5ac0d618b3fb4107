"""Other ways to choose than the best: samples of the model and diverse beams.

``choose`` is what to copy: the decode loop as one call, ``fb.decode``, with a selection. ``views.py`` prints
what it finds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor

import flashbeam as fb
from codelm import EOS_ID, Cache, CodeLM
from terminal import Progress

COUNT = 8  # completions of a prompt


@torch.inference_mode()
def choose(
    model: CodeLM,
    prompts: Sequence[Sequence[int]],
    selection: fb.selection.Selection,
    max_length: int,
    temperature: float = 1.0,
    tick: Callable[[], None] = lambda: None,
) -> fb.Hypotheses:
    """Complete each prompt of a batch ``COUNT`` times, as ``selection`` chooses; ``tick`` is called at every step."""
    search = fb.BeamSearch(
        beam_size=COUNT,
        max_length=max_length,
        eos_id=EOS_ID,
        length_penalty=0.0,
        temperature=temperature,  # part of the distribution: log-probabilities are those at this temperature
        stopping=fb.Exact() if selection.seed is None else None,  # what is drawn is drawn to its end
        selection=selection,
    )

    def run(tokens: Tensor, cache: Cache | None) -> tuple[Tensor, Cache]:
        tick()
        return model.prefill(prompts) if cache is None else model(tokens, cache)

    return fb.decode(search, run, torch.empty(len(prompts), 0))  # prefill reads the prompts: no first tokens


def choose_all(
    model: CodeLM,
    prompts: Sequence[Sequence[int]],
    selections: Mapping[str, fb.selection.Selection],
    max_length: int,
    temperature: float = 1.0,
) -> dict[str, fb.Hypotheses]:
    """Complete the same prompts by one selection after another, behind a progress bar."""
    progress = Progress(total=max_length * len(selections))
    found: dict[str, fb.Hypotheses] = {}
    try:
        for name, selection in selections.items():
            progress.label = name
            found[name] = choose(model, prompts, selection, max_length, temperature, lambda: progress.advance(1))
            progress.reach(max_length * len(found))
    finally:
        progress.close()
    return found


def sequences(hyps: fb.Hypotheses, request: int) -> list[tuple[int, ...]]:
    """The tokens of each completion of a prompt."""
    tokens, lengths = hyps.tokens[request].tolist(), hyps.lengths[request].tolist()
    return [tuple(row[:length]) for row, length in zip(tokens, lengths, strict=True) if length]


def distinct_bigrams(completions: Sequence[Sequence[int]]) -> tuple[int, int]:
    """How many different pairs of neighbouring tokens the completions have, and how many pairs in all."""
    bigrams = [bigram for completion in completions for bigram in pairwise(completion)]
    return len(set(bigrams)), len(bigrams)


def expected_lengths(hyps: fb.Hypotheses) -> Tensor:
    """Estimate, from the sample of each prompt, the mean length of all its completions, float64 ``[B]``."""
    return fb.estimate(hyps, hyps.lengths)  # any function of the completions will do
