"""The tail of a conditional Poisson sample: what stands for the candidates that are not listed, and the error it makes.

Candidates may be left out of the list. Of this tail, with T its total odds and s = sum (w / T)^2,

    e_m = T^m / m! * d_m,   d_m the chance that m draws in proportion to w differ,   1 - C(m, 2) s <= d_m

as a pair of draws agrees with chance s. By Bonferroni d_m is above that by no more than the chance of two pairs, which
is 3 C(m, 3) c + 3 C(m, 4) s^2 with c = sum (w / T)^3 <= s w_max / T. So the tail's polynomial is taken to be

    t_m = T^m / m! * (1 - C(m, 2) s),   off by y_m = (3 C(m, 3) c + 3 C(m, 4) s^2) / (1 - C(m, 2) s) of itself,

and where C(m, 2) s > 1/2, T^m / m! / 2 and y_m = 1. For m the number of tail items chosen, with E its mean and
Y = E[y_m], all under the law drawn from:

    listed, |error of pi| <= 2 min(pi Y, (1 - pi) max y) / (1 - Y)
    tail,   |error of pi| <= 2 pi E[m z_m] / E[m] / (1 - Y)
            z_m = y_m + (C(m, 2) s + (m - 1) w_i / T) / (1 - C(m, 2) s)

The listed pi' is E[(1 + x_m) 1_i] / E[1 + x_m] with |x_m| <= y_m. E[y_m 1_i] <= Y pi, as P(i | m) falls with m and y_m
grows; the second holds by 1 - pi alike, with y_m at most its largest. A tail item's pi is w_i E[m] / T, and its true
one has in place of m / T the chance that m - 1 draws differ from each other and from i. Where T is known but for a
relative error d, pi of a listed item is off by no more than pi E[m] d more, and of a tail item by pi d. Sampling
itself: listed items are in the sample with probability pi exactly; a tail item, drawn without replacement, within the
same bound to first order.
"""

from typing import NamedTuple

import torch
from torch import Tensor


def clashes(m: Tensor, squares: Tensor, cubes: Tensor) -> tuple[Tensor, Tensor]:
    """``t_m m! / T^m`` and y_m, for m float64 ``[k + 1, 1]`` tail items, s and c float64 ``[P]``."""
    pairs = m * (m - 1) / 2
    triples, fours = pairs * (m - 2) / 3, pairs * (m - 2) * (m - 3) / 12
    clash = pairs * squares
    differ = 1 - clash.clamp(max=0.5)
    return differ, torch.where(clash > 0.5, 1.0, (3 * triples * cubes + 3 * fours * squares * squares) / differ)


class TailFacts(NamedTuple):
    """What the error of pi depends on, for P places."""

    law: Tensor  # float64 [k + 1, P], chances of the numbers m of tail items
    m: Tensor  # float64 [k + 1, 1]
    most: Tensor  # int64 [P], the largest m
    squares: Tensor  # float64 [P], s
    cubes: Tensor  # float64 [P], c
    share: Tensor  # float64 [P], w / T of the item at the place
    error: Tensor  # float64 [P], relative, of T


def error_bound(pi: Tensor, in_tail: Tensor, tail: TailFacts) -> Tensor:
    """The bound at the top of this page on the error of each pi float64 ``[P]``, of a tail item where ``in_tail``."""
    law, m = tail.law, tail.m
    differ, y = clashes(m, tail.squares, tail.cubes)
    z = y + (1 - differ + (m - 1).clamp(min=0) * tail.share) / differ
    mean, mean_y = (law * m).sum(0), (law * y).sum(0)
    largest = y.masked_fill(m > tail.most, 0.0).amax(0)
    listed = torch.minimum(pi * mean_y, (1 - pi) * largest)
    error = 2 * torch.where(in_tail, pi * (law * m * z).sum(0) / mean, listed) / (1 - mean_y)
    error = error + pi * torch.where(in_tail, 1.0, mean) * tail.error
    return error.masked_fill(mean_y >= 1, 1.0).clamp_(max=1.0)
