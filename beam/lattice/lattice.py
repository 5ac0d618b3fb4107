"""What a search explored: a tree for each request, and pictures of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path as FilePath
from typing import TYPE_CHECKING, Any

import numpy as np

from ..arguments import whole_number
from .tree import Status, Tree

if TYPE_CHECKING:
    from ..state import State
    from .labels import Decode

_SUFFIXES = (".txt", ".svg", ".html", ".json")


@dataclass(frozen=True)
class Lattice:
    """What a search explored, one :class:`Tree` per request. Made by :func:`lattice`; holds nothing on the device.

    ``decode`` turns a list of token ids into text, as tokenizers' methods of that name do; without it, ids are shown.
    What text holds does no harm: pictures show it escaped, with what is invisible written out.
    """

    trees: tuple[Tree, ...]

    def __len__(self) -> int:
        return len(self.trees)

    def __iter__(self) -> Iterator[Tree]:
        return iter(self.trees)

    def __getitem__(self, index: int) -> Tree:
        return self.trees[index]

    def _repr_svg_(self) -> str:
        """What a notebook shows."""
        return self.svg()

    def text(self, decode: Decode | None = None, *, width: int = 100) -> str:
        """For a terminal, lines of at most ``width`` columns. ■ finished, … live, ✕ a dead end."""
        from . import text  # here and below: pictures are made seldom, and `import flashbeam` is to be quick

        _check_decode(decode)
        whole_number(1)("width", width)
        return "\n\n".join("\n".join(text.draw(tree, decode, width)) for tree in self.trees) + "\n"

    def svg(self, decode: Decode | None = None) -> str:
        """A picture, complete in itself. In a browser, a node tells its numbers when the pointer rests on it."""
        from . import svg

        _check_decode(decode)
        return svg.draw(self.trees, decode)

    def html(self, decode: Decode | None = None, *, title: str = "Beam search") -> str:
        """A page with the picture and the n-best; pointing at a node shows the way to it. It needs nothing else."""
        from . import html

        _check_decode(decode)
        return html.draw(self.trees, decode, title)

    def to_json(self, decode: Decode | None = None) -> str:
        """All there is, as JSON: ``{"requests": [{"request": 0, ..., "nodes": {"parent": [...], ...}}, ...]}``.

        Numbers that are not finite are ``null``. With ``decode``, ``nodes`` has each node's ``text`` as well.
        """
        import json

        _check_decode(decode)
        return json.dumps({"requests": [_as_dict(tree, decode) for tree in self.trees]}, allow_nan=False)

    def save(self, path: str | PathLike[str], decode: Decode | None = None) -> None:
        """Write a file, in UTF-8: ``.txt``, ``.svg``, ``.html`` or ``.json``, as its name ends.

        Raises:
            ValueError, TypeError: it is no such name. Nothing is written then.
        """
        if not isinstance(path, (str, PathLike)):
            raise TypeError(f"path: expected a file's name, got {type(path).__name__}")
        file = FilePath(path)
        ways: tuple[Callable[[Decode | None], str], ...] = (self.text, self.svg, self.html, self.to_json)
        makers = dict(zip(_SUFFIXES, ways, strict=True))
        if file.suffix.lower() not in makers:
            raise ValueError(f"path: expected a name that ends in one of {list(_SUFFIXES)}, got {file.name!r}")
        file.write_text(makers[file.suffix.lower()](decode), encoding="utf-8")


def lattice(state: State, num_hypotheses: int | None = None, *, requests: Sequence[int] | None = None) -> Lattice:
    """What the search has explored so far: every beam it kept, how each ended, and the n-best among them.

    Read from the history and the pool, so it costs a search nothing while it runs; call it after a search or between
    two steps. It waits for the device and works on the host.

    An EOS that finished but found no place in the pool, or lost it to better ones, is in none of the search's tensors:
    it is in the lattice only if the search was made with ``statistics=True``, which records it.

    Args:
        state: not modified.
        num_hypotheses: how many hypotheses are the n-best, as in ``BeamSearch.finalize``.
        requests: which, in this order; default all.

    Raises:
        ValueError, TypeError: ``<argument>: expected X, got Y``.
    """
    if not hasattr(state, "history"):
        raise TypeError(f"state: expected a flashbeam.State, got {type(state).__name__}")
    if num_hypotheses is not None:
        whole_number(1)("num_hypotheses", num_hypotheses)
    if requests is None:
        requests = range(state.batch_size)
    elif isinstance(requests, str) or not isinstance(requests, Iterable):
        raise TypeError(f"requests: expected a list of ints, got {type(requests).__name__}")
    chosen = [whole_number(0)("requests", each) for each in requests]
    for each in chosen:
        if each >= state.batch_size:
            raise ValueError(f"requests: expected numbers below {state.batch_size}, got {each}")
    from .build import trees

    return Lattice(trees(state, num_hypotheses, chosen))


def _check_decode(decode: Any) -> None:
    if decode is not None and not callable(decode):
        raise TypeError(f"decode: expected a function of token ids, got {type(decode).__name__}")


def _as_dict(tree: Tree, decode: Decode | None) -> dict[str, Any]:
    names = ("parent", "step", "slot", "token", "token_log_prob", "log_prob", "score", "rank", "finished")
    nodes = {name: _plain(getattr(tree, name)) for name in names}
    nodes["status"] = [Status(status).label for status in tree.status]
    if decode is not None:
        nodes["text"] = ["", *(decode([token]) for token in tree.token[1:].tolist())]
    found: dict[str, Any] = {
        name: getattr(tree, name) for name in ("request", "beam_size", "max_length", "steps", "done", "flags")
    }
    found["nodes"] = nodes
    if tree.statistics is not None:
        found["statistics"] = {name: _plain(values) for name, values in tree.statistics._asdict().items()}
    return found


def _plain(values: np.ndarray[Any, Any]) -> Any:
    """Lists of numbers that JSON has."""
    if values.dtype.kind == "f":
        finite, values = np.isfinite(values), values.astype(object)
        values[~finite] = None
    return values.tolist()
