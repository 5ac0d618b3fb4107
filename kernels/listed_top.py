"""The best of what is listed, normalised over what is listed: sums, log-sum-exp and choice from one list.

Bitwise ``summarize_listed``, ``row_lse`` and ``select_listed`` one after the other. On a CPU the list is made, and its
logits are gathered, once; on a GPU it is their three launches.
"""

import torch
from torch import Tensor

from .automaton import allowed_edges, logits_at
from .listed_select import choose_listed
from .listed_summary import allowed_tokens, sum_listed
from .lse import merge_tiles
from .registration import register


def _top_listed(
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
    """The torch definition."""
    if active is not None:
        states = states.masked_fill(~active, -1)
        may_end = None if may_end is None else may_end & active
    rows, edges = allowed_edges(indptr, targets, reach, states, window)
    rows, listed = allowed_tokens(rows, tokens.index_select(0, edges).long(), bitmask)
    x = logits_at(logits, rows, listed)
    sums = sum_listed(rows, listed, x, logits, vocab_size, bitmask, temperature, ends, may_end)
    lse, flags = merge_tiles(*sums, temperature)
    best = choose_listed(rows, listed, x, log_probs, lse, vocab_size, k, temperature, divisor)
    return *best, lse, flags


def _fake_top_listed(
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
    floats = log_probs.new_empty(log_probs.shape[0], k)
    ids = floats.new_empty(floats.shape, dtype=torch.int64)
    lse = log_probs.new_empty(logits.shape[0])
    flags = lse.new_empty(lse.shape, dtype=torch.int32)
    return floats, ids, torch.empty_like(ids), torch.empty_like(floats), lse, flags


top_listed_op = register(
    "top_listed(Tensor indptr, Tensor tokens, Tensor? targets, Tensor reach, Tensor states, Tensor? window, "
    "Tensor logits, Tensor log_probs, SymInt vocab_size, SymInt k, Tensor? bitmask, Tensor? temperature, "
    "Tensor? active, Tensor? ends, Tensor? may_end, Tensor? divisor) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _top_listed,
    _fake_top_listed,
    "listed_top",
)
