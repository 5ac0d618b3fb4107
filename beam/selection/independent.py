"""Rows that are sampled one by one, each from its own prefix."""

import torch
from torch import Tensor

from flashbeam.kernels import Choice, invert_cdf

from .choosing import Drawable, children, frozen
from .protocol import Expansion


def own_parents(expansion: Expansion) -> Tensor:
    """int64 ``[B, K]``: the slot that each row goes on from, its own; at first the only one there is."""
    slot = torch.arange(expansion.slots.ended.shape[1], device=expansion.seed.device)
    return (torch.zeros_like(slot) if expansion.first else slot).expand_as(expansion.slots.ended)


def draw_rows(expansion: Expansion, drawable: Drawable, bitmask: Tensor | None, codes: Tensor) -> Choice:
    """One token for every slot by the code ``[B, K]`` it has; frozen slots stay as they are."""
    slots, parents = expansion.slots, own_parents(expansion)
    first_row = torch.arange(0, expansion.logits.shape[0], expansion.parents, device=parents.device)[:, None]
    drawn = invert_cdf(
        expansion.logits,
        drawable.tiles.tile_ref,
        drawable.tiles.tile_sum,
        (first_row + parents).flatten(),
        codes.flatten(),
        bitmask=bitmask,
        temperature=expansion.temperature,
        vocab_size=expansion.vocab_size,
    )
    tokens, codes, adjusted = (field.view_as(parents) for field in drawn)
    adjusted = adjusted.masked_fill(~slots.active.gather(1, parents), -torch.inf)
    new = children(expansion, drawable, tokens, parents, adjusted, None)._replace(codes=codes)
    return Choice(*(torch.where(slots.ended, *pair) for pair in zip(frozen(expansion), new, strict=True)))
