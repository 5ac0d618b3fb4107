"""Drawing one item after another in proportion to their weights, without putting back (Plackett-Luce).

The items are intervals of a line, side by side. What was drawn is cut out of the line: of the drawn intervals in order
of place, with left ends l_i and lengths w_i, a point x of the shortened line lies behind as many as have
l_i - sum over h < i of w_h <= x, and their lengths lead back to the whole line.

Plain torch, for tables of some thousand items: k searches, whose cost grows with k alone.
"""

import torch
from torch import Tensor


def draw_in_turn(weights: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Items of each request, in the order they are drawn, and the weight of all.

    Args:
        weights: ``[B, n]``, at least 0.
        uniforms: float64 ``[B, k]`` in [0, 1), one number for each draw.

    Returns:
        int64 ``[B, k]``, -1 where nothing is left; float64 ``[B]``.
    """
    batch, k = uniforms.shape
    ends = weights.cumsum(1, dtype=torch.float64)
    total = ends[:, -1:]
    left, lengths = ends.new_empty(batch, 0), ends.new_empty(batch, 0)
    drawn = []
    for uniform in uniforms.unbind(1):
        left, order = left.sort(1)
        lengths = lengths.gather(1, order)
        shift = lengths.cumsum(1)
        point = (total - shift[:, -1:] if drawn else total) * uniform[:, None]
        point = point + (lengths * (left - shift + lengths <= point)).sum(1, keepdim=True)
        item = torch.searchsorted(ends, point, right=True).clamp_(max=weights.shape[1] - 1)
        end = ends.gather(1, item)
        start = ends.gather(1, (item - 1).clamp_(min=0)).masked_fill_(item == 0, 0.0)
        left, lengths = torch.cat([left, start], 1), torch.cat([lengths, end - start], 1)
        drawn.append(item)
    there = torch.arange(k, device=weights.device) < (weights > 0).sum(1, keepdim=True)
    return torch.cat(drawn, 1).masked_fill_(~there, -1), total[:, 0]
