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
for the report. The tiles, and the order in which they are reduced, depend on V alone: a row's bits do not depend on
its batch.

Traffic: V logits read and V / 32 maxima written per row; on CPU a block of tiles is read from memory once and its
exponentials are taken while it is in cache.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .bitmask import bits_at, unpack_bitmask
from .checks import check_candidates, check_normalize, check_rows, check_tensor, contiguous
from .lse import row_lse_op
from .registration import register

GROUP_SIZE = 32
GROUPS = 64
TILE = GROUP_SIZE * GROUPS

LOG2E = 1.4426950408889634
_MOST = torch.finfo(torch.float32).max
_BLOCK_TILES = 512  # 4 MB of float32; measured best of 64 to 1024: larger operations win until the cache is full


class Tiles(NamedTuple):
    """What the pass itself leaves. ``N = ceil(V / 2048)`` tiles a row."""

    group_max: Tensor  # logits dtype [R, N, 64]
    tile_max: Tensor  # logits dtype [R, N]
    tile_ref: Tensor  # logits dtype [R, N]
    tile_sum: Tensor  # float32 [R, N]; sign bit set where the tile held a NaN
    group_mass: Tensor  # float32 [R, N, 64], or [R, 0, 64] if not asked for


class Summary(NamedTuple):
    """What :func:`summarize` returns."""

    tiles: Tiles
    lse: Tensor  # float32 [R]; -inf for a row without tokens, +inf for an invalid row
    flags: Tensor  # int32 [R]; FLAG_NAN and FLAG_INF


def tiles_of(vocab_size: int) -> int:
    """Number of tiles of a row."""
    return (vocab_size + TILE - 1) // TILE


def evenly_split(numel: int) -> int:
    """The least size >= ``numel`` that torch splits over its threads in whole vectors.

    ``exp2`` takes another code path, off by an ulp, for the last few elements of a thread's share, so a share that ends
    inside a vector would make a row's bits depend on its batch. 32768 is torch's grain of parallel loops.
    """
    threads, vector = torch.get_num_threads(), 64
    size = -(-numel // vector) * vector
    while -(-size // max(1, min(threads, -(-size // 32768)))) % vector:
        size += vector
    return size


class _Pass:
    """One run of the torch definition over some rows: where it writes, and the workspace its blocks share."""

    def __init__(self, out: Tiles, temperature: Tensor | None, renormalize: bool, mass: bool, masked: bool):
        # in float32 while the pass runs: an operation that converts by the way is several times slower
        self.out = Tiles(*(field.float() for field in out))
        if renormalize or not masked:  # what may be chosen is what is normalised over
            self.out = self.out._replace(tile_ref=self.out.tile_max)
        self.temperature = temperature
        self.renormalize = renormalize
        self.mass = mass
        # also what lies behind a block is exponentiated, and never looked at
        numel = min(_BLOCK_TILES * TILE, out.group_max.numel() * GROUP_SIZE)
        self.work = out.tile_sum.new_empty(evenly_split(numel))

    def strip(self, logits: Tensor, bitmask: Tensor | None, rows: slice, tiles: slice, tokens: slice) -> None:
        """Summarise ``tiles``, which are ``tokens``, of ``rows``: as many rows at a time as make a block."""
        count = tiles.stop - tiles.start
        size = max(1, _BLOCK_TILES // count)
        fields = [field[rows, tiles].split(size) for field in (self.out if self.mass else self.out[:4])]
        missing = -(tokens.stop - tokens.start) % GROUPS  # the last tile is filled up to whole groups
        for number, x in enumerate(logits[rows, tokens].split(size)):
            block = slice(rows.start + number * size, rows.start + number * size + x.shape[0])
            if missing:
                x = torch.nn.functional.pad(x, (0, missing), value=-torch.inf)
            allowed = None
            if bitmask is not None:
                words = slice(tokens.start // 32, -(-tokens.stop // 32))
                allowed = unpack_bitmask(bitmask[block, words], tokens.stop - tokens.start)
                allowed = torch.nn.functional.pad(allowed, (0, missing), value=False)
                allowed = allowed.view(x.shape[0], count, -1, GROUPS)
            self.block(x.unflatten(1, (count, -1, GROUPS)), allowed, block, [field[number] for field in fields])

    def block(self, x: Tensor, allowed: Tensor | None, rows: slice, out: list[Tensor]) -> None:
        """Summarise ``x [n, t, r, 64]`` of ``rows``; ``allowed`` is bool of the same shape."""
        group_max, tile_max, tile_ref, tile_sum, *mass = out
        scale: Tensor | float = LOG2E
        if self.temperature is not None:
            scale = (LOG2E / self.temperature[rows]).view(-1, 1, 1, 1)
        candidates = x if allowed is None else x.masked_fill(~allowed, -torch.inf)
        if self.renormalize:
            x = candidates
        values = self._float(candidates)
        torch.amax(values, 2, out=group_max)
        torch.amax(group_max, -1, out=tile_max)
        for group_mass in mass:
            torch.sum(self._exp(values, group_max[:, :, None, :], scale), 2, out=group_mass)
            values = self._float(candidates)
        if candidates is not x:
            values = self._float(x)
            torch.amax(values, (2, 3), out=tile_ref)
        torch.sum(self._exp(values, tile_ref[:, :, None, None], scale).flatten(2), -1, out=tile_sum)

    def _float(self, x: Tensor) -> Tensor:
        """``x`` as float32: itself, or in the workspace."""
        return x if x.dtype == torch.float32 else self.work[: x.numel()].view(x.shape).copy_(x)

    def _exp(self, x: Tensor, ref: Tensor, scale: Tensor | float) -> Tensor:
        """``exp2((x - ref) * scale)`` in the workspace, where ``x`` may be already."""
        work = self.work[: x.numel()].view(x.shape)
        torch.sub(x, ref.clamp(-_MOST, _MOST), out=work)  # finite: -inf - -inf would be NaN
        work.mul_(scale)
        self.work[: evenly_split(x.numel())].exp2_()
        return work


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
            weight = x.float() - x.amax(-1, keepdim=True).float().clamp(-_MOST, _MOST)
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
    step = _Pass(out, temperature, renormalize, mass, bitmask is not None)
    whole, tail = divmod(vocab_size, TILE)
    for start, stop in spans:
        for tiles in _blocks(0, whole, _BLOCK_TILES):
            step.strip(logits, bitmask, slice(start, stop), tiles, slice(tiles.start * TILE, tiles.stop * TILE))
        if tail:
            step.strip(logits, bitmask, slice(start, stop), slice(whole, whole + 1), slice(whole * TILE, vocab_size))
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
