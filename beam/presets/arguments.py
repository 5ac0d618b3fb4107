"""What the presets do with their peers' arguments."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ..arguments import PerRequest, token_ids, whole_number
from ..constraint import AllOf, ForbiddenPhrases


class Elsewhere(NamedTuple):
    """An argument of a peer that its preset does not take."""

    off: tuple[Any, ...]  # values under which it does nothing
    instead: str


def refuse(peer: str, given: Mapping[str, Any], elsewhere: Mapping[str, Elsewhere]) -> None:
    """Accept arguments that are switched off, refuse all others.

    Raises:
        TypeError: not an argument of the peer's.
        ValueError: one that flashbeam has in another place.
    """
    for name, value in given.items():
        if name not in elsewhere:
            raise TypeError(f"{name}: expected an argument of {peer}'s beam search, got an unknown one")
        off, instead = elsewhere[name]
        if not (isinstance(value, (int, float, tuple, type(None))) and value in off):
            wanted = " or ".join(repr(neutral) for neutral in off)
            raise ValueError(f"{name}: expected {wanted or 'it left out'}, got {value!r}; {instead}")


def barring(constraint: Any, tokens: Sequence[int]) -> Any:
    """``constraint``, one or a list with one per request, and never any of ``tokens``."""
    if not tokens:
        return constraint
    barred = ForbiddenPhrases([[token] for token in tokens])
    if constraint is None:
        return barred
    if isinstance(constraint, Sequence):
        return [barred if one is None else AllOf(one, barred) for one in constraint]
    return AllOf(constraint, barred)


def ending_after(name: str, low: Any, high: Any, eos: Any) -> tuple[int | list[int], list[int]]:
    """``min_length`` for a least number of tokens before EOS, and what is to be barred: EOS, if none is left for it.

    Args:
        name: of the argument.
        low, high: a number, or one per request.
        eos: as ``eos_id``.
    """
    least = PerRequest(name, low, whole_number(0))
    lengths = [n + 1 if n > 0 else 0 for n in least.values]
    if not least.shared:
        return lengths, []
    if isinstance(high, int) and least.values[0] > high:
        raise ValueError(f"{name}: expected at most {high}, got {low}")
    return (0, token_ids("eos_id", eos)) if lengths[0] > 0 and low == high else (lengths[0], [])
