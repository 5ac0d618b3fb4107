"""The documentation's examples run, its links lead somewhere, and the files it names exist.

The ``python`` blocks of one page run in order in one namespace. A block below ``<!-- no-run: reason -->`` is not run.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
RUN = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]
READ = [*RUN, ROOT / "CONTRIBUTING.md"]
FOLDERS = ("beam", "kernels", "tests", "bench", "docs", ".ci")

FENCE = re.compile(r"^( *)(```+)(\w*)[^\n]*\n(.*?)^ *\2 *$", re.MULTILINE | re.DOTALL)
NO_RUN = re.compile(r"<!-- *no-run\b:?((?:(?!-->).)*)-->\s*$", re.DOTALL)
LINK = re.compile(r"\]\(<?([^)\s>]+)>?(?: \"[^\"]*\")?\)")
CODE = re.compile(r"`([^`\n]+)`")


class Block(NamedTuple):
    line: int  # of its first line of code, from 1
    code: str
    no_run: str | None  # the reason not to run it, None = run it


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def blocks(text: str) -> Iterator[Block]:
    """Yield the ``python`` blocks of a page."""
    for fence in FENCE.finditer(text):
        if fence[3] == "python":
            mark = NO_RUN.search(text, 0, fence.start())
            line = text.count("\n", 0, fence.start(4)) + 1
            yield Block(line, dedent(fence[4]), mark[1].strip() if mark else None)


def headings(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    lines = re.findall(r"^#+ +(.*?) *$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in lines}


@pytest.mark.parametrize("page", RUN, ids=relative)
def test_examples_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "__main__"}
    for block in blocks(page.read_text()):
        if block.no_run is None:
            # the blank lines give a traceback the page's own line numbers
            exec(compile("\n" * (block.line - 1) + block.code, page, "exec"), namespace)


@pytest.mark.parametrize("page", RUN, ids=relative)
def test_examples_that_do_not_run_say_why(page: Path) -> None:
    assert [block.line for block in blocks(page.read_text()) if block.no_run == ""] == []


@pytest.mark.parametrize("page", READ, ids=relative)
def test_links_lead_somewhere(page: Path) -> None:
    for link in LINK.findall(CODE.sub("", FENCE.sub("", page.read_text()))):
        if re.match(r"\w+:", link):  # another site's, or mail
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{relative(page)}: {link}"
        if anchor and target.suffix == ".md":
            assert anchor in headings(target.read_text()), f"{relative(page)}: {link}"


@pytest.mark.parametrize("page", READ, ids=relative)
def test_files_named_exist(page: Path) -> None:
    text = page.read_text()
    shell = [fence[4] for fence in FENCE.finditer(text) if fence[3] in ("bash", "sh", "console")]
    for word in " ".join(CODE.findall(FENCE.sub("", text)) + shell).split():
        path = word.partition("::")[0]  # tests/test_x.py::test_y
        if re.fullmatch(r"[\w.*/-]+", path) and path.startswith(tuple(f"{folder}/" for folder in FOLDERS)):
            assert any(ROOT.glob(path.rstrip("/"))), f"{relative(page)}: {word}"
