"""Retrieving items of a catalogue beside Hugging Face's `generate`: the same model, items, cache and results.

    python bench/run_peers.py [--threads 2] [--rounds 11] [--cpu-clock]

Prints Markdown and writes bench/results/<machine>-peers-<date>.json. The model is tiny, so that what is timed is the
search.
"""

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

import flashbeam as fb
from beside import Beside
from harness import ROOT, Ratio, interleave, ratio, timing
from run_cpu import cell, machine_name, table

sys.path.append(str(ROOT / "tests"))

from peers import by_flashbeam, by_generate, forwards_alone, model, random_items, trie_as_dict


class Shape(NamedTuple):
    batch: int
    beams: int
    vocab: int
    items: int


SHAPES = [
    Shape(4, 8, 32_000, 20_000),
    Shape(4, 64, 32_000, 20_000),
    Shape(1, 256, 32_000, 20_000),
    Shape(4, 16, 128_000, 20_000),
]
TINY = [Shape(2, 3, 300, 100)]
LENGTH = 4  # tokens of an item; EOS is a fifth


def measure(shape: Shape, rounds: int, clock: Callable[[], float]) -> dict[str, Any]:
    """Time a whole search of each; the n-best are compared first."""
    lm, items = model(shape.vocab), random_items(shape.items, shape.vocab, LENGTH, LENGTH)
    eos, steps = lm.config.eos_token_id, LENGTH + 1
    allowed, trie = trie_as_dict(items, eos), fb.Trie(items)
    cases = {
        "transformers": lambda: by_generate(lm, allowed, shape.beams, steps, shape.batch),
        "flashbeam": lambda: by_flashbeam(lm, trie, shape.beams, steps, shape.batch),
        "the model alone": lambda: forwards_alone(lm, shape.beams, steps, shape.batch),
    }
    theirs, ours = cases["transformers"](), cases["flashbeam"]()
    assert torch.equal(theirs.sequences[:, 1:], ours.tokens.flatten(0, 1)), "not the same items"
    torch.testing.assert_close(theirs.sequences_scores, ours.log_probs.flatten(), rtol=1e-4, atol=1e-4)
    seconds = interleave(cases, rounds, clock=clock)
    return {
        "shape": shape._asdict(),
        "steps": steps,
        "timings": {name: timing(each)._asdict() for name, each in seconds.items()},
        "ratio": ratio(seconds["transformers"], seconds["flashbeam"])._asdict(),
    }


def report(document: dict[str, Any]) -> None:
    """Print the table."""
    facts = document["provenance"]
    commit = (facts["commit"] or "unknown")[:9] + (" modified" if facts["modified"] else "")
    print(
        f"{facts['device']}, {facts['cores']} cores, {facts['threads']} threads; torch {facts['torch']}; transformers "
        f"{document['transformers']}; commit {commit}; "
        f"{facts['date']}; load average {facts['load_average']}. Items of {LENGTH} tokens; ms per step, medians of "
        f"{document['rounds']} interleaved rounds, by {document['clock']}.\n"
    )
    rows = [["B", "K", "V", "transformers", "flashbeam", "the model alone", "ratio [95 %]"]]
    for result in document["results"]:
        shape = Shape(**result["shape"])
        times = [f"{each['median_us'] / 1e3 / result['steps']:.2f}" for each in result["timings"].values()]
        found = cell(Ratio(**result["ratio"]), None)
        rows.append([str(shape.batch), str(shape.beams), str(shape.vocab), *times, found])
    print(table(rows), end="\n\n")


def main(argv: list[str] | None = None) -> int:
    run = Beside.begin(__doc__, argv)
    args, clock, document = run
    document["results"] = [measure(shape, args.rounds, clock) for shape in (TINY if args.tiny else SHAPES)]
    report(document)
    run.end(machine_name(document["provenance"]["device"], document["provenance"]["cores"]), "peers")
    return 0


if __name__ == "__main__":
    sys.exit(main())
