"""The best candidates where several models give the score: docs/models.md."""

from .protocol import Expansion, Ranked
from .rescored import rescored
from .vetoed import vetoed


def with_increments(expansion: Expansion, k: int) -> Ranked:
    """The ``k`` best candidates by what they add to the score; without a bound where that may rise."""
    found = _best(expansion, k) if expansion.veto is None else vetoed(expansion, expansion.veto, k, _best)
    return found._replace(bound=None) if expansion.falls else found  # what only falls, the norms bound


def _best(expansion: Expansion, k: int) -> Ranked:
    assert expansion.increments is not None
    return rescored(expansion, expansion.increments, k)
