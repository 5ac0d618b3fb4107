"""Phrases that must not be generated."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from flashbeam.kernels import Edges, follow, listed_bitmask, place

from .aho_corasick import Ints, build
from .csr import sent
from .phrases import as_word, parts_of
from .protocol import Bound, Context
from .token_lists import check_inside


class ForbiddenPhrases:
    """No hypothesis contains one of ``phrases``; a forced prefix counts.

    The last token of a phrase is barred where the others have just been said. A phrase may end in EOS: hypotheses do
    not end like that. There may be thousands of phrases: the tables grow with their tokens, and a step searches them.
    Where whatever may follow would complete a phrase, nothing may, and the beam is lost; that is not foreseen.

    Args:
        phrases: a list of lists of token ids.

    Raises:
        ValueError: nothing is given, a phrase is empty, or an id is negative. At the first step: an id outside the
            vocabulary, or EOS before the end of a phrase.
        TypeError: what is given is not such a list.
    """

    def __init__(self, phrases: Sequence[Any]):
        given = parts_of("phrases", phrases, "phrase")
        self.phrases = tuple(as_word(f"phrases[{i}]", phrase) for i, phrase in enumerate(given))
        self._host = _tables(self.phrases)
        self._on_device: dict[torch.device, _Tables] = {}

    def __repr__(self) -> str:
        return f"ForbiddenPhrases({[list(phrase) for phrase in self.phrases]})"

    def _tables_on(self, device: torch.device) -> "_Tables":
        if device not in self._on_device:
            self._on_device[device] = _on(device, self._host)
        return self._on_device[device]

    @staticmethod
    def bind(requests: Sequence["ForbiddenPhrases | None"], context: Context) -> Bound:
        """See :class:`flashbeam.constraint.Bound`."""
        settings = {id(setting): setting for setting in requests}
        for setting in settings.values():
            if setting is not None:
                setting._check(context)
        number = {key: i for i, key in enumerate(settings)}
        tables = [
            _on(context.device, _NOTHING) if setting is None else setting._tables_on(context.device)
            for setting in settings.values()
        ]
        return _BoundForbidden(tables, [number[id(setting)] for setting in requests], context)

    def _check(self, context: Context) -> None:
        check_inside("phrases", np.array([token for phrase in self.phrases for token in phrase]), context.vocab_size)
        for phrase in self.phrases:
            if not set(context.eos).isdisjoint(phrase[:-1]):
                raise ValueError(f"phrases: expected EOS at the end of a phrase only, got {list(phrase)}")


class _Tables(NamedTuple):
    """An Aho-Corasick automaton of S states, and what each bars; what is in its root's rows holds in every state.

    Rows of a compressed sparse matrix, tokens of a row in the order of ``place``.
    """

    indptr: Tensor  # int32 [S + 1]
    tokens: Tensor  # int32 [E], on which a state goes elsewhere than the root would
    targets: Tensor  # int32 [E]
    barred_indptr: Tensor  # int32 [S + 1]
    barred: Tensor  # int32 [N], tokens that would complete a phrase


def _on(device: torch.device, arrays: tuple[Ints, ...]) -> _Tables:
    return _Tables(*(sent(array, device) for array in arrays))


def _tables(phrases: Sequence[tuple[int, ...]]) -> tuple[Ints, ...]:
    """The arrays of :class:`_Tables`."""
    tree = build(phrases)
    complete = np.zeros(tree.size, dtype=bool)
    complete[tree.ends] = True
    children: list[dict[int, int]] = [{} for _ in range(tree.size)]
    for state in range(1, tree.size):
        children[tree.parent[state]][int(tree.token[state])] = state
    edges: list[dict[int, int]] = [{}] * tree.size
    barred: list[dict[int, int]] = [{}] * tree.size
    for state in range(tree.size):
        if complete[state]:  # never reached
            continue
        shorter = int(tree.failure[state])
        own = children[state]
        edges[state] = {token: child for token, child in own.items() if not complete[child]}
        barred[state] = {token: child for token, child in own.items() if complete[child]}
        if shorter:
            edges[state] = edges[shorter] | edges[state]
            barred[state] = barred[shorter] | barred[state]
    tokens, targets, indptr = _rows(edges)
    barred_tokens, _, barred_indptr = _rows(barred)
    return indptr, tokens, targets, barred_indptr, barred_tokens


def _rows(lists: list[dict[int, int]]) -> tuple[Ints, Ints, Ints]:
    """Keys, values and row pointers of dicts, keys in the order of ``place``; int32."""
    state = np.repeat(np.arange(len(lists)), [len(each) for each in lists])
    keys = np.array([key for each in lists for key in each], dtype=np.int32)
    values = np.array([value for each in lists for value in each.values()], dtype=np.int32)
    order = np.lexsort((place(torch.from_numpy(keys)).numpy(), state))
    return keys[order], values[order], np.cumsum([0, *map(len, lists)]).astype(np.int32)


_NOTHING = (np.zeros(2, np.int32), *[np.zeros(0, np.int32)] * 2, np.zeros(2, np.int32), np.zeros(0, np.int32))


class _BoundForbidden(Bound):
    """The state is the state of the automaton, int32 ``[R]``, a number among those of all tables."""

    def __init__(self, tables: Sequence[_Tables], of_request: Sequence[int], context: Context):
        self.context = context
        sizes = [len(one.indptr) - 1 for one in tables]
        first = np.cumsum([0, *sizes[:-1]])
        targets = torch.cat([one.targets + int(start) for one, start in zip(tables, first, strict=True)])
        reach = torch.zeros(sum(sizes), 1, dtype=torch.int32, device=context.device)
        indptr, barred_indptr = (
            _joined([getattr(one, name) for one in tables]) for name in ("indptr", "barred_indptr")
        )
        self.edges = Edges(indptr, torch.cat([one.tokens for one in tables]), targets, reach)
        self.barred = Edges(barred_indptr, torch.cat([one.barred for one in tables]), None, reach)
        roots = torch.from_numpy(first[list(of_request)]).int()
        self.roots = roots.to(context.device, non_blocking=True)  # int32 [B]
        self.always = listed_bitmask(self.barred, self.roots, None, context.vocab_size)  # int32 [B, W], barred

    def init(self) -> Tensor:
        """See :class:`flashbeam.constraint.Bound`."""
        return self.context.of_rows(self.roots, self.context.rows)

    def advance(self, state: Tensor, tokens: Tensor) -> Tensor:
        """See :class:`flashbeam.constraint.Bound`."""
        roots = self.context.of_rows(self.roots, state.shape[0])
        own, from_root = follow(self.edges, state, tokens), follow(self.edges, roots, tokens)
        return torch.where(own >= 0, own, torch.where(from_root >= 0, from_root, roots))

    def bitmask(self, state: Tensor) -> Tensor:
        """See :class:`flashbeam.constraint.Bound`."""
        always = self.context.of_rows(self.always, state.shape[0])
        return ~(listed_bitmask(self.barred, state, None, self.context.vocab_size) | always)


def _joined(pointers: Sequence[Tensor]) -> Tensor:
    """Row pointers of matrices one below the other."""
    counts = torch.cat([each.diff() for each in pointers])
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()
