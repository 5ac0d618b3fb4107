"""What the studies of ``effects.py`` share: one loop for any selection, and the log-probability of what it found."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import flashbeam as fb
from codelm import CodeLM

BATCH = 25  # prompts; bounds the memory of the cache


class Found(NamedTuple):
    """What a search of B requests returned."""

    hypotheses: fb.Hypotheses
    flags: Tensor  # int32 [B]
    live: Tensor  # int64 [steps, B], rows that went on after each step


@torch.inference_mode()
def run(
    model: CodeLM, prompts: Sequence[Sequence[int]], search: fb.BeamSearch, runs: int = 1, first_id: int = 0
) -> Found:
    """Decode every prompt as ``runs`` independent requests, side by side.

    The model reads each distinct prefix once, however many requests and beams are there: independent runs of one prompt
    have most of their prefixes in common. So the cache has a row per prefix, and ``entries`` says whose is whose.

    Args:
        first_id: of the request ids, which count up from here; they name the random numbers.
    """
    logits, cache = model.prefill(prompts)
    vocab_size = logits.shape[1]
    entries = torch.arange(len(prompts)).repeat_interleave(runs)
    requests = len(entries)
    state = search.init(requests, request_ids=range(first_id, first_id + requests))
    step = search.step(state, logits[entries])
    # step.valid holds in place what has ended, too; the state is changed by the next step
    live = [state.slots.active.view(requests, -1).clone()]
    while not state.all_done():
        prefixes = entries[step.source_rows] * vocab_size + step.tokens.flatten()
        goes_on = live[-1].flatten()
        prefixes = prefixes.masked_fill(~goes_on, int(prefixes[goes_on][0]))  # no row of its own for what has ended
        distinct, entries = prefixes.unique(return_inverse=True)
        logits, cache = model(distinct % vocab_size, fb.reorder(cache, distinct // vocab_size))
        step = search.step(state, logits[entries])
        live.append(state.slots.active.view(requests, -1).clone())
    return Found(search.finalize(state), state.flags, torch.stack(live).sum(2))


def run_all(
    model: CodeLM,
    prompts: Sequence[Sequence[int]],
    search: fb.BeamSearch,
    measure: Callable[[Found, Sequence[Sequence[int]]], np.ndarray],
) -> np.ndarray:
    """Measure all prompts, ``BATCH`` at a time, each with a request id of its own."""
    starts = range(0, len(prompts), BATCH)
    batches = [prompts[start : start + BATCH] for start in starts]
    found = [run(model, batch, search, first_id=start) for start, batch in zip(starts, batches, strict=True)]
    return np.concatenate([measure(one, batch) for one, batch in zip(found, batches, strict=True)])


@torch.inference_mode()
def log_probs(model: CodeLM, prompts: Sequence[Sequence[int]], hypotheses: fb.Hypotheses) -> np.ndarray:
    """Log-probabilities ``[B, N]`` under the model at temperature 1, whatever the search ranked by or drew from."""
    tokens, lengths = hypotheses.tokens, hypotheses.lengths
    batch, count, steps = tokens.shape
    first, cache = model.prefill(prompts)
    rows = torch.arange(batch).repeat_interleave(count)
    states, _ = model.states(tokens.flatten(0, 1)[:, :-1], fb.reorder(cache, rows))
    logits = torch.cat([first[rows, None], F.linear(states, model.embedding.weight)], 1)
    of_token = logits.log_softmax(2).gather(2, tokens.flatten(0, 1)[:, :, None])[:, :, 0].view(batch, count, steps)
    return of_token.masked_fill(torch.arange(steps) >= lengths[:, :, None], 0.0).sum(2).double().numpy()
