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

from .checks import check_candidates, check_normalize, check_rows, check_tensor, contiguous
from .lse import row_lse_op
from .registration import register
from .summary_parts import active_spans, lightly_masked, retake_groups, retake_tiles
from .summary_pass import fill
from .tiles import Tiles, new_tiles


class Summary(NamedTuple):
    """What :func:`summarize` returns."""

    tiles: Tiles
    lse: Tensor  # float32 [R]; -inf for a row without tokens, +inf for an invalid row
    flags: Tensor  # int32 [R]; FLAG_NAN and FLAG_INF


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
    out = new_tiles(logits, vocab_size, mass)
    spans = active_spans(active, logits.shape[0])
    if spans != [(0, logits.shape[0])]:  # inactive rows have no candidates
        for field in (out.group_max, out.tile_max, out.tile_ref):
            field.fill_(-torch.inf)
        out.tile_sum.zero_()
        out.group_mass.zero_()
    barred = None
    if bitmask is not None:
        light, spans, barred = lightly_masked(bitmask, vocab_size, active, renormalize)
        fill(out, light, logits, vocab_size, None, temperature, renormalize, mass)
        if barred is not None and renormalize:
            retake_tiles(out, logits, vocab_size, bitmask, temperature, *barred)
    fill(out, spans, logits, vocab_size, bitmask, temperature, renormalize, mass)
    nan = out.tile_sum.isnan()
    if bool(nan.any()):  # rare, and values may be read here: clean those rows and take them again
        clean = logits.masked_fill(logits.isnan(), -torch.inf)
        dirty = active_spans(nan.any(1), logits.shape[0])
        fill(out, dirty, clean, vocab_size, bitmask, temperature, renormalize, mass)
        out.tile_sum.copy_(torch.where(nan, -out.tile_sum.clamp(min=1.0), out.tile_sum))
    if barred is not None and not renormalize:
        retake_groups(out, logits, vocab_size, bitmask, temperature, None, *barred)
    if exclude is not None:
        known = exclude[(exclude >= 0) & (exclude < vocab_size)]
        rows = torch.arange(logits.shape[0], device=logits.device) if active is None else active.nonzero()[:, 0]
        pairs = rows.repeat_interleave(known.shape[0]), known.repeat(rows.shape[0])
        retake_groups(out, logits, vocab_size, bitmask, temperature, known, *pairs)
    return out


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
    return new_tiles(logits, vocab_size, mass)


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
