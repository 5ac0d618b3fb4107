"""Edges of automata: a step along one, and those of a row's state as bits.

Edges of a state are in order of place, so those of one tile lie together: a program owns a row's tile, finds them by
binary search, and gathers their bits in registers.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..bitmask import words_of
from ..tiles import GROUP_SIZE, GROUPS, TILE, tiles_of

_R = tl.constexpr(GROUP_SIZE)
_C = tl.constexpr(GROUPS)
_TILE = tl.constexpr(TILE)
_BLOCK = 128  # tokens a program of follow


@triton.jit
def place(token):
    """Where the tree of sums has a token: see kernels/tiles.py."""
    inside = token % _TILE
    row = inside // _C
    reversed_row = ((row & 1) << 4) | ((row & 2) << 2) | (row & 4) | ((row & 8) >> 2) | (row >> 4)
    return token - inside + (inside % _C) * _R + reversed_row


@triton.jit
def edge_allowed(
    edge, row, inside, targets_ptr, reach_ptr, window_ptr, HAS_TARGETS: tl.constexpr, LENGTHS: tl.constexpr
):
    """Whether the targets of edges reach acceptance within the windows of their rows; False where not ``inside``."""
    target = edge + 1
    if HAS_TARGETS:
        target = tl.load(targets_ptr + edge, mask=inside, other=0)
    meets = tl.zeros_like(edge)
    for i in tl.static_range(LENGTHS):
        reach = tl.load(reach_ptr + target.to(tl.int64) * LENGTHS + i, mask=inside, other=0)
        meets |= reach & tl.load(window_ptr + row.to(tl.int64) * LENGTHS + i, mask=inside, other=0)
    return meets != 0


@triton.jit
def _edges_of_tile(tokens_ptr, start, end, tile):
    """The edges whose tokens lie in a tile, of those from ``start`` up to ``end``: the first, and one past the last."""
    low = start + tl.zeros([2], tl.int32)
    high = end + tl.zeros([2], tl.int32)
    bound = tile + tl.arange(0, 2)
    while tl.max((low < high).to(tl.int32), 0) > 0:
        middle = low + (high - low) // 2
        before = tl.load(tokens_ptr + middle, mask=low < high, other=2**31 - 1) // _TILE < bound
        high = tl.where(before, high, middle)
        low = tl.where(before, middle + 1, low)
    return tl.min(low, 0), tl.max(low, 0)


@triton.jit
def listed_words(
    row,
    tile,
    indptr_ptr,
    tokens_ptr,
    targets_ptr,
    reach_ptr,
    states_ptr,
    window_ptr,
    HAS_TARGETS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    LENGTHS: tl.constexpr,
):
    """The 64 words of a tile's bitmask: bits of the allowed edges of the row's state."""
    word = tl.arange(0, _C)
    words = tl.zeros([_C], tl.int32)
    state = tl.load(states_ptr + row)
    if state >= 0:
        first, end = _edges_of_tile(tokens_ptr, tl.load(indptr_ptr + state), tl.load(indptr_ptr + state + 1), tile)
        for start in range(first, end, 32):
            edge = start + tl.arange(0, 32)
            inside = edge < end
            if HAS_WINDOW:
                inside = edge_allowed(
                    edge, row + tl.zeros_like(edge), inside, targets_ptr, reach_ptr, window_ptr, HAS_TARGETS, LENGTHS
                )
            token = tl.load(tokens_ptr + edge, mask=inside, other=0) % _TILE
            bit = tl.where(inside, tl.full([32], 1, tl.int32) << (token % 32), 0)
            # distinct bits, so the sum is their union
            words |= tl.sum(tl.where((token // 32)[:, None] == word[None, :], bit[:, None], 0), 0)
    return words


@triton.jit
def _follow_kernel(
    # inputs
    indptr_ptr,  # *i32 [S + 1]
    tokens_ptr,  # *i32 [E]
    targets_ptr,  # *i32 [E] or unused
    states_ptr,  # *i32 [n]
    taken_ptr,  # *i64 [n]
    # outputs
    out_ptr,  # *i32 [n]
    # sizes
    n,
    # meta-parameters
    HAS_TARGETS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    state = tl.load(states_ptr + at, mask=inside, other=-1)
    taken = tl.load(taken_ptr + at, mask=inside, other=-1)
    alive = (state >= 0) & (taken >= 0)
    low = tl.load(indptr_ptr + state, mask=alive, other=0)
    end = tl.load(indptr_ptr + state + 1, mask=alive, other=0)
    high = end
    wanted = place(tl.where(alive, taken, 0))
    while tl.max((low < high).to(tl.int32), 0) > 0:  # the first edge whose place is not before
        open = low < high
        middle = low + (high - low) // 2
        before = open & (place(tl.load(tokens_ptr + middle, mask=open, other=0)) < wanted)
        low = tl.where(before, middle + 1, low)
        high = tl.where(before, high, middle)
    found = low < end
    found = found & (tl.load(tokens_ptr + low, mask=found, other=-1) == taken)
    target = low + 1
    if HAS_TARGETS:
        target = tl.load(targets_ptr + low, mask=found, other=-1)
    tl.store(out_ptr + at, tl.where(found, target, -1), mask=inside)


@triton.jit
def _listed_bitmask_kernel(
    # inputs
    indptr_ptr,  # *i32 [S + 1]
    tokens_ptr,  # *i32 [E]
    targets_ptr,  # *i32 [E] or unused
    reach_ptr,  # *i32 [S, L]
    states_ptr,  # *i32 [R]
    window_ptr,  # *i32 [R, L] or unused
    # outputs
    bits_ptr,  # *i32 [R, W]
    # sizes
    words,  # W
    # meta-parameters
    HAS_TARGETS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    LENGTHS: tl.constexpr,  # L
):
    row, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
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
    word = tile * _C + tl.arange(0, _C)
    tl.store(bits_ptr + row * words + word, bits, mask=word < words)


def launch_follow(indptr: Tensor, tokens: Tensor, targets: Tensor | None, states: Tensor, taken: Tensor) -> Tensor:
    out = torch.empty_like(states)
    n = states.shape[0]
    if n:
        _follow_kernel[(triton.cdiv(n, _BLOCK),)](
            indptr,
            tokens,
            tokens if targets is None else targets,
            states,
            taken,
            out,
            n,
            HAS_TARGETS=targets is not None,
            BLOCK=_BLOCK,
            num_warps=4,
        )
    return out


def launch_listed_bitmask(
    indptr: Tensor,
    tokens: Tensor,
    targets: Tensor | None,
    reach: Tensor,
    states: Tensor,
    window: Tensor | None,
    vocab_size: int,
) -> Tensor:
    rows = states.shape[0]
    bits = states.new_empty(rows, words_of(vocab_size))
    if rows:
        _listed_bitmask_kernel[(rows, tiles_of(vocab_size))](
            indptr,
            tokens,
            tokens if targets is None else targets,
            reach,
            states,
            states if window is None else window,
            bits,
            bits.shape[1],
            HAS_TARGETS=targets is not None,
            HAS_WINDOW=window is not None,
            LENGTHS=reach.shape[1],
            num_warps=1,
        )
    return bits
