"""The pool of finished hypotheses: new ones are merged into it by the program that owns their request.

The pool is in order of score, best first, or of arrival. Nothing is sorted: where each hypothesis goes is counted, and
those that are there move down to make room.
"""

import triton
import triton.language as tl


@triton.jit
def count_before(
    scores_ptr, counts_ptr, size, others_ptr, n_others, STABLE: tl.constexpr, ADD: tl.constexpr, BLOCK: tl.constexpr
):
    """Count, for each of ``size`` scores, the other scores that go before it.

    Those are the greater ones and, if ``STABLE``, equal ones at an earlier place; if ``ADD``, all equal ones, and the
    count is added to what is there.
    """
    for start in range(0, size, BLOCK):
        place = start + tl.arange(0, BLOCK)
        inside = place < size
        score = tl.load(scores_ptr + place, mask=inside, other=0.0)[:, None]
        count = tl.zeros([BLOCK], tl.int32)
        for other_start in range(0, n_others, BLOCK):
            other_place = other_start + tl.arange(0, BLOCK)
            other = tl.load(others_ptr + other_place, mask=other_place < n_others, other=-float("inf"))[None, :]
            before = other > score
            if STABLE:
                before = before | ((other == score) & (other_place[None, :] < place[:, None]))
            if ADD:
                before = before | (other == score)
            count += tl.sum(before.to(tl.int32), 1)
        if ADD:
            count += tl.load(counts_ptr + place, mask=inside, other=0)
        tl.store(counts_ptr + place, count, mask=inside)


@triton.jit
def collect(
    # the request's new hypotheses, in order of rank within the step
    new,  # i32 [BLOCK_K], place among the EOS candidates; -1 for none
    ranks,  # i32 [BLOCK_K], theirs
    end_log_probs_ptr,
    end_scores_ptr,
    end_increments_ptr,
    new_scores_ptr,  # *f32 [K], scratch
    shift_ptr,  # *i32 [F], scratch
    to_ptr,  # *i32 [K], scratch
    eos_ptr,
    # the request's pool
    scores_ptr,
    log_probs_ptr,
    increments_ptr,
    tokens_ptr,
    parents_ptr,
    steps_ptr,
    ranks_ptr,
    # values of the request
    places,
    beams,
    width,
    quota,
    last,
    steps,
    norm,
    # meta-parameters
    N_EOS: tl.constexpr,
    BY_ARRIVAL: tl.constexpr,
    OVERFLOW: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """Merge new hypotheses into the pool: see ``_collect`` of the torch definition. Returns what it returns."""
    slot = tl.arange(0, BLOCK_K)
    fresh = new >= 0
    place = tl.arange(0, BLOCK_F)
    inside = place < places
    new_log_probs = tl.load(end_log_probs_ptr + new, mask=fresh, other=-float("inf"))
    new_scores = tl.div_rn(tl.load(end_scores_ptr + new, mask=fresh, other=-float("inf")), norm)
    scores = tl.load(scores_ptr + place, mask=inside, other=-float("inf"))
    log_probs = tl.load(log_probs_ptr + place, mask=inside, other=-float("inf"))
    held = log_probs > -float("inf")
    n_held = tl.sum(held.to(tl.int32), 0)
    left_out = fresh & (slot < 0)
    if BY_ARRIVAL:
        if OVERFLOW != "step":
            left_out = fresh & (n_held + tl.cumsum(fresh.to(tl.int32), 0) > quota)
            if OVERFLOW == "last":
                left_out = left_out & (slot < tl.where(last, 0, beams))
        fresh = fresh & ~left_out
        to = n_held + tl.cumsum(fresh.to(tl.int32), 0) - 1
        fresh = fresh & (to < places)
    else:
        increments = tl.load(increments_ptr + place, mask=held, other=0.0)
        tokens = tl.load(tokens_ptr + place, mask=held, other=0)
        parents = tl.load(parents_ptr + place, mask=held, other=0)
        ends = tl.load(steps_ptr + place, mask=held, other=0)
        held_ranks = tl.load(ranks_ptr + place, mask=held, other=0)
        tl.store(new_scores_ptr + slot, new_scores, mask=slot < beams)
        tl.debug_barrier()
        # the pool is in order of score, and what was there before goes first among equals
        count_before(scores_ptr, shift_ptr, places, new_scores_ptr, beams, False, False, BLOCK)
        count_before(new_scores_ptr, to_ptr, beams, new_scores_ptr, beams, True, False, BLOCK)
        tl.debug_barrier()
        count_before(new_scores_ptr, to_ptr, beams, scores_ptr, places, False, True, BLOCK)
        tl.debug_barrier()
        shifted = place + tl.load(shift_ptr + place, mask=inside, other=0)
        to = tl.load(to_ptr + slot, mask=slot < beams, other=0)
        stays = held & (shifted < width)
        tl.store(scores_ptr + shifted, scores, mask=stays)
        tl.store(log_probs_ptr + shifted, log_probs, mask=stays)
        tl.store(increments_ptr + shifted, increments, mask=stays)
        tl.store(tokens_ptr + shifted, tokens, mask=stays)
        tl.store(parents_ptr + shifted, parents, mask=stays)
        tl.store(steps_ptr + shifted, ends, mask=stays)
        tl.store(ranks_ptr + shifted, held_ranks, mask=stays)
        fresh = fresh & (to < width)
    tl.store(scores_ptr + to, new_scores, mask=fresh)
    tl.store(log_probs_ptr + to, new_log_probs, mask=fresh)
    tl.store(increments_ptr + to, tl.load(end_increments_ptr + new, mask=fresh, other=0.0), mask=fresh)
    tl.store(tokens_ptr + to, tl.load(eos_ptr + new % N_EOS, mask=fresh, other=0).to(tl.int32), mask=fresh)
    tl.store(parents_ptr + to, new // N_EOS, mask=fresh)
    tl.store(steps_ptr + to, tl.zeros([BLOCK_K], tl.int32) + steps, mask=fresh)
    tl.store(ranks_ptr + to, ranks, mask=fresh)
    tl.debug_barrier()
    return tl.max(tl.where(left_out, new_scores, -float("inf")), 0)
