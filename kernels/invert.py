"""The token whose interval of the distribution holds a code: inverting the cumulative distribution, exactly.

A code is an integer in 0 .. 2^64 - 1, held in int64. Every token of a row owns an interval of codes, of a length in
proportion to its probability, and three steps find the one that holds a code: the tiles of the row, the 64 strided
groups of the tile, the 32 tokens of the group. Each step weighs n children, as integers:

    mass[i]  = exp((x[i] - reference) / temperature), and 0 where x[i] is 87 temperatures or more below the reference
    share[i] = max(1, round(mass[i] / max(mass) * 2^32)) where mass[i] > 0, else 0
    y        = floor(code * total / 2^64),   total = sum(share)
    child    = the i with before <= y < before + share[i],   before = sum(share[:i])
    code     = floor((code * total - before * 2^64) / share[child])

The products have 128 bits and nothing is rounded but the masses, so intervals tile the codes without gap or overlap:
of N codes floor(i * 2^64 / N), shifted by any amount, a token of probability p gets floor(N p) or ceil(N p). The new
code is uniform again where the old one was, so codes can be used up token by token and never run out. A token of mass
0 (masked, -inf, NaN) owns no code. A tile's mass is its sum of the summary; a group's is the sum of integers
round(mass * 2^32), at least 1, so it does not depend on the order of summation.

One program makes one draw: it reads N tile references and sums, and the 2048 logits of one tile.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .bitmask import bits_at
from .checks import check_dtype, check_rows, check_same_device, check_shape, contiguous
from .keys import adjust
from .registration import register
from .tiles import GROUP_SIZE, GROUPS, TILE, tiles_of

LOWEST = -87.0  # exponents whose exponential is a normal float32 on every device
_ONE = 2.0**32
_WORD = 0xFFFFFFFF
_DRAWS = 256  # draws at a time: the workspace is a few MB


def _round(x: Tensor) -> Tensor:
    """int64 of float32 ``x >= 0``, to the nearest."""
    return (x + 0.5).long()


def masses(x: Tensor, reference: Tensor, temperature: Tensor | None) -> Tensor:
    """Masses ``[M, n]`` of float32 logits ``[M, n]`` relative to ``reference [M, 1]``, of which none is above."""
    exponent = x - torch.where(reference.abs() == torch.inf, 0.0, reference)
    if temperature is not None:
        exponent = exponent.div_(temperature[:, None])
    absent = ~(exponent >= LOWEST)
    return exponent.clamp_(max=0.0).exp_().masked_fill_(absent, 0.0)


def multiply(code: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
    """Upper and lower 64 bits of ``code * total``; ``0 <= total < 2^63``."""
    code_high, code_low = (code >> 32) & _WORD, code & _WORD
    high, low = total >> 32, total & _WORD
    # products of 32 bits fill 64, whose sign means nothing: shift and mask
    first, second, third = code_low * low, code_high * low, code_low * high
    carry = ((first >> 32) & _WORD) + (second & _WORD) + (third & _WORD)
    upper = code_high * high + ((second >> 32) & _WORD) + ((third >> 32) & _WORD) + (carry >> 32)
    return upper, code * total


def divide(upper: Tensor, lower: Tensor, divisor: Tensor) -> Tensor:
    """``floor((upper * 2^64 + lower) / divisor)`` for ``0 <= upper < divisor <= 2^32``."""
    quotient = torch.zeros_like(lower)
    for bits, shift in ((22, 42), (21, 21), (21, 0)):
        upper = (upper << bits) | ((lower >> shift) & ((1 << bits) - 1))
        digit = upper // divisor
        quotient = (quotient << bits) | digit
        upper = upper - digit * divisor
    return quotient


def descend(mass: Tensor, codes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Child ``[M]`` of masses ``[M, n]`` that holds each code ``[M]``, the code in it, and whether there is none."""
    largest = mass.amax(-1, keepdim=True)
    share = _round(mass / torch.where(largest > 0, largest, 1.0) * _ONE).clamp_(min=1).masked_fill_(mass <= 0, 0)
    after = share.cumsum(-1)
    whole, lower = multiply(codes, after[:, -1])
    child = (after <= whole[:, None]).sum(-1, keepdim=True).clamp_(max=mass.shape[1] - 1)
    size = share.gather(1, child)[:, 0]
    before = after.gather(1, child)[:, 0] - size
    empty = size == 0
    return child[:, 0], divide(whole - before, lower, size.clamp(min=1)), empty


