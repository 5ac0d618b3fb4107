"""Exponentials whose bits do not depend on where in a tensor an element stands."""

import torch
from torch import Tensor

from .summary import LOG2E, evenly_split


def exp(x: Tensor) -> Tensor:
    """``exp(x)`` of float32 ``x``, contiguous, in memory of its own; an ulp or two from the nearest."""
    work = x.new_empty(evenly_split(x.numel()))  # what lies behind x is exponentiated too, and never looked at
    found = work[: x.numel()].view(x.shape)
    torch.mul(x, LOG2E, out=found)
    work.exp2_()  # several times faster than exp_ on some CPUs
    return found
