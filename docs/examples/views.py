"""The demo's views besides beams of several widths: ``--stochastic``, ``--diverse``, ``--lattice`` and others."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from itertools import zip_longest

from torch import Tensor

import flashbeam as fb
from choose import COUNT, choose_all, distinct_bigrams, expected_lengths, sequences
from codelm import CodeLM, Tokenizer
from explore import BEAMS, explore
from names import Name, any_identifier, complete_names, find_cursors, real_names
from report import Report
from terminal import cut, one_line

RUNS = 4  # independent samples of each prompt, which tell how much an estimate varies
SHARP = 0.1  # temperature; at 1 there are so many completions that plain samples do not repeat either
MILD = 0.5  # temperature
TOP_P = 0.9
GROUPS, STRENGTH, RATE = 4, 0.5, 0.5


class Views:
    """Completes the same prompts in other ways, and prints ``num`` of the ``COUNT`` completions of each."""

    def __init__(
        self, model: CodeLM, tokenizer: Tokenizer, max_length: int, num: int, seed: int, file: str = "lattice.html"
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.report = Report(tokenizer)
        self.max_length = max_length
        self.num = num
        self.seed = seed
        self.file = file

    def show(self, view: str, prompts: Sequence[str], encoded: list[list[int]]) -> None:
        """Print the view of that name; ``encoded`` are the prompts' tokens."""
        views = {
            "stochastic": self._stochastic,
            "diverse": self._diverse,
            "sample": self._sample,
            "trie": self._trie,
            "lattice": self._lattice,
        }
        views[view](prompts, encoded)

    def _stochastic(self, prompts: Sequence[str], encoded: list[list[int]]) -> None:
        rules = {"stochastic": fb.Stochastic(self.seed), "plain": fb.Sample(self.seed)}
        # requests draw independently: the first of each prompt is shown
        found = choose_all(self.model, encoded * RUNS, rules, self.max_length, SHARP)
        drawn, plain = found.values()
        estimates = [expected_lengths(hyps).view(RUNS, len(prompts)) for hyps in (drawn, plain)]
        self._title(
            f"a sample without replacement: fb.Stochastic({self.seed}), temperature {SHARP}",
            f"perturbed: log-prob with Gumbel noise, of which these are the {COUNT} greatest",
            "weight: of a completion in an estimate; the last, 0, sets the threshold",
        )
        for request, prompt in enumerate(prompts):
            self._prompt(f"Prompt {request + 1} of {len(prompts)}", prompt, "perturbed", "log-prob", "weight")
            self._completions(drawn, request, drawn.scores, drawn.log_probs, fb.weights(drawn))
            distinct = len(set(sequences(plain, request)))
            print(f"  Expected length: {estimates[0][0, request]:.1f} tokens, estimated from these {COUNT};")
            print(f"  {estimates[1][0, request]:.1f} from {COUNT} plain samples, {distinct} of them distinct\n")
        self.report.rule("What an estimate is worth")
        spread = [estimate.var(0).mean().sqrt().item() for estimate in estimates]  # within each prompt
        print(f"  The expected length estimated from {COUNT} completions has a standard deviation of")
        print(
            f"  {spread[0]:.1f} tokens with fb.Stochastic, {spread[1]:.1f} with fb.Sample ({RUNS} runs of each prompt)."
        )

    def _diverse(self, prompts: Sequence[str], encoded: list[list[int]]) -> None:
        rules = {
            f"{COUNT} beams": fb.TopK(),
            f"{GROUPS} groups": fb.DiverseGroups(GROUPS, STRENGTH),
            "siblings": fb.DiverseSiblings(RATE),
        }
        found = choose_all(self.model, encoded, rules, self.max_length)
        self._title(
            f"{COUNT} beams beside fb.DiverseGroups({GROUPS}, {STRENGTH}) and fb.DiverseSiblings({RATE})",
            "2-grams: pairs of neighbouring tokens; the more are distinct, the more diverse",
            "order: by score, the log-prob less what was paid for being like others",
        )
        counts: dict[str, list[tuple[int, int]]] = {name: [] for name in rules}
        for request, prompt in enumerate(prompts):
            self._prompt(f"Prompt {request + 1} of {len(prompts)}", prompt, "log-prob")
            for name, hyps in found.items():
                distinct, pairs = distinct_bigrams(sequences(hyps, request))
                counts[name].append((distinct, pairs))
                mean = hyps.log_probs[request][hyps.valid[request]].mean()
                print(f"  {name}: {distinct} distinct 2-grams of {pairs}, mean log-prob {mean:.2f}")
                self._completions(hyps, request, hyps.log_probs)
            print()
        self.report.rule("What diversity costs")
        self.report.note(f"  {'':10}distinct 2-grams  of all  mean log-prob  best log-prob")
        for name, hyps in found.items():
            distinct, pairs = map(sum, zip(*counts[name], strict=True))
            mean, best = hyps.log_probs[hyps.valid].mean(), hyps.log_probs.max(1).values.mean()
            print(f"  {name:10}{distinct:16}{pairs:8}{mean:15.2f}{best:15.2f}")

    def _sample(self, prompts: Sequence[str], encoded: list[list[int]]) -> None:
        rules = {f"top-p {TOP_P}": fb.Sample(self.seed, top_p=TOP_P), "arithmetic": fb.Arithmetic(self.seed)}
        found = choose_all(self.model, encoded, rules, self.max_length, MILD)
        distinct = {name: [len(set(sequences(hyps, i))) for i in range(len(prompts))] for name, hyps in found.items()}
        self._title(
            f"fb.Sample({self.seed}, top_p={TOP_P}) beside fb.Arithmetic({self.seed}), temperature {MILD}",
            "as drawn: the log-prob after the filter, of what was drawn from",
        )
        for request, prompt in enumerate(prompts):
            self._prompt(f"Prompt {request + 1} of {len(prompts)}", prompt, "log-prob", "as drawn")
            for name, hyps in found.items():
                print(f"  {name}: {distinct[name][request]} of {COUNT} distinct")
                self._completions(hyps, request, hyps.log_probs, hyps.sampling_log_probs)
            print()
        self.report.rule("All prompts")
        self.report.note(f"  {'':10}  distinct of {COUNT}  mean log-prob  as drawn")
        for name, hyps in found.items():
            mean = sum(distinct[name]) / len(prompts)
            print(f"  {name:10}{mean:15.1f}{hyps.log_probs.mean():15.2f}{hyps.sampling_log_probs.mean():10.2f}")

    def _trie(self, prompts: Sequence[str], encoded: list[list[int]]) -> None:
        cursors = find_cursors(prompts)
        found = {}
        for way, make in {"any identifier": any_identifier, "real names": real_names}.items():
            constraints = [make(cursor, self.tokenizer) for cursor in cursors]
            found[way] = complete_names(self.model, self.tokenizer, cursors, constraints, self.max_length)
        self._title(
            f"{COUNT} beams with fb.Automaton.from_regex beside {COUNT} with fb.Trie",
            "log-prob: of a name and its end, whatever follows; ✗ there is no such name here",
        )
        width = self.report.columns // 2 - 15
        for request, (prompt, cursor) in enumerate(zip(prompts, cursors, strict=True)):
            titles = "any identifier", cut(f"{len(cursor.names)} {cursor.place}", width)
            head = "".join(f"   log-prob    {title:{width}}" for title in titles).rstrip()
            self._prompt(f"Prompt {request + 1} of {len(prompts)}", prompt, head=head)
            columns = [[self._name(each, width) for each in of_way[request][: self.num]] for of_way in found.values()]
            for cells in zip_longest(*columns, fillvalue=" " * (15 + width)):
                print("".join(cells).rstrip())
            print()
        self.report.rule("All prompts")
        self.report.note(f"  {'':14}  found  real  probability of the real ones, mean")
        for way, of_way in found.items():
            real = [each for of_prompt in of_way for each in of_prompt if each.real]
            probability = sum(math.exp(each.log_prob) for each in real) / len(prompts)
            print(f"  {way:14}{sum(map(len, of_way)):7}{len(real):6}{probability:13.3f}")

    def _lattice(self, prompts: Sequence[str], encoded: list[list[int]]) -> None:
        lattice = explore(self.model, encoded, self.max_length, min(self.num, BEAMS))
        self.report.note(f"all that {BEAMS} beams tried: fb.lattice(state)")
        self.report.note("■ finished; … still in the beam at the end; on one line: what was pruned")
        self.report.note("▸ completions begin; ↵ new line\n")
        for request, (prompt, tree) in enumerate(zip(prompts, lattice, strict=True)):
            self.report.rule(f"Prompt {request + 1} of {len(prompts)}")
            print(f"  {cut(one_line(prompt), self.report.columns - 3)}{self.report.style.dim('▸')}")
            print(fb.Lattice((tree,)).text(self.tokenizer.decode, width=self.report.columns))
        lattice.save(self.file, self.tokenizer.decode)
        self.report.rule("A page for a browser")
        print(f"  {os.path.abspath(self.file)}")
        self.report.note("  Rest on a token, or on a hypothesis, to follow it; bars are entropies.")

    def _name(self, name: Name, width: int) -> str:
        """A name in ``15 + width`` columns."""
        text = f"{'' if name.real else '✗':2}{cut(name.text, width - 2)}"
        return f"{name.log_prob:11.2f}  {text:{width + 2}}"

    def _title(self, *lines: str) -> None:
        for line in lines:
            self.report.note(line)
        self.report.note(f"▸ completions begin; ↵ new line, a blank per level; + no end in {self.max_length} tokens\n")

    def _prompt(self, title: str, prompt: str, *columns: str, head: str = "  tokens  completion") -> None:
        self.report.rule(title)
        print(f"  {cut(one_line(prompt), self.report.columns - 3)}{self.report.style.dim('▸')}")
        self.report.note(f"\n{''.join(f'{name:>11}' for name in columns)}{head}")

    def _completions(self, hyps: fb.Hypotheses, request: int, *columns: Tensor) -> None:
        """A line for each completion: its numbers, then its text."""
        for n, tokens in enumerate(sequences(hyps, request)[: self.num]):
            length = f"{len(tokens)}{' ' if hyps.finished[request, n] else '+'}"
            numbers = "".join(f"{column[request, n]:11.2f}" for column in columns)
            head = f"{numbers}{length:>8}  "
            print(head + cut(one_line(self.tokenizer.decode(tokens)), self.report.columns - len(head)))
