"""What choosing costs: a step of each rule beside a step of TopK and the usual implementation of stochastic beams.

    python bench/run_choosing.py [--threads 2] [--rounds 31]

Prints Markdown and writes bench/results/<machine>-choosing-<date>.json. Two sets of logits: random ones of a large
vocabulary, and those of the demo's language model in the middle of a search.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import flashbeam as fb
from baselines import gumbel_topk
from harness import ROOT, Ratio, interleave, provenance, ratio, save, timing
from run_cpu import Target, cell, machine_name, table
from workload import SHAPES, make_inputs

sys.path.append(str(ROOT / "docs/examples"))

STEPS = 2048  # far more than are timed: no request reaches its max_length
RULES: dict[str, Any] = {
    "TopK": fb.TopK(),
    "Stochastic": fb.Stochastic(1),
    "ConditionalPoisson": fb.ConditionalPoisson(1),
    "Arithmetic": fb.Arithmetic(1),
    "Sample": fb.Sample(1),
    "Sample, top_p 0.9": fb.Sample(1, top_p=0.9),
    "DiverseGroups(4)": fb.DiverseGroups(4, 0.5),
    "DiverseSiblings": fb.DiverseSiblings(0.1),
    "DynamicWidth": fb.DynamicWidth(0.9999),
}
USUAL = "noise for every logit"
# limits on what a rule's step takes in terms of TopK's, and the usual implementation in terms of Stochastic's step
TARGETS = {
    "random": {
        "Stochastic": Target(1.5, at_least=False),
        "DiverseGroups(4)": Target(1.5, at_least=False),
        USUAL: Target(5.0),
    },
    "demo": {"ConditionalPoisson": Target(3.0, at_least=False)},
}


def searching(rule: Any, first: Tensor, logits: Tensor) -> Callable[[], Any]:
    """A step that can be repeated: every slot is live, and nothing ends."""
    batch, beams = logits.shape[0] // 8, 8
    search = fb.BeamSearch(beams, max_length=STEPS, eos_id=None, selection=rule)
    state = search.init(batch)
    search.step(state, first)
    search.step(state, logits)
    # slots that rules without replacement or of varying width leave empty would make a step cheaper
    return lambda: search.step(state, logits)


def demo_logits(prompts: int = 8, steps: int = 6) -> tuple[Tensor, Tensor]:
    """Logits ``[B, V]`` of the demo's model after held-out prompts, and ``[B * 8, V]`` some steps into a search."""
    from codelm import load

    model, tokenizer = load()
    texts = json.loads((ROOT / "docs/examples/held_out_prompts.json").read_text())[:prompts]
    first, cache = model.prefill([tokenizer.encode(text) for text in texts])
    search = fb.BeamSearch(8, max_length=steps + 1, eos_id=None)
    state, logits = search.init(len(texts)), first
    for _ in range(steps):
        step = search.step(state, logits)
        cache = fb.reorder(cache, step.source_rows)
        logits, cache = model(step.tokens.flatten(), cache)
    return first, logits


def random_logits(tiny: bool) -> tuple[Tensor, Tensor]:
    """The same of random logits of a large vocabulary."""
    shape = SHAPES["llama3-b8k8"]._replace(vocab=3001 if tiny else SHAPES["llama3-b8k8"].vocab)
    logits = make_inputs(shape, torch.float32).logits
    return logits[:, 0].contiguous(), logits.flatten(0, 1)


def measure(first: Tensor, logits: Tensor, rounds: int, usual: bool) -> dict[str, Any]:
    """Time a step of every rule; ratios are to TopK's, of the usual implementation to Stochastic's."""
    cases = {name: searching(rule, first, logits) for name, rule in RULES.items()}
    if usual:
        rows = logits.view(first.shape[0], -1, logits.shape[1])
        log_probs = torch.full(rows.shape[:2], -2.0)
        perturbed = torch.rand(rows.shape[:2]).sub_(3.0)
        cases[USUAL] = lambda: gumbel_topk(rows, log_probs, perturbed, rows.shape[1])
    with torch.inference_mode():  # as decode loops run
        seconds = interleave(cases, rounds)
    base = {name: "Stochastic" if name == USUAL else "TopK" for name in cases}
    return {
        "vocab": logits.shape[1],
        "timings": {name: timing(each)._asdict() for name, each in seconds.items()},
        "ratios": {name: ratio(seconds[name], seconds[base[name]])._asdict() for name in cases},
    }


def report(document: dict[str, Any]) -> int:
    """Print the tables; returns how many targets were missed."""
    facts, missed = document["provenance"], 0
    print(
        f"{facts['device']}, {facts['cores']} cores, {facts['threads']} threads; torch {facts['torch']}; commit "
        f"{facts['commit'][:9] if facts['commit'] else 'unknown'}{' modified' if facts['modified'] else ''}; "
        f"{facts['date']}; load average {facts['load_average']}. B = K = 8, float32, one step; medians of "
        f"{document['rounds']} interleaved rounds.\n"
    )
    for name, result in document["results"].items():
        targets = {} if document["tiny"] else TARGETS[name]
        rows = [[f"{name} logits, V = {result['vocab']}", "ms", "ratio [95 %]"]]
        for case, value in result["ratios"].items():
            found = Ratio(**value)
            missed += case in targets and not targets[case].met(found.value)
            note = cell(found, targets.get(case)) + (" to Stochastic" if case == USUAL else "")
            rows.append([case, f"{result['timings'][case]['median_us'] / 1e3:.2f}", note])
        print(table(rows), end="\n\n")
    return missed


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--tiny", action="store_true", help="a small vocabulary: shows that it runs")
    parser.add_argument("--output", type=Path, help="JSON file; default bench/results/<machine>-choosing-<date>.json")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    document: dict[str, Any] = {"provenance": provenance(), "rounds": args.rounds, "tiny": args.tiny}
    document["results"] = {
        "random": measure(*random_logits(args.tiny), args.rounds, usual=True),
        "demo": measure(*demo_logits(2 if args.tiny else 8), args.rounds, usual=False),
    }
    missed = report(document)
    machine = machine_name(document["provenance"]["device"], document["provenance"]["cores"])
    path = args.output or ROOT / "bench/results" / f"{machine}-choosing-{time.strftime('%Y-%m-%d')}.json"
    save(path, document)
    print(f"Written to {path}.")
    return 1 if missed and not args.tiny else 0


if __name__ == "__main__":
    sys.exit(main())
