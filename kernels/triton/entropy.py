"""The entropy of each row's distribution: one program owns a row."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tiles import GROUP_SIZE, GROUPS, TILE
from .summary import as_float, where_set

_R = tl.constexpr(GROUP_SIZE)
_C = tl.constexpr(GROUPS)
_TILE = tl.constexpr(TILE)


@triton.jit
def _row_entropy_kernel(
    # inputs
    x_ptr,  # *T [R, V]
    lse_ptr,  # *f32 [R]
    bits_ptr,  # *i32 [R, W] or unused
    temperature_ptr,  # *f32 [R] or unused
    active_ptr,  # *i1 [R] or unused
    # output
    entropy_ptr,  # *f32 [R]
    # sizes and strides, in elements
    vocab_size,
    tiles,
    words,
    stride_x,
    stride_bits,
    # meta-parameters
    HAS_BITMASK: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    HAS_ACTIVE: tl.constexpr,
):
    # int64: R * V exceeds 2**31 at R = 16384, V = 131072
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * stride_x
    bits_ptr += row * stride_bits
    lse = tl.load(lse_ptr + row)
    there = tl.abs(lse) < float("inf")
    if HAS_ACTIVE:
        there = there & (tl.load(active_ptr + row) != 0)
    inside = tl.arange(0, _R)[:, None] * _C + tl.arange(0, _C)[None, :]  # [R, C] token within its tile
    word = tl.arange(0, _R)[:, None] * (_C // 32) + tl.arange(0, _C // 32)[None, :]
    total, mass = tl.zeros([_R, _C], tl.float32), tl.zeros([_R, _C], tl.float32)
    for tile in range(tl.where(there, tiles, 0)):
        tokens = tile * _TILE + inside
        x = as_float(tl.load(x_ptr + tokens, mask=tokens < vocab_size, other=-float("inf")))
        if HAS_TEMPERATURE:
            x = tl.div_rn(x, tl.load(temperature_ptr + row))
        if HAS_BITMASK:
            here = tile * (_TILE // 32) + word
            bits = tl.load(bits_ptr + here, mask=here < words, other=0)
            x = tl.where(where_set(bits), x, -float("inf"))
        counts = x > -float("inf")  # a NaN is not
        below = tl.where(counts, tl.maximum(lse - x, 0.0), 0.0)
        weight = tl.where(counts, tl.exp(-below), 0.0)
        mass += weight
        total += weight * below
    mass_of_row = tl.where(there, tl.sum(tl.sum(mass, 0), 0), 1.0)
    tl.store(entropy_ptr + row, tl.div_rn(tl.sum(tl.sum(total, 0), 0), mass_of_row) + tl.log(mass_of_row))


def launch_row_entropy(
    logits: Tensor,
    vocab_size: int,
    lse: Tensor,
    bitmask: Tensor | None,
    temperature: Tensor | None,
    active: Tensor | None,
) -> Tensor:
    found = torch.empty_like(lse)
    if lse.shape[0]:
        _row_entropy_kernel[(lse.shape[0],)](
            logits,
            lse,
            lse if bitmask is None else bitmask,
            lse if temperature is None else temperature,
            lse if active is None else active,
            found,
            vocab_size,
            triton.cdiv(vocab_size, TILE),
            triton.cdiv(vocab_size, 32),
            logits.stride(0),
            0 if bitmask is None else bitmask.stride(0),
            HAS_BITMASK=bitmask is not None,
            HAS_TEMPERATURE=temperature is not None,
            HAS_ACTIVE=active is not None,
            num_warps=4,
            enable_fp_fusion=False,
        )
    return found
