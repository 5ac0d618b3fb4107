"""The entropy of each row's distribution, once its log-sum-exp is known.

    d = max(lse - x / temperature, 0),   w = exp(-d),   s = sum of w
    H[row] = (sum of w * d) / s + log(s)      nats

over the tokens that the log-sum-exp was taken over. No term of a sum is below 0, so none cancel; a token without mass
adds nothing; and s, which would be 1, makes up for the rounding of the log-sum-exp. A row without a finite one is no
distribution, and has entropy 0.

One program owns a row and reads it once. Traffic is ``V * sizeof(x)`` bytes a row.
"""

import torch
from torch import Tensor

from .bitmask import unpack_bitmask
from .checks import check_candidates, check_dtype, check_rows, check_same_device, check_shape, contiguous
from .exponential import exp
from .registration import register

_BLOCK = 1 << 18  # logits at a time: 1 MB of float32 stays in cache


def _add_halves(x: Tensor) -> Tensor:
    """The sums of rows ``[R, n]``, n a power of two, in one order whatever R is."""
    while x.shape[1] > 1:
        half = x.shape[1] // 2
        x = x[:, :half] + x[:, half:]
    return x[:, 0]


def _row_entropy(
    logits: Tensor,
    vocab_size: int,
    lse: Tensor,
    bitmask: Tensor | None,
    temperature: Tensor | None,
    active: Tensor | None,
) -> Tensor:
    """The torch definition."""
    found = torch.zeros_like(lse)
    there = lse.isfinite() if active is None else lse.isfinite() & active
    size = 1 << (vocab_size - 1).bit_length()
    for rows in there.nonzero()[:, 0].split(max(1, _BLOCK // size)):
        x = lse.new_full((rows.shape[0], size), -torch.inf)
        inside = x[:, :vocab_size].copy_(logits[rows, :vocab_size])
        if temperature is not None:
            inside /= temperature[rows, None]
        if bitmask is not None:
            inside.masked_fill_(~unpack_bitmask(bitmask[rows], vocab_size), -torch.inf)
        below = (lse[rows, None] - x).clamp_(min=0.0).nan_to_num_(torch.inf, torch.inf)
        weights = exp(-below)
        below.masked_fill_(below == torch.inf, 0.0)
        total = _add_halves(weights)
        found[rows] = _add_halves(weights * below) / total + total.log()
    return found


def _fake_row_entropy(
    logits: Tensor,
    vocab_size: int,
    lse: Tensor,
    bitmask: Tensor | None,
    temperature: Tensor | None,
    active: Tensor | None,
) -> Tensor:
    return torch.empty_like(lse)


_row_entropy_op = register(
    "row_entropy(Tensor logits, SymInt vocab_size, Tensor lse, Tensor? bitmask, Tensor? temperature, Tensor? active) "
    "-> Tensor",
    _row_entropy,
    _fake_row_entropy,
    "entropy",
)


def row_entropy(
    logits: Tensor,
    lse: Tensor,
    *,
    bitmask: Tensor | None = None,
    temperature: Tensor | None = None,
    active: Tensor | None = None,
    vocab_size: int | None = None,
) -> Tensor:
    """The entropy of every row's distribution in nats.

    Equivalent to::

        log_p = logits.float() / temperature[:, None] - lse[:, None]
        -(log_p.exp() * log_p).sum(-1)

    except that rows are reduced in a fixed order, and that tokens without mass count as 0.

    Args:
        logits: ``[R, V]`` float32, float16 or bfloat16; unit stride over ``V``. Not modified.
        lse: ``[R]`` float32, the log-sum-exp of what is normalised over, of :func:`summarize`.
        bitmask: ``[R, ceil(V / 32)]`` int32, what of it was; ``None``: all of the vocabulary.
        temperature: ``[R]`` float32 above 0, as given to :func:`summarize`.
        active: ``[R]`` bool; other rows are not read.
        vocab_size: columns from here on are padding and never read.

    Returns:
        ``[R]`` float32; 0 for rows that are not active or have no finite ``lse``.

    Numerics: float32, error a few ulps of the sum; a row's result depends on that row and V only.

    Raises:
        ValueError: shapes, strides, devices or ranges differ from the above.
        TypeError: a dtype differs from the above.
    """
    vocab_size = check_rows(logits, vocab_size, bitmask, temperature)
    check_candidates(logits, active, None)
    check_dtype("lse", lse, torch.float32)
    check_shape("lse", lse, "[R]", logits.shape[0])
    check_same_device(logits=logits, lse=lse)
    lse = lse.detach().contiguous()
    found: Tensor = _row_entropy_op(
        logits.detach(), vocab_size, lse, bitmask, contiguous(temperature), contiguous(active)
    )
    return found
