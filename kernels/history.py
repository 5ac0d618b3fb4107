"""Beams across steps: who descends from whom.

    slots[b, n, t] = end_slot[b, n]                           at t = end_step[b, n]
                   = parents[t + 1, b, slots[b, n, t + 1]]    before it, and -1 after it

and, one step at a time, the same as a table: ``table[b, k, t]`` is the slot that held, at step t, the ancestor of what
slot k holds now. A cache read through the table needs no moving.

Tracing: one program walks 32 hypotheses back in time, ``T`` dependent reads of the parents, ``8 * B * N * T`` bytes
written. Updating: one program owns a block of steps of all K slots of a request; it loads the gathered block, waits for
its threads, and stores it. Slots that keep their parent are not moved.
"""

import torch
from torch import Tensor

from .checks import check_apart, check_dtype, check_range, check_same_device, check_shape, check_writable
from .registration import register

_INTS = (torch.int64, torch.int32)


def _trace_slots(parents: Tensor, end_step: Tensor, end_slot: Tensor) -> Tensor:
    """The torch definition."""
    steps, _, beams = parents.shape
    back = parents.clamp(0, beams - 1).long().unbind(0)  # T x [B, K]
    end_slot = end_slot.clamp(0, beams - 1).long()
    end_step = end_step.clamp(max=steps - 1)
    ending = set(end_step.flatten().tolist())
    slot = end_slot  # before a hypothesis ends, any slot will do
    path = []
    for t in range(steps - 1, -1, -1):
        if t in ending:
            slot = torch.where(end_step == t, end_slot, slot)
        path.append(slot)
        slot = back[t].gather(1, slot)
    if not path:
        return end_slot.new_empty(*end_slot.shape, 0)
    after = torch.arange(steps, device=parents.device) > end_step[:, :, None]
    return torch.stack(path[::-1], 2).masked_fill_(after, -1)


def _trace_slots_fake(parents: Tensor, end_step: Tensor, end_slot: Tensor) -> Tensor:
    return end_slot.new_empty((*end_slot.shape, parents.shape[0]), dtype=torch.int64)


def _update_ancestry(table: Tensor, parents: Tensor, step: Tensor) -> None:
    """The torch definition."""
    _, beams, steps = table.shape
    now = int(step)
    slots = torch.arange(beams, device=table.device)
    parents = parents.clamp(0, beams - 1).long()
    request, slot = (parents != slots).nonzero(as_tuple=True)
    table[request, slot, : max(now, 0)] = table[request, parents[request, slot], : max(now, 0)]
    if 0 <= now < steps:
        table[:, :, now] = slots


def _update_ancestry_fake(table: Tensor, parents: Tensor, step: Tensor) -> None:
    return None


def _update_ancestry_out(table: Tensor, parents: Tensor, step: Tensor, out: Tensor) -> None:
    """The torch definition."""
    out.copy_(table)
    _update_ancestry(out, parents, step)


def _update_ancestry_out_fake(table: Tensor, parents: Tensor, step: Tensor, out: Tensor) -> None:
    return None


_trace_slots_op = register(
    "trace_slots(Tensor parents, Tensor end_step, Tensor end_slot) -> Tensor",
    _trace_slots,
    _trace_slots_fake,
    "history",
)
_update_ancestry_op = register(
    "update_ancestry(Tensor(a!) table, Tensor parents, Tensor step) -> ()",
    _update_ancestry,
    _update_ancestry_fake,
    "history",
)
_update_ancestry_out_op = register(
    "update_ancestry_out(Tensor table, Tensor parents, Tensor step, Tensor(a!) out) -> ()",
    _update_ancestry_out,
    _update_ancestry_out_fake,
    "history",
)


def trace_slots(parents: Tensor, end_step: Tensor, end_slot: Tensor) -> Tensor:
    """Slots on the path of each hypothesis, from its first step to its last.

    Args:
        parents: ``[T, B, K]`` int64 or int32, any strides; ``parents[t, b, k]`` is the slot at step t - 1 that slot k
            of step t continues. Values outside ``[0, K)`` are clamped; ``parents[0]`` is not used. Not modified.
        end_step: ``[B, N]`` int64 or int32, any strides: the last step of hypothesis n, counted from 0. A negative
            value means that there is none; a value above ``T - 1`` counts as ``T - 1``. Not modified.
        end_slot: ``[B, N]`` int64 or int32, any strides: the slot at that step, clamped to ``[0, K)``. Not modified.

    Returns:
        ``[B, N, T]`` int64: the slot at each step; -1 after ``end_step``.

    Raises:
        ValueError: shapes or devices differ from the above, or ``K = 0``.
        TypeError: a dtype differs from the above.
    """
    check_dtype("parents", parents, *_INTS)
    check_dtype("end_step", end_step, *_INTS)
    check_dtype("end_slot", end_slot, *_INTS)
    check_shape("parents", parents, "[T, B, K]", None, None, None)
    _check_slots(parents)
    check_shape("end_step", end_step, "[B, N]", parents.shape[1], None)
    check_shape("end_slot", end_slot, "[B, N]", *end_step.shape)
    check_same_device(parents=parents, end_step=end_step, end_slot=end_slot)
    return _trace_slots_op(parents, end_step, end_slot)


