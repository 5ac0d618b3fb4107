"""The terms of a search at a step: their sum, its bound, and their statistics, which follow the beams."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..cache import leaves_of, rebuild
from .protocol import Seen, Term

_LEAST = torch.finfo(torch.float32).min  # what can follow has a finite score, however strong a term is
_SLACK = 2.0**-18  # rounding of a score, relative to what it is the sum of


class Terms(NamedTuple):
    """Terms and what they look at, for the R rows of a step."""

    terms: tuple[Term, ...]
    stats: tuple[Any, ...]  # of each term, leaves [R, 1, ...]
    lengths: Tensor  # float32 [R, 1], see Seen
    shortest: Tensor
    longest: Tensor
    attention: Tensor | None  # float32 [R, 1, S]
    source_lengths: Tensor | None  # float32 [R, 1]
    norm: Tensor  # float32 [R, 1], what the step's terms are multiplied by: its length norm

    @property
    def monotone(self) -> bool:
        """Whether the score of a row's tokens never falls as their log-probability rises."""
        return all(term.monotone for term in self.terms)

    def take(self, rows: Tensor) -> Terms:
        """Those of ``rows [n]``."""
        return self._each(lambda leaf: leaf.index_select(0, rows))

    def part(self, rows: slice) -> Terms:
        """Those of ``rows``, as views."""
        return self._each(lambda leaf: leaf[rows])

    def _each(self, change: Callable[[Tensor], Tensor]) -> Terms:
        terms, *fields = self
        return Terms(terms, *(each_leaf(field, change) for field in fields))

    def seen(self, tokens: Tensor, token_log_probs: Tensor, best: Tensor) -> Seen:
        """Continuations by ``tokens [R, M]`` or ``[1, M]``; see :class:`Seen`."""
        of_rows = self.lengths, self.shortest, self.longest, self.attention, self.source_lengths
        return Seen(tokens, token_log_probs, best, *of_rows)

    def scores(self, log_probs: Tensor, seen: Seen) -> Tensor:
        """Scores ``[R, M]`` of continuations with cumulative ``log_probs [R, M]``, before the length norm."""
        total = sum((value for value, _ in self._extended(seen)), torch.zeros_like(self.norm))
        return log_probs + (self.norm * total).nan_to_num(nan=_LEAST, posinf=-_LEAST, neginf=_LEAST)

    def advanced(self, seen: Seen) -> tuple[Any, ...]:
        """The statistics with one token more in each row."""
        return tuple(stats for _, stats in self._extended(seen))

    def upper(self, log_probs: Tensor, bound_norm: Tensor, seen: Seen) -> Tensor:
        """What continuations ``[R, M]`` can score in the end at most, rounded up.

        ``bound_norm [R, 1]`` is the greatest norm that they may end with.
        """
        parts = [log_probs / bound_norm]
        for term, (value, stats) in zip(self.terms, self._extended(seen), strict=True):
            bound = getattr(term, "upper", None)
            parts.append(torch.full_like(value, torch.inf) if bound is None else bound(value, stats, seen))
        slack = sum((part.abs() for part in parts), torch.zeros_like(self.norm)) * _SLACK
        upper = sum(parts, slack)
        return upper.masked_fill(log_probs == -torch.inf, -torch.inf)

    def _extended(self, seen: Seen) -> list[tuple[Tensor, Any]]:
        return [term.extend(stats, seen) for term, stats in zip(self.terms, self.stats, strict=True)]


def each_leaf(nest: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A nest of tensors and ``None``, each tensor changed."""
    leaves = (leaf for _, leaf in leaves_of(nest, "stats"))
    return rebuild(nest, iter([change(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]))
