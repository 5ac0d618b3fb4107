"""How torch definitions on whole rows go through them: some at a time, as floats."""

from collections.abc import Iterator

import torch
from torch import Tensor

_BLOCK = 1 << 17  # logits at a time: with what is made of them they stay in cache; measured best of 2**15 to 2**20


def row_blocks(which: Tensor, vocab_size: int) -> Iterator[Tensor | slice]:
    """The rows set in ``which [R]``, as many at a time as make a block: a slice where they follow each other."""
    rows = which.nonzero()[:, 0]
    if rows.numel() == 0:
        return
    size = max(1, _BLOCK // vocab_size)
    for some in rows.split(size):
        first, last = int(some[0]), int(some[-1])
        yield slice(first, last + 1) if last + 1 - first == some.shape[0] else some


def adjusted_rows(logits: Tensor, rows: Tensor | slice, vocab_size: int, temperature: Tensor | None) -> Tensor:
    """float32 ``[n, V]`` of ``rows``, by ``temperature [R]``. Not to be changed: it may be the logits themselves."""
    x = logits[rows, :vocab_size].float()
    return x if temperature is None else x / temperature[rows, None]


def row_log_probs(adjusted: Tensor, lse: Tensor) -> Tensor:
    """``token_log_prob`` of ``adjusted [n, V]`` and ``lse [n, 1]``, in memory of its own; NaN stays NaN."""
    l = (adjusted - lse).clamp_(max=0.0)
    return l if bool(lse.isfinite().all()) else l.masked_fill_(~lse.isfinite(), -torch.inf)
