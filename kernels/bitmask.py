"""Token masks of one bit per token, in xgrammar's layout.

    word[r, i] = sum over j in [0, 32) of allowed[r, 32 * i + j] * 2**j        int32, bit 1 = allowed

Bits past the vocabulary are written as 0 and never read. One program packs, unpacks or applies one block of one row.
Packing and unpacking move ``V + V / 8`` bytes a row; marking writes ``V / 8``; applying reads ``V / 8`` bytes and
writes only disallowed logits.
"""

import functools

import torch
from torch import Tensor

from .checks import LOGITS_DTYPES, check_dims, check_dtype, check_range, check_same_device, check_shape, check_writable
from .registration import register

WORD_BITS = 32
# eight bools in an int64 times this have bit i of the packed byte, which is byte i of the eight, at bit 56 + i
_GATHER_BITS = sum(1 << (56 - 7 * i) for i in range(8))


@functools.cache
def _bools_of_byte(device: torch.device) -> Tensor:
    """int64 ``[256]``: the eight bytes of entry ``b`` are the eight bits of ``b``, lowest first."""
    byte, bit = torch.arange(256, device=device), torch.arange(8, device=device)
    return ((byte[:, None] >> bit) & 1).to(torch.uint8).view(torch.int64).flatten()


def words_of(vocab_size: int) -> int:
    """Number of words that hold ``vocab_size`` bits."""
    return (vocab_size + WORD_BITS - 1) // WORD_BITS


def bits_at(bitmask: Tensor, rows: Tensor | slice, tokens: Tensor) -> Tensor:
    """bool: the bits of single tokens, ``rows`` and ``tokens`` indexing together as in ``allowed[rows, tokens]``."""
    return (bitmask[rows, tokens >> 5] >> (tokens & 31)) & 1 != 0


