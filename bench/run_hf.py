"""Hugging Face's ``generate`` with and without flashbeam: the same model, prompts, cache, stopping rule and results.

    python bench/run_hf.py [--threads 2] [--rounds 11] [--cpu-clock]

Prints Markdown and writes bench/results/<machine>-hf-<date>.json. A step is from one forward pass to the next, after
the prompt's; decode logic is a step less its forward pass and less the reordering of the cache. Both are measured in
the same calls, which take turns. The model is small, random and in float32; sequences are compared before anything is
timed.
"""

import functools
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# the script's folder is on the path, the root must not be: transformers would take kernels/ for the package `kernels`
import torch

from beside import Beside
from flashbeam import hf
from harness import Ratio, interleave, ratio, timing
from run_cpu import Target, cell, machine_name, table


class Shape(NamedTuple):
    batch: int
    beams: int
    vocab: int
    prompt: int = 8
    steps: int = 16
    width: int = 64  # of the model


# of steps: what is asked of their decode logic
STEPS = {
    Shape(8, 32, 32_000): Target(6.0),
    Shape(8, 8, 128_256): Target(8.0),
    Shape(1, 32, 32_000): None,
    Shape(1, 8, 128_256): None,
}
# of whole calls
WHOLE = [Shape(1, beams, vocab, 256, 32, 128) for vocab in (32_000, 128_256) for beams in (4, 8, 16, 32)]
TINY = {Shape(2, 3, 300, 4, 5, 16): Target(1.0)}
WARMUP = 2
PARTS = ("step", "forward", "reorder", "logic")


