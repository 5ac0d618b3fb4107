"""Divergences: one program sums a tile of one row, another adds up the tiles of a row."""

import triton
import triton.language as tl
from torch import Tensor

from ..divergence import _fake
from ..tiles import TILE, tiles_of
from .summary import as_float

_TILE = tl.constexpr(TILE)


@triton.jit
def _log_prob(x_ptr, lse, temperature, token, vocab_size):
    """Log-probabilities of a tile, -inf behind the vocabulary."""
    x = tl.div_rn(as_float(tl.load(x_ptr + token, mask=token < vocab_size, other=-float("inf"))), temperature)
    return tl.minimum(tl.where(x == x, x, -float("inf")) - lse, 0.0)


@triton.jit
def _divergence_kernel(
    # inputs
    x_ptr,  # *T [R, V]
    other_ptr,  # *T [R, V]
    lse_ptr,  # *f32 [R]
    other_lse_ptr,  # *f32 [R]
    temperature_ptr,  # *f32 [R] or unused
    other_temperature_ptr,  # *f32 [R] or unused
    active_ptr,  # *i1 [R] or unused
    # outputs
    sums_ptr,  # *f32 [R, N]
    # sizes and strides, in elements
    vocab_size,
    tiles,
    stride_x,
    stride_other,
    # meta-parameters
    DOLA: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    HAS_OTHER_TEMPERATURE: tl.constexpr,
    HAS_ACTIVE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    live = True
    if HAS_ACTIVE:
        live = tl.load(active_ptr + row) != 0
    total = tl.full([], 0.0, tl.float32)
    if live:
        temperature = 1.0
        if HAS_TEMPERATURE:
            temperature = tl.load(temperature_ptr + row)
        other_temperature = 1.0
        if HAS_OTHER_TEMPERATURE:
            other_temperature = tl.load(other_temperature_ptr + row)
        token = tile * _TILE + tl.arange(0, _TILE)
        lp = _log_prob(x_ptr + row * stride_x, tl.load(lse_ptr + row), temperature, token, vocab_size)
        lq = _log_prob(
            other_ptr + row * stride_other, tl.load(other_lse_ptr + row), other_temperature, token, vocab_size
        )
        p = tl.exp(lp)
        q = tl.exp(lq)
        m = (p + q) * 0.5
        lm = tl.log(m)
        if DOLA:
            terms = tl.where(m > 0, m * ((lm - lp) + (lm - lq)), 0.0)
        else:
            terms = tl.where(p > 0, p * (lp - lm), 0.0) + tl.where(q > 0, q * (lq - lm), 0.0)
        total = tl.sum(terms, 0)
    tl.store(sums_ptr + row * tiles + tile, total)


@triton.jit
def _sum_of_tiles_kernel(sums_ptr, out_ptr, tiles, BLOCK_N: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    tile = tl.arange(0, BLOCK_N)
    sums = tl.load(sums_ptr + row * tiles + tile, mask=tile < tiles, other=0.0)
    tl.store(out_ptr + row, tl.sum(sums, 0) * 0.5)


def launch_divergence(
    x: Tensor,
    other: Tensor,
    lse: Tensor,
    other_lse: Tensor,
    temperature: Tensor | None,
    other_temperature: Tensor | None,
    active: Tensor | None,
    vocab_size: int,
    dola: bool,
) -> Tensor:
    out: Tensor = _fake(x, other, lse, other_lse, temperature, other_temperature, active, vocab_size, dola)
    rows, tiles = out.shape[0], tiles_of(vocab_size)
    if rows:
        sums = out.new_empty(rows, tiles)
        _divergence_kernel[(rows, tiles)](
            x,
            other,
            lse,
            other_lse,
            lse if temperature is None else temperature,
            lse if other_temperature is None else other_temperature,
            lse if active is None else active,
            sums,
            vocab_size,
            tiles,
            x.stride(0),
            other.stride(0),
            DOLA=dola,
            HAS_TEMPERATURE=temperature is not None,
            HAS_OTHER_TEMPERATURE=other_temperature is not None,
            HAS_ACTIVE=active is not None,
            num_warps=4,
            enable_fp_fusion=False,
        )
        _sum_of_tiles_kernel[(rows,)](
            sums, out, tiles, BLOCK_N=triton.next_power_of_2(tiles), num_warps=1, enable_fp_fusion=False
        )
    return out
