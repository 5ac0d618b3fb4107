"""Phrases that must be generated."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from flashbeam.kernels import mark_bits

from .aho_corasick import Word
from .csr import int_array
from .phrase_automaton import Phrase, PhraseAutomaton, anything, ordered, unordered
from .phrase_tables import PhraseTables
from .protocol import Banks, Bound, Context
from .token_lists import check_inside, check_without_eos, on_device

MOST = 62  # phrases whose being satisfied fits the bits of an int64


class Phrases:
    """Every hypothesis contains each of ``phrases``.

    ``fb.Phrases([[5, 3], [[7], [8, 2]]])``: the tokens 5, 3 in a row, and 7 or else 8, 2. Phrases may overlap, and one
    may lie inside another; a forced prefix counts. EOS may follow where everything is satisfied.

    No beam is let go where too few tokens are left: what may follow is decided by the fewest tokens that satisfy the
    rest, overlaps included, exactly for up to 10 different phrases, or in order; above, by a bound that bars nothing
    that is possible, and what is not satisfied at ``max_length`` is no hypothesis. Where not even an empty beam can be
    satisfied in ``max_length`` tokens, the request is flagged as a dead end.

    Under ``fb.TopK`` beams of every progress are kept. The progress of a beam is how many tokens fewer it needs than an
    empty one does, by way of the nearest alternatives; with more than 10 phrases, what is missing is counted without
    overlaps. Under other selections phrases are a mask.

    Anderson, Fernando, Johnson, Gould 2017, "Guided open vocabulary image captioning with constrained beam search";
    Post, Vilar 2018, "Fast lexically constrained decoding with dynamic beam allocation"; Hu et al. 2019, "Improved
    lexically constrained decoding", for the banks.

    Args:
        phrases: a list; each phrase is a list of token ids, or a list of such lists, its alternatives.
        ordered: phrases come in the order given and do not overlap.

    Raises:
        ValueError: nothing is given, a phrase is empty, an id is negative, or there are more than 62 phrases that
            may come in any order. At the first step: an id outside the vocabulary, or EOS.
        TypeError: what is given is not such a list.
    """

    def __init__(self, phrases: Sequence[Any], ordered: bool = False):
        if not isinstance(ordered, bool):
            raise TypeError(f"ordered: expected a bool, got {type(ordered).__name__}")
        self.phrases = tuple(
            _phrase(f"phrases[{i}]", phrase) for i, phrase in enumerate(parts_of("phrases", phrases, "phrase"))
        )
        self.ordered = ordered
        if not ordered and len(self.phrases) > MOST:
            raise ValueError(f"phrases: expected at most {MOST} phrases in any order, got {len(self.phrases)}")

    def __repr__(self) -> str:
        return f"Phrases({[[list(word) for word in phrase] for phrase in self.phrases]}, ordered={self.ordered})"

    @cached_property
    def _automaton(self) -> PhraseAutomaton:
        return ordered(self.phrases) if self.ordered else unordered(self.phrases)

    @staticmethod
    def bind(requests: Sequence["Phrases | None"], context: Context) -> Bound:
        """See :class:`flashbeam.constraint.Bound`."""
        settings = {id(setting): setting for setting in requests}
        for setting in settings.values():
            if setting is not None:
                tokens = np.array([token for phrase in setting.phrases for word in phrase for token in word])
                check_inside("phrases", tokens, context.vocab_size)
                check_without_eos("phrases", tokens, context.eos)
        number = {key: i for i, key in enumerate(settings)}
        automata = [anything() if one is None else one._automaton for one in settings.values()]
        return _BoundPhrases(PhraseTables(automata, [number[id(one)] for one in requests], context.device), context)


def parts_of(name: str, given: Any, of: str) -> Any:
    """``given`` if it is a list that is not empty."""
    if isinstance(given, (str, bytes)) or not isinstance(given, (Sequence, Tensor, np.ndarray)):
        raise TypeError(f"{name}: expected a list, got {type(given).__name__}")
    if len(given) == 0:
        raise ValueError(f"{name}: expected at least one {of}, got none")
    return given


def as_word(name: str, given: Any) -> Word:
    """``given`` if it is a list of token ids that is not empty."""
    return tuple(map(int, int_array(name, parts_of(name, given, "token"))))


def _phrase(name: str, given: Any) -> Phrase:
    parts = parts_of(name, given, "token")
    first = parts[0]
    if isinstance(first, Sequence) or (isinstance(first, (Tensor, np.ndarray)) and first.ndim > 0):
        return tuple(as_word(f"{name}[{i}]", part) for i, part in enumerate(parts))
    return (as_word(name, parts),)


class _Progress(NamedTuple):
    """Where rows are; rows of what is over may hold anything in range."""

    states: Tensor  # int64 [R]
    met: Tensor  # int64 [R], bits of satisfied phrases
    length: Tensor  # int64 [R], tokens so far


class _BoundPhrases(Bound):
    def __init__(self, tables: PhraseTables, context: Context):
        self.tables, self.context = tables, context
        self.max_lengths = on_device(context.open_lengths, np.int64, context)
        inside = tables.alphabet < context.vocab_size
        self.alphabet = tables.alphabet.masked_fill(~inside, -1)  # int64 [B, A]
        eos = on_device(context.eos, np.int64, context).expand(context.batch_size, -1)
        self.eos = self._mark(eos, torch.ones_like(eos, dtype=torch.bool))  # int32 [B, W]
        self.others = ~(self._mark(self.alphabet, inside) | self.eos)

    def _mark(self, tokens: Tensor, marked: Tensor) -> Tensor:
        rows = torch.arange(tokens.shape[0], device=tokens.device)[:, None].expand_as(tokens)
        return mark_bits(rows, tokens.clamp(min=0), marked, tokens.shape[0], self.context.vocab_size)

    def init(self) -> _Progress:
        """See :class:`flashbeam.constraint.Bound`."""
        states = self.context.of_rows(self.tables.roots, self.context.rows)
        return _Progress(states, torch.zeros_like(states), torch.zeros_like(states))

    def advance(self, state: _Progress, tokens: Tensor) -> _Progress:
        """See :class:`flashbeam.constraint.Bound`."""
        column = self.tables.column(tokens.view(self.context.batch_size, -1)).flatten()
        return _Progress(*self.tables.step(state.states, state.met, column), state.length + 1)

    def bitmask(self, state: _Progress) -> Tensor:
        """See :class:`flashbeam.constraint.Bound`."""
        rows, tables = state.states.shape[0], self.tables
        alphabet, max_lengths = (self.context.of_rows(x, rows) for x in (self.alphabet, self.max_lengths))
        columns = torch.arange(alphabet.shape[1] + 1, device=alphabet.device)
        after = tables.step(state.states[:, None], state.met[:, None], columns)
        possible = tables.needed(*after) <= (max_lengths - state.length - 1)[:, None]  # [R, A + 1]
        satisfied = tables.needed(state.states, state.met) == 0
        eos, others = (self.context.of_rows(x, rows) for x in (self.eos, self.others))
        listed = self._mark(alphabet, possible[:, :-1] & (alphabet >= 0))
        return listed | (others & -possible[:, -1:].int()) | (eos & -satisfied[:, None].int())

    def accepts(self, state: _Progress) -> Tensor | None:
        """See :class:`flashbeam.constraint.Bound`."""
        return None if self.tables.exact else self.tables.needed(state.states, state.met) == 0

    def banks(self, state: _Progress) -> Banks:
        """See :class:`flashbeam.constraint.Bound`."""

        def progress(rows: Tensor, tokens: Tensor) -> Tensor:
            after = self.tables.step(state.states[rows], state.met[rows], self.tables.column(tokens))
            return self.tables.totals[:, None] - self.tables.missing(*after)

        return Banks(self.context.of_rows(self.alphabet, state.states.shape[0]), progress)
