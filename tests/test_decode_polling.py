"""The host looks at whether a search is over one round late: a GPU is not waited for, and results are the same."""

import pytest
import torch

import flashbeam as fb
from fake_graph import assert_equal
from flashbeam import polling
from step_cases import CASES, NotAgain, V, given_to, search_of

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="looks late only on CUDA")


def late(state):
    return polling.rounds(state, late=True)


RULES = [name for name in CASES if name.endswith(("pool", "in_place"))]
OTHERS = ["ngram, stochastic", "budget", "statistics", "coverage", "contrast", "end", "spare", "row", "Exact()"]


def given(name, step, ends=7.0):
    """The arguments of a step; after the first, every beam is likely to end."""
    logits, rest = given_to(name, 8 if step else 2)
    for x in logits if isinstance(logits, tuple) else [logits]:
        x[:, 2] += ends if step else -ends
    return logits, rest


def run(search, rounds, scripts):
    """A search through ``scripts``, the last again and again; and how many steps it made."""
    state, made = search.init(2), 0
    for _ in rounds(state):
        assert made <= len(scripts)
        logits, rest = scripts[min(made, len(scripts) - 1)]
        search.step(state, logits, **rest)
        made += 1
    return state, made


@pytest.mark.parametrize("name", RULES + OTHERS)
def test_a_round_more_changes_nothing(name):
    search, scripts = search_of(name, max_length=40), [given(name, step) for step in range(40)]
    prompt, made = run(search, fb.State.until_done, scripts)
    answered_late, rounds = run(search, late, scripts)
    assert 1 < made < 40
    assert rounds == made + 1
    assert_equal(search.finalize(answered_late), search.finalize(prompt))
    # what a constraint or a term keeps is read by steps alone, and nothing is left to step
    kept = ("slots", "draws", "requests", "history", "pool", "limits", "bound", "tokens_left", "record")
    for field in kept:
        assert_equal(getattr(answered_late, field), getattr(prompt, field))


@pytest.mark.parametrize("rounds", [fb.State.until_done, late], ids=["prompt", "late"])
@pytest.mark.parametrize("name", ["topk, pool", "topk, in_place", "sample, in_place"])
def test_no_round_beyond_max_length(name, rounds):
    search, scripts = search_of(name, eos_id=None), [given(name, step) for step in range(7)]
    state, made = run(search, rounds, scripts)
    assert made == 7
    assert list(rounds(state)) == []
    # a search under way
    state = search.init(2)
    for step in range(4):
        search.step(state, *scripts[step][:1])
    for number, _ in enumerate(rounds(state), 5):
        assert number <= 7
        search.step(state, *scripts[number - 1][:1])
    assert state.all_done()
    assert bool((state.requests.steps == 7).all())


@pytest.mark.parametrize("rounds", [fb.State.until_done, late], ids=["prompt", "late"])
def test_no_round_after_the_deadline(rounds):
    search = fb.BeamSearch(2, 30, budget=fb.Budget(seconds=1000.0))
    state, made = search.init(1), 0
    for _ in rounds(state):
        made += 1
        search.step(state, torch.randn(2, V))
        if made == 3:
            state.deadline = 0.0
    assert made == 3
    assert list(rounds(state)) == []


@pytest.mark.parametrize("capture", [False, True])
@pytest.mark.parametrize("ends", [7.0, -torch.inf])
def test_decode_asks_late(ends, capture, monkeypatch):
    search = fb.BeamSearch(4, 30, 2, selection=fb.DiverseGroups(2, 0.5))
    table = torch.randn(V, V)
    table[:, 2] += ends
    calls = []

    def model(tokens, cache):
        calls.append(tokens.numel())
        return table[tokens] + cache["sums"], {"sums": cache["sums"] + tokens[:, None]}

    def decode():
        calls.clear()
        hyps = fb.decode(search, model, torch.tensor([5, 9]), {"sums": torch.zeros(2, 1)}, capture=capture)
        return hyps, len(calls)

    want, made = decode()
    monkeypatch.setattr(fb.State, "until_done", late)
    got, rounds = decode()
    assert_equal(got, want)
    assert rounds == (30 if ends < 0 else made + 1)
    assert (made == 30) == (ends < 0)


def test_late_only_without_a_constraint_on_the_host(monkeypatch):
    class OnHost(NotAgain):
        on_host = True

    asked = []
    monkeypatch.setattr("flashbeam.state.rounds", lambda state, late: asked.append(late))
    monkeypatch.setattr(fb.State, "device", torch.device("cuda"))
    for constraint in (None, NotAgain(), OnHost(), [NotAgain(), fb.AllOf(fb.NoRepeatNgram(2), OnHost())]):
        fb.BeamSearch(2, 5, 2, constraint=constraint).init(2).until_done()
    assert asked == [True, True, False, False]


def test_rounds_in_and_out_of_inference_mode():
    search = fb.BeamSearch(2, 5)
    state, made = search.init(1), 0
    rounds = late(state)
    while True:
        with torch.inference_mode(made % 2 == 0):
            if next(rounds, True):
                break
            search.step(state, torch.randn(2 if made else 1, V))
        made += 1
    assert made == 5


@needs_gpu
def test_a_gpu_is_not_waited_for():
    search = fb.BeamSearch(4, 40, 2)
    want, made = run(search, late, scripts := [given("topk, pool", step) for step in range(40)])
    scripts = [(logits.cuda(), rest) for logits, rest in scripts]
    state, rounds = search.init(2, "cuda"), 0
    for _ in state.until_done():
        torch.cuda.set_sync_debug_mode("error")
        search.step(state, scripts[rounds][0])
        torch.cuda.set_sync_debug_mode("default")
        rounds += 1
    assert rounds == made
    assert torch.equal(search.finalize(state).tokens.cpu(), search.finalize(want).tokens)