def tokens_of(words: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and tokens, int64 ``[n]``, of the bits set in ``words [R, W]``. For torch definitions only: n is read."""
    row, word = words.nonzero().unbind(1)
    at, bit = ((words[row, word][:, None] >> torch.arange(WORD_BITS, device=words.device)) & 1).nonzero().unbind(1)
    return row[at], word[at] * WORD_BITS + bit


def set_bits(rows: Tensor, tokens: Tensor, size: int, words: int) -> Tensor:
    """int32 ``[size, words]`` with the bits of distinct pairs ``[n]``; for torch definitions."""
    bits = torch.ones_like(tokens) << (tokens & 31)
    flat = torch.zeros(size * words, dtype=torch.int32, device=tokens.device)
    # distinct, so their sum is their union
    flat.scatter_add_(0, rows * words + (tokens >> 5), bits.int())
    return flat.view(size, words)


def _mark(rows: Tensor, tokens: Tensor, marked: Tensor, size: int, vocab_size: int) -> Tensor:
    """The torch definition. Few are marked, as a rule: the others are not worth their arithmetic."""
    where = marked.nonzero(as_tuple=True)
    return set_bits(rows[where], tokens[where].long(), size, words_of(vocab_size))


def _mark_fake(rows: Tensor, tokens: Tensor, marked: Tensor, size: int, vocab_size: int) -> Tensor:
    return tokens.new_empty((size, words_of(vocab_size)), dtype=torch.int32)


def _pack(mask: Tensor) -> Tensor:
    """The torch definition."""
    *lead, vocab_size = mask.shape
    words = words_of(vocab_size)
    octets = mask.new_zeros((*lead, words, 4), dtype=torch.int64)  # eight bools each
    octets.view(torch.bool).view(*lead, words * WORD_BITS)[..., :vocab_size] = mask
    return ((octets * _GATHER_BITS) >> 56).to(torch.uint8).view(torch.int32).squeeze(-1)


def _pack_fake(mask: Tensor) -> Tensor:
    return mask.new_empty((*mask.shape[:-1], words_of(mask.shape[-1])), dtype=torch.int32)


def _unpack(bitmask: Tensor, vocab_size: int) -> Tensor:
    """The torch definition."""
    words = bitmask[..., : words_of(vocab_size)].contiguous()
    octets = words.view(torch.uint8).flatten().int()
    bools = _bools_of_byte(bitmask.device).index_select(0, octets).view(torch.bool)
    return bools.view(*words.shape[:-1], words.shape[-1] * WORD_BITS)[..., :vocab_size].contiguous()


def _unpack_fake(bitmask: Tensor, vocab_size: int) -> Tensor:
    return bitmask.new_empty((*bitmask.shape[:-1], vocab_size), dtype=torch.bool)


def _apply(logits: Tensor, bitmask: Tensor) -> None:
    """The torch definition."""
    logits.masked_fill_(_unpack(~bitmask, logits.shape[-1]), -torch.inf)


def _apply_fake(logits: Tensor, bitmask: Tensor) -> None:
    return None


_pack_op = register("pack_bitmask(Tensor mask) -> Tensor", _pack, _pack_fake, "bitmask")
_mark_op = register(
    "mark_bits(Tensor rows, Tensor tokens, Tensor marked, SymInt size, SymInt vocab_size) -> Tensor",
    _mark,
    _mark_fake,
    "bitmask",
)
_unpack_op = register("unpack_bitmask(Tensor bitmask, SymInt vocab_size) -> Tensor", _unpack, _unpack_fake, "bitmask")
_apply_op = register("apply_bitmask_(Tensor(a!) logits, Tensor bitmask) -> ()", _apply, _apply_fake, "bitmask")


def mark_bits(rows: Tensor, tokens: Tensor, marked: Tensor, size: int, vocab_size: int) -> Tensor:
    """A bitmask of the pairs of ``rows`` and ``tokens`` that are ``marked``.

    Args:
        rows: int64, any shape and strides, below ``size``.
        tokens: int64 or int32, the same shape, below ``vocab_size``.
        marked: bool, the same shape. Pairs that are marked are distinct; those that are not may be anything.
        size: rows of the bitmask.
        vocab_size: number of tokens.

    Returns:
        ``[size, ceil(vocab_size / 32)]`` int32.

    Raises:
        ValueError: shapes or devices differ from the above.
        TypeError: a dtype differs from the above.
    """
    check_dtype("rows", rows, torch.int64)
    check_dtype("tokens", tokens, torch.int64, torch.int32)
    check_dtype("marked", marked, torch.bool)
    for name, field in (("tokens", tokens), ("marked", marked)):
        if field.shape != rows.shape:
            raise ValueError(f"{name}: expected the shape of rows, {list(rows.shape)}, got {list(field.shape)}")
    check_same_device(rows=rows, tokens=tokens, marked=marked)
    return _mark_op(rows, tokens, marked, size, vocab_size)


def pack_bitmask(mask: Tensor) -> Tensor:
    """Pack bools into words of 32 bits, ``True`` becoming bit 1.

    Args:
        mask: ``[..., V]`` bool, any strides. Not modified.

    Returns:
        ``[..., ceil(V / 32)]`` int32; token ``j`` is bit ``j % 32`` of word ``j // 32``; bits past ``V`` are 0.

    Raises:
        ValueError: ``mask`` has no dimension.
        TypeError: ``mask`` is not a bool tensor.
    """
    check_dtype("mask", mask, torch.bool)
    check_dims("mask", mask, 1)
    return _pack_op(mask)


def unpack_bitmask(bitmask: Tensor, vocab_size: int) -> Tensor:
    """Unpack the first ``vocab_size`` bits of every row: the inverse of :func:`pack_bitmask`.

    Args:
        bitmask: ``[..., W]`` int32, any strides. Not modified.
        vocab_size: number of tokens, at most ``32 * W``.

    Returns:
        ``[..., vocab_size]`` bool, ``True`` = allowed.

    Raises:
        ValueError: ``bitmask`` has no dimension, or ``vocab_size`` is outside ``[0, 32 * W]``.
        TypeError: ``bitmask`` is not an int32 tensor, or ``vocab_size`` is not an int.
    """
    check_dtype("bitmask", bitmask, torch.int32)
    check_dims("bitmask", bitmask, 1)
    check_range("vocab_size", vocab_size, 0, bitmask.shape[-1] * WORD_BITS)
    return _unpack_op(bitmask, vocab_size)


def apply_bitmask_(logits: Tensor, bitmask: Tensor) -> Tensor:
    """Set the logits of disallowed tokens to ``-inf``, in place.

    Equivalent to::

        logits.masked_fill_(~unpack_bitmask(bitmask, logits.shape[-1]), -torch.inf)

    Args:
        logits: ``[V]``, ``[R, V]`` or ``[B, K, V]`` float32, float16 or bfloat16, any strides without overlap.
            Modified.
        bitmask: ``[W]``, ``[R, W]`` or ``[B, K, W]`` int32 with ``W >= ceil(V / 32)``, bit 1 = allowed, any strides.
            Words past ``ceil(V / 32)`` are ignored. Not modified.

    Returns:
        ``logits``. Allowed logits keep their bits, NaN included.

    Raises:
        ValueError: shapes, devices or strides differ from the above.
        TypeError: a dtype differs from the above.
    """
    check_dtype("logits", logits, *LOGITS_DTYPES)
    check_dtype("bitmask", bitmask, torch.int32)
    if logits.dim() not in (1, 2, 3):
        raise ValueError(f"logits: expected shape [V], [R, V] or [B, K, V], got {list(logits.shape)}")
    check_dims("bitmask", bitmask, 1)
    needed = words_of(logits.shape[-1])
    if bitmask.shape[-1] < needed:
        raise ValueError(f"bitmask: expected at least {needed} words a row, got {bitmask.shape[-1]}")
    check_shape("bitmask", bitmask, "[..., W]", *logits.shape[:-1], bitmask.shape[-1])
    check_writable("logits", logits)
    check_same_device(logits=logits, bitmask=bitmask)
    _apply_op(logits.detach(), bitmask)
    return logits
