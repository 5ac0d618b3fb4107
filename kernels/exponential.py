"""Exponentials and logarithms whose bits do not depend on where in a tensor an element stands."""

import torch
from torch import Tensor

LOG2E = 1.4426950408889634


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


def exp(x: Tensor) -> Tensor:
    """``exp(x)`` of float32 ``x``, contiguous, in memory of its own; an ulp or two from the nearest."""
    work = x.new_empty(evenly_split(x.numel()))  # what lies behind x is exponentiated too, and never looked at
    found = work[: x.numel()].view(x.shape)
    torch.mul(x, LOG2E, out=found)
    work.exp2_()  # several times faster than exp_ on some CPUs
    return found


def log(x: Tensor) -> Tensor:
    """``log(x)`` of float32 ``x``, contiguous, in memory of its own."""
    size = evenly_split(x.numel())
    if size == x.numel():
        return x.log()
    work = x.new_empty(size)
    found = work[: x.numel()].view(x.shape).copy_(x)
    work.log_()
    return found
