"""The CPU's way through the logits: a block of tiles at a time, summarised while it is in cache."""

import torch
from torch import Tensor

from .bitmask import unpack_bitmask
from .exponential import LOG2E, evenly_split
from .tiles import GROUP_SIZE, GROUPS, TILE, Tiles

MOST = torch.finfo(torch.float32).max
BLOCK_TILES = 512  # 4 MB of float32; measured best of 64 to 1024: larger operations win until the cache is full


def add_rows(x: Tensor, out: Tensor) -> None:
    """The levels of the tree of kernels/tiles.py over rows: ``x [..., r, 64]``, overwritten, to ``out [..., 64]``."""
    half = GROUP_SIZE // 2
    while half > 1:
        rows = x.shape[-2]
        if rows > half:  # what the last tile lacks would be zeros
            x[..., : rows - half, :].add_(x[..., half:, :])
            x = x[..., :half, :]
        half //= 2
    if x.shape[-2] == 1:
        out.copy_(x[..., 0, :])
    else:
        torch.add(x[..., 0, :], x[..., 1, :], out=out)


def _add_columns(x: Tensor, out: Tensor) -> None:
    """The levels over columns: ``x [..., 64]`` to ``out [...]``."""
    while x.shape[-1] > 2:
        x = x[..., ::2] + x[..., 1::2]
    torch.add(x[..., 0], x[..., 1], out=out)


class Pass:
    """One run of the torch definition over some rows: where it writes, and the workspace its blocks share."""

    def __init__(self, out: Tiles, temperature: Tensor | None, renormalize: bool, mass: bool, masked: bool):
        # in float32 while the pass runs: an operation that converts by the way is several times slower
        self.out = Tiles(*(field.float() for field in out))
        if renormalize or not masked:  # what may be chosen is what is normalised over
            self.out = self.out._replace(tile_ref=self.out.tile_max)
        self.temperature = temperature
        self.renormalize = renormalize
        self.columns = out.tile_sum.new_empty(*out.tile_sum.shape, GROUPS)  # sums of exponentials
        self.mass = mass
        # also what lies behind a block is exponentiated, and never looked at
        numel = min(BLOCK_TILES * TILE, out.group_max.numel() * GROUP_SIZE)
        self.work = out.tile_sum.new_empty(evenly_split(numel))

    def strip(self, logits: Tensor, bitmask: Tensor | None, rows: slice, tiles: slice, tokens: slice) -> None:
        """Summarise ``tiles``, which are ``tokens``, of ``rows``: as many rows at a time as make a block."""
        count = tiles.stop - tiles.start
        size = max(1, BLOCK_TILES // count)
        written = self.out._replace(tile_sum=self.columns)
        fields = [field[rows, tiles].split(size) for field in (written if self.mass else written[:4])]
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

    def finish(self, rows: slice) -> None:
        """What is left to do when all tiles of ``rows`` are summarised: cheaper for all of them at once."""
        _add_columns(self.columns[rows], self.out.tile_sum[rows])

    def block(self, x: Tensor, allowed: Tensor | None, rows: slice, out: list[Tensor]) -> None:
        """Summarise ``x [n, t, r, 64]`` of ``rows``; ``allowed`` is bool of the same shape. The sums stay columns."""
        group_max, tile_max, tile_ref, columns, *mass = out
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
            add_rows(self._exp(values, group_max[:, :, None, :], scale), group_mass)
            values = self._float(candidates)
        if candidates is not x:
            values = self._float(x)
            torch.amax(values, (2, 3), out=tile_ref)
        add_rows(self._exp(values, tile_ref[:, :, None, None], scale), columns)

    def _float(self, x: Tensor) -> Tensor:
        """``x`` as float32: itself, or in the workspace."""
        return x if x.dtype == torch.float32 else self.work[: x.numel()].view(x.shape).copy_(x)

    def _exp(self, x: Tensor, ref: Tensor, scale: Tensor | float) -> Tensor:
        """``exp2((x - ref) * scale)`` in the workspace, where ``x`` may be already."""
        work = self.work[: x.numel()].view(x.shape)
        torch.sub(x, ref.clamp(-MOST, MOST), out=work)  # finite: -inf - -inf would be NaN
        work.mul_(scale)
        self.work[: evenly_split(x.numel())].exp2_()
        return work


def _blocks(start: int, stop: int, size: int) -> list[slice]:
    return [slice(i, min(i + size, stop)) for i in range(start, stop, max(1, size))]


def fill(
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
    if not spans:
        return
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
