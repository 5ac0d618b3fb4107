"""The sums of tiles from a list of tokens: bitwise what the pass finds, without reading the rest of the row.

The sum of a tile is a fixed tree (kernels/tiles.py). A token that is not listed adds exp(-inf) = 0 to it and changes no
bit, so merging the listed tokens along the tree gives the sum itself. See docs/numerics.md.
"""

import torch
from torch import Tensor

from .automaton import allowed_edges, logits_at
from .bitmask import bits_at
from .exponential import LOG2E, evenly_split
from .registration import register
from .tiles import TILE, place, tiles_of

MOST = torch.finfo(torch.float32).max


def _new_sums(logits: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    rows, tiles = logits.shape[0], tiles_of(vocab_size)
    return logits.new_empty(rows, tiles), logits.new_empty(rows, tiles, dtype=torch.float32)


def _with_ends(
    rows: Tensor, listed: Tensor, keys: Tensor, ends: Tensor, may_end: Tensor, span: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, tokens and keys ``[M]`` and those of the distinct ``ends`` of rows that may end, in order of the keys."""
    ends = ends[place(ends).argsort()]
    ending = may_end.nonzero()[:, 0]
    more_rows, more = ending.repeat_interleave(ends.shape[0]), ends.repeat(ending.shape[0])
    more_keys = more_rows * span + place(more)
    before = torch.searchsorted(keys, more_keys)  # both ascend, so merging needs no sort
    shift = torch.bincount(before, minlength=keys.shape[0] + 1).cumsum(0)[:-1]
    places = torch.cat([shift, before])
    places += torch.cat([torch.arange(n, device=rows.device) for n in (keys.shape[0], more.shape[0])])
    return tuple(  # type: ignore[return-value]
        torch.empty_like(places).scatter_(0, places, torch.cat(pair))
        for pair in ((rows, more_rows), (listed, more), (keys, more_keys))
    )


def _merge(values: Tensor, keys: Tensor) -> Tensor:
    """Add up ``values [M]`` of each tile in the first of them; ``keys``, tiles above places, ascend and are distinct.

    Returns whether a value is the first of its tile. A segment is what is merged so far; its first value holds its sum.
    """
    size = values.shape[0]
    apart = keys[1:] ^ keys[:-1]  # its highest bit says at which level neighbours meet
    first = torch.cat([apart.new_ones(min(size, 1), dtype=torch.bool), apart >= TILE])
    left = torch.arange(-1, size, device=keys.device)  # the first value of the segment that ends before a value
    last = torch.arange(size, device=keys.device)  # the last value of the segment that begins with a value
    meets = torch.frexp(apart.clamp(max=TILE).float()).exponent.to(torch.int8)  # level + 1: small numbers are compared
    for level in range(TILE.bit_length() - 1):
        right = (meets == level + 1).nonzero()[:, 0] + 1
        if right.shape[0] > 0:
            into, end = left.index_select(0, right), last.index_select(0, right)
            values.index_add_(0, into, values.index_select(0, right))  # distinct, so each is one addition
            last.index_copy_(0, into, end)
            left.index_copy_(0, end + 1, into)
    return first


def _summarize_listed(
    indptr: Tensor,
    tokens: Tensor,
    targets: Tensor | None,
    reach: Tensor,
    states: Tensor,
    window: Tensor | None,
    logits: Tensor,
    vocab_size: int,
    bitmask: Tensor | None,
    temperature: Tensor | None,
    active: Tensor | None,
    ends: Tensor | None,
    may_end: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The torch definition."""
    if active is not None:
        states = states.masked_fill(~active, -1)
        may_end = None if may_end is None else may_end & active
    rows, edges = allowed_edges(indptr, targets, reach, states, window)
    rows, listed = allowed_tokens(rows, tokens.index_select(0, edges).long(), bitmask)
    x = logits_at(logits, rows, listed)
    return sum_listed(rows, listed, x, logits, vocab_size, bitmask, temperature, ends, may_end)


def allowed_tokens(rows: Tensor, listed: Tensor, bitmask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Of rows and tokens ``[M]`` those that the bitmask allows."""
    if bitmask is None:
        return rows, listed
    kept = bits_at(bitmask, rows, listed).nonzero()[:, 0]
    return rows.index_select(0, kept), listed.index_select(0, kept)


def sum_listed(
    rows: Tensor,
    listed: Tensor,
    x: Tensor,
    logits: Tensor,
    vocab_size: int,
    bitmask: Tensor | None,
    temperature: Tensor | None,
    ends: Tensor | None,
    may_end: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """``tile_ref`` and ``tile_sum`` over listed tokens and their logits ``x [M]``, and over the ends of rows."""
    tile_ref, tile_sum = _new_sums(logits, vocab_size)
    span = tile_ref.shape[1] * TILE
    keys = rows * span + place(listed)
    x = x.float()
    if ends is not None and may_end is not None and bool(may_end.any()):
        known = ends[(ends >= 0) & (ends < vocab_size)].unique()
        rows, listed, keys = _with_ends(rows, listed, keys, known, may_end, span)
        if bitmask is not None:
            kept = bits_at(bitmask, rows, listed).nonzero()[:, 0]
            rows, listed, keys = rows[kept], listed[kept], keys[kept]
        x = logits_at(logits, rows, listed).float()
    tile = keys >> (TILE.bit_length() - 1)
    nan = x.isnan()
    x = x.masked_fill(nan, -torch.inf)
    ref = tile_sum.new_full((tile_sum.numel(),), -torch.inf).scatter_reduce_(0, tile, x, "amax")
    tile_ref.copy_(ref.view(tile_ref.shape))
    # the same operations as the pass on a workspace of the same kind: see kernels/exponential.py
    work = x.new_empty(evenly_split(x.shape[0]))
    found = work[: x.shape[0]]
    torch.sub(x, ref.index_select(0, tile).clamp_(-MOST, MOST), out=found)
    found.mul_(LOG2E if temperature is None else (LOG2E / temperature).index_select(0, rows))
    work.exp2_()
    first = _merge(found, keys).nonzero()[:, 0]
    flat = tile_sum.zero_().view(-1)
    flat[tile[first]] = found[first]
    if bool(nan.any()):
        spoilt = tile[nan]
        flat[spoilt] = -flat[spoilt].clamp(min=1.0)
    return tile_ref, tile_sum


def _fake_summarize_listed(
    indptr: Tensor,
    tokens: Tensor,
    targets: Tensor | None,
    reach: Tensor,
    states: Tensor,
    window: Tensor | None,
    logits: Tensor,
    vocab_size: int,
    bitmask: Tensor | None,
    temperature: Tensor | None,
    active: Tensor | None,
    ends: Tensor | None,
    may_end: Tensor | None,
) -> tuple[Tensor, Tensor]:
    return _new_sums(logits, vocab_size)


summarize_listed_op = register(
    "summarize_listed(Tensor indptr, Tensor tokens, Tensor? targets, Tensor reach, Tensor states, Tensor? window, "
    "Tensor logits, SymInt vocab_size, Tensor? bitmask, Tensor? temperature, Tensor? active, Tensor? ends, "
    "Tensor? may_end) -> (Tensor, Tensor)",
    _summarize_listed,
    _fake_summarize_listed,
    "listed_summary",
)
