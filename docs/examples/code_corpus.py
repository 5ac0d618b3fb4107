"""The standard library of the running interpreter as paragraphs of code, and prompts from its held-out files.

Comments and docstrings are removed, and a blank line remains only between whole statements, never inside brackets,
strings or directly below a block's header. So a blank line ends a paragraph in which every bracket is closed.
"""

from __future__ import annotations

import ast
import hashlib
import io
import json
import random
import re
import sysconfig
import textwrap
import tokenize
from itertools import pairwise
from pathlib import Path

from codelm import PIECE

PROMPTS = Path(__file__).with_name("held_out_prompts.json")
HELD_OUT_PERCENT = 5
# tests, generated tables, and what does not belong to the library
SKIPPED = {
    "test",
    "tests",
    "idle_test",
    "site-packages",
    "encodings",
    "pydoc_data",
    "__pycache__",
    "lib-dynload",
    "entities.py",
}
LAYOUT = {tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
STATEMENT = re.compile(r" *(?!else|elif|except|finally)[A-Za-z_@]")  # what may begin a prompt
MIN_PROMPT, MIN_REST, MAX_REST = 12, 24, 240  # characters


def read_corpus() -> tuple[list[str], list[str]]:
    """Return the cleaned training files and held-out files, in the order of their paths."""
    root = Path(sysconfig.get_paths()["stdlib"])
    train: list[str] = []
    held_out: list[str] = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if SKIPPED.intersection(relative.parts) or relative.parts[0].startswith(("_sysconfigdata", "config-")):
            continue
        text = clean(path.read_text(encoding="utf-8", errors="replace"))
        (held_out if is_held_out(relative.as_posix()) else train).append(text)
    return train, held_out


def is_held_out(relative_path: str) -> bool:
    digest = hashlib.sha256(relative_path.encode()).digest()
    return int.from_bytes(digest[:4], "big") % 100 < HELD_OUT_PERCENT


def clean(source: str) -> str:
    """Remove comments, docstrings, and blank lines that do not lie between statements; squeeze the others into one."""
    lines: list[str | None] = [line.rstrip() for line in source.split("\n")]  # None = removed
    # each from its INDENT or DEDENTs to its NEWLINE; the last is the end of the file
    statements: list[list[tokenize.TokenInfo]] = [[]]
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        row, column = token.start
        if token.type == tokenize.COMMENT:
            lines[row - 1] = token.line[:column].rstrip() or None
        elif token.type != tokenize.NL:
            statements[-1].append(token)
        if token.type == tokenize.NEWLINE:
            statements.append([])

    end = 0  # last row of the statement before
    opens = False  # a block begins: blank lines between its header and its first statement go
    for statement, following in pairwise(statements):
        body = [token for token in statement if token.type not in (tokenize.INDENT, tokenize.DEDENT)]
        opens = opens or statement[0].type == tokenize.INDENT
        start = body[0].start[0]
        for row in range(end if opens else start, body[-1].start[0]):
            lines[row] = lines[row] or None
        end = body[-1].start[0]
        if len(body) == 2 and body[0].type == tokenize.STRING:
            lines[start - 1 : end] = [None] * (end - start + 1)
            alone = opens and following[0].type in (tokenize.DEDENT, tokenize.ENDMARKER)
            if alone:
                lines[start - 1] = " " * body[0].start[1] + "pass"
            opens = opens and not alone
        else:
            opens = False
    return re.sub(r"\n{3,}", "\n\n", "\n".join(line for line in lines if line is not None)).strip("\n")


def completes(prompt: str, completion: str) -> bool:
    """Tell whether prompt and completion together are Python tokens: brackets and strings closed, indents fit."""
    source = textwrap.dedent(prompt + completion)
    try:
        return all(t.type != tokenize.ERRORTOKEN for t in tokenize.generate_tokens(io.StringIO(source).readline))
    except (tokenize.TokenError, SyntaxError):  # IndentationError is a SyntaxError
        return False


def held_out_prompts(n: int, seed: int) -> list[str]:
    """Return ``n`` distinct beginnings of held-out paragraphs, drawn by ``seed``: one line, or one and a part.

    The same interpreter gives the same prompts; ``python code_corpus.py`` keeps 100 in ``held_out_prompts.json``.
    """
    _, files = read_corpus()
    generator = random.Random(seed)
    prompts = {cut for text in files for part in text.split("\n\n") if (cut := cut_paragraph(part, generator))}
    return generator.sample(sorted(prompts), n)


def cut_paragraph(paragraph: str, generator: random.Random) -> str | None:
    """Cut a paragraph after its first line or at a token within its second; ``None`` where it is no fair prompt."""
    lines = paragraph.split("\n")
    if len(lines) == 1 or not STATEMENT.match(paragraph) or not completes(paragraph, ""):
        return None
    dedented = textwrap.dedent(paragraph)
    tokens = list(tokenize.generate_tokens(io.StringIO(dedented).readline))
    if any(token.type == tokenize.STRING and token.start[0] < token.end[0] for token in tokens):
        return None
    # offset in the paragraph of column 0 of the dedented second line
    second = 2 * len(lines[0]) + 1 - len(dedented.split("\n")[0])
    pieces = {piece.end() for piece in PIECE.finditer(paragraph)}
    ends = {second + token.end[1] for token in tokens if token.end[0] == 2 and token.type not in LAYOUT}
    within = sorted(end for end in ends & pieces if second < end < len(lines[0]) + 1 + len(lines[1]))
    end = generator.choice(within) if within and generator.random() < 0.5 else len(lines[0])
    if end < MIN_PROMPT or not MIN_REST <= len(paragraph) - end <= MAX_REST or paragraph[end - 1] == "\\":
        return None
    try:
        ast.parse(textwrap.dedent(paragraph[:end]))
    except SyntaxError:
        return paragraph[:end]
    return None  # a program already: the likeliest completion is none at all


if __name__ == "__main__":
    PROMPTS.write_text(json.dumps(held_out_prompts(100, seed=0), indent=1) + "\n")
