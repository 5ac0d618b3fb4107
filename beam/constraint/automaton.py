"""Deterministic automata over tokens as constraints."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import torch

from flashbeam.kernels import Edges

from ..arguments import whole_number
from .csr import bool_array, check_edges, int_array, order_by_place, restored_edges, sent
from .protocol import Context
from .reach import Bools, Ints, reach_of_graph, words_for
from .storage import Arrays, damaged, read, write
from .walk import Walking

Self = TypeVar("Self", bound="Automaton")


class Automaton:
    """What may be generated are the words of a deterministic automaton over tokens.

    A hypothesis, its EOS apart, is a path from ``start`` to an accepting state: EOS may follow in accepting states and
    nowhere else, and what has no EOS at ``max_length`` is a hypothesis if it is in one. Tokens after which no accepting
    state can be reached in the tokens that remain are barred, so that no beam strands; a request that can reach none
    is a dead end at its first step.

    Args:
        indptr: int ``[S + 1]``: edges ``indptr[s]`` to ``indptr[s + 1]`` leave state ``s``. This and the others: a
            list, an array or a CPU tensor, copied.
        tokens: int ``[E]``, of each edge: distinct in one state, and not EOS.
        targets: int ``[E]``, the state that each edge leads to.
        accepting: bool ``[S]``.
        start: the state before the first token.

    Raises:
        ValueError, TypeError: ``<argument>: expected X, got Y``.
    """

    _argument = "tokens"  # what words are given as

    def __init__(self, indptr: Any, tokens: Any, targets: Any, accepting: Any, start: int = 0):
        pointers, labels, ends = int_array("indptr", indptr), int_array("tokens", tokens), int_array("targets", targets)
        check_edges(pointers, labels, ends)
        order = order_by_place(pointers, labels)
        self._hold(pointers, labels[order], ends[order], start)
        self._accept(bool_array("accepting", accepting))

    def _hold(self, indptr: Ints, tokens: Ints, targets: Ints | None, start: int) -> None:
        """Keep edges that are in order."""
        states = len(indptr) - 1
        if whole_number(0)("start", start) >= states:
            raise ValueError(f"start: expected a state below {states}, got {start}")
        self.indptr, self.tokens, self.targets, self.start = indptr, tokens, targets, int(start)
        self._copies: dict[tuple[torch.device, int], Edges] = {}

    def _accept(self, accepting: Bools) -> None:
        states = len(self.indptr) - 1
        if len(accepting) != states:
            raise ValueError(f"accepting: expected one per state, {states}, got {len(accepting)}")
        self._accepting = accepting
        self._tables: dict[int, Ints] = {}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self.indptr) - 1} states, {len(self.tokens)} edges)"

    @staticmethod
    def from_regex(pattern: str | bytes | re.Pattern[Any], vocabulary: Sequence[str | bytes | None]) -> Automaton:
        """The sequences of tokens whose concatenation is fully matched by a regular expression.

        Its words are exactly those of which ``re.fullmatch(pattern, "".join(vocabulary[token] for token in word))`` is
        true. A pattern of ``str`` with a vocabulary of ``bytes`` matches what these are in UTF-8; a token may then hold
        part of a character.

        Args:
            pattern: of Python's ``re``, flags included, but for what is not regular or not at the ends of a string:
                references to groups, looking around, atomic groups, ``\\b``, and anchors of lines.
            vocabulary: the string of each token id; ``None`` or an empty one for tokens that are never used, as EOS.

        Raises:
            ValueError: the pattern is not regular or needs too many states, or no sequence of tokens matches it.
            TypeError: an argument is of another type.
        """
        from .spelling import spell

        return Automaton(*spell(pattern, vocabulary))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a folder of ``.npy`` files and a small JSON file, for :meth:`load`.

        Raises:
            FileExistsError: there is something at ``path`` already.
        """
        write(path, type(self).__name__, self._arrays(), {"start": self.start})

    @classmethod
    def load(cls: type[Self], path: str | os.PathLike[str], mmap: bool = True) -> Self:
        """Read what :meth:`save` of the same class wrote. Everything is checked: what is returned can be used safely.

        Args:
            path: the folder.
            mmap: map the files into memory instead of copying them there, so that processes share them; they must not
                be changed as long as they are used.

        Raises:
            FileNotFoundError: there is no such folder.
            ValueError: it holds something else, or is damaged.
        """
        arrays, numbers = read(path, cls.__name__, mmap)
        made = cls.__new__(cls)
        try:
            made._restore(arrays, numbers)
        except (KeyError, TypeError, ValueError) as error:
            raise damaged(path, cls.__name__, error) from None
        return made

    def _arrays(self) -> Arrays:
        assert self.targets is not None
        return {"indptr": self.indptr, "tokens": self.tokens, "targets": self.targets, "accepting": self._accepting}

    def _restore(self, arrays: Arrays, numbers: dict[str, int]) -> None:
        accepting = arrays["accepting"]
        if accepting.dtype != np.bool_ or accepting.ndim != 1:
            raise ValueError("its accepting states are no bools")
        self._hold(*restored_edges(arrays["indptr"], arrays["tokens"], arrays["targets"]), numbers["start"])
        self._accept(accepting)

    # what a batch asks

    def words(self, max_length: int) -> int:
        """L, words that the table of reach needs in a search of ``max_length``."""
        return words_for(max_length - 1)

    def all_lead(self, min_length: int, max_length: int, ends: bool) -> bool:
        """Whether every edge is known to lead to acceptance in time; ``ends``: there are EOS ids."""
        assert self.targets is not None
        return bool((self.reach(self.words(max_length))[self.targets] == -1).all())

    def reach(self, words: int) -> Ints:
        """int32 ``[S, words]``, see constraint/reach.py. Made once."""
        if words not in self._tables:
            assert self.targets is not None
            self._tables[words] = reach_of_graph(self.indptr, self.targets, self._accepting, words)
        return self._tables[words]

    def edges(self, device: torch.device, words: int) -> Edges:
        """What the device needs. Copied there once."""
        key = device, words
        if key not in self._copies:
            indptr, tokens, reach = (sent(array, device) for array in (self.indptr, self.tokens, self.reach(words)))
            targets = None if self.targets is None else sent(self.targets, device)
            self._copies[key] = Edges(indptr, tokens, targets, reach)
        return self._copies[key]

    @property
    def nbytes(self) -> int:
        """Bytes of what :meth:`save` writes."""
        return sum(array.nbytes for array in self._arrays().values())

    @cached_property
    def widest(self) -> tuple[int, int]:
        """Most edges of a state: before the first token, and after one or more."""
        edges = np.diff(self.indptr)
        first = int(edges[self.start])
        if self.targets is None or not (self.targets == self.start).any():
            edges[self.start] = 0
        return first, int(edges.max())

    @cached_property
    def _used(self) -> Bools:
        used = np.zeros(int(self.tokens.max(initial=-1)) + 1, np.bool_)
        used[self.tokens] = True
        return used

    def check_tokens(self, context: Context) -> None:
        """Refuse tokens outside the vocabulary, and EOS."""
        name, largest = self._argument, len(self._used) - 1
        if largest >= context.vocab_size:
            raise ValueError(f"{name}: expected ids inside the vocabulary of {context.vocab_size}, got {largest}")
        for token in context.eos:
            if token <= largest and self._used[token]:
                raise ValueError(f"{name}: expected ids other than those of EOS, got {token}")

    @staticmethod
    def bind(requests: Sequence[Automaton | None], context: Context) -> Walking:
        """The automata of a batch at work."""
        return Walking(requests, context)
