"""Conditional Poisson sampling (Hajek 1964; Meister et al. 2021): a set of fixed size, in proportion to its odds.

    w = p / (1 - p),    Q(Y) = prod_{i in Y} w_i / e_K(w),    pi_i = w_i e_{K-1}(w without i) / e_K(w)

with e_m the elementary symmetric polynomials. Tables of them (kernels/symmetric.py), E_a of the candidates before a
place and S_b of those from a place on, in descending order 1 .. n, hold everything. A set is drawn from S: with b items
still to be chosen from place i on, the next one is beyond place j with chance S_b[j + 1] / S_b[i], so K searches in
sorted tables find it.

    pi_i = w_i * sum over a of E_a[i - 1] S_{K-1-a}[i + 1] / S_K[1]

Candidates may be left out of the list: see kernels/poisson_tail.py.

Plain torch and no operation of its own: some hundred small tensor operations, for any device; none synchronises, so a
graph may record them. A request's results do not depend on its batch.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .checks import check_dtype, check_range, check_same_device, check_shape, check_tensor
from .poisson_tail import TailFacts, clashes, error_bound
from .random import uniforms
from .symmetric import CERTAIN, log_odds, tables_of, weigh


class PoissonSample(NamedTuple):
    """A sample of each request, most probable items first."""

    chosen: Tensor  # int64 [B, k], places in the list; n + j is item j of the tail, -1 no item
    log_inclusion: Tensor  # float32 [B, k], log pi; 0 for certain items, and where there is none
    bound: Tensor  # float32 [B], on the absolute error of any pi above that the treatment of the tail makes


def words_needed(k: int) -> int:
    """How many random words a request takes: two for each place."""
    return 2 * k


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
        unlimited = power - torch.lgamma(count + 1.0) + clashes(count.double(), squares, cubes)[0].log()
        log_tail = unlimited.masked_fill(count > reach, -torch.inf)
    available = (log_probs > -torch.inf).sum(1) + reach
    certain = available <= sizes
    sizes = torch.minimum(sizes, available)

    weights = weigh(log_probs, sizes, k)
    before, behind = tables_of(weights, sizes, log_tail)

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
        facts = TailFacts(
            law,
            m,
            most=torch.minimum(sizes, reach).repeat_interleave(k),
            squares=squares.repeat_interleave(k),
            cubes=cubes.repeat_interleave(k),
            share=share.flatten(),
            error=relative.repeat_interleave(k),
        )
        error = error_bound(pi.flatten(), in_tail.flatten(), facts).nan_to_num(0.0).view(batch, k)
        if tail_more is not None:  # the chance that the set would have had more of them
            beyond = torch.where((count > reach) & tail_more, unlimited + listed_scale - whole, -torch.inf).exp()
            error = (error + beyond.sum(0)[:, None]).clamp(max=1.0)
        bound = error.masked_fill(none | certain[:, None], 0.0).amax(1)
    sure = none | certain[:, None] | (chosen_log_probs >= CERTAIN)
    log_pi = pi.log().clamp_(max=0.0).masked_fill_(sure, 0.0)
    chosen_log_probs, order = chosen_log_probs.sort(dim=1, descending=True, stable=True)
    chosen = item.masked_fill_(none, -1).gather(1, order)
    return PoissonSample(chosen, log_pi.gather(1, order).float(), bound.float())
