"""Beams of every progress: the best candidate of each bank in turn, from the most advanced bank down.

A bank is how far a constraint says that a candidate has come (``Expansion.banks``). The candidates of a bank are in the
total order; those in the n-th place of their banks come before those in the next, and among them the more advanced bank
goes first. The K first in this order of banks live on, as in the vectorised dynamic beam allocation of Hu et al. 2019,
"Improved lexically constrained decoding". An EOS candidate is in the bank of what it ends, which is the last of all.

All tokens that make no difference to progress put a row's candidates into one bank, so the K best of them are enough.
"""

from typing import Any

import torch
from torch import Tensor

from flashbeam.kernels import (
    FLAG_INEXACT,
    Candidates,
    adjust,
    bits_at,
    mark_bits,
    summarize,
    token_log_prob,
    top_candidates,
    total_order,
)

from ..constraint import Banks, Proposed
from .choosing import endings_of, rivals, take
from .protocol import Decided, Expansion, Ranked

_LAST = torch.iinfo(torch.int64).max
_SHOWN_PER_BEAM = 4  # candidates of a row that a veto sees, unless the constraint says how many


def banked(expansion: Expansion, k: int) -> Ranked | Decided:
    """The ``k`` first in the order of banks, in the total order."""
    assert expansion.banks is not None
    count = k if expansion.veto is None else max(k, expansion.veto.considers or _SHOWN_PER_BEAM * k)
    count = min(count, expansion.vocab_size)
    found = _candidates(expansion, expansion.banks, count)
    ends = endings_of(expansion, found.lse)
    in_place = expansion.divisor is not None
    groups = [(found.log_probs, found.parents, found.adjusted, found.tokens)]
    if ends is not None:
        groups.append((ends.log_probs, ends.parents, ends.adjusted, ends.tokens))
    if in_place:
        choices, order = rivals(expansion, found, ends)
        log_probs, parents, tokens = (
            torch.cat(fields, 1).gather(1, order)
            for fields in zip(*((choice.log_probs, choice.parents, choice.tokens) for choice in choices), strict=True)
        )
    else:
        order = total_order(*groups)
        log_probs, parents, _, tokens = (torch.cat(fields, 1).gather(1, order) for fields in zip(*groups, strict=True))

    # from here on in the total order
    size, stop = found.tokens.shape[1], sum(tokens.shape[1] for *_, tokens in groups)
    is_other, is_end = order < size, (order >= size) & (order < stop)
    rows = torch.arange(0, expansion.logits.shape[0], expansion.parents, device=order.device)[:, None]
    rows = rows + parents.clamp(max=expansion.parents - 1)  # more slots than rows at first, none of them frozen
    there = log_probs > -torch.inf
    if expansion.veto is not None:
        frozen = ~(is_other | is_end)
        vetoed = expansion.veto.ask(Proposed(rows, tokens, log_probs.masked_fill(frozen, -torch.inf)))
        there = there & (frozen | ~vetoed)
    bank = expansion.banks.progress(rows, tokens)
    width = expansion.limits.width[:, None]
    foremost = there & (_rank(bank, there) < width)
    if in_place:
        chosen, none = _first(foremost, k)
        choice = take(choices, order.gather(1, chosen))
        choice = choice._replace(log_probs=choice.log_probs.masked_fill(none, -torch.inf))
        return Decided(choice, _flags(expansion, found, count, foremost))

    others = there & is_other
    last = (expansion.limits.max_length == expansion.requests.steps + 1)[:, None]
    keep = others & torch.where(last, foremost, _rank(bank, others) < width)
    chosen, none = _first(keep, k)
    place = order.gather(1, chosen).masked_fill(none, 0)
    log_probs, adjusted = (x.gather(1, place).masked_fill(none, -torch.inf) for x in (found.log_probs, found.adjusted))
    parents, tokens = (x.gather(1, place).masked_fill(none, 0) for x in (found.parents, found.tokens))
    flags = _flags(expansion, found, count, keep)
    best = Candidates(log_probs, parents, tokens, adjusted, found.lse, flags, log_probs)
    if ends is None:
        return Ranked(best)
    return Ranked(best, finishing=torch.empty_like(foremost).scatter_(1, order, foremost)[:, size:stop])


