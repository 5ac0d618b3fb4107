"""The streaming pass over the logits.

One warp owns a tile at a time and keeps all of it in registers: group maxima are reduced inside a lane, then over the
few lanes that hold the same columns, and no other warp is ever waited for.
"""

import triton
import triton.language as tl
from torch import Tensor

from ..tiles import GROUP_SIZE, GROUPS, TILE, Tiles, new_tiles

_LOG2E = tl.constexpr(1.4426950408889634)
_R = tl.constexpr(GROUP_SIZE)
_C = tl.constexpr(GROUPS)
_TILE = tl.constexpr(TILE)
TILES_PER_PROGRAM = 2  # 1 adds a twentieth of the instructions; 4 leaves most of a GPU idle on few rows


@triton.jit
def _add_rows(x):
    """The columns' sums of ``x [R, C]``, in the order of kernels/tiles.py; of two numbers a sum has no order."""
    for i in tl.static_range(5):
        x = tl.sum(tl.reshape(x, [2, 16 >> i, _C]), 0)
    return tl.reshape(x, [_C])


@triton.jit
def _add_members(x):
    """The sum of one column ``x [R]``, in the same order."""
    for i in tl.static_range(4):
        x = tl.sum(tl.reshape(x, [2, 16 >> i]), 0)
    return tl.sum(x, 0)


@triton.jit
def _tree_sum(x):
    """The sum of ``x [R, C]``, in the order of kernels/tiles.py."""
    x = _add_rows(x)
    for i in tl.static_range(5):
        x = tl.sum(tl.reshape(x, [32 >> i, 2]), 1)
    return tl.sum(x, 0)


@triton.jit
def sum_exp2(x, ref, scale):
    """sum(exp((x - ref) / temperature)) with ``scale = log2(e) / temperature``: one fma and one ex2 an element."""
    shift = ref * scale
    total = _tree_sum(tl.exp2(tl.fma(x, scale, -shift)))
    error = tl.fma(-ref, scale, shift)  # exactly: shift was rounded
    # beyond about 2**29 the error outgrows the range of exponents, and the caller must take the difference first
    return tl.where(tl.abs(error) < 32.0, total * tl.exp2(error), float("nan"))


@triton.jit
def finite(x):
    """``x`` where it is finite, else 0: -inf - -inf would be NaN."""
    return tl.where(tl.abs(x) == float("inf"), 0.0, x)