def _draw(
    logits: Tensor,
    tile_ref: Tensor,
    tile_sum: Tensor,
    rows: Tensor,
    codes: Tensor,
    vocab_size: int,
    bitmask: Tensor | None,
    temperature: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Some of the draws of the torch definition."""
    if temperature is not None:
        temperature = temperature[rows]
    # tiles of the row
    ref = tile_ref[rows].float()
    top = ref.amax(-1, keepdim=True)
    mass = masses(ref, top, temperature) * tile_sum[rows].abs()
    tile, code, no_tile = descend(mass.masked_fill_(top.abs() == torch.inf, 0.0), codes)

    # groups of the tile
    token = tile[:, None] * TILE + torch.arange(TILE, device=logits.device)  # [M, 2048]
    barred = token >= vocab_size
    token.clamp_(max=vocab_size - 1)
    x = logits[rows[:, None], token].float()
    barred |= x.isnan()
    if bitmask is not None:
        barred |= ~bits_at(bitmask, rows[:, None], token)
    x.masked_fill_(barred, -torch.inf)
    mass = masses(x, x.amax(-1, keepdim=True), temperature).view(-1, GROUP_SIZE, GROUPS)
    present = mass.amax(1) > 0
    group, code, no_group = descend(_round(mass * _ONE).sum(1).clamp_(min=1).float().masked_fill_(~present, 0.0), code)

    # tokens of the group
    place, code, _ = descend(mass.gather(2, group[:, None, None].expand(-1, GROUP_SIZE, 1))[:, :, 0], code)
    empty = no_tile | no_group
    return (tile * TILE + place * GROUPS + group).masked_fill_(empty, 0), torch.where(empty, codes, code)


def _invert_cdf(
    logits: Tensor,
    tile_ref: Tensor,
    tile_sum: Tensor,
    rows: Tensor,
    codes: Tensor,
    vocab_size: int,
    bitmask: Tensor | None,
    temperature: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The torch definition."""
    tokens, rest = torch.empty_like(codes), torch.empty_like(codes)
    for start in range(0, codes.shape[0], _DRAWS):
        part = slice(start, start + _DRAWS)
        tokens[part], rest[part] = _draw(
            logits, tile_ref, tile_sum, rows[part], codes[part], vocab_size, bitmask, temperature
        )
    return tokens, rest


def _fake_invert_cdf(
    logits: Tensor,
    tile_ref: Tensor,
    tile_sum: Tensor,
    rows: Tensor,
    codes: Tensor,
    vocab_size: int,
    bitmask: Tensor | None,
    temperature: Tensor | None,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(codes), torch.empty_like(codes)


invert_cdf_op = register(
    "invert_cdf(Tensor logits, Tensor tile_ref, Tensor tile_sum, Tensor rows, Tensor codes, SymInt vocab_size, "
    "Tensor? bitmask, Tensor? temperature) -> (Tensor, Tensor)",
    _invert_cdf,
    _fake_invert_cdf,
    "invert",
)
"""``(tokens int64 [M], codes int64 [M])`` of draws ``codes int64 [M]`` (contiguous) from ``rows int64 [M]``.

``tile_ref`` and ``tile_sum [R, N]`` are of ``summarize_op`` over the same logits, bitmask and temperature with
``renormalize``. A row without mass (all masked, or one with +inf) gives token 0 and leaves the code as it is.
"""


class Inverted(NamedTuple):
    """Draws, one for each code."""

    tokens: Tensor  # int64 [M]; 0 where there is none
    codes: Tensor  # int64 [M], the codes stretched to the interval of the token
    adjusted: Tensor  # float32 [M], logit after temperature; -inf where there is none


def invert_cdf(
    logits: Tensor,
    tile_ref: Tensor,
    tile_sum: Tensor,
    rows: Tensor,
    codes: Tensor,
    *,
    bitmask: Tensor | None = None,
    temperature: Tensor | None = None,
    vocab_size: int | None = None,
) -> Inverted:
    """The tokens whose intervals hold ``codes``.

    Args:
        logits: ``[R, V]``; only the tiles that hold a code are read.
        tile_ref, tile_sum: from ``summarize`` with ``normalize="allowed"``, the same bitmask and temperature.
        rows: int64 ``[M]``, the row of each draw.
        codes: int64 ``[M]``, 64 bits each.
        bitmask, temperature, vocab_size: as given to ``summarize``.

    Returns:
        :class:`Inverted`.

    Raises:
        ValueError, TypeError: ``<argument>: expected X, got Y``.
    """
    size = check_rows(logits, vocab_size, bitmask, temperature)
    check_dtype("tile_sum", tile_sum, torch.float32)
    for name, tiles in (("tile_ref", tile_ref), ("tile_sum", tile_sum)):
        check_shape(name, tiles, "[R, N]", logits.shape[0], tiles_of(size))
    for name, numbers in (("rows", rows), ("codes", codes)):
        check_dtype(name, numbers, torch.int64)
        check_shape(name, numbers, "[M]", rows.shape[0] if rows.dim() else None)
    check_same_device(logits=logits, tile_ref=tile_ref, tile_sum=tile_sum, rows=rows, codes=codes)
    logits, temperature = logits.detach(), contiguous(temperature)
    tokens, codes = invert_cdf_op(
        logits, tile_ref, tile_sum, rows.contiguous(), codes.contiguous(), size, bitmask, temperature
    )
    adjusted = adjust(logits[rows, tokens], None if temperature is None else temperature[rows])
    if bitmask is not None:
        adjusted = adjusted.masked_fill(~bits_at(bitmask, rows, tokens), -torch.inf)
    return Inverted(tokens, codes, adjusted)
