"""What rules that decide for themselves share: the distribution they draw from, and the frozen hypotheses."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashbeam.kernels import (
    Candidates,
    Choice,
    Endings,
    Tiles,
    endings,
    summarize,
    token_log_prob,
    total_order,
)

from .protocol import Expansion


class Drawable(NamedTuple):
    """The rows of a step as distributions to draw from, and as the model's."""

    tiles: Tiles  # of the tokens that may be drawn
    lse: Tensor  # float32 [R], over them
    model_lse: Tensor  # float32 [R], the normaliser of log_probs
    flags: Tensor  # int32 [R]


def summarize_drawable(expansion: Expansion, filtered: Tensor | None = None) -> Drawable:
    """One pass over the logits; a second where log-probabilities are normalised over more than is drawn from.

    ``filtered`` is a bitmask of what may be drawn, where that is less than the step's own allows.
    """
    options: dict[str, Any] = {
        "temperature": expansion.temperature,
        "active": expansion.active,
        "vocab_size": expansion.vocab_size,
    }
    mask = expansion.bitmask if filtered is None else filtered
    drawn = summarize(expansion.logits, bitmask=mask, normalize="allowed", **options)
    if mask is None or (filtered is None and expansion.normalize == "allowed"):
        return Drawable(drawn.tiles, drawn.lse, drawn.lse, drawn.flags)
    model = summarize(expansion.logits, bitmask=expansion.bitmask, normalize=expansion.normalize, **options)
    # a row that the model makes invalid has nothing to draw either
    lse = drawn.lse.masked_fill(model.lse == torch.inf, torch.inf)
    return Drawable(drawn.tiles, lse, model.lse, model.flags)


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
        sampling_log_probs=draws.sampling_log_probs.masked_fill(none, -torch.inf),
        inclusion=draws.inclusion,
        codes=draws.codes,
    )


def children(
    expansion: Expansion, drawable: Drawable, tokens: Tensor, parents: Tensor, adjusted: Tensor, scores: Tensor | None
) -> Choice:
    """Candidates ``[B, m]`` that were drawn; ranked by log-probability if no ``scores`` are given.

    An ``adjusted`` logit of -inf means that nothing was.
    """
    slots, draws, count = expansion.slots, expansion.draws, expansion.parents
    none = adjusted == -torch.inf
    increments, sampling_increments = (
        token_log_prob(adjusted, lse.view(-1, count).gather(1, parents)).masked_fill(none, -torch.inf)
        for lse in (drawable.model_lse, drawable.lse)
    )
    log_probs = slots.log_probs.gather(1, parents) + increments
    return Choice(
        tokens=tokens,
        parents=parents,
        token_log_probs=increments,
        log_probs=log_probs,
        scores=log_probs if scores is None else scores,
        sampling_log_probs=draws.sampling_log_probs.gather(1, parents) + sampling_increments,
        inclusion=draws.inclusion.gather(1, parents),
        codes=torch.zeros_like(tokens),
    )


def endings_of(
    expansion: Expansion, lse: Tensor, penalty: Tensor | None = None, end_scores: Tensor | None = None
) -> Endings | None:
    """The EOS candidates of a step; ``lse`` is float32 ``[R]``, the others as in :class:`Ranked`."""
    if expansion.eos is None:
        return None
    may_end = expansion.limits.min_length <= expansion.requests.steps + 1
    rows = (expansion.logits, lse, expansion.bitmask, expansion.temperature)
    return endings(*rows, expansion.eos, expansion.slots, may_end, penalty, end_scores)


def rivals(expansion: Expansion, best: Candidates, ends: Endings | None) -> tuple[tuple[Choice, ...], Tensor]:
    """All that compete for slots in place: candidates, EOS candidates, frozen hypotheses; nothing was sampled.

    With them come positions int64 ``[B, M]`` that put them, side by side, in the total order by normalised score.
    """
    assert expansion.divisor is not None
    slots, norm = expansion.slots, expansion.divisor[:, None]
    increments = token_log_prob(best.adjusted, best.lse.view(-1, expansion.parents).gather(1, best.parents))
    found = [_plain(best.tokens, best.parents, increments, best.log_probs)]
    keys = [(best.log_probs / norm, best.parents, best.adjusted, best.tokens)]
    if ends is not None:
        found.append(_plain(ends.tokens, ends.parents, ends.token_log_probs, ends.log_probs))
        keys.append((ends.log_probs / norm, ends.parents, ends.adjusted, ends.tokens))
    old = frozen(expansion)
    old_norm = expansion.limits.length_norm.gather(1, slots.lengths.long())
    nothing = torch.zeros_like(old.tokens)
    keys.append((old.log_probs / old_norm, old.parents, nothing.float(), nothing))
    return (*found, old), total_order(*keys)


def _plain(tokens: Tensor, parents: Tensor, increments: Tensor, log_probs: Tensor) -> Choice:
    """Candidates that nothing was sampled for."""
    zeros = torch.zeros_like(log_probs)
    return Choice(tokens, parents, increments, log_probs, log_probs, zeros, zeros, torch.zeros_like(tokens))


def take(choices: tuple[Choice, ...], index: Tensor) -> Choice:
    """The candidates at ``index [B, K]`` of several sets ``[B, m]`` side by side."""
    return Choice(*(torch.cat(field, 1).gather(1, index) for field in zip(*choices, strict=True)))
