"""What the demo prints: completions, the tree of a search, and what every width cost and gained."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from shutil import get_terminal_size
from typing import NamedTuple

import flashbeam as fb
from codelm import Tokenizer
from terminal import Style, cut, one_line, printable
from tree import Ending, Line, draw, grow

CODE_LINES = 12  # of the best completion
TREE_LINES = 24
NOISE = 1e-3  # the log-probability of the same tokens differs by less from batch to batch


class Completions(NamedTuple):
    """What a search returned for B prompts."""

    beam_size: int
    hypotheses: fb.Hypotheses
    steps: list[fb.Step]
    seconds: float

    @property
    def name(self) -> str:
        return "greedy" if self.beam_size == 1 else f"{self.beam_size} beams"

    def endings(self, request: int) -> list[Ending]:
        """The hypotheses of one prompt, best first."""
        hyps = self.hypotheses
        return [
            Ending(
                tokens=hyps.tokens[request, n, : hyps.lengths[request, n]].tolist(),
                log_prob=hyps.log_probs[request, n].item(),
                finished=bool(hyps.finished[request, n]),
            )
            for n in range(int(hyps.valid[request].sum()))
        ]


class Report:
    """Prints for people; ``found`` holds the same prompts completed with one width after another, greedy first."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.style = Style(sys.stdout)
        self.columns = min(max(get_terminal_size().columns, 60), 120)

    def rule(self, title: str) -> None:
        print(self.style.bold(title), self.style.dim("─" * (self.columns - len(title) - 1)))

    def note(self, text: str) -> None:
        print(self.style.dim(text))

    def completions(self, found: Sequence[Completions], request: int, prompt: str, num_hypotheses: int) -> None:
        """The likeliest completion of one prompt as code, then the n-best of every width on a line each."""
        endings = [completions.endings(request) for completions in found]
        likeliest = max((of_width[0] for of_width in endings), key=lambda ending: ending.log_prob)
        self._code(prompt, likeliest)
        self.note(f"\n  {'':10}log-prob    gain  tokens  completion")
        for completions, of_width in zip(found, endings, strict=True):
            for rank, ending in enumerate(of_width[:num_hypotheses]):
                gain = f"{ending.log_prob - endings[0][0].log_prob:+.2f}" if completions.beam_size > 1 else ""
                length = f"{len(ending.tokens)}{' ' if ending.finished else '+'}"
                head = f"  {'' if rank else completions.name:10}{ending.log_prob:8.2f}{gain:>8}{length:>8}  "
                text = cut(self._one_line(ending.tokens), self.columns - len(head))
                print(head + (self.style.green(text) if ending is likeliest else text))
        print()

    def _one_line(self, tokens: Sequence[int]) -> str:
        return one_line(self.tokenizer.decode(tokens))

    def _code(self, prompt: str, ending: Ending) -> None:
        *above, last = [printable(line) for line in prompt.split("\n")]
        text = self.tokenizer.decode(ending.tokens).rstrip("\n") + ("" if ending.finished else "…")
        first, *below = [printable(line) for line in text.split("\n")]
        width = self.columns - 4
        lines = [cut(line, width) for line in above]
        lines.append(last + self.style.dim("▸") + self.style.green(cut(first, max(width - len(last) - 1, 1))))
        lines += [self.style.green(cut(line, width)) for line in below]
        if len(lines) > CODE_LINES:
            lines[CODE_LINES - 1 :] = [f"… and {len(lines) - CODE_LINES + 1} more lines"]
        print("\n".join(f"    {line}" for line in lines))

    def tree(self, completions: Completions, request: int, prompt: str) -> None:
        """All that the search for one prompt tried."""
        history = [
            (step.tokens[request].tolist(), step.parents[request].tolist(), step.valid[request].tolist())
            for step in completions.steps
        ]
        lines = list(draw(grow(history, completions.endings(request)), self._one_line))
        self.note("  rank  log-prob")
        print(f"{'':18}{cut(one_line(prompt), self.columns - 18)}")
        for line in lines[:TREE_LINES]:
            self._branch(line)
        if len(lines) > TREE_LINES:
            self.note(f"{'':18}… and {len(lines) - TREE_LINES} more lines")
        self.note("  EOS: a hypothesis ends; …: still in the beam at the end; pruned: left it\n")

    def _branch(self, line: Line) -> None:
        head, end = "", ""
        if line.ending:
            head = f"{line.rank:6}{line.ending.log_prob:10.2f}"
            end = "…" if not line.ending.finished else " EOS" if line.text else "EOS"
        elif line.pruned:
            head = f"{f'{line.pruned} pruned':>16}"
        elif line.live:
            end = "…"
        text = cut(line.text.lstrip(" ") or "·" * len(line.text), self.columns - 18 - len(line.branch + end))
        if line.pruned:
            self.note(f"{head:18}{line.branch}{text}")
        else:
            shown = self.style.green(text) if line.rank == 1 else text
            print(f"{head:18}{self.style.dim(line.branch)}{shown}{self.style.bold(end)}")

    def summary(self, found: Sequence[Completions]) -> None:
        """What every width cost, and what it gained over greedy search."""
        greedy = found[0].hypotheses.log_probs[:, 0]
        self.note(f"  {'':10} rows  steps   steps/s  mean log-prob  likelier than greedy")
        for completions in found:
            log_probs = completions.hypotheses.log_probs[:, 0]
            gains = log_probs - greedy
            steps, rows = len(completions.steps), completions.beam_size * len(gains)
            line = (
                f"  {completions.name:10}{rows:5}{steps:7}{steps / completions.seconds:10.1f}{log_probs.mean():15.2f}"
            )
            if completions.beam_size > 1:
                line += f"  {int((gains > NOISE).sum())} of {len(gains)}, mean gain {gains.mean():.2f}"
            print(line)
        self.note("  a step: the model on all rows, the search itself, reordering the cache")
        self.note("  Ranking by log-probability favours short completions; a length_penalty above 0")
        self.note("  divides it by a power of the length and so favours longer ones.")
