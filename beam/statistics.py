"""What each step of a search was like, recorded on the device if a search is made with ``statistics=True``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from flashbeam.kernels import Endings, next_length, row_entropy, summarize, total_order

from .selection import Expansion, Ranked
from .selection.choosing import endings_of

if TYPE_CHECKING:
    from flashbeam.kernels import Moves

    from .selection import Decided
    from .state import State


class Statistics(NamedTuple):
    """What the steps of B requests were like: K slots, T steps at most, E ids of EOS.

    Step t of a request is the one that chooses its token t. Steps that a request has not made hold what is said below
    of nothing. Where a rule divides a beam into groups, widths and finished EOS are those of all groups together, and
    the margin is the least of theirs.
    """

    # float32 [B, T, K], nats: of the distribution that the beam in slot k, before the step, was expanded from: what its
    # token_log_probs are normalised over, after the temperature; 0 where none was
    entropy: Tensor
    expanded: Tensor  # bool [B, T, K]: there was a beam to be expanded in slot k, before the step
    width: Tensor  # int32 [B, T]: beams that live on after the step, or are hypotheses without EOS at max_length
    # float32 [B, T]: score of the last candidate kept less that of the first rejected, length norm included. With
    # finished hypotheses in their slots, of all that compete for slots; in the pool regime of the candidates that are
    # not EOS, and at max_length of all. +inf: nothing was rejected; NaN: the rule does not keep the best by score
    margin: Tensor
    finished: Tensor  # int32 [B, T]: EOS candidates that finished, whether the pool had room for them or not
    # float32 [B, T, K, E]: log-probability of the EOS by which the beam in slot k finished; -inf where it did not
    endings: Tensor

    def of_requests(self, groups: int) -> Statistics:
        """Those of whole requests, from those of ``groups`` for each; memory of its own."""
        if groups == 1:
            return Statistics(*(field.clone() for field in self))

        def of_group(field: Tensor) -> Tensor:  # [B * G, T, ...] -> [B, T, G, ...]
            apart: Tensor = field.unflatten(0, (-1, groups))
            return apart.transpose(1, 2)

        margin = of_group(self.margin)  # a group that is done before the others has none
        return Statistics(
            entropy=of_group(self.entropy).flatten(2),
            expanded=of_group(self.expanded).flatten(2),
            width=of_group(self.width).sum(2, dtype=torch.int32),
            margin=torch.where(margin.isnan().all(2), torch.nan, margin.nan_to_num(torch.inf, torch.inf).amin(2)),
            finished=of_group(self.finished).sum(2, dtype=torch.int32),
            endings=of_group(self.endings).flatten(2, 3),
        )


def no_statistics(requests: int, beams: int, steps: int, ends: int, device: torch.device) -> Statistics:
    """Of a search that has made no step."""

    def new(shape: tuple[int, ...], value: float, dtype: torch.dtype) -> Tensor:
        return torch.full(shape, value, dtype=dtype, device=device)

    per_step, per_slot = (requests, steps), (requests, steps, beams)
    return Statistics(
        entropy=new(per_slot, 0.0, torch.float32),
        expanded=new(per_slot, False, torch.bool),
        width=new(per_step, 0, torch.int32),
        margin=new(per_step, torch.nan, torch.float32),
        finished=new(per_step, 0, torch.int32),
        endings=new((*per_slot, ends), -torch.inf, torch.float32),
    )


class Observed(NamedTuple):
    """What is seen of a step before it changes the state; as in :class:`Statistics`, without T."""

    live: Tensor  # bool [B], requests that make the step
    step: Tensor  # int64 [B]
    entropy: Tensor
    expanded: Tensor
    margin: Tensor
    endings: Tensor | None  # of EOS that leave the beam


def observe(state: State, expansion: Expansion, selected: Ranked | Decided) -> Observed:
    """Look at a step that has been decided. Changes nothing and does not wait for the host."""
    steps = state.requests.steps.long().clamp(max=state.history.tokens.shape[0] - 1)
    live = ~state.requests.done
    shape = state.slots.log_probs.shape
    return Observed(
        live=live,
        step=steps,
        entropy=_of_slots(_entropy(expansion, selected).view(shape[0], -1), shape[1], 0.0),
        expanded=_of_slots(expansion.active.view(shape[0], -1), shape[1], False),
        margin=_margin(state, expansion, selected),
        endings=None if state.in_place else _finishing(state, expansion, selected),
    )


def note(state: State, seen: Observed, moves: Moves) -> None:
    """Write down a step that has been made."""
    record, slots = state.record, state.slots
    assert record is not None
    kept = slots.log_probs > -torch.inf
    ended = seen.endings
    if ended is None:
        ended, finished = _ended_in_place(state, seen, moves)
    else:
        finished = (ended > -torch.inf).flatten(1).sum(1)
    now = Statistics(seen.entropy, seen.expanded, (kept & ~slots.ended).sum(1), seen.margin, finished, ended)
    for field, values in zip(record, now, strict=True):
        index = seen.step.view(-1, *[1] * (field.dim() - 1)).expand(-1, 1, *field.shape[2:])
        live = seen.live.view(-1, *[1] * (field.dim() - 1))
        values = torch.where(live, values.unsqueeze(1).to(field.dtype), field.gather(1, index))
        field.scatter_(1, index, values)


def _of_slots(rows: Tensor, beams: int, filler: float) -> Tensor:
    """``[B, P, ...]`` as ``[B, K, ...]``: at the first step there may be fewer rows than slots."""
    missing = (0, 0) * (rows.dim() - 2) + (0, beams - rows.shape[1])
    return torch.nn.functional.pad(rows, missing, value=filler)


def _entropy(expansion: Expansion, selected: Ranked | Decided) -> Tensor:
    """float32 ``[R]``."""
    mask = expansion.bitmask if expansion.normalize == "allowed" else None
    options: dict[str, Any] = {"bitmask": mask, "temperature": expansion.temperature, "active": expansion.active}
    if isinstance(selected, Ranked):
        lse = selected.candidates.lse
    else:
        lse = summarize(expansion.logits, **options, normalize="allowed", vocab_size=expansion.vocab_size).lse
    return row_entropy(expansion.logits, lse, **options, vocab_size=expansion.vocab_size)


def _room(state: State) -> Tensor:
    """int64 ``[B]``: how many candidates a step keeps."""
    width = state.limits.width.long()
    return width - (state.pool.log_probs > -torch.inf).sum(1) if state.rule.shrinks else width


def _margin(state: State, expansion: Expansion, selected: Ranked | Decided) -> Tensor:
    """float32 ``[B]``."""
    slots, limits = state.slots, state.limits
    if not isinstance(selected, Ranked) or expansion.banks is not None:
        return torch.full_like(slots.log_probs[:, 0], torch.nan)
    more = state.selection.select(expansion, slots.log_probs.shape[1] + 1)
    assert isinstance(more, Ranked)
    length = next_length(state.requests, limits)
    norm = limits.length_norm.gather(1, length[:, None])
    scores = [more.candidates.scores / norm]
    ends = _ends(expansion, more)
    if ends is not None:
        compete = ends.log_probs > -torch.inf
        if not (state.in_place or state.rule.shrinks):  # an EOS takes no place but at the last step
            last = limits.max_length == length if selected.finishing is None else torch.zeros_like(state.requests.done)
            compete = compete & last[:, None]
        scores.append((ends.scores / norm).masked_fill(~compete, -torch.inf))
    if state.in_place:
        old = slots.scores / limits.length_norm.gather(1, slots.lengths.long())
        scores.append(old.masked_fill(~slots.ended, -torch.inf))
    ranked = torch.cat(scores, 1).sort(dim=1, descending=True).values
    room = _room(state).clamp(min=1)[:, None]
    kept, rejected = (ranked.gather(1, place)[:, 0] for place in (room - 1, room))
    return torch.where(rejected == -torch.inf, torch.inf, kept - rejected)


def _ends(expansion: Expansion, ranked: Ranked) -> Endings | None:
    """The EOS candidates of a step, as the step itself ranks them."""
    penalty = ranked.end_penalty
    if ranked.finishing is not None:
        penalty = torch.where(ranked.finishing, 0.0 if penalty is None else penalty, torch.inf)
    return endings_of(expansion, ranked.candidates.lse, penalty, ranked.end_scores)


def _finishing(state: State, expansion: Expansion, selected: Ranked | Decided) -> Tensor:
    """float32 ``[B, K, E]``: see ``Statistics.endings``; of the pool regime."""
    slots = state.slots
    batch, beams = slots.log_probs.shape
    assert isinstance(selected, Ranked)
    ends = _ends(expansion, selected)
    if ends is None:
        return slots.log_probs.new_empty(batch, beams, 0)
    finish = ends.log_probs > -torch.inf
    if selected.finishing is None:
        best = selected.candidates
        order = total_order(
            (best.scores, best.parents, best.adjusted, best.tokens),
            (ends.scores, ends.parents, ends.adjusted, ends.tokens),
        )
        place = torch.arange(order.shape[1], device=order.device).expand_as(order)
        ranks = torch.empty_like(order).scatter_(1, order, place)[:, beams:]
        finish = finish & (ranks < _room(state)[:, None])
    found = ends.token_log_probs.masked_fill(~finish, -torch.inf)
    return _of_slots(found.view(batch, expansion.parents, -1), beams, -torch.inf)


def _ended_in_place(state: State, seen: Observed, moves: Moves) -> tuple[Tensor, Tensor]:
    """``Statistics.endings`` of a step, float32 ``[B, K, E]``, and how many slots it ended, int64 ``[B]``."""
    slots, history = state.slots, state.history
    batch, beams = slots.log_probs.shape
    if state.eos is None:
        return slots.log_probs.new_empty(batch, beams, 0), torch.zeros_like(seen.step)
    now = slots.ended & (slots.log_probs > -torch.inf) & (slots.lengths == seen.step[:, None] + 1)
    number = (moves.tokens[:, :, None] == state.eos).int().argmax(2)
    count = state.eos.shape[0]
    nowhere = beams * count  # what has not ended is put behind the end
    place = torch.where(now, moves.parents * count + number, nowhere)
    index = seen.step[:, None, None].expand(-1, 1, beams)
    log_probs = history.token_log_probs.transpose(0, 1).gather(1, index)[:, 0]
    found = log_probs.new_full((batch, nowhere + 1), -torch.inf).scatter_(1, place, log_probs)
    return found[:, :nowhere].view(batch, beams, count), now.sum(1)
