"""Deterministic automata over tokens: their edges, the step along one, and a state's edges as a bitmask.

A state's edges are sorted by :func:`~flashbeam.kernels.tiles.place`, the order in which a tile's sum merges its tokens,
so that a list of edges can be summed exactly as the pass sums a masked row (kernels/listed_summary.py), and an edge is
found by binary search. State -1 is dead: it allows nothing and leads nowhere. A ``window`` says after how many more
tokens a row may still be accepted; an edge is allowed if its target reaches acceptance in one of these numbers.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .bitmask import set_bits, words_of
from .checks import check_dtype, check_range, check_same_device, check_shape
from .registration import register
from .tiles import place

_MANY = 1 << 16  # edges of all rows from which on it pays to see which rows are alike


class Edges(NamedTuple):
    """A deterministic automaton over tokens, edges in rows of a compressed sparse matrix. Nothing is ever modified.

    Tokens of one state are distinct and in ascending ``place(token)``.
    """

    indptr: Tensor  # int32 [S + 1]: edges indptr[s] to indptr[s + 1] leave state s
    tokens: Tensor  # int32 [E]
    targets: Tensor | None  # int32 [E], or None: edge e leads to state e + 1 (a tree in breadth-first order)
    reach: Tensor  # int32 [S, L]: bit n % 32 of word n // 32: n more tokens can lead to acceptance; bit 0: accepting


def allowed_edges(
    indptr: Tensor, targets: Tensor | None, reach: Tensor, states: Tensor, window: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The allowed edges of ``states``, flattened: numbers of their rows and of the edges, int64 ``[M]`` both.

    Rows ascend and a row's edges keep their order. For torch definitions only: M is read.
    """
    state = states.clamp(min=0)
    first = indptr[state]
    count = (indptr[state + 1] - first).long().masked_fill_(states < 0, 0)
    last = count.cumsum(0)
    rows = torch.repeat_interleave(count)
    edges = torch.arange(rows.shape[0], device=rows.device) + (first - last + count).index_select(0, rows)
    if window is not None:
        following = edges + 1 if targets is None else targets.index_select(0, edges)
        meets = rows.new_zeros(rows.shape, dtype=torch.int32)
        for length in range(reach.shape[1]):
            meets |= reach[:, length].index_select(0, following) & window[:, length].index_select(0, rows)
        kept = meets.nonzero()[:, 0]
        if kept.shape != rows.shape:
            rows, edges = rows.index_select(0, kept), edges.index_select(0, kept)
    return rows, edges


def logits_at(logits: Tensor, rows: Tensor, tokens: Tensor) -> Tensor:
    """``logits[rows, tokens]`` of rows of unit stride, ``[M]``, in half the time. For torch definitions only."""
    count, columns = logits.shape
    if count == 0:
        return logits.new_empty(rows.shape)
    step = logits.stride(0)
    flat = logits.as_strided(((count - 1) * step + columns,), (1,))
    return flat.index_select(0, rows * step + tokens)


def _follow(indptr: Tensor, tokens: Tensor, targets: Tensor | None, states: Tensor, taken: Tensor) -> Tensor:
    """The torch definition."""
    alive = (states >= 0) & (taken >= 0)
    state = states.clamp(min=0)
    low, end = indptr[state], indptr[state + 1].masked_fill(~alive, 0)
    wanted = place(taken.clamp(min=0))
    high, edges = end, tokens.shape[0]
    if edges == 0 or states.shape[0] == 0:
        return states.new_full(states.shape, -1)
    for _ in range(int((high - low).amax().clamp(min=0)).bit_length()):  # the first edge whose place is not before
        middle = low + ((high - low) >> 1)  # low + high may leave int32
        before = (place(tokens[middle.clamp(max=edges - 1)]) < wanted) & (low < high)
        low, high = torch.where(before, middle + 1, low), torch.where(before, high, middle)
    edge = low.clamp(max=edges - 1)
    found = (low < end) & (tokens[edge] == taken)
    following = edge + 1 if targets is None else targets[edge]
    return following.int().masked_fill_(~found, -1)


def _fake_follow(indptr: Tensor, tokens: Tensor, targets: Tensor | None, states: Tensor, taken: Tensor) -> Tensor:
    return torch.empty_like(states, memory_format=torch.contiguous_format)


