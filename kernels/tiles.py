"""How a row of logits is cut: tiles of 2048 tokens, each of 64 strided groups of 32. See kernels/summary.py."""

from typing import NamedTuple

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
