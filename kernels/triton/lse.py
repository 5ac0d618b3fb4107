"""The log-sum-exp of a row from its tiles."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..lse import FLAG_INF, FLAG_NAN

_NAN = tl.constexpr(FLAG_NAN)
_INF = tl.constexpr(FLAG_INF)


@triton.jit
def _row_lse_kernel(
    # inputs
    ref_ptr,  # *T [R, N]
    sum_ptr,  # *f32 [R, N]
    temperature_ptr,  # *f32 [R] or unused
    # outputs
    lse_ptr,  # *f32 [R]
    flags_ptr,  # *i32 [R]
    # sizes
    tiles,
    # meta-parameters
    HAS_TEMPERATURE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    tile = tl.arange(0, BLOCK_N)
    inside = tile < tiles
    ref = tl.load(ref_ptr + row * tiles + tile, mask=inside, other=-float("inf")).to(tl.float32)
    total = tl.load(sum_ptr + row * tiles + tile, mask=inside, other=0.0)
    top = tl.max(ref, 0)
    # a row of -inf has no finite top to subtract; weights of +inf rows are discarded below
    difference = ref - tl.where(tl.abs(top) == float("inf"), 0.0, top)
    if HAS_TEMPERATURE:
        temperature = tl.load(temperature_ptr + row)
        difference = tl.div_rn(difference, temperature)
        top = tl.div_rn(top, temperature)
    lse = top + tl.log(tl.sum(tl.exp(difference) * tl.abs(total), 0))
    overflow = top == float("inf")
    tl.store(lse_ptr + row, tl.where(overflow, float("inf"), lse))
    saw_nan = tl.max((total < 0).to(tl.int32), 0)
    tl.store(flags_ptr + row, saw_nan * _NAN + overflow.to(tl.int32) * _INF)


def launch_row_lse(tile_ref: Tensor, tile_sum: Tensor, temperature: Tensor | None) -> tuple[Tensor, Tensor]:
    rows, tiles = tile_ref.shape
    lse = tile_sum.new_empty(rows)
    flags = tile_sum.new_empty(rows, dtype=torch.int32)
    if rows:
        _row_lse_kernel[(rows,)](
            tile_ref,
            tile_sum,
            tile_sum if temperature is None else temperature,
            lse,
            flags,
            tiles,
            HAS_TEMPERATURE=temperature is not None,
            BLOCK_N=triton.next_power_of_2(tiles),
            num_warps=1,
            enable_fp_fusion=False,
        )
    return lse, flags
