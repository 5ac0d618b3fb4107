"""When a request is done, apart from ``max_length`` and having nothing left to expand.

A rule says what the pool keeps (the best by score, or all in order of arrival), how many finished hypotheses end the
request, and whether the exact bound ends it. The device needs no more than that, so a rule costs no launch.
"""

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from .arguments import positive_number


@runtime_checkable
class Stopping(Protocol):
    """A stopping rule."""

    by_arrival: bool  # the pool keeps hypotheses in order of arrival, and quota of them end the request
    exact: bool  # the request ends when no live beam can still enter the pool

    def quota(self, beam_size: int) -> int:
        """Finished hypotheses that end a request of this width; read only if ``by_arrival``."""
        ...


@dataclass(frozen=True)
class Patience:
    """Stop when ``ceil(p * beam_size)`` hypotheses have finished, kept in order of arrival (Kasai et al. 2022)."""

    p: float
    by_arrival = True
    exact = False

    def __post_init__(self) -> None:
        positive_number("p", self.p)

    def quota(self, beam_size: int) -> int:
        """``ceil(p * beam_size)``; the margin forgives products such as 0.28 * 25 that land just above an integer."""
        return max(1, math.ceil(self.p * beam_size - 1e-9))


class FirstFinished(Patience):
    """Stop when ``beam_size`` hypotheses have finished: ``Patience(1)``."""

    def __init__(self) -> None:
        super().__init__(1.0)

    def __repr__(self) -> str:
        return "FirstFinished()"


@dataclass(frozen=True)
class Exhausted:
    """Run until no beam is live or ``max_length``; the pool keeps the best by score."""

    by_arrival = False
    exact = False

    def quota(self, beam_size: int) -> int:
        """No quota."""
        return beam_size


@dataclass(frozen=True)
class Exact:
    """Stop when no live beam can still enter the n-best: returns what :class:`Exhausted` would, in fewer steps.

    That holds as long as no more than ``beam_size`` hypotheses are asked for.
    A live beam with log-probability phi can reach at most ``phi / norm`` with the greatest norm of the lengths it may
    still end at (docs/algorithms/deciding.md). It closes late when the length penalty is above 0.
    """

    by_arrival = False
    exact = True

    def quota(self, beam_size: int) -> int:
        """No quota."""
        return beam_size
