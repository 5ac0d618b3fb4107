"""The n-best: finished and live hypotheses, ranked and traced back through the history."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flashbeam.kernels import trace_slots

if TYPE_CHECKING:
    from .state import State


@dataclass(frozen=True)
class Hypotheses:
    """The N best hypotheses of each of B requests, best first. Where ``valid`` is not set the rest is filler."""

    tokens: Tensor  # int64 [B, N, T], EOS kept, then pad_id
    lengths: Tensor  # int64 [B, N], tokens, EOS included; 0 where not valid
    scores: Tensor  # float32 [B, N], what they are ranked by; -inf where not valid
    log_probs: Tensor  # float32 [B, N], natural log; -inf where not valid
    token_log_probs: Tensor  # float32 [B, N, T], 0 behind the end
    valid: Tensor  # bool [B, N]
    finished: Tensor  # bool [B, N], ended with EOS


@dataclass
class _Endings:
    """Where hypotheses end, M per request."""

    scores: Tensor  # float32 [B, M]; -inf where there is none
    log_probs: Tensor  # float32 [B, M]
    lengths: Tensor  # int64 [B, M]
    arrival: Tensor  # int64 [B, M], breaks ties of score, the lower the better
    finished: Tensor  # bool [B, M]
    last_step: Tensor  # int64 [B, M], last step recorded in the history; -1 for none
    last_slot: Tensor  # int64 [B, M], the slot at that step
    eos: Tensor  # int64 [B, M], token that follows, or -1
    eos_log_probs: Tensor  # float32 [B, M]

    def take(self, index: Tensor) -> _Endings:
        return _Endings(*(field.gather(1, index) for field in vars(self).values()))


def _of_slots(state: State) -> _Endings:
    slots = state.slots
    lengths = slots.lengths.long()
    held = (slots.log_probs > -torch.inf) & (lengths > 0)
    log_probs = slots.log_probs.masked_fill(~held, -torch.inf)
    step = (state.requests.steps.long() - 1)[:, None].expand_as(lengths)
    return _Endings(
        scores=slots.scores.masked_fill(~held, -torch.inf) / state.limits.length_norm.gather(1, lengths),
        log_probs=log_probs,
        lengths=lengths,
        arrival=(lengths << 32) + slots.ranks,
        finished=slots.ended & held,
        last_step=step,
        last_slot=torch.arange(state.beam_size, device=lengths.device).expand_as(lengths),
        eos=torch.full_like(lengths, -1),
        eos_log_probs=torch.zeros_like(log_probs),
    )


def _of_pool(state: State) -> _Endings:
    pool = state.pool
    lengths = pool.steps.long() + 1
    return _Endings(
        scores=pool.scores,
        log_probs=pool.log_probs,
        lengths=lengths,
        arrival=(lengths << 32) + pool.ranks,
        finished=pool.log_probs > -torch.inf,
        last_step=lengths - 2,
        last_slot=pool.parents.long(),
        eos=pool.tokens.long(),
        eos_log_probs=pool.token_log_probs,
    )


def collect(state: State, num_hypotheses: int | None) -> Hypotheses:
    """The best ``num_hypotheses`` of each request, or its ``beam_size`` best, as things stand. Changes nothing."""
    found = _of_slots(state)
    if not state.in_place:
        pairs = zip(vars(_of_pool(state)).values(), vars(found).values(), strict=True)
        found = _Endings(*(torch.cat(pair, 1) for pair in pairs))
    # equal scores: earlier end first, then the order of the candidates at that step
    order = found.arrival.sort(dim=1, stable=True).indices
    order = order.gather(1, found.scores.gather(1, order).sort(dim=1, descending=True, stable=True).indices)
    count = state.beam_size if num_hypotheses is None else num_hypotheses
    missing = count - order.shape[1]
    best = found.take(order[:, :count])
    if missing > 0:
        pad = torch.nn.functional.pad
        filler = {"scores": -torch.inf, "log_probs": -torch.inf, "eos": -1, "last_step": -1}
        best = _Endings(*(pad(field, (0, missing), value=filler.get(name, 0)) for name, field in vars(best).items()))

    valid = best.log_probs > -torch.inf
    if num_hypotheses is None:
        valid &= torch.arange(count, device=valid.device) < state.limits.width[:, None]
    slots = trace_slots(state.history.parents, best.last_step.masked_fill(~valid, -1), best.last_slot)  # [B, N, T]
    on_path = slots >= 0
    index = slots.clamp(min=0).permute(2, 0, 1)  # [T, B, N]
    tokens = state.history.tokens.long().gather(2, index).permute(1, 2, 0)
    token_log_probs = state.history.token_log_probs.gather(2, index).permute(1, 2, 0)
    lengths = best.lengths.masked_fill(~valid, 0)
    at_eos = torch.arange(slots.shape[2], device=slots.device) == lengths[:, :, None] - 1
    at_eos &= (valid & (best.eos >= 0))[:, :, None]
    tokens = torch.where(at_eos, best.eos[:, :, None], tokens.masked_fill(~on_path, state.pad_id))
    token_log_probs = torch.where(at_eos, best.eos_log_probs[:, :, None], token_log_probs.masked_fill(~on_path, 0.0))
    return Hypotheses(
        tokens=tokens,
        lengths=lengths,
        scores=best.scores.masked_fill(~valid, -torch.inf),
        log_probs=best.log_probs.masked_fill(~valid, -torch.inf),
        token_log_probs=token_log_probs,
        valid=valid,
        finished=best.finished & valid,
    )
