"""Tokens as text that is seen, whatever they hold: on one line, nothing invisible, and all of it legal in XML."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence

Decode = Callable[[Sequence[int]], str]

_SEEN = {"\n": "↵", "\t": "⇥", "\r": "␍", "\x7f": "␡"}


def visible(text: str, space: str = " ") -> str:
    """``text`` on one line, what cannot be seen written out: ``↵`` for a line break, ``\\u200b`` for no width."""
    found = []
    for character in text:
        if character == " ":
            found.append(space)
        elif character in _SEEN:
            found.append(_SEEN[character])
        elif character < " ":
            found.append(chr(0x2400 + ord(character)))  # the pictures of control characters
        elif character.isprintable():
            alone = unicodedata.combining(character) and not found
            found.append(("\N{DOTTED CIRCLE}" if alone else "") + character)
        else:  # no width, no meaning of its own, or the half of a character
            found.append(f"\\u{ord(character):04x}" if ord(character) < 0x10000 else f"\\U{ord(character):08x}")
    return "".join(found)


def token_label(token: int, decode: Decode | None) -> str:
    """What a node is called: its text, blanks as ``·``; its id where it has none."""
    text = "" if decode is None else decode([token])
    return visible(text, "·") or (str(token) if decode is None else f"⟨{token}⟩")


def line_of(tokens: Sequence[int], decode: Decode | None) -> str:
    """The text of several tokens on one line, indentation shortened; their ids where there is none."""
    if decode is None:
        return " ".join(map(str, tokens))
    return re.sub(" {3,}", "  ", visible(decode(list(tokens))))


def columns(text: str) -> int:
    """How many columns of a fixed-width font ``text`` takes."""
    wide = sum(unicodedata.east_asian_width(character) in "WF" for character in text)
    return len(text) + wide - sum(unicodedata.combining(character) > 0 for character in text)


def cut(text: str, width: int) -> str:
    """``text`` in at most ``width`` columns."""
    if columns(text) <= width:
        return text
    kept = ""
    for character in text:
        if columns(kept + character) > width - 1:
            break
        kept += character
    return kept + "…"


def number(value: float, digits: int = 2) -> str:
    """Rounded; never ``-0.00``."""
    return f"{round(value, digits) + 0.0:.{digits}f}"


def typeset(value: float, digits: int = 2) -> str:
    """The same with a minus sign instead of a hyphen."""
    return number(value, digits).replace("-", "\N{MINUS SIGN}")
