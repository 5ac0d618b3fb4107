"""Conditional Poisson sampling (Hajek 1964; Meister et al. 2021): a set of fixed size, in proportion to its odds.

    w = p / (1 - p),    Q(Y) = prod_{i in Y} w_i / e_K(w),    pi_i = w_i e_{K-1}(w without i) / e_K(w)

with e_m the elementary symmetric polynomials. With the candidates in descending order, 1 .. n, tables of those before
and of those from a place on hold everything (t_b is the tail's polynomial, below; without one t_0 = 1 and else 0):

    E_a[i] = e_a(w_1 .. w_i)             E_a[i] = sum over j <= i of w_j E_{a-1}[j - 1]
    S_b[i] = e_b(w_i .. w_n and tail)    S_b[i] = t_b + sum over j >= i of w_j S_{b-1}[j + 1]

so a table is one cumulative sum of the one before, K of each. A set is drawn from S: with b items still to be chosen
from place i on, the next one is beyond place j with chance S_b[j + 1] / S_b[i], so K searches in sorted tables find it.

    pi_i = w_i * sum over a of E_a[i - 1] S_{K-1-a}[i + 1] / S_K[1]

Only positive float64 terms are added. In the order taken, the j-th factor of a product is at most the j-th largest w,
so each table is computed in units of that and of its own largest value: nothing overflows, whatever the weights, and
what underflows has a chance below 1e-300.

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

Plain torch and no operation of its own: some hundred small tensor operations, for any device; none synchronises, so a
graph may record them. A request's results do not depend on its batch.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .checks import check_dtype, check_range, check_same_device, check_shape, check_tensor
from .random import uniforms

_CERTAIN = -1e-7  # log-probabilities from here on count as certain
_REMAINS = 1e-30  # 1 - p of a certain candidate
_LEAST = 1e-300
_LOWEST = -1e300  # for logarithms that may be -inf


class PoissonSample(NamedTuple):
    """A sample of each request, most probable items first."""

    chosen: Tensor  # int64 [B, k], places in the list; n + j is item j of the tail, -1 no item
    log_inclusion: Tensor  # float32 [B, k], log pi; 0 for certain items, and where there is none
    bound: Tensor  # float32 [B], on the absolute error of any pi above that the treatment of the tail makes


class _Tables(NamedTuple):
    """E or S of degrees 0 .. k for N candidates: ``exp(scale) * values``."""

    values: Tensor  # float64 [k + 1, B, N + 1], ascending along the last dimension
    scale: Tensor  # float64 [k + 1, B]; -inf where the table is 0


def words_needed(k: int) -> int:
    """How many random words a request takes: two for each place."""
    return 2 * k


def log_odds(log_probs: Tensor) -> Tensor:
    """``log p / (1 - p)`` in float64; a certain candidate's is large but finite."""
    log_probs = log_probs.double()
    beside = torch.expm1(log_probs).neg_().masked_fill_(log_probs >= _CERTAIN, _REMAINS)
    return log_probs - beside.log_()


class _Weights(NamedTuple):
    """The candidates in descending order. Nothing here depends on the sizes of other requests, so no bit does."""

    best: Tensor  # float64 [B, k], log w of the first
    shares: Tensor  # float64 [B, n], w in terms of that of the last place that a set of the request's size needs
    order: Tensor  # int64 [B, n], their places in the list


def _weigh(log_probs: Tensor, sizes: Tensor, k: int) -> _Weights:
    found, order = log_probs.sort(dim=1, descending=True, stable=True)
    best = torch.nn.functional.pad(log_odds(found[:, :k]), (0, max(0, k - found.shape[1])), value=-torch.inf)
    last = best.gather(1, (sizes - 1).clamp(min=0)[:, None])
    exact = found.double()
    shares = (exact - last.clamp(min=_LOWEST)).clamp_(max=0.0).exp_()
    return _Weights(best, shares.div_(torch.expm1(exact).neg_().clamp_(min=_REMAINS)), order)


