"""From the rows of ``generate``, which repeats every prompt, to one row per request."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def unrepeated(model: Any, input_ids: Tensor, model_kwargs: dict[str, Any], repeats: int) -> bool:
    """Undo ``_expand_inputs_for_generation`` in ``model_kwargs``, in place, where every request has ``repeats`` rows.

    Returns:
        Whether that was possible. If not nothing is changed: a model that repeats in a way of its own, features of
        images or audio that are grouped by request, a cache that already holds rows for the beams.
    """
    from transformers import GenerationMixin

    own = type(model)._expand_inputs_for_generation is not GenerationMixin._expand_inputs_for_generation
    if own or model_kwargs.get("mm_encoder_outputs") is not None:
        return False
    rows = input_ids.shape[0]
    found: list[tuple[Any, str, Tensor]] = []
    for holder in (model_kwargs, model_kwargs.get("encoder_outputs")):
        for name, value in holder.items() if holder is not None else ():
            if isinstance(value, Tensor) and name != "cache_position":
                dim = 1 if name == "position_ids" and value.dim() == 3 else 0
                if value.shape[dim] != rows or not _repeats(value, dim, repeats):
                    return False
                found.append((holder, name, value.unflatten(dim, (-1, repeats)).select(dim + 1, 0)))
    if not _repeats(input_ids, 0, repeats):
        return False
    for holder, name, value in found:
        holder[name] = value
    return True


def _repeats(tensor: Tensor, dim: int, repeats: int) -> bool:
    """Whether each row is there ``repeats`` times, side by side."""
    groups = tensor.unflatten(dim, (-1, repeats))
    return torch.equal(groups, groups.narrow(dim + 1, 0, 1).expand_as(groups))


def repeated(model: Any, model_kwargs: dict[str, Any], repeats: int) -> dict[str, Any]:
    """The ``model_kwargs`` of ``repeats`` beams of each request, as ``generate`` makes them."""
    model_kwargs.pop("mm_encoder_outputs", None)  # only for the prompt
    found: tuple[Any, dict[str, Any]] = model._expand_inputs_for_generation(
        expand_size=repeats, is_encoder_decoder=model.config.is_encoder_decoder, input_ids=None, **model_kwargs
    )
    return found[1]
