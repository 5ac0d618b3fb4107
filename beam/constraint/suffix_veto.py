"""Nothing longer than L tokens is copied from a corpus: the provenance veto of TraceAlign (Das et al. 2025).

What may not follow is what follows the last L tokens anywhere in the corpus. They are looked up among the corpus' spans
of L tokens in lexicographic order, each round of the search looking at ``PIVOTS`` of them.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from flashbeam.kernels import Edges, listed_bitmask

from ..arguments import whole_number
from .csr import as_array, int_array, sent
from .protocol import Bound, Context
from .reach import Ints
from .suffix_array import followed_spans
from .token_lists import check_inside, eos_bits, on_device

PIVOTS = 15


class SuffixVeto:
    """No output contains a span of ``corpus`` longer than ``max_span`` tokens.

    EOS is never barred, and is no part of a span. A hypothesis all of whose continuations are barred is lost, as with
    any constraint. To make one of N tokens takes about ``log2(max_span) + 3`` sorts of N numbers; on a device it takes
    at most 16 bytes per token. Make it once: searches share it.

    Args:
        corpus: a list, array or CPU tensor of token ids, or a list of such documents; no span crosses documents.
        max_span: L, the longest span that may be copied; 0 bars every token of the corpus.

    Raises:
        ValueError, TypeError: ``<argument>: expected X, got Y``; ids outside the vocabulary at the first step.
    """

    def __init__(self, corpus: Any, max_span: int):
        self.max_span = whole_number(0)("max_span", max_span)
        self.spans = followed_spans(_documents(corpus), self.max_span)
        self._on_device: dict[torch.device, _Table] = {}

    def __repr__(self) -> str:
        return f"SuffixVeto(<{len(self.spans.text)} tokens>, {self.max_span})"

    def table(self, device: torch.device) -> "_Table":
        """The spans on ``device``, sent there once."""
        if device not in self._on_device:
            self._on_device[device] = _Table(*(sent(each, device) for each in self.spans))
        return self._on_device[device]

    @staticmethod
    def bind(requests: list["SuffixVeto | None"], context: Context) -> Bound:
        """See :class:`Bound`."""
        return _Bound(requests, context)


def _documents(corpus: Any) -> list[Ints]:
    """One or several lists of tokens."""
    if isinstance(corpus, (list, tuple)) and any(np.ndim(each) > 0 for each in corpus[:1]):
        return [int_array(f"corpus[{i}]", document) for i, document in enumerate(corpus)]
    array = as_array("corpus", corpus)
    return [int_array("corpus", row) for row in array] if array.ndim == 2 else [int_array("corpus", array)]


class _Table(NamedTuple):
    """:class:`Spans` on a device."""

    text: Tensor
    starts: Tensor
    indptr: Tensor
    tokens: Tensor


class _State(NamedTuple):
    last: Tensor  # int32 [R, W], the last tokens, -1 before the first


class _Bound(Bound):
    def __init__(self, requests: list[SuffixVeto | None], context: Context):
        self.context = context
        limits = zip(requests, context.max_lengths, strict=True)
        for veto in requests:
            if veto is not None:
                check_inside("corpus", veto.spans.text, context.vocab_size)
        requests = [
            each if each and each.max_span < longest else None for each, longest in limits
        ]  # others bar nothing
        vetoes = list({id(each): each for each in requests if each is not None}.values())
        counts = [len(veto.spans.starts) for veto in vetoes]
        first = dict(zip(map(id, vetoes), np.cumsum([0, *counts]), strict=False))
        bounds = [
            (0, 0) if each is None else (first[id(each)], first[id(each)] + len(each.spans.starts)) for each in requests
        ]
        self.bounds = on_device(bounds, np.int64, context)  # [B, 2], the spans of each request
        lengths = [0 if each is None else each.max_span for each in requests]
        self.width = max(1, *lengths)
        columns = np.arange(self.width) - self.width + np.array(lengths)[:, None]
        self.columns = on_device(columns, np.int64, context)  # [B, W], places in a span; below 0: before it
        self.rounds = 0  # of a search that leaves less than 1 / (PIVOTS + 1)
        while max(counts, default=0) >= (PIVOTS + 1) ** self.rounds:
            self.rounds += 1
        self.shares = torch.arange(1, PIVOTS + 1, device=context.device)
        self.eos_bits = eos_bits(context)
        if self.rounds:
            self.table = _joined([veto.table(context.device) for veto in vetoes])
            reach = self.table.starts[:, None]  # of that shape, and not read: there is no window
            self.edges = Edges(self.table.indptr, self.table.tokens, None, reach)

    def init(self) -> _State:
        shape = (self.context.rows, self.width)
        return _State(torch.full(shape, -1, dtype=torch.int32, device=self.context.device))

    def advance(self, state: _State, tokens: Tensor) -> _State:
        return _State(torch.cat([state.last[:, 1:], tokens[:, None].int()], 1))

    def bitmask(self, state: _State) -> Tensor | None:
        if self.rounds == 0:
            return None
        barred = listed_bitmask(self.edges, self._find(state.last), None, self.context.vocab_size)
        return barred.bitwise_not_() | self.eos_bits

    def _find(self, last: Tensor) -> Tensor:
        """int32 ``[R]``: which span each row said last, -1 for none."""
        rows = last.shape[0]
        low, end = self.context.of_rows(self.bounds, rows)[:, :, None].unbind(1)  # int64 [R, 1]
        columns = self.context.of_rows(self.columns, rows)[:, None]
        high = end
        for _ in range(self.rounds):  # the first span that is not before what was said is in [low, high]
            pivots = low + (high - low) * self.shares // (PIVOTS + 1)
            count = (self._compare(pivots, last, columns) < 0).sum(1, keepdim=True)
            limits = torch.cat([low - 1, pivots, high], 1)
            low, high = limits.gather(1, count) + 1, limits.gather(1, count + 1)
        found = (low < end) & (self._compare(low, last, columns) == 0)
        return low.int().masked_fill_(~found, -1)[:, 0]

    def _compare(self, spans: Tensor, last: Tensor, columns: Tensor) -> Tensor:
        """int32 ``[R, m]``: below 0 where the span is before the row's ``last``, 0 where it equals it."""
        starts = self.table.starts[spans.clamp(max=self.table.starts.shape[0] - 1)]
        tokens = self.table.text[starts[:, :, None] + columns.clamp(min=0)]  # [R, m, W]
        difference = (tokens - last[:, None]).masked_fill_(columns < 0, 0)
        decides = (difference != 0).int().argmax(2, keepdim=True)  # the first
        return difference.gather(2, decides)[:, :, 0]


def _joined(tables: list[_Table]) -> _Table:
    """Several side by side as one."""
    if len(tables) == 1:
        return tables[0]
    texts = np.cumsum([0] + [table.text.shape[0] for table in tables])
    edges = np.cumsum([0] + [table.tokens.shape[0] for table in tables])
    if max(texts[-1], edges[-1]) >= 2**31:
        raise ValueError(f"corpus: expected fewer than 2**31 tokens in one batch, got {texts[-1]}")
    return _Table(
        torch.cat([table.text for table in tables]),
        torch.cat([table.starts + int(shift) for table, shift in zip(tables, texts, strict=False)]),
        torch.cat(
            [tables[0].indptr[:1]]
            + [table.indptr[1:] + int(shift) for table, shift in zip(tables, edges, strict=False)]
        ),
        torch.cat([table.tokens for table in tables]),
    )
