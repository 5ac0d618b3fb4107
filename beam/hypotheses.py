"""The n-best: finished and live hypotheses, ranked and traced back through the history."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flashbeam.kernels import trace_slots

if TYPE_CHECKING:
    from .state import State
    from .statistics import Statistics


@dataclass(frozen=True)
class Hypotheses:
    """The N best hypotheses of each of B requests, best first. Where ``valid`` is not set the rest is filler."""

    tokens: Tensor  # int64 [B, N, T], EOS kept, then pad_id
    lengths: Tensor  # int64 [B, N], tokens, EOS included; 0 where not valid
    scores: Tensor  # float32 [B, N], what they are ranked by; -inf where not valid
    log_probs: Tensor  # float32 [B, N], natural log; -inf where not valid
    token_log_probs: Tensor  # float32 [B, N, T], 0 behind the end
    valid: Tensor  # bool [B, N]
    finished: Tensor  # bool [B, N], ended with EOS, or stopped by a criterion of flashbeam.hf
    beam_size: Tensor  # int64 [B], of the search that found them
    exact: Tensor  # bool [B], without early stopping or a budget the same beam would return just these
    slots: Tensor  # int64 [B, N, T], slot of the beam that each token continued; -1 behind the end
    sampling_log_probs: Tensor | None = None  # float32 [B, N], of what was sampled from; -inf where not valid
    log_inclusion: Tensor | None = None  # float32 [B, N], log-probability of being in the sample; 0 where not valid
    perturbed: Tensor | None = None  # float32 [B, N], what orders the sample of fb.Stochastic: its scores
    threshold: Tensor | None = None  # float32 [B], what a sequence had to exceed to be in it for sure; -inf if nothing
    statistics: Statistics | None = None  # of the search's steps, if it was made with statistics=True


@dataclass
class Endings:
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
    sampling_log_probs: Tensor  # float32 [B, M]
    inclusion: Tensor  # float32 [B, M], see Draws

    def take(self, index: Tensor) -> Endings:
        return Endings(*(field.gather(1, index) for field in vars(self).values()))


_NOTHING = {"scores": -torch.inf, "log_probs": -torch.inf, "sampling_log_probs": -torch.inf, "perturbed": -torch.inf}


def _pad(fields: dict[str, Tensor], count: int, **filler: float) -> dict[str, Tensor]:
    """Fields ``[B, N, ...]`` filled up to ``count`` hypotheses that are not valid."""
    found = {}
    for name, field in fields.items():
        missing = max(0, count - field.shape[1])
        sides = (0, 0) * (field.dim() - 2) + (0, missing)
        found[name] = torch.nn.functional.pad(field, sides, value=filler.get(name, _NOTHING.get(name, 0)))
    return found


def _of_slots(state: State) -> Endings:
    slots = state.slots
    lengths = slots.lengths.long()
    held = (slots.log_probs > -torch.inf) & (lengths > 0)
    step = (state.requests.steps.long() - 1)[:, None].expand_as(lengths)
    if state.dialect.at_max_length == "spare":
        held &= ~(state.pool.log_probs > -torch.inf).any(1, keepdim=True)
    return Endings(
        scores=slots.scores.masked_fill(~held, -torch.inf) / state.live_norm.gather(1, lengths),
        log_probs=slots.log_probs.masked_fill(~held, -torch.inf),
        lengths=lengths,
        arrival=(lengths << 32) + slots.ranks,
        finished=slots.ended & held,
        last_step=step,
        last_slot=torch.arange(lengths.shape[1], device=lengths.device).expand_as(lengths),
        eos=torch.full_like(lengths, -1),
        eos_log_probs=torch.zeros_like(slots.log_probs),
        sampling_log_probs=state.draws.sampling_log_probs,
        inclusion=state.draws.inclusion.masked_fill(~held, -torch.inf),
    )


def _log_inclusion(log_probs: Tensor, threshold: Tensor) -> Tensor:
    """``log P(G > kappa) = log(1 - exp(-exp(log_prob - kappa)))``: Kool, van Hoof, Welling 2019, section 4.2."""
    gap = log_probs.double() - threshold[:, None]  # +inf where nothing was left out
    return torch.where(gap < -30.0, gap, torch.log(-torch.expm1(-torch.exp(gap)))).float()


def _of_pool(state: State) -> Endings:
    pool = state.pool
    lengths = pool.steps.long() + 1
    return Endings(
        scores=pool.scores,
        log_probs=pool.log_probs,
        lengths=lengths,
        arrival=(lengths << 32) + pool.ranks,
        finished=pool.log_probs > -torch.inf,
        last_step=lengths - 2,
        last_slot=pool.parents.long(),
        eos=pool.tokens.long(),
        eos_log_probs=pool.token_log_probs,
        sampling_log_probs=pool.log_probs,
        inclusion=torch.zeros_like(pool.log_probs),
    )


def collect(state: State, num_hypotheses: int | None) -> Hypotheses:
    """The best ``num_hypotheses`` of each request, or its ``beam_size`` best, as things stand. Changes nothing."""
    if state.groups == 1:
        return _collect(state, num_hypotheses)
    more = num_hypotheses is not None and num_hypotheses > state.beam_size  # then what the pools hold besides
    return _merge_groups(state, _collect(state, num_hypotheses if more else None), num_hypotheses)


def _merge_groups(state: State, found: Hypotheses, num_hypotheses: int | None) -> Hypotheses:
    """The hypotheses of all groups of each request, ranked together by score; equal ones in the order of the groups."""
    fields = {name: field for name, field in vars(found).items() if field is not None}
    beam_size = fields.pop("beam_size").view(-1, state.groups).sum(1)
    exact = fields.pop("exact").view(-1, state.groups).all(1)
    first_slot = torch.arange(0, state.beam_size, state.slots.ended.shape[1], device=state.device)
    shift = first_slot.repeat(state.batch_size)[:, None, None]
    fields["slots"] = torch.where(fields["slots"] < 0, -1, fields["slots"] + shift)
    fields = {name: field.unflatten(0, (-1, state.groups)).flatten(1, 2) for name, field in fields.items()}
    count = state.beam_size if num_hypotheses is None else num_hypotheses
    order = fields["scores"].sort(dim=1, descending=True, stable=True).indices[:, :count]
    request = torch.arange(order.shape[0], device=order.device)[:, None]
    best = {name: field[request, order] for name, field in fields.items()}
    return Hypotheses(
        **_pad(best, count, tokens=state.pad_id, slots=-1), beam_size=beam_size, exact=exact, statistics=None
    )


def _is_exact(state: State, best: Endings, asked: Tensor) -> Tensor:
    """bool ``[B]``: nothing that is still possible would change the hypotheses ``asked [B, N]`` for, best first."""
    slots = state.slots
    if state.in_place:
        live = (slots.log_probs > -torch.inf) & ~slots.ended
        return ~live.any(1) | (state.requests.steps == state.limits.max_length)
    whole = state.bound == -torch.inf
    if state.groups > 1:  # a group that goes on may change those behind it
        return whole
    kept = best.finished & (best.scores >= state.bound[:, None])
    beyond = asked.sum(1) > state.limits.width  # more than a pool by score holds
    return torch.where(beyond, whole & (not state.rule.by_arrival), whole | (kept | ~asked).all(1))


def ranked_endings(state: State, num_hypotheses: int | None) -> tuple[Endings, Tensor, Endings]:
    """The best ``num_hypotheses`` of each group of each request, best first, which of them were asked for, and all."""
    found = _of_slots(state)
    if not state.in_place:
        pairs = zip(vars(_of_pool(state)).values(), vars(found).values(), strict=True)
        found = Endings(*(torch.cat(pair, 1) for pair in pairs))
    # equal scores: earlier end first, then the order of the candidates at that step
    order = found.arrival.sort(dim=1, stable=True).indices
    order = order.gather(1, found.scores.gather(1, order).sort(dim=1, descending=True, stable=True).indices)
    count = state.slots.log_probs.shape[1] if num_hypotheses is None else num_hypotheses
    best = Endings(**_pad(vars(found.take(order[:, :count])), count, eos=-1, last_step=-1))
    asked = torch.ones_like(best.finished)
    if num_hypotheses is None:
        asked &= torch.arange(count, device=asked.device) < state.limits.width[:, None]
    return best, asked, found


def _collect(state: State, num_hypotheses: int | None) -> Hypotheses:
    best, asked, found = ranked_endings(state, num_hypotheses)
    exact = _is_exact(state, best, asked)
    valid = (best.log_probs > -torch.inf) & asked
    slots = trace_slots(state.history.parents, best.last_step.masked_fill(~valid, -1), best.last_slot)  # [B, N, T]
    on_path = slots >= 0
    index = slots.clamp(min=0).permute(2, 0, 1)  # [T, B, N]
    tokens = state.history.tokens.long().gather(2, index).permute(1, 2, 0)
    token_log_probs = state.history.token_log_probs.gather(2, index).permute(1, 2, 0)
    lengths = best.lengths.masked_fill(~valid, 0)
    place = torch.arange(slots.shape[2], device=slots.device)
    continued = torch.nn.functional.pad(slots[:, :, :-1], (1, 0)).masked_fill(place >= lengths[:, :, None], -1)
    at_eos = place == lengths[:, :, None] - 1
    at_eos &= (valid & (best.eos >= 0))[:, :, None]
    tokens = torch.where(at_eos, best.eos[:, :, None], tokens.masked_fill(~on_path, state.pad_id))
    token_log_probs = torch.where(at_eos, best.eos_log_probs[:, :, None], token_log_probs.masked_fill(~on_path, 0.0))
    scores = best.scores.masked_fill(~valid, -torch.inf)
    reported = {
        "sampling_log_probs": best.sampling_log_probs.masked_fill(~valid, -torch.inf),
        "log_inclusion": best.inclusion.masked_fill(~valid, 0.0),
        "perturbed": scores,
    }
    if "threshold" in state.selection.reports:
        reported["threshold"] = threshold = found.inclusion.amax(1)
        reported["log_inclusion"] = _log_inclusion(best.sampling_log_probs, threshold).masked_fill(~valid, 0.0)
    return Hypotheses(
        tokens=tokens,
        lengths=lengths,
        scores=scores,
        log_probs=best.log_probs.masked_fill(~valid, -torch.inf),
        token_log_probs=token_log_probs,
        valid=valid,
        finished=best.finished & valid,
        beam_size=state.limits.width.long(),
        exact=exact,
        slots=continued,
        statistics=None,
        **{name: reported[name] for name in state.selection.reports},
    )
