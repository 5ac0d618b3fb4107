"""What constraints cost: a step with each beside a step without, and a trie beside the usual masked step.

    python bench/run_constraints.py [--threads 2] [--rounds 21] [--build]

Prints Markdown and writes bench/results/<machine>-constraints-<date>.json. ``--build`` also builds a trie of ten
million items, which takes some seconds and some hundred megabytes.
"""

import argparse
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import flashbeam as fb
from baselines import masked_topk
from harness import ROOT, Ratio, interleave, provenance, ratio, save, timing
from run_cpu import Target, cell, machine_name, table
from workload import SHAPES, Shape, make_inputs

EOS = 2
TRIE = Shape(8, 64, 32_000)
LEVELS = 4  # tokens of an item
ITEMS = (10_000, 100_000, 1_000_000)
PLAIN = SHAPES["llama3-b8k8"]
STEPS = 512  # tokens said before NoRepeatNgram is timed: nearly so many
USUAL = "masked_fill + log_softmax + topk"
# limits: the usual step in terms of a trie's, a million items in terms of ten thousand, a step in terms of a plain one
TARGETS = {
    "vocab": Target(3.0),
    "allowed": Target(10.0),
    "flat": Target(1.3, at_least=False),
    "Phrases, 4": Target(2.0, at_least=False),
    "Phrases, 10 to 1": Target(1.3, at_least=False),
    "NoRepeatNgram(3)": Target(1.2, at_least=False),
}


def items(count: int, vocab: int, seed: int = 0) -> np.ndarray:
    """Distinct random items ``[count, 4]`` without EOS."""
    rng = np.random.default_rng(seed)
    return rng.integers(EOS + 1, vocab, (count, LEVELS), dtype=np.int32)


class Repeated:
    """A step that can be taken again: each call takes it from a fresh copy of the state."""

    def __init__(self, search: fb.BeamSearch, state: fb.State, logits: Tensor, calls: int):
        self.search, self.logits = search, logits
        self.copies = [state.clone() for _ in range(calls)]

    def __call__(self) -> fb.Step:
        return self.search.step(self.copies.pop(), self.logits)


def trie_steps(trie: fb.Trie, normalize: str, shape: Shape, logits: Tensor, calls: int) -> list[Repeated]:
    """A step at each depth, the root's first, with every beam live."""
    search = fb.BeamSearch(shape.beams, LEVELS + 1, EOS, constraint=trie, normalize=normalize, stopping=fb.Exhausted())
    state = search.init(shape.batch)
    steps = []
    for depth in range(LEVELS):
        rows = logits[:, 0].contiguous() if depth == 0 else logits
        steps.append(Repeated(search, state, rows, calls))
        search.step(state, rows)
        assert depth > 0 or bool(state.slots.active.all()), "not every beam is live"
    return steps


