"""Generative retrieval: a model writes the id of an item, and a trie of all ids keeps it to items that there are.

    .venv/bin/python docs/examples/retrieval.py [--items N] [--queries N] [--cpu-clock]

``search`` is what to copy. Searches of 64 beams are compared with scoring every item: what they find, and how fast.
docs/retrieval.md shows what this prints.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import flashbeam as fb
from catalogue import ITEMS, LEVELS, VOCAB_SIZE, make_ids, make_items, make_views
from effects import machine, rounded
from effects_tables import table
from every_item import EveryItem
from retriever import Retriever, load

OUT = Path(__file__).parent
BEAMS = 64
BATCH = 32  # queries searched at once
RANKS = (1, 10, 64)
ROUNDS = 9  # of timing
SEED = 1  # of the views, which training has not seen
WAYS = ("no trie", "vocab"), ("trie", "vocab"), ("trie", "allowed")
Row = dict[str, Any]


def search(model: Retriever, queries: Tensor, trie: fb.Trie | None, normalize: str) -> Tensor:
    """The likeliest ids of each query float32 ``[B, VIEW]``, best first: int64 ``[B, BEAMS, LEVELS]``."""
    beams = fb.BeamSearch(
        BEAMS,
        max_length=LEVELS,  # of every id: no EOS
        length_penalty=0.0,
        constraint=trie,
        normalize=normalize,
    )
    return fb.decode(beams, model, queries).tokens


class Index:
    """Finds items by their ids ``[N, LEVELS]``."""

    def __init__(self, ids: Tensor) -> None:
        self.keys, self.items = self._key(ids).sort()

    def _key(self, ids: Tensor) -> Tensor:
        return (ids * VOCAB_SIZE ** torch.arange(LEVELS)).sum(-1)

    def __call__(self, ids: Tensor) -> Tensor:
        """The item of each id, -1 if there is none."""
        keys = self._key(ids)
        at = torch.searchsorted(self.keys, keys).clamp(max=len(self.keys) - 1)
        return torch.where(self.keys[at] == keys, self.items[at], -1)


def quality(found: Tensor, wanted: Tensor, best: Tensor) -> Row:
    """What a search found: items ``[Q, n]``, best first, -1 for ids of none, which take no rank.

    Args:
        wanted: ``[Q]``, the item that each query is a view of.
        best: ``[Q, n]``, the likeliest items.
    """
    there = found >= 0
    hits = found == wanted[:, None]
    recall = {f"recall@{k}": (hits & (there.cumsum(1) <= k)).any(1).double().mean().item() for k in RANKS}
    of_best = (best[:, :, None] == found[:, None]).any(2).double().mean().item()
    return {**recall, "legal": there.double().mean().item(), "of_best": of_best}


@torch.inference_mode()
def compare(model: Retriever, items: Tensor, ids: Tensor, count: int, clock: Callable[[], float]) -> Row:
    """Search for the first ``count`` items by a view of each, in every way."""
    queries, wanted = make_views(items[:count], SEED), torch.arange(count)
    began = clock()
    trie = fb.Trie(ids)
    results: Row = {"items": len(ids), "queries": count, "trie_seconds": clock() - began}
    every_item, index = EveryItem(ids), Index(ids)
    results["prefixes"] = [len(level.tokens) for level in every_item.levels]

    best: dict[str, Tensor] = {}
    rows: list[Row] = []

    def add(way: tuple[str, str], found: Tensor, rate: float) -> None:
        """``rate``: queries per second."""
        row = quality(found, wanted, best[way[1]])
        items_each = len(ids) if way[0] == "every item" else BEAMS * row["legal"]
        speed = {"queries/s": rate, "items/s": rate * items_each}
        rows.append({"search": way[0], "normalize": way[1], **row, **speed})

    for normalize in ("vocab", "allowed"):
        began = clock()
        best[normalize] = torch.stack([every_item.best(model, query, BEAMS, normalize) for query in queries])
        add(("every item", normalize), best[normalize], count / (clock() - began))

    def run(way: tuple[str, str], batch: Tensor) -> Tensor:
        return search(model, batch, trie if way[0] == "trie" else None, way[1])

    rates = measure({way: lambda way=way: run(way, queries[:BATCH]) for way in WAYS}, clock)
    for way in WAYS:
        found = torch.cat([index(run(way, batch)) for batch in queries.split(BATCH)])
        add(way, found, min(BATCH, count) * rates[way])
    return {**results, "rows": rows}


def measure(calls: dict[Any, Callable[[], object]], clock: Callable[[], float]) -> dict[Any, float]:
    """Calls per second, the median of ``ROUNDS``: in turn, so that what else the machine does meets all alike."""
    seconds: dict[Any, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            began = clock()
            call()
            seconds[name].append(clock() - began)
    return {name: 1 / statistics.median(each) for name, each in seconds.items()}


def show(results: Row) -> str:
    """What docs/retrieval.md quotes."""
    recalls = [f"recall@{k}" for k in RANKS]
    head = ["search", "`normalize`", *recalls, "ids of items", f"of the best {BEAMS}", "queries/s", "items/s"]
    body = []
    for row in results["rows"]:
        shares = [f"{100 * row[name]:.1f} %" for name in (*recalls, "legal", "of_best")]
        rates = [f"{row[name]:.{0 if row[name] >= 10 else 1}f}" for name in ("queries/s", "items/s")]
        body.append([row["search"], f'`"{row["normalize"]}"`', *shares, *rates])
    about = results["about"]
    prefixes = ", ".join(map(str, results["prefixes"]))
    return f"""{results["items"]} items: {prefixes} prefixes of 1 to {LEVELS} codes; their `fb.Trie` was built in \
{results["trie_seconds"]:.2g} s.
{results["queries"]} queries, {BATCH} at once, {BEAMS} beams. {about["machine"]}, {about["clock"]};
{", ".join(f"{name} {version}" for name, version in about["versions"].items())}; {about["date"]}.

{table(head, body)}"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--items", type=int, default=ITEMS, help="the first of the catalogue; default %(default)s")
    parser.add_argument("--queries", type=int, default=128, help="default %(default)s")
    parser.add_argument("--threads", type=int, default=2, help="default %(default)s")
    parser.add_argument("--cpu-clock", action="store_true", help="processor time of one thread: for a busy machine")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of retrieval.json")
    args = parser.parse_args()
    for name, low, high in (("items", BEAMS, ITEMS), ("queries", 1, args.items), ("threads", 1, 1024)):
        if not low <= (got := getattr(args, name)) <= high:
            parser.error(f"--{name}: expected {low} to {high}, got {got}")
    torch.set_num_threads(1 if args.cpu_clock else args.threads)
    clock = time.process_time if args.cpu_clock else time.perf_counter
    model, centroids = load()
    items = make_items()[: args.items]
    results = compare(model, items, make_ids(items, centroids), args.queries, clock)
    results["about"] = {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "machine": machine(),
        "clock": "processor time of one thread" if args.cpu_clock else f"threads: {args.threads}",
        "versions": {"flashbeam": fb.__version__, "torch": torch.__version__, "python": platform.python_version()},
    }
    results = rounded(results)
    (args.out / "retrieval.json").write_text(json.dumps(results, indent=1) + "\n")
    text = show(results)
    if (page := args.out.parent / "retrieval.md").exists():
        before, mark, rest = page.read_text().partition("<!-- results -->\n")
        _, end, after = rest.partition("<!-- end -->")
        page.write_text(f"{before}{mark}{text}\n{end}{after}")
    print(text)


if __name__ == "__main__":
    main()
