"""Order-preserving keys of candidates, and what every operation on candidates shares.

The total order is (score descending, parent ascending, adjusted logit descending, token ascending). Its keys are two
int64, to be sorted descending: ``(score, parent)`` and ``(adjusted logit, token)``, each an order-preserving float
above an inverted index. The jit side is kernels/triton/keys.py.
"""

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF


def ordered_int(x: Tensor) -> Tensor:
    """float32 -> int64 with the same order; -0.0 equals +0.0."""
    bits = (x + 0.0).view(torch.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long()


def pack_key(value: Tensor, index: Tensor) -> Tensor:
    """An int64 that orders by (float32 ``value`` descending, ``index`` ascending) when sorted descending."""
    return (ordered_int(value) << 32) | (_LOW - index)


def lexsort_descending(first: Tensor, second: Tensor) -> Tensor:
    """Positions that sort pairs of keys ``[B, M]`` in descending order."""
    order = second.sort(stable=True, dim=-1, descending=True).indices
    return order.gather(-1, first.gather(-1, order).sort(stable=True, dim=-1, descending=True).indices)


def adjust(x: Tensor, temperature: Tensor | None) -> Tensor:
    """The adjusted logit: float32, divided by the temperature; NaN counts as -inf."""
    adjusted = x.float()
    if temperature is not None:
        adjusted = adjusted / temperature
    return adjusted.masked_fill(adjusted.isnan(), -torch.inf)


def token_log_prob(adjusted: Tensor, lse: Tensor) -> Tensor:
    """``min(adjusted - lse, 0)``, and ``-inf`` on rows without a finite log-sum-exp."""
    finite = lse.isfinite()
    return (adjusted - lse.masked_fill(~finite, torch.inf)).clamp(max=0.0).masked_fill(~finite, -torch.inf)
