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

sys.path.insert(0, str(Path(__file__).parents[1] / "docs" / "examples"))

import effects
import effects_statistics
import effects_studies
import flashbeam as fb
from codelm import EOS_ID, WEIGHTS, CodeLM, load
from demo import PROMPTS, complete
from effects_search import log_probs, run
from effects_statistics import distinct_ngrams, interval, mean_and_interval, over_fixed, rmse
from effects_tables import tables

PAGE = WEIGHTS.parents[1] / "algorithms" / "effects.md"


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
    monkeypatch.setattr(effects_studies, "TEMPERATURES", (0.2,))
    monkeypatch.setattr(effects_studies, "SAMPLES", (4,))
    monkeypatch.setattr(effects_studies, "LENGTHS", (1, 2))
    monkeypatch.setattr(effects_statistics, "RESAMPLES", 20)
    arguments = ["--runs", "2", "--prompts", "1", "--reference", "1024", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["effects.py", *arguments])
    effects.main()
    made = json.loads((tmp_path / "effects.json").read_text())
    assert set(made) == {"entropy", "weights", "diversity", "width", "tails", "about"}
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


def of(results: dict[str, Any], rule: str, estimator: str, field: str = "rmse") -> dict[tuple[float, int], list[float]]:
    """An interval of every temperature and number of samples."""
    rows = results["entropy"]["rows"]
    mine = [row for row in rows if (row["rule"], row["estimator"]) == (rule, estimator)]
    return {(row["temperature"], row["samples"]): row[field] for row in mine}


def test_orders_of_the_page_hold_for_samplers(results: dict[str, Any]) -> None:
    stochastic = of(results, "Stochastic", "normalized", "of_monte_carlo")
    better = {setting for setting, (_, _, high) in stochastic.items() if high < 1.0}
    assert better == {(t, k) for t in (0.1, 0.2) for k in (4, 8, 16, 32)} | {(0.5, k) for k in (8, 16, 32)}
    value, low, high = stochastic[1.0, 4]
    assert low < (4 / 3) ** 0.5 < high and value > 1.0
    assert 1 / stochastic[0.2, 32][0] == pytest.approx(13, abs=0.5)
    assert all(
        low > 1.0 for (t, _), (_, low, _) in of(results, "Stochastic", "unbiased", "of_monte_carlo").items() if t >= 0.5
    )

    arithmetic = of(results, "Arithmetic", "mean", "of_monte_carlo")
    assert [setting for setting, (value, _, _) in arithmetic.items() if value >= 1.0] == [(0.2, 4)]
    assert arithmetic[0.2, 4][1] < 1.0
    assert all(0.85 < value < 0.95 for (t, _), (value, _, _) in arithmetic.items() if t == 1.0)


def test_orders_of_the_page_hold_for_conditional_poisson_beams(results: dict[str, Any]) -> None:
    poisson = of(results, "ConditionalPoisson", "normalized", "of_monte_carlo")
    assert all(high < 1.0 for (t, _), (_, _, high) in poisson.items() if t <= 0.2)
    assert all(low > 1.0 for (t, k), (_, low, _) in poisson.items() if t >= 0.5 and (t, k) != (0.5, 4))
    one, other = of(results, "ConditionalPoisson", "normalized"), of(results, "Stochastic", "normalized")
    apart = {s for s in one if s[0] <= 0.2 and (one[s][2] < other[s][1] or one[s][1] > other[s][2])}
    assert (
        apart <= {(0.1, 32), (0.2, 32)} and one[0.1, 32][0] > other[0.1, 32][0] and one[0.2, 32][0] > other[0.2, 32][0]
    )
    tails = {(row["rule"], row["estimator"], row["temperature"]): row["rmse"] for row in results["tails"]["rows"]}
    assert tails["ConditionalPoisson", "normalized", 0.2][2] < tails["Stochastic", "normalized", 0.2][1]
    assert tails["ConditionalPoisson", "unbiased", 0.2][1] > tails["Stochastic", "unbiased", 0.2][2]
    assert of(results, "ConditionalPoisson", "normalized", "bias")[0.5, 8][0] == pytest.approx(-0.9, abs=0.05)
    inexact = {(row["temperature"], row["samples"]): row["inexact"] for row in results["entropy"]["rows"]}
    assert [inexact[0.5, k] for k in (4, 8, 16)] == [0, 0, 0]
    totals = {(row["rule"], row["max_length"]): row["mean"] for row in results["weights"]["rows"]}
    assert totals["ConditionalPoisson", 8][2] < 1.0 < totals["ConditionalPoisson", 3][2]
    assert all(low < 1.0 < high for (rule, _), (_, low, high) in totals.items() if rule == "Stochastic")


def test_orders_of_the_page_hold_for_searches(results: dict[str, Any]) -> None:
    rows = results["diversity"]["rows"]
    distinct, mean = ({(r["rule"], r["setting"]): r[key][0] for r in rows} for key in ("distinct", "mean"))
    assert max(mean, key=mean.__getitem__) == ("TopK", None) == min(distinct, key=distinct.__getitem__)
    assert f"{distinct['DiverseGroups', 1.0]:.2f} {distinct['Stochastic', 0.2]:.2f}" == "0.39 0.40"
    assert mean["DiverseGroups", 1.0] == pytest.approx(mean["Stochastic", 0.2], abs=0.01)
    assert f"{distinct['DiverseGroups', 4.0]:.2f} {distinct['Stochastic', 1.0]:.2f}" == "0.41 0.89"
    intervals = {(r["rule"], r["setting"]): r["distinct"] for r in rows}
    assert intervals["Stochastic", 0.2][1] > intervals["Sample", 0.2][2]
    assert all(intervals["Stochastic", t][1] < intervals["Sample", t][2] for t in (0.6, 0.8, 1.0))

    dynamic = {row["setting"]: row for row in results["width"]["rows"] if row["rule"] == "DynamicWidth"}
    assert all(row["over_rows_per_step"][2] <= 0.0 or row["over_rows_per_step"][1] < 0.0 for row in dynamic.values())
    assert [p for p, row in dynamic.items() if row["over_rows_per_step"][2] < 0.0] == [0.5, 0.7]
    for against in ("over_rows", "over_pool_rows"):
        assert [p for p, row in dynamic.items() if row[against][1] > 0.0] == [0.7, 0.9, 0.95, 0.99]
        assert all(row[against][0] < 3.5 for row in dynamic.values())


def test_page_says_when_and_how_it_was_measured(results: dict[str, Any]) -> None:
    about, text = results["about"], " ".join(PAGE.read_text().split())
    low, high = about["seeds"]
    versions = about["versions"]
    python = f"flashbeam {versions['flashbeam']}, torch {versions['torch'].split('+')[0]}, Python {versions['python']}"
    for expected in (
        about["date"],
        f"seeds {low} to {high}",
        python,
        f"{about['resamples']} resamples",
        "about 10 minutes",
    ):
        assert expected in text
    assert about["seconds"] == pytest.approx(600, abs=60)
    assert re.search(rf"{results['entropy']['runs']} independent runs", text)
