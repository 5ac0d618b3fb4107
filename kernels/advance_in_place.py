"""One step's bookkeeping where finished hypotheses stay in their slots.

Frozen hypotheses, EOS candidates and the other candidates of a request are ranked together by score, that is
``log_prob / length_norm[length]``; the K best have the slots. A request ends when every slot has ended, at
``max_length``, or when nothing is left. One program owns a request; what it reads and writes does not grow with the step.
"""

import torch
from torch import Tensor

from .beamstate import (
    History,
    Limits,
    Moves,
    Requests,
    Slots,
    endings,
    fake_moves,
    make_moves,
    next_length,
    record,
    report_faults,
)
from .checks import contiguous
from .keys import lexsort_descending, pack_key, token_log_prob
from .registration import register
from .select import Candidates


def _advance_in_place(
    logits: Tensor,
    bitmask: Tensor | None,
    temperature: Tensor | None,
    eos: Tensor | None,
    candidates: list[Tensor],
    slot_tensors: list[Tensor],
    request_tensors: list[Tensor],
    history_tensors: list[Tensor],
    limit_tensors: list[Tensor],
    pad_id: int,
) -> Moves:
    """The torch definition."""
    best, slots, requests = Candidates(*candidates), Slots(*slot_tensors), Requests(*request_tensors)
    history, limits = History(*history_tensors), Limits(*limit_tensors)
    batch, beams = slots.log_probs.shape
    live = ~requests.done
    length = next_length(requests, limits)
    last = limits.max_length == length
    norm = limits.length_norm.gather(1, length[:, None])  # [B, 1]
    slot = torch.arange(beams, device=logits.device).expand(batch, -1)

    frozen = slots.log_probs.masked_fill(~slots.ended, -torch.inf)
    frozen_scores = frozen / limits.length_norm.gather(1, slots.lengths.long())
    first = torch.cat([pack_key(best.log_probs / norm, best.parents), pack_key(frozen_scores, slot)], 1)
    nothing = torch.zeros_like(slot)
    second = torch.cat([pack_key(best.adjusted, best.tokens), pack_key(nothing.float(), nothing)], 1)
    increments = token_log_prob(best.adjusted, best.lse.view(batch, -1).gather(1, best.parents))

    # the candidates, side by side: those that go on, the frozen ones, those that end here
    log_probs = [best.log_probs, frozen]
    parents = [best.parents, slot]
    tokens = [best.tokens, torch.full_like(slot, pad_id)]
    token_log_probs = [increments, torch.zeros_like(frozen)]
    ended = [torch.zeros_like(slots.ended), torch.ones_like(slots.ended)]
    lengths = [length[:, None].expand_as(slot), slots.lengths.long()]
    if eos is not None:
        may_end = (limits.min_length <= length) & live
        ends = endings(logits, best.lse, bitmask, temperature, eos, slots, may_end, norm[:, 0], (first, second))
        log_probs.append(ends.log_probs)
        parents.append(ends.parents)
        tokens.append(ends.tokens)
        token_log_probs.append(ends.token_log_probs)
        ended.append(torch.ones_like(ends.tokens, dtype=torch.bool))
        lengths.append(length[:, None].expand_as(ends.tokens))
        ranks = torch.cat([ends.other_ranks, ends.ranks], 1)
        order = torch.empty_like(ranks).scatter_(1, ranks, torch.arange(ranks.shape[1]).expand_as(ranks))
    else:
        order = lexsort_descending(first, second)
    order = order[:, :beams]

    def chosen(fields: list[Tensor]) -> Tensor:
        return torch.cat(fields, 1).gather(1, order)

    new_log_probs, new_parents, new_tokens, new_ended = map(chosen, (log_probs, parents, tokens, ended))
    keep = (new_log_probs > -torch.inf) & (slot < limits.width[:, None]) & live[:, None]
    new_ended &= keep
    active = keep & ~new_ended
    finished = ~active.any(1)
    report_faults(requests, best.flags, live & ~keep.any(1))
    requests.done.logical_or_(finished | last)

    record(requests, history, new_tokens, new_parents, chosen(token_log_probs), live)
    was_frozen = slots.ended.gather(1, new_parents) & keep
    kept = live[:, None]
    slots.log_probs.copy_(torch.where(kept, new_log_probs.masked_fill(~keep, -torch.inf), slots.log_probs))
    slots.lengths.copy_(torch.where(kept, chosen(lengths).int(), slots.lengths))
    slots.ranks.copy_(torch.where(kept, slot.int(), slots.ranks))
    slots.ended.copy_(torch.where(kept, new_ended, slots.ended))
    slots.active.copy_(active & ~requests.done[:, None])
    return make_moves(new_tokens, new_parents, keep, keep & ~was_frozen, logits.shape[0], pad_id)


def _fake(
    logits: Tensor,
    bitmask: Tensor | None,
    temperature: Tensor | None,
    eos: Tensor | None,
    candidates: list[Tensor],
    slot_tensors: list[Tensor],
    request_tensors: list[Tensor],
    history_tensors: list[Tensor],
    limit_tensors: list[Tensor],
    pad_id: int,
) -> Moves:
    return fake_moves(candidates)


_op = register(
    "advance_in_place_(Tensor logits, Tensor? bitmask, Tensor? temperature, Tensor? eos, Tensor[] candidates, "
    "Tensor(a!)[] slots, Tensor(b!)[] requests, Tensor(c!)[] history, Tensor[] limits, int pad_id) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _advance_in_place,
    _fake,
    "advance_in_place",
)


def advance_in_place_(
    logits: Tensor,
    best: Candidates,
    slots: Slots,
    requests: Requests,
    history: History,
    limits: Limits,
    *,
    eos: Tensor | None,
    pad_id: int,
    bitmask: Tensor | None = None,
    temperature: Tensor | None = None,
) -> Moves:
    """Take one decode step in place: rank frozen hypotheses and candidates together, keep, record, stop.

    Args:
        logits: ``[B * P, V]``, the rows that ``best`` was selected from; only their EOS columns are read.
        best: the K best candidates that are not EOS, by score: ``top_candidates(..., exclude=eos, divisor=...)`` with
            the ``length_norm`` of the new length.
        slots, requests, history: the search's tensors. Modified.
        limits: what the user set.
        eos: ``[n]`` int64, or ``None`` if nothing ends a hypothesis.
        pad_id: token of idle slots.
        bitmask, temperature: as given to ``top_candidates``; the bitmask may bar EOS.

    Returns:
        :class:`Moves`.
    """
    return Moves(*_op(logits, bitmask, contiguous(temperature), eos, best, slots, requests, history, limits, pad_id))
