"""The exact best ``k`` of all P * V candidates of each request, decided from the summary.

    log_prob(p, j) = log_probs[b, p] + min(x[p, j] / temperature - lse[p], 0)
    score(p, j)    = log_prob(p, j) / divisor[b]

Candidates are ordered by (score descending, parent p ascending, adjusted logit x / temperature descending, token j
ascending). Selection narrows tiles to groups to elements:

    the k best tiles  ->  the k + 63 best groups in them  ->  the k best elements in those

A set ranks by the key of its best element. Tiles are contiguous, so equal maxima are in order of the tile, and k tiles
are enough. A strided group's maximum does not say which token attains it, so equal maxima inside one tile are ranked
arbitrarily; at most 63 groups can jump ahead of the right one that way, and 63 more are taken. The number of values
looked at depends on P, V and k alone, but for a few that tie. The proof is in docs/algorithms/deciding.md.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .bitmask import bits_at
from .checks import (
    check_candidates,
    check_dtype,
    check_normalize,
    check_range,
    check_rows,
    check_same_device,
    check_shape,
    check_tensor,
    contiguous,
)
from .keys import lexsort_descending, pack_key
from .lse import row_lse_op
from .registration import register
from .summary import summarize_op
from .tiles import GROUPS, TILE

_WORST = torch.iinfo(torch.int64).min
_TIES = 32  # how many candidates that tie are taken along rather than told apart


class RowFormulas:
    """The formulas at the top of this page, for parts ``[B, n]`` of rows and their members ``[B, n, m]``."""

    def __init__(self, log_probs: Tensor, lse: Tensor, temperature: Tensor | None, divisor: Tensor | None):
        batch, parents = log_probs.shape
        lse = lse.view(batch, parents)
        finite = lse.abs() < torch.inf  # other rows have no candidates
        self.log_probs = torch.where(finite, log_probs, -torch.inf)
        self.lse = torch.where(finite, lse, 0.0)
        self.temperature = None if temperature is None else temperature.view(batch, parents)
        self.divisor = None if divisor is None else divisor[:, None]

    def adjust(self, x: Tensor, parent: Tensor) -> Tensor:
        """Adjusted logits ``[B, n * m]`` of logits ``x [B, n, m]`` in rows ``parent [B, n]``."""
        adjusted = x.float()
        if self.temperature is not None:
            adjusted = adjusted / self.temperature.gather(1, parent)[:, :, None]
        return adjusted.flatten(1)

    def log_prob(self, adjusted: Tensor, parent: Tensor) -> Tensor:
        """Cumulative log-probabilities ``[B, n * m]`` of adjusted logits ``[B, n * m]`` in rows ``parent [B, n]``."""
        members = adjusted.unflatten(1, (parent.shape[1], -1))
        increment = (members - self.lse.gather(1, parent)[:, :, None]).clamp_(max=0.0)
        return increment.add_(self.log_probs.gather(1, parent)[:, :, None]).flatten(1)

    def score(self, log_prob: Tensor) -> Tensor:
        """What candidates rank by."""
        return log_prob if self.divisor is None else log_prob / self.divisor


def _best(score: Tensor, n: int, keys: Callable[[], tuple[Tensor, Tensor]]) -> Tensor:
    """Positions, in any order, that include the ``n`` best of ``M`` candidates, by score ``[B, M]`` and then by keys.

    A few more than ``n`` come along where scores tie, which is cheaper than asking ``keys`` for the two keys ``[B, M]``
    of ``kernels/keys.py`` (distinct as pairs); only a long run of ties makes that worth while.
    """
    batch, size = score.shape
    if n >= size:
        return torch.arange(size, device=score.device).expand(batch, size)
    most = min(n + _TIES, size)
    values, place = score.topk(most)
    tied = (values >= values[:, n - 1 : n]) & (values > -torch.inf)  # what cannot be chosen need not be told apart
    count = max(n, int(tied.sum(1).max())) if batch else n
    if count < most or most == size:
        return place[:, :count]
    first, second = keys()
    threshold = first.topk(n, sorted=False).values.amin(-1, keepdim=True)
    chosen, above = first >= threshold, first > threshold
    need = n - above.sum(-1, keepdim=True)
    second = second.masked_fill(~(chosen & ~above), _WORST)
    chosen = above | (chosen & (second >= second.topk(n).values.gather(-1, need - 1)))
    return chosen.nonzero()[:, 1].view(batch, n)


def _members(parts: Tensor, size: int) -> Tensor:
    """What ``parts [B, n]`` say of themselves, for each of their ``size`` members ``[B, n * size]``."""
    return parts[:, :, None].expand(-1, -1, size).flatten(1)


def _narrow(score: Tensor, adjusted: Tensor, parent: Tensor, token: Tensor, n: int) -> Tensor:
    """The ``n`` best, or some more, of the members ``token [B, m, size]`` of parts in rows ``parent [B, m]``."""

    def keys() -> tuple[Tensor, Tensor]:
        return pack_key(score, _members(parent, token.shape[2])), pack_key(adjusted, token.flatten(1))

    return _best(score, n, keys)


def _select(
    logits: Tensor,
    log_probs: Tensor,
    group_max: Tensor,
    tile_max: Tensor,
    lse: Tensor,
    vocab_size: int,
    k: int,
    bitmask: Tensor | None,
    temperature: Tensor | None,
    exclude: Tensor | None,
    divisor: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The torch definition."""
    batch, parents = log_probs.shape
    tiles = tile_max.shape[1]
    device = logits.device
    rows = RowFormulas(log_probs, lse, temperature, divisor)

    # tiles of rows
    parent = torch.arange(parents, device=device).expand(batch, -1)
    token = torch.arange(0, tiles * TILE, TILE, device=device).expand(batch, parents, -1)  # a tile's lowest
    adjusted = rows.adjust(tile_max.view(batch, parents, tiles), parent)
    score = rows.score(rows.log_prob(adjusted, parent))
    place = _narrow(score, adjusted, parent, token, k)
    parent, tile = place // tiles, place % tiles

    # groups of tiles
    x = group_max.view(batch, parents * tiles, GROUPS).gather(1, place[:, :, None].expand(-1, -1, GROUPS))
    token = (tile * TILE)[:, :, None] + torch.arange(GROUPS, device=device)  # a group's lowest
    adjusted = rows.adjust(x, parent)
    score = rows.score(rows.log_prob(adjusted, parent))
    place = _narrow(score, adjusted, parent, token, k + GROUPS - 1)
    parent, lowest = parent.gather(1, place // GROUPS), token.flatten(1).gather(1, place)

    # elements of groups
    reach = min(TILE, -(-vocab_size // GROUPS) * GROUPS)  # a small vocabulary does not fill its groups
    token = lowest[:, :, None] + torch.arange(0, reach, GROUPS, device=device)
    row = (parent + torch.arange(0, batch * parents, parents, device=device)[:, None])[:, :, None]
    barred = token >= vocab_size
    inside = token.clamp(max=vocab_size - 1)
    if bitmask is not None:
        barred |= ~bits_at(bitmask, row, inside)
    for excluded in [] if exclude is None else exclude:
        barred |= token == excluded
    x = logits[row, inside]
    barred |= x != x  # NaN counts as -inf
    return best_elements(rows, x.masked_fill_(barred, -torch.inf), parent, token, k)


def best_elements(
    rows: RowFormulas, x: Tensor, parent: Tensor, token: Tensor, k: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The ``k`` best tokens ``[B, n, m]`` of logits ``x [B, n, m]`` in rows ``parent [B, n]``, in the total order.

    Returns log-probabilities, parents, tokens and adjusted logits, ``[B, k]`` each.
    """
    adjusted = rows.adjust(x, parent)
    log_prob = rows.log_prob(adjusted, parent)
    score = rows.score(log_prob)
    place = _narrow(score, adjusted, parent, token, k)
    parent, token = parent.gather(1, place // token.shape[2]), token.flatten(1).gather(1, place)
    score, adjusted, log_prob = (field.gather(1, place) for field in (score, adjusted, log_prob))
    order = _in_order(score, adjusted, parent, token)[:, :k]
    log_prob, parent, token, adjusted = (field.gather(1, order) for field in (log_prob, parent, token, adjusted))

    # places without a candidate: ids in range, and equal to what the kernel writes
    invalid = log_prob == -torch.inf
    if bool(invalid.any()):
        parent, token = parent.masked_fill(invalid, 0), token.masked_fill(invalid, 0)
        adjusted = adjusted.masked_fill(invalid, -torch.inf)
    missing = k - log_prob.shape[1]
    if missing > 0:
        pad = torch.nn.functional.pad
        log_prob, adjusted = (pad(field, (0, missing), value=-torch.inf) for field in (log_prob, adjusted))
        parent, token = pad(parent, (0, missing)), pad(token, (0, missing))
    return log_prob, parent, token, adjusted


def _in_order(score: Tensor, adjusted: Tensor, parent: Tensor, token: Tensor) -> Tensor:
    """Positions that put candidates ``[B, n]`` in the total order."""
    ordered, order = score.sort(dim=1, descending=True)
    if bool((ordered[:, 1:] == ordered[:, :-1]).any()):
        return lexsort_descending(pack_key(score, parent), pack_key(adjusted, token))
    return order


def _fake_select(
    logits: Tensor,
    log_probs: Tensor,
    group_max: Tensor,
    tile_max: Tensor,
    lse: Tensor,
    vocab_size: int,
    k: int,
    bitmask: Tensor | None,
    temperature: Tensor | None,
    exclude: Tensor | None,
    divisor: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    floats = log_probs.new_empty(log_probs.shape[0], k)
    ids = floats.new_empty(floats.shape, dtype=torch.int64)
    return floats, ids, torch.empty_like(ids), torch.empty_like(floats)


_select_op = register(
    "select(Tensor logits, Tensor log_probs, Tensor group_max, Tensor tile_max, Tensor lse, SymInt vocab_size, "
    "SymInt k, Tensor? bitmask, Tensor? temperature, Tensor? exclude, Tensor? divisor) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _select,
    _fake_select,
    "select",
)


class Candidates(NamedTuple):
    """The best candidates of each request in the total order, and what deciding further needs. Rows are ``B * P``."""

    log_probs: Tensor  # float32 [B, k], cumulative, natural log; -inf where there is no candidate
    parents: Tensor  # int64 [B, k]
    tokens: Tensor  # int64 [B, k]
    adjusted: Tensor  # float32 [B, k], logit after temperature
    lse: Tensor  # float32 [B * P]
    flags: Tensor  # int32 [B * P], FLAG_NAN and FLAG_INF
    scores: Tensor  # float32 [B, k], what they rank by, before a length norm: log_probs, or those less penalties


def flatten_rows(logits: Tensor) -> Tensor:
    """Logits ``[B, P, V]`` or ``[R, V]`` as rows ``[R, V]``, without gradient."""
    check_tensor("logits", logits)
    if logits.dim() not in (2, 3):
        raise ValueError(f"logits: expected shape [B, P, V] or [R, V], got {list(logits.shape)}")
    return logits.detach().flatten(0, -2)


def check_parents(rows: Tensor, log_probs: Tensor, divisor: Tensor | None) -> None:
    """Check what says which rows ``[B * P, V]`` are expanded, and how their candidates rank."""
    check_dtype("log_probs", log_probs, torch.float32)
    check_shape("log_probs", log_probs, "[B, P]", None, None)
    if log_probs.numel() != rows.shape[0]:
        raise ValueError(f"log_probs: expected one per row of logits, {rows.shape[0]}, got {list(log_probs.shape)}")
    if divisor is not None:
        check_dtype("divisor", divisor, torch.float32)
        check_shape("divisor", divisor, "[B]", log_probs.shape[0])
    check_same_device(logits=rows, log_probs=log_probs, divisor=divisor)


def top_candidates(
    logits: Tensor,
    log_probs: Tensor,
    k: int,
    *,
    bitmask: Tensor | None = None,
    temperature: Tensor | None = None,
    active: Tensor | None = None,
    exclude: Tensor | None = None,
    divisor: Tensor | None = None,
    normalize: str = "vocab",
    vocab_size: int | None = None,
) -> Candidates:
    """Read the logits once and find each request's ``k`` best candidates: see :func:`select_beams`.

    Args:
        logits: ``[B, P, V]`` or ``[B * P, V]``.
        log_probs: ``[B, P]`` float32 of the parents; ``-inf`` marks a parent that is not expanded.
        k: candidates per request.
        bitmask: ``[B * P, ceil(V / 32)]`` int32, or wider.
        temperature: ``[B * P]`` float32.
        active: ``[B * P]`` bool; other rows are not read.
        exclude: ``[n]`` int64; tokens that are normalised over but are no candidates.
        divisor: ``[B]`` float32 above 0; candidates rank by ``log_prob / divisor``.
        normalize: ``"vocab"`` or ``"allowed"``.
        vocab_size: columns from here on are padding.

    Returns:
        :class:`Candidates`.

    Raises:
        ValueError: shapes, strides, devices or ranges differ from the above.
        TypeError: a dtype differs from the above.
    """
    rows = flatten_rows(logits)
    vocab_size = check_rows(rows, vocab_size, bitmask, temperature)
    check_range("k", k, 1)
    check_parents(rows, log_probs, divisor)
    check_candidates(rows, active, exclude)
    log_probs = log_probs.detach().contiguous()
    temperature, active, exclude = contiguous(temperature), contiguous(active), contiguous(exclude)
    renormalize = check_normalize(normalize)
    group_max, tile_max, tile_ref, tile_sum, _ = summarize_op(
        rows, vocab_size, bitmask, temperature, active, exclude, renormalize, False
    )
    lse, flags = row_lse_op(tile_ref, tile_sum, temperature)
    best: tuple[Tensor, Tensor, Tensor, Tensor] = _select_op(
        rows, log_probs, group_max, tile_max, lse, vocab_size, k, bitmask, temperature, exclude, divisor
    )
    return Candidates(*best, lse, flags, best[0])
