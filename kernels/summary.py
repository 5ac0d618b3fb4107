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
from .checks import check_dtype, check_normalize, check_rows, check_same_device, check_shape, check_tensor, contiguous
from .lse import row_lse_op
from .registration import register

GROUP_SIZE = 32
GROUPS = 64
TILE = GROUP_SIZE * GROUPS

_LOG2E = 1.4426950408889634
_BLOCK_TILES = 128  # 1 MB of float32: the block and its exponentials stay in a core's cache; measured best of 32..512


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


def _evenly_split(numel: int) -> int:
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
    """One call of the torch definition: the outputs being filled and the workspaces its blocks share."""

    def __init__(self, out: Tiles, temperature: Tensor | None, renormalize: bool, mass: bool):
        self.out = out
        self.temperature = temperature
        self.renormalize = renormalize
        self.mass = mass
        # zeros: the padding between blocks is exponentiated too, and must not hold signalling junk
        self.work = torch.zeros(_evenly_split(_BLOCK_TILES * TILE), dtype=torch.float32, device=out.tile_sum.device)

    def _sum_exp(self, x: Tensor, ref: Tensor, scale: Tensor | float, dim: int) -> Tensor:
        """``sum(exp2((x - ref) * scale))`` over ``dim`` of ``x [n, t, r, 64]``, in the workspace."""
        numel = x.numel()
        if numel > self.work.numel():
            self.work = torch.zeros(_evenly_split(numel), dtype=torch.float32, device=x.device)
        flat = self.work[:numel]
        work = flat.view(x.shape)
        if x.dtype == torch.float32:
            torch.sub(x, ref, out=work)
        else:
            work.copy_(x)
            work.sub_(ref)
        work.mul_(scale)
        self.work[: _evenly_split(numel)].exp2_()
        return work.sum(dim) if dim == 2 else flat.view(*x.shape[:2], -1).sum(-1)

    def block(self, x: Tensor, allowed: Tensor | None, rows: slice, tiles: slice) -> None:
        """Summarise ``x [n, t, r, 64]``, ``tiles`` of ``rows``; ``allowed`` is bool of the same shape."""
        candidates = x if allowed is None else x.masked_fill(~allowed, -torch.inf)
        if self.renormalize:
            x = candidates
        group_max = candidates.amax(2)
        tile_max = group_max.amax(-1)
        tile_ref = tile_max if candidates is x else x.amax(2).amax(-1)
        nan = tile_ref.isnan()
        if bool(nan.any()):  # rare, and values may be read here: clean the block and take it again
            self.block(x.masked_fill(x.isnan(), -torch.inf), allowed, rows, tiles)
            view = self.out.tile_sum[rows, tiles]
            view.copy_(torch.where(nan, -view.clamp(min=1.0), view))
            return
        scale: Tensor | float = _LOG2E
        if self.temperature is not None:
            scale = (_LOG2E / self.temperature[rows]).view(-1, 1, 1, 1)
        finite_ref = tile_ref.float()
        finite_ref = finite_ref.masked_fill(finite_ref.isinf(), 0.0)[:, :, None, None]  # -inf - -inf would be NaN
        self.out.group_max[rows, tiles] = group_max
        self.out.tile_max[rows, tiles] = tile_max
        self.out.tile_ref[rows, tiles] = tile_ref
        self.out.tile_sum[rows, tiles] = self._sum_exp(x, finite_ref, scale, dim=-1)
        if self.mass:
            finite_max = group_max.float()
            finite_max = finite_max.masked_fill(finite_max.isinf(), 0.0)[:, :, None, :]
            self.out.group_mass[rows, tiles] = self._sum_exp(candidates, finite_max, scale, dim=2)


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
    out: Tiles, logits: Tensor, vocab_size: int, bitmask: Tensor | None, active: Tensor | None, tokens: list[int]
) -> None:
    """Take ``tokens`` out of the candidates: correct the groups they touch."""
    for token in tokens:
        tile, column = token // TILE, token % GROUPS
        members = torch.arange(tile * TILE + column, min((tile + 1) * TILE, vocab_size), GROUPS, device=logits.device)
        x = logits[:, members]  # [R, at most 32]
        barred = x.isnan() | torch.isin(members, torch.tensor(tokens, device=logits.device))
        if active is not None:
            barred |= ~active[:, None]
        if bitmask is not None:
            barred |= ~bits_at(bitmask, slice(None), members)
        out.group_max[:, tile, column] = x.masked_fill(barred, -torch.inf).amax(-1)
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
    step = _Pass(out, temperature, renormalize, mass)
    whole, tail = divmod(vocab_size, TILE)

    def view(rows: slice, tokens: slice, fill: bool) -> tuple[Tensor, Tensor | None]:
        """The logits of a block as ``[n, t, r, 64]``, and which of them are allowed."""
        x = logits[rows, tokens]
        ok = None
        if bitmask is not None:
            words = slice(tokens.start // 32, -(-tokens.stop // 32))
            ok = unpack_bitmask(bitmask[rows, words], tokens.stop - tokens.start)
        if fill:  # the last tile, filled up to whole groups
            missing = -(tokens.stop - tokens.start) % GROUPS
            x = torch.nn.functional.pad(x, (0, missing), value=-torch.inf)
            ok = None if ok is None else torch.nn.functional.pad(ok, (0, missing), value=False)
            return x.unflatten(1, (1, -1, GROUPS)), None if ok is None else ok.unflatten(1, (1, -1, GROUPS))
        shape = (-1, GROUP_SIZE, GROUPS)
        return x.unflatten(1, shape), None if ok is None else ok.unflatten(1, shape)

    for start, stop in spans:
        for tiles in _blocks(0, whole, _BLOCK_TILES):
            for rows in _blocks(start, stop, _BLOCK_TILES // (tiles.stop - tiles.start)):
                x, ok = view(rows, slice(tiles.start * TILE, tiles.stop * TILE), fill=False)
                step.block(x, ok, rows, tiles)
        if tail:
            for rows in _blocks(start, stop, _BLOCK_TILES):
                x, ok = view(rows, slice(whole * TILE, vocab_size), fill=True)
                step.block(x, ok, rows, slice(whole, whole + 1))
    if exclude is not None:
        _exclude_tokens(out, logits, vocab_size, bitmask, active, exclude.tolist())
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
        exclude: ``[n]`` int64 tokens inside the vocabulary that are normalised over but are no candidates.
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
    if active is not None:
        check_dtype("active", active, torch.bool)
        check_shape("active", active, "[R]", logits.shape[0])
    if exclude is not None:
        check_dtype("exclude", exclude, torch.int64)
        check_shape("exclude", exclude, "[n]", None)
    check_same_device(logits=logits, active=active, exclude=exclude)
    renormalize = check_normalize(normalize)
    temperature, active, exclude = contiguous(temperature), contiguous(active), contiguous(exclude)
    tiles = Tiles(*summarize_op(logits.detach(), vocab_size, bitmask, temperature, active, exclude, renormalize, mass))
    return Summary(tiles, *row_lse_op(tiles.tile_ref, tiles.tile_sum, temperature))
