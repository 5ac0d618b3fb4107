"""Sums, log-sum-exp and choice from lists: three launches."""

from torch import Tensor

from .listed_select import launch_select_listed
from .listed_summary import launch_summarize_listed
from .lse import launch_row_lse


def launch_top_listed(
    indptr: Tensor,
    tokens: Tensor,
    targets: Tensor | None,
    reach: Tensor,
    states: Tensor,
    window: Tensor | None,
    logits: Tensor,
    log_probs: Tensor,
    vocab_size: int,
    k: int,
    bitmask: Tensor | None,
    temperature: Tensor | None,
    active: Tensor | None,
    ends: Tensor | None,
    may_end: Tensor | None,
    divisor: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    edges = indptr, tokens, targets, reach, states, window
    sums = launch_summarize_listed(*edges, logits, vocab_size, bitmask, temperature, active, ends, may_end)
    lse, flags = launch_row_lse(*sums, temperature)
    best = launch_select_listed(*edges, logits, log_probs, lse, vocab_size, k, bitmask, temperature, divisor)
    return *best, lse, flags
