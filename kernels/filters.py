"""Which tokens top-k, top-p and min-p keep, as a bitmask, without sorting the vocabulary.

    a[j]    = x[j] / temperature, over the allowed tokens; those above -inf are ordered by (a descending, j ascending)
    mass[j] = round(exp(a[j] - max a) * 2^32)
    top_k:    the first k
    top_p:    of what top_k keeps, the shortest prefix with sum(mass) >= top_p * (their whole mass)
    min_p:    of what top_p keeps, those with a[j] - max a >= log(min_p)

Each keeps a prefix of the order, so all it takes is the value of the last token kept and how many of those that tie
with it are kept, the lower tokens first. Masses are integers: sums do not depend on their order, and ``top_p`` counts
as the multiple of 2^-30 at or below it, so that nine of ten equal tokens are enough for 0.9. The best token is always
kept; a row without tokens, or with +inf, keeps none.

On CPU the best values of a row come from the maxima of its groups; where top-p keeps more than 256, masses are first
summed by bins of the logits. On a GPU a program owns a row and finds the value by bisection.
"""

import math
import struct
from typing import NamedTuple

import torch
from torch import Tensor

from .bitmask import pack_bitmask, unpack_bitmask, words_of
from .checks import check_fraction, check_range, check_rows, check_tensor, contiguous
from .registration import register

P_BITS = 30
_ONE = 2.0**32
_WORD = 0xFFFFFFFF
_BLOCK = 1 << 20  # logits at a time: 4 MB of float32
_GROUP = 32
_FEW = 256  # where more are kept, bins are quicker
_BINS, _DEPTH = 4096, 23.0  # bins of exponents; masses end at exp(-22.9)
_MOST = torch.finfo(torch.float32).max


def parts_of(top_p: float) -> int:
    """``top_p`` as a multiple of 2^-30, rounded down."""
    return math.floor(top_p * 2**P_BITS)


def least_exponent(min_p: float) -> float:
    """The float32 nearest to log(min_p)."""
    return float(struct.unpack("f", struct.pack("f", math.log(min_p)))[0]) if min_p > 0 else -math.inf


def _masses(adjusted: Tensor, top: Tensor) -> Tensor:
    """int64 masses of ``adjusted [n, M]`` relative to the finite ``top [n]``."""
    return (adjusted - top[:, None]).clamp_(max=0.0).exp_().mul_(_ONE).add_(0.5).long()


def _target(mass: Tensor, parts: int) -> Tensor:
    """``ceil(mass * parts / 2^30)``, at least 1, for masses int64 below 2^57."""
    low = (mass & _WORD) * parts
    return ((mass >> 32) * parts * 4 + ((low + (1 << P_BITS) - 1) >> P_BITS)).clamp_(min=1)


def _best_values(adjusted: Tensor, count: int) -> Tensor:
    """The ``count`` greatest values ``[n, count]`` of ``adjusted [n, V]``, descending.

    They all lie in the ``count`` groups of greatest maxima: a greater value outside would make its group's greater.
    """
    columns = adjusted.shape[1] // _GROUP
    if 2 * count > columns:
        return adjusted.topk(count).values
    groups = adjusted[:, : columns * _GROUP].unflatten(1, (_GROUP, columns))
    best = groups.amax(1).topk(count, sorted=False).indices[:, None, :].expand(-1, _GROUP, -1)
    members = torch.cat([groups.gather(2, best).flatten(1), adjusted[:, columns * _GROUP :]], 1)
    return members.topk(count).values


class _Cut(NamedTuple):
    """Where a row is cut."""

    value: Tensor  # float32 [n], of the last token kept
    need: Tensor  # int64 [n], how many of those equal to it are kept
    surplus: Tensor  # bool [n], whether there may be more of them


def _cut_at(values: Tensor, last: Tensor) -> _Cut:
    """The cut at place ``last [n]`` of the best values ``[n, M]``, descending."""
    value = values.gather(1, last[:, None])
    need = last + 1 - (values > value).sum(1)
    return _Cut(value[:, 0], need, ((values == value).sum(1) > need) | (values[:, -1] == value[:, 0]))


