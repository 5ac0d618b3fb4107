"""A set of token sequences as a constraint."""

from __future__ import annotations

from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flashbeam.kernels import place

from .automaton import Automaton
from .csr import LARGEST, as_array, restored_edges
from .reach import Bools, Ints, reach_of_tree
from .storage import Arrays


class Trie(Automaton):
    """What may be generated are the given items: sequences of tokens, such as the titles of a catalogue.

    An item may be the beginning of another, and may be empty; EOS may follow where one ends, see :class:`Automaton`.
    Items longer than ``max_length`` are barred as soon as only they remain. A tree in breadth-first order, of 12 bytes
    a node (4 more for every 32 tokens of the longest item).

    Args:
        sequences: a list of lists of token ids, or ints ``[N, n]`` in an array or a CPU tensor; not kept. Duplicates
            count once.
        pad: in an array, what comes after items that are shorter than ``n``.
        lengths: for an array, int ``[N]``, how many tokens each item has.

    Raises:
        ValueError, TypeError: ``<argument>: expected X, got Y``.
    """

    _argument = "sequences"

    def __init__(self, sequences: Any, *, pad: int | None = None, lengths: Any = None):
        tree = grow(*_flattened(sequences, pad, lengths))
        self._keep(tree.indptr, tree.tokens, reach_of_tree(tree.sizes, np.diff(tree.indptr), tree.accepting))

    def _keep(self, indptr: Ints, tokens: Ints, table: Ints) -> None:
        self._hold(indptr, tokens, None, 0)
        self._table = table
        lengths = np.flatnonzero(np.unpackbits(table[0].view(np.uint8), bitorder="little"))
        self.shortest, self.longest = int(lengths[0]), int(lengths[-1])

    def _arrays(self) -> Arrays:
        return {"indptr": self.indptr, "tokens": self.tokens, "reach": self._table}

    def _restore(self, arrays: Arrays, numbers: dict[str, int]) -> None:
        indptr, tokens, _ = restored_edges(arrays["indptr"], arrays["tokens"], None)
        table = arrays["reach"]
        if table.dtype != np.int32 or table.ndim != 2 or len(table) != len(indptr) - 1 or not table[0].any():
            raise ValueError("its table of reach is not one")
        self._keep(indptr, tokens, table)

    def words(self, max_length: int) -> int:
        """L, the same for every search."""
        return int(self._table.shape[1])

    def reach(self, words: int) -> Ints:
        """int32 ``[S, L]``, see constraint/reach.py."""
        return self._table

    def all_lead(self, min_length: int, max_length: int, ends: bool) -> bool:
        """Whether no item is too long or too short."""
        shortest = min_length - 1 if ends else max_length
        return shortest <= self.shortest and self.longest <= max_length


def _flattened(
    sequences: Any, pad: int | None, lengths: Any
) -> tuple[NDArray[Any], NDArray[np.int64], NDArray[np.int64]]:
    """Items as parts of one vector of ints: the vector, where each item begins, int64 ``[N]``, and its length."""
    if isinstance(sequences, (Tensor, np.ndarray)):
        array = as_array("sequences", sequences)
        _check_ints(array)
        if array.ndim != 2:
            raise ValueError(f"sequences: expected shape [N, n], got {list(array.shape)}")
        count, longest = array.shape
        return array.reshape(-1), np.arange(count) * longest, _lengths_in(array, pad, lengths)
    for name, given in (("pad", pad), ("lengths", lengths)):
        if given is not None:
            raise ValueError(f"{name}: expected an array of sequences with it, got {type(sequences).__name__}")
    if not isinstance(sequences, (list, tuple)):
        raise TypeError(f"sequences: expected a list, an array or a tensor, got {type(sequences).__name__}")
    kinds = set(map(type, sequences))
    if not kinds <= {list, tuple}:  # a tensor would be taken apart into tensors
        sequences = [
            as_array("sequences", each) if isinstance(each, (Tensor, np.ndarray)) else each for each in sequences
        ]
    try:
        counts = np.fromiter(map(len, sequences), np.int64, len(sequences))
        flat = np.asarray(list(chain.from_iterable(sequences)))
    except (TypeError, ValueError):
        raise TypeError("sequences: expected lists of token ids, got other entries") from None
    _check_ints(flat)
    return flat, np.cumsum(counts) - counts, counts