def _candidates(expansion: Expansion, banks: Banks, count: int) -> Candidates:
    """Of every row the ``count`` best tokens that make no difference to progress, and all that do: ``[B, M]``."""
    slots, parents = expansion.slots, expansion.parents
    (rows, columns), vocab_size = banks.alphabet.shape, expansion.vocab_size
    marked = banks.alphabet >= 0
    tokens = banks.alphabet.clamp(min=0)
    row = torch.arange(rows, device=tokens.device)[:, None].expand_as(tokens)
    indifferent = ~mark_bits(row, tokens, marked, rows, vocab_size)
    mask = expansion.bitmask
    if mask is not None:
        indifferent &= mask[:, : indifferent.shape[1]]
        marked = marked & bits_at(mask, row, tokens)
    options: dict[str, Any] = {
        "temperature": expansion.temperature,
        "active": expansion.active,
        "vocab_size": vocab_size,
    }
    log_probs = slots.log_probs[:, :parents]
    best = top_candidates(
        expansion.logits,
        log_probs.reshape(rows, 1),
        count,
        bitmask=indifferent,
        exclude=expansion.eos,
        normalize=expansion.normalize,
        **options,
    )
    lse, flags = best.lse, best.flags
    if expansion.normalize == "allowed":
        whole = summarize(expansion.logits, bitmask=mask, normalize="allowed", **options)
        lse, flags = whole.lse, whole.flags

    temperature = None if expansion.temperature is None else expansion.temperature[:, None]
    adjusted = adjust(expansion.logits.gather(1, tokens), temperature)
    adjusted = adjusted.masked_fill(~(marked & expansion.active[:, None]), -torch.inf)
    adjusted = torch.cat([best.adjusted, adjusted], 1).view(-1, parents, count + columns)
    tokens = torch.cat([best.tokens, tokens], 1).view_as(adjusted)
    increments = token_log_prob(adjusted, lse.view(-1, parents, 1))
    log_probs = (log_probs[:, :, None] + increments).flatten(1)
    parent = torch.arange(parents, device=tokens.device)[:, None].expand_as(tokens)
    return Candidates(log_probs, parent.flatten(1), tokens.flatten(1), adjusted.flatten(1), lse, flags, log_probs)


def _rank(bank: Tensor, there: Tensor) -> Tensor:
    """Places in the order of banks of candidates ``[B, M]``, given in the total order; what is not there is last."""
    bank, by_bank = bank.masked_fill(~there, -1).sort(dim=1, descending=True, stable=True)
    index = torch.arange(bank.shape[1], device=bank.device).expand_as(bank)
    first = torch.nn.functional.pad(bank[:, 1:] != bank[:, :-1], (1, 0), value=True)
    stripe = index - index.masked_fill(~first, 0).cummax(1).values
    order = by_bank.gather(1, stripe.masked_fill(bank < 0, _LAST).sort(dim=1, stable=True).indices)
    return torch.empty_like(order).scatter_(1, order, index)


def _first(keep: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Positions ``[B, k]`` of the first to ``keep [B, M]``, and where there are no more."""
    missing = k - keep.shape[1]
    keep = torch.nn.functional.pad(keep, (0, max(0, missing)), value=False)
    kept, order = keep.sort(dim=1, descending=True, stable=True)
    return order[:, :k].masked_fill(~kept[:, :k], 0), ~kept[:, :k]


def _flags(expansion: Expansion, found: Candidates, count: int, keep: Tensor) -> Tensor:
    """Faults of the rows; ``FLAG_INEXACT`` where a veto left too few of what it was shown, and there is more."""
    if expansion.veto is None:
        return found.flags
    shown = found.log_probs.view(-1, expansion.parents, found.tokens.shape[1] // expansion.parents)
    short = (shown[:, :, count - 1] > -torch.inf).any(1) & (keep.sum(1) < expansion.limits.width)
    flags = found.flags.view(-1, expansion.parents).clone()
    flags[:, 0] |= short.int() * FLAG_INEXACT
    return flags.flatten()