def _listed_bitmask(
    indptr: Tensor,
    tokens: Tensor,
    targets: Tensor | None,
    reach: Tensor,
    states: Tensor,
    window: Tensor | None,
    vocab_size: int,
) -> Tensor:
    """The torch definition. Rows that are alike are taken once where they have many edges."""
    state = states.clamp(min=0)
    alike = None
    if int((indptr[state + 1] - indptr[state]).sum(dtype=torch.int64)) > _MANY:
        keys = states[:, None] if window is None else torch.cat([states[:, None], window], 1)
        keys, alike = keys.unique(dim=0, return_inverse=True)
        states, window = keys[:, 0], None if window is None else keys[:, 1:]
    rows, edges = allowed_edges(indptr, targets, reach, states, window)
    listed = tokens.index_select(0, edges).long()
    bits = set_bits(rows, listed, states.shape[0], words_of(vocab_size))
    return bits if alike is None else bits.index_select(0, alike)


def _fake_listed_bitmask(
    indptr: Tensor,
    tokens: Tensor,
    targets: Tensor | None,
    reach: Tensor,
    states: Tensor,
    window: Tensor | None,
    vocab_size: int,
) -> Tensor:
    return states.new_empty(states.shape[0], words_of(vocab_size))


_follow_op = register(
    "follow(Tensor indptr, Tensor tokens, Tensor? targets, Tensor states, Tensor taken) -> Tensor",
    _follow,
    _fake_follow,
    "automaton",
)
_listed_bitmask_op = register(
    "listed_bitmask(Tensor indptr, Tensor tokens, Tensor? targets, Tensor reach, Tensor states, Tensor? window, "
    "SymInt vocab_size) -> Tensor",
    _listed_bitmask,
    _fake_listed_bitmask,
    "automaton",
)


def check_edges(edges: Edges, states: Tensor, window: Tensor | None, rows: int | None = None) -> None:
    """Check an automaton and where the rows are in it."""
    if not isinstance(edges, Edges):
        raise TypeError(f"edges: expected Edges, got {type(edges).__name__}")
    for name, field in edges._asdict().items():
        if field is not None or name != "targets":
            check_dtype(f"edges.{name}", field, torch.int32)
    check_shape("edges.indptr", edges.indptr, "[S + 1]", None)
    check_shape("edges.tokens", edges.tokens, "[E]", None)
    check_shape("edges.reach", edges.reach, "[S, L]", edges.indptr.shape[0] - 1, edges.reach.shape[-1])
    if edges.targets is not None:
        check_shape("edges.targets", edges.targets, "[E]", edges.tokens.shape[0])
    for name, field in edges._asdict().items():
        if field is not None and not field.is_contiguous():
            raise ValueError(f"edges.{name}: expected a contiguous tensor, got strides {tuple(field.stride())}")
    check_dtype("states", states, torch.int32)
    check_shape("states", states, "[R]", rows)
    if window is not None:
        check_dtype("window", window, torch.int32)
        check_shape("window", window, "[R, L]", states.shape[0], edges.reach.shape[1])
    check_same_device(
        **{f"edges.{name}": field for name, field in edges._asdict().items()}, states=states, window=window
    )


def follow(edges: Edges, states: Tensor, tokens: Tensor) -> Tensor:
    """Where ``tokens`` lead from ``states``.

    Args:
        edges: the automaton.
        states: int32 ``[n]``; -1 is dead.
        tokens: int64 ``[n]``.

    Returns:
        int32 ``[n]``: the target of the edge; -1 where the state is dead or has no such edge.

    Raises:
        ValueError, TypeError: ``<argument>: expected X, got Y``.
    """
    check_edges(edges, states, None)
    check_dtype("tokens", tokens, torch.int64)
    check_shape("tokens", tokens, "[n]", states.shape[0])
    check_same_device(states=states, tokens=tokens)
    return _follow_op(edges.indptr, edges.tokens, edges.targets, states.contiguous(), tokens.contiguous())


def listed_bitmask(edges: Edges, states: Tensor, window: Tensor | None, vocab_size: int) -> Tensor:
    """The tokens of the allowed edges of ``states`` as a bitmask.

    Args:
        edges: the automaton; its tokens are below ``vocab_size``.
        states: int32 ``[R]``; -1 is dead and allows nothing.
        window: int32 ``[R, L]``, bits of the numbers of tokens, after the next one, at which a row may still be
            accepted: an edge is allowed if ``any(reach[target] & window[row])``. None: every edge is allowed.
        vocab_size: number of tokens.

    Returns:
        int32 ``[R, ceil(vocab_size / 32)]``. EOS is no edge: whoever knows the accepting states adds it.

    Raises:
        ValueError, TypeError: ``<argument>: expected X, got Y``.
    """
    check_edges(edges, states, window)
    check_range("vocab_size", vocab_size, 1)
    window = None if window is None else window.contiguous()
    return _listed_bitmask_op(*edges, states.contiguous(), window, vocab_size)
