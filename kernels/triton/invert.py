"""Inverting the cumulative distribution: one program makes one draw, and keeps the tile it lands in in registers."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..invert import LOWEST
from ..tiles import GROUP_SIZE, GROUPS, TILE
from .summary import _allowed, as_float, finite

_BLOCK_N = 1024  # tiles at a time
_R = tl.constexpr(GROUP_SIZE)
_C = tl.constexpr(GROUPS)
_TILE = tl.constexpr(TILE)
_LOWEST = tl.constexpr(LOWEST)
_ONE = tl.constexpr(2.0**32)
_WORD = tl.constexpr(0xFFFFFFFF)


@triton.jit
def masses(x, reference, temperature, HAS_TEMPERATURE: tl.constexpr):
    """Masses of logits relative to ``reference``, of which none is above."""
    exponent = x - finite(reference)
    if HAS_TEMPERATURE:
        exponent = tl.div_rn(exponent, temperature)
    return tl.where(exponent >= _LOWEST, tl.exp(tl.minimum(exponent, 0.0)), 0.0)


@triton.jit
def _multiply(code, total):
    """Upper and lower 64 bits of ``code * total``."""
    code_high, code_low = (code >> 32) & _WORD, code & _WORD
    high, low = total >> 32, total & _WORD
    # products of 32 bits fill 64, whose sign means nothing: shift and mask
    first, second, third = code_low * low, code_high * low, code_low * high
    carry = ((first >> 32) & _WORD) + (second & _WORD) + (third & _WORD)
    upper = code_high * high + ((second >> 32) & _WORD) + ((third >> 32) & _WORD) + (carry >> 32)
    return upper, code * total


@triton.jit
def _digit(upper, lower, divisor, BITS: tl.constexpr, SHIFT: tl.constexpr):
    """The next ``BITS`` bits of a quotient, and the remainder."""
    upper = (upper << BITS) | ((lower >> SHIFT) & ((1 << BITS) - 1))
    digit = upper // divisor
    return digit, upper - digit * divisor


@triton.jit
def _divide(rest, lower, size):
    """``floor((rest * 2^64 + lower) / size)``, and 0 for a size of 0."""
    divisor = tl.maximum(size, 1)
    first, rest = _digit(rest, lower, divisor, 22, 42)
    second, rest = _digit(rest, lower, divisor, 21, 21)
    third, rest = _digit(rest, lower, divisor, 21, 0)
    return (first << 42) | (second << 21) | third


@triton.jit
def _shares(mass, largest):
    share = tl.div_rn(mass, tl.broadcast_to(tl.where(largest > 0, largest, 1.0), mass.shape))
    return tl.where(mass > 0, tl.maximum((share * _ONE + 0.5).to(tl.int64), 1), 0)


@triton.jit
def _descend(mass, code):
    """The child of masses ``[n]`` that holds the code, the code in it, and its share: 0 where there is none."""
    share = _shares(mass, tl.max(mass, 0))
    after = tl.cumsum(share, 0)
    whole, lower = _multiply(code, tl.sum(share, 0))
    child = tl.minimum(tl.sum((after <= whole).to(tl.int32), 0), mass.shape[0] - 1)
    here = tl.arange(0, mass.shape[0]) == child
    size = tl.sum(tl.where(here, share, 0), 0)
    rest = whole - tl.sum(tl.where(here, after - share, 0), 0)
    return child, _divide(rest, lower, size), size


@triton.jit
def _load_tiles(ref_ptr, sum_ptr, start, tiles, BLOCK_N: tl.constexpr):
    tile = start + tl.arange(0, BLOCK_N)
    ref = as_float(tl.load(ref_ptr + tile, mask=tile < tiles, other=-float("inf")))
    total = tl.abs(tl.load(sum_ptr + tile, mask=tile < tiles, other=0.0))
    return ref, tl.where(ref == float("inf"), 0.0, total)


@triton.jit
def _find_tile(ref_ptr, sum_ptr, tiles, code, temperature, HAS_TEMPERATURE: tl.constexpr, BLOCK_N: tl.constexpr):
    """``_descend`` among the tiles of a row, of which there may be more than registers hold."""
    top = -float("inf")
    for start in range(0, tiles, BLOCK_N):
        ref, total = _load_tiles(ref_ptr, sum_ptr, start, tiles, BLOCK_N)
        top = tl.maximum(top, tl.max(ref, 0))
    largest = 0.0
    for start in range(0, tiles, BLOCK_N):
        ref, total = _load_tiles(ref_ptr, sum_ptr, start, tiles, BLOCK_N)
        largest = tl.maximum(largest, tl.max(masses(ref, top, temperature, HAS_TEMPERATURE) * total, 0))
    whole = tl.full([], 0, tl.int64)
    for start in range(0, tiles, BLOCK_N):
        ref, total = _load_tiles(ref_ptr, sum_ptr, start, tiles, BLOCK_N)
        whole += tl.sum(_shares(masses(ref, top, temperature, HAS_TEMPERATURE) * total, largest), 0)
    whole, lower = _multiply(code, whole)
    child = tl.full([], 0, tl.int32)
    size = tl.full([], 0, tl.int64)
    rest = tl.full([], 0, tl.int64)
    before = tl.full([], 0, tl.int64)
    for start in range(0, tiles, BLOCK_N):
        ref, total = _load_tiles(ref_ptr, sum_ptr, start, tiles, BLOCK_N)
        share = _shares(masses(ref, top, temperature, HAS_TEMPERATURE) * total, largest)
        after = before + tl.cumsum(share, 0)
        child += tl.sum((after <= whole).to(tl.int32), 0)
        here = (after > whole) & (after - share <= whole)  # one in all blocks
        size += tl.sum(tl.where(here, share, 0), 0)
        rest += tl.sum(tl.where(here, whole - (after - share), 0), 0)
        before += tl.sum(share, 0)
    size = tl.where(tl.abs(top) == float("inf"), 0, size)
    return tl.minimum(child, tiles - 1), _divide(rest, lower, size), size


@triton.jit
def _invert_cdf_kernel(
    # inputs
    x_ptr,  # *T [R, V]
    ref_ptr,  # *T [R, N]
    sum_ptr,  # *f32 [R, N]
    rows_ptr,  # *i64 [M]
    codes_ptr,  # *i64 [M]
    bits_ptr,  # *i32 [R, W] or unused
    temperature_ptr,  # *f32 [R] or unused
    # outputs
    tokens_ptr,  # *i64 [M]
    rest_ptr,  # *i64 [M]
    # sizes and strides, in elements
    vocab_size,
    tiles,
    words,
    stride_x,
    stride_bits,
    # meta-parameters
    HAS_BITMASK: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    draw = tl.program_id(0)
    row = tl.load(rows_ptr + draw)
    code = tl.load(codes_ptr + draw)
    temperature = 1.0
    if HAS_TEMPERATURE:
        temperature = tl.load(temperature_ptr + row)

    tile, rest, tile_share = _find_tile(
        ref_ptr + row * tiles, sum_ptr + row * tiles, tiles, code, temperature, HAS_TEMPERATURE, BLOCK_N
    )

    # groups of the tile
    start = tile * _TILE
    tokens = start + tl.arange(0, _R)[:, None] * _C + tl.arange(0, _C)[None, :]
    x = as_float(tl.load(x_ptr + row * stride_x + tokens, mask=tokens < vocab_size, other=-float("inf")))
    x = tl.where(x == x, x, -float("inf"))
    if HAS_BITMASK:
        x = _allowed(x, bits_ptr + row * stride_bits, start, words)
    mass = masses(x, tl.max(tl.max(x, 0), 0), temperature, HAS_TEMPERATURE)  # [32, 64]
    group_mass = tl.maximum(tl.sum((mass * _ONE + 0.5).to(tl.int64), 0), 1).to(tl.float32)
    group, rest, group_share = _descend(tl.where(tl.max(mass, 0) > 0, group_mass, 0.0), rest)

    # tokens of the group
    mass = tl.sum(tl.where((tl.arange(0, _C) == group)[None, :], mass, 0.0), 1)  # one of each sum is not 0
    place, rest, _ = _descend(mass, rest)
    found = (tile_share > 0) & (group_share > 0)
    tl.store(tokens_ptr + draw, tl.where(found, start + place * _C + group, 0).to(tl.int64))
    tl.store(rest_ptr + draw, tl.where(found, rest, code))


def launch_invert_cdf(
    logits: Tensor,
    tile_ref: Tensor,
    tile_sum: Tensor,
    rows: Tensor,
    codes: Tensor,
    vocab_size: int,
    bitmask: Tensor | None,
    temperature: Tensor | None,
) -> tuple[Tensor, Tensor]:
    tokens, rest = torch.empty_like(codes), torch.empty_like(codes)
    tiles = tile_ref.shape[1]
    if codes.shape[0]:
        _invert_cdf_kernel[(codes.shape[0],)](
            logits,
            tile_ref,
            tile_sum,
            rows,
            codes,
            logits if bitmask is None else bitmask,
            logits if temperature is None else temperature,
            tokens,
            rest,
            vocab_size,
            tiles,
            triton.cdiv(vocab_size, 32),
            logits.stride(0),
            0 if bitmask is None else bitmask.stride(0),
            HAS_BITMASK=bitmask is not None,
            HAS_TEMPERATURE=temperature is not None,
            BLOCK_N=min(_BLOCK_N, triton.next_power_of_2(tiles)),
            num_warps=4,
            enable_fp_fusion=False,
        )
    return tokens, rest
