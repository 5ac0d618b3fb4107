"""What the presets do with their peers' arguments."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from ..arguments import PerRequest
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


@contextmanager
def in_terms_of_peer(**names: str) -> Iterator[None]:
    """Errors say the peer's name of an argument, ``names`` by flashbeam's."""
    try:
        yield
    except (ValueError, TypeError) as error:
        said, got, value = str(error).partition(", got ")  # the value given is left as it is
        said = re.sub(rf"\b({'|'.join(names)})\b", lambda found: names[found[0]], said)
        error.args = (said + got + value,)
        raise


def count_of(*arguments: PerRequest[Any]) -> int:
    """The number of requests that all of these are for; 1 if none says.

    Raises:
        ValueError: they differ.
    """
    listed = [argument for argument in arguments if not argument.shared]
    for argument in listed:
        count, first = len(argument.values), len(listed[0].values)
        if count != first:
            raise ValueError(f"{argument.name}: expected as many values as {listed[0].name}, {first}, got {count}")
    return len(listed[0].values) if listed else 1


def barring(constraint: Any, tokens: Sequence[int], where: bool | Sequence[bool] = True) -> Any:
    """``constraint``, one or a list with one per request; and never any of ``tokens``, ``where`` that is so."""
    bars = [where] if isinstance(where, bool) else where
    if not tokens or not any(bars):
        return constraint
    barred = ForbiddenPhrases([[token] for token in tokens])

    def joined(one: Any, bar: bool = True) -> Any:
        if not bar:
            return one
        return barred if one is None else AllOf(one, barred)

    constraints = PerRequest("constraint", constraint, lambda _, one: one)
    if isinstance(where, bool):
        return joined(constraint) if constraints.shared else [joined(one) for one in constraints.values]
    return [joined(one, bar) for one, bar in zip(constraints.of_batch(len(where)), where, strict=True)]


def ending_after(
    low: PerRequest[int], high: PerRequest[Any], ends: Sequence[int], constraint: Any
) -> tuple[int | list[int], Any]:
    """``min_length`` for ``low`` tokens or more before EOS; and ``constraint``, EOS barred where none is left for it.

    Args:
        low: fewest tokens, EOS not counted.
        high: most tokens, EOS counted; one that is a function of the source is not compared.
        ends: EOS.
        constraint: one, or a list with one per request.
    """
    count = count_of(low, high)
    pairs = list(zip(low.of_batch(count), high.of_batch(count), strict=True))
    for i, (least, most) in enumerate(pairs):
        if not callable(most) and least > most:
            raise ValueError(f"{low.name}{'' if low.shared else [i]}: expected at most {most}, got {least}")
    never = [least == most for least, most in pairs]
    lengths = [least + 1 if least > 0 and not bar else 0 for (least, _), bar in zip(pairs, never, strict=True)]
    if low.shared and high.shared:
        return lengths[0], barring(constraint, ends, never[0])
    return lengths, barring(constraint, ends, never)
