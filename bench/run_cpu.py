"""The CPU speed table: select_beams and a whole step beside users' code and the floor.

    python bench/run_cpu.py [--threads 2] [--rounds 15] [--breakdown]
    python bench/run_cpu.py --cpu-clock       # on a busy machine: one thread, its processor time

Prints Markdown and writes bench/results/<machine>-<date>.json. Where implementations do not agree, nothing is timed.
"""

import argparse
import re
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from baselines import disagreement, floors, log_softmax_topk, logsumexp_topk
from flashbeam.kernels import select_beams
from harness import ROOT, Ratio, interleave, provenance, ratio, save, timing
from steps import operations, searching
from workload import DTYPES, SHAPES, Shape, make_inputs

DEFAULT_SHAPES = ("llama3-b8k8", "wide-b8k256")
# what each column of ratios is, slow over fast
RATIOS = {
    "log_softmax / ours": ("log_softmax_topk", "select_beams"),
    "logsumexp / ours": ("logsumexp_topk", "select_beams"),
    "floor with exp / ours": ("floor with exp", "select_beams"),
    "floor with exp2 / ours": ("floor with exp2", "select_beams"),
    "step / ours": ("step", "select_beams"),
}


class Target(NamedTuple):
    """A limit on a ratio."""

    limit: float
    at_least: bool = True

    def met(self, value: float) -> bool:
        return value >= self.limit if self.at_least else value <= self.limit


TARGETS = {
    "llama3-b8k8": {
        "log_softmax / ours": Target(3.0),
        "logsumexp / ours": Target(1.5),
        "floor with exp / ours": Target(0.8),
        "floor with exp2 / ours": Target(0.8),
        "step / ours": Target(1.15, at_least=False),
    },
    "wide-b8k256": {"log_softmax / ours": Target(2.0)},
}


