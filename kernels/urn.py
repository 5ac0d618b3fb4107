"""Drawing one item after another in proportion to their weights, without putting back (Plackett-Luce).

The items are intervals of a line, side by side. What was drawn is cut out of the line: of the drawn intervals in order
of place, with left ends l_i and lengths w_i, a point x of the shortened line lies behind as many as have
l_i - sum over h < i of w_h <= x, and their lengths lead back to the whole line.

Plain torch, for tables of some thousand items: k searches, whose cost grows with k alone.
"""

import torch
from torch import Tensor


def draw_in_turn(weights: Tensor, uniforms: Tensor) -> Tensor:
    """Items of each request, in the order they are drawn.

    Args:
        weights: float64 ``[B, n]``, at least 0.
        uniforms: float64 ``[B, k]`` in [0, 1), one number for each draw.

    Returns:
        int64 ``[B, k]``; -1 where nothing is left.
    """
    batch, k = uniforms.shape
    ends = weights.cumsum(1)
    left, lengths = weights.new_empty(batch, 0), weights.new_empty(batch, 0)
    drawn = []
    for uniform in uniforms.unbind(1):
        left, order = left.sort(1)
        lengths = lengths.gather(1, order)
        before = lengths.cumsum(1)
        point = uniform * (ends[:, -1] - lengths.sum(1))
        point = point + (lengths * (left - before + lengths <= point[:, None])).sum(1)
        item = torch.searchsorted(ends, point[:, None], right=True).clamp(max=weights.shape[1] - 1)
        length = weights.gather(1, item)
        left = torch.cat([left, ends.gather(1, item) - length], 1)
        lengths = torch.cat([lengths, length], 1)
        drawn.append(item)
    there = torch.arange(k, device=weights.device) < (weights > 0).sum(1, keepdim=True)
    return torch.cat(drawn, 1).masked_fill_(~there, -1)
