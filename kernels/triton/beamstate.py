"""EOS candidates, the order of all candidates and the record of a step: jit side of ``flashbeam.kernels.beamstate``."""

import triton
import triton.language as tl

from ..beamstate import FLAG_DEAD_END, FLAG_INEXACT
from ..lse import FLAG_INF, FLAG_NAN
from .keys import pack_key, token_log_prob

_NAN = tl.constexpr(FLAG_NAN)
_INF = tl.constexpr(FLAG_INF)
_DEAD_END = tl.constexpr(FLAG_DEAD_END)
_INEXACT = tl.constexpr(FLAG_INEXACT)


@triton.jit
def write_endings(
    # inputs, of the request
    x_ptr,
    bits_ptr,
    temperature_ptr,
    eos_ptr,
    lse_ptr,
    slot_log_probs_ptr,
    slot_scores_ptr,
    active_ptr,
    penalty_ptr,  # *f32 [E] or unused
    given_scores_ptr,  # *f32 [E] or unused
    # outputs, of the request
    log_probs_ptr,  # *f32 [E]
    scores_ptr,  # *f32 [E]
    increments_ptr,  # *f32 [E]
    first_ptr,  # *i64 [E]
    second_ptr,  # *i64 [E]
    # sizes and strides, in elements
    parents,
    stride_x,
    stride_bits,
    may_end,  # 0 or 1
    divisor,
    # meta-parameters
    HAS_BITMASK: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    HAS_PENALTY: tl.constexpr,
    HAS_SCORES: tl.constexpr,
    N_EOS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Log-probabilities, scores and keys of ``E = parents * N_EOS`` candidates."""
    for start in range(0, parents * N_EOS, BLOCK):
        place = start + tl.arange(0, BLOCK)
        inside = place < parents * N_EOS
        parent = place // N_EOS
        token = tl.load(eos_ptr + place % N_EOS)
        open_slot = tl.load(active_ptr + parent, mask=inside, other=0).to(tl.int32) * may_end != 0
        # slots that are not active hold rows that no one may read
        adjusted = tl.load(x_ptr + parent.to(tl.int64) * stride_x + token, mask=inside, other=-float("inf")).to(
            tl.float32
        )
        if HAS_TEMPERATURE:
            adjusted = tl.div_rn(adjusted, tl.load(temperature_ptr + parent, mask=inside, other=1.0))
        adjusted = tl.where(adjusted == adjusted, adjusted, -float("inf"))  # NaN counts as -inf
        if HAS_BITMASK:
            word = tl.load(bits_ptr + parent.to(tl.int64) * stride_bits + token // 32, mask=inside, other=0)
            adjusted = tl.where(((word >> (token % 32).to(tl.int32)) & 1) != 0, adjusted, -float("inf"))
        increment = token_log_prob(adjusted, tl.load(lse_ptr + parent, mask=inside, other=0.0))
        log_prob = tl.load(slot_log_probs_ptr + parent, mask=open_slot, other=-float("inf")) + increment
        score = tl.load(slot_scores_ptr + parent, mask=open_slot, other=-float("inf")) + increment
        if HAS_SCORES:
            given = tl.load(given_scores_ptr + place, mask=inside, other=-float("inf"))
            score = tl.where(log_prob > -float("inf"), given, -float("inf"))
            log_prob = tl.where(given == -float("inf"), -float("inf"), log_prob)
        if HAS_PENALTY:
            penalty = tl.load(penalty_ptr + place, mask=inside, other=0.0)
            score = score - penalty
            log_prob = tl.where(penalty == float("inf"), -float("inf"), log_prob)
        tl.store(log_probs_ptr + place, log_prob, mask=inside)
        tl.store(scores_ptr + place, score, mask=inside)
        tl.store(increments_ptr + place, increment, mask=inside)
        tl.store(first_ptr + place, pack_key(tl.div_rn(score, divisor), parent), mask=inside)
        tl.store(second_ptr + place, pack_key(adjusted, token), mask=inside)


@triton.jit
def rank_candidates(first_ptr, second_ptr, ranks_ptr, size, BLOCK: tl.constexpr):
    """Write the place of each of ``size`` candidates in the order of their keys; equal keys keep their order."""
    for start in range(0, size, BLOCK):
        place = start + tl.arange(0, BLOCK)
        inside = place < size
        first = tl.load(first_ptr + place, mask=inside, other=0)[:, None]
        second = tl.load(second_ptr + place, mask=inside, other=0)[:, None]
        rank = tl.zeros([BLOCK], tl.int32)
        for other_start in range(0, size, BLOCK):
            other_place = other_start + tl.arange(0, BLOCK)
            other_inside = other_place < size
            other_first = tl.load(first_ptr + other_place, mask=other_inside, other=0)[None, :]
            other_second = tl.load(second_ptr + other_place, mask=other_inside, other=0)[None, :]
            same = other_first == first
            earlier = other_place[None, :] < place[:, None]
            before = (other_first > first) | (same & ((other_second > second) | ((other_second == second) & earlier)))
            rank += tl.sum((before & other_inside[None, :]).to(tl.int32), 1)
        tl.store(ranks_ptr + place, rank, mask=inside)


@triton.jit
def write_step(
    # the step, a value per slot or per request
    request,
    slot,
    live,  # 0 or 1
    done,
    dead_end,
    keep,
    moving,
    tokens,
    parents,
    increments,
    steps,
    flags,
    # state of all requests
    row_flags_ptr,
    done_ptr,
    flags_ptr,
    steps_ptr,
    history_tokens_ptr,
    history_parents_ptr,
    history_increments_ptr,
    # outputs
    out_tokens_ptr,
    out_parents_ptr,
    out_rows_ptr,
    out_valid_ptr,
    # sizes
    batch,
    beams,
    rows_per_request,
    pad_id,
):
    """Record a step, report its faults, and write the moves. Whatever it overwrites has been read behind a barrier."""
    inside = slot < beams
    row_flags = tl.load(row_flags_ptr + request * rows_per_request + slot, mask=slot < rows_per_request, other=0)
    flags = flags | tl.max(row_flags & _NAN, 0) | tl.max(row_flags & _INF, 0) | tl.max(row_flags & _INEXACT, 0)
    flags = flags | (dead_end * _DEAD_END)
    tl.store(flags_ptr + request, flags)
    tl.store(done_ptr + request, done)
    tl.store(steps_ptr + request, steps + live)
    recorded = slot < beams * live
    place = (steps.to(tl.int64) * batch + request) * beams + slot
    tl.store(history_tokens_ptr + place, tokens.to(tl.int32), mask=recorded)
    tl.store(history_parents_ptr + place, parents.to(tl.int32), mask=recorded)
    tl.store(history_increments_ptr + place, increments, mask=recorded)
    out = request * beams + slot
    tl.store(out_tokens_ptr + out, tl.where(keep, tokens, pad_id), mask=inside)
    tl.store(out_parents_ptr + out, tl.where(keep, parents, slot), mask=inside)
    source = tl.where(moving, parents, tl.minimum(slot, rows_per_request - 1))
    tl.store(out_rows_ptr + out, request * rows_per_request + source, mask=inside)
    tl.store(out_valid_ptr + out, keep, mask=inside)
