"""The best of listed tokens: one program decides one request.

The edges of all parents of a request form one sequence, a prefix sum of their numbers says whose an edge is, and the
sequence is taken in chunks: scratch holds the keys of the k best so far and of one chunk, however many edges there are.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .automaton import edge_allowed
from .best import best, candidate_keys, write_candidates


@triton.jit
def _count_edges(starts_ptr, indptr_ptr, states_ptr, log_probs_ptr, lse_ptr, parents, BLOCK_P: tl.constexpr):
    """Write where each parent's edges start in the request's sequence, ``[P]``, and return how many there are."""
    total = tl.full([], 0, tl.int32)
    for begin in range(0, parents, BLOCK_P):
        parent = begin + tl.arange(0, BLOCK_P)
        inside = parent < parents
        state = tl.load(states_ptr + parent, mask=inside, other=-1)
        log_prob = tl.load(log_probs_ptr + parent, mask=inside, other=-float("inf"))
        expanded = (state >= 0) & (log_prob > -float("inf"))
        expanded = expanded & (tl.abs(tl.load(lse_ptr + parent, mask=inside, other=0.0)) < float("inf"))
        count = tl.load(indptr_ptr + state + 1, mask=expanded, other=0)
        count -= tl.load(indptr_ptr + state, mask=expanded, other=0)
        tl.store(starts_ptr + parent, total + tl.cumsum(count, 0) - count, mask=inside)
        total += tl.sum(count, 0)
    return total


@triton.jit
def _parent_of(starts_ptr, place, parents):
    """The last parent whose edges start at or before a place: parents without edges start where the next one does."""
    low = tl.zeros_like(place)
    high = low + parents
    length = parents
    while length > 1:  # the answer is in [low, high)
        middle = low + (high - low) // 2
        after = tl.load(starts_ptr + tl.minimum(middle, parents - 1)) > place
        low = tl.where(after, low, middle)
        high = tl.where(after, middle, high)
        length = (length + 1) // 2
    return low


@triton.jit
def _select_listed_kernel(
    # inputs
    indptr_ptr,  # *i32 [S + 1]
    tokens_ptr,  # *i32 [E]
    targets_ptr,  # *i32 [E] or unused
    reach_ptr,  # *i32 [S, L]
    states_ptr,  # *i32 [B * P]
    window_ptr,  # *i32 [B * P, L] or unused
    x_ptr,  # *T [B * P, V]
    log_probs_ptr,  # *f32 [B, P]
    lse_ptr,  # *f32 [B * P]
    bits_ptr,  # *i32 [B * P, W] or unused
    temperature_ptr,  # *f32 [B * P] or unused
    divisor_ptr,  # *f32 [B] or unused
    # outputs
    out_log_probs_ptr,  # *f32 [B, k]
    out_parents_ptr,  # *i64 [B, k]
    out_tokens_ptr,  # *i64 [B, k]
    out_adjusted_ptr,  # *f32 [B, k]
    # scratch of a request
    keys_ptr,  # *i64 [B, 2, k + CHUNK]
    places_ptr,  # *i32 [B, P + k]
    # sizes and strides, in elements
    parents,
    k,
    stride_x,
    stride_bits,
    # meta-parameters
    HAS_TARGETS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    LENGTHS: tl.constexpr,  # L
    HAS_BITMASK: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    HAS_DIVISOR: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
):
    request = tl.program_id(0).to(tl.int64)
    row = request * parents  # of the request's first parent
    states_ptr += row
    window_ptr += row * LENGTHS
    log_probs_ptr += row
    lse_ptr += row
    temperature_ptr += row
    x_ptr += row * stride_x
    bits_ptr += row * stride_bits
    first_ptr = keys_ptr + request * 2 * (k + CHUNK)
    second_ptr = first_ptr + k + CHUNK
    starts_ptr = places_ptr + request * (parents + k)
    chosen_ptr = starts_ptr + parents
    divisor = 1.0
    if HAS_DIVISOR:
        divisor = tl.load(divisor_ptr + request)

    total = _count_edges(starts_ptr, indptr_ptr, states_ptr, log_probs_ptr, lse_ptr, parents, BLOCK)
    tl.debug_barrier()
    kept = tl.full([], 0, tl.int32)
    for begin in range(0, total, CHUNK):
        size = tl.minimum(total - begin, CHUNK)
        for start in range(0, size, BLOCK):
            place = start + tl.arange(0, BLOCK)
            inside = place < size
            parent = _parent_of(starts_ptr, begin + place, parents)
            state = tl.load(states_ptr + parent, mask=inside, other=0)
            edge = tl.load(indptr_ptr + state, mask=inside, other=0) + begin + place - tl.load(starts_ptr + parent)
            token = tl.load(tokens_ptr + edge, mask=inside, other=0)
            candidate = inside
            if HAS_WINDOW:
                candidate = edge_allowed(edge, parent, inside, targets_ptr, reach_ptr, window_ptr, HAS_TARGETS, LENGTHS)
            if HAS_BITMASK:
                word = tl.load(bits_ptr + parent.to(tl.int64) * stride_bits + token // 32, mask=candidate, other=0)
                candidate = candidate & (((word >> (token % 32)) & 1) != 0)
            at = parent.to(tl.int64) * stride_x + token
            x = tl.load(x_ptr + at, mask=candidate, other=-float("inf")).to(tl.float32)
            first, second = candidate_keys(
                x, parent, token, inside, log_probs_ptr, lse_ptr, temperature_ptr, divisor, HAS_TEMPERATURE
            )
            tl.store(first_ptr + kept + place, first, mask=inside)
            tl.store(second_ptr + kept + place, second, mask=inside)
        tl.debug_barrier()
        size += kept
        kept = tl.minimum(k, size)
        best(first_ptr, second_ptr, chosen_ptr, size, kept, BLOCK)
        tl.debug_barrier()
        if begin + CHUNK < total:  # to the front, where the next chunk's keys follow
            for start in range(0, kept, BLOCK):
                place = start + tl.arange(0, BLOCK)
                inside = place < kept
                chosen = tl.load(chosen_ptr + place, mask=inside, other=0)  # never before its new place
                first = tl.load(first_ptr + chosen, mask=inside, other=0)
                second = tl.load(second_ptr + chosen, mask=inside, other=0)
                tl.debug_barrier()
                tl.store(first_ptr + place, first, mask=inside)
                tl.store(second_ptr + place, second, mask=inside)
                tl.debug_barrier()
    write_candidates(
        first_ptr,
        second_ptr,
        chosen_ptr,
        kept,
        k,
        request,
        log_probs_ptr,
        lse_ptr,
        out_log_probs_ptr,
        out_parents_ptr,
        out_tokens_ptr,
        out_adjusted_ptr,
        BLOCK_RANK,
    )


def launch_select_listed(
    indptr: Tensor,
    tokens: Tensor,
    targets: Tensor | None,
    reach: Tensor,
    states: Tensor,
    window: Tensor | None,
    logits: Tensor,
    log_probs: Tensor,
    lse: Tensor,
    vocab_size: int,
    k: int,
    bitmask: Tensor | None,
    temperature: Tensor | None,
    divisor: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, parents = log_probs.shape
    out = (
        log_probs.new_empty(batch, k),
        log_probs.new_empty(batch, k, dtype=torch.int64),
        log_probs.new_empty(batch, k, dtype=torch.int64),
        log_probs.new_empty(batch, k),
    )
    if batch == 0:
        return out
    wide = k > 64
    chunk = 4096 if wide else 1024
    keys = log_probs.new_empty(batch, 2, k + chunk, dtype=torch.int64)
    places = log_probs.new_empty(batch, parents + k, dtype=torch.int32)
    _select_listed_kernel[(batch,)](
        indptr,
        tokens,
        tokens if targets is None else targets,
        reach,
        states,
        states if window is None else window,
        logits,
        log_probs,
        lse,
        logits if bitmask is None else bitmask,
        logits if temperature is None else temperature,
        logits if divisor is None else divisor,
        *out,
        keys,
        places,
        parents,
        k,
        logits.stride(0),
        0 if bitmask is None else bitmask.stride(0),
        HAS_TARGETS=targets is not None,
        HAS_WINDOW=window is not None,
        LENGTHS=reach.shape[1],
        HAS_BITMASK=bitmask is not None,
        HAS_TEMPERATURE=temperature is not None,
        HAS_DIVISOR=divisor is not None,
        CHUNK=chunk,
        BLOCK=2048 if wide else 512,
        BLOCK_RANK=64 if wide else 32,
        num_warps=16 if wide else 8,
        enable_fp_fusion=False,
    )
    return out
