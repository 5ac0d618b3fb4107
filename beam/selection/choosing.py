"""What rules that decide for themselves share: the distribution they draw from, and the frozen hypotheses."""

from typing import NamedTuple

import torch
from torch import Tensor

from flashbeam.kernels import Choice, Tiles, summarize

from .protocol import Expansion


class Allowed(NamedTuple):
    """The rows of a step as distributions over what is allowed, and as the model's."""

    tiles: Tiles  # of the tokens that are allowed
    lse: Tensor  # float32 [R], over them
    model_lse: Tensor  # float32 [R], the normaliser of log_probs
    flags: Tensor  # int32 [R]


def summarize_allowed(expansion: Expansion) -> Allowed:
    """One pass over the logits; a second where log-probabilities are normalised over more than is drawn from."""
    options = {
        "temperature": expansion.temperature,
        "active": expansion.active,
        "vocab_size": expansion.vocab_size,
    }
    drawn = summarize(expansion.logits, bitmask=expansion.bitmask, normalize="allowed", **options)
    if expansion.bitmask is None or expansion.normalize == "allowed":
        return Allowed(drawn.tiles, drawn.lse, drawn.lse, drawn.flags)
    model = summarize(expansion.logits, **options)
    return Allowed(drawn.tiles, drawn.lse, model.lse, model.flags)


def frozen(expansion: Expansion) -> Choice:
    """The finished hypotheses in their slots, as candidates ``[B, K]``; log-probability ``-inf`` in the other slots."""
    slots, draws = expansion.slots, expansion.draws
    slot = torch.arange(slots.ended.shape[1], device=slots.ended.device).expand_as(slots.ended)
    none = ~slots.ended
    return Choice(
        tokens=torch.full_like(slot, expansion.pad_id),
        parents=slot,
        token_log_probs=torch.zeros_like(slots.log_probs),
        log_probs=slots.log_probs.masked_fill(none, -torch.inf),
        scores=slots.scores.masked_fill(none, -torch.inf),
        sampling_log_probs=draws.sampling_log_probs,
        log_inclusion=draws.log_inclusion,
        codes=draws.codes,
    )


def take(choices: tuple[Choice, ...], index: Tensor) -> Choice:
    """The candidates at ``index [B, K]`` of several sets ``[B, m]`` side by side."""
    return Choice(*(torch.cat(field, 1).gather(1, index) for field in zip(*choices, strict=True)))
