"""The inputs of a step from those of the step before, where they differ by one token and nothing else.

``prepare_inputs_for_generation`` makes them from scratch each time, for any model; most models need no more than this.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .caches import NAMES

_POSITIONS = ("position_ids", "decoder_position_ids", "cache_position")  # of the last token
_CONSTANT = ("encoder_outputs",)


def can_advance(model: Any, inputs: dict[str, Any]) -> bool:
    """Whether the ``inputs`` of a step with one token a row are all that :func:`advance` knows of."""
    from transformers import GenerationMixin

    own = ("prepare_inputs_for_generation", "_update_model_kwargs_for_generation")
    if any(getattr(type(model), name) is not getattr(GenerationMixin, name) for name in own):
        return False
    encoder_decoder = bool(model.config.is_encoder_decoder)
    ids, mask = ("decoder_input_ids", "decoder_attention_mask") if encoder_decoder else ("input_ids", "attention_mask")
    known = {ids, mask, *_POSITIONS, *_CONSTANT, *NAMES[:2], *(["attention_mask"] if encoder_decoder else [])}
    cache = next((inputs[name] for name in NAMES[:2] if inputs.get(name) is not None), None)
    if cache is None or getattr(cache, "is_compileable", True):  # a static one has masks of a shape of its own
        return False
    if isinstance(inputs.get(mask), Tensor) and inputs[mask].dim() != 2:
        return False
    plain = (type(None), bool, int, float, str)
    return all(name in known or isinstance(value, plain) for name, value in inputs.items())


def advance(model: Any, inputs: dict[str, Any], tokens: Tensor) -> None:
    """Make of a step's ``inputs`` those for ``tokens [R, 1]`` behind it. In place; its tensors are left alone."""
    encoder_decoder = bool(model.config.is_encoder_decoder)
    ids, name = ("decoder_input_ids", "decoder_attention_mask") if encoder_decoder else ("input_ids", "attention_mask")
    inputs[ids] = tokens
    for position in _POSITIONS:
        if isinstance(inputs.get(position), Tensor):
            inputs[position] = inputs[position] + 1
    mask = inputs.get(name)
    if isinstance(mask, Tensor):
        inputs[name] = torch.cat([mask, mask.new_ones(mask.shape[0], 1)], 1)
