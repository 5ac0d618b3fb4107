"""Elementary symmetric polynomials of odds w = p / (1 - p), before every place and from every place on.

With e_m these polynomials and the candidates in descending order, 1 .. n, the tables are (t_b is the polynomial of the
tail, kernels/poisson_tail.py; without one t_0 = 1 and else 0)

    E_a[i] = e_a(w_1 .. w_i)             E_a[i] = sum over j <= i of w_j E_{a-1}[j - 1]
    S_b[i] = e_b(w_i .. w_n and tail)    S_b[i] = t_b + sum over j >= i of w_j S_{b-1}[j + 1]

so a table is one cumulative sum of the one before, K of each.

Only positive float64 terms are added. In the order taken, the j-th factor of a product is at most the j-th largest w,
so each table is computed in units of that and of its own largest value: nothing overflows, whatever the weights, and
what underflows has a chance below 1e-300.
"""

from typing import NamedTuple

import torch
from torch import Tensor

CERTAIN = -1e-7  # log-probabilities from here on count as certain
_REMAINS = 1e-30  # 1 - p of a certain candidate
_LEAST = 1e-300
_LOWEST = -1e300  # for logarithms that may be -inf


class Tables(NamedTuple):
    """E or S of degrees 0 .. k for N candidates: ``exp(scale) * values``."""

    values: Tensor  # float64 [k + 1, B, N + 1], ascending along the last dimension
    scale: Tensor  # float64 [k + 1, B]; -inf where the table is 0


def log_odds(log_probs: Tensor) -> Tensor:
    """``log p / (1 - p)`` in float64; a certain candidate's is large but finite."""
    log_probs = log_probs.double()
    beside = torch.expm1(log_probs).neg_().masked_fill_(log_probs >= CERTAIN, _REMAINS)
    return log_probs - beside.log_()


class Weights(NamedTuple):
    """The candidates in descending order. Nothing here depends on the sizes of other requests, so no bit does."""

    best: Tensor  # float64 [B, k], log w of the first
    shares: Tensor  # float64 [B, n], w in terms of that of the last place that a set of the request's size needs
    order: Tensor  # int64 [B, n], their places in the list


def weigh(log_probs: Tensor, sizes: Tensor, k: int) -> Weights:
    found, order = log_probs.sort(dim=1, descending=True, stable=True)
    best = torch.nn.functional.pad(log_odds(found[:, :k]), (0, max(0, k - found.shape[1])), value=-torch.inf)
    last = best.gather(1, (sizes - 1).clamp(min=0)[:, None])
    exact = found.double()
    shares = (exact - last.clamp(min=_LOWEST)).clamp_(max=0.0).exp_()
    return Weights(best, shares.div_(torch.expm1(exact).neg_().clamp_(min=_REMAINS)), order)


def tables_of(weights: Weights, sizes: Tensor, log_tail: Tensor) -> tuple[Tables, Tables]:
    """E and S, in one go as ``X_a[r] = t_a + sum over q <= r of w_q X_{a-1}[q - 1]``, S with places from the last on.

    Args:
        weights: of n places.
        sizes: int64 ``[B]``, K.
        log_tail: float64 ``[k + 1, B]``, log t of S.
    """
    best, shares = weights.best, weights.shares
    (batch, k), n = best.shape, shares.shape[1]
    degree = torch.arange(1, k + 1, device=best.device)[:, None]
    # the first place that can have part: of E_a, a; of the b items from a place on, K - b or later
    start = torch.stack(((degree - 1).expand(k, batch), (sizes - degree).clamp(min=0)), 1)  # [k, 2, B]
    units = best.gather(1, start.flatten(0, 1).t().contiguous()).t().view(k, 2, batch)
    # w counts in units of the largest one that can have part, and is at most 1; the first K are computed as they are
    unit = units.clamp(min=_LOWEST)[..., None]
    reduce = (best.gather(1, (sizes - 1).clamp(min=0)[:, None]) - unit).clamp_(max=0.0).exp_()  # [k, 2, B, 1]
    near = min(k, n)
    place = torch.arange(near, device=best.device)
    head = (best[:, :near] - unit).masked_fill_(place < start[..., None], -torch.inf).clamp_(max=0.0).exp_()
    head = torch.where(place < sizes[:, None], head, shares[:, :near] * reduce)  # [k, 2, B, near]
    head[:, 1] = head[:, 1].flip(2)
    both = torch.stack((shares, shares.flip(1)))  # [2, B, n]
    initial = torch.stack((torch.full_like(log_tail, -torch.inf), log_tail), 1)  # [k + 1, 2, B]

    values = shares.new_empty(k + 1, 2, batch, 1 + n)
    values[0] = 1.0
    scale = torch.zeros_like(initial[0])
    scales, most = [scale], torch.ones_like(scale)
    tables = values.unbind(0)
    for before, table, unit, start_at, share, less in zip(
        tables, tables[1:], units.unbind(0), initial[1:].unbind(0), head.unbind(0), reduce.unbind(0), strict=False
    ):
        grown = most.log().add_(scale).add_(unit)
        scale = torch.maximum(grown, start_at)
        safe = scale.clamp(min=_LOWEST)
        factor = grown.sub_(safe).exp_().div_(most.clamp(min=_LEAST))[..., None]
        # torch.compile cannot trace `out=` where that is a view
        table[..., 0].copy_(start_at).sub_(safe).exp_()
        table[..., 1:].copy_(before[..., :-1]).mul_(both).mul_(less)
        table[0, :, 1 : 1 + near].copy_(before[0, :, :near]).mul_(share[0])
        table[1, :, 1 + n - near :].copy_(before[1, :, n - near : -1]).mul_(share[1])
        table[..., 1:].mul_(factor)
        table.cumsum_(2)
        most = table[..., -1]
        scales.append(scale)
    all_scales = torch.stack(scales, 1)
    return Tables(values[:, 0], all_scales[0]), Tables(values[:, 1], all_scales[1])
