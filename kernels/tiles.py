"""How a row of logits is cut: tiles of 2048 tokens, each of 64 strided groups of 32. See kernels/summary.py.

A tile's sum is a fixed binary tree over its 2048 tokens: token ``r * 64 + c`` is added to the one whose ``r`` differs
in bit 4, then 3, 2, 1, 0, and then to the one whose ``c`` differs in bit 0, then 1, 2, 3, 4, 5. :func:`place` numbers
the tokens so that the tree merges neighbours: at level l, those whose places differ in bit l.
"""

from typing import NamedTuple

import torch
from torch import Tensor

GROUP_SIZE = 32
GROUPS = 64
TILE = GROUP_SIZE * GROUPS


class Tiles(NamedTuple):
    """What the pass itself leaves. ``N = ceil(V / 2048)`` tiles a row."""

    group_max: Tensor  # logits dtype [R, N, 64]
    tile_max: Tensor  # logits dtype [R, N]
    tile_ref: Tensor  # logits dtype [R, N]
    tile_sum: Tensor  # float32 [R, N]; sign bit set where the tile held a NaN
    group_mass: Tensor  # float32 [R, N, 64], or [R, 0, 64] if not asked for


def tiles_of(vocab_size: int) -> int:
    """Number of tiles of a row."""
    return (vocab_size + TILE - 1) // TILE


def new_tiles(logits: Tensor, vocab_size: int, mass: bool) -> Tiles:
    """Room for the tiles of ``logits [R, V]``."""
    rows, tiles = logits.shape[0], tiles_of(vocab_size)
    return Tiles(
        group_max=logits.new_empty(rows, tiles, GROUPS),
        tile_max=logits.new_empty(rows, tiles),
        tile_ref=logits.new_empty(rows, tiles),
        tile_sum=logits.new_empty(rows, tiles, dtype=torch.float32),
        group_mass=logits.new_empty(rows, tiles if mass else 0, GROUPS, dtype=torch.float32),
    )


def _moves() -> Tensor:
    """int64 ``[2048]``: how far the tree's order moves each token of a tile."""
    inside = torch.arange(TILE)
    row, column = inside // GROUPS, inside % GROUPS
    reversed_row = sum(((row >> bit) & 1) << (4 - bit) for bit in range(5))
    return column * GROUP_SIZE + reversed_row - inside


# looked up, where bits would have to be put together
_MOVES = {dtype: _moves().to(dtype) for dtype in (torch.int32, torch.int64)}


def place(tokens: Tensor) -> Tensor:
    """Where the tree of sums has ``tokens``, int32 or int64, none negative: its order of a state's edges.

    ``(token // 2048) * 2048 + (token % 64) * 32 + r``, with ``r`` the five bits of ``(token % 2048) // 64`` reversed.
    """
    inside = tokens & (TILE - 1)
    return tokens + _MOVES[tokens.dtype].to(tokens.device).index_select(0, inside.flatten()).view_as(tokens)
