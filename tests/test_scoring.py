"""Norms and terms of every kind in a search: inference mode, faults of one's own, exact scores of what has finished."""

import pytest
import torch

import flashbeam as fb

EOS = 1
FIELDS = ("tokens", "scores", "log_probs", "valid")
TERMS = {
    **{kind: lambda kind=kind: fb.UID(kind, 0.5) for kind in ("greedy", "square", "max", "variance", "local")},
    "token": lambda: fb.TokenReward([0.3, 0.1], up_to=3),
    "source": lambda: fb.TokenReward(0.3, per_source_token=1.0),
    "word": lambda: fb.WordReward(0.2, [0, 3]),
    "gnmt": lambda: fb.Coverage([0.1, 0.2]),
    "summary": lambda: fb.Coverage(0.1, "summary"),
    "own": lambda: Moody(),
}


class Moody:
    """A term of one's own, which raises at a call of ``extend`` for one continuation a row, counted from 0."""

    monotone = False
    reads_attention = False

    def __init__(self, fails_at=None):
        self.fails_at, self.calls = fails_at, 0

    def init(self, rows, device):
        return {"seen": torch.zeros(rows, 1, device=device)}

    def extend(self, stats, seen):
        if seen.token_log_probs.shape[1] == 1:
            if self.calls == self.fails_at:
                raise ArithmeticError
            self.calls += 1
        total = stats["seen"] + (seen.tokens % 2)
        return 0.1 * total, {"seen": total}


def decode(term, inference):
    """A search with the term; ``inference(step)`` says which steps, and the model, run under inference mode."""
    generator = torch.Generator().manual_seed(0)
    search = fb.BeamSearch(3, 5, EOS, terms=term, stopping=fb.Exhausted())
    state, step = search.init(2, source_lengths=[2, 4]), 0
    while not state.all_done():
        with torch.inference_mode(inference(step)):
            logits = torch.randn(6, 7, generator=generator)
            attention = torch.rand(6, 4, generator=generator) if term.reads_attention else None
            search.step(state, logits, attention=attention)
        step += 1
    return search.finalize(state)


@pytest.mark.parametrize("name", TERMS)
def test_inference_mode_may_come_and_go(name):
    want = decode(TERMS[name](), lambda step: False)
    for inference in (lambda step: True, lambda step: step == 0, lambda step: step > 0):
        got = decode(TERMS[name](), inference)
        for field in FIELDS:
            assert torch.equal(getattr(want, field), getattr(got, field)), field
    with torch.inference_mode():
        decode(TERMS[name](), lambda step: True)


@pytest.mark.parametrize("steps", [0, 1])
def test_a_state_whose_term_failed_is_refused(steps):
    search = fb.BeamSearch(2, 4, EOS, finished="in_place", terms=Moody(fails_at=steps))  # no bound is asked for
    state = search.init(1)
    for _ in range(steps):
        search.step(state, torch.randn(2, 7))
    with pytest.raises(ArithmeticError):
        search.step(state, torch.randn(2, 7))
    for refused in (state, state.clone()):
        with pytest.raises(ValueError, match="state: expected one whose steps have succeeded, got one in which a term"):
            search.step(refused, torch.randn(2, 7))
