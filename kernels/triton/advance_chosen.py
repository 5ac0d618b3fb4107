"""One step's bookkeeping where the selection has decided what every slot holds: one program owns one request."""

import triton
import triton.language as tl
from torch import Tensor

from ..beamstate import Moves, fake_moves
from .beamstate import write_step
from .random import child_node


@triton.jit
def _advance_chosen_kernel(
    # Choice
    tokens_ptr,  # *i64 [B, K]
    parents_ptr,  # *i64 [B, K]
    increments_ptr,  # *f32 [B, K]
    chosen_log_probs_ptr,  # *f32 [B, K]
    chosen_scores_ptr,  # *f32 [B, K]
    chosen_sampling_ptr,  # *f32 [B, K]
    chosen_inclusion_ptr,  # *f32 [B, K]
    chosen_codes_ptr,  # *i64 [B, K]
    # inputs
    row_flags_ptr,  # *i32 [B * P]
    eos_ptr,  # *i64 [N_EOS] or unused
    # Slots, modified
    log_probs_ptr,
    lengths_ptr,
    ranks_ptr,
    ended_ptr,
    active_ptr,
    scores_ptr,
    # Draws, modified
    nodes_ptr,
    sampling_ptr,
    inclusion_ptr,
    codes_ptr,
    # Requests, modified
    done_ptr,
    flags_ptr,
    steps_ptr,
    # History, modified
    history_tokens_ptr,
    history_parents_ptr,
    history_increments_ptr,
    # Limits; what ranks hypotheses is not used
    width_ptr,
    max_length_ptr,
    # Moves, the outputs
    out_tokens_ptr,
    out_parents_ptr,
    out_rows_ptr,
    out_valid_ptr,
    # sizes
    batch,
    beams,
    rows_per_request,
    max_steps,
    pad_id,
    # meta-parameters
    N_EOS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    request = tl.program_id(0).to(tl.int64)
    done = tl.load(done_ptr + request).to(tl.int32) != 0
    live = 1 - done.to(tl.int32)
    steps = tl.load(steps_ptr + request)
    flags = tl.load(flags_ptr + request)
    length = tl.minimum(steps + 1, max_steps)
    last = tl.load(max_length_ptr + request) == length
    base = request * beams
    slot = tl.arange(0, BLOCK_K)
    inside = slot < beams
    here = base + slot
    token = tl.load(tokens_ptr + here, mask=inside, other=0)
    parent = tl.load(parents_ptr + here, mask=inside, other=0)
    log_prob = tl.load(chosen_log_probs_ptr + here, mask=inside, other=-float("inf"))
    keep = (log_prob > -float("inf")) & (slot < tl.load(width_ptr + request) * live)
    frozen = tl.load(ended_ptr + base + parent, mask=inside, other=0).to(tl.int32) != 0
    ended = frozen
    for i in tl.static_range(N_EOS):
        ended = ended | (token == tl.load(eos_ptr + i))
    ended = ended & keep
    active = keep & (ended == 0)
    old_length = tl.load(lengths_ptr + base + parent, mask=inside, other=0)
    node = tl.load(nodes_ptr + base + parent, mask=inside, other=0)
    none_left = tl.max(keep.to(tl.int32), 0) == 0
    finished = tl.max(active.to(tl.int32), 0) == 0
    tl.debug_barrier()  # everything of other slots is read: what follows overwrites it
    done = done | finished | last
    write_step(
        request,
        slot,
        live,
        done,
        live * none_left.to(tl.int32),
        keep,
        keep & (frozen == 0),
        token,
        parent,
        tl.load(increments_ptr + here, mask=keep, other=-float("inf")),
        steps,
        flags,
        row_flags_ptr,
        done_ptr,
        flags_ptr,
        steps_ptr,
        history_tokens_ptr,
        history_parents_ptr,
        history_increments_ptr,
        out_tokens_ptr,
        out_parents_ptr,
        out_rows_ptr,
        out_valid_ptr,
        batch,
        beams,
        rows_per_request,
        pad_id,
    )
    open_slot = slot < beams * live
    tl.store(log_probs_ptr + here, tl.where(keep, log_prob, -float("inf")), mask=open_slot)
    tl.store(lengths_ptr + here, tl.where(frozen, old_length, length), mask=open_slot)
    tl.store(ranks_ptr + here, slot, mask=open_slot)
    tl.store(ended_ptr + here, ended, mask=open_slot)
    tl.store(active_ptr + here, active & (done == 0), mask=inside)
    tl.store(scores_ptr + here, tl.load(chosen_scores_ptr + here, mask=keep, other=-float("inf")), mask=open_slot)
    tl.store(nodes_ptr + here, tl.where(frozen, node, child_node(node, token)), mask=open_slot)
    tl.store(sampling_ptr + here, tl.load(chosen_sampling_ptr + here, mask=keep, other=-float("inf")), mask=open_slot)
    tl.store(inclusion_ptr + here, tl.load(chosen_inclusion_ptr + here, mask=keep, other=0.0), mask=open_slot)
    tl.store(codes_ptr + here, tl.load(chosen_codes_ptr + here, mask=inside, other=0), mask=open_slot)


def launch_advance_chosen_(
    choice: list[Tensor],
    row_flags: Tensor,
    eos: Tensor | None,
    slots: list[Tensor],
    draws: list[Tensor],
    requests: list[Tensor],
    history: list[Tensor],
    limits: list[Tensor],
    pad_id: int,
) -> Moves:
    out = fake_moves(choice)
    batch, beams = slots[0].shape
    width, _, max_length, *_ = limits
    _advance_chosen_kernel[(batch,)](
        *choice,
        row_flags,
        row_flags if eos is None else eos,
        *slots,
        *draws,
        *requests,
        *history,
        width,
        max_length,
        *out,
        batch,
        beams,
        row_flags.shape[0] // batch,
        history[0].shape[0],
        pad_id,
        N_EOS=0 if eos is None else eos.shape[0],
        BLOCK_K=triton.next_power_of_2(beams),
        num_warps=8 if beams > 64 else 2,
        enable_fp_fusion=False,
    )
    return out
