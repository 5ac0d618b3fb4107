"""Outputs that are copied from a source: extractive plans and summaries (Adams et al. 2023).

A row may be at several places of its source at once, and keeps them all: ``at[j, p]`` is set where what it said can be
read as spans that end with one at p, which lacks j tokens of the least length m. A place goes on to the next, with one
token less to come; where nothing is lacking, a new span may begin: behind it, or anywhere. What is lacking at p must
still fit behind it, and from there acceptance is possible after

    j + k m  to  S - 1 - p + k S  further tokens        with k spans more; k = 0 if they are to be in order

of which some number must be one that the lengths of a hypothesis allow. The lower ends grow with k, so the least k will
do whose upper end is large enough. A place from which nothing can be accepted leads to no other: it bars what follows,
and need not be forgotten.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from flashbeam.kernels import mark_bits

from ..arguments import whole_number
from .csr import int_array
from .protocol import Bound, Context
from .reach import Ints
from .token_lists import check_inside, check_without_eos, eos_bits, on_device, padded


class Copy:
    """The output is made of spans of the request's source, each of at least ``min_span`` tokens.

    EOS is legal where the last span is long enough, and at once: no span at all is an output. Tokens that could only
    lead to a span that does not fit in the source, or into ``max_length``, are barred in advance.

    Args:
        source: token ids, EOS not among them. For sources that differ by request, give a list of constraints.
        monotone: the spans lie one behind the other in the source, without overlap. With ``range(n)`` as the source and
            ``min_span=1``, outputs are strictly increasing indices. ``False``: anywhere, in any order, again and again.
        min_span: fewest tokens of a span, 1 or more. Two spans side by side in the source are one longer span, too.

    Raises:
        ValueError, TypeError: ``<argument>: expected X, got Y``; EOS, or ids outside the vocabulary, at the first step.
    """

    def __init__(self, source: Any, monotone: bool = True, min_span: int = 1):
        self.source = int_array("source", source)
        if not isinstance(monotone, bool):
            raise TypeError(f"monotone: expected a bool, got {type(monotone).__name__}")
        self.monotone = monotone
        self.min_span = whole_number(1)("min_span", min_span)

    def __repr__(self) -> str:
        return f"Copy({self.source.tolist()}, monotone={self.monotone}, min_span={self.min_span})"

    @staticmethod
    def bind(requests: list["Copy | None"], context: Context) -> Bound:
        """See :class:`Bound`."""
        return _Bound(requests, context)


class _State(NamedTuple):
    at: Tensor  # bool [R, M, S]
    lengths: Tensor  # int64 [R], tokens so far: the same in all rows


class _Sources(NamedTuple):
    """What is known of each request, later of each row."""

    tokens: Tensor  # int32 [B, S], -1 behind the source
    first: Tensor  # int64 [B, S], the first place with the same token
    length: Tensor  # int64 [B]
    free: Tensor  # bool [B], anything is allowed
    anywhere: Tensor  # bool [B], spans need not be in order
    min_span: Tensor  # int64 [B]
    least: Tensor  # int64 [B], fewest tokens of a hypothesis before EOS, or at all if there is none
    most: Tensor  # int64 [B], most tokens of one


class _Bound(Bound):
    def __init__(self, requests: list[Copy | None], context: Context):
        self.context = context
        sources = [np.zeros(0, np.int32) if request is None else request.source for request in requests]
        for source in sources:
            check_inside("source", source, context.vocab_size)
            check_without_eos("source", source, context.eos)
        width = max(1, *map(len, sources))
        # a span longer than the source is none, however much longer
        spans = [1 if each is None else min(each.min_span, len(each.source) + 1) for each in requests]
        least = [n - 1 for n in context.min_lengths] if context.eos else context.max_lengths
        tokens = padded(sources, width)
        columns: list[tuple[Any, type]] = [
            (tokens, np.int32),
            (np.stack([_first_places(row) for row in tokens]), np.int64),
            (list(map(len, sources)), np.int64),
            ([each is None for each in requests], np.bool_),
            ([each is not None and not each.monotone for each in requests], np.bool_),
            (spans, np.int64),
            (least, np.int64),
            (context.open_lengths, np.int64),
        ]
        self.sources = _Sources(*(on_device(values, dtype, context) for values, dtype in columns))
        self.repeats = any(len(np.unique(source)) < len(source) for source in sources)
        self.lacking = torch.arange(max(spans), device=context.device)[:, None]  # [M, 1]
        self.places = torch.arange(width, device=context.device)  # [S]
        self.eos_bits = eos_bits(context)

    def init(self) -> _State:
        rows, device = self.context.rows, self.context.device
        at = torch.zeros(rows, self.lacking.shape[0], self.places.shape[0], dtype=torch.bool, device=device)
        return _State(at, torch.zeros(rows, dtype=torch.int64, device=device))

    def advance(self, state: _State, tokens: Tensor) -> _State:
        source = self._of_rows(state)
        copied = source.tokens == tokens[:, None].int()
        return _State(self._next(state, source) & copied[:, None], state.lengths + 1)

    def bitmask(self, state: _State) -> Tensor:
        source = self._of_rows(state)
        by_request = self._next(state, source).unflatten(0, (self.context.batch_size, -1))
        places = (by_request & self._hopeful(state)[:, None]).flatten(0, 1).any(1)  # bool [R, S]
        row = torch.arange(places.shape[0], device=places.device)[:, None].expand_as(places)
        if self.repeats:  # a token at several places is marked at the first of them
            marked = torch.zeros(places.numel(), dtype=torch.int32, device=places.device)
            marked.scatter_add_(0, (row * places.shape[1] + source.first).flatten(), places.flatten().int())
            places = marked.view_as(places) > 0
        tokens = source.tokens.clamp(min=0).long()
        bitmask = mark_bits(row, tokens, places, places.shape[0], self.context.vocab_size)
        ends = state.at[:, 0].any(1) | (state.lengths == 0)
        bitmask |= self.eos_bits & ends.int().neg()[:, None]
        return bitmask.bitwise_or_(source.free.int().neg()[:, None])

    def _of_rows(self, state: _State) -> _Sources:
        return _Sources(*(self.context.of_rows(field, state.lengths.shape[0]) for field in self.sources))

    def _next(self, state: _State, source: _Sources) -> Tensor:
        """bool ``[R, M, S]``: where a row can be after one more token, whichever it is."""
        complete = state.at[:, 0]
        goes_on = pad(state.at[:, 1:, :-1], (1, 0, 0, 1))
        goes_on[:, 0, 1:] |= complete[:, :-1]
        any_complete, first = complete.byte().max(1)  # the end of the earliest span
        behind = (self.places > first[:, None]) | source.anywhere[:, None]
        begins = (behind & any_complete.bool()[:, None]) | (state.lengths == 0)[:, None]
        starts = self.lacking == source.min_span[:, None, None] - 1  # [R, M, 1]
        return goes_on | (begins[:, None] & starts)

    def _hopeful(self, state: _State) -> Tensor:
        """bool ``[B, M, S]``: who gets here with the next token can be accepted."""
        source, said = self.sources, state.lengths.view(self.context.batch_size, -1)[:, 0] + 1
        left = source.length[:, None, None] - 1 - self.places  # [B, 1, S], places behind this one
        # numbers of further tokens, [B, 1, 1]
        earliest = (source.least - said).clamp(min=0)[:, None, None]
        latest = (source.most - said)[:, None, None]
        length = source.length.clamp(min=1)[:, None, None]
        more = ((earliest - left + length - 1) // length).clamp(min=0)  # spans more, at least
        enough = self.lacking + more * source.min_span[:, None, None] <= latest
        return (self.lacking <= left) & enough & ((more == 0) | source.anywhere[:, None, None])


def _first_places(tokens: Ints) -> Ints:
    """``[S]``: the first place with the token of each."""
    _, first, which = np.unique(tokens, return_index=True, return_inverse=True)
    return first[which.reshape(-1)].astype(np.int32)
