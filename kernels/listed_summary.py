"""The sums of tiles from a list of tokens: bitwise what the pass finds, without reading the rest of the row.

The sum of a tile is a fixed tree (kernels/tiles.py). A token that is not listed adds exp(-inf) = 0 to it and changes no
bit, so merging the listed tokens along the tree gives the sum itself. See docs/numerics.md.
"""

import torch
from torch import Tensor

from .automaton import allowed_edges
from .bitmask import bits_at
from .exponential import LOG2E, evenly_split
from .registration import register
from .tiles import TILE, place, tiles_of

MOST = torch.finfo(torch.float32).max


def _new_sums(logits: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    rows, tiles = logits.shape[0], tiles_of(vocab_size)
    return logits.new_empty(rows, tiles), logits.new_empty(rows, tiles, dtype=torch.float32)


def _listed(
    indptr: Tensor,
    tokens: Tensor,
    targets: Tensor | None,
    reach: Tensor,
    states: Tensor,
    window: Tensor | None,
    vocab_size: int,
    bitmask: Tensor | None,
    ends: Tensor | None,
    may_end: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, tokens and places ``[M]`` of what is listed, in order of row and place."""
    rows, edges = allowed_edges(indptr, targets, reach, states, window)
    listed = tokens[edges].long()
    where = place(listed)
    if ends is not None and may_end is not None:
        known = ends[(ends >= 0) & (ends < vocab_size)].unique()
        ending = may_end.nonzero()[:, 0]
        rows = torch.cat([rows, ending.repeat_interleave(known.shape[0])])
        listed = torch.cat([listed, known.repeat(ending.shape[0])])
        where = place(listed)
        order = (rows * (tiles_of(vocab_size) * TILE) + where).sort().indices
        rows, listed, where = rows[order], listed[order], where[order]
    if bitmask is not None:
        kept = bits_at(bitmask, rows, listed)
        rows, listed, where = rows[kept], listed[kept], where[kept]
    return rows, listed, where


def _merge(values: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of ``values [M]`` by tile, and the tiles; ``keys``, tiles above places, ascend and are distinct."""
    for _ in range(TILE.bit_length() - 1):
        keys = keys >> 1
        again = keys[1:] == keys[:-1]
        if bool(again.any()):
            first = torch.nn.functional.pad(~again, (1, 0), value=True)
            pairs = torch.nn.functional.pad(again, (0, 1))
            values[pairs] += values[~first]
            values, keys = values[first], keys[first]
    return values, keys


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
    tile_ref, tile_sum = _new_sums(logits, vocab_size)
    tiles = tile_ref.shape[1]
    if active is not None:
        states = states.masked_fill(~active, -1)
        may_end = None if may_end is None else may_end & active
    rows, listed, where = _listed(indptr, tokens, targets, reach, states, window, vocab_size, bitmask, ends, may_end)
    keys = rows * (tiles * TILE) + where
    tile = keys // TILE
    x = logits[rows, listed].float()
    nan = x.isnan()
    x.masked_fill_(nan, -torch.inf)
    ref = tile_sum.new_full((tile_sum.numel(),), -torch.inf).scatter_reduce_(0, tile, x, "amax")
    tile_ref.copy_(ref.view(tile_ref.shape))
    # the same operations as the pass on a workspace of the same kind: see kernels/exponential.py
    work = x.new_empty(evenly_split(x.shape[0]))
    found = work[: x.shape[0]]
    torch.sub(x, ref[tile].clamp_(-MOST, MOST), out=found)
    found.mul_(LOG2E if temperature is None else (LOG2E / temperature)[rows])
    work.exp2_()
    sums, merged = _merge(found, keys)
    flat = tile_sum.zero_().view(-1)
    flat[merged] = sums
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
