"""Lists of tokens, as constraints are given them, checked against the vocabulary and sent to the device."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flashbeam.kernels import pack_bitmask

from .protocol import Context
from .reach import Ints


def check_inside(name: str, tokens: Ints, vocab_size: int) -> None:
    """All ``tokens`` are ids of the vocabulary."""
    if tokens.size and tokens.max() >= vocab_size:
        raise ValueError(f"{name}: expected ids inside the vocabulary of {vocab_size}, got {tokens.max()}")


def check_without_eos(name: str, tokens: Ints, eos: Sequence[int]) -> None:
    """None of ``tokens`` is an EOS id."""
    found = np.isin(tokens, np.asarray(eos, np.int32))
    if found.any():
        raise ValueError(f"{name}: expected no EOS, got {tokens[found.argmax()]}")


def padded(lists: Sequence[Any], width: int) -> Ints:
    """int32 ``[len(lists), width]``: ``lists`` side by side, each followed by -1."""
    table = np.full((len(lists), width), -1, np.int32)
    for row, tokens in zip(table, lists, strict=True):
        row[: len(tokens)] = tokens
    return table


def on_device(values: Any, dtype: type, context: Context) -> Tensor:
    """``values``, which are on the host, as a tensor where the search is."""
    return torch.from_numpy(np.array(values, dtype)).to(context.device, non_blocking=True)


def eos_bits(context: Context) -> Tensor:
    """int32 ``[ceil(V / 32)]``: the bits of EOS."""
    marked = torch.zeros(context.vocab_size, dtype=torch.bool)
    marked[list(context.eos)] = True
    return pack_bitmask(marked).to(context.device, non_blocking=True)