def _tables(weights: _Weights, sizes: Tensor, log_tail: Tensor) -> tuple[_Tables, _Tables]:
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
        torch.sub(start_at, safe, out=table[..., 0]).exp_()
        torch.mul(before[..., :-1], both, out=table[..., 1:]).mul_(less)
        torch.mul(before[0, :, :near], share[0], out=table[0, :, 1 : 1 + near])
        torch.mul(before[1, :, n - near : -1], share[1], out=table[1, :, 1 + n - near :])
        table[..., 1:].mul_(factor)
        torch.cumsum(table, 2, out=table)
        most = table[..., -1]
        scales.append(scale)
    all_scales = torch.stack(scales, 1)
    return _Tables(values[:, 0], all_scales[0]), _Tables(values[:, 1], all_scales[1])


def _clashes(m: Tensor, squares: Tensor, cubes: Tensor) -> tuple[Tensor, Tensor]:
    """``t_m m! / T^m`` and y_m, for m float64 ``[k + 1, 1]`` tail items, s and c float64 ``[P]``."""
    pairs = m * (m - 1) / 2
    triples, fours = pairs * (m - 2) / 3, pairs * (m - 2) * (m - 3) / 12
    clash = pairs * squares
    differ = 1 - clash.clamp(max=0.5)
    return differ, torch.where(clash > 0.5, 1.0, (3 * triples * cubes + 3 * fours * squares * squares) / differ)


class _Tail(NamedTuple):
    """What the error of pi depends on, for P places."""

    law: Tensor  # float64 [k + 1, P], chances of the numbers m of tail items
    m: Tensor  # float64 [k + 1, 1]
    most: Tensor  # int64 [P], the largest m
    squares: Tensor  # float64 [P], s
    cubes: Tensor  # float64 [P], c
    share: Tensor  # float64 [P], w / T of the item at the place
    error: Tensor  # float64 [P], relative, of T


def _error(pi: Tensor, in_tail: Tensor, tail: _Tail) -> Tensor:
    """The bound at the top of this page on the error of each pi float64 ``[P]``, of a tail item where ``in_tail``."""
    law, m = tail.law, tail.m
    differ, y = _clashes(m, tail.squares, tail.cubes)
    z = y + (1 - differ + (m - 1).clamp(min=0) * tail.share) / differ
    mean, mean_y = (law * m).sum(0), (law * y).sum(0)
    largest = y.masked_fill(m > tail.most, 0.0).amax(0)
    listed = torch.minimum(pi * mean_y, (1 - pi) * largest)
    error = 2 * torch.where(in_tail, pi * (law * m * z).sum(0) / mean, listed) / (1 - mean_y)
    error = error + pi * torch.where(in_tail, 1.0, mean) * tail.error
    return error.masked_fill(mean_y >= 1, 1.0).clamp_(max=1.0)


