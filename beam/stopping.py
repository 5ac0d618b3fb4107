"""When a request is done, apart from ``max_length`` and having nothing left to expand; and what its pool keeps.

A rule is a :class:`flashbeam.kernels.Rule` and a quota: the device needs no more than that, so a rule costs no launch.
"""

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from flashbeam.kernels import Rule

from .arguments import positive_number, whole_number

_OVERFLOWS = ("never", "last", "step")


@runtime_checkable
class Stopping(Protocol):
    """A stopping rule."""

    @property
    def rule(self) -> Rule:
        """What the pool keeps, and whether live beams are compared with it."""
        ...

    def quota(self, beam_size: int) -> int | None:
        """Finished hypotheses that end a request of this width; ``None`` if no number of them does."""
        ...


@dataclass(frozen=True)
class Patience:
    """Stop when ``ceil(p * beam_size)`` hypotheses have finished, kept in order of arrival (Kasai et al. 2022).

    What one step finishes beyond that number is kept, best first: ``overflow="last"``, if it is the step at
    ``max_length``; ``"never"``; or ``"step"``, always.
    """

    p: float
    overflow: str = "last"

    def __post_init__(self) -> None:
        positive_number("p", self.p)
        if self.overflow not in _OVERFLOWS:
            raise ValueError(f"overflow: expected one of {list(_OVERFLOWS)}, got {self.overflow!r}")

    @property
    def rule(self) -> Rule:
        """By arrival."""
        return Rule(by_arrival=True, overflow=self.overflow)

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

    rule = Rule()

    def quota(self, beam_size: int) -> None:
        """No quota."""


@dataclass(frozen=True)
class Exact:
    """Stop when no live beam can still enter the n-best: returns what :class:`Exhausted` would, in fewer steps.

    That holds as long as no more than ``beam_size`` hypotheses are asked for and a request is one beam: the groups of
    ``fb.DiverseGroups`` stop one by one, and those behind one that has stopped no longer avoid what it would say.

    A live beam with log-probability phi can reach at most ``phi / norm`` with the greatest norm of the lengths it may
    still end at (docs/algorithms/deciding.md). It closes late when the length penalty is above 0.
    """

    rule = Rule(exact=True)

    def quota(self, beam_size: int) -> None:
        """No quota."""


@dataclass(frozen=True)
class Filled:
    """Stop when the pool is full, which keeps the best by score: ``early_stopping=True`` of transformers.

    It differs from :class:`FirstFinished` in the last step, whose hypotheses may replace earlier, worse ones.
    """

    rule = Rule()

    def quota(self, beam_size: int) -> int:
        """As many as there are places."""
        return beam_size


@dataclass(frozen=True)
class BestLive:
    """Stop when the pool is full and the best live beam would not enter it as it is: ``early_stopping=False`` of
    transformers.

    A guess and not a bound where the length penalty is above 0: a longer hypothesis may still have entered.
    """

    rule = Rule(best_live=True)

    def quota(self, beam_size: int) -> None:
        """No quota."""


@dataclass(frozen=True)
class Shrinking:
    """Every hypothesis that finishes takes its beam away; stop when none is left.

    Among the K - F best candidates, F hypotheses having finished, those that are EOS finish and the others live on, as
    in Bahdanau et al. 2014 (RNNsearch) and Marian.
    """

    rule = Rule(shrinks=True)

    def quota(self, beam_size: int) -> None:
        """No quota: a full pool leaves no beam."""


@dataclass(frozen=True)
class BestFinished:
    """Stop when ``count`` hypotheses have finished and one of them was the best candidate of its step, EOS or not.

    The pool keeps the best by score. So CTranslate2 stops without a length penalty.
    """

    count: int = 1
    rule = Rule(awaits_best=True)

    def __post_init__(self) -> None:
        whole_number(1)("count", self.count)

    def quota(self, beam_size: int) -> int:
        """``count``, as far as there are places."""
        return min(self.count, beam_size)