def _cut_by_bins(adjusted: Tensor, top: Tensor, mass: Tensor, target: Tensor) -> _Cut:
    """Where top-p alone cuts rows ``adjusted [n, V]`` of ``mass [n, V]``: first the interval of values, then in it."""
    bins = (adjusted - top[:, None]).mul_(_BINS / -_DEPTH).clamp_(max=_BINS - 1).long()
    sums = mass.new_zeros(top.shape[0], _BINS).scatter_add_(1, bins, mass).cumsum(1)
    crossing = (sums < target[:, None]).sum(1)
    above = torch.nn.functional.pad(sums, (1, 0)).gather(1, crossing[:, None])
    cuts = []
    for row in range(top.shape[0]):
        values = adjusted[row, bins[row] == crossing[row]].sort(descending=True).values[None]
        last = (above[row] + _masses(values, top[row, None]).cumsum(1) < target[row]).sum(1)
        cuts.append(_cut_at(values, last))
    return _Cut(*(torch.cat(fields) for fields in zip(*cuts, strict=True)))


def _cut_top_p(adjusted: Tensor, top: Tensor, parts: int) -> _Cut:
    """Where top-p alone cuts rows ``adjusted [n, V]``."""
    mass = _masses(adjusted, top)
    target = _target(mass.sum(1), parts)
    values = _best_values(adjusted, min(_FEW, adjusted.shape[1]))
    sums = _masses(values, top).cumsum(1)
    cut = _cut_at(values, (sums < target[:, None]).sum(1).clamp_(max=values.shape[1] - 1))
    flat = (sums[:, -1] < target).nonzero()[:, 0]
    if flat.numel():
        for field, found in zip(cut, _cut_by_bins(adjusted[flat], top[flat], mass[flat], target[flat]), strict=True):
            field[flat] = found
    return cut


def _last_of_top_p(values: Tensor, top: Tensor, parts: int) -> Tensor:
    """The place ``[n]`` where top-p cuts what top-k keeps, ``values [n, k]``, descending."""
    sums = _masses(values, top).cumsum(1)
    return (sums < _target(sums[:, -1], parts)[:, None]).sum(1).clamp_(max=values.shape[1] - 1)


def keep_of_best(values: Tensor, top_p: float, min_p: float) -> Tensor:
    """bool ``[n, k]``: what top-p and min-p keep of the adjusted logits that top-k keeps, descending ``[n, k]``."""
    top = values[:, 0].clamp(min=-_MOST)
    keep = values > -torch.inf
    if top_p < 1:
        last = _last_of_top_p(values, top, parts_of(top_p))
        keep &= torch.arange(values.shape[1], device=values.device) <= last[:, None]
    return keep & (values - top[:, None] >= least_exponent(min_p))


def _filter_rows(
    x: Tensor, bitmask: Tensor | None, temperature: Tensor | None, top_k: int, top_p: float, min_p: float
) -> Tensor:
    """Words of the tokens kept of logits ``x [n, V]``."""
    vocab_size = x.shape[1]
    x = x.float()
    if temperature is not None:
        x = x / temperature[:, None]
    if bitmask is not None:
        x = x.masked_fill(~unpack_bitmask(bitmask, vocab_size), -torch.inf)
    top = x.amax(1)
    if bool(top.isnan().any()):  # rare, and values may be read here
        x = x.masked_fill(x.isnan(), -torch.inf)
        top = x.amax(1)
    valid = top.abs() < torch.inf
    if not bool(valid.all()):  # neither
        x, top = x.masked_fill(~valid[:, None], 0.0), top.masked_fill(~valid, 0.0)
    cut = None
    if 0 < top_k < vocab_size:
        values = _best_values(x, top_k)
        last = torch.full_like(top, top_k - 1, dtype=torch.int64)
        cut = _cut_at(values, last if top_p == 1 else _last_of_top_p(values, top, parts_of(top_p)))
    elif top_p < 1:
        cut = _cut_top_p(x, top, parts_of(top_p))
    if cut is None:
        kept = x >= -_MOST
    else:
        kept = x >= cut.value.clamp(min=-_MOST)[:, None]  # -inf is no token
        surplus = cut.surplus.nonzero()[:, 0]
        if surplus.numel():
            tie = x[surplus] == cut.value[surplus, None]
            kept[surplus] &= ~tie | (tie.cumsum(1) <= cut.need[surplus, None])
    if min_p > 0:
        kept &= x - top[:, None] >= least_exponent(min_p)
    return pack_bitmask(kept).masked_fill_(~valid[:, None], 0)