def table(rows: list[list[str]]) -> str:
    """Markdown; the first row is the head."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def cell(found: Ratio, target: Target | None) -> str:
    """A ratio with its interval and whether it is what it has to be."""
    text = f"{found.value:.2f} [{found.low:.2f}, {found.high:.2f}]"
    return text if target is None else f"{text} {'ok' if target.met(found.value) else 'MISSED'}"


def fastest(cases: Mapping[str, Callable[[], Any]], rounds: int, clock: Callable[[], float]) -> str:
    """The name of the case whose best call is the fastest."""
    seconds = interleave(cases, rounds, warmup=1, clock=clock)
    return min(cases, key=lambda name: min(seconds[name]))


def refuse(name: str, problem: str | None) -> None:
    """Stop if there is a problem."""
    if problem is not None:
        raise SystemExit(f"{name} and select_beams do not agree, nothing is timed: {problem}")


def measure_shape(
    shape: Shape,
    dtype: torch.dtype,
    rounds: int,
    breakdown: bool = False,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Any]:
    """Check that all agree, then time them."""
    inputs = make_inputs(shape, dtype)
    search, state = searching(shape, inputs)
    k = shape.beams
    ours = select_beams(*inputs, k)[:3]
    for baseline in (log_softmax_topk, logsumexp_topk):
        refuse(baseline.__name__, disagreement(*inputs, ours, baseline(*inputs, 2 * k)))
    before = state.log_probs.clone()
    step = search.step(state, inputs.logits)
    stepped = state.log_probs, step.parents, step.tokens
    refuse("step", disagreement(inputs.logits, before, stepped, select_beams(inputs.logits, before, k + 1)[:3]))

    forms = floors(inputs.logits)
    # what a user would write, and what this machine can do: exp2 of prescaled logits is the same sum
    floor_forms = {
        f"floor with {base}": fastest(
            {name: form for name, form in forms.items() if name.startswith(f"{base}-")}, max(2, rounds // 4), clock
        )
        for base in ("exp", "exp2")
    }
    cases: dict[str, Callable[[], Any]] = {
        "select_beams": lambda: select_beams(*inputs, k),
        "step": lambda: search.step(state, inputs.logits),
        **{name: forms[form] for name, form in floor_forms.items()},
        "logsumexp_topk": lambda: logsumexp_topk(*inputs, 2 * k),
        "log_softmax_topk": lambda: log_softmax_topk(*inputs, 2 * k),
    }
    seconds = interleave(cases, rounds, clock=clock)
    found = {
        "floor_forms": floor_forms,
        "timings": {name: timing(each)._asdict() for name, each in seconds.items()},
        "ratios": {name: ratio(seconds[slow], seconds[fast])._asdict() for name, (slow, fast) in RATIOS.items()},
    }
    if breakdown:
        parts = operations(cases["step"])
        times = interleave({**parts, "step": cases["step"]}, rounds, clock=clock)
        found["breakdown"] = {name: timing(each)._asdict() for name, each in times.items()}
    return found


def machine_name(device: str, cores: int | None) -> str:
    return re.sub(r"[^a-z0-9]+", "-", f"{device} {cores}c".lower()).strip("-")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--cpu-clock", action="store_true", help="processor time of one thread: bearable where others use the machine"
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=DEFAULT_SHAPES, metavar="NAME")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES), metavar="NAME")
    parser.add_argument("--breakdown", action="store_true", help="also each operation of a step")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes: shows that it runs, times nothing of worth")
    parser.add_argument("--output", type=Path, help="JSON file; default bench/results/<machine>-<date>.json")
    args = parser.parse_args(argv)
    torch.set_num_threads(1 if args.cpu_clock else args.threads)
    clock = time.thread_time if args.cpu_clock else time.perf_counter

    document: dict[str, Any] = {
        "provenance": provenance(),
        "rounds": args.rounds,
        "clock": clock.__name__,
        "tiny": args.tiny,
    }
    document["results"] = []
    load = document["provenance"]["load_average"]
    if load and load[0] > 0.5 and not args.cpu_clock:
        print(f"the machine is busy (load average {load[0]}): do not trust these numbers", file=sys.stderr)
    for name in args.shapes:
        for dtype in args.dtypes:
            shape = SHAPES[name].tiny() if args.tiny else SHAPES[name]
            found = measure_shape(shape, DTYPES[dtype], args.rounds, args.breakdown, clock)
            document["results"].append({"shape": name, **shape._asdict(), "dtype": dtype, **found})
            print(f"{name} {dtype} done", file=sys.stderr)
    missed = report(document)
    machine = machine_name(document["provenance"]["device"], document["provenance"]["cores"])
    path = args.output or ROOT / "bench/results" / f"{machine}-{time.strftime('%Y-%m-%d')}.json"
    save(path, document)
    print(f"\nWritten to {path}.")
    return 1 if missed and not args.tiny else 0


def report(document: Mapping[str, Any]) -> int:
    """Print the tables; returns how many targets were missed."""
    facts = document["provenance"]
    commit = (facts["commit"] or "unknown")[:9] + (" modified" if facts["modified"] else "")
    print(
        f"{facts['device']}, {facts['cores']} cores, {facts['threads']} threads, {facts['simd']}; "
        f"torch {facts['torch']}; commit {commit}; {facts['date']}; load average {facts['load_average']}. "
        f"Medians of {document['rounds']} interleaved rounds, ms [quartiles], by {document['clock']}:\n"
    )
    names = ["select_beams", "step", "floor with exp", "floor with exp2", "logsumexp_topk", "log_softmax_topk"]
    times, ratios, missed = [["B, K, V", "dtype", *names]], [["B, K, V", "dtype", *RATIOS]], 0
    for result in document["results"]:
        head = [f"{result['batch']}, {result['beams']}, {result['vocab']}", result["dtype"]]
        quartiles = [[v / 1e3 for v in list(result["timings"][name].values())[:3]] for name in names]
        times.append([*head, *(f"{m:.2f} [{a:.2f}, {b:.2f}]" for m, a, b in quartiles)])
        targets = {} if document["tiny"] else TARGETS.get(result["shape"], {})
        found = {name: Ratio(**value) for name, value in result["ratios"].items()}
        ratios.append([*head, *(cell(found[name], targets.get(name)) for name in RATIOS)])
        missed += sum(not target.met(found[name].value) for name, target in targets.items())
    print(table(times), table(ratios), sep="\n\n")
    for result in document["results"]:
        if "breakdown" in result:
            parts = {name: f"{each['median_us'] / 1e3:.2f}" for name, each in result["breakdown"].items()}
            print(f"\n{result['shape']} {result['dtype']}, ms:\n")
            print(table([list(parts), list(parts.values())]))
    return missed


if __name__ == "__main__":
    sys.exit(main())
