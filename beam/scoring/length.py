"""How a hypothesis is scored: its log-probability divided by a norm of its length.

``score = log_prob / norm(length)``, lengths counting generated tokens, EOS included. A search reads the norms of all
lengths from one table, made once, so a new rule is a new ``norm``.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from ..arguments import finite_number, whole_number


@runtime_checkable
class Scoring(Protocol):
    """A length norm."""

    def norm(self, length: int) -> float:
        """A finite number above 0 for ``length >= 1``."""
        ...


@dataclass(frozen=True)
class LengthPower:
    """``norm = (length + offset) ** alpha``: 0 is the raw log-probability, 1 the mean, below 0 favours the short.

    Args:
        alpha: of either sign.
        offset: tokens that count besides the generated ones, such as those of a prompt.
    """

    alpha: float
    offset: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "alpha", finite_number("alpha", self.alpha))  # a power of ints is an int of any size
        whole_number(0)("offset", self.offset)

    def norm(self, length: int) -> float:
        """``(length + offset) ** alpha``."""
        return float((length + self.offset) ** self.alpha)


@dataclass(frozen=True)
class GNMT:
    """``norm = ((5 + length + offset) / 6) ** alpha`` (Wu et al. 2016, section 7).

    Args:
        alpha: of either sign.
        offset: tokens that count besides the generated ones, such as those of a prompt.
    """

    alpha: float
    offset: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "alpha", finite_number("alpha", self.alpha))
        whole_number(0)("offset", self.offset)

    def norm(self, length: int) -> float:
        """``((5 + length + offset) / 6) ** alpha``."""
        return float(((5 + length + self.offset) / 6) ** self.alpha)


def as_scoring(name: str, given: Any) -> Scoring:
    """The scoring that ``length_penalty`` asks for: a number is the exponent of :class:`LengthPower`."""
    if isinstance(given, Scoring) and not isinstance(given, type):
        return given
    try:
        return LengthPower(finite_number(name, given))
    except TypeError:
        raise TypeError(f"{name}: expected a number or fb.GNMT(alpha), got {type(given).__name__}") from None


def check_norms(name: str, scorings: list[Scoring], max_lengths: list[int]) -> None:
    """The norms of all lengths up to ``max_lengths``, one per scoring, are float32 numbers above 0."""
    longest: dict[Any, tuple[Scoring, int]] = {}
    for scoring, high in zip(scorings, max_lengths, strict=True):
        _, other = longest.get(_key(scoring), (scoring, 0))
        longest[_key(scoring)] = scoring, max(high, other)
    for scoring, high in longest.values():
        for length in range(1, high + 1):
            try:
                norm = scoring.norm(length)
            except OverflowError:
                norm = float("inf")
            if not 1e-37 < norm < 1e37:
                raise ValueError(f"{name}: expected a norm between 1e-37 and 1e37 for length {length}, got {norm:g}")


def _key(scoring: Scoring) -> Any:
    """Equal for scorings that are the same; one of the user's own is the same as itself."""
    return scoring if type(scoring) in (LengthPower, GNMT) else id(scoring)


def check_norm_of_nothing(name: str, scorings: list[Scoring]) -> None:
    """The norm of length 0, of an EOS that does not count, is one to divide by as well."""
    for scoring in {_key(scoring): scoring for scoring in scorings}.values():
        try:
            norm = scoring.norm(0)
        except ZeroDivisionError:
            norm = float("inf")
        if not 1e-37 < norm < 1e37:
            wanted = "a norm between 1e-37 and 1e37 for length 0, of an EOS that counts_eos=False leaves out"
            raise ValueError(f"{name}: expected {wanted}, got {norm:g} of {scoring}; give it an offset")


class NormTables(NamedTuple):
    """The norms of all lengths, float32 ``[B, T + 1]``."""

    live: np.ndarray[Any, Any]  # of a hypothesis that is returned as it is
    ended: np.ndarray[Any, Any]  # of one that ends with EOS: ``length_norm`` of ``kernels.Limits``
    # the greatest of a length still open after so many tokens: ``bound_norm``. Log-probabilities are not above 0, so
    # dividing by the greatest norm bounds every score to come
    bound: np.ndarray[Any, Any]


def norm_tables(
    scorings: list[Scoring], min_lengths: list[int], max_lengths: list[int], counts_eos: bool = True
) -> NormTables:
    """The tables of requests with these scorings and limits; without ``counts_eos`` an EOS is no part of the length."""
    top = max(max_lengths)
    tables = NormTables(*(np.ones((len(scorings), top + 1), np.float32) for _ in range(3)))
    rows: dict[tuple[Any, int, int], int] = {}
    for b, (scoring, low, high) in enumerate(zip(scorings, min_lengths, max_lengths, strict=True)):
        first_row = rows.setdefault((_key(scoring), low, high), b)
        if first_row != b:
            for table in tables:
                table[b] = table[first_row]
            continue
        live, ended, bound = (table[b] for table in tables)
        live[1 : high + 1] = [scoring.norm(length) for length in range(1, high + 1)]  # no longer ones are reached
        ended[1:] = live[1:] if counts_eos else [scoring.norm(0), *live[1:-1]]
        greatest = np.maximum.accumulate(ended[high:0:-1])[::-1]  # of lengths from 1 on, to the end
        shortest = np.clip(np.arange(1, top + 2), max(low, 1), high)
        bound[:] = np.maximum(greatest[shortest - 1], live[high])
    return tables
