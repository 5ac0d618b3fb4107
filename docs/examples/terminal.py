"""What the demo needs of a terminal: colour where there is one, text on one line, a progress bar."""

from __future__ import annotations

import os
import re
import sys
import time
from typing import TextIO

INDENT = 4  # columns of one level of Python code


class Style:
    """Marks text with colour, if ``stream`` is a terminal that shows it and ``NO_COLOR`` is not set."""

    def __init__(self, stream: TextIO) -> None:
        self.on = stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"

    def _mark(self, code: int, text: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if self.on and text else text

    def bold(self, text: str) -> str:
        return self._mark(1, text)

    def dim(self, text: str) -> str:
        return self._mark(2, text)

    def green(self, text: str) -> str:
        return self._mark(32, text)


def printable(text: str) -> str:
    """Replace what would move the cursor or change the terminal."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text.expandtabs(INDENT))


def one_line(text: str) -> str:
    """Write code on one line: each line break becomes ``↵`` and one blank per level of indentation."""
    text = re.sub(r"\n( *)", lambda found: f"\0{' ' * (len(found[1]) // INDENT)}", text.rstrip("\n"))
    return "↵".join(map(printable, text.split("\0")))


def cut(text: str, columns: int) -> str:
    """Shorten text to at most ``columns`` characters."""
    return text if len(text) <= columns else text[: max(columns - 1, 0)] + "…"


class Progress:
    """A bar on a stream, from one second after its creation on; on a terminal it is redrawn, and erased in the end."""

    WIDTH = 40

    def __init__(self, total: float, stream: TextIO = sys.stderr) -> None:
        self.total = total
        self.stream = stream
        self.label = ""
        self.began = time.perf_counter()
        self.done = 0.0
        self.shown = -1  # marks; -1: no bar yet

    def advance(self, amount: float) -> None:
        self.reach(self.done + amount)

    def reach(self, done: float) -> None:
        """Show that ``done`` of ``total`` is done."""
        self.done = done
        marks = int(self.WIDTH * done / self.total)
        if marks == self.shown or time.perf_counter() - self.began < 1.0:
            return
        if self.stream.isatty():
            bar = "#" * marks + "." * (self.WIDTH - marks)
            self.stream.write(f"\r\x1b[K[{bar}] {100 * marks // self.WIDTH:3} %  {self.label}")
        else:  # a file keeps every character: one line that grows
            self.stream.write("progress [" * (self.shown < 0) + "#" * (marks - max(self.shown, 0)))
        self.stream.flush()
        self.shown = marks

    def close(self) -> None:
        if self.shown >= 0:
            self.stream.write("\r\x1b[K" if self.stream.isatty() else "]\n")
            self.stream.flush()