def conditional_poisson(
    log_probs: Tensor,
    sizes: Tensor,
    k: int,
    words: Tensor,
    tail: Tensor | None = None,
    tail_log_probs: Tensor | None = None,
    tail_squares: Tensor | None = None,
    tail_max: Tensor | None = None,
    tail_error: Tensor | None = None,
    tail_more: Tensor | None = None,
) -> PoissonSample:
    """Draw a set of ``sizes`` candidates of each request, in proportion to the product of their odds p / (1 - p).

    Candidates with log p >= -1e-7 are certain. Where there are ``sizes`` candidates or fewer, all are taken. The first
    four arguments about the tail come together.

    Args:
        log_probs: float32 ``[B, n]``, log p of the candidates listed, in any order; -inf or NaN where there is none.
        sizes: int64 ``[B]``, in 0 .. k.
        k: places in a sample.
        words: int64 ``[B, W]``, random words in 0 .. 2^32 - 1, ``W >= words_needed(k)``.
        tail: float32 ``[B]``, log of the total odds of the candidates not listed; -inf where there is none.
        tail_log_probs: float32 ``[B, k]``, log p of the first ``k`` of them drawn one after the other in proportion to
            their odds, in that order; -inf behind the last if there are fewer.
        tail_squares: float32 ``[B]``, log of the sum of their squared odds.
        tail_max: float32 ``[B]``, log of the largest odds among them, or of a bound on it.
        tail_error: float32 ``[B]``, bound on the relative error of ``exp(tail)``; default 0.
        tail_more: bool ``[B]``, whether the tail has more items than ``tail_log_probs``; default where that is full.

    Returns:
        The sample: exact in law and in ``log_inclusion`` for candidates listed, up to ``bound`` with a tail.
    """
    check_tensor("log_probs", log_probs)
    check_shape("log_probs", log_probs, "[B, n]", None, None)
    batch, n = log_probs.shape
    check_range("k", k, 1)
    if n == 0:
        raise ValueError(f"log_probs: expected at least one column, got shape {[batch, n]}")
    given = {
        "log_probs": log_probs,
        "tail": tail,
        "tail_log_probs": tail_log_probs,
        "tail_squares": tail_squares,
        "tail_max": tail_max,
    }
    present = {name: tensor for name, tensor in given.items() if tensor is not None}
    if len(present) not in (1, 5):
        raise ValueError(f"tail: expected it with its log_probs, squares and max, got {', '.join(present)}")
    for name, tensor in present.items():
        check_dtype(name, tensor, torch.float32)
        if name.endswith("_probs"):
            check_shape(name, tensor, "[B, k]", batch, n if name == "log_probs" else k)
        else:
            check_shape(name, tensor, "[B]", batch)
    check_dtype("sizes", sizes, torch.int64)
    check_shape("sizes", sizes, "[B]", batch)
    check_dtype("words", words, torch.int64)
    check_shape("words", words, "[B, W]", batch, None)
    if words.shape[1] < words_needed(k):
        raise ValueError(f"words: expected {words_needed(k)} columns or more, got {words.shape[1]}")
    if tail_error is not None:
        check_dtype("tail_error", tail_error, torch.float32)
        check_shape("tail_error", tail_error, "[B]", batch)
    check_same_device(sizes=sizes, words=words, tail_error=tail_error, **present)
    if batch == 0:
        return PoissonSample(sizes.new_empty(0, k), log_probs.new_empty(0, k), log_probs.new_empty(0))

    log_probs = log_probs.masked_fill(log_probs != log_probs, -torch.inf)
    everything, reach = log_probs, torch.zeros_like(sizes)
    count = torch.arange(k + 1, device=sizes.device)[:, None]
    log_tail = torch.where(count == 0, 0.0, -torch.inf).double().expand(-1, batch)  # log t_m, [k + 1, B]
    if tail is not None and tail_log_probs is not None and tail_squares is not None and tail_max is not None:
        has_tail = tail > -torch.inf  # False for NaN
        tail = tail.double().masked_fill(~has_tail, -torch.inf)
        tail_log_probs = tail_log_probs.masked_fill(~has_tail[:, None], -torch.inf)
        reach = (tail_log_probs > -torch.inf).sum(1)  # the number of items in the tail, or k
        everything = torch.cat((log_probs, tail_log_probs), 1)
        power = torch.where(count == 0, 0.0, count * tail.masked_fill(~has_tail, 0.0))
        squares = (tail_squares.double() - 2 * tail).exp_().masked_fill_(~has_tail, 0.0)
        cubes = squares * (tail_max.double() - tail).exp_().masked_fill_(~has_tail, 0.0)
        unlimited = power - torch.lgamma(count + 1.0) + _clashes(count.double(), squares, cubes)[0].log()
        log_tail = unlimited.masked_fill(count > reach, -torch.inf)
    available = (log_probs > -torch.inf).sum(1) + reach
    certain = available <= sizes
    sizes = torch.minimum(sizes, available)

    weights = _weigh(log_probs, sizes, k)
    before, behind = _tables(weights, sizes, log_tail)

    # draw: of the `left` items still to be chosen from the last `at` places on, the next is `place` places from the end
    request = torch.arange(batch, device=sizes.device)
    left = (sizes - torch.arange(k, device=sizes.device)[:, None]).clamp(min=0)  # [k, B]
    tables = behind.values[left, request].unbind(0)
    targets = (1 - uniforms(words[:, : 2 * k])).t()[:, :, None].unbind(0)
    at, places = torch.full_like(sizes, n)[:, None], []
    for table, target in zip(tables, targets, strict=True):
        place = torch.searchsorted(table, table.gather(1, at) * target)
        places.append(place)  # 0 for an item of the tail: so are the others then
        at = (place - 1).clamp_(min=0)
    to_come = torch.cat(places, 1)  # [B, k]
    taken = (to_come > 0).sum(1, keepdim=True)

    # pi of what was drawn
    i = n - to_come.clamp(min=1)
    listed_place = weights.order.gather(1, i)
    log_w = log_odds(log_probs.gather(1, listed_place))
    a = count[:-1, :, None]
    rest = (sizes[:, None] - 1 - a).clamp(min=0)  # [k, B, 1]
    first = before.values[:-1].gather(2, i.expand(k, -1, -1))
    last = behind.values[rest, request[:, None], n - 1 - i]
    all_of_them = behind.values[sizes, request, -1]
    whole = behind.scale.gather(0, sizes[None]) + all_of_them.log()  # log S_K
    scale = before.scale[:-1] + behind.scale.gather(0, rest[:, :, 0]) - whole
    term = (scale[:, :, None] + log_w).clamp(max=700.0).exp() * first * last
    pi = term.masked_fill(a >= sizes[:, None], 0.0).nan_to_num(0.0).cumsum(0)[-1]  # in order

    rank = torch.arange(k, device=sizes.device)
    item = torch.where(rank < taken, listed_place, log_probs.shape[1] + rank - taken)
    none = rank >= sizes[:, None]
    item.masked_fill_(none, 0)
    bound = torch.zeros_like(tail) if tail is not None else before.scale.new_zeros(batch)
    chosen_log_probs = everything.gather(1, item).masked_fill_(none, -torch.inf)
    if tail is not None:
        # the law of the number m of tail items: t_m E_{K-m}
        listed = before.scale + before.values[:, :, -1].log()
        listed_scale = listed.gather(0, (sizes - count).clamp(min=0)).masked_fill(count > sizes, -torch.inf)
        law = (log_tail + listed_scale - whole).exp().repeat_interleave(k, 1)  # [k + 1, B * k]
        m = count.double()
        share = (log_odds(chosen_log_probs) - tail[:, None]).exp_().nan_to_num(0.0)
        in_tail = rank >= taken
        pi = torch.where(in_tail, share * (law * m).sum(0).view(batch, k), pi)
        relative = torch.zeros_like(squares) if tail_error is None else tail_error.double().masked_fill(~has_tail, 0.0)
        facts = _Tail(
            law,
            m,
            most=torch.minimum(sizes, reach).repeat_interleave(k),
            squares=squares.repeat_interleave(k),
            cubes=cubes.repeat_interleave(k),
            share=share.flatten(),
            error=relative.repeat_interleave(k),
        )
        error = _error(pi.flatten(), in_tail.flatten(), facts).nan_to_num(0.0).view(batch, k)
        if tail_more is not None:  # the chance that the set would have had more of them
            beyond = torch.where((count > reach) & tail_more, unlimited + listed_scale - whole, -torch.inf).exp()
            error = (error + beyond.sum(0)[:, None]).clamp(max=1.0)
        bound = error.masked_fill(none | certain[:, None], 0.0).amax(1)
    sure = none | certain[:, None] | (chosen_log_probs >= _CERTAIN)
    log_pi = pi.log().clamp_(max=0.0).masked_fill_(sure, 0.0)
    chosen_log_probs, order = chosen_log_probs.sort(dim=1, descending=True, stable=True)
    chosen = item.masked_fill_(none, -1).gather(1, order)
    return PoissonSample(chosen, log_pi.gather(1, order).float(), bound.float())
