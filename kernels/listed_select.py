"""The exact best ``k`` of the listed tokens of each request: bitwise what ``select`` finds with their bitmask."""

import torch
from torch import Tensor

from .automaton import allowed_edges, logits_at
from .listed_summary import allowed_tokens
from .registration import register
from .select import RowFormulas, best_elements


def _select_listed(
    indptr: Tensor,
    tokens: Tensor,
    targets: Tensor | None,
    reach: Tensor,
    states: Tensor,
    window: Tensor | None,
    logits: Tensor,
    log_probs: Tensor,
    lse: Tensor,
    vocab_size: int,
    k: int,
    bitmask: Tensor | None,
    temperature: Tensor | None,
    divisor: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The torch definition."""
    expanded = (log_probs.view(-1) > -torch.inf) & lse.isfinite()
    rows, edges = allowed_edges(indptr, targets, reach, states.masked_fill(~expanded, -1), window)
    rows, listed = allowed_tokens(rows, tokens.index_select(0, edges).long(), bitmask)
    x = logits_at(logits, rows, listed)
    return choose_listed(rows, listed, x, log_probs, lse, vocab_size, k, temperature, divisor)


def choose_listed(
    rows: Tensor,
    listed: Tensor,
    logits: Tensor,
    log_probs: Tensor,
    lse: Tensor,
    vocab_size: int,
    k: int,
    temperature: Tensor | None,
    divisor: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The ``k`` best of listed tokens and their logits ``[M]``, of ascending rows."""
    batch, parents = log_probs.shape
    # one line a request: the edges of all its parents, one after the other
    count = torch.bincount(rows, minlength=batch * parents).view(batch, parents).sum(1)
    width = max(1, int(count.amax())) if batch else 1
    step = torch.arange(0, batch * width, width, device=rows.device) - count.cumsum(0) + count
    position = torch.arange(rows.shape[0], device=rows.device) + step.repeat_interleave(count)
    x = logits.new_full((batch, width), -torch.inf)
    x.view(-1).scatter_(0, position, logits)
    parent = rows.new_zeros(batch, width)
    own = torch.arange(parents, device=rows.device).repeat(batch)  # of each row; division is slow
    parent.view(-1).scatter_(0, position, own.index_select(0, rows))
    # a place without an edge has a token of its own all the same: keys must be distinct
    token = (vocab_size + torch.arange(width, device=rows.device)).repeat(batch, 1)
    token.view(-1).scatter_(0, position, listed)
    x.masked_fill_(x != x, -torch.inf)  # NaN counts as -inf
    formulas = RowFormulas(log_probs, lse, temperature, divisor)
    return best_elements(formulas, x[:, :, None], parent, token[:, :, None], k)


def _fake_select_listed(
    indptr: Tensor,
    tokens: Tensor,
    targets: Tensor | None,
    reach: Tensor,
    states: Tensor,
    window: Tensor | None,
    logits: Tensor,
    log_probs: Tensor,
    lse: Tensor,
    vocab_size: int,
    k: int,
    bitmask: Tensor | None,
    temperature: Tensor | None,
    divisor: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    floats = log_probs.new_empty(log_probs.shape[0], k)
    ids = floats.new_empty(floats.shape, dtype=torch.int64)
    return floats, ids, torch.empty_like(ids), torch.empty_like(floats)


select_listed_op = register(
    "select_listed(Tensor indptr, Tensor tokens, Tensor? targets, Tensor reach, Tensor states, Tensor? window, "
    "Tensor logits, Tensor log_probs, Tensor lse, SymInt vocab_size, SymInt k, Tensor? bitmask, Tensor? temperature, "
    "Tensor? divisor) -> (Tensor, Tensor, Tensor, Tensor)",
    _select_listed,
    _fake_select_listed,
    "listed_select",
)
