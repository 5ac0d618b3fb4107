"""One step's bookkeeping where finished hypotheses stay in their slots.

Frozen hypotheses, EOS candidates and the other candidates of a request are ranked together by score, that is
``log_prob / length_norm[length]``; the K best have the slots. A request ends when every slot has ended, at
``max_length``, or when nothing is left. One program owns a request; its work does not grow with the step.
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
    total_order,
)
from .checks import contiguous
from .keys import token_log_prob
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
    end_penalty: Tensor | None,
    end_scores: Tensor | None,
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

    frozen, frozen_scores = (field.masked_fill(~slots.ended, -torch.inf) for field in (slots.log_probs, slots.scores))
    frozen_ranked = frozen_scores / limits.length_norm.gather(1, slots.lengths.long())
    increments = token_log_prob(best.adjusted, best.lse.view(batch, -1).gather(1, best.parents))
    nothing = torch.zeros_like(slot)  # a frozen hypothesis is its slot's only candidate: nothing else to compare
    pad = torch.full_like(slot, pad_id)
    new_length = length[:, None].expand_as(slot)

    # the candidates, side by side: those that go on, the frozen ones, those that end here
    keys = [(best.scores / norm, best.parents, best.adjusted, best.tokens)]
    fields = [(best.log_probs, best.scores, best.parents, best.tokens, increments, new_length, nothing.bool())]
    keys.append((frozen_ranked, slot, nothing.float(), nothing))
    fields.append((frozen, frozen_scores, slot, pad, nothing.float(), slots.lengths.long(), ~nothing.bool()))
    if eos is not None:
        may_end = (limits.min_length <= length) & live
        ends = endings(logits, best.lse, bitmask, temperature, eos, slots, may_end, end_penalty, end_scores)
        keys.append((ends.scores / norm, ends.parents, ends.adjusted, ends.tokens))
        new_length = length[:, None].expand_as(ends.tokens)
        ended = torch.ones_like(ends.tokens, dtype=torch.bool)
        fields.append((ends.log_probs, ends.scores, ends.parents, ends.tokens, ends.token_log_probs, new_length, ended))
    order = total_order(*keys)[:, :beams]
    log_probs, scores, parents, tokens, increments, lengths, ended = (
        torch.cat(field, 1).gather(1, order) for field in zip(*fields, strict=True)
    )

    keep = (log_probs > -torch.inf) & (slot < limits.width[:, None]) & live[:, None]
    ended &= keep
    active = keep & ~ended
    report_faults(requests, best.flags, live & ~keep.any(1))
    requests.done.logical_or_(~active.any(1) | last)

    record(requests, history, tokens, parents, increments.masked_fill(~keep, -torch.inf), live)
    moving = keep & ~slots.ended.gather(1, parents)
    kept = live[:, None]
    slots.log_probs.copy_(torch.where(kept, log_probs.masked_fill(~keep, -torch.inf), slots.log_probs))
    slots.scores.copy_(torch.where(kept, scores.masked_fill(~keep, -torch.inf), slots.scores))
    slots.lengths.copy_(torch.where(kept, lengths.int(), slots.lengths))
    slots.ranks.copy_(torch.where(kept, slot.int(), slots.ranks))
    slots.ended.copy_(torch.where(kept, ended, slots.ended))
    slots.active.copy_(active & ~requests.done[:, None])
    return make_moves(tokens, parents, keep, moving, logits.shape[0], pad_id)


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
    end_penalty: Tensor | None,
    end_scores: Tensor | None,
    pad_id: int,
) -> Moves:
    return fake_moves(candidates)


_op = register(
    "advance_in_place_(Tensor logits, Tensor? bitmask, Tensor? temperature, Tensor? eos, Tensor[] candidates, "
    "Tensor(a!)[] slots, Tensor(b!)[] requests, Tensor(c!)[] history, Tensor[] limits, Tensor? end_penalty, "
    "Tensor? end_scores, int pad_id) -> (Tensor, Tensor, Tensor, Tensor)",
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
    end_penalty: Tensor | None = None,
    end_scores: Tensor | None = None,
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
        end_penalty: float32 ``[B, P * n]``, taken from the scores of EOS candidates, parent by parent; ``+inf`` bars
            one.
        end_scores: float32 ``[B, P * n]``, the scores of EOS candidates before that, parent by parent; ``-inf`` bars
            one. Default: the score of its parent plus its log-probability.

    Returns:
        :class:`Moves`.
    """
    penalty, scores = contiguous(end_penalty), contiguous(end_scores)
    rows = (logits, bitmask, contiguous(temperature), eos)
    return Moves(*_op(*rows, best, slots, requests, history, limits, penalty, scores, pad_id))
