"""One step's bookkeeping where finished hypotheses leave the beam for a pool.

Among the K best candidates of a request, EOS candidates included, those that end with EOS enter the pool; the K best
others live on. Or the selection decides who does. What the pool keeps and when a request ends is said by its
:class:`Rule`; it also ends at ``max_length`` (where the K best candidates of the step are hypotheses, ended or not), or
when nothing is left to expand. ``bound`` tells how good a hypothesis that is not in the pool can still become. One
program owns a request; its work does not grow with the step.
"""

import torch
from torch import Tensor

from .beamstate import (
    History,
    Limits,
    Moves,
    Pool,
    Requests,
    Rule,
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


def _collect(pool: Pool, new: Pool, finish: Tensor, limits: Limits, last: Tensor, rule: Rule) -> Tensor:
    """Merge the candidates ``new [B, E]`` that ``finish`` into the pool.

    Returns float32 ``[B]``: the best score of those that a quota kept out.
    """
    places = pool.scores.shape[1]
    # behind what is in the pool, by rank within the step
    order = new.ranks.masked_fill(~finish, torch.iinfo(torch.int32).max).sort(1).indices[:, :places]
    finish = finish.gather(1, order)
    new = Pool(*(field.gather(1, order) for field in new))
    held = pool.log_probs > -torch.inf
    left_out = torch.zeros_like(finish)
    if rule.by_arrival:
        if rule.overflow != "step":
            left_out = finish & (held.sum(1, keepdim=True) + finish.cumsum(1) > limits.quota[:, None])
        if rule.overflow == "last":
            left_out &= ~last[:, None]
        finish &= ~left_out
        key = torch.cat([held, finish], 1).float()
    else:
        key = torch.cat([pool.scores, new.scores.masked_fill(~finish, -torch.inf)], 1)
    order = key.sort(dim=1, descending=True, stable=True).indices[:, :places]
    held = torch.cat([held, finish], 1).gather(1, order)
    if not rule.by_arrival:
        held &= torch.arange(places, device=held.device) < limits.width[:, None]
    for field, fresh in zip(pool, new, strict=True):
        empty = -torch.inf if field.is_floating_point() else 0
        field.copy_(torch.cat([field, fresh], 1).gather(1, order).masked_fill(~held, empty))
    return new.scores.masked_fill(~left_out, -torch.inf).amax(1)


def _advance_pool(
    logits: Tensor,
    bitmask: Tensor | None,
    temperature: Tensor | None,
    eos: Tensor | None,
    candidates: list[Tensor],
    slot_tensors: list[Tensor],
    request_tensors: list[Tensor],
    history_tensors: list[Tensor],
    pool_tensors: list[Tensor],
    limit_tensors: list[Tensor],
    bound: Tensor,
    end_penalty: Tensor | None,
    end_scores: Tensor | None,
    best_possible: Tensor | None,
    pad_id: int,
    decided: bool,
    by_arrival: bool,
    overflow: str,
    best_live: bool,
    exact: bool,
    shrinks: bool,
    awaits_best: bool,
) -> Moves:
    """The torch definition."""
    best, slots, requests = Candidates(*candidates), Slots(*slot_tensors), Requests(*request_tensors)
    history, pool, limits = History(*history_tensors), Pool(*pool_tensors), Limits(*limit_tensors)
    rule = Rule(by_arrival, overflow, best_live, exact, shrinks, awaits_best)
    batch, beams = slots.log_probs.shape
    live = ~requests.done
    length = next_length(requests, limits)
    last = limits.max_length == length
    width = limits.width[:, None]
    room = width - (pool.log_probs > -torch.inf).sum(1, keepdim=True) if shrinks else width
    left_out, best_ended = None, None
    place = torch.arange(beams, device=logits.device)
    ranks = place.expand(batch, -1)
    if eos is not None:
        may_end = (limits.min_length <= length) & live
        ends = endings(logits, best.lse, bitmask, temperature, eos, slots, may_end, end_penalty, end_scores)
        there = ends.log_probs > -torch.inf  # if decided, those that finish
        kth = best.scores.gather(1, width.long() - 1)
        if bool(
            (there if decided else ends.scores >= kth).any()
        ):  # else every EOS candidate is behind the K best others
            order = total_order(
                (best.scores, best.parents, best.adjusted, best.tokens),
                (ends.scores, ends.parents, ends.adjusted, ends.tokens),
            )
            rank = torch.arange(order.shape[1], device=order.device).expand_as(order)
            ranks, end_ranks = torch.empty_like(order).scatter_(1, order, rank).split([beams, ends.tokens.shape[1]], 1)
            finish = there if decided else there & (end_ranks < room)
            scores = ends.scores / limits.length_norm.gather(1, length[:, None])
            ids = (ends.tokens, ends.parents, requests.steps[:, None].expand_as(ends.tokens), end_ranks)
            new = Pool(scores, ends.log_probs, ends.token_log_probs, *(field.int() for field in ids))
            left_out = _collect(pool, new, finish, limits, last, rule)
            best_ended = (finish & (end_ranks == 0)).any(1)

    keep = (best.log_probs > -torch.inf) & (place < width) & live[:, None]
    held = (pool.log_probs > -torch.inf).sum(1)
    if not decided:
        keep &= (ranks < room) | ~(torch.ones_like(last) if shrinks else last)[:, None]
    elif shrinks:
        keep &= place < width - held[:, None]
    possible = best_possible
    if possible is None:
        possible = best.scores[:, 0] / limits.bound_norm.gather(1, length[:, None])[:, 0]
    stop = held >= limits.quota
    if awaits_best:
        awaited = ((pool.ranks == 0) & (pool.log_probs > -torch.inf)).any(1)
        stop &= awaited if best_ended is None else awaited | best_ended
    if best_live or exact:
        as_it_is = best.scores[:, 0] / limits.length_norm.gather(1, length[:, None])[:, 0]
        worst = pool.scores.gather(1, width.long() - 1)[:, 0]
        stop |= (held >= limits.width) & (worst >= (possible if exact else as_it_is))
    possible = possible.masked_fill(last | ~keep.any(1), -torch.inf)
    if left_out is not None:
        possible = torch.maximum(possible, left_out)
    bound.copy_(torch.where(live, possible, bound))
    filled, keep = keep, keep & ~(stop & ~last)[:, None]  # a request ended by its rule has its pool
    none_left = ~keep.any(1)
    report_faults(requests, best.flags, live & none_left & (held == 0))
    requests.done.logical_or_(stop | last | none_left)

    increments = token_log_prob(best.adjusted, best.lse.view(batch, -1).gather(1, best.parents))
    record(requests, history, best.tokens, best.parents, increments.masked_fill(~filled, -torch.inf), live)
    kept = live[:, None]
    slots.log_probs.copy_(torch.where(kept, best.log_probs.masked_fill(~keep, -torch.inf), slots.log_probs))
    slots.scores.copy_(torch.where(kept, best.scores.masked_fill(~keep, -torch.inf), slots.scores))
    slots.lengths.add_(kept.int())
    slots.ranks.copy_(torch.where(kept, ranks.masked_fill(~keep, 0).int(), slots.ranks))
    slots.active.copy_(keep & ~requests.done[:, None])
    return make_moves(best.tokens, best.parents, keep, keep, logits.shape[0], pad_id)


def _fake(
    logits: Tensor,
    bitmask: Tensor | None,
    temperature: Tensor | None,
    eos: Tensor | None,
    candidates: list[Tensor],
    slot_tensors: list[Tensor],
    request_tensors: list[Tensor],
    history_tensors: list[Tensor],
    pool_tensors: list[Tensor],
    limit_tensors: list[Tensor],
    bound: Tensor,
    end_penalty: Tensor | None,
    end_scores: Tensor | None,
    best_possible: Tensor | None,
    pad_id: int,
    decided: bool,
    by_arrival: bool,
    overflow: str,
    best_live: bool,
    exact: bool,
    shrinks: bool,
    awaits_best: bool,
) -> Moves:
    return fake_moves(candidates)


_op = register(
    "advance_pool_(Tensor logits, Tensor? bitmask, Tensor? temperature, Tensor? eos, Tensor[] candidates, "
    "Tensor(a!)[] slots, Tensor(b!)[] requests, Tensor(c!)[] history, Tensor(d!)[] pool, Tensor[] limits, "
    "Tensor(e!) bound, Tensor? end_penalty, Tensor? end_scores, Tensor? best_possible, int pad_id, "
    "bool decided, bool by_arrival, str overflow, bool best_live, bool exact, bool shrinks, bool awaits_best) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _advance_pool,
    _fake,
    "advance_pool",
)


def advance_pool_(
    logits: Tensor,
    best: Candidates,
    slots: Slots,
    requests: Requests,
    history: History,
    pool: Pool,
    limits: Limits,
    bound: Tensor,
    *,
    eos: Tensor | None,
    pad_id: int,
    rule: Rule,
    bitmask: Tensor | None = None,
    temperature: Tensor | None = None,
    end_penalty: Tensor | None = None,
    end_scores: Tensor | None = None,
    finishing: Tensor | None = None,
    best_possible: Tensor | None = None,
) -> Moves:
    """Take one decode step in place: finish, keep, record, stop.

    Args:
        logits: ``[B * P, V]``, the rows that ``best`` was selected from; only their EOS columns are read.
        best: the K best candidates that are not EOS, from ``top_candidates(..., exclude=eos)``; or other K, in that
            order.
        slots, requests, history, pool: the search's tensors. Modified.
        limits: what the user set.
        bound: float32 ``[B]``, the most that a hypothesis which is not in the pool can still score; ``-inf`` once there
            is none. Modified.
        eos: ``[n]`` int64, or ``None`` if nothing ends a hypothesis.
        pad_id: token of idle slots.
        rule: what the pool keeps and when a request ends.
        bitmask, temperature: as given to ``top_candidates``; the bitmask may bar EOS.
        end_penalty: float32 ``[B, P * n]``, taken from the scores of EOS candidates, parent by parent; ``+inf`` bars
            one.
        end_scores: float32 ``[B, P * n]``, the scores of EOS candidates before that, parent by parent; ``-inf`` bars
            one. Default: the score of its parent plus its log-probability.
        finishing: bool ``[B, P * n]``, the EOS candidates that finish, K at most, where the selection has decided that.
            At ``max_length`` all of ``best`` become hypotheses then.
        best_possible: float32 ``[B]``, the most that a beam which lives on can score in the end; ``+inf`` if that is
            not known. Default: the score of the first of ``best`` over the greatest norm of the lengths still open,
            which holds for scores that only fall.

    Returns:
        :class:`Moves`.
    """
    if finishing is not None:
        end_penalty = torch.where(finishing, 0.0 if end_penalty is None else end_penalty, torch.inf)
    return Moves(
        *_op(
            logits,
            bitmask,
            contiguous(temperature),
            eos,
            best,
            slots,
            requests,
            history,
            pool,
            limits,
            bound,
            contiguous(end_penalty),
            contiguous(end_scores),
            contiguous(best_possible),
            pad_id,
            finishing is not None,
            *rule,
        )
    )