def _check_ints(array: NDArray[Any]) -> None:
    if array.dtype.kind not in "iu" and array.size:
        raise TypeError(f"sequences: expected token ids, got {array.dtype}")


def _lengths_in(array: NDArray[Any], pad: int | None, lengths: Any) -> NDArray[np.int64]:
    """int64 ``[N]``: how many tokens each row has."""
    count, longest = array.shape
    if pad is not None and lengths is not None:
        raise ValueError("lengths: expected either pad or lengths, got both")
    if pad is not None:
        if isinstance(pad, bool) or not isinstance(pad, (int, np.integer)):
            raise TypeError(f"pad: expected an int, got {type(pad).__name__}")
        padding = array == pad
        if (padding[:, 1:] < padding[:, :-1]).any():
            raise ValueError(f"sequences: expected pad only after the last token, got {pad} before another")
        return np.asarray(longest - padding.sum(1), np.int64)
    if lengths is None:
        return np.full(count, longest, np.int64)
    given = as_array("lengths", lengths)
    if given.dtype.kind not in "iu":
        raise TypeError(f"lengths: expected ints, got {given.dtype}")
    if given.shape != (count,):
        raise ValueError(f"lengths: expected shape [{count}], got {list(given.shape)}")
    if count and not 0 <= given.min() <= given.max() <= longest:
        raise ValueError(f"lengths: expected lengths from 0 to {longest}, got {given.min()} to {given.max()}")
    return given.astype(np.int64)


class Tree(NamedTuple):
    """Nodes in breadth-first order, the children of a node in order of place; edge e leads to node e + 1."""

    indptr: Ints  # [S + 1]
    tokens: Ints  # [S - 1]
    accepting: Bools  # [S]
    sizes: list[int]  # nodes of each level


def grow(flat: NDArray[Any], begins: NDArray[np.int64], lengths: NDArray[np.int64]) -> Tree:
    """The tree of items, level by level: those in one node are neighbours, sorted there by their next token."""
    if not len(begins):
        raise ValueError("sequences: expected at least one item, got none")
    node = np.zeros(len(begins), np.int64)  # of each item that goes on, in its level
    sizes, accepting, tokens, children = [1], [np.zeros(1, np.bool_)], [], [np.zeros(1, np.int32)]
    while True:
        goes_on = lengths >= len(sizes)
        accepting[-1][node[~goes_on]] = True
        if not goes_on.all():
            node, begins, lengths = node[goes_on], begins[goes_on], lengths[goes_on]
        if not len(node):
            break
        taken = flat[begins + (len(sizes) - 1)]
        if not 0 <= taken.min() <= taken.max() <= LARGEST:
            raise ValueError(f"sequences: expected ids from 0 to {LARGEST}, got {taken.min()} to {taken.max()}")
        taken = taken.astype(np.int32)
        keys = place(torch.from_numpy(taken)).numpy().astype(np.int64)
        keys += node * (int(keys.max()) + 1)
        order = np.argsort(keys)
        keys = keys[order]
        new = np.concatenate(([True], keys[1:] != keys[:-1]))
        eldest = order[new]  # an item of each child
        tokens.append(taken[eldest])
        children[-1] = np.bincount(node[eldest], minlength=sizes[-1]).astype(np.int32)
        begins, lengths = begins[order], lengths[order]
        node = np.cumsum(new) - 1
        sizes.append(len(eldest))
        accepting.append(np.zeros(len(eldest), np.bool_))
        children.append(np.zeros(len(eldest), np.int32))
        if sum(sizes) > LARGEST:
            raise ValueError(f"sequences: expected a tree of at most {LARGEST} nodes, got more")
    indptr = np.zeros(sum(sizes) + 1, np.int32)
    np.cumsum(np.concatenate(children), out=indptr[1:], dtype=np.int32)
    labels = np.concatenate(tokens) if tokens else np.zeros(0, np.int32)
    return Tree(indptr, labels, np.concatenate(accepting), sizes)
