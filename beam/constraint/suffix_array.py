"""The spans of a corpus in lexicographic order: a suffix array, sorted no deeper than the spans are long.

Prefix doubling (Karp, Miller and Rosenberg 1972; Manber and Myers 1993): the rank of a span of 2n tokens is that of the
pair of its halves' ranks. Two that overlap do as well, so a span of any length follows from its longest power of two.
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from flashbeam.kernels import place

from .reach import Ints


class Spans(NamedTuple):
    """The distinct spans of L tokens that something follows, and what follows them: arrays, or tensors of a device."""

    text: Ints  # int32 [N], the corpus
    starts: Ints  # int32 [C], where each occurs, in lexicographic order of the spans
    indptr: Ints  # int32 [C + 1]
    tokens: Ints  # int32 [E], of one span distinct and in ascending place(token)


def span_ranks(text: Ints, length: int) -> NDArray[np.int64]:
    """The rank, among all spans of ``length`` tokens, of the one at each place; equal where the spans are.

    Args:
        text: int32 ``[N]``. Behind its end it goes on with something less than any token.
        length: 0 or more.

    Returns:
        int64 ``[N]``.
    """
    if length == 0:
        return np.zeros(len(text), np.int64)
    ranks, sorted_to = _dense(text.astype(np.int64)), 1
    while sorted_to < length:
        shift = min(sorted_to, length - sorted_to)
        behind = np.zeros(len(ranks), np.int64)
        behind[:-shift] = ranks[shift:] + 1
        ranks = _dense(ranks * (len(ranks) + 1) + behind)
        sorted_to += shift
    return ranks


def _dense(keys: NDArray[np.int64]) -> NDArray[np.int64]:
    """The rank of each key among the distinct ones."""
    return np.unique(keys, return_inverse=True)[1].reshape(-1)


def followed_spans(documents: list[Ints], length: int) -> Spans:
    """The spans of ``length`` tokens that are followed by another token of the same document."""
    text = np.concatenate([np.zeros(0, np.int32), *documents])
    ends = np.cumsum([len(document) for document in documents], dtype=np.int64)
    left = np.repeat(ends, [len(document) for document in documents]) - np.arange(len(text))
    at = np.flatnonzero(left > length)
    # a span across documents is ranked too, but nowhere looked at
    _, first, span = np.unique(span_ranks(text, length)[at], return_index=True, return_inverse=True)
    following = text[at + length]
    places = place(torch.from_numpy(following)).numpy().astype(np.int64)
    width = places.max(initial=0) + 1
    edges, where = np.unique(span.reshape(-1) * width + places, return_index=True)
    indptr = np.searchsorted(edges, np.arange(len(first) + 1) * width)
    return Spans(text, at[first].astype(np.int32), indptr.astype(np.int32), following[where])
