"""Parts of a summary taken again on a CPU: groups without what is no candidate, tiles without what is barred.

A mask that bars little costs little this way: its rows run through the pass as if they had none, and what the few
barred tokens have touched is put right. No bit depends on which way a row took.
"""

import torch
from torch import Tensor

from .bitmask import bits_at, tokens_of, words_of
from .exponential import LOG2E, evenly_split
from .summary_pass import MOST, add_rows, fill
from .tiles import GROUPS, TILE, Tiles, new_tiles, tiles_of

_WORDS = TILE // 32  # of a tile's bitmask
_TILES_AT_ONCE = 128  # stays in cache
_MOST_SPANS = 8  # runs of rows: in shorter ones the pass is not worth splitting


def active_spans(active: Tensor | None, rows: int) -> list[tuple[int, int]]:
    """The maximal runs of consecutive active rows."""
    if active is None:
        return [(0, rows)] if rows else []
    flags = [False, *active.tolist(), False]
    edges = [i - 1 for i in range(1, len(flags)) if flags[i] != flags[i - 1]]
    return list(zip(edges[::2], edges[1::2], strict=True))


def lightly_masked(
    bitmask: Tensor, vocab_size: int, active: Tensor | None, renormalize: bool
) -> tuple[list[tuple[int, int]], list[tuple[int, int]], tuple[Tensor, Tensor] | None]:
    """Runs of active rows to take without their masks, and with; and what the masks of the former bar.

    That is rows and tokens ``[n]``, those of one tile of a row side by side, or None if it is nothing.
    """
    rows, whole, words = bitmask.shape[0], vocab_size // TILE, words_of(vocab_size)
    # maxima are found several times faster than single words that are not -1
    full = bitmask[:, : whole * _WORDS].unflatten(1, (whole, _WORDS))
    touched = (full.amin(2) != -1) | (full.amax(2) != -1)  # [R, tiles that are whole]
    last = ~bitmask[:, whole * _WORDS : words]
    if vocab_size % 32:
        last[:, -1] &= (1 << (vocab_size % 32)) - 1
    bars_few = touched.sum(1) + last.count_nonzero(1) <= tiles_of(vocab_size) // 4
    if not renormalize and not bool(bars_few.all()):
        bars_few |= (bitmask[:, :words] != -1).sum(1) <= words // 32
    is_light, is_heavy = bars_few, ~bars_few
    if active is not None:
        is_light, is_heavy = is_light & active, is_heavy & active
    light, heavy = active_spans(is_light, rows), active_spans(is_heavy, rows)
    if not light or len(light) + len(heavy) > _MOST_SPANS:
        return [], active_spans(active, rows), None
    if heavy or active is not None:
        touched &= is_light[:, None]
        last.masked_fill_(~is_light[:, None], 0)
    row, tile = touched.nonzero().unbind(1)
    at, token = tokens_of(~full[row, tile])
    last_row, last_token = tokens_of(last)
    barred = torch.cat([row[at], last_row]), torch.cat([tile[at] * TILE + token, last_token + whole * TILE])
    return light, heavy, barred if barred[0].shape[0] > 0 else None


def retake_groups(
    out: Tiles,
    logits: Tensor,
    vocab_size: int,
    bitmask: Tensor | None,
    temperature: Tensor | None,
    exclude: Tensor | None,
    rows: Tensor,
    tokens: Tensor,
) -> None:
    """Take ``tokens [n]`` of ``rows [n]``, which are no candidates, out of the groups they lie in."""
    tile, column = tokens // TILE, tokens % GROUPS
    mass = out.group_mass.shape[1] > 0
    if not mass:  # what is below a group's maximum may go without a trace
        top = (logits[rows, tokens] >= out.group_max[rows, tile, column]).nonzero()[:, 0]
        rows, tile, column = rows[top], tile[top], column[top]
    if rows.shape[0] == 0:
        return
    row = rows[:, None]
    members = (tile * TILE + column)[:, None] + torch.arange(0, TILE, GROUPS, device=logits.device)  # [n, 32]
    barred, inside = members >= vocab_size, members.clamp(max=vocab_size - 1)
    if bitmask is not None:
        barred |= ~bits_at(bitmask, row, inside)
    if exclude is not None:
        barred |= torch.isin(members, exclude)
    x = logits[row, inside]
    x.masked_fill_(barred | x.isnan(), -torch.inf)
    maxima = x.amax(-1)
    out.group_max[rows, tile, column] = maxima
    out.tile_max[rows, tile] = out.group_max[rows, tile].amax(-1)
    if mass:
        work = out.group_mass.new_empty(evenly_split(x.numel()))
        weight = work[: x.numel()].view(x.shape)
        torch.sub(x.float(), maxima[:, None].float().clamp_(-MOST, MOST), out=weight)
        weight.mul_(LOG2E if temperature is None else (LOG2E / temperature)[row])
        work.exp2_()
        masses = out.group_mass.new_empty(rows.shape[0], 1)
        add_rows(weight[:, :, None], masses)
        out.group_mass[rows, tile, column] = masses[:, 0]


def retake_tiles(
    out: Tiles,
    logits: Tensor,
    vocab_size: int,
    bitmask: Tensor,
    temperature: Tensor | None,
    rows: Tensor,
    tokens: Tensor,
) -> None:
    """Take the tiles of ``tokens [n]`` of ``rows [n]`` again, over what the bitmask allows.

    Tokens of one tile of a row are side by side.
    """
    tiles, whole = tiles_of(vocab_size), vocab_size // TILE
    touched = torch.unique_consecutive(rows * tiles + tokens // TILE)
    full = touched % tiles < whole
    x, bits = (
        logits[:, : whole * TILE].unflatten(1, (whole, TILE)),
        bitmask[:, : whole * _WORDS].unflatten(1, (whole, _WORDS)),
    )
    last, last_bits = (
        logits[:, None, whole * TILE : vocab_size],
        bitmask[:, None, whole * _WORDS : words_of(vocab_size)],
    )
    mass = out.group_mass.shape[1] > 0
    for where, part, mask in ((touched[full], x, bits), (touched[~full], last, last_bits)):
        for chosen in where.split(_TILES_AT_ONCE) if where.shape[0] > 0 else ():
            row = chosen // tiles
            tile = chosen - row * tiles
            at = tile if part is x else torch.zeros_like(tile)
            some = part[row, at]  # [n, 2048], or what there is of the last tile
            found = new_tiles(some, some.shape[1], mass)
            heat = None if temperature is None else temperature[row]
            fill(found, [(0, row.shape[0])], some, some.shape[1], mask[row, at], heat, True, mass)
            for field, value in zip(out, found, strict=True):
                if value.numel() > 0:
                    field[row, tile] = value[:, 0]
