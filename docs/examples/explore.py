"""A search that is looked at: all it tried, as a tree, and what each of its steps was like."""

from __future__ import annotations

from collections.abc import Sequence

import torch

import flashbeam as fb
from codelm import EOS_ID, CodeLM

BEAMS = 4


@torch.inference_mode()
def explore(model: CodeLM, prompts: Sequence[Sequence[int]], max_length: int, num_hypotheses: int) -> fb.Lattice:
    """Complete each prompt of a batch by ``BEAMS`` beams and return what that explored."""
    search = fb.BeamSearch(
        beam_size=BEAMS,
        max_length=max_length,
        eos_id=EOS_ID,
        length_penalty=0.0,
        stopping=fb.Exact(),
        statistics=True,  # entropies, margins, and each EOS, those without a place in the pool too
    )
    logits, cache = model.prefill(prompts)
    state = search.init(batch_size=len(prompts), device=logits.device)
    step = search.step(state, logits)
    while not state.all_done():
        cache = fb.reorder(cache, step.source_rows)
        logits, cache = model(step.tokens.flatten(), cache)
        step = search.step(state, logits)
    return fb.lattice(state, num_hypotheses)