def measure_tries(rounds: int, tiny: bool) -> dict[str, Any]:
    """Time tries of every size at every depth; ratios are of sums over the depths below the root."""
    shape = Shape(2, 8, 3001) if tiny else TRIE
    inputs = make_inputs(shape, torch.float32)
    calls = rounds + 2
    cases: dict[str, Callable[[], Any]] = {}
    for count in ITEMS:
        trie = fb.Trie(items(count // 100 if tiny else count, shape.vocab))
        for normalize in ("vocab", "allowed"):
            for depth, step in enumerate(trie_steps(trie, normalize, shape, inputs.logits, calls)):
                cases[f"{normalize}, {count}, depth {depth}"] = step
    barred = torch.rand(inputs.logits.shape) < 0.999
    barred[..., EOS + 1] = False
    cases[USUAL] = lambda: masked_topk(inputs.logits, inputs.log_probs, barred, shape.beams)
    with torch.inference_mode():
        seconds = interleave(cases, rounds)

    def below(normalize: str, count: int) -> list[float]:
        """Seconds of each round, averaged over the depths below the root."""
        depths = [seconds[f"{normalize}, {count}, depth {depth}"] for depth in range(1, LEVELS)]
        return [statistics.fmean(each) for each in zip(*depths, strict=True)]

    ratios = {}
    for normalize in ("vocab", "allowed"):
        for count in ITEMS:
            ratios[f"{USUAL} / {normalize}, {count} items"] = ratio(seconds[USUAL], below(normalize, count))
        ratios[f"{normalize}, {ITEMS[-1]} / {ITEMS[0]} items"] = ratio(
            below(normalize, ITEMS[-1]), below(normalize, ITEMS[0])
        )
    return {
        "shape": shape._asdict(),
        "timings": {name: timing(each)._asdict() for name, each in seconds.items()},
        "ratios": {name: found._asdict() for name, found in ratios.items()},
    }


def constraints(vocab: int) -> dict[str, Any]:
    """What a plain step is compared with; all leave every beam live."""
    rng = np.random.default_rng(0)
    draw = lambda *size: rng.integers(EOS + 1, vocab, size).tolist()  # noqa: E731
    found: dict[str, Any] = {f"Phrases, {n}": fb.Phrases(draw(n, 3)) for n in (1, 4, 10)}
    return found | {
        "Phrases, 4, ordered": fb.Phrases(draw(4, 3), ordered=True),
        "ForbiddenPhrases, 1000": fb.ForbiddenPhrases(draw(1000, 3)),
        "NoRepeatNgram(3)": fb.NoRepeatNgram(3),
        "RepetitionPenalty(1.2)": fb.RepetitionPenalty(1.2),
        "SuffixVeto, 100000 tokens": fb.SuffixVeto(draw(100_000), 8),
        "Prefix, past its end": fb.Prefix(draw(4)),
    }


def measure_plain(rounds: int, tiny: bool) -> dict[str, Any]:
    """Time a step of each constraint, late in a search, and of none."""
    shape = PLAIN.tiny() if tiny else PLAIN
    steps = 20 if tiny else STEPS
    logits = make_inputs(shape, torch.float32).logits
    logits[..., EOS] = -30.0
    cases: dict[str, Callable[[], Any]] = {}
    for name, constraint in {"none": None, **constraints(shape.vocab)}.items():
        search = fb.BeamSearch(shape.beams, STEPS, EOS, constraint=constraint, stopping=fb.Exhausted())
        state = search.init(shape.batch)
        search.step(state, logits[:, 0].contiguous())
        # only what looks back needs to have a past; a lookahead has more to do while phrases are unmet
        for number in range(1, steps - 12 if name in ("none", "NoRepeatNgram(3)", "RepetitionPenalty(1.2)") else 8):
            search.step(state, logits.roll(number, 0))
        assert bool(state.slots.active.all()), name
        cases[name] = Repeated(search, state, logits, rounds + 2)
    with torch.inference_mode():
        seconds = interleave(cases, rounds)
    ratios = {name: ratio(each, seconds["none"]) for name, each in seconds.items() if name != "none"}
    ratios["Phrases, 10 to 1"] = ratio(seconds["Phrases, 10"], seconds["Phrases, 1"])
    return {
        "shape": shape._asdict(),
        "timings": {name: timing(each)._asdict() for name, each in seconds.items()},
        "ratios": {name: found._asdict() for name, found in ratios.items()},
    }


def build(count: int, vocab: int) -> None:
    """Build a trie and print seconds, its bytes, and the most memory in use, in bytes, before and at the end."""
    rows = items(count, vocab)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    trie = fb.Trie(rows)
    seconds = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(seconds, trie.nbytes, before * 1024, after * 1024)


def measure_build(count: int, vocab: int = 8192) -> dict[str, Any]:
    """:func:`build` in a process of its own."""
    found = subprocess.run(
        [sys.executable, __file__, "--build-only", str(count), str(vocab)], capture_output=True, text=True, check=True
    )
    seconds, nbytes, before, after = found.stdout.split()
    return {
        "items": count,
        "vocab": vocab,
        "seconds": float(seconds),
        "bytes": int(nbytes),
        "items_bytes": count * LEVELS * 4,
        "peak_bytes_before": int(before),
        "peak_bytes": int(after),
    }


def target_of(name: str) -> Target | None:
    """The limit on a ratio."""
    for key in ("vocab", "allowed"):
        if name.startswith(f"{USUAL} / {key}"):
            return TARGETS[key]
    return TARGETS["flat"] if name.endswith(f"/ {ITEMS[0]} items") else TARGETS.get(name)


def report(document: dict[str, Any]) -> int:
    """Print the tables; returns how many targets were missed."""
    facts, missed = document["provenance"], 0
    print(
        f"{facts['device']}, {facts['cores']} cores, {facts['threads']} threads; torch {facts['torch']}; commit "
        f"{facts['commit'][:9] if facts['commit'] else 'unknown'}{' modified' if facts['modified'] else ''}; "
        f"{facts['date']}; load average {facts['load_average']}. float32, one step; medians of "
        f"{document['rounds']} interleaved rounds.\n"
    )
    for name, result in document["results"].items():
        print(f"{name}: B, K, V = {', '.join(map(str, result['shape'].values()))}\n")
        rows = [["case", "ms"]]
        rows += [[case, f"{each['median_us'] / 1e3:.2f}"] for case, each in result["timings"].items()]
        print(table(rows), end="\n\n")
        rows = [["ratio", "[95 %]"]]
        for case, value in result["ratios"].items():
            found, target = Ratio(**value), None if document["tiny"] else target_of(case)
            missed += target is not None and not target.met(found.value)
            rows.append([case, cell(found, target)])
        print(table(rows), end="\n\n")
    if "build" in document:
        print(document["build"])
    return missed


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--build", action="store_true", help="also build a trie of ten million items")
    parser.add_argument("--build-only", type=int, nargs=2, metavar=("ITEMS", "VOCAB"), help=argparse.SUPPRESS)
    parser.add_argument("--tiny", action="store_true", help="small shapes: shows that it runs")
    parser.add_argument(
        "--output", type=Path, help="JSON file; default bench/results/<machine>-constraints-<date>.json"
    )
    args = parser.parse_args(argv)
    if args.build_only:
        build(*args.build_only)
        return 0
    torch.set_num_threads(args.threads)
    document: dict[str, Any] = {"provenance": provenance(), "rounds": args.rounds, "tiny": args.tiny}
    document["results"] = {
        "tries": measure_tries(args.rounds, args.tiny),
        "others": measure_plain(args.rounds, args.tiny),
    }
    if args.build:
        document["build"] = measure_build(100_000 if args.tiny else 10_000_000)
    missed = report(document)
    machine = machine_name(document["provenance"]["device"], document["provenance"]["cores"])
    path = args.output or ROOT / "bench/results" / f"{machine}-constraints-{time.strftime('%Y-%m-%d')}.json"
    save(path, document)
    print(f"\nWritten to {path}.")
    return 1 if missed and not args.tiny else 0


if __name__ == "__main__":
    sys.exit(main())
