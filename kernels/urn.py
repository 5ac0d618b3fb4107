"""Drawing distinct items in proportion to their weights, one after another, without putting back (Plackett-Luce).

Whoever draws with putting back, and passes over what was drawn before, sees the distinct items in just that order:
given those seen, the next new one is any other in proportion to its weight. So a few more draws than items wanted, at
once, give them; where they do not suffice, the items found are right and some are missing.
"""

import torch
from torch import Tensor


def draw_distinct(weights: Tensor, uniforms: Tensor, k: int, draws: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The first ``k`` distinct items of each request, in the order they are drawn, and the weight of all.

    Args:
        weights: ``[B, n]``, at least 0.
        uniforms: float64 ``[B, draws]`` in [0, 1), at least ``k``.
        k: items wanted.
        draws: int64 ``[B]``, how many of the uniforms to use; default all.

    Returns:
        int64 ``[B, k]``, -1 where no further was found; float64 ``[B]``.
    """
    ends = weights.cumsum(1, dtype=torch.float64)
    total = ends[:, -1:]
    item = torch.searchsorted(ends, uniforms * total, right=True).clamp_(max=weights.shape[1] - 1)
    draw = torch.arange(item.shape[1], device=item.device)
    seen = ((item[:, :, None] == item[:, None]) & (draw[:, None] > draw)).any(2)
    if draws is not None:
        seen |= draw >= draws[:, None]
    # the new ones, in order, at 0 .. k - 1, and all else at k
    rank = (~seen).cumsum(1) - 1
    rank = torch.where(seen | (total <= 0.0), k, rank).clamp_(max=k)
    found = torch.full((item.shape[0], k + 1), -1, dtype=torch.int64, device=item.device)
    return found.scatter_(1, rank, item)[:, :k], total[:, 0]
