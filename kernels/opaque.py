"""Operations in plain torch that a compiler must not look into."""

import torch
from torch import Tensor

from .exponential import exp as _exp
from .registration import register_plain


def _settle(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.clone() for tensor in tensors]


# what a compiler fuses has other bits, and it does not know the number of threads
_exp_op = register_plain("exp(Tensor x) -> Tensor", _exp, torch.empty_like)
_settle_op = register_plain("settle(Tensor[] tensors) -> Tensor[]", _settle, _settle)


def exp(x: Tensor) -> Tensor:
    """``exp(x)`` of float32 ``x``, contiguous, in memory of its own; an ulp or two from the nearest."""
    found: Tensor = _exp_op(x.detach())
    return found


def settled(tensors: list[Tensor]) -> list[Tensor]:
    """The same values, computed before what follows changes the tensors that they were made from.

    Inductor (torch 2.13) would compute anew, behind an operation that writes to its arguments, what was made from these
    before and is used on both sides of it.
    """
    if not torch.compiler.is_compiling():
        return tensors
    found: list[Tensor] = _settle_op(tensors)
    return found
