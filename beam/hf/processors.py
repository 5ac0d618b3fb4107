"""Logits processors of transformers at work on the beams of a search."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

# they keep something of each row from step to step, and rows change places
_STATEFUL = {
    "UnbatchedClassifierFreeGuidanceLogitsProcessor": "guidance_scale",
    "SynthIDTextWatermarkLogitsProcessor": "watermarking_config",
    "DiaEOSDelayPatternLogitsProcessor": "logits_processor",
}

# they bar tokens or set scores of 0, and raise none above that
_MASKS = {
    "EncoderNoRepeatNGramLogitsProcessor",
    "ForcedBOSTokenLogitsProcessor",
    "ForcedEOSTokenLogitsProcessor",
    "LogitNormalization",
    "MinLengthLogitsProcessor",
    "MinNewTokensLengthLogitsProcessor",
    "NoBadWordsLogitsProcessor",
    "NoRepeatNGramLogitsProcessor",
    "PrefixConstrainedLogitsProcessor",
    "SuppressTokensAtBeginLogitsProcessor",
    "SuppressTokensLogitsProcessor",
}


class AllowedTokens:
    """``prefix_allowed_tokens_fn`` asked about beams that are live, and no others."""

    def __init__(self, allowed: Callable[[int, Tensor], list[int]], beams: int):
        self.allowed, self.beams = allowed, beams

    def __call__(self, input_ids: Tensor, scores: Tensor, active: Tensor) -> Tensor:
        barred = torch.ones_like(scores, dtype=torch.bool)
        for row in active.nonzero()[:, 0].tolist():
            barred[row, self.allowed(row // self.beams, input_ids[row])] = False
        return scores.masked_fill(barred, -torch.inf)


class Processors:
    """The processors of one call of ``generate``, in their order, for ``B * K`` rows.

    Args:
        processors: a ``LogitsProcessorList`` made for ``B * repeats`` rows.
        batch: B.
        repeats: rows of a request that ``generate`` made them for.
        beams: K.

    Raises:
        ValueError: one keeps a state of each row, which cannot follow the beams.
    """

    def __init__(self, processors: Iterable[Any], batch: int, repeats: int, beams: int):
        given = list(processors)
        self.never_raise = all(type(each).__name__ in _MASKS for each in given)  # what is made of log-probabilities
        self.processors = [_for_beams(each, batch, repeats, beams) for each in given]

    def __bool__(self) -> bool:
        return bool(self.processors)

    def __call__(self, input_ids: Tensor, scores: Tensor, active: Tensor) -> Tensor:
        """float32 ``[B * K, V]``, from ``scores`` of that shape for sequences ``input_ids [B * K, L + t]``."""
        for processor in self.processors:
            if isinstance(processor, AllowedTokens):
                scores = processor(input_ids, scores, active)
            else:
                scores = processor(input_ids, scores)
        return scores


def _for_beams(processor: Any, batch: int, repeats: int, beams: int) -> Any:
    name = type(processor).__name__
    if name in _STATEFUL or type(processor).__module__.startswith("xgrammar."):
        argument = _STATEFUL.get(name, "logits_processor")
        advice = "" if name in _STATEFUL else "; a grammar follows the beams as constraint=fb.Grammar(...)"
        raise ValueError(
            f"{argument}: expected processors that look at sequences, got {name}, whose state is of rows{advice}"
        )
    if name == "PrefixConstrainedLogitsProcessor":
        return AllowedTokens(processor._prefix_allowed_tokens_fn, beams)
    ignored = getattr(processor, "prompt_ignore_length", None)
    if isinstance(ignored, Tensor) and ignored.shape[0] == batch * repeats and repeats != beams:
        processor = copy.copy(processor)
        processor.prompt_ignore_length = ignored[::repeats].repeat_interleave(beams)
    return processor
