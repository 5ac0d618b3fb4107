"""One step's bookkeeping with finished hypotheses in their slots: one program owns one request."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..beamstate import Moves, fake_moves
from .beamstate import rank_candidates, write_endings, write_step
from .keys import pack_key, token_log_prob


@triton.jit
def _advance_in_place_kernel(
    # inputs
    x_ptr,  # *T [B * P, V]
    bits_ptr,  # *i32 [B * P, W] or unused
    temperature_ptr,  # *f32 [B * P] or unused
    eos_ptr,  # *i64 [N_EOS] or unused
    best_log_probs_ptr,  # *f32 [B, K]
    best_parents_ptr,  # *i64 [B, K]
    best_tokens_ptr,  # *i64 [B, K]
    best_adjusted_ptr,  # *f32 [B, K]
    lse_ptr,  # *f32 [B * P]
    row_flags_ptr,  # *i32 [B * P]
    best_scores_ptr,  # *f32 [B, K]
    # Slots, modified
    log_probs_ptr,
    lengths_ptr,
    ranks_ptr,
    ended_ptr,
    active_ptr,
    scores_ptr,
    # Requests, modified
    done_ptr,
    flags_ptr,
    steps_ptr,
    # History, modified
    history_tokens_ptr,
    history_parents_ptr,
    history_increments_ptr,
    # Limits
    width_ptr,
    min_length_ptr,
    max_length_ptr,
    quota_ptr,
    length_norm_ptr,
    bound_norm_ptr,
    penalty_ptr,  # *f32 [B, E] or unused
    given_scores_ptr,  # *f32 [B, E] or unused
    # Moves, the outputs
    out_tokens_ptr,
    out_parents_ptr,
    out_rows_ptr,
    out_valid_ptr,
    # scratch
    keys_ptr,  # *i64 [B, 2, 2 * K + E]
    floats_ptr,  # *f32 [B, 3 * E]
    ranks_scratch_ptr,  # *i32 [B, 2 * K + E]
    chosen_ptr,  # *i32 [B, K], the candidate that has each slot
    # sizes and strides, in elements
    batch,
    beams,
    parents,
    max_steps,
    pad_id,
    stride_x,
    stride_bits,
    # meta-parameters
    HAS_BITMASK: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    HAS_PENALTY: tl.constexpr,
    HAS_SCORES: tl.constexpr,
    N_EOS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    request = tl.program_id(0).to(tl.int64)
    done = tl.load(done_ptr + request).to(tl.int32) != 0
    live = 1 - done.to(tl.int32)
    steps = tl.load(steps_ptr + request)
    flags = tl.load(flags_ptr + request)
    width = tl.load(width_ptr + request)
    length = tl.minimum(steps + 1, max_steps)
    last = tl.load(max_length_ptr + request) == length
    length_norm_ptr += request * (max_steps + 1)
    norm = tl.load(length_norm_ptr + length)
    row = request * parents
    base = request * beams
    n_ends = parents * N_EOS
    size = 2 * beams + n_ends
    first_ptr = keys_ptr + request * 2 * size
    second_ptr = first_ptr + size
    end_log_probs_ptr = floats_ptr + request * 3 * n_ends
    end_scores_ptr = end_log_probs_ptr + n_ends
    end_increments_ptr = end_scores_ptr + n_ends
    all_ranks_ptr = ranks_scratch_ptr + request * size

    # keys of the candidates, side by side: those that go on, the frozen ones, those that end here
    slot = tl.arange(0, BLOCK_K)
    inside = slot < beams
    score = tl.load(best_scores_ptr + base + slot, mask=inside, other=-float("inf"))
    parent = tl.load(best_parents_ptr + base + slot, mask=inside, other=0)
    tl.store(first_ptr + slot, pack_key(tl.div_rn(score, norm), parent), mask=inside)
    adjusted = tl.load(best_adjusted_ptr + base + slot, mask=inside, other=-float("inf"))
    token = tl.load(best_tokens_ptr + base + slot, mask=inside, other=0)
    tl.store(second_ptr + slot, pack_key(adjusted, token), mask=inside)
    ended = inside & (tl.load(ended_ptr + base + slot, mask=inside, other=0).to(tl.int32) != 0)
    frozen = tl.load(scores_ptr + base + slot, mask=ended, other=-float("inf"))
    frozen_norm = tl.load(length_norm_ptr + tl.load(lengths_ptr + base + slot, mask=inside, other=0))
    tl.store(first_ptr + beams + slot, pack_key(tl.div_rn(frozen, frozen_norm), slot), mask=inside)
    tl.store(second_ptr + beams + slot, pack_key(tl.zeros([BLOCK_K], tl.float32), slot * 0), mask=inside)
    if N_EOS > 0:
        write_endings(
            x_ptr + row * stride_x,
            bits_ptr + row * stride_bits,
            temperature_ptr + row,
            eos_ptr,
            lse_ptr + row,
            log_probs_ptr + base,
            scores_ptr + base,
            active_ptr + base,
            penalty_ptr + request * n_ends,
            given_scores_ptr + request * n_ends,
            end_log_probs_ptr,
            end_scores_ptr,
            end_increments_ptr,
            first_ptr + 2 * beams,
            second_ptr + 2 * beams,
            parents,
            stride_x,
            stride_bits,
            live * (tl.load(min_length_ptr + request) <= length).to(tl.int32),
            norm,
            HAS_BITMASK,
            HAS_TEMPERATURE,
            HAS_PENALTY,
            HAS_SCORES,
            N_EOS,
            BLOCK,
        )
    tl.debug_barrier()
    rank_candidates(first_ptr, second_ptr, all_ranks_ptr, size, BLOCK)
    tl.debug_barrier()
    for start in range(0, size, BLOCK):
        place = start + tl.arange(0, BLOCK)
        rank = tl.load(all_ranks_ptr + place, mask=place < size, other=beams)
        tl.store(chosen_ptr + base + rank, place, mask=rank < beams)
    tl.debug_barrier()

    # what the slots will hold
    chosen = tl.load(chosen_ptr + base + slot, mask=inside, other=0)
    goes_on = inside & (chosen < beams)
    was_frozen = inside & (chosen >= beams) & (chosen < 2 * beams)
    ends = inside & (chosen >= 2 * beams)
    old = chosen - beams
    end = chosen - 2 * beams
    best = base + chosen
    parent = tl.load(best_parents_ptr + best, mask=goes_on, other=0)
    adjusted = tl.load(best_adjusted_ptr + best, mask=goes_on, other=-float("inf"))
    increment = token_log_prob(adjusted, tl.load(lse_ptr + row + parent, mask=goes_on, other=0.0))
    log_prob = tl.load(best_log_probs_ptr + best, mask=goes_on, other=-float("inf"))
    token = tl.load(best_tokens_ptr + best, mask=goes_on, other=0)
    lengths = tl.zeros([BLOCK_K], tl.int32) + length
    is_frozen = was_frozen & (tl.load(ended_ptr + base + old, mask=was_frozen, other=0).to(tl.int32) != 0)
    log_prob = tl.where(was_frozen, tl.load(log_probs_ptr + base + old, mask=is_frozen, other=-float("inf")), log_prob)
    lengths = tl.where(was_frozen, tl.load(lengths_ptr + base + old, mask=was_frozen, other=0), lengths)
    parent = tl.where(was_frozen, old, parent)
    token = tl.where(was_frozen, pad_id, token)
    increment = tl.where(was_frozen, 0.0, increment)
    if N_EOS > 0:
        log_prob = tl.where(ends, tl.load(end_log_probs_ptr + end, mask=ends, other=-float("inf")), log_prob)
        increment = tl.where(ends, tl.load(end_increments_ptr + end, mask=ends, other=0.0), increment)
        parent = tl.where(ends, end // N_EOS, parent)
        token = tl.where(ends, tl.load(eos_ptr + end % N_EOS, mask=ends, other=0), token)
    keep = inside & (log_prob > -float("inf")) & (slot < width * live)
    ended = keep & (goes_on == 0)
    active = keep & goes_on
    # a slot whose parent is frozen continues it
    moving = keep & (tl.load(ended_ptr + base + parent, mask=keep, other=0).to(tl.int32) == 0)
    increment = tl.where(keep, increment, -float("inf"))
    none_left = tl.max(keep.to(tl.int32), 0) == 0
    finished = tl.max(active.to(tl.int32), 0) == 0
    tl.debug_barrier()  # everything is read: what follows overwrites it
    done = done | finished | last
    write_step(
        request,
        slot,
        live,
        done,
        live * none_left.to(tl.int32),
        keep,
        moving,
        token,
        parent,
        increment,
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
        parents,
        pad_id,
    )
    tl.store(log_probs_ptr + base + slot, tl.where(keep, log_prob, -float("inf")), mask=slot < beams * live)
    tl.store(lengths_ptr + base + slot, lengths, mask=slot < beams * live)
    tl.store(ranks_ptr + base + slot, slot, mask=slot < beams * live)
    tl.store(ended_ptr + base + slot, ended, mask=slot < beams * live)
    tl.store(active_ptr + base + slot, active & (done == 0), mask=inside)
    # scores last, and what was chosen read anew: held until here, they would spill
    chosen = tl.load(chosen_ptr + base + slot, mask=inside, other=0)
    score = tl.load(best_scores_ptr + base + chosen, mask=active, other=-float("inf"))
    was_frozen = keep & (chosen >= beams) & (chosen < 2 * beams)
    score = tl.where(was_frozen, tl.load(scores_ptr + base + chosen - beams, mask=was_frozen, other=0.0), score)
    if N_EOS > 0:
        ends = keep & (chosen >= 2 * beams)
        score = tl.where(ends, tl.load(end_scores_ptr + chosen - 2 * beams, mask=ends, other=0.0), score)
    tl.debug_barrier()
    tl.store(scores_ptr + base + slot, score, mask=slot < beams * live)


def launch_advance_in_place_(
    logits: Tensor,
    bitmask: Tensor | None,
    temperature: Tensor | None,
    eos: Tensor | None,
    candidates: list[Tensor],
    slots: list[Tensor],
    requests: list[Tensor],
    history: list[Tensor],
    limits: list[Tensor],
    end_penalty: Tensor | None,
    end_scores: Tensor | None,
    pad_id: int,
) -> Moves:
    out = fake_moves(candidates)
    batch, beams = slots[0].shape
    parents = logits.shape[0] // batch
    n_eos = 0 if eos is None else eos.shape[0]
    n_ends = parents * n_eos
    device = logits.device
    keys = torch.empty(batch, 2, 2 * beams + n_ends, dtype=torch.int64, device=device)
    floats = torch.empty(batch, 3 * n_ends, dtype=torch.float32, device=device)
    ranks = torch.empty(batch, 2 * beams + n_ends, dtype=torch.int32, device=device)
    chosen = torch.empty(batch, beams, dtype=torch.int32, device=device)
    wide = beams > 64
    _advance_in_place_kernel[(batch,)](
        logits,
        logits if bitmask is None else bitmask,
        logits if temperature is None else temperature,
        logits if eos is None else eos,
        *candidates,
        *slots,
        *requests,
        *history,
        *limits,
        logits if end_penalty is None else end_penalty,
        logits if end_scores is None else end_scores,
        *out,
        keys,
        floats,
        ranks,
        chosen,
        batch,
        beams,
        parents,
        history[0].shape[0],
        pad_id,
        logits.stride(0),
        0 if bitmask is None else bitmask.stride(0),
        HAS_BITMASK=bitmask is not None,
        HAS_TEMPERATURE=temperature is not None,
        HAS_PENALTY=end_penalty is not None,
        HAS_SCORES=end_scores is not None,
        N_EOS=n_eos,
        BLOCK=64 if wide else 32,
        BLOCK_K=triton.next_power_of_2(beams),
        num_warps=8 if wide else 2,
        enable_fp_fusion=False,
    )
    return out
