"""The log-sum-exp of a row from its tiles, in the one fixed order.

    top = max over tiles of tile_ref / temperature
    lse = top + log(sum over tiles of |tile_sum| * exp(tile_ref / temperature - top))

A row that holds +inf is invalid and has lse = +inf, so that every log-probability made with it is -inf.
"""

import torch
from torch import Tensor

from .registration import register

FLAG_NAN = 1
FLAG_INF = 2


def merge_tiles(tile_ref: Tensor, tile_sum: Tensor, temperature: Tensor | None) -> tuple[Tensor, Tensor]:
    """The torch definition of the log-sum-exp of rows and their flags, from the tiles of :class:`Tiles`."""
    ref = tile_ref.float()
    top = ref.amax(-1)  # [R]
    # a row of -inf has no finite top to subtract; weights of +inf rows are discarded below
    weight = ref - torch.where(top.abs() == torch.inf, 0.0, top)[:, None]
    if temperature is not None:
        weight.div_(temperature[:, None])
        top = top / temperature
    total = (weight.exp_() * tile_sum.abs()).sum(-1)
    overflow = top == torch.inf
    lse = torch.where(overflow, torch.inf, top + total.log())
    flags = (tile_sum < 0).any(-1) * FLAG_NAN + overflow * FLAG_INF
    return lse, flags.int()


def _fake_row_lse(tile_ref: Tensor, tile_sum: Tensor, temperature: Tensor | None) -> tuple[Tensor, Tensor]:
    rows = tile_ref.shape[0]
    return tile_sum.new_empty(rows), tile_sum.new_empty(rows, dtype=torch.int32)


row_lse_op = register(
    "row_lse(Tensor tile_ref, Tensor tile_sum, Tensor? temperature) -> (Tensor, Tensor)",
    merge_tiles,
    _fake_row_lse,
    "lse",
)
