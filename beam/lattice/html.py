"""The trees of a search as a page for a browser: one file that needs no other."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import numpy as np

from .labels import Decode, cut, line_of, typeset, visible
from .svg import STYLE, Figure, figure
from .text import summary
from .tree import Tree

_PAGE = """
:root { color-scheme: light dark; --ink: #1b2733; --note: #66727f; --line: #d9dfe5; --paper: #ffffff; --tint: #eef5fd }
@media (prefers-color-scheme: dark) {
:root { --ink: #dde4ea; --note: #93a0ac; --line: #2c353e; --paper: #14191f; --tint: #17283c }
}
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 14px/1.5 system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif }
main { padding: 20px 24px 64px }
h1 { font-size: 19px; margin: 0 0 4px }
h2 { font-size: 15px; margin: 32px 0 8px }
p { margin: 0 0 12px; color: var(--note); max-width: 72em }
code, td.text, output { font: 12.5px/1.5 ui-monospace, 'SF Mono', Menlo, Consolas, 'DejaVu Sans Mono', monospace }
.scroll { overflow: auto; max-height: 64vh; border: 1px solid var(--line); border-radius: 8px }
.scroll.list { max-height: 30vh; border: 0; margin-top: 10px }
svg { display: block }
table { border-collapse: collapse; margin: 0 0 12px; font-size: 13px }
th { font-weight: 500; font-size: 12px; color: var(--note); text-align: right; padding: 2px 14px 2px 0 }
td { text-align: right; padding: 2px 14px 2px 0; font-variant-numeric: tabular-nums; border-top: 1px solid var(--line) }
th.text, td.text { text-align: left; white-space: pre-wrap; overflow-wrap: anywhere }
tr[data-i]:hover { background: var(--tint) }
output:empty { display: none }
output { position: fixed; left: 0; right: 0; bottom: 0; min-height: 1.5em; padding: 7px 24px; white-space: pre-wrap;
  background: var(--paper); border-top: 1px solid var(--line) }
.dim .e, .dim .n { opacity: .22 }
.dim .on { opacity: 1 }
"""

# no "less than" and no ampersand: the page is XML as well as HTML
_SCRIPT = """
for (const picture of document.querySelectorAll('section')) {
  const nodes = new Map(), edges = new Map(), said = document.querySelector('output');
  for (const node of picture.querySelectorAll('.n[data-i]')) nodes.set(node.dataset.i, node);
  for (const edge of picture.querySelectorAll('.e')) edges.set(edge.dataset.i, edge);
  const svg = picture.querySelector('svg');
  const off = () => {
    svg.classList.remove('dim');
    for (const each of svg.querySelectorAll('.on')) each.classList.remove('on');
    said.textContent = '';
  };
  const on = (end) => {
    off();
    svg.classList.add('dim');
    const text = [];
    for (let i = end; nodes.has(i); i = nodes.get(i).dataset.p) {
      nodes.get(i).classList.add('on');
      edges.get(i).classList.add('on');
      text.unshift(nodes.get(i).querySelector('.label').textContent);
    }
    const facts = nodes.get(end).querySelector('title').textContent.split('\\n').slice(1);
    said.textContent = text.join(' ') + '\\n' + facts.join('   ');
  };
  for (const each of picture.querySelectorAll('[data-i]')) {
    each.addEventListener('mouseenter', () => on(each.dataset.i));
    each.addEventListener('mouseleave', off);
  }
}
"""


def draw(trees: Sequence[Tree], decode: Decode | None, title: str) -> str:
    """The page."""
    shown = escape(visible(title))
    body = "\n".join(_section(tree, decode) for tree in trees)
    return (
        '<!DOCTYPE html>\n<html lang="en" xmlns="http://www.w3.org/1999/xhtml">\n<head>\n<meta charset="utf-8"/>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>\n'
        f"<title>{shown}</title>\n<style>{STYLE}{_PAGE}</style>\n</head>\n<body>\n<main>\n<h1>{shown}</h1>\n"
        "<p>A column is a step, a line a token: the thicker, the more probable. The n-best are blue; what has finished "
        "is filled. Green has finished, but is not among them; amber was still in the beam; grey was pruned; red is "
        "a dead end, where nothing may follow. Rest on a token, or on a hypothesis, to follow it.</p>\n"
        f"{body}\n</main>\n<output></output>\n<script>{_SCRIPT}</script>\n</body>\n</html>\n"
    )


def _section(tree: Tree, decode: Decode | None) -> str:
    title, n_best, picture = escape(summary(tree)), _n_best(tree, decode), _picture(figure(tree, decode))
    return (
        f'<section>\n<h2>{title}</h2>\n<div class="scroll">{picture}</div>\n'
        f'<div class="scroll list">{n_best}</div>\n</section>'
    )


def _picture(drawn: Figure) -> str:
    size = f'width="{drawn.width:.0f}" height="{drawn.height:.0f}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">\n{drawn.elements}\n</svg>'


def _n_best(tree: Tree, decode: Decode | None) -> str:
    """The hypotheses as a table, best first."""
    rows = []
    for node in sorted(np.flatnonzero(tree.rank).tolist(), key=lambda node: int(tree.rank[node])):
        path = tree.path(node)
        text = cut(line_of(path.tokens, decode), 400)
        cells = (path.rank, typeset(path.score, 4), typeset(path.log_prob, 4), len(path.tokens))
        numbers = "".join(f"<td>{cell}</td>" for cell in cells)
        end = "" if path.finished else " …"
        rows.append(f'<tr data-i="{node}">{numbers}<td class="text">{escape(text)}{end}</td></tr>')
    if not rows:
        return "<p>There is no hypothesis yet.</p>"
    names = "".join(f"<th>{name}</th>" for name in ("rank", "score", "log-prob", "tokens"))
    body = "\n".join(rows)
    return f'<table>\n<tr>{names}<th class="text">hypothesis</th></tr>\n{body}\n</table>'
