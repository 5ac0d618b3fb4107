"""The sums of tiles over listed tokens.

A list becomes the 64 words of a tile's bitmask, in registers. From there on the tile is summed by the code of the pass,
but only the listed logits are loaded.
"""

import triton
import triton.language as tl
from torch import Tensor

from ..bitmask import words_of
from ..listed_summary import _new_sums
from ..tiles import GROUP_SIZE, GROUPS, TILE
from .automaton import listed_words
from .summary import as_float, finite, sum_exp2, sum_exp2_of_any, where_set

_LOG2E = tl.constexpr(1.4426950408889634)
_R = tl.constexpr(GROUP_SIZE)
_C = tl.constexpr(GROUPS)
_TILE = tl.constexpr(TILE)


@triton.jit
def _summarize_listed_kernel(
    # inputs
    indptr_ptr,  # *i32 [S + 1]
    tokens_ptr,  # *i32 [E]
    targets_ptr,  # *i32 [E] or unused
    reach_ptr,  # *i32 [S, L]
    states_ptr,  # *i32 [R]
    window_ptr,  # *i32 [R, L] or unused
    x_ptr,  # *T [R, V]
    bits_ptr,  # *i32 [R, W] or unused
    temperature_ptr,  # *f32 [R] or unused
    active_ptr,  # *i1 [R] or unused
    ends_ptr,  # *i64 [N_ENDS] or unused
    may_end_ptr,  # *i1 [R] or unused
    # outputs
    tile_ref_ptr,  # *T [R, N]
    tile_sum_ptr,  # *f32 [R, N]
    # sizes and strides, in elements
    vocab_size,
    tiles,
    words,
    stride_x,
    stride_bits,
    # meta-parameters
    HAS_TARGETS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    LENGTHS: tl.constexpr,  # L
    HAS_BITMASK: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    HAS_ACTIVE: tl.constexpr,
    N_ENDS: tl.constexpr,
):
    row, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    word = tl.arange(0, _C)
    bits = tl.zeros([_C], tl.int32)
    live = True
    if HAS_ACTIVE:
        live = tl.load(active_ptr + row) != 0
    if live:
        bits = listed_words(
            row,
            tile,
            indptr_ptr,
            tokens_ptr,
            targets_ptr,
            reach_ptr,
            states_ptr,
            window_ptr,
            HAS_TARGETS,
            HAS_WINDOW,
            LENGTHS,
        )
        for i in tl.static_range(N_ENDS):
            token = tl.load(ends_ptr + i)
            here = (token >= 0) & (token < vocab_size) & (token // _TILE == tile)
            here = here & (tl.load(may_end_ptr + row) != 0)
            bit = tl.where(here, 1 << (token % 32).to(tl.int32), 0)
            bits |= tl.where(word == (token % _TILE) // 32, bit, 0)
        if HAS_BITMASK:
            at = tile * _C + word
            bits &= tl.load(bits_ptr + row * stride_bits + at, mask=at < words, other=0)

    out_type = tile_ref_ptr.dtype.element_ty
    out = row * tiles + tile
    if tl.max((bits != 0).to(tl.int32), 0) != 0:
        scale = _LOG2E
        if HAS_TEMPERATURE:
            scale = _LOG2E / tl.load(temperature_ptr + row)
        inside = tl.arange(0, _R)[:, None] * _C + tl.arange(0, _C)[None, :]
        listed = where_set(tl.reshape(bits, [_R, _C // 32]))
        x = as_float(tl.load(x_ptr + row * stride_x + tile * _TILE + inside, mask=listed, other=-float("inf")))
        ref = tl.max(tl.max(x, 0), 0)
        total = sum_exp2(x, finite(ref), scale)
        if total != total:  # a NaN among the logits, or huge ones
            ref, total = sum_exp2_of_any(x, scale)
        tl.store(tile_ref_ptr + out, ref.to(out_type))
        tl.store(tile_sum_ptr + out, total)
    else:
        tl.store(tile_ref_ptr + out, -float("inf"))
        tl.store(tile_sum_ptr + out, 0.0)


def launch_summarize_listed(
    indptr: Tensor,
    tokens: Tensor,
    targets: Tensor | None,
    reach: Tensor,
    states: Tensor,
    window: Tensor | None,
    logits: Tensor,
    vocab_size: int,
    bitmask: Tensor | None,
    temperature: Tensor | None,
    active: Tensor | None,
    ends: Tensor | None,
    may_end: Tensor | None,
) -> tuple[Tensor, Tensor]:
    tile_ref, tile_sum = _new_sums(logits, vocab_size)
    rows, tiles = tile_ref.shape
    if rows:
        _summarize_listed_kernel[(rows, tiles)](
            indptr,
            tokens,
            tokens if targets is None else targets,
            reach,
            states,
            states if window is None else window,
            logits,
            logits if bitmask is None else bitmask,
            logits if temperature is None else temperature,
            logits if active is None else active,
            logits if ends is None else ends,
            logits if may_end is None else may_end,
            tile_ref,
            tile_sum,
            vocab_size,
            tiles,
            words_of(vocab_size),
            logits.stride(0),
            0 if bitmask is None else bitmask.stride(0),
            HAS_TARGETS=targets is not None,
            HAS_WINDOW=window is not None,
            LENGTHS=reach.shape[1],
            HAS_BITMASK=bitmask is not None,
            HAS_TEMPERATURE=temperature is not None,
            HAS_ACTIVE=active is not None,
            N_ENDS=0 if ends is None or may_end is None else ends.shape[0],
            num_warps=1,
            enable_fp_fusion=False,  # as in the pass
        )
    return tile_ref, tile_sum
