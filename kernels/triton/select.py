"""Tiles to groups to elements: one program decides one request.

Each narrowing writes the keys of its candidates to scratch memory and takes the best of them (kernels/triton/best.py).
Scratch is read by other threads of the same program only, behind a barrier.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tiles import GROUP_SIZE, GROUPS, TILE
from .best import best, candidate_keys, write_candidates

_R = tl.constexpr(GROUP_SIZE)
_C = tl.constexpr(GROUPS)
_TILE = tl.constexpr(TILE)


@triton.jit
def _select_kernel(
    # inputs
    x_ptr,  # *T [B * P, V]
    log_probs_ptr,  # *f32 [B, P]
    group_max_ptr,  # *T [B * P, N, 64]
    tile_max_ptr,  # *T [B * P, N]
    lse_ptr,  # *f32 [B * P]
    bits_ptr,  # *i32 [B * P, W] or unused
    temperature_ptr,  # *f32 [B * P] or unused
    exclude_ptr,  # *i64 [N_EXCLUDE] or unused
    divisor_ptr,  # *f32 [B] or unused
    # outputs
    out_log_probs_ptr,  # *f32 [B, k]
    out_parents_ptr,  # *i64 [B, k]
    out_tokens_ptr,  # *i64 [B, k]
    out_adjusted_ptr,  # *f32 [B, k]
    # scratch of a request
    keys_ptr,  # *i64 [B, 2, size]
    places_ptr,  # *i32 [B, 3, most]
    # sizes and strides, in elements
    parents,
    tiles,
    vocab_size,
    k,
    scratch,
    most,
    stride_x,
    stride_bits,
    # meta-parameters
    HAS_BITMASK: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    N_EXCLUDE: tl.constexpr,
    HAS_DIVISOR: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
):
    request = tl.program_id(0).to(tl.int64)
    row = request * parents  # of the request's first parent
    log_probs_ptr += row
    lse_ptr += row
    temperature_ptr += row
    tile_max_ptr += row * tiles
    group_max_ptr += row * tiles * _C
    x_ptr += row * stride_x
    bits_ptr += row * stride_bits
    first_ptr = keys_ptr + request * 2 * scratch
    second_ptr = first_ptr + scratch
    tiles_ptr = places_ptr + request * 3 * most  # the tiles kept
    groups_ptr = tiles_ptr + most  # the groups kept, as positions in the groups of those tiles
    elements_ptr = groups_ptr + most  # the elements kept, as positions in the elements of those groups
    divisor = 1.0
    if HAS_DIVISOR:
        divisor = tl.load(divisor_ptr + request)

    size = parents * tiles
    for start in range(0, size, BLOCK):
        place = start + tl.arange(0, BLOCK)
        inside = place < size
        x = tl.load(tile_max_ptr + place, mask=inside, other=-float("inf")).to(tl.float32)
        first, second = candidate_keys(
            x, place // tiles, place % tiles, inside, log_probs_ptr, lse_ptr, temperature_ptr, divisor, HAS_TEMPERATURE
        )
        tl.store(first_ptr + place, first, mask=inside)
        tl.store(second_ptr + place, second, mask=inside)
    tl.debug_barrier()
    kept = tl.minimum(k, size)
    best(first_ptr, second_ptr, tiles_ptr, size, kept, BLOCK)
    tl.debug_barrier()

    size = kept * _C
    for start in range(0, size, BLOCK):
        place = start + tl.arange(0, BLOCK)
        inside = place < size
        tile = tl.load(tiles_ptr + place // _C, mask=inside, other=0)
        parent = tile // tiles
        group = tile.to(tl.int64) * _C + place % _C
        x = tl.load(group_max_ptr + group, mask=inside, other=-float("inf")).to(tl.float32)
        token = (tile % tiles) * _TILE + place % _C  # the group's lowest
        first, second = candidate_keys(
            x, parent, token, inside, log_probs_ptr, lse_ptr, temperature_ptr, divisor, HAS_TEMPERATURE
        )
        tl.store(first_ptr + place, first, mask=inside)
        tl.store(second_ptr + place, second, mask=inside)
    tl.debug_barrier()
    kept = tl.minimum(k + _C - 1, size)
    best(first_ptr, second_ptr, groups_ptr, size, kept, BLOCK)
    tl.debug_barrier()

    size = kept * _R
    for start in range(0, size, BLOCK):
        place = start + tl.arange(0, BLOCK)
        inside = place < size
        group = tl.load(groups_ptr + place // _R, mask=inside, other=0)
        tile = tl.load(tiles_ptr + group // _C, mask=inside, other=0)
        parent = tile // tiles
        token = (tile % tiles) * _TILE + (place % _R) * _C + group % _C
        candidate = inside & (token < vocab_size)
        if HAS_BITMASK:
            word = tl.load(bits_ptr + parent.to(tl.int64) * stride_bits + token // 32, mask=candidate, other=0)
            candidate = candidate & (((word >> (token % 32)) & 1) != 0)
        for i in tl.static_range(N_EXCLUDE):
            candidate = candidate & (token != tl.load(exclude_ptr + i))
        x = tl.load(x_ptr + parent.to(tl.int64) * stride_x + token, mask=candidate, other=-float("inf")).to(tl.float32)
        first, second = candidate_keys(
            x, parent, token, inside, log_probs_ptr, lse_ptr, temperature_ptr, divisor, HAS_TEMPERATURE
        )
        tl.store(first_ptr + place, first, mask=inside)
        tl.store(second_ptr + place, second, mask=inside)
    tl.debug_barrier()
    kept = tl.minimum(k, size)
    best(first_ptr, second_ptr, elements_ptr, size, kept, BLOCK)
    tl.debug_barrier()

    write_candidates(
        first_ptr,
        second_ptr,
        elements_ptr,
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


def launch_select(
    logits: Tensor,
    log_probs: Tensor,
    group_max: Tensor,
    tile_max: Tensor,
    lse: Tensor,
    vocab_size: int,
    k: int,
    bitmask: Tensor | None,
    temperature: Tensor | None,
    exclude: Tensor | None,
    divisor: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, parents = log_probs.shape
    tiles = tile_max.shape[1]
    out = (
        log_probs.new_empty(batch, k),
        log_probs.new_empty(batch, k, dtype=torch.int64),
        log_probs.new_empty(batch, k, dtype=torch.int64),
        log_probs.new_empty(batch, k),
    )
    if batch == 0:
        return out
    kept_tiles = min(k, parents * tiles)
    kept_groups = min(k + GROUPS - 1, kept_tiles * GROUPS)
    scratch = max(parents * tiles, kept_tiles * GROUPS, kept_groups * GROUP_SIZE)
    keys = torch.empty(batch, 2, scratch, dtype=torch.int64, device=logits.device)
    places = torch.empty(batch, 3, k + GROUPS - 1, dtype=torch.int32, device=logits.device)
    wide = k > 64  # a wide beam has enough candidates to keep sixteen warps busy
    _select_kernel[(batch,)](
        logits,
        log_probs,
        group_max,
        tile_max,
        lse,
        logits if bitmask is None else bitmask,
        logits if temperature is None else temperature,
        logits if exclude is None else exclude,
        logits if divisor is None else divisor,
        *out,
        keys,
        places,
        parents,
        tiles,
        vocab_size,
        k,
        scratch,
        k + GROUPS - 1,
        logits.stride(0),
        0 if bitmask is None else bitmask.stride(0),
        HAS_BITMASK=bitmask is not None,
        HAS_TEMPERATURE=temperature is not None,
        N_EXCLUDE=0 if exclude is None else exclude.shape[0],
        HAS_DIVISOR=divisor is not None,
        BLOCK=4096 if wide else 512,
        BLOCK_RANK=64 if wide else 32,
        num_warps=16 if wide else 2,
        enable_fp_fusion=False,
    )
    return out
