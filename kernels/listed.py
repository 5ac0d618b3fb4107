"""Deciding among the tokens an automaton lists, gathering their logits instead of masking whole rows.

Every field is bitwise what the pass with the bitmask of the list gives; which of the two is cheaper depends on how long
the lists are.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .automaton import Edges, check_edges
from .checks import (
    check_candidates,
    check_dtype,
    check_normalize,
    check_range,
    check_rows,
    check_same_device,
    check_shape,
    contiguous,
)
from .listed_select import select_listed_op
from .listed_summary import summarize_listed_op
from .listed_top import top_listed_op
from .lse import row_lse_op
from .select import Candidates, check_parents, flatten_rows
from .summary import summarize_op


class Listed(NamedTuple):
    """The tokens that rows may take: the allowed edges of their states, and the ends of those that may end."""

    edges: Edges  # tokens below the vocabulary's size, none of them an end
    states: Tensor  # int32 [R]; -1 allows nothing
    window: Tensor | None  # int32 [R, L], see listed_bitmask; None: every edge is allowed
    may_end: Tensor | None  # bool [R]; None: no row


def _check_listed(listed: Listed, logits: Tensor) -> tuple[Tensor | None, ...]:
    """Check a list for rows ``[R, V]`` of logits, and return its tensors as operations take them."""
    if not isinstance(listed, Listed):
        raise TypeError(f"listed: expected Listed, got {type(listed).__name__}")
    check_edges(listed.edges, listed.states, listed.window, logits.shape[0])
    if listed.may_end is not None:
        check_dtype("may_end", listed.may_end, torch.bool)
        check_shape("may_end", listed.may_end, "[R]", logits.shape[0])
    check_same_device(logits=logits, states=listed.states, may_end=listed.may_end)
    return (*listed.edges, contiguous(listed.states), contiguous(listed.window))


def _check_ends(ends: Tensor | None, logits: Tensor) -> None:
    if ends is not None:
        check_dtype("ends", ends, torch.int64)
        check_shape("ends", ends, "[n]", None)
        check_same_device(logits=logits, ends=ends)


def summarize_listed(
    logits: Tensor,
    listed: Listed,
    *,
    bitmask: Tensor | None = None,
    temperature: Tensor | None = None,
    active: Tensor | None = None,
    ends: Tensor | None = None,
    vocab_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The sums of exponentials of tiles over listed tokens, reading the logits of those alone.

    Bitwise equal to ``tile_ref`` and ``tile_sum`` of :func:`summarize` with the bitmask of the list and
    ``normalize="allowed"``.

    Args:
        logits: ``[R, V]`` float32, float16 or bfloat16; unit stride over ``V``.
        listed: what is normalised over.
        bitmask: ``[R, ceil(V / 32)]`` int32, what of it counts, ends included.
        temperature: ``[R]`` float32 above 0.
        active: ``[R]`` bool; rows that are not are not read.
        ends: ``[n]`` int64, normalised over too in rows that may end.
        vocab_size: columns from here on are padding.

    Returns:
        ``tile_ref``, logits dtype ``[R, N]``, and ``tile_sum``, float32 ``[R, N]``: see ``Tiles``.

    Raises:
        ValueError, TypeError: ``<argument>: expected X, got Y``.
    """
    vocab_size = check_rows(logits, vocab_size, bitmask, temperature)
    check_candidates(logits, active, None)
    _check_ends(ends, logits)
    edges = _check_listed(listed, logits)
    given = contiguous(temperature), contiguous(active), contiguous(ends), contiguous(listed.may_end)
    tile_ref, tile_sum = summarize_listed_op(*edges, logits.detach(), vocab_size, bitmask, *given)
    return tile_ref, tile_sum


def top_listed(
    logits: Tensor,
    log_probs: Tensor,
    k: int,
    listed: Listed,
    *,
    bitmask: Tensor | None = None,
    temperature: Tensor | None = None,
    active: Tensor | None = None,
    ends: Tensor | None = None,
    divisor: Tensor | None = None,
    normalize: str = "vocab",
    vocab_size: int | None = None,
) -> Candidates:
    """Find each request's ``k`` best candidates among listed tokens, bitwise as :func:`top_candidates` would.

    Equivalent, in every bit, to ``top_candidates(..., bitmask=mask & bitmask, exclude=ends)`` where ``mask`` is
    :func:`listed_bitmask`, and the ends where ``listed.may_end``. With ``normalize="allowed"`` nothing but listed
    logits is read.

    Args:
        logits: ``[B, P, V]`` or ``[B * P, V]``.
        log_probs: ``[B, P]`` float32 of the parents; ``-inf`` marks a parent that is not expanded.
        k: candidates per request.
        listed: what may be chosen; its rows are the ``B * P`` parents.
        bitmask: ``[B * P, ceil(V / 32)]`` int32, or wider: what of it may be.
        temperature: ``[B * P]`` float32.
        active: ``[B * P]`` bool; other rows are not read.
        ends: ``[n]`` int64; normalised over in rows that may end, and no candidates.
        divisor: ``[B]`` float32 above 0; candidates rank by ``log_prob / divisor``.
        normalize: ``"vocab"`` or ``"allowed"``.
        vocab_size: columns from here on are padding.

    Returns:
        :class:`Candidates`.

    Raises:
        ValueError, TypeError: ``<argument>: expected X, got Y``.
    """
    rows = flatten_rows(logits)
    vocab_size = check_rows(rows, vocab_size, bitmask, temperature)
    check_range("k", k, 1)
    check_parents(rows, log_probs, divisor)
    check_candidates(rows, active, None)
    _check_ends(ends, rows)
    edges = _check_listed(listed, rows)
    log_probs, temperature, active = log_probs.detach().contiguous(), contiguous(temperature), contiguous(active)
    ends, may_end = contiguous(ends), contiguous(listed.may_end)
    if check_normalize(normalize):
        given = bitmask, temperature, active, ends, may_end, contiguous(divisor)
        chosen, parents, tokens, adjusted, lse, flags = top_listed_op(*edges, rows, log_probs, vocab_size, k, *given)
        return Candidates(chosen, parents, tokens, adjusted, lse, flags, chosen)
    _, _, tile_ref, tile_sum, _ = summarize_op(rows, vocab_size, None, temperature, active, None, False, False)
    lse, flags = row_lse_op(tile_ref, tile_sum, temperature)
    best: tuple[Tensor, Tensor, Tensor, Tensor] = select_listed_op(
        *edges, rows, log_probs, lse, vocab_size, k, bitmask, temperature, contiguous(divisor)
    )
    return Candidates(*best, lse, flags, best[0])
