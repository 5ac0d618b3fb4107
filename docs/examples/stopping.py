"""How many steps each stopping rule takes, and how often its n-best is what running to the end would have found.

``python stopping.py`` prints the tables of ``docs/stopping.md`` and writes ``stopping.json``; minutes on one thread.
100 prompts from files the demo's model was not trained on, and 10 000 random searches.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import flashbeam as fb
from code_corpus import PROMPTS
from codelm import EOS_ID, load

RESULTS = Path(__file__).with_suffix(".json")
RULES = [fb.FirstFinished(), fb.BestLive(), fb.Exact(), fb.Exhausted()]
PENALTIES = [0.0, 0.6, 1.0]
BEAM_SIZE, BATCH = 4, 25
RANDOM_VOCAB, RANDOM_SEARCHES = 50, 10_000

First = Callable[[], tuple[Tensor, Any]]  # -> logits [B, V] and the cache
Next = Callable[[Tensor, Any], tuple[Tensor, Any]]  # (tokens [B * K], cache) -> logits [B * K, V] and the cache


class Ran(NamedTuple):
    """One batch searched under one rule."""

    steps: Tensor  # int32 [B]
    hyps: fb.Hypotheses


def run(search: fb.BeamSearch, first: First, step_model: Next) -> Ran:
    """The loop, started anew."""
    logits, cache = first()
    state = search.init(len(logits))
    step = search.step(state, logits)
    while not state.all_done():
        cache = fb.reorder(cache, step.source_rows)
        logits, cache = step_model(step.tokens.flatten(), cache)
        step = search.step(state, logits)
    return Ran(state.requests.steps.clone(), search.finalize(state))


def code_batches() -> Iterator[tuple[First, Next]]:
    """The demo's prompts."""
    model, tokenizer = load()
    prompts = [tokenizer.encode(prompt) for prompt in json.loads(PROMPTS.read_text())]
    for start in range(0, len(prompts), BATCH):
        batch = prompts[start : start + BATCH]
        yield lambda batch=batch: model.prefill(batch), model


def random_batches() -> Iterator[tuple[First, Next]]:
    """A language model that is a table of normal logits (standard deviation 2), looked up by a hash of the prefix."""
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(65537, RANDOM_VOCAB, generator=generator) * 2.0
    table[:, 0] += 1.0  # EOS
    for start in range(0, RANDOM_SEARCHES, 1000):
        requests = torch.arange(start, start + 1000)
        yield (
            lambda requests=requests: (table[requests * 7919 % 65537], requests),
            lambda tokens, cache: (table[(now := (cache * 31 + tokens + 1) % 1_000_003) * 7919 % 65537], now),
        )


def study(batches: Iterator[tuple[First, Next]], max_length: int, eos_id: int) -> list[dict[str, Any]]:
    """One record for each length penalty and rule."""
    cells: dict[tuple[float, fb.Stopping], list[tuple[Ran, Ran]]] = {}
    for first, step_model in batches:
        for penalty in PENALTIES:
            options: dict[str, Any] = {"length_penalty": penalty, "pad_id": eos_id}
            ran = {
                rule: run(fb.BeamSearch(BEAM_SIZE, max_length, eos_id, stopping=rule, **options), first, step_model)
                for rule in RULES
            }
            for rule in RULES:
                cells.setdefault((penalty, rule), []).append((ran[rule], ran[RULES[-1]]))
    return [_record(penalty, rule, pairs) for (penalty, rule), pairs in cells.items()]


def _record(penalty: float, rule: fb.Stopping, pairs: list[tuple[Ran, Ran]]) -> dict[str, Any]:
    alike = torch.cat([(one.hyps.tokens == whole.hyps.tokens).all(2) for one, whole in pairs])
    exact = torch.cat([one.hyps.exact for one, _ in pairs])
    assert alike.all(1)[exact].all(), "hyps.exact has claimed too much"
    return {
        "length_penalty": penalty,
        "rule": type(rule).__name__,
        "steps": round(torch.cat([one.steps for one, _ in pairs]).double().mean().item(), 2),
        "same_best": round(alike[:, 0].double().mean().item(), 4),
        "same_n_best": round(alike.all(1).double().mean().item(), 4),
        "told_exact": round(exact.double().mean().item(), 4),
    }


def table(records: list[dict[str, Any]]) -> Iterator[str]:
    """The Markdown table of one study."""
    yield "| length penalty | rule | steps | same best | same n-best | `hyps.exact` |"
    yield "|---|---|---|---|---|---|"
    for record in records:
        shares = (f"{100 * record[name]:.1f} %" for name in ("same_best", "same_n_best", "told_exact"))
        yield f"| {record['length_penalty']} | `{record['rule']}` | {record['steps']:.1f} | {' | '.join(shares)} |"


def main() -> None:
    torch.set_num_threads(1)
    with torch.inference_mode():
        results = {
            "code": study(code_batches(), 64, EOS_ID),
            "random": study(random_batches(), 64, 0),
        }
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    for name, records in results.items():
        print(name, *table(records), sep="\n")


if __name__ == "__main__":
    main()
