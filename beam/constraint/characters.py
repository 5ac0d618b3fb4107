"""Sets of characters as intervals of code points or bytes: what one element of a regular expression matches.

What Python's ``re`` matches is asked of ``re`` itself, with a text of every character: a run of matches is an interval.
"""

import functools
from collections.abc import Iterator
from typing import Any

try:
    from re import _compiler as compiler  # type: ignore[attr-defined]
    from re import _constants as ops  # type: ignore[attr-defined]
    from re import _parser as parser  # type: ignore[attr-defined]
except ImportError:  # Python 3.10
    import sre_compile as compiler
    import sre_constants as ops
    import sre_parse as parser

__all__ = ["Intervals", "characters", "ops", "parser", "utf8"]

Intervals = tuple[tuple[int, int], ...]  # first and last, ascending
_SURROGATES = 0xD800, 0xDFFF  # no UTF-8 has them


@functools.cache
def _every_character(of_bytes: bool) -> Any:
    return bytes(range(256)) if of_bytes else "".join(map(chr, range(0x110000)))


def characters(operation: Any, argument: Any, flags: int, of_bytes: bool) -> Intervals:
    """The characters that an element of a parsed pattern matches."""
    if operation is ops.LITERAL and not flags & ops.SRE_FLAG_IGNORECASE:
        return ((argument, argument),)
    state = parser.State()
    element = parser.SubPattern(state, [(operation, argument)])
    run = parser.SubPattern(state, [(ops.MAX_REPEAT, (1, ops.MAXREPEAT, element))])
    found = compiler.compile(run, flags).finditer(_every_character(of_bytes))
    return tuple((match.start(), match.end() - 1) for match in found)


def utf8(intervals: Intervals) -> Iterator[Intervals]:
    """Sequences of intervals of bytes that together are the UTF-8 of the characters in ``intervals``."""
    for first, last in intervals:
        yield from _utf8(first, min(last, _SURROGATES[0] - 1))
        yield from _utf8(max(first, _SURROGATES[1] + 1), last)


def _utf8(first: int, last: int) -> Iterator[Intervals]:
    if first > last:
        return
    for top in (0x7F, 0x7FF, 0xFFFF):  # as many bytes in all
        if first <= top < last:
            yield from _utf8(first, top)
            yield from _utf8(top + 1, last)
            return
    for low in (0x3F, 0xFFF, 0x3FFFF) if last > 0x7F else ():  # later bytes of every kind, or earlier ones equal
        if first & ~low == last & ~low:
            continue
        if first & low:
            yield from _utf8(first, first | low)
            yield from _utf8((first | low) + 1, last)
            return
        if last & low != low:
            yield from _utf8(first, (last & ~low) - 1)
            yield from _utf8(last & ~low, last)
            return
    yield tuple(zip(chr(first).encode(), chr(last).encode(), strict=True))