def backtrace(tokens: Tensor, parents: Tensor) -> Tensor:
    """Sequences of the beams of the last step, read off the parents.

    Equivalent to, for every ``b`` and ``k``::

        slot = k
        for t in reversed(range(T)):
            out[b, k, t], slot = tokens[t, b, slot], parents[t, b, slot]

    Args:
        tokens: ``[T, B, K]`` int64 or int32, any strides. Not modified.
        parents: ``[T, B, K]`` int64 or int32, any strides; slot in the previous step, clamped to ``[0, K)``;
            ``parents[0]`` is not used. Not modified.

    Returns:
        ``[B, K, T]`` int64.

    Raises:
        ValueError: shapes or devices differ from the above, or ``K = 0``.
        TypeError: a dtype differs from the above.
    """
    check_dtype("tokens", tokens, *_INTS)
    check_dtype("parents", parents, *_INTS)
    check_shape("tokens", tokens, "[T, B, K]", None, None, None)
    check_shape("parents", parents, "[T, B, K]", *tokens.shape)
    _check_slots(parents)
    check_same_device(tokens=tokens, parents=parents)
    steps, batch, beams = tokens.shape
    end_step = torch.full((batch, beams), steps - 1, dtype=torch.int64, device=tokens.device)
    end_slot = torch.arange(beams, device=tokens.device).expand(batch, beams)
    slots = _trace_slots_op(parents, end_step, end_slot)
    return tokens.permute(1, 2, 0).gather(1, slots).long()


def update_ancestry(table: Tensor, parents: Tensor, step: Tensor | int, *, out: Tensor | None = None) -> Tensor:
    """Follow one step of the search in the table of ancestors, in place unless ``out`` is given.

    Equivalent to, for every ``b`` and ``k``::

        new[b, k, :step] = table[b, parents[b, k], :step]
        new[b, k, step] = k
        new[b, k, step + 1:] = table[b, k, step + 1:]

    Args:
        table: ``[B, K, T]`` int32, any strides without overlap. Modified, unless ``out`` is given.
        parents: ``[B, K]`` int64 or int32, any strides: slot in the previous step, clamped to ``[0, K)``. Not modified.
        step: the step just taken, counted from 0: an int below ``T``, or an int64 tensor with one element on
            ``table``'s device, which a CUDA graph reads anew at each replay. A tensor may be out of range: below 0
            nothing changes; from ``T`` on all steps are gathered and none is written. Not modified.
        out: ``[B, K, T]`` int32, any strides without overlap, apart from ``table`` in memory. Modified.

    Returns:
        ``table``, or ``out`` if given.

    Raises:
        ValueError: shapes, devices or strides differ from the above, or ``K = 0``.
        TypeError: a dtype or type differs from the above.
    """
    check_dtype("table", table, torch.int32)
    check_dtype("parents", parents, *_INTS)
    check_shape("table", table, "[B, K, T]", None, None, None)
    batch, beams, steps = table.shape
    check_shape("parents", parents, "[B, K]", batch, beams)
    _check_slots(parents)
    if not isinstance(step, Tensor):
        check_range("step", step, 0, steps - 1)
        step = torch.full((1,), step, dtype=torch.int64, device=table.device)
    check_dtype("step", step, torch.int64)
    if step.numel() != 1:
        raise ValueError(f"step: expected an int or a tensor with 1 element, got shape {list(step.shape)}")
    check_same_device(table=table, parents=parents, step=step)
    if out is None:
        check_writable("table", table)
        _update_ancestry_op(table, parents, step)
        return table
    check_dtype("out", out, torch.int32)
    check_shape("out", out, "[B, K, T]", *table.shape)
    check_writable("out", out)
    check_same_device(table=table, out=out)
    check_apart("out", out, "table", table)
    _update_ancestry_out_op(table, parents, step, out)
    return out


def _check_slots(parents: Tensor) -> None:
    if parents.shape[-1] == 0:
        raise ValueError("parents: expected at least 1 slot, got 0")
