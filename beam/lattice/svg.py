"""The trees of a search as one picture, in SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

import numpy as np

from .labels import Decode, columns, cut, token_label, typeset
from .layout import Layout, lay_out
from .text import summary
from .tree import Status, Tree

_CHARACTER = 7.55  # width of one column at 12.5 px, in the widest of the fonts named below
_LONGEST = 20  # columns of a label
_PAD = 7  # inside a node, left and right
_GAP = 30  # between columns, where lines change rows
_ROW, _NODE = 27, 19  # heights
_MARGIN = 20
_STRIP = 26  # the entropies

CLASSES = ("dead", "pruned", "finished", "live", "best")  # by status

STYLE = """
.bg { fill: #ffffff }
.band { fill: #1b2733; fill-opacity: .022 }
text { font: 12.5px ui-monospace, 'SF Mono', Menlo, Consolas, 'DejaVu Sans Mono', monospace; fill: #1b2733;
  white-space: pre }
.title { font: 600 13px system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif }
.note { font: 11px system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif; fill: #66727f }
.e { fill: none; stroke-linecap: round }
.n rect { stroke-width: 1.2 }
.best rect { fill: #e0edfc; stroke: #1a66c2 }
.best.top rect { fill: #cbe1fb }
.e.best { stroke: #1a66c2 }
.live rect { fill: #fdf3dc; stroke: #a86b00 }
.e.live { stroke: #d59a35 }
.finished rect { fill: #e2f2ea; stroke: #2b7a55 }
.e.finished { stroke: #5fa583 }
.pruned rect { fill: #ffffff; stroke: #d3d9df }
.pruned text { fill: #8b96a2 }
.e.pruned { stroke: #ccd3da; stroke-dasharray: 1 4 }
.dead rect { fill: #ffffff; stroke: #d8a49c; stroke-dasharray: 3 2 }
.dead text { fill: #a8483a }
.e.dead { stroke: #dfb3ac; stroke-dasharray: 1 4 }
.end.best rect { fill: #1a66c2; stroke: #1a66c2 }
.end.finished rect { fill: #2b7a55; stroke: #2b7a55 }
.end.best .label, .end.finished .label { fill: #ffffff }
.badge { font-size: 11px }
.best .badge { fill: #1a66c2; font-weight: 600 }
.finished .badge { fill: #2b7a55 }
.live .badge { fill: #a86b00 }
.root { fill: #1b2733 }
.bar { fill: #93a7bb }
.n:hover rect, .n.on rect { stroke-width: 2.4 }
"""
_DARK = """
@media (prefers-color-scheme: dark) {
.bg { fill: #14191f }
.band { fill: #ffffff; fill-opacity: .03 }
text { fill: #dde4ea }
.note { fill: #93a0ac }
.best rect { fill: #17365a; stroke: #62a3ec }
.best.top rect { fill: #1d4675 }
.e.best { stroke: #62a3ec }
.live rect { fill: #3b2f14; stroke: #d8a23f }
.e.live { stroke: #a97c2b }
.finished rect { fill: #163527; stroke: #57ab83 }
.e.finished { stroke: #3f7d60 }
.pruned rect { fill: #14191f; stroke: #3a444e }
.pruned text { fill: #77838f }
.e.pruned { stroke: #3a444e }
.dead rect { fill: #14191f; stroke: #7d4a42 }
.dead text { fill: #d98c80 }
.e.dead { stroke: #6b423b }
.end.best rect { fill: #62a3ec; stroke: #62a3ec }
.end.finished rect { fill: #57ab83; stroke: #57ab83 }
.end.best .label, .end.finished .label { fill: #10151a }
.best .badge { fill: #7fb6f3 }
.finished .badge { fill: #57ab83 }
.live .badge { fill: #d8a23f }
.root { fill: #dde4ea }
.bar { fill: #52667a }
}
"""
STYLE += _DARK


class Figure(NamedTuple):
    """The elements of one tree, and their size in pixels."""

    elements: str
    width: float
    height: float


def draw(trees: Sequence[Tree], decode: Decode | None) -> str:
    """All trees, one below the other, and a legend."""
    figures = [figure(tree, decode, summary(tree)) for tree in trees]
    legend = _legend()
    height = legend.height + sum(each.height for each in figures)
    width = max([each.width for each in figures] + [legend.width])
    parts, y = [legend.elements], legend.height
    for each in figures:
        parts.append(f'<g transform="translate(0 {_px(y)})">\n{each.elements}\n</g>')
        y += each.height
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_px(width)}" height="{_px(height)}" '
        f'viewBox="0 0 {_px(width)} {_px(height)}" role="img" aria-label="What a beam search explored">\n'
        f'<style>{STYLE}</style>\n<rect class="bg" width="100%" height="100%"/>\n{body}\n</svg>\n'
    )


def figure(tree: Tree, decode: Decode | None, title: str = "") -> Figure:
    """One tree."""
    place = _Places(tree, decode, title)
    parts = [f'<text class="title" x="{_MARGIN}" y="18">{escape(title)}</text>'] if title else []
    parts += _bands(tree, place)
    order = sorted(range(1, len(tree)), key=lambda node: (tree.status[node], -node))  # what matters most comes last
    parts += [_edge(tree, place, node) for node in order]
    x, y = place.root
    parts.append(f'<circle class="root" cx="{_px(x)}" cy="{_px(y)}" r="4.5"/>')
    top = _top(tree)
    parts += [_node(tree, place, node, decode, node in top) for node in order]
    return Figure("\n".join(parts), place.width, place.height)


class _Places:
    """Pixels of nodes."""

    def __init__(self, tree: Tree, decode: Decode | None, title: str) -> None:
        self.layout: Layout = lay_out(tree)
        self.labels = [cut(token_label(token, decode), _LONGEST) for token in tree.token.tolist()]
        self.ends = {node: _badge(tree, node) for node in tree.leaves.tolist()}
        self.lengths = tree.lengths.tolist()
        widths = [24.0] + [30.0] * (self.layout.columns - 1)
        for node in range(1, len(tree)):
            column = self.lengths[node]
            widths[column] = max(widths[column], self.node_width(node) + self._badge_width(node))
        self.left = [float(_MARGIN)]
        for width in widths:
            self.left.append(self.left[-1] + width + _GAP)
        self.widths = widths
        self.top = 26.0 if title else 6.0
        self.rows_begin = self.top + 20 + (_STRIP if tree.statistics is not None else 0)
        self.width = self.left[-1] - _GAP + _MARGIN
        self.width = max(self.width, 2 * _MARGIN + 7.0 * len(title))
        self.height = self.rows_begin + self.layout.rows * _ROW + 26
        self.root = (self.left[0] + 12, self.y(0))

    def node_width(self, node: int) -> float:
        return columns(self.labels[node]) * _CHARACTER + 2 * _PAD

    def _badge_width(self, node: int) -> float:
        badge = self.ends.get(node, "")
        return 6 + 6.8 * columns(badge) if badge else 0.0

    def x(self, node: int) -> float:
        length: int = self.lengths[node]
        return self.left[length]

    def y(self, node: int) -> float:
        return self.rows_begin + (self.layout.row[node] + 0.5) * _ROW


def _badge(tree: Tree, node: int) -> str:
    """What is said beside the end of a branch."""
    if tree.rank[node]:
        more = "" if tree.finished[node] else " …"
        return f"#{tree.rank[node]} {typeset(tree.score[node])}{more}"
    status = Status(tree.status[node])
    return {Status.DEAD_END: "✕", Status.LIVE: "…", Status.FINISHED: typeset(tree.score[node])}.get(status, "")


def _top(tree: Tree) -> set[int]:
    """The nodes of the best hypothesis."""
    best = np.flatnonzero(tree.rank == 1)
    return set(tree.path(int(best[0])).nodes) if len(best) else set()


def _bands(tree: Tree, place: _Places) -> list[str]:
    """The columns: their shades, their numbers and, where known, their entropies."""
    parts = []
    for step in range(tree.steps):
        x, width = place.left[step + 1], place.widths[step + 1]
        if step % 2 == 0:
            parts.append(
                f'<rect class="band" x="{_px(x - _GAP / 2)}" y="{_px(place.top)}" width="{_px(width + _GAP)}" '
                f'height="{_px(place.height - place.top - 16)}"/>'
            )
        parts.append(f'<text class="note" x="{_px(x)}" y="{_px(place.top + 14)}">{step + 1}</text>')
    if tree.statistics is None:
        return parts
    means = [
        float(entropy[expanded].mean()) if expanded.any() else 0.0
        for entropy, expanded in zip(tree.statistics.entropy, tree.statistics.expanded, strict=True)
    ]
    scale, base = 16 / max([*means, 1e-9]), place.top + 38
    parts.append(f'<text class="note" x="{_MARGIN - 8}" y="{_px(base - 2)}">entropy</text>')
    for step, mean in enumerate(means):
        x, tall = place.left[step + 1], max(mean * scale, 0.5)
        parts.append(
            f'<g class="s"><title>{escape(_of_step(tree, step))}</title>'
            f'<rect fill-opacity="0" x="{_px(x)}" y="{_px(base - 18)}" width="40" height="20"/>'
            f'<rect class="bar" x="{_px(x)}" y="{_px(base - tall)}" width="10" height="{_px(tall)}" rx="1.5"/>'
            f'<text class="note" x="{_px(x + 14)}" y="{_px(base - 2)}">{typeset(mean, 1)}</text></g>'
        )
    return parts


def _of_step(tree: Tree, step: int) -> str:
    found = tree.statistics
    assert found is not None
    each = ", ".join(typeset(entropy) for entropy in found.entropy[step][found.expanded[step]])
    margin = found.margin[step]
    lines = [
        f"step {step + 1}",
        f"entropy of each beam expanded, nats: {each}",
        f"beams live after it: {found.width[step]}",
    ]
    if math.isfinite(margin):
        lines.append(f"margin between kept and rejected: {typeset(margin, 4)}")
    return "\n".join([*lines, f"EOS that finished: {found.finished[step]}"])


def _edge(tree: Tree, place: _Places, node: int) -> str:
    """The line from a node's parent, as thick as its token is probable."""
    parent = int(tree.parent[node])
    begin = place.root[0] if parent == 0 else place.x(parent) + place.node_width(parent)
    (x, y), above = (place.x(node), place.y(node)), place.y(parent)
    if y == above:
        way = f"M{_px(begin)} {_px(y)}H{_px(x)}"
    else:
        bend = f"{_px(x - _GAP / 2)} {_px(above)} {_px(x - _GAP / 2)} {_px(y)}"
        way = f"M{_px(begin)} {_px(above)}H{_px(x - _GAP)}C{bend} {_px(x)} {_px(y)}"
    thick = 1 + 3 * math.exp(min(float(tree.token_log_prob[node]), 0.0))
    kind = CLASSES[tree.status[node]]
    return f'<path class="e {kind}" data-i="{node}" d="{way}" stroke-width="{thick:.1f}"/>'


def _node(tree: Tree, place: _Places, node: int, decode: Decode | None, top: bool) -> str:
    x, y, width = place.x(node), place.y(node), place.node_width(node)
    kind = f"n {CLASSES[tree.status[node]]}" + " top" * top + " end" * bool(tree.finished[node])
    badge = place.ends.get(node, "")
    said = f'<text class="badge" x="{_px(x + width + 6)}" y="{_px(y + 4)}">{escape(badge)}</text>' if badge else ""
    title = escape(tell(tree, node, decode))
    return (
        f'<g class="{kind}" data-i="{node}" data-p="{tree.parent[node]}"><title>{title}</title>'
        f'<rect x="{_px(x)}" y="{_px(y - _NODE / 2)}" width="{_px(width)}" height="{_NODE}" rx="5"/>'
        f'<text class="label" x="{_px(x + _PAD)}" y="{_px(y + 4.2)}">{escape(place.labels[node])}</text>{said}</g>'
    )


def tell(tree: Tree, node: int, decode: Decode | None) -> str:
    """All that is known of a node, on a few lines."""
    token, step = int(tree.token[node]), float(tree.token_log_prob[node])
    name = f"token {token}" if decode is None else f"{token_label(token, decode)}   token {token}"
    ends = f", rank {tree.rank[node]}" if tree.rank[node] else ""
    return "\n".join(
        [
            name,
            f"step {tree.step[node] + 1}, slot {tree.slot[node]}: {Status(tree.status[node]).label}{ends}",
            f"token log-prob {typeset(step, 4)}, {100 * math.exp(min(step, 0.0)):.3g} %",
            f"log-prob {typeset(tree.log_prob[node], 4)}",
            f"score {typeset(tree.score[node], 4)}",
        ]
    )


_LEGEND = (("best top", "n-best"), ("best end", "n-best, finished"), ("finished end", "finished"), ("live", "live"),
           ("pruned", "pruned"), ("dead", "dead end"))  # fmt: skip


def _legend() -> Figure:
    x, parts = float(_MARGIN), []
    for kind, name in _LEGEND:
        width = columns(name) * _CHARACTER + 2 * _PAD
        parts.append(
            f'<g class="n {kind}"><rect x="{_px(x)}" y="14" width="{_px(width)}" height="{_NODE}" rx="5"/>'
            f'<text class="label" x="{_px(x + _PAD)}" y="27.7">{name}</text></g>'
        )
        x += width + 12
    note = f"thick lines: probable tokens; #1 {typeset(-1.23)}: rank and score"
    parts.append(f'<text class="note" x="{_px(x + 4)}" y="27.5">{note}</text>')
    return Figure("\n".join(parts), x + 4 + 6.2 * len(note) + _MARGIN, 48)


def _px(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
