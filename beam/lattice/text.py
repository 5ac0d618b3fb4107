"""The trees of a search as text for a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from .labels import Decode, columns, cut, line_of, number, token_label
from .tree import Status, Tree

_HEAD = 27  # columns before the branches: rank, score, log-probability
_ENDS = {Status.LIVE: " …", Status.DEAD_END: " ✕", Status.PRUNED: " ╌"}


def draw(tree: Tree, decode: Decode | None, width: int) -> Iterator[str]:
    """The lines of one request."""
    yield cut(summary(tree), width)
    yield f"{'rank':>6}{'score':>9}{'log-prob':>10}"
    yield " " * _HEAD + "●"
    for line in _branches(tree, decode):
        if line.node:
            rank, score, log_prob = (int(tree.rank[line.node]), tree.score[line.node], tree.log_prob[line.node])
            head = f"{rank or '':>6}{number(score):>9}{number(log_prob):>10}  "
        else:
            head = f"{f'{line.left_out} pruned':>25}  " if line.left_out else " " * _HEAD
        head = f"{head:{_HEAD}}{line.branch}"
        yield (head + cut(line.text, max(width - columns(head + line.end), 1)) + line.end).rstrip()


def summary(tree: Tree) -> str:
    """One line that says what a request's search has done."""
    statuses = tree.status[tree.leaves].tolist()
    ended = [(statuses.count(status), status.label) for status in reversed(Status)]
    said = ", ".join(_counted(count, label, plural=label == "dead end") for count, label in ended if count)
    parts = (_counted(tree.beam_size, "beam"), _counted(tree.steps, "step"), _counted(len(tree) - 1, "node"))
    so_far = "" if tree.done else " so far"
    return f"request {tree.request}: {', '.join(parts)}{so_far}" + (f": {said}" if said else "")


def _counted(count: int, name: str, plural: bool = True) -> str:
    return f"{count} {name}{'s' if plural and count != 1 else ''}"


class _Line(NamedTuple):
    """One line of the drawing."""

    branch: str  # the lines of the tree
    text: str
    end: str = ""
    node: int = 0  # what ends here and has a score worth showing; 0 if nothing does
    left_out: int = 0  # how many branches the text lists that came to nothing


def _branches(tree: Tree, decode: Decode | None) -> Iterator[_Line]:
    """Each branch that came to something, the best first, then on one line those that did not."""
    children = tree.children()

    def survives(node: int) -> bool:
        return bool(tree.status[node] >= Status.FINISHED)

    def follow(node: int) -> tuple[list[int], list[int]]:
        """A branch up to where it ends or forks, and the branches that left it on the way and came to nothing."""
        chain: list[int] = [node]
        lost: list[int] = []
        while True:
            alive = [child for child in children[chain[-1]] if survives(child)]
            if len(alive) != 1:
                return chain, lost
            lost += [child for child in children[chain[-1]] if not survives(child)]
            chain.append(alive[0])

    def below(node: int, lost: list[int], indent: str) -> list[tuple[list[int], list[int], str, bool]]:
        """What is still to be drawn below a node, the first last."""
        alive = [child for child in children[node] if survives(child)]
        lost = lost + [child for child in children[node] if not survives(child)]
        found: list[tuple[list[int], list[int], str, bool]] = [
            ([child], [], indent, not lost and child == alive[-1]) for child in alive
        ]
        if lost:
            found.append(([], lost, indent, True))
        return found[::-1]

    pending = below(0, [], " " * 0)
    while pending:
        begin, lost, indent, last = pending.pop()
        if lost:
            text = " ╌ ".join(_text(_longest(tree, children, child), decode) for child in lost)
            dead = sum(tree.status[child] == Status.DEAD_END for child in lost)
            yield _Line(f"{indent}╰╌ ", text, f" ✕{dead}" if dead else "", left_out=len(lost))
            continue
        chain, lost = follow(begin[0])
        end = chain[-1]
        leaf = not children[end]
        yield _Line(
            indent + ("└─ " if last else "├─ "),
            _text(tree.token[chain].tolist(), decode),
            (" ■" if tree.finished[end] else _ENDS.get(Status(tree.status[end]), " …")) if leaf else "",
            end if leaf else 0,
        )
        pending += below(end, lost, indent + ("   " if last else "│  "))


def _text(tokens: list[int], decode: Decode | None) -> str:
    text = line_of(tokens, decode)
    return text if text.strip() else "".join(token_label(token, decode) for token in tokens)


def _longest(tree: Tree, children: list[list[int]], node: int) -> list[int]:
    """The tokens of a branch down to its first leaf: the one that went furthest comes first in ``children``' order."""
    tokens = [int(tree.token[node])]
    while children[node]:
        node = children[node][0]
        tokens.append(int(tree.token[node]))
    return tokens
