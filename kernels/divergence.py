"""How far two models' distributions are apart, row by row.

    p, q = softmax(x / temperature), softmax(x' / temperature'),   m = (p + q) / 2
    jsd:   (KL(p || m) + KL(q || m)) / 2     the Jensen-Shannon divergence, 0 to log 2
    dola:  (KL(m || p) + KL(m || q)) / 2     what the reference implementation of DoLa computes in its place

A token without mass in both adds nothing. A row without a finite log-sum-exp has divergence NaN or anything. The sum is
a binary tree over tiles of 2048 tokens that depends on V alone. Traffic per row: both tensors, read once.
"""

import torch
from torch import Tensor

from .checks import check_candidates, check_dtype, check_rows, check_same_device, check_shape, check_tensor, contiguous
from .exponential import exp, log
from .registration import register
from .row_blocks import adjusted_rows, row_blocks
from .tiles import TILE, tiles_of


def _halve(x: Tensor) -> Tensor:
    """The sum over the last dimension, padded to a power of two, as a binary tree."""
    size = 1 << (x.shape[-1] - 1).bit_length()
    x = torch.nn.functional.pad(x, (0, size - x.shape[-1]))
    while x.shape[-1] > 1:
        half = x.shape[-1] // 2
        x = x[..., :half] + x[..., half:]
    return x[..., 0]


def _log_probs(
    logits: Tensor, lse: Tensor, temperature: Tensor | None, rows: Tensor | slice, vocab_size: int
) -> Tensor:
    l = (adjusted_rows(logits, rows, vocab_size, temperature) - lse[rows, None]).clamp_(max=0.0)
    return l.masked_fill_(l.isnan(), -torch.inf)


def _divergence(
    x: Tensor,
    other: Tensor,
    lse: Tensor,
    other_lse: Tensor,
    temperature: Tensor | None,
    other_temperature: Tensor | None,
    active: Tensor | None,
    vocab_size: int,
    dola: bool,
) -> Tensor:
    """The torch definition."""
    out = torch.zeros_like(lse)
    read = torch.ones_like(lse, dtype=torch.bool) if active is None else active
    for rows in row_blocks(read, vocab_size):
        lp = _log_probs(x, lse, temperature, rows, vocab_size)
        lq = _log_probs(other, other_lse, other_temperature, rows, vocab_size)
        p, q = exp(lp), exp(lq)
        m = (p + q).mul_(0.5)
        lm = log(m)
        if dola:
            terms = torch.where(m > 0, m * ((lm - lp) + (lm - lq)), 0.0)
        else:
            terms = torch.where(p > 0, p * (lp - lm), 0.0) + torch.where(q > 0, q * (lq - lm), 0.0)
        terms = torch.nn.functional.pad(terms, (0, tiles_of(vocab_size) * TILE - vocab_size))
        out[rows] = _halve(_halve(terms.unflatten(1, (-1, TILE)))) * 0.5
    return out


def _fake(
    x: Tensor,
    other: Tensor,
    lse: Tensor,
    other_lse: Tensor,
    temperature: Tensor | None,
    other_temperature: Tensor | None,
    active: Tensor | None,
    vocab_size: int,
    dola: bool,
) -> Tensor:
    return lse.new_empty(lse.shape)


divergence_op = register(
    "divergence(Tensor x, Tensor other, Tensor lse, Tensor other_lse, Tensor? temperature, Tensor? other_temperature, "
    "Tensor? active, SymInt vocab_size, bool dola) -> Tensor",
    _divergence,
    _fake,
    "divergence",
)


def divergence(
    x: Tensor,
    other: Tensor,
    lse: Tensor,
    other_lse: Tensor,
    *,
    kind: str = "jsd",
    temperature: Tensor | None = None,
    other_temperature: Tensor | None = None,
    active: Tensor | None = None,
    vocab_size: int | None = None,
) -> Tensor:
    """How far apart the distributions of two rows of logits are, in nats.

    Args:
        x, other: ``[R, V]`` float32, float16 or bfloat16, each its own; unit stride over ``V``. Not modified.
        lse, other_lse: ``[R]`` float32, log-sum-exps after temperature.
        kind: ``"jsd"``, the Jensen-Shannon divergence; ``"dola"``, the same with the arguments of both Kullback-Leibler
            divergences swapped.
        temperature, other_temperature: ``[R]`` float32 above 0; divide the logits.
        active: ``[R]`` bool; rows that are not are not read, and have divergence 0.
        vocab_size: columns from here on are padding and never read.

    Returns:
        ``[R]`` float32.

    Numerics: float32, summed in a fixed order: a row's bits depend on that row only.

    Raises:
        ValueError: shapes, strides, devices or ranges differ from the above.
        TypeError: a dtype differs from the above.
    """
    check_tensor("x", x)
    check_tensor("other", other)
    vocab_size = check_rows(x, vocab_size, None, temperature, "x")
    check_shape("other", other, "[R, V]", *x.shape)
    check_rows(other, vocab_size, None, other_temperature, "other")
    check_candidates(x, active, None)
    for name, tensor in (("lse", lse), ("other_lse", other_lse)):
        check_dtype(name, tensor, torch.float32)
        check_shape(name, tensor, "[R]", x.shape[0])
    check_same_device(x=x, other=other, lse=lse, other_lse=other_lse)
    if kind not in ("jsd", "dola"):
        raise ValueError(f"kind: expected 'jsd' or 'dola', got {kind!r}")
    small = (contiguous(field) for field in (lse, other_lse, temperature, other_temperature, active))
    found: Tensor = divergence_op(x.detach(), other.detach(), *small, vocab_size, kind == "dola")
    return found