@triton.jit
def as_float(raw):
    """float32 of logits as loaded; for bfloat16 by a shift, which costs one instruction where a cast costs two."""
    if raw.dtype == tl.bfloat16:
        return (raw.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return raw.to(tl.float32)


@triton.jit
def sum_exp2_of_any(x, scale):
    """Maximum and sum of a tile ``x [R, C]`` that may hold NaN or huge logits; a NaN counts as -inf and is reported."""
    faults = tl.sum(tl.sum((x != x).to(tl.int32), 0), 0)
    x = tl.where(x == x, x, -float("inf"))
    ref = tl.max(tl.max(x, 0), 0)
    total = _tree_sum(tl.exp2((x - finite(ref)) * scale))
    return ref, tl.where(faults > 0, -tl.maximum(total, 1.0), total)


@triton.jit
def where_set(bits):
    """Whether each token's bit is set, ``[R, C]``, of a tile's words ``[R, C // 32]``."""
    bits = tl.reshape(tl.broadcast_to(bits[:, :, None], [_R, _C // 32, 32]), [_R, _C])  # the word of each token
    return ((bits >> (tl.arange(0, _C) % 32)[None, :]) & 1) != 0


@triton.jit
def _allowed(x, bits_ptr, start, words):
    """``x [R, C]`` of the tile at ``start``, -inf where the bitmask bars the token."""
    word = tl.arange(0, _R)[:, None] * (_C // 32) + tl.arange(0, _C // 32)[None, :]
    bits = tl.load(bits_ptr + start // 32 + word, mask=start // 32 + word < words, other=0)
    return tl.where(where_set(bits), x, -float("inf"))


@triton.jit
def _mass(candidates, group_max, scale):
    """Sum of exponentials of each group, relative to its maximum."""
    return _add_rows(tl.exp2((candidates - finite(group_max)[None, :]) * scale))


@triton.jit
def _summarize_kernel(
    # inputs
    x_ptr,  # *T [R, V]
    bits_ptr,  # *i32 [R, W] or unused
    temperature_ptr,  # *f32 [R] or unused
    active_ptr,  # *i1 [R] or unused
    exclude_ptr,  # *i64 [N_EXCLUDE] or unused
    # outputs
    group_max_ptr,  # *T [R, N, 64]
    tile_max_ptr,  # *T [R, N]
    tile_ref_ptr,  # *T [R, N]
    tile_sum_ptr,  # *f32 [R, N]
    group_mass_ptr,  # *f32 [R, N, 64] or unused
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
    N_EXCLUDE: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    MASS: tl.constexpr,
    TILES: tl.constexpr,
):
    # int64: R * V exceeds 2**31 at R = 16384, V = 131072
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * stride_x
    bits_ptr += row * stride_bits
    group_max_ptr += row * tiles * _C
    group_mass_ptr += row * tiles * _C
    tile_max_ptr += row * tiles
    tile_ref_ptr += row * tiles
    tile_sum_ptr += row * tiles
    columns = tl.arange(0, _C)
    inside = tl.arange(0, _R)[:, None] * _C + columns[None, :]  # [R, C] token within its tile

    live = True
    if HAS_ACTIVE:
        live = tl.load(active_ptr + row) != 0
    scale = _LOG2E
    if HAS_TEMPERATURE:
        scale = _LOG2E / tl.load(temperature_ptr + row)

    first = tl.program_id(1) * TILES
    for tile in range(first, tl.minimum(first + TILES, tiles)):
        start = tile * _TILE
        tokens = start + inside
        if live:
            # converted in each branch: 16-bit values that pass a join are unpacked at the cost of one more instruction
            if start + _TILE <= vocab_size:
                x = as_float(tl.load(x_ptr + tokens))
            else:
                x = as_float(tl.load(x_ptr + tokens, mask=tokens < vocab_size, other=-float("inf")))
            candidates = x
            if HAS_BITMASK:
                candidates = _allowed(x, bits_ptr, start, words)
                if RENORMALIZE:
                    x = candidates
            group_max = tl.max(candidates, 0)  # [C]
            tile_max = tl.max(group_max, 0)
            ref = tile_max
            if HAS_BITMASK and not RENORMALIZE:
                ref = tl.max(tl.max(x, 0), 0)
            total = sum_exp2(x, finite(ref), scale)
            if MASS:
                mass = _mass(candidates, group_max, scale)
            if total != total:  # a NaN among the logits, or huge ones: rare, so nothing above looks for them
                # read again: keeping the tile for this branch would cost registers everywhere
                x = as_float(tl.load(x_ptr + tokens, mask=tokens < vocab_size, other=-float("inf")))
                candidates = x
                if HAS_BITMASK:
                    candidates = _allowed(x, bits_ptr, start, words)
                    if RENORMALIZE:
                        x = candidates
                candidates = tl.where(candidates == candidates, candidates, -float("inf"))
                group_max = tl.max(candidates, 0)
                tile_max = tl.max(group_max, 0)
                ref, total = sum_exp2_of_any(x, scale)
                if MASS:
                    mass = _mass(candidates, group_max, scale)
            for i in tl.static_range(N_EXCLUDE):
                token = tl.load(exclude_ptr + i).to(tl.int32)
                if (token >= 0) & (token // _TILE == tile):  # take its group again, without the excluded tokens
                    members = start + token % _C + tl.arange(0, _R) * _C
                    candidate = members < vocab_size
                    if HAS_BITMASK:
                        bits = tl.load(bits_ptr + members // 32, mask=candidate, other=0)
                        candidate = candidate & (((bits >> (members % 32)) & 1) != 0)
                    for j in tl.static_range(N_EXCLUDE):
                        candidate = candidate & (members != tl.load(exclude_ptr + j).to(tl.int32))
                    member = as_float(tl.load(x_ptr + members, mask=candidate, other=-float("inf")))
                    member = tl.where(member == member, member, -float("inf"))
                    here = columns == token % _C
                    top = tl.max(member, 0)
                    group_max = tl.where(here, top, group_max)
                    tile_max = tl.max(group_max, 0)
                    if MASS:
                        mass = tl.where(here, _add_members(tl.exp2((member - finite(top)) * scale)), mass)
            if MASS:
                tl.store(group_mass_ptr + tile * _C + columns, mass)
            out_type = group_max_ptr.dtype.element_ty
            tl.store(group_max_ptr + tile * _C + columns, group_max.to(out_type))
            tl.store(tile_max_ptr + tile, tile_max.to(out_type))
            tl.store(tile_ref_ptr + tile, ref.to(out_type))
            tl.store(tile_sum_ptr + tile, total)
        else:
            nothing = tl.full([_C], -float("inf"), group_max_ptr.dtype.element_ty)
            tl.store(group_max_ptr + tile * _C + columns, nothing)
            tl.store(tile_max_ptr + tile, -float("inf"))
            tl.store(tile_ref_ptr + tile, -float("inf"))
            tl.store(tile_sum_ptr + tile, 0.0)
            if MASS:
                tl.store(group_mass_ptr + tile * _C + columns, tl.zeros([_C], tl.float32))


def launch_summarize(
    logits: Tensor,
    vocab_size: int,
    bitmask: Tensor | None,
    temperature: Tensor | None,
    active: Tensor | None,
    exclude: Tensor | None,
    renormalize: bool,
    mass: bool,
) -> Tiles:
    out = new_tiles(logits, vocab_size, mass)
    rows, tiles = out.tile_max.shape
    if rows == 0:
        return out
    _summarize_kernel[(rows, triton.cdiv(tiles, TILES_PER_PROGRAM))](
        logits,
        logits if bitmask is None else bitmask,
        logits if temperature is None else temperature,
        logits if active is None else active,
        logits if exclude is None else exclude,
        *out,
        vocab_size,
        tiles,
        triton.cdiv(vocab_size, 32),
        logits.stride(0),
        0 if bitmask is None else bitmask.stride(0),
        HAS_BITMASK=bitmask is not None,
        HAS_TEMPERATURE=temperature is not None,
        HAS_ACTIVE=active is not None,
        N_EXCLUDE=0 if exclude is None else exclude.shape[0],
        RENORMALIZE=renormalize,
        MASS=mass,
        TILES=TILES_PER_PROGRAM,
        num_warps=1,
        enable_fp_fusion=False,  # where an fma is meant, it is written
    )
    return out
