"""The worked example of generative retrieval: only items are found, against exact search, and the page's numbers."""

import json
import re
import sys
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import flashbeam as fb

sys.path.insert(0, str(Path(__file__).parents[1] / "docs" / "examples"))

import retrieval
from catalogue import CODES, DIM, LEVELS, VOCAB_SIZE, make_ids, make_items, make_views
from every_item import EveryItem
from retrieval import BEAMS, RANKS, Index, quality, search, show
from retriever import WEIGHTS, Retriever, load

PAGE = WEIGHTS.parents[1] / "retrieval.md"
COUNT = 2000  # items
Id = tuple[int, ...]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model() -> Retriever:
    return load()[0]


@pytest.fixture(scope="module")
def items() -> Tensor:
    return make_items()[:COUNT]


@pytest.fixture(scope="module")
def ids(items: Tensor) -> Tensor:
    return make_ids(items, load()[1])


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    found = json.loads(PAGE.with_name("examples").joinpath("retrieval.json").read_text())
    assert isinstance(found, dict)
    return found


def tuples(ids: Tensor) -> list[Id]:
    return [tuple(each) for each in ids.tolist()]


# the catalogue


def test_every_seed_draws_other_views_of_the_same_items(items: Tensor) -> None:
    assert torch.equal(make_items()[:COUNT], items)
    assert torch.equal(make_views(items, 1), make_views(items, 1))
    assert not torch.equal(make_views(items, 1), make_views(items, 2))


