"""Norms and terms of every kind in a search: inference mode, faults of one's own, exact scores of what has finished."""

import dataclasses
import time

import numpy as np
import pytest
import torch

import flashbeam as fb
from flashbeam.scoring import norm_tables

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


@pytest.mark.parametrize("regime", ["pool", "in_place"])
def test_what_finished_has_its_score_to_the_last_bit(regime):
    """Nearly all of the source is missed at first, so the parent's term is large, and seen at the step that ends."""
    size = 400
    hard = torch.zeros(1, size)
    hard[:, 0] = 1.0
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        search = fb.BeamSearch(
            2, 4, 0, length_penalty=0, finished=regime, terms=fb.Coverage(1.0), stopping=fb.Exhausted()
        )
        state = search.init(1, source_lengths=[size])
        logits = torch.randn(1, 6, generator=generator)
        logits[0, 0] = -9.0
        search.step(state, logits, attention=hard)
        assert (state.slots.scores < -1e4).all()
        soft = torch.rand(2, size, generator=generator) * 2
        search.step(state, torch.randn(2, 6, generator=generator) + 5.0 * (torch.arange(6) == 0), attention=soft)
        hyps = search.finalize(state)
        ended = [n for n in range(2) if hyps.finished[0, n] and hyps.lengths[0, n] == 2]
        assert ended
        for n in ended:
            covered = (hard[0] + soft[hyps.slots[0, n, 1]]).clamp(max=1.0).double().log().sum()
            want = hyps.log_probs[0, n] + covered.float()
            assert float(hyps.scores[0, n]) == pytest.approx(float(want), rel=2.0**-23)


@dataclasses.dataclass
class Own:
    """A norm of one's own, which cannot be hashed."""

    slope: float
    faults: dict[int, float] = dataclasses.field(default_factory=dict)

    def norm(self, length):
        return self.faults.get(length, 1.0 + self.slope * length)


def test_a_norm_of_ones_own_need_not_be_hashable():
    with pytest.raises(TypeError):
        hash(Own(0.5))
    search = fb.BeamSearch(3, [3, 5], EOS, length_penalty=[Own(0.5), Own(0.1)], stopping=fb.Exhausted())
    state = search.init(2)
    while not state.all_done():
        search.step(state, torch.randn(6, 7))
    hyps = search.finalize(state)
    norms = 1.0 + torch.tensor([[0.5], [0.1]]) * hyps.lengths
    torch.testing.assert_close(hyps.scores, hyps.log_probs / norms, rtol=1e-6, atol=0)


@pytest.mark.parametrize("fault", [0.0, -1.0, float("nan"), float("inf"), 1e38])
def test_norms_of_all_lengths_are_checked(fault):
    with pytest.raises(ValueError, match="length_penalty: expected a norm between 1e-37 and 1e37 for length 2, got"):
        fb.BeamSearch(2, 4, EOS, length_penalty=Own(1.0, {2: fault}))
    fb.BeamSearch(2, 4, EOS, length_penalty=Own(1.0, {5: fault})).init(1)
    search = fb.BeamSearch(2, lambda n: n, EOS, length_penalty=Own(1.0, {2: fault}))
    search.init(1, source_lengths=[1])
    with pytest.raises(ValueError, match="length_penalty: expected a norm between 1e-37 and 1e37 for length 2, got"):
        search.init(1, source_lengths=[3])


def test_lengths_that_a_request_cannot_reach_have_no_norm_to_fail_on():
    search = fb.BeamSearch(2, [4, 900], EOS, length_penalty=[60.0, 1.0])
    assert search.init(2).limits.bound_norm.isfinite().all()


@pytest.mark.parametrize("scoring", [fb.LengthPower, fb.GNMT])
def test_a_huge_exponent_is_refused_at_once(scoring):
    start = time.perf_counter()
    with pytest.raises(ValueError, match=r"length_penalty: expected a norm between .* got inf"):
        fb.BeamSearch(2, 64, EOS, length_penalty=scoring(10**7))
    assert time.perf_counter() - start < 1.0


@pytest.mark.parametrize("counts_eos", [True, False])
def test_norm_tables_are_what_lengths_still_open_ask_for(counts_eos):
    offset = 0 if counts_eos else 2
    powers = fb.LengthPower(0.7, offset), fb.LengthPower(-0.5, offset)
    scorings = [*powers, Own(-0.02), fb.GNMT(1.1), Own(0.0, {3: 7.0})]
    lows, highs = [0, 3, 5, 1, 4], [6, 3, 9, 1, 5]
    tables = norm_tables(scorings, lows, highs, counts_eos)
    for b, (scoring, low, high) in enumerate(zip(scorings, lows, highs, strict=True)):
        live = {n: np.float32(scoring.norm(n)) for n in range(1, high + 1)}
        ended = live if counts_eos else {n: np.float32(scoring.norm(n - 1)) for n in live}
        assert [tables.live[b, n] for n in live] == list(live.values())
        assert [tables.ended[b, n] for n in live] == list(ended.values())
        for n in range(10):
            still_open = [m for m in range(1, high + 1) if m > n and m >= low] or [high]
            assert tables.bound[b, n] == max(*(ended[m] for m in still_open), live[high]), (b, n)


def test_many_requests_with_norms_of_their_own_start_soon():
    """0.04 s where a table is one pass; 0.5 s where every length looks at all longer ones."""
    offsets, seconds = [fb.LengthPower(0.6, offset=n) for n in range(256)], []
    for _ in range(3):
        start = time.process_time()
        norm_tables(offsets, [0] * 256, [1024] * 256)
        seconds.append(time.process_time() - start)
    assert min(seconds) < 0.25
