"""The best of a request's candidates by their two keys, found and put in order by one program.

The key of the last one to keep is found by radix selection: eight bits at a time, as many digits as it takes to tell
the candidates apart. Keys lie in scratch memory that other threads of the same program have written, behind a barrier.
"""

import triton
import triton.language as tl

from .keys import key_index, key_value, pack_key, token_log_prob


@triton.jit
def candidate_keys(
    x, parent, token, inside, log_probs_ptr, lse_ptr, temperature_ptr, divisor, HAS_TEMPERATURE: tl.constexpr
):
    """The two keys of candidates with logits ``x``; pointers are the request's."""
    adjusted = x
    if HAS_TEMPERATURE:
        adjusted = tl.div_rn(x, tl.load(temperature_ptr + parent, mask=inside, other=1.0))
    adjusted = tl.where(adjusted == adjusted, adjusted, -float("inf"))  # NaN counts as -inf
    lse = tl.load(lse_ptr + parent, mask=inside, other=0.0)
    log_prob = tl.load(log_probs_ptr + parent, mask=inside, other=-float("inf")) + token_log_prob(adjusted, lse)
    return pack_key(tl.div_rn(log_prob, divisor), parent), pack_key(adjusted, token)


@triton.jit
def _threshold(key_ptr, tie_ptr, tie_key, size, need, TIED: tl.constexpr, BLOCK: tl.constexpr):
    """Prefix (and its mask) of the ``need``-th greatest key, as long as it takes to tell that key from the next.

    Returns (mask, prefix, how many of the keys with that prefix are needed, whether that is all of them).
    """
    mask = tl.full([], 0, tl.int64)
    prefix = tl.full([], 0, tl.int64)
    settled = tl.full([], 0, tl.int32)
    shift = tl.full([], 56, tl.int64)
    bins = tl.arange(0, 512)  # 256 digits, and a bin for what does not match
    for _ in range(8):
        if settled == 0:
            flip = tl.where(shift == 56, 128, 0)  # the sign bit counts downwards
            histogram = tl.zeros([512], tl.int32)
            for start in range(0, size, BLOCK):
                place = start + tl.arange(0, BLOCK)
                inside = place < size
                key = tl.load(key_ptr + place, mask=inside, other=0)
                match = inside & ((key & mask) == prefix)
                if TIED:
                    match = match & (tl.load(tie_ptr + place, mask=inside, other=0) == tie_key)
                digit = ((key >> shift) & 255).to(tl.int32) ^ flip
                histogram += tl.histogram(tl.where(match, digit, 256), 512)
            histogram = tl.where(bins < 256, histogram, 0)
            digit = tl.sum((tl.cumsum(histogram, 0, reverse=True) >= need).to(tl.int32), 0) - 1
            need -= tl.sum(tl.where(bins > digit, histogram, 0), 0)
            settled = (tl.sum(tl.where(bins == digit, histogram, 0), 0) == need).to(tl.int32)
            prefix = prefix | ((digit ^ flip).to(tl.int64) << shift)
            mask = mask | (tl.full([], 255, tl.int64) << shift)
            shift -= 8
    return mask, prefix, need, settled


@triton.jit
def best(first_ptr, second_ptr, out_ptr, size, n, BLOCK: tl.constexpr):
    """Write the positions, ascending, of the ``n`` greatest of ``size`` pairs of keys; pairs are distinct."""
    mask_first = tl.full([], 0, tl.int64)
    prefix_first = tl.full([], 0, tl.int64)
    mask_second = tl.full([], 0, tl.int64)
    prefix_second = tl.full([], 0, tl.int64)
    if n < size:
        mask_first, prefix_first, need, settled = _threshold(first_ptr, first_ptr, mask_first, size, n, False, BLOCK)
        if settled == 0:
            mask_second, prefix_second, _, _ = _threshold(second_ptr, first_ptr, prefix_first, size, need, True, BLOCK)
    base = tl.full([], 0, tl.int32)
    for start in range(0, size, BLOCK):
        place = start + tl.arange(0, BLOCK)
        inside = place < size
        first = tl.load(first_ptr + place, mask=inside, other=0) & mask_first
        second = tl.load(second_ptr + place, mask=inside, other=0) & mask_second
        chosen = (first > prefix_first) | ((first == prefix_first) & (second >= prefix_second))
        chosen = (chosen & inside).to(tl.int32)
        tl.store(out_ptr + base + tl.cumsum(chosen, 0) - 1, place, mask=chosen != 0)
        base += tl.sum(chosen, 0)


@triton.jit
def write_candidates(
    first_ptr,  # keys
    second_ptr,
    chosen_ptr,  # *i32 [kept], positions of the candidates among the keys
    kept,
    k,
    request,
    log_probs_ptr,  # of the request's parents
    lse_ptr,
    out_log_probs_ptr,  # *f32 [B, k]
    out_parents_ptr,  # *i64 [B, k]
    out_tokens_ptr,  # *i64 [B, k]
    out_adjusted_ptr,  # *f32 [B, k]
    BLOCK_RANK: tl.constexpr,
):
    """Write the chosen candidates of a request in order, and what says that there is none to the other places."""
    # the place of an element in the order is the number of elements before it
    for start in range(0, k, BLOCK_RANK):
        place = start + tl.arange(0, BLOCK_RANK)
        inside = place < kept
        element = tl.load(chosen_ptr + place, mask=inside, other=0)
        first = tl.load(first_ptr + element, mask=inside, other=0)
        second = tl.load(second_ptr + element, mask=inside, other=0)
        rank = tl.zeros([BLOCK_RANK], tl.int32)
        for other_start in range(0, kept, BLOCK_RANK):
            other_place = other_start + tl.arange(0, BLOCK_RANK)
            other_inside = other_place < kept
            other = tl.load(chosen_ptr + other_place, mask=other_inside, other=0)
            other_first = tl.load(first_ptr + other, mask=other_inside, other=0)[None, :]
            other_second = tl.load(second_ptr + other, mask=other_inside, other=0)[None, :]
            before = (other_first > first[:, None]) | (
                (other_first == first[:, None]) & (other_second > second[:, None])
            )
            rank += tl.sum((before & other_inside[None, :]).to(tl.int32), 1)
        rank = tl.where(inside, rank, place)  # places beyond the candidates stay where they are
        parent = tl.where(inside, key_index(first), 0)
        adjusted = tl.where(inside, key_value(second), -float("inf"))
        lse = tl.load(lse_ptr + parent)
        log_prob = tl.load(log_probs_ptr + parent) + token_log_prob(adjusted, lse)
        valid = log_prob > -float("inf")
        out = request * k + rank
        inside = place < k
        tl.store(out_log_probs_ptr + out, log_prob, mask=inside)
        tl.store(out_parents_ptr + out, tl.where(valid, parent, 0), mask=inside)
        tl.store(out_tokens_ptr + out, tl.where(valid, key_index(second), 0), mask=inside)
        tl.store(out_adjusted_ptr + out, tl.where(valid, adjusted, -float("inf")), mask=inside)
