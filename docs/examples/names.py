"""Names of Python's builtins and standard library, and the search for those with which a prompt may go on.

``complete_names`` is what to copy: a constraint for each prompt of a batch. ``python names.py`` writes ``names.txt``, a
line for each module of the running Python: its name, then those it has. It is kept, as importing them all has effects.
"""

from __future__ import annotations

import builtins
import importlib
import inspect
import keyword
import pkgutil
import re
import sys
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import flashbeam as fb
from choose import COUNT, sequences
from codelm import EOS_ID, PIECE, Cache, CodeLM, Tokenizer

NAMES = Path(__file__).with_name("names.txt")
SKIPPED = {"antigravity", "encodings", "ensurepip", "idlelib", "lib2to3", "pydoc_data", "test", "this", "turtledemo"}
OF_MODULE = re.compile(r"(?:\bfrom +([\w.]+) +import[ (]+(?:\w+, *)*|([\w.]*)\.)$")
MODULE = re.compile(r"\b(?:from|import) +(?:[\w.]+, *)*$")


class Cursor(NamedTuple):
    """A prompt that stops before a name, or within one."""

    before: str  # the prompt up to the name
    typed: str  # how the name begins, with the blank that is part of its first token
    place: str  # what is legal there: "names of os"
    names: list[str]  # those that begin so

    def spelled(self, name: str) -> str:
        """The name as it follows ``before``."""
        return " " * self.typed.startswith(" ") + name


class Name(NamedTuple):
    """A name that was found."""

    text: str
    log_prob: float  # that it comes next, and ends
    real: bool


def read_names() -> dict[str, list[str]]:
    """The public names of each module, and of each type as ``builtins.str``."""
    lines = map(str.split, NAMES.read_text().splitlines())
    return {module: names for module, *names in lines}


def find_cursors(prompts: Sequence[str]) -> list[Cursor]:
    known = read_names()
    return [find_cursor(prompt, known) for prompt in prompts]


def find_cursor(prompt: str, known: dict[str, list[str]]) -> Cursor:
    """Tell which names may come next."""
    # a token of the model may span what is typed and what is not: the name is taken back to its beginning
    typed = PIECE.findall(prompt + "x")[-1][:-1]
    beginning = typed.lstrip(" ")
    text = prompt.removesuffix(beginning)
    modules = [module for module in known if "." not in module]
    names: Iterable[str]
    if found := OF_MODULE.search(text):
        module = found[1] or found[2]
        module = next((key for key in (module, f"builtins.{module}") if key in known), "any module")
        # what is before a dot may be an object of any kind
        place, names = f"names of {module}", known.get(module) or set().union(*known.values())
    elif MODULE.search(text):
        place, names = "modules", modules
    else:
        place, names = "builtins or modules", {*known["builtins"], *modules}
    legal = sorted(name for name in names if name.startswith(beginning))
    return Cursor(prompt.removesuffix(typed), typed, place, legal)


def real_names(cursor: Cursor, tokenizer: Tokenizer) -> fb.Trie:
    return fb.Trie([tokenizer.encode_piece(cursor.spelled(name)) for name in cursor.names])


def any_identifier(cursor: Cursor, tokenizer: Tokenizer) -> fb.Automaton:
    first = "" if cursor.typed.strip() else "[a-zA-Z_]"
    return fb.Automaton.from_regex(rf"(?a){cursor.typed}{first}\w*", tokenizer.pieces)


@torch.inference_mode()
def complete_names(
    model: CodeLM,
    tokenizer: Tokenizer,
    cursors: Sequence[Cursor],
    constraints: Sequence[fb.Automaton],
    max_length: int,
) -> list[list[Name]]:
    """The ``COUNT`` likeliest names at each cursor, best first, of those that its constraint allows."""
    ends = torch.tensor([i for i, piece in enumerate(tokenizer.pieces) if not re.match(rb"[\w\x80-\xff]", piece)])

    def run(tokens: Tensor, cache: Cache | None) -> tuple[Tensor, Cache]:
        if cache is None:
            return model.prefill([tokenizer.encode(cursor.before) for cursor in cursors])
        logits, cache = model(tokens, cache)
        # a name ends before whatever cannot be part of it: EOS stands for all of that
        ended = logits[:, ends].logsumexp(1)
        logits = logits.index_fill(1, ends, -torch.inf)
        logits[:, EOS_ID] = ended
        return logits, cache

    search = fb.BeamSearch(
        COUNT, max_length, EOS_ID, length_penalty=0.0, stopping=fb.Exact(), constraint=list(constraints)
    )
    hyps = fb.decode(search, run, torch.empty(len(cursors), 0))
    found = []
    for request, cursor in enumerate(cursors):
        texts = [tokenizer.decode(tokens).strip() for tokens in sequences(hyps, request)]
        log_probs = hyps.log_probs[request].tolist()
        found.append([Name(*each, each[0] in cursor.names) for each in zip(texts, log_probs, strict=False)])
    return found


def collect_names() -> dict[str, list[str]]:
    """Import every module of the standard library that can be, and list what ``read_names`` returns."""
    kinds = {name: kind for name, kind in vars(builtins).items() if isinstance(kind, type) and is_public(name)}
    found = {f"builtins.{name}": dir(kind) for name, kind in kinds.items() if not issubclass(kind, BaseException)}
    waiting = ["os.path", *sys.stdlib_module_names - SKIPPED]
    for path in waiting:  # which grows
        if any(part.startswith("_") or part in ("test", "tests") for part in path.split(".")):
            continue
        try:
            module = importlib.import_module(path)
        except ImportError:  # of another system
            continue
        own = [name for name, value in vars(module).items() if not inspect.ismodule(value)]
        inner = [sub.name for sub in pkgutil.iter_modules(getattr(module, "__path__", []))]
        found[path] = [*{*getattr(module, "__all__", own), *inner}]
        waiting += [f"{path}.{name}" for name in inner]
    public = {path: sorted(filter(is_public, names)) for path, names in sorted(found.items())}
    return {path: names for path, names in public.items() if names}


def is_public(name: str) -> bool:
    return name.isascii() and not name.startswith("_") and not keyword.iskeyword(name)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    NAMES.write_text("".join(" ".join([path, *names]) + "\n" for path, names in collect_names().items()))
