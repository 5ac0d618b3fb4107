"""Uniform information density: what a hypothesis pays for surprisals that are uneven, or high.

Meister, Cotterell, Vieira 2020, "If beam search is the answer, what was the question?". With the surprisals
u_t = -log p(y_t | y_<t) of the tokens y_1 .. y_n, EOS included, and u_0 = 0:

    greedy    sum of (u_t - least surprisal that may follow)^2
    square    sum of u_t^2
    max       greatest u_t
    variance  mean of (u_t - mean u)^2
    local     mean of (u_t - u_(t-1))^2
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..arguments import PerRequest, nonnegative_number
from .protocol import Seen
from .rates import on_rows

_MONOTONE = ("greedy", "square", "max")
_MEANS = ("variance", "local")


class Surprisals(NamedTuple):
    """What runs along, float32 ``[R, M]``."""

    total: Tensor  # greedy, square, local: the sum; max: the maximum; variance: the sum of squares about the mean
    reference: Tensor  # variance: the mean; local: the last surprisal; else 0
    strength: Tensor  # [R, 1]


@dataclass(frozen=True)
class UID:
    """The term ``-strength * R``, R one of the five regularisers of Meister et al. 2020 (docs/scoring.md).

    Args:
        kind: ``"greedy"``, ``"square"``, ``"max"``, ``"variance"`` or ``"local"``.
        strength: 0 or more [B].
        counts_start: the start of the sequence counts as a token of surprisal 0 in the means, as in the authors' code:
            ``variance`` and ``local`` are then means over n + 1. The other kinds do not differ.

    Raises:
        ValueError, TypeError: ``<argument>: expected X, got Y``.
    """

    kind: str
    strength: Any
    counts_start: bool = False
    reads_attention = False

    def __post_init__(self) -> None:
        if self.kind not in (*_MONOTONE, *_MEANS):
            raise ValueError(f"kind: expected one of {[*_MONOTONE, *_MEANS]}, got {self.kind!r}")
        if not isinstance(self.counts_start, bool):
            raise TypeError(f"counts_start: expected a bool, got {type(self.counts_start).__name__}")
        _ = self.per_request

    @property
    def per_request(self) -> tuple[PerRequest[float]]:
        """What may differ by request."""
        return (PerRequest("strength", self.strength, nonnegative_number),)

    @property
    def monotone(self) -> bool:
        """All but the means."""
        return self.kind in _MONOTONE

    def init(self, rows: int, device: torch.device) -> Surprisals:
        """See :class:`flashbeam.scoring.Term`."""
        zero = torch.zeros(rows, 1, dtype=torch.float32, device=device)
        return Surprisals(zero, zero.clone(), on_rows(*self.per_request, rows, device))

    def extend(self, stats: Surprisals, seen: Seen) -> tuple[Tensor, Surprisals]:
        """See :class:`flashbeam.scoring.Term`."""
        u, (total, reference, strength) = -seen.token_log_probs, stats
        if self.kind == "max":
            total = torch.maximum(total, u)
        elif self.kind == "square":
            total = total + u * u
        elif self.kind == "greedy":
            total = total + (u + seen.best).clamp(min=0.0).square()
        elif self.kind == "local":
            total, reference = total + (u - reference).square(), u
        else:  # Welford 1962
            count = self._count(seen.lengths)
            change = u - reference
            total = total + change.square() * ((count - 1.0) / count)
            reference = reference + change / count
        stats = Surprisals(total, reference, strength)
        return self._value(stats, seen.lengths), stats

    def upper(self, value: Tensor, stats: Surprisals, seen: Seen) -> Tensor:
        """Sums and the maximum only grow; a mean can fall to what the longest hypothesis makes of its sum."""
        return value if self.monotone else self._value(stats, seen.longest)

    def _value(self, stats: Surprisals, lengths: Tensor) -> Tensor:
        factor = -stats.strength if self.monotone else -stats.strength / self._count(lengths)
        return stats.total * factor

    def _count(self, lengths: Tensor) -> Tensor:
        return lengths + 1.0 if self.counts_start else lengths
