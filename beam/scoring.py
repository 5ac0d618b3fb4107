"""How a hypothesis is scored: its log-probability divided by a norm of its length.

``score = log_prob / norm(length)``, lengths counting generated tokens, EOS included. A search reads the norms of all
lengths from one table, made once, so a new rule is a new ``norm``.
"""

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from .arguments import finite_number


@runtime_checkable
class Scoring(Protocol):
    """A length norm."""

    def norm(self, length: int) -> float:
        """A finite number above 0 for ``length >= 1``."""
        ...


@dataclass(frozen=True)
class LengthPower:
    """``norm = length ** alpha``: 0 is the raw log-probability, 1 the mean, below 0 favours short hypotheses."""

    alpha: float

    def norm(self, length: int) -> float:
        """``length ** alpha``."""
        return float(length**self.alpha)


@dataclass(frozen=True)
class GNMT:
    """``norm = ((5 + length) / 6) ** alpha`` (Wu et al. 2016, section 7)."""

    alpha: float

    def __post_init__(self) -> None:
        finite_number("alpha", self.alpha)

    def norm(self, length: int) -> float:
        """``((5 + length) / 6) ** alpha``."""
        return float(((5 + length) / 6) ** self.alpha)


def as_scoring(name: str, given: Any) -> Scoring:
    """The scoring that ``length_penalty`` asks for: a number is the exponent of :class:`LengthPower`."""
    if isinstance(given, Scoring) and not isinstance(given, type):
        return given
    try:
        return LengthPower(finite_number(name, given))
    except TypeError:
        raise TypeError(f"{name}: expected a number or fb.GNMT(alpha), got {type(given).__name__}") from None


def check_norms(name: str, scoring: Scoring, max_length: int) -> None:
    """The norms of all lengths are float32 numbers above 0."""
    for length in (1, max_length):
        try:
            norm = scoring.norm(length)
        except OverflowError:
            norm = float("inf")
        if not 1e-37 < norm < 1e37:
            raise ValueError(f"{name}: expected a norm between 1e-37 and 1e37 for length {length}, got {norm:g}")


def norm_tables(
    scorings: list[Scoring], min_lengths: list[int], max_lengths: list[int]
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """``length_norm`` and ``bound_norm``, float32 ``[B, T + 1]``, of ``kernels.Limits``.

    ``bound_norm[b, n]`` is the greatest norm of a length still open to a hypothesis of ``n`` tokens. Log-probabilities
    are not above 0, so dividing by the greatest norm bounds every score to come.
    """
    top = max(max_lengths)
    length_norm = np.ones((len(scorings), top + 1), np.float32)
    bound_norm = np.ones_like(length_norm)
    rows: dict[tuple[Scoring, int, int], int] = {}
    for b, request in enumerate(zip(scorings, min_lengths, max_lengths, strict=True)):
        if request in rows:
            length_norm[b], bound_norm[b] = length_norm[rows[request]], bound_norm[rows[request]]
            continue
        rows[request] = b
        scoring, low, high = request
        length_norm[b, 1:] = [scoring.norm(length) for length in range(1, top + 1)]
        for n in range(top + 1):
            first = min(max(n + 1, low), high)
            bound_norm[b, n] = length_norm[b, first : high + 1].max()
    return length_norm, bound_norm
