"""One step's bookkeeping with a pool: one program owns one request."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..beamstate import Moves, fake_moves
from .beamstate import rank_candidates, write_endings, write_step
from .keys import pack_key, token_log_prob
from .pool import collect

_LOWEST = tl.constexpr(torch.finfo(torch.float32).min)


@triton.jit
def _advance_pool_kernel(
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
    # Pool, modified
    pool_scores_ptr,
    pool_log_probs_ptr,
    pool_increments_ptr,
    pool_tokens_ptr,
    pool_parents_ptr,
    pool_steps_ptr,
    pool_ranks_ptr,
    # Limits
    width_ptr,
    min_length_ptr,
    max_length_ptr,
    quota_ptr,
    length_norm_ptr,
    bound_norm_ptr,
    bound_ptr,  # *f32 [B], modified
    penalty_ptr,  # *f32 [B, E] or unused
    given_scores_ptr,  # *f32 [B, E] or unused
    best_possible_ptr,  # *f32 [B] or unused
    # Moves, the outputs
    out_tokens_ptr,
    out_parents_ptr,
    out_rows_ptr,
    out_valid_ptr,
    # scratch
    keys_ptr,  # *i64 [B, 2, K + E]
    floats_ptr,  # *f32 [B, 3 * E + K]
    ints_ptr,  # *i32 [B, 4 * K + E + F]
    # sizes and strides, in elements
    batch,
    beams,
    parents,
    places,
    max_steps,
    pad_id,
    stride_x,
    stride_bits,
    # meta-parameters
    HAS_BITMASK: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    HAS_PENALTY: tl.constexpr,
    HAS_SCORES: tl.constexpr,
    HAS_POSSIBLE: tl.constexpr,
    N_EOS: tl.constexpr,
    DECIDED: tl.constexpr,
    BY_ARRIVAL: tl.constexpr,
    OVERFLOW: tl.constexpr,
    BEST_LIVE: tl.constexpr,
    EXACT: tl.constexpr,
    SHRINKS: tl.constexpr,
    AWAITS_BEST: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    request = tl.program_id(0).to(tl.int64)
    done = tl.load(done_ptr + request).to(tl.int32) != 0
    live = 1 - done.to(tl.int32)
    steps = tl.load(steps_ptr + request)
    flags = tl.load(flags_ptr + request)
    width = tl.load(width_ptr + request)
    quota = tl.load(quota_ptr + request)
    length = tl.minimum(steps + 1, max_steps)
    last = tl.load(max_length_ptr + request) == length
    table = request * (max_steps + 1) + length

    slot = tl.arange(0, BLOCK_K)
    inside = slot < beams
    own = request * beams + slot
    log_prob = tl.load(best_log_probs_ptr + own, mask=inside, other=-float("inf"))
    score = tl.load(best_scores_ptr + own, mask=inside, other=-float("inf"))
    parent = tl.load(best_parents_ptr + own, mask=inside, other=0)
    token = tl.load(best_tokens_ptr + own, mask=inside, other=0)
    adjusted = tl.load(best_adjusted_ptr + own, mask=inside, other=-float("inf"))
    row = request * parents
    increment = token_log_prob(adjusted, tl.load(lse_ptr + row + parent, mask=inside, other=0.0))
    lengths = tl.load(lengths_ptr + own, mask=inside, other=0)
    pool = request * places
    pool_place = tl.arange(0, BLOCK_F)
    room = width
    if SHRINKS:
        before = tl.load(pool_log_probs_ptr + pool + pool_place, mask=pool_place < places, other=-float("inf"))
        room = width - tl.sum((before > -float("inf")).to(tl.int32), 0)
    left_out = tl.full([], -float("inf"), tl.float32)
    best_ended = tl.full([], 0, tl.int32)
    rank = slot
    if N_EOS > 0:
        n_ends = parents * N_EOS
        first_ptr = keys_ptr + request * 2 * (beams + n_ends)
        second_ptr = first_ptr + beams + n_ends
        end_log_probs_ptr = floats_ptr + request * (3 * n_ends + beams)
        end_scores_ptr = end_log_probs_ptr + n_ends
        end_increments_ptr = end_scores_ptr + n_ends
        all_ranks_ptr = ints_ptr + request * (4 * beams + n_ends + places)
        by_rank_ptr = all_ranks_ptr + beams + n_ends
        tl.store(first_ptr + slot, pack_key(score, parent), mask=inside)
        tl.store(second_ptr + slot, pack_key(adjusted, token), mask=inside)
        write_endings(
            x_ptr + row * stride_x,
            bits_ptr + row * stride_bits,
            temperature_ptr + row,
            eos_ptr,
            lse_ptr + row,
            log_probs_ptr + request * beams,
            scores_ptr + request * beams,
            active_ptr + request * beams,
            penalty_ptr + request * n_ends,
            given_scores_ptr + request * n_ends,
            end_log_probs_ptr,
            end_scores_ptr,
            end_increments_ptr,
            first_ptr + beams,
            second_ptr + beams,
            parents,
            stride_x,
            stride_bits,
            live * (tl.load(min_length_ptr + request) <= length).to(tl.int32),
            1.0,
            HAS_BITMASK,
            HAS_TEMPERATURE,
            HAS_PENALTY,
            HAS_SCORES,
            N_EOS,
            BLOCK,
        )
        tl.debug_barrier()
        # where every EOS candidate is behind the K best others, there is nothing to rank
        foremost = tl.full([], -float("inf"), tl.float32)
        for start in range(0, n_ends, BLOCK):
            place = start + tl.arange(0, BLOCK)
            ends = tl.load(end_scores_ptr + place, mask=place < n_ends, other=-float("inf"))
            foremost = tl.maximum(foremost, tl.max(ends, 0))
        least = _LOWEST if DECIDED else tl.load(best_scores_ptr + request * beams + width - 1)
        if foremost >= least:
            rank_candidates(first_ptr, second_ptr, all_ranks_ptr, beams + n_ends, BLOCK)
            none = tl.full([BLOCK_K], -1, tl.int32)
            tl.store(by_rank_ptr + slot, none, mask=inside)
            if DECIDED:
                tl.store(by_rank_ptr + beams + slot, none, mask=inside)
            tl.debug_barrier()
            rank = tl.load(all_ranks_ptr + slot, mask=inside, other=0)
            for start in range(0, n_ends, BLOCK):
                place = start + tl.arange(0, BLOCK)
                end_rank = tl.load(all_ranks_ptr + beams + place, mask=place < n_ends, other=0)
                end_log_prob = tl.load(end_log_probs_ptr + place, mask=place < n_ends, other=-float("inf"))
                # those that the selection lets finish are behind K others and themselves at most
                reach = 2 * beams if DECIDED else room
                finish = (end_rank < reach) & (end_log_prob > -float("inf"))
                tl.store(by_rank_ptr + end_rank, place, mask=finish)
            tl.debug_barrier()
            new_ranks = slot
            if DECIDED:  # close up
                any_rank = tl.arange(0, 2 * BLOCK_K)
                entry = tl.load(by_rank_ptr + any_rank, mask=any_rank < 2 * beams, other=-1)
                to = tl.cumsum((entry >= 0).to(tl.int32), 0) - 1
                tl.debug_barrier()
                tl.store(by_rank_ptr + slot, none, mask=inside)
                tl.debug_barrier()
                tl.store(by_rank_ptr + to, entry, mask=(entry >= 0) & (to < beams))
                tl.store(by_rank_ptr + beams + to, any_rank, mask=(entry >= 0) & (to < beams))
                tl.debug_barrier()
                new_ranks = tl.load(by_rank_ptr + beams + slot, mask=inside, other=0)
            new = tl.load(by_rank_ptr + slot, mask=inside, other=-1)
            best_ended = tl.max(((new >= 0) & (new_ranks == 0)).to(tl.int32), 0)
            if tl.max(new, 0) >= 0:
                left_out = collect(
                    new,
                    new_ranks,
                    end_log_probs_ptr,
                    end_scores_ptr,
                    end_increments_ptr,
                    end_increments_ptr + n_ends,
                    by_rank_ptr + 2 * beams,
                    by_rank_ptr + 2 * beams + places,
                    eos_ptr,
                    pool_scores_ptr + pool,
                    pool_log_probs_ptr + pool,
                    pool_increments_ptr + pool,
                    pool_tokens_ptr + pool,
                    pool_parents_ptr + pool,
                    pool_steps_ptr + pool,
                    pool_ranks_ptr + pool,
                    places,
                    beams,
                    width,
                    quota,
                    last,
                    steps,
                    tl.load(length_norm_ptr + table),
                    N_EOS,
                    BY_ARRIVAL,
                    OVERFLOW,
                    BLOCK,
                    BLOCK_K,
                    BLOCK_F,
                )

    keep = (log_prob > -float("inf")) & (slot < width * live)
    in_pool = tl.load(pool_log_probs_ptr + pool + pool_place, mask=pool_place < places, other=-float("inf"))
    held = tl.sum((in_pool > -float("inf")).to(tl.int32), 0)
    if not DECIDED:  # at the last step, only what is among the K best candidates is a hypothesis
        keep = keep & (rank < (room if SHRINKS else tl.where(last, width, rank + 1)))
    elif SHRINKS:
        keep = keep & (slot < width - held)
    foremost_score = tl.load(best_scores_ptr + request * beams)
    as_it_is = tl.div_rn(foremost_score, tl.load(length_norm_ptr + table))
    possible = tl.div_rn(foremost_score, tl.load(bound_norm_ptr + table))
    if HAS_POSSIBLE:
        possible = tl.load(best_possible_ptr + request)
    stop = held >= quota
    if AWAITS_BEST:
        at_end = tl.load(pool_ranks_ptr + pool + pool_place, mask=in_pool > -float("inf"), other=1)
        stop = stop & ((tl.min(at_end, 0) == 0) | (best_ended != 0))
    if BEST_LIVE or EXACT:
        worst = tl.load(pool_scores_ptr + pool + width - 1)
        stop = stop | ((held >= width) & (worst >= (possible if EXACT else as_it_is)))
    none_left = tl.max(keep.to(tl.int32), 0) == 0
    bound = tl.maximum(tl.where(last | none_left, -float("inf"), possible), left_out)
    tl.store(bound_ptr + request, bound, mask=live != 0)
    increment = tl.where(keep, increment, -float("inf"))  # recorded also where the rule now ends the request
    keep = keep & (slot < tl.where(stop & (last == 0), 0, beams))
    none_left = tl.max(keep.to(tl.int32), 0) == 0
    tl.debug_barrier()  # everything is read: what follows overwrites it
    done = done | stop | last | none_left
    write_step(
        request,
        slot,
        live,
        done,
        live * (none_left & (held == 0)).to(tl.int32),
        keep,
        keep,
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
    tl.store(log_probs_ptr + own, tl.where(keep, log_prob, -float("inf")), mask=slot < beams * live)
    tl.store(scores_ptr + own, tl.where(keep, score, -float("inf")), mask=slot < beams * live)
    tl.store(lengths_ptr + own, lengths + 1, mask=slot < beams * live)
    tl.store(ranks_ptr + own, tl.where(keep, rank, 0), mask=slot < beams * live)
    tl.store(active_ptr + own, keep & (done == 0), mask=inside)


def launch_advance_pool_(
    logits: Tensor,
    bitmask: Tensor | None,
    temperature: Tensor | None,
    eos: Tensor | None,
    candidates: list[Tensor],
    slots: list[Tensor],
    requests: list[Tensor],
    history: list[Tensor],
    pool: list[Tensor],
    limits: list[Tensor],
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
    out = fake_moves(candidates)
    batch, beams = slots[0].shape
    parents = logits.shape[0] // batch
    places = pool[0].shape[1]
    n_eos = 0 if eos is None else eos.shape[0]
    n_ends = parents * n_eos
    device = logits.device
    keys = torch.empty(batch, 2, beams + n_ends, dtype=torch.int64, device=device)
    floats = torch.empty(batch, 3 * n_ends + beams, dtype=torch.float32, device=device)
    ints = torch.empty(batch, 4 * beams + n_ends + places, dtype=torch.int32, device=device)
    wide = beams > 16
    _advance_pool_kernel[(batch,)](
        logits,
        logits if bitmask is None else bitmask,
        logits if temperature is None else temperature,
        logits if eos is None else eos,
        *candidates,
        *slots,
        *requests,
        *history,
        *pool,
        *limits,
        bound,
        logits if end_penalty is None else end_penalty,
        logits if end_scores is None else end_scores,
        logits if best_possible is None else best_possible,
        *out,
        keys,
        floats,
        ints,
        batch,
        beams,
        parents,
        places,
        history[0].shape[0],
        pad_id,
        logits.stride(0),
        0 if bitmask is None else bitmask.stride(0),
        HAS_BITMASK=bitmask is not None,
        HAS_TEMPERATURE=temperature is not None,
        HAS_PENALTY=end_penalty is not None,
        HAS_SCORES=end_scores is not None,
        HAS_POSSIBLE=best_possible is not None,
        N_EOS=n_eos,
        DECIDED=decided,
        BY_ARRIVAL=by_arrival,
        OVERFLOW=overflow,
        BEST_LIVE=best_live,
        EXACT=exact,
        SHRINKS=shrinks,
        AWAITS_BEST=awaits_best,
        BLOCK=32 if wide else 16,
        BLOCK_K=triton.next_power_of_2(beams),
        BLOCK_F=triton.next_power_of_2(places),
        num_warps=8 if wide else 2,
        enable_fp_fusion=False,
    )
    return out
