"""One step's bookkeeping where the selection has decided what every slot holds.

Rules that sample, and those whose width varies, choose among finished hypotheses and candidates themselves; nothing is
ranked here. A chosen candidate that is an EOS ends its slot; a frozen hypothesis goes on as it is. A request ends when
every slot has ended, at ``max_length``, or when nothing is left.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .beamstate import (
    Draws,
    History,
    Limits,
    Moves,
    Requests,
    Slots,
    fake_moves,
    make_moves,
    next_length,
    record,
    report_faults,
)
from .random import child_nodes
from .registration import register


class Choice(NamedTuple):
    """What each slot is to hold: a candidate, or a frozen hypothesis, whose parent is the slot it was in."""

    tokens: Tensor  # int64 [B, K]; of a frozen hypothesis pad_id
    parents: Tensor  # int64 [B, K]
    token_log_probs: Tensor  # float32 [B, K]; of a frozen hypothesis 0
    log_probs: Tensor  # float32 [B, K], cumulative, the model's; -inf where nothing was chosen
    scores: Tensor  # float32 [B, K], what hypotheses are ranked by, before a length norm
    sampling_log_probs: Tensor  # float32 [B, K], cumulative, of what was sampled from
    inclusion: Tensor  # float32 [B, K], see Draws
    codes: Tensor  # int64 [B, K], see fb.Arithmetic


def _advance_chosen(
    choice_tensors: list[Tensor],
    row_flags: Tensor,
    eos: Tensor | None,
    slot_tensors: list[Tensor],
    draw_tensors: list[Tensor],
    request_tensors: list[Tensor],
    history_tensors: list[Tensor],
    limit_tensors: list[Tensor],
    pad_id: int,
) -> Moves:
    """The torch definition."""
    choice, slots, draws = Choice(*choice_tensors), Slots(*slot_tensors), Draws(*draw_tensors)
    requests, history, limits = Requests(*request_tensors), History(*history_tensors), Limits(*limit_tensors)
    beams = slots.log_probs.shape[1]
    live = ~requests.done
    length = next_length(requests, limits)
    slot = torch.arange(beams, device=slots.log_probs.device).expand_as(choice.tokens)

    keep = (choice.log_probs > -torch.inf) & (slot < limits.width[:, None]) & live[:, None]
    frozen = slots.ended.gather(1, choice.parents)
    ended = frozen if eos is None else frozen | (choice.tokens[:, :, None] == eos).any(2)
    active = keep & ~ended
    report_faults(requests, row_flags, live & ~keep.any(1))
    requests.done.logical_or_(~active.any(1) | (limits.max_length == length))
    increments = choice.token_log_probs.masked_fill(~keep, -torch.inf)
    record(requests, history, choice.tokens, choice.parents, increments, live)

    nodes = draws.nodes.gather(1, choice.parents)
    lengths = torch.where(frozen, slots.lengths.gather(1, choice.parents), length[:, None].int())
    none, everyone = -torch.inf, bool(live.all())
    for field, values in (
        (slots.log_probs, choice.log_probs.masked_fill(~keep, none)),
        (slots.scores, choice.scores.masked_fill(~keep, none)),
        (slots.lengths, lengths),
        (slots.ranks, slot.int()),
        (slots.ended, ended & keep),
        (draws.nodes, torch.where(frozen, nodes, child_nodes(nodes, choice.tokens))),
        (draws.sampling_log_probs, choice.sampling_log_probs.masked_fill(~keep, none)),
        (draws.inclusion, choice.inclusion.masked_fill(~keep, 0.0)),
        (draws.codes, choice.codes),
    ):
        field.copy_(values if everyone else torch.where(live[:, None], values, field))
    slots.active.copy_(active & ~requests.done[:, None])
    return make_moves(choice.tokens, choice.parents, keep, keep & ~frozen, row_flags.shape[0], pad_id)


def _fake(
    choice_tensors: list[Tensor],
    row_flags: Tensor,
    eos: Tensor | None,
    slot_tensors: list[Tensor],
    draw_tensors: list[Tensor],
    request_tensors: list[Tensor],
    history_tensors: list[Tensor],
    limit_tensors: list[Tensor],
    pad_id: int,
) -> Moves:
    return fake_moves(choice_tensors)


_op = register(
    "advance_chosen_(Tensor[] choice, Tensor row_flags, Tensor? eos, Tensor(a!)[] slots, Tensor(b!)[] draws, "
    "Tensor(c!)[] requests, Tensor(d!)[] history, Tensor[] limits, int pad_id) -> (Tensor, Tensor, Tensor, Tensor)",
    _advance_chosen,
    _fake,
    "advance_chosen",
)


def advance_chosen_(
    choice: Choice,
    row_flags: Tensor,
    slots: Slots,
    draws: Draws,
    requests: Requests,
    history: History,
    limits: Limits,
    *,
    eos: Tensor | None,
    pad_id: int,
) -> Moves:
    """Take one decode step in place with the slots' contents decided: keep, record, stop.

    Args:
        choice: what the slots are to hold.
        row_flags: int32 ``[B * P]``, faults of the rows that were read.
        slots, draws, requests, history: the search's tensors. Modified.
        limits: what the user set.
        eos: ``[n]`` int64, or ``None`` if nothing ends a hypothesis.
        pad_id: token of idle slots.

    Returns:
        :class:`Moves`.
    """
    return Moves(
        *_op([field.contiguous() for field in choice], row_flags, eos, slots, draws, requests, history, limits, pad_id)
    )