def _filter_bitmask(
    logits: Tensor,
    vocab_size: int,
    bitmask: Tensor | None,
    temperature: Tensor | None,
    top_k: int,
    top_p: float,
    min_p: float,
) -> Tensor:
    """The torch definition."""
    out: Tensor = _fake_filter_bitmask(logits, vocab_size, bitmask, temperature, top_k, top_p, min_p)
    size = max(1, _BLOCK // vocab_size)
    for start in range(0, logits.shape[0], size):
        rows = slice(start, start + size)
        some_bits = None if bitmask is None else bitmask[rows]
        some_temperature = None if temperature is None else temperature[rows]
        out[rows] = _filter_rows(logits[rows, :vocab_size], some_bits, some_temperature, top_k, top_p, min_p)
    return out


def _fake_filter_bitmask(
    logits: Tensor,
    vocab_size: int,
    bitmask: Tensor | None,
    temperature: Tensor | None,
    top_k: int,
    top_p: float,
    min_p: float,
) -> Tensor:
    return logits.new_empty((logits.shape[0], words_of(vocab_size)), dtype=torch.int32)


filter_bitmask_op = register(
    "filter_bitmask(Tensor logits, SymInt vocab_size, Tensor? bitmask, Tensor? temperature, int top_k, float top_p, "
    "float min_p) -> Tensor",
    _filter_bitmask,
    _fake_filter_bitmask,
    "filters",
)
"""int32 ``[R, ceil(V / 32)]``, set where a token of logits ``[R, V]`` is kept; 0, 1.0 and 0.0 leave a filter out."""


def filter_bitmask(
    logits: Tensor,
    *,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    bitmask: Tensor | None = None,
    temperature: Tensor | None = None,
    vocab_size: int | None = None,
) -> Tensor:
    """A bitmask of what ``top_k``, ``top_p`` and ``min_p`` keep of each row, in that order.

    Args:
        logits: ``[R, V]`` float32, float16 or bfloat16; unit stride over ``V``.
        top_k: the number of best tokens to keep, 1 or more.
        top_p: keep the fewest tokens whose mass is at least that, above 0 and at most 1.
        min_p: keep tokens at least that probable in terms of the best, 0 to 1.
        bitmask: int32 ``[R, ceil(V / 32)]``, what is there to choose from.
        temperature: float32 ``[R]``, divides the logits first.
        vocab_size: columns from here on are padding.

    Returns:
        int32 ``[R, ceil(vocab_size / 32)]``.

    Raises:
        ValueError, TypeError: ``<argument>: expected X, got Y``.
    """
    check_tensor("logits", logits)
    vocab_size = check_rows(logits, vocab_size, bitmask, temperature)
    if top_k is not None:
        check_range("top_k", top_k, 1)
    top_p = 1.0 if top_p is None else check_fraction("top_p", top_p, above_zero=True)
    min_p = 0.0 if min_p is None else check_fraction("min_p", min_p, above_zero=False)
    kept: Tensor = filter_bitmask_op(
        logits.detach(),
        vocab_size,
        bitmask,
        contiguous(temperature),
        0 if top_k is None else min(top_k, vocab_size),
        top_p,
        min_p,
    )
    return kept