def test_ids_are_distinct_and_each_level_has_its_tokens(ids: Tensor) -> None:
    assert len(set(tuples(ids))) == COUNT
    assert torch.equal(ids // CODES, torch.arange(LEVELS).expand_as(ids))


def test_items_that_are_alike_share_a_beginning(items: Tensor, ids: Tensor) -> None:
    neighbours = torch.cdist(items, items).fill_diagonal_(torch.inf).argmin(1)
    alike = (ids[neighbours, 0] == ids[:, 0]).double().mean()
    assert alike > 10 * (ids.roll(1, 0)[:, 0] == ids[:, 0]).double().mean()


def test_every_code_brings_the_sum_of_centroids_nearer_to_the_item(items: Tensor, ids: Tensor) -> None:
    chosen = load()[1][torch.arange(LEVELS), ids % CODES]  # [N, LEVELS, DIM]
    errors = [(items - chosen[:, :n].sum(1)).square().sum(1).mean().item() for n in range(LEVELS + 1)]
    assert all(after < 0.8 * before for before, after in pairwise(errors))


def test_an_id_that_is_taken_gives_way_to_the_next_nearest() -> None:
    centroids = torch.zeros(LEVELS, CODES, DIM)
    centroids[-1, :, 0] = torch.arange(CODES).float()
    points = torch.zeros(3, DIM)
    points[:, 0] = torch.tensor([5.2, 5.2, 4.9])
    assert (make_ids(points, centroids)[:, -1] % CODES).tolist() == [5, 6, 4]


# the searches


@torch.inference_mode()
def scores(model: Retriever, query: Tensor, ids: Tensor, normalize: str) -> dict[Id, float]:
    """The log-probability of each id, one at a time, by definition."""
    known = tuples(ids)
    found = {}
    for each in known:
        logits, state = model(query[None])
        total = 0.0
        for depth, token in enumerate(each):
            if depth:
                logits, state = model(torch.tensor([each[depth - 1]]), state)
            legal = sorted({other[depth] for other in known if other[:depth] == each[:depth]})
            rivals = logits[0, legal] if normalize == "allowed" else logits[0]
            total += (logits[0, token] - rivals.logsumexp(0)).item()
        found[each] = total
    return found


@torch.inference_mode()
@pytest.mark.parametrize("normalize", ["vocab", "allowed"])
def test_with_as_many_beams_as_items_the_search_is_exact(
    model: Retriever, items: Tensor, ids: Tensor, normalize: str
) -> None:
    few = ids[:BEAMS]
    queries = make_views(items[:3], 5)
    found = search(model, queries, fb.Trie(few), normalize)
    for query, ranked in zip(queries, found, strict=True):
        expected = scores(model, query, few, normalize)
        assert set(tuples(ranked)) == set(expected)
        in_order = [expected[each] for each in tuples(ranked)]
        assert in_order == pytest.approx(sorted(in_order, reverse=True), abs=1e-4)
        best = EveryItem(few).best(model, query, BEAMS, normalize)
        assert [expected[each] for each in tuples(few[best])] == pytest.approx(in_order, abs=1e-4)


@torch.inference_mode()
def test_only_items_are_found(model: Retriever, items: Tensor, ids: Tensor) -> None:
    queries = make_views(items[:8], 1)
    known = set(tuples(ids))
    free = tuples(search(model, queries, None, "vocab").flatten(0, 1))
    assert set(free) - known
    for normalize in ("vocab", "allowed"):
        found = search(model, queries, fb.Trie(ids), normalize)
        assert all(set(tuples(of_query)) <= known for of_query in found)
        assert all(len(set(tuples(of_query))) == BEAMS for of_query in found)


def test_index_finds_items_and_nothing_else(ids: Tensor) -> None:
    index = Index(ids)
    assert torch.equal(index(ids.flip(0)), torch.arange(COUNT).flip(0))
    known = set(tuples(ids))
    others = torch.randint(VOCAB_SIZE, (500, LEVELS), generator=torch.Generator().manual_seed(0))
    assert index(others).tolist() == [-1 if each not in known else tuples(ids).index(each) for each in tuples(others)]


def test_quality_gives_no_rank_to_ids_of_none() -> None:
    found = torch.tensor([[-1, 3, 7], [5, -1, -1]])
    row = quality(found, wanted=torch.tensor([3, 6]), best=torch.tensor([[7, 3, 2], [6, 5, 4]]))
    assert row == {"recall@1": 0.5, "recall@10": 0.5, "recall@64": 0.5, "legal": 0.5, "of_best": 0.5}


# the program


def run(monkeypatch: pytest.MonkeyPatch, arguments: Sequence[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["retrieval.py", *arguments])
    retrieval.main()


def test_program_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(retrieval, "ROUNDS", 1)
    run(monkeypatch, ["--items", str(COUNT), "--queries", "8", "--threads", "1", "--out", str(tmp_path)])
    made = json.loads((tmp_path / "retrieval.json").read_text())
    assert show(made) in capsys.readouterr().out
    assert (made["items"], made["queries"]) == (COUNT, 8)
    for row in made["rows"]:
        recalls = [row[f"recall@{k}"] for k in RANKS]
        assert recalls == sorted(recalls) and recalls[-1] <= 1.0
        assert (row["legal"] == 1.0) == (row["search"] != "no trie")
        assert row["queries/s"] > 0.0
        if row["search"] == "trie":
            assert row["of_best"] > (0.5 if row["normalize"] == "vocab" else 0.9) and recalls[-1] >= 0.75


@pytest.mark.parametrize("arguments", [["--items", "63"], ["--items", "100001"], ["--items", "70", "--queries", "71"]])
def test_bad_arguments_are_named(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run(monkeypatch, arguments)
    assert re.search(rf"{arguments[-2]}: expected \d+ to \d+, got {arguments[-1]}\n", capsys.readouterr().err)


# the page


def test_weights_are_small_and_need_no_pickle() -> None:
    assert WEIGHTS.stat().st_size <= 2**20
    with np.load(WEIGHTS, allow_pickle=False) as data:
        assert all(data[name].dtype == np.float16 for name in data.files)


def test_table_of_the_page_is_that_of_the_numbers(results: dict[str, Any]) -> None:
    assert f"<!-- results -->\n{show(results)}\n<!-- end -->\n" in PAGE.read_text()


def test_page_says_what_the_numbers_say(results: dict[str, Any]) -> None:
    rows = {(row["search"], row["normalize"]): row for row in results["rows"]}
    free, vocab, allowed = rows["no trie", "vocab"], rows["trie", "vocab"], rows["trie", "allowed"]
    assert (results["items"], results["queries"]) == (100_000, 128)
    assert vocab["legal"] == allowed["legal"] == 1.0
    assert free["legal"] == pytest.approx(0.04, abs=0.005) and free["recall@64"] < 0.5
    assert vocab["queries/s"] == pytest.approx(0.9 * free["queries/s"], rel=0.05)
    assert vocab["recall@1"] > allowed["recall@1"] + 0.1
    exact = rows["every item", "vocab"]
    assert all(vocab[f"recall@{k}"] == exact[f"recall@{k}"] for k in (1, 10))
    text = " ".join(PAGE.read_text().split())
    for share in (allowed["of_best"], vocab["of_best"]):
        assert f"{100 * share:.1f} % are found" in text or f"{100 * share:.1f} % of the best 64 are found" in text
    assert f"recall@64 is {100 * vocab['recall@64']:.1f} % instead of {100 * exact['recall@64']:.1f} %" in text
    for normalize, times in (("vocab", 500), ("allowed", 280)):
        rate = rows["trie", normalize]["queries/s"] / rows["every item", normalize]["queries/s"]
        assert rate == pytest.approx(times, rel=0.15) and str(times) in text
