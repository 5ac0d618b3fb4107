"""Beams walking through automata: one or several in a batch, laid into one table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from flashbeam.kernels import Edges, Listed, follow, listed_bitmask, pack_bitmask

from .protocol import Bound, Context

if TYPE_CHECKING:
    from .automaton import Automaton

LIST_SHARE = 4  # tokens are listed, not masked, where this many times the longest list is at most the vocabulary


class Walk(NamedTuple):
    """Where rows are in their automata."""

    states: Tensor  # int32 [R], -1 is dead
    lengths: Tensor  # int32 [R], tokens so far


class Begun(Walk):
    """The same before the first token: its type tells the host, who may not ask the tensors."""


class Walking(Bound):
    """Automata at work."""

    def __init__(self, requests: Sequence[Automaton | None], context: Context):
        self.context = context
        automata = list({id(each): each for each in requests if each is not None}.values())
        for automaton in automata:
            automaton.check_tokens(context)
        words = [automaton.words(max(context.max_lengths)) for automaton in automata]
        self.edges, shifts = _joined([each.edges(context.device, n) for each, n in zip(automata, words, strict=True)])
        shift_of = {id(each): shift for each, shift in zip(automata, shifts, strict=True)}
        starts = [-1 if each is None else each.start + shift_of[id(each)] for each in requests]
        self.starts = self._on_device(starts)  # int32 [B]
        self.min_lengths = self._on_device(context.min_lengths)
        self.max_lengths = self._on_device(context.open_lengths)
        self.free = self._on_device([each is None for each in requests]).bool() if None in requests else None
        limits = zip(requests, context.min_lengths, context.open_lengths, strict=True)
        bounded = [each for each, low, high in limits if each and not each.all_lead(low, high, bool(context.eos))]
        steps = torch.arange(32 * self.edges.reach.shape[1], dtype=torch.int32, device=context.device)
        self.steps = steps if bounded else None
        self.eos_bits = self._bits(context.eos) if context.eos else None  # int32 [ceil(V / 32)]
        self.widest_first = max(each.widest[0] for each in automata)
        self.widest = max(each.widest[1] for each in automata)

    def _on_device(self, numbers: Sequence[int]) -> Tensor:
        return torch.from_numpy(np.asarray(numbers, np.int32)).to(self.context.device, non_blocking=True)

    def _bits(self, tokens: Sequence[int]) -> Tensor:
        marked = torch.zeros(self.context.vocab_size, dtype=torch.bool)
        marked[list(tokens)] = True
        return pack_bitmask(marked).to(self.context.device, non_blocking=True)

    def init(self) -> Walk:
        states = self.context.of_rows(self.starts, self.context.rows)
        return Begun(states, torch.zeros_like(states))

    def advance(self, state: Walk, tokens: Tensor) -> Walk:
        return Walk(follow(self.edges, state.states, tokens), state.lengths + 1)

    def bitmask(self, state: Walk) -> Tensor:
        bits = listed_bitmask(self.edges, state.states, self._window(state), self.context.vocab_size)
        may_end = self._may_end(state)
        if may_end is not None and self.eos_bits is not None:
            bits = torch.where(may_end[:, None], bits | self.eos_bits, bits)
        if self.free is not None:
            bits = bits.masked_fill(self._of_rows(self.free, state)[:, None], -1)
        return bits

    def listed(self, state: Walk) -> tuple[Listed | None, Tensor | None]:
        widest = self.widest_first if isinstance(state, Begun) else self.widest
        if self.free is not None or LIST_SHARE * widest > self.context.vocab_size:
            return None, self.bitmask(state)
        return Listed(self.edges, state.states, self._window(state), self._may_end(state)), None

    def _window(self, state: Walk) -> Tensor | None:
        """int32 ``[R, L]``: after how many tokens, the next one not counted, a row may be accepted."""
        if self.steps is None:
            return None
        after = state.lengths + 1
        latest = self._of_rows(self.max_lengths, state) - after
        earliest = latest
        if self.context.eos:  # which is one token more, where max_length leaves room for it
            earliest = (self._of_rows(self.min_lengths, state) - 1 - after).clamp(min=0)
        return pack_bitmask((self.steps >= earliest[:, None]) & (self.steps <= latest[:, None]))

    def _may_end(self, state: Walk) -> Tensor | None:
        """bool ``[R]``: EOS may follow."""
        if not self.context.eos:
            return None
        accepting = self.edges.reach[:, 0].index_select(0, state.states.clamp(min=0)) & 1 != 0
        return accepting & (state.states >= 0) & (state.lengths + 1 >= self._of_rows(self.min_lengths, state))

    def _of_rows(self, per_request: Tensor, state: Walk) -> Tensor:
        return self.context.of_rows(per_request, state.states.shape[0])


def _joined(parts: list[Edges]) -> tuple[Edges, list[int]]:
    """Automata side by side as one, and how far the states of each are shifted."""
    if len(parts) == 1:
        return parts[0], [0]
    words = max(part.reach.shape[1] for part in parts)
    states, edges = [0], [0]
    for part in parts:
        states.append(states[-1] + part.reach.shape[0])
        edges.append(edges[-1] + part.tokens.shape[0])
    if max(states[-1], edges[-1]) >= 2**31:
        raise ValueError(f"constraint: expected automata of fewer than 2**31 states and edges, got {states[-1]}")
    targets = []
    for part, shift in zip(parts, states, strict=False):
        if part.targets is None:
            first, count = shift + 1, part.tokens.shape[0]
            targets.append(torch.arange(first, first + count, dtype=torch.int32, device=part.tokens.device))
        else:
            targets.append(part.targets + shift)
    indptr = [parts[0].indptr[:1]] + [part.indptr[1:] + shift for part, shift in zip(parts, edges, strict=False)]
    reach = [pad(part.reach, (0, words - part.reach.shape[1])) for part in parts]
    joined = Edges(torch.cat(indptr), torch.cat([part.tokens for part in parts]), torch.cat(targets), torch.cat(reach))
    return joined, states[:-1]