class Meter:
    """Times the forward passes and the reordering of calls; seconds by ``clock``."""

    def __init__(self, lm: Any, clock: Callable[[], float]):
        self.lm, self.clock = lm, clock
        self.forwards: list[tuple[float, float]] = []
        self.reorders: list[tuple[float, float]] = []
        self.calls: list[dict[str, float]] = []

    def timed(self, function: Callable[..., Any], spans: list[tuple[float, float]]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            start = self.clock()
            result = function(*args, **kwargs)
            spans.append((start, self.clock()))
            return result

        return call

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Time what one call does: the mean of its steps, part by part."""
        from transformers import cache_utils

        forward, kind = self.lm.forward, cache_utils.Cache
        theirs, ours = kind.reorder_cache, (hf.decoder.follow, hf.decoder.fan_out)
        self.forwards.clear(), self.reorders.clear()
        self.lm.forward = self.timed(forward, self.forwards)
        kind.reorder_cache = self.timed(theirs, self.reorders)
        hf.decoder.follow, hf.decoder.fan_out = (self.timed(each, self.reorders) for each in ours)
        try:
            yield
        finally:
            del self.lm.forward
            kind.reorder_cache = theirs
            hf.decoder.follow, hf.decoder.fan_out = ours
        first, last = self.forwards[1][0], self.forwards[-1][0]
        steps = len(self.forwards) - 2
        inside = [(a, b) for a, b in self.reorders if first <= a < last]
        spent = {
            "step": last - first,
            "forward": sum(b - a for a, b in self.forwards[1:-1]),
            "reorder": sum(b - a for a, b in inside),
        }
        spent["logic"] = spent["step"] - spent["forward"] - spent["reorder"]
        self.calls.append({part: seconds / steps for part, seconds in spent.items()})


def model(shape: Shape) -> Any:
    """A small random Llama; EOS is as likely as any other token."""
    from transformers import LlamaConfig, LlamaForCausalLM, logging

    logging.set_verbosity_error()
    config = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.width,
        intermediate_size=2 * shape.width,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=shape.prompt + shape.steps,
        initializer_range=0.1,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=3,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def measure(shape: Shape, rounds: int, clock: Callable[[], float]) -> dict[str, Any]:
    """Time whole calls of each and their steps; the sequences are compared first."""
    lm = model(shape)
    prompts = torch.randint(4, shape.vocab, (shape.batch, shape.prompt), generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = {
        "attention_mask": torch.ones_like(prompts),
        "num_beams": shape.beams,
        "num_return_sequences": shape.beams,
        "max_new_tokens": shape.steps,
        "do_sample": False,
    }
    meters = {name: Meter(lm, clock) for name in ("transformers", "flashbeam")}

    def call(name: str) -> Any:
        custom = {"custom_generate": hf.generate} if name == "flashbeam" else {}
        with meters[name].watch():
            return lm.generate(prompts, **options, **custom)

    theirs, ours = call("transformers"), call("flashbeam")
    assert torch.equal(theirs, ours), "not the same sequences"
    assert len({len(meter.forwards) for meter in meters.values()}) == 1, "not the same number of steps"
    steps = len(meters["flashbeam"].forwards)
    for meter in meters.values():
        meter.calls.clear()
    seconds = interleave({name: functools.partial(call, name) for name in meters}, rounds, WARMUP, clock)
    parts = {
        name: {part: [each[part] for each in meter.calls[WARMUP:]] for part in PARTS} for name, meter in meters.items()
    }
    result: dict[str, Any] = {"shape": shape._asdict(), "steps": steps, "timings": {}, "ratios": {}}
    for name, of_parts in parts.items():
        result["timings"][name] = {part: timing(values)._asdict() for part, values in of_parts.items()}
        result["timings"][name]["whole"] = timing(seconds[name])._asdict()
    for part in PARTS:
        result["ratios"][part] = ratio(parts["transformers"][part], parts["flashbeam"][part])._asdict()
    result["ratios"]["whole"] = ratio(seconds["transformers"], seconds["flashbeam"])._asdict()
    return result


def report(document: dict[str, Any]) -> None:
    """Print the tables."""
    facts = document["provenance"]
    commit = (facts["commit"] or "unknown")[:9] + (" modified" if facts["modified"] else "")
    print(
        f"{facts['device']}, {facts['cores']} cores, {facts['threads']} threads; torch {facts['torch']}; transformers "
        f"{document['transformers']}; commit {commit}; {facts['date']}; load average {facts['load_average']}. Medians "
        f"of {document['rounds']} interleaved rounds, by {document['clock']}; `generate` / flashbeam.\n"
    )
    rows = [["B", "K", "V", "steps", "forward, ms", "reorder, ms", "decode logic, ms", "logic ratio [95 %]"]]
    for result, target in zip(document["steps"], document["targets"], strict=True):
        shape, timings = Shape(**result["shape"]), result["timings"]
        pairs = [
            " / ".join(f"{timings[name][part]['median_us'] / 1e3:.2f}" for name in ("transformers", "flashbeam"))
            for part in ("forward", "reorder", "logic")
        ]
        found = cell(Ratio(**result["ratios"]["logic"]), None if target is None else Target(target))
        rows.append([str(shape.batch), str(shape.beams), str(shape.vocab), str(result["steps"]), *pairs, found])
    print(table(rows), end="\n\n")
    rows = [["B", "K", "V", "prompt", "steps", "`generate`, ms", "flashbeam, ms", "ratio [95 %]"]]
    for result in document["whole"]:
        shape = Shape(**result["shape"])
        times = [f"{result['timings'][name]['whole']['median_us'] / 1e3:.1f}" for name in ("transformers", "flashbeam")]
        found = cell(Ratio(**result["ratios"]["whole"]), Target(1.0))
        sizes = [shape.batch, shape.beams, shape.vocab, shape.prompt, result["steps"]]
        rows.append([*map(str, sizes), *times, found])
    print(table(rows), end="\n\n")


def main(argv: list[str] | None = None) -> int:
    run = Beside.begin(__doc__, argv)
    args, clock, document = run
    stepped, whole = (TINY, list(TINY)) if args.tiny else (STEPS, WHOLE)
    measured = {shape: measure(shape, args.rounds, clock) for shape in dict.fromkeys([*stepped, *whole])}
    document["steps"] = [measured[shape] for shape in stepped]
    document["targets"] = [None if target is None else target.limit for target in stepped.values()]
    document["whole"] = [measured[shape] for shape in whole]
    report(document)
    run.end(machine_name(document["provenance"]["device"], document["provenance"]["cores"]), "hf")
    return 0


if __name__ == "__main__":
    sys.exit(main())
