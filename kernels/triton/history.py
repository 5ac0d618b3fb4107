"""Triton: walk back through the parents; follow a step in the table of ancestors."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_TRACE_BLOCK = 32  # hypotheses a program: the walk waits for memory, so spread it thin
_TABLE_BLOCK = 4096  # entries a program
_LEAST_STEPS = 8  # of them along a row: one memory sector


@triton.jit
def _trace_kernel(
    # inputs
    parents_ptr,  # *i64 or *i32 [T, B, K]
    end_step_ptr,  # *i64 or *i32 [B, N]
    end_slot_ptr,  # *i64 or *i32 [B, N]
    # output
    slots_ptr,  # *i64 [B, N, T], contiguous
    # sizes and strides, in elements
    n_paths,  # B * N
    N,
    T,
    K,
    stride_parents_t,
    stride_parents_b,
    stride_parents_k,
    stride_step_b,
    stride_step_n,
    stride_slot_b,
    stride_slot_n,
    # meta-parameters
    BLOCK: tl.constexpr,
):
    path = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = path < n_paths
    b, n = path // N, path % N
    end_step = tl.load(end_step_ptr + b * stride_step_b + n * stride_step_n, mask=inside, other=-1).to(tl.int64)
    end_slot = tl.load(end_slot_ptr + b * stride_slot_b + n * stride_slot_n, mask=inside, other=0).to(tl.int64)
    end_slot = tl.minimum(tl.maximum(end_slot, 0), K - 1)
    parents_ptr += b * stride_parents_b
    slots_ptr += path * T
    slot = end_slot
    for back in range(0, T):
        t = (T - 1 - back).to(tl.int64)
        on_path = inside & (t <= end_step)
        tl.store(slots_ptr + t, tl.where(on_path, slot, -1), mask=inside)
        parent = tl.load(parents_ptr + t * stride_parents_t + slot * stride_parents_k, mask=on_path, other=0)
        parent = tl.minimum(tl.maximum(parent.to(tl.int64), 0), K - 1)
        slot = tl.where(on_path, parent, end_slot)


@triton.jit
def _ancestry_kernel(
    # inputs
    table_ptr,  # *i32 [B, K, T]
    parents_ptr,  # *i64 or *i32 [B, K]
    step_ptr,  # *i64, one element
    # output
    out_ptr,  # *i32 [B, K, T]; table_ptr if IN_PLACE
    # sizes and strides, in elements
    K,
    T,
    stride_table_b,
    stride_table_k,
    stride_table_t,
    stride_parents_b,
    stride_parents_k,
    stride_out_b,
    stride_out_k,
    stride_out_t,
    # meta-parameters
    IN_PLACE: tl.constexpr,
    BLOCK_K: tl.constexpr,  # all slots: nobody else writes what this program reads
    BLOCK_T: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    t = (tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)[None, :]
    k = tl.arange(0, BLOCK_K).to(tl.int64)[:, None]
    now = tl.load(step_ptr)
    parent = tl.load(parents_ptr + b * stride_parents_b + k * stride_parents_k, mask=k < K, other=0).to(tl.int64)
    parent = tl.minimum(tl.maximum(parent, 0), K - 1)

    source = tl.where(t < now, parent, k)
    written = (k < K) & (t < T)
    if IN_PLACE:
        written = written & ((source != k) | (t == now))
    offset = b * stride_table_b + source * stride_table_k + t * stride_table_t
    block = tl.load(table_ptr + offset, mask=written, other=0)  # [BLOCK_K, BLOCK_T]
    block = tl.where(t == now, k.to(tl.int32), block)
    if IN_PLACE:
        tl.debug_barrier()  # every load of this program before any of its stores
    tl.store(out_ptr + b * stride_out_b + k * stride_out_k + t * stride_out_t, block, mask=written)


def launch_trace_slots(parents: Tensor, end_step: Tensor, end_slot: Tensor) -> Tensor:
    steps, _, beams = parents.shape
    slots = torch.empty((*end_step.shape, steps), dtype=torch.int64, device=parents.device)
    if slots.numel() == 0:
        return slots
    paths = end_step.numel()
    _trace_kernel[(triton.cdiv(paths, _TRACE_BLOCK),)](
        parents,
        end_step,
        end_slot,
        slots,
        paths,
        end_step.shape[1],
        steps,
        beams,
        *parents.stride(),
        *end_step.stride(),
        *end_slot.stride(),
        BLOCK=_TRACE_BLOCK,
        num_warps=1,
    )
    return slots


def _launch_ancestry(table: Tensor, parents: Tensor, step: Tensor, out: Tensor, in_place: bool) -> None:
    if table.numel() == 0:
        return
    batch, beams, steps = table.shape
    block_k = triton.next_power_of_2(beams)
    block_t = max(_TABLE_BLOCK // block_k, _LEAST_STEPS)
    _ancestry_kernel[(batch, triton.cdiv(steps, block_t))](
        table,
        parents,
        step,
        out,
        beams,
        steps,
        *table.stride(),
        *parents.stride(),
        *out.stride(),
        IN_PLACE=in_place,
        BLOCK_K=block_k,
        BLOCK_T=block_t,
        num_warps=min(4 * block_k * block_t // _TABLE_BLOCK, 32),  # entries a thread stay the same for many slots
    )


def launch_update_ancestry(table: Tensor, parents: Tensor, step: Tensor) -> None:
    _launch_ancestry(table, parents, step, table, in_place=True)


def launch_update_ancestry_out(table: Tensor, parents: Tensor, step: Tensor, out: Tensor) -> None:
    _launch_ancestry(table, parents, step, out, in_place=False)
