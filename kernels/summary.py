"""The one pass over the logits: what every decision of a step is made from.

A row of logits is cut into tiles of ``TILE = 2048`` tokens and a tile into ``GROUPS = 64`` strided groups of
``GROUP_SIZE = 32`` tokens: token ``tile * 2048 + r * 64 + c`` belongs to group ``c`` of its tile. The pass emits

    group_max[row, tile, c] = max over the candidates of the group            (logits dtype, exact)
    tile_max[row, tile]     = max over the candidates of the tile             (logits dtype, exact)
    tile_ref[row, tile]     = max over the tokens that are normalised over    (logits dtype, exact)
    tile_sum[row, tile]     = sum of exp((x - tile_ref) / temperature) over the same tokens

and, when asked, ``group_mass``, each group's sum of exponentials relative to its own maximum. Candidates are the tokens
that may be chosen (in ``vocab_size``, allowed by the bitmask, not excluded); the normaliser runs over all of
``vocab_size``, or over what the bitmask allows if ``renormalize``. A token outside both never reaches arithmetic.

NaN counts as ``-inf``; a tile that held one has the sign of its ``tile_sum`` set, so the streaming loop pays nothing
for the report. The tiles, and the order in which they are reduced (kernels/tiles.py), depend on V alone: a row's bits
do not depend on its batch.

Traffic: V logits read and V / 32 maxima written per row; on CPU a block of tiles is read from memory once and its
exponentials are taken while it is in cache.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .bitmask import bits_at
from .checks import check_candidates, check_normalize, check_rows, check_tensor, contiguous
from .exponential import LOG2E
from .lse import row_lse_op
from .registration import register
from .summary_pass import BLOCK_TILES, MOST, Pass
from .tiles import GROUPS, TILE, Tiles, tiles_of


class Summary(NamedTuple):
    """What :func:`summarize` returns."""

    tiles: Tiles
    lse: Tensor  # float32 [R]; -inf for a row without tokens, +inf for an invalid row
    flags: Tensor  # int32 [R]; FLAG_NAN and FLAG_INF


def _active_spans(active: Tensor | None, rows: int) -> list[tuple[int, int]]:
    """The maximal runs of consecutive active rows."""
    if active is None:
        return [(0, rows)] if rows else []
    flags = [False, *active.tolist(), False]
    edges = [i - 1 for i in range(1, len(flags)) if flags[i] != flags[i - 1]]
    return list(zip(edges[::2], edges[1::2], strict=True))


def _blocks(start: int, stop: int, size: int) -> list[slice]:
    return [slice(i, min(i + size, stop)) for i in range(start, stop, max(1, size))]


def _new_tiles(logits: Tensor, vocab_size: int, mass: bool) -> Tiles:
    rows, tiles = logits.shape[0], tiles_of(vocab_size)
    return Tiles(
        group_max=logits.new_empty(rows, tiles, GROUPS),
        tile_max=logits.new_empty(rows, tiles),
        tile_ref=logits.new_empty(rows, tiles),
        tile_sum=logits.new_empty(rows, tiles, dtype=torch.float32),
        group_mass=logits.new_empty(rows, tiles if mass else 0, GROUPS, dtype=torch.float32),
    )


def _exclude_tokens(
    out: Tiles,
    logits: Tensor,
    vocab_size: int,
    bitmask: Tensor | None,
    temperature: Tensor | None,
    active: Tensor | None,
    tokens: list[int],
) -> None:
    """Take ``tokens`` out of the candidates: correct the groups they touch."""
    tokens = [token for token in tokens if 0 <= token < vocab_size]
    for token in tokens:
        tile, column = token // TILE, token % GROUPS
        members = torch.arange(tile * TILE + column, min((tile + 1) * TILE, vocab_size), GROUPS, device=logits.device)
        x = logits[:, members]  # [R, at most 32]
        barred = x.isnan() | torch.isin(members, torch.tensor(tokens, device=logits.device))
        if active is not None:
            barred |= ~active[:, None]
        if bitmask is not None:
            barred |= ~bits_at(bitmask, slice(None), members)
        x = x.masked_fill(barred, -torch.inf)
        out.group_max[:, tile, column] = x.amax(-1)
        if out.group_mass.shape[1] > 0:
            weight = x.float() - x.amax(-1, keepdim=True).float().clamp(-MOST, MOST)
            scale = LOG2E if temperature is None else (LOG2E / temperature)[:, None]
            out.group_mass[:, tile, column] = weight.mul_(scale).exp2_().sum(-1)
    for tile in {token // TILE for token in tokens}:
        out.tile_max[:, tile] = out.group_max[:, tile].amax(-1)


def _summarize(
    logits: Tensor,
    vocab_size: int,
    bitmask: Tensor | None,
    temperature: Tensor | None,
    active: Tensor | None,
    exclude: Tensor | None,
    renormalize: bool,
    mass: bool,
) -> Tiles:
    """The torch definition."""
    out = _new_tiles(logits, vocab_size, mass)
    spans = _active_spans(active, logits.shape[0])
    if spans != [(0, logits.shape[0])]:  # inactive rows have no candidates
        for field in (out.group_max, out.tile_max, out.tile_ref):
            field.fill_(-torch.inf)
        out.tile_sum.zero_()
        out.group_mass.zero_()
    _fill(out, spans, logits, vocab_size, bitmask, temperature, renormalize, mass)
    nan = out.tile_sum.isnan()
    if bool(nan.any()):  # rare, and values may be read here: clean those rows and take them again
        clean = logits.masked_fill(logits.isnan(), -torch.inf)
        dirty = _active_spans(nan.any(1), logits.shape[0])
        _fill(out, dirty, clean, vocab_size, bitmask, temperature, renormalize, mass)
        out.tile_sum.copy_(torch.where(nan, -out.tile_sum.clamp(min=1.0), out.tile_sum))
    if exclude is not None:
        _exclude_tokens(out, logits, vocab_size, bitmask, temperature, active, exclude.tolist())
    return out


def _fill(
    out: Tiles,
    spans: list[tuple[int, int]],
    logits: Tensor,
    vocab_size: int,
    bitmask: Tensor | None,
    temperature: Tensor | None,
    renormalize: bool,
    mass: bool,
) -> None:
    """Write the tiles of the rows in ``spans``; one that holds a NaN gets NaN for its sum."""
    step = Pass(out, temperature, renormalize, mass, bitmask is not None)
    whole, tail = divmod(vocab_size, TILE)
    for start, stop in spans:
        for tiles in _blocks(0, whole, BLOCK_TILES):
            step.strip(logits, bitmask, slice(start, stop), tiles, slice(tiles.start * TILE, tiles.stop * TILE))
        if tail:
            step.strip(logits, bitmask, slice(start, stop), slice(whole, whole + 1), slice(whole * TILE, vocab_size))
        step.finish(slice(start, stop))
    for field, found in zip(out, step.out, strict=True):
        if field is not found:
            field.copy_(found)


def _fake_summarize(
    logits: Tensor,
    vocab_size: int,
    bitmask: Tensor | None,
    temperature: Tensor | None,
    active: Tensor | None,
    exclude: Tensor | None,
    renormalize: bool,
    mass: bool,
) -> Tiles:
    return _new_tiles(logits, vocab_size, mass)


summarize_op = register(
    "summarize(Tensor logits, SymInt vocab_size, Tensor? bitmask, Tensor? temperature, Tensor? active, "
    "Tensor? exclude, bool renormalize, bool mass) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _summarize,
    _fake_summarize,
    "summary",
)


def summarize(
    logits: Tensor,
    *,
    bitmask: Tensor | None = None,
    temperature: Tensor | None = None,
    active: Tensor | None = None,
    exclude: Tensor | None = None,
    normalize: str = "vocab",
    vocab_size: int | None = None,
    mass: bool = False,
) -> Summary:
    """Summarise logits in one pass: group maxima, tile maxima and sums, log-sum-exp.

    Equivalent to::

        x = logits.float() / temperature[:, None]
        tiles.group_max[row, tile, c] = logits[row, tile * 2048 + c : (tile + 1) * 2048 : 64].amax()
        lse = x.logsumexp(-1)

    except that rows are reduced in a fixed order, whatever the batch, and that data faults are flagged.

    Args:
        logits: ``[R, V]`` float32, float16 or bfloat16; unit stride over ``V``. Not modified.
        bitmask: ``[R, ceil(V / 32)]`` int32, bit ``j % 32`` of word ``j // 32`` set where token ``j`` may be chosen.
        temperature: ``[R]`` float32 above 0; divides the logits in the sums. The maxima are of the logits as given.
        active: ``[R]`` bool; rows that are not are not read and have no candidates, lse ``-inf`` and no flags.
        exclude: ``[n]`` int64 tokens that are normalised over but are no candidates.
        normalize: ``"vocab"``: sums run over the whole vocabulary; ``"allowed"``: over what the bitmask allows.
        vocab_size: columns from here on are padding and never read.
        mass: also return each group's sum of exponentials over its candidates.

    Returns:
        A :class:`Summary`.

    Numerics: maxima are exact; sums are float32, error a few ulps; a row's result depends on that row and V only.

    Raises:
        ValueError: shapes, strides, devices or ranges differ from the above.
        TypeError: a dtype differs from the above.
    """
    check_tensor("logits", logits)
    vocab_size = check_rows(logits, vocab_size, bitmask, temperature)
    check_candidates(logits, active, exclude)
    renormalize = check_normalize(normalize)
    temperature, active, exclude = contiguous(temperature), contiguous(active), contiguous(exclude)
    tiles = Tiles(*summarize_op(logits.detach(), vocab_size, bitmask, temperature, active, exclude, renormalize, mass))
    return Summary(tiles, *row_lse_op(tiles.tile_ref, tiles.tile_sum, temperature))
