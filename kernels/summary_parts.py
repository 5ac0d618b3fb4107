"""Parts of a summary taken again on a CPU: groups without what is no candidate, tiles without what is barred.

A mask that bars little costs little this way: its rows run through the pass as if they had none, and what the few
barred tokens have touched is put right. No bit depends on which way a row took.
"""

import torch
from torch import Tensor

from .bitmask import barred_words, bits_at, tokens_of, words_of
from .exponential import LOG2E, evenly_split
from .summary_pass import MOST, add_rows, fill
from .tiles import GROUPS, TILE, Tiles, new_tiles, tiles_of

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

    That is rows and tokens ``[n]``, rows and tokens ascending, or None if it is nothing.
    """
    words = barred_words(bitmask, vocab_size)
    few = tiles_of(vocab_size) // 4 if renormalize else words_of(vocab_size) // 32
    bars_few = words.count_nonzero(1) <= few
    is_light, is_heavy = bars_few, ~bars_few
    if active is not None:
        is_light, is_heavy = is_light & active, is_heavy & active
    light, heavy = active_spans(is_light, words.shape[0]), active_spans(is_heavy, words.shape[0])
    if not light or len(light) + len(heavy) > _MOST_SPANS:
        return [], active_spans(active, words.shape[0]), None
    if heavy or active is not None:
        words.masked_fill_(~is_light[:, None], 0)
    rows, tokens = tokens_of(words)
    return light, heavy, (rows, tokens) if rows.shape[0] > 0 else None


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
    """Take the tiles of ``tokens [n]`` of ``rows [n]``, both ascending, again, over what the bitmask allows."""
    tiles, whole = tiles_of(vocab_size), vocab_size // TILE
    touched = torch.unique_consecutive(rows * tiles + tokens // TILE)
    full = touched % tiles < whole
    x, bits = logits[:, : whole * TILE].unflatten(1, (whole, TILE)), bitmask[:, : whole * 64].unflatten(1, (whole, 64))
    last, last_bits = logits[:, None, whole * TILE : vocab_size], bitmask[:, None, whole * 64 : words_of(vocab_size)]
    for chosen, part, mask in ((touched[full], x, bits), (touched[~full], last, last_bits)):
        row, tile = chosen // tiles, chosen % tiles
        if row.shape[0] == 0:
            continue
        at = tile if part is x else torch.zeros_like(tile)
        some = part[row, at]  # [Q, 2048], or what there is of the last tile
        found = new_tiles(some, some.shape[1], out.group_mass.shape[1] > 0)
        heat = None if temperature is None else temperature[row]
        fill(found, [(0, row.shape[0])], some, some.shape[1], mask[row, at], heat, True, found.group_mass.shape[1] > 0)
        for field, value in zip(out, found, strict=True):
            if value.numel() > 0:
                field[row, tile] = value[:, 0]
