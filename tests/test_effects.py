"""The study of published effects: the program runs, the page shows its numbers, and they say what the page says."""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"
sys.path.insert(0, str(EXAMPLES))

import effects
import effects_statistics
import effects_studies
import flashbeam as fb
from codelm import EOS_ID, CodeLM, load
from demo import PROMPTS, complete
from effects_search import log_probs, run
from effects_statistics import distinct_ngrams, interval, mean_and_interval, over_fixed, rmse
from effects_tables import tables

PAGE = EXAMPLES.parent / "algorithms" / "effects.md"


@pytest.fixture(scope="module")
def lm() -> Iterator[tuple[CodeLM, list[list[int]]]]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model, tokenizer = load()
    yield model, [tokenizer.encode(prompt) for prompt in PROMPTS]
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    found = json.loads(PAGE.with_name("effects.json").read_text())
    assert isinstance(found, dict)
    return found


# the loop and the statistics


def test_search_that_shares_prefixes_finds_what_the_plain_loop_finds(lm: tuple[CodeLM, list[list[int]]]) -> None:
    plain = complete(*lm, beam_size=4, max_length=16)
    search = fb.BeamSearch(4, 16, EOS_ID, length_penalty=0.0, stopping=fb.Exact())
    found = run(*lm, search, runs=2)
    for field in ("tokens", "lengths", "finished"):
        expected = getattr(plain.hypotheses, field).repeat_interleave(2, 0)
        assert torch.equal(getattr(found.hypotheses, field), expected)
    torch.testing.assert_close(
        found.hypotheses.log_probs, plain.hypotheses.log_probs.repeat_interleave(2, 0), rtol=0, atol=1e-3
    )


def test_runs_of_a_prompt_draw_other_numbers_and_the_same_again(lm: tuple[CodeLM, list[list[int]]]) -> None:
    model, prompts = lm
    search = fb.BeamSearch(4, 8, EOS_ID, selection=fb.Stochastic(3))
    both = run(model, prompts[:1], search, runs=2).hypotheses.tokens
    assert not torch.equal(both[0], both[1])
    assert torch.equal(run(model, prompts[:1], search, first_id=1).hypotheses.tokens[0], both[1])


def test_scored_at_temperature_1_whatever_was_drawn_from(lm: tuple[CodeLM, list[list[int]]]) -> None:
    model, prompts = lm
    hyps = run(model, prompts, fb.BeamSearch(3, 12, EOS_ID)).hypotheses
    np.testing.assert_allclose(log_probs(model, prompts, hyps), hyps.log_probs, atol=1e-3)


def test_live_rows_leave_out_what_has_ended_in_its_slot(lm: tuple[CodeLM, list[list[int]]]) -> None:
    model, prompts = lm
    found = run(model, prompts, fb.BeamSearch(4, 24, EOS_ID, selection=fb.Sample(1), temperature=0.5))
    lengths = found.hypotheses.lengths
    for step, live in enumerate(found.live):  # samples stay in their slots: one goes on as long as it is
        goes_on = (lengths > step + 1) if step < 23 else torch.zeros_like(lengths, dtype=torch.bool)
        assert torch.equal(live, goes_on.sum(1))


def test_distinct_ngrams_of_a_set() -> None:
    assert distinct_ngrams([[1, 2, 3], [1, 2, 4]]) == 5 / 6  # 12 23 12 24, 123 124
    assert distinct_ngrams([[1, 2], [1, 2]]) == 0.5
    assert distinct_ngrams([[1], [1]]) == 0.0


def test_interval_is_that_of_the_normal_law() -> None:
    values = np.random.default_rng(0).normal(size=400)
    mean, low, high = mean_and_interval(values)
    assert mean == values.mean()
    reach = 1.96 * values.std() / 20
    assert [low, high] == pytest.approx([mean - reach, mean + reach], abs=0.15 * reach)


def test_score_over_fixed_widths_is_paired_by_prompt() -> None:
    cost, score = np.array([1.0, 4.0, 2.0])[:, None], np.array([0.0, 2.0, 1.5])[:, None]
    noise = np.random.default_rng(0).normal(size=50)  # of the prompts, the same for every rule
    both = np.stack([cost + 0 * noise, cost + 0 * noise, score + noise], 1)
    # a cost of 2 lies halfway between 1 and 4
    assert interval(both, lambda samples: over_fixed(samples, 0), paired=True) == pytest.approx([0.5, 0.5, 0.5])
    assert rmse(np.array([[3.0, 4.0], [0.0, 0.0]])) == 2.5


# the program


def test_program_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(effects_studies, "TEMPERATURES", (0.5,))
    monkeypatch.setattr(effects_studies, "SAMPLES", (4,))
    monkeypatch.setattr(effects_studies, "LENGTHS", (1, 2))
    monkeypatch.setattr(effects_statistics, "RESAMPLES", 20)
    arguments = ["--runs", "2", "--prompts", "1", "--reference", "1024", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["effects.py", *arguments])
    effects.main()
    made = json.loads((tmp_path / "effects.json").read_text())
    assert set(made) == {"entropy", "weights", "diversity", "width", "about"}
    printed = capsys.readouterr().out
    for _, text in tables(made):
        assert text in printed
        assert "nan" not in text


# the page


def test_tables_of_the_page_are_those_of_the_numbers(results: dict[str, Any]) -> None:
    page = PAGE.read_text()
    for name, text in tables(results):
        assert f"<!-- table: {name} -->\n{text}\n<!-- end -->" in page, name
    assert (PAGE.parent / "effects.svg").read_text().count("<svg") == 1
