"""The search against its contract (design.md, sections 3 and 4): enumeration, a literal reference, laws, lattices."""

from __future__ import annotations

import dataclasses
import itertools
import math
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch

import flashbeam as fb
from flashbeam import kernels
from oracles import (
    FLAG_DEAD_END,
    FLAG_INF,
    FLAG_NAN,
    NOISE,
    Gnmt,
    Power,
    TableLM,
    TinyAttention,
    enumerate_leaves,
    naive_search,
    pack_by_hand,
)

REGIMES = ["pool", "in_place"]
# in place a request ends when every slot has: the contract gives patience no meaning there
RULES = [*itertools.product(["exact", "exhausted", 1.0], REGIMES), (0.5, "pool"), (1.5, "pool"), (2.0, "pool")]


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny tensors: threads cost more than they give. The tests of threads set their own number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ---------------------------------------------------------------------------------------------------------------------
# helpers


def library_penalty(penalty):
    return penalty.alpha if isinstance(penalty, Power) else fb.GNMT(penalty.alpha)


def library_stopping(stopping):
    if stopping == "exact":
        return fb.Exact()
    if stopping == "exhausted":
        return fb.Exhausted()
    return fb.FirstFinished() if stopping == 1.0 else fb.Patience(stopping)


def kernel_lse(row: np.ndarray, temperature: float) -> np.float32:
    """The library's own log-sum-exp, so that a reference can repeat float32 scores bit for bit."""
    logits, divisor = torch.from_numpy(row)[None], torch.tensor([temperature], dtype=torch.float32)
    return kernels.summarize(logits, temperature=divisor).lse[0].numpy()


FIELDS = ("tokens", "parents", "source_rows", "valid")


def make(**kwargs):
    kwargs.setdefault("pad_id", 0)
    return fb.BeamSearch(**kwargs)


def run(search, model, bos, *, steps=None, wide=None, bitmask=None, extra=0):
    """The loop of the contract. Returns hypotheses, state and a trace of the steps.

    ``steps``: take as many, done or not. ``wide``: run the first step on as many rows per request. ``extra``: steps
    after the end.
    """
    bos = torch.as_tensor(bos)
    state = search.init(batch_size=len(bos), device="cpu")
    tokens, cache, trace = bos if wide is None else bos.repeat_interleave(wide), None, []
    while not (state.all_done() if steps is None else len(trace) >= steps):
        logits, cache = model(tokens, cache)
        rows_per_request = len(tokens) // len(bos)
        kwargs = {} if bitmask is None else {"bitmask": bitmask(cache)}
        step = search.step(state, logits, **kwargs)
        copies = {name: getattr(step, name).clone() for name in FIELDS}
        trace.append(SimpleNamespace(**copies, done=state.done.clone(), rows_per_request=rows_per_request))
        tokens, cache = step.tokens.flatten(), fb.reorder(cache, step.source_rows)
        assert len(trace) < 200
    for _ in range(extra):
        logits, cache = model(tokens, cache)
        step = search.step(state, logits)
        tokens, cache = step.tokens.flatten(), fb.reorder(cache, step.source_rows)
    return search.finalize(state), state, trace


def well_formed(hyps, B, N, T, pad=0):
    assert hyps.tokens.shape == (B, N, T) and hyps.tokens.dtype == torch.int64
    assert hyps.token_log_probs.shape == (B, N, T) and hyps.token_log_probs.dtype == torch.float32
    for name, dtype in [("scores", torch.float32), ("log_probs", torch.float32), ("valid", torch.bool)]:
        assert getattr(hyps, name).shape == (B, N) and getattr(hyps, name).dtype == dtype, name
    assert hyps.finished.shape == (B, N) and hyps.finished.dtype == torch.bool
    assert hyps.lengths.shape == (B, N) and not hyps.lengths.dtype.is_floating_point
    valid, lengths = hyps.valid, hyps.lengths
    assert torch.equal(valid, valid.cummin(1).values), "invalid rows come last"
    assert (hyps.scores[~valid] == -math.inf).all() and (hyps.log_probs[~valid] == -math.inf).all()
    assert not hyps.finished[~valid].any()
    assert torch.isfinite(hyps.scores[valid]).all() and torch.isfinite(hyps.log_probs[valid]).all()
    assert (hyps.log_probs <= 0).all()
    assert (hyps.scores[:, :-1] >= hyps.scores[:, 1:]).all(), "best first"
    assert ((lengths >= 1) & (lengths <= T))[valid].all()
    inside = (torch.arange(T) < lengths[..., None]) & valid[..., None]
    assert (hyps.tokens[~inside] == pad).all()
    assert not torch.isnan(hyps.token_log_probs).any()
    total = torch.where(inside, hyps.token_log_probs.double(), 0.0).sum(-1)
    assert torch.allclose(total[valid], hyps.log_probs[valid].double(), atol=1e-4)


def listed(hyps, b):
    """[(tokens, finished)] of the valid hypotheses of request b."""
    n = int(hyps.valid[b].sum())
    return [(tuple(hyps.tokens[b, i, : hyps.lengths[b, i]].tolist()), bool(hyps.finished[b, i])) for i in range(n)]


def same_hyps(a, b, rows_a=None, rows_b=None):
    """Bitwise equality of everything in two results."""
    for name in ("tokens", "lengths", "scores", "log_probs", "token_log_probs", "valid", "finished"):
        x, y = getattr(a, name), getattr(b, name)
        x, y = x if rows_a is None else x[rows_a], y if rows_b is None else y[rows_b]
        assert torch.equal(x, y), name


def matches_naive(hyps, b, naive, exact=False):
    assert listed(hyps, b) == [(h.tokens, h.finished) for h in naive.hypotheses]
    n = len(naive.hypotheses)
    log_probs = torch.tensor([float(h.log_prob) for h in naive.hypotheses])
    scores = torch.tensor([float(h.score) for h in naive.hypotheses])
    if exact:
        assert torch.equal(hyps.log_probs[b, :n], log_probs)
    assert torch.allclose(hyps.log_probs[b, :n], log_probs, atol=2e-5, rtol=1e-6)
    assert torch.allclose(hyps.scores[b, :n], scores, atol=2e-5, rtol=1e-5)


def trace_matches_naive(trace, b, naive, width):
    """Every step of one request: live slots equal the reference, the others emit pad and their own row."""
    for t, step in enumerate(trace):
        first = step.rows_per_request == 1 and width > 1

        def row(slot, first=first):
            return b if first else b * width + slot

        rows, tokens = step.source_rows.reshape(-1, width)[b].tolist(), step.tokens[b].tolist()
        assert ((step.parents[b] >= 0) & (step.parents[b] < width)).all()
        if t >= len(naive.trace):  # was done before this step
            assert tokens == [0] * width
            assert rows == [row(k) for k in range(width)]
        over = t >= len(naive.trace) or naive.trace[t].done
        assert bool(step.done[b]) == over
        if over:
            continue
        expected = naive.trace[t]
        for k in range(width):
            if k >= len(expected.tokens):
                assert not step.valid[b, k]
                assert tokens[k] == 0 and rows[k] == row(k)
            elif expected.frozen[k]:
                assert tokens[k] == 0 and rows[k] == row(k)
            elif not expected.ended[k]:
                assert step.valid[b, k]
                assert tokens[k] == expected.tokens[k]
                assert step.parents[b, k] == expected.parents[k]
                assert rows[k] == row(expected.parents[k])


def logits_model(rows):
    """A model that ignores its input: rows[t] is the logits of step t, [B, V], repeated for every beam of a request."""

    def model(tokens, cache):
        t = 0 if cache is None else int(cache.reshape(-1)[0])
        B = rows[t].shape[0]
        logits = rows[t].repeat_interleave(len(tokens) // B, 0)
        return logits, torch.full((len(tokens), 1), t + 1)

    return model


# ---------------------------------------------------------------------------------------------------------------------
# enumeration


@pytest.mark.parametrize("finished", REGIMES)
@pytest.mark.parametrize(
    "penalty", [Power(0.0), Power(1.0), Power(0.6), Power(2.0), Power(-0.7), Gnmt(0.8), Gnmt(-1.0)]
)
@pytest.mark.parametrize(
    ("V", "T", "eos", "min_length", "temperature"),
    [(3, 5, [2], 0, 1.0), (4, 4, [3], 2, 1.0), (5, 3, [1, 4], 0, 0.7), (6, 3, [5], 3, 2.5), (4, 3, [], 0, 1.0)],
)
def test_wide_beam_is_enumeration(V, T, eos, min_length, temperature, penalty, finished):
    lm = TableLM(V, seed=V * 100 + T, eos=eos, eos_bias=0.5)
    bos = [11, 12]
    leaves = [
        enumerate_leaves(lm.logits, s, eos=eos, max_length=T, min_length=min_length, temperature=temperature)
        for s in bos
    ]
    K = max(map(len, leaves))
    for leaf in leaves:
        assert math.isclose(sum(math.exp(x.log_prob) for x in leaf), 1.0, abs_tol=1e-6) or min_length > 1
    for stopping in (fb.Exhausted(), fb.Exact()):
        search = make(
            beam_size=K,
            max_length=T,
            eos_id=eos or None,
            min_length=min_length,
            length_penalty=library_penalty(penalty),
            stopping=stopping,
            finished=finished,
            temperature=temperature,
        )
        hyps, _, _ = run(search, lm, bos)
        well_formed(hyps, 2, K, T)
        for b in range(2):
            truth = {x.tokens: x for x in leaves[b]}
            found = listed(hyps, b)
            assert len(found) == len(truth) and set(dict(found)) == set(truth)
            for i, (tokens, ended) in enumerate(found):
                leaf = truth[tokens]
                assert ended == leaf.finished
                assert abs(float(hyps.log_probs[b, i]) - leaf.log_prob) < 2e-5
                assert abs(float(hyps.scores[b, i]) - leaf.log_prob / penalty(len(tokens))) < 1e-4
            exact_scores = [truth[t].log_prob / penalty(len(t)) for t, _ in found]
            assert all(x > y - 1e-4 for x, y in itertools.pairwise(exact_scores))


@pytest.mark.parametrize("normalize", ["vocab", "allowed"])
def test_wide_beam_with_bitmask_is_enumeration(normalize):
    V, T, eos = 5, 4, [4]
    lm = TableLM(V, seed=3)

    def mask(prefix):
        allowed = np.random.default_rng([9, *prefix]).random(V) < 0.7
        allowed[sum(prefix) % V] = True
        return allowed

    def bitmask(cache):
        rows = np.stack([mask(tuple(p)) for p in cache["prefix"].tolist()])
        return torch.from_numpy(pack_by_hand(rows))

    leaves = enumerate_leaves(lm.logits, 7, eos=eos, max_length=T, min_length=2, mask=mask, normalize=normalize)
    K = len(leaves) + 2
    search = make(
        beam_size=K, max_length=T, eos_id=eos, min_length=2, stopping=fb.Exhausted(), length_penalty=0.0,
        normalize=normalize,
    )  # fmt: skip
    hyps, _, _ = run(search, lm, [7], bitmask=bitmask)
    well_formed(hyps, 1, K, T)
    assert set(listed(hyps, 0)) == {(x.tokens, x.finished) for x in leaves}
    truth = {x.tokens: x.log_prob for x in leaves}
    for i, (tokens, _) in enumerate(listed(hyps, 0)):
        assert abs(truth[tokens] - float(hyps.log_probs[0, i])) < 2e-5


# ---------------------------------------------------------------------------------------------------------------------
# the literal reference, over many settings


def random_setting(seed, stopping, finished):
    rng = np.random.default_rng([seed, hash_of(stopping), finished == "pool"])
    V = int(rng.integers(2, 9))
    T = int(rng.integers(1, 7))
    n_eos = int(rng.integers(0, min(3, V - 1) + 1))
    setting = {
        "beam_size": int(rng.integers(1, 6)),
        "max_length": T,
        "eos": sorted(rng.choice(V, n_eos, replace=False).tolist()),
        "min_length": int(rng.integers(0, T + 1)) if rng.random() < 0.4 else 0,
        "penalty": [Power(1.0), Power(0.0), Power(2.0), Power(0.6), Power(-0.5), Gnmt(1.0), Gnmt(0.6)][
            int(rng.integers(0, 7))
        ],
        "temperature": float(rng.choice([1.0, 1.0, 0.5, 1.7])),
    }
    lm = {"scale": float(rng.choice([0.5, 2.0])), "eos_bias": float(rng.choice([-2.0, 0.0, 1.0]))}
    return V, setting, lm


def hash_of(stopping):
    return sum(map(ord, str(stopping)))


def check_against_naive(V, setting, lm, stopping, finished, exact, steps=None, normalize="vocab", vocab_size=None):
    bos = [3, 1, 4]
    naive = [
        naive_search(
            lm.logits,
            s,
            **setting,
            stopping=stopping,
            finished=finished,
            stop_after=steps,
            normalize=normalize,
            vocab_size=vocab_size,
            **({"lse": kernel_lse, "exact_lse": True} if exact else {}),
        )
        for s in bos
    ]
    kwargs = {k: v for k, v in setting.items() if k not in ("eos", "penalty")}
    search = make(
        **kwargs,
        eos_id=setting["eos"] or None,
        length_penalty=library_penalty(setting["penalty"]),
        stopping=library_stopping(stopping),
        finished=finished,
        normalize=normalize,
        vocab_size=vocab_size,
    )
    hyps, state, trace = run(search, lm, bos, steps=steps)
    well_formed(hyps, len(bos), setting["beam_size"], setting["max_length"])
    compared = 0
    for b, expected in enumerate(naive):
        assert int(state.flags[b]) == expected.flags
        if expected.margin < (2e-6 if exact else NOISE):
            continue
        compared += 1
        matches_naive(hyps, b, expected, exact)
        if finished == "in_place" and stopping == "exact":
            continue  # may stop as soon as no live beam can win; the result is what counts
        trace_matches_naive(trace, b, expected, setting["beam_size"])
    return compared


@pytest.mark.parametrize(("stopping", "finished"), RULES)
def test_equals_the_literal_reference(stopping, finished):
    compared = 0
    for seed in range(24):
        V, setting, lm = random_setting(seed, stopping, finished)
        table = TableLM(V, seed, eos=setting["eos"], **lm)
        compared += check_against_naive(V, setting, table, stopping, finished, exact=False)
    assert compared > 60


@pytest.mark.parametrize(("stopping", "finished"), RULES)
def test_exact_ties_follow_the_total_order(stopping, finished):
    """Coarse logits tie within rows, and a model without memory ties across parents: bit for bit, no margin."""
    compared = 0
    for seed in range(24):
        V, setting, lm = random_setting(1000 + seed, stopping, finished)
        if finished == "in_place":
            setting["penalty"] = Power(0.0)
        table = TableLM(V, seed, eos=setting["eos"], coarse=[1.0, 2.0, 100.0][seed % 3], forget=seed % 2 == 0, **lm)
        compared += check_against_naive(V, setting, table, stopping, finished, exact=True)
    assert compared > 48


@pytest.mark.parametrize("finished", REGIMES)
@pytest.mark.parametrize(("V", "K"), [(61, 40), (300, 11), (2100, 3), (4500, 2)])
def test_wider_beams_and_larger_vocabularies_follow_the_total_order(V, K, finished):
    for seed, coarse in enumerate([None, 0.5]):
        setting = {"beam_size": K, "max_length": 4 if V < 1000 else 3, "eos": [V - 1, V // 2], "penalty": Power(0.0)}
        lm = TableLM(V, seed, coarse=coarse, eos=setting["eos"], eos_bias=4.0, forget=seed == 1)
        assert check_against_naive(V, setting, lm, "exhausted", finished, exact=True) == 3


@pytest.mark.parametrize("finished", REGIMES)
@pytest.mark.parametrize("stopping", ["exact", "exhausted", 1.0])
def test_early_finalize_equals_the_literal_reference(stopping, finished):
    compared = 0
    for seed in range(20):
        V, setting, lm = random_setting(2000 + seed, stopping, finished)
        setting["max_length"] += 2
        table = TableLM(V, seed, eos=setting["eos"], **lm)
        steps = 1 + seed % (setting["max_length"] - 1)
        compared += check_against_naive(V, setting, table, stopping, finished, exact=False, steps=steps)
    assert compared > 40


@pytest.mark.parametrize("finished", REGIMES)
def test_padded_vocabulary_and_renormalised_bans_equal_the_literal_reference(finished):
    compared = 0
    for seed in range(20):
        V, setting, lm = random_setting(3000 + seed, "exact", finished)
        setting["max_length"] = max(3, setting["max_length"])
        setting["min_length"] = 1 + seed % 3
        table = TableLM(V + 5, seed, eos=setting["eos"], **lm)
        normalize = ["vocab", "allowed"][seed % 2]
        compared += check_against_naive(
            V, setting, table, "exact", finished, exact=False, normalize=normalize, vocab_size=V
        )
    assert compared > 45


# ---------------------------------------------------------------------------------------------------------------------
# lattices worked by hand
#
# tokens: 1 = a, 2 = b, 3 = EOS; probabilities on the edges, of the sequence so far after "="
#
#   <s> -+- .6 a -+- .5 EOS  = .30
#        |        +- .3 a ---+- .9 EOS  = .162
#        |        |          +- .1 b -----.8 a / .2 EOS     = .018
#        |        +- .2 b ---+- .7 EOS  = .084
#        |                   +- .3 a -----.5 a / .5 EOS     = .036
#        +- .4 b -+- .9 EOS  = .36
#                 +- .1 a ---+- .75 EOS = .030
#                            +- .25 b ----1. EOS            = .010

A, B_, E = 1, 2, 3
LATTICE = {
    (): {A: 0.6, B_: 0.4},
    (A,): {E: 0.5, A: 0.3, B_: 0.2},
    (B_,): {E: 0.9, A: 0.1},
    (A, A): {E: 0.9, B_: 0.1},
    (A, B_): {E: 0.7, A: 0.3},
    (B_, A): {E: 0.75, B_: 0.25},
    (A, A, B_): {A: 0.8, E: 0.2},
    (A, B_, A): {A: 0.5, E: 0.5},
    (B_, A, B_): {E: 1.0},
}


class Lattice(TableLM):
    def __init__(self, edges=LATTICE, V=4):
        super().__init__(V)

        def logits(prefix):
            row = np.full(V, -np.inf, np.float32)
            for token, p in edges.get(prefix[1:], {A: 1.0}).items():
                row[token] = math.log(p)
            return row

        self.logits = logits


@pytest.mark.parametrize(
    ("options", "steps", "expected"),
    [
        # step 2 ranks bE .36, aE .30 first: both beams finish
        ({"stopping": fb.FirstFinished()}, 2, [((B_, E), 0.36), ((A, E), 0.30)]),
        ({"stopping": fb.FirstFinished(), "finished": "in_place"}, 2, [((B_, E), 0.36), ((A, E), 0.30)]),
        # aa .18 and ab .12 live on beside the pool; the finished ones are longer than they are likely
        ({"stopping": fb.Exhausted()}, 4, [((B_, E), 0.36), ((A, E), 0.30)]),
        ({"stopping": fb.Exact()}, 2, [((B_, E), 0.36), ((A, E), 0.30)]),
        # after step 3 the pool is aaE (ln .162 / 9 = -.2022) and bE (ln .36 / 4 = -.2554); aba may still reach
        # ln .036 / 16 = -.2078. At step 4 abaa and abaE tie at ln .018 / 16 = -.2511, and the lower token is first
        (
            {"stopping": fb.Exact(), "length_penalty": 2.0},
            4,
            [((A, A, E), 0.162), ((A, B_, A, A), 0.018)],
        ),
        # at max_length = 3 the two best candidates are aaE and abE
        (
            {"stopping": fb.Exhausted(), "length_penalty": 2.0, "max_length": 3},
            3,
            [((A, A, E), 0.162), ((B_, E), 0.36)],
        ),
        # three beams: only two continuations at step 1; then bE, aE and aa; in order of arrival aaE is the third
        (
            {"beam_size": 3, "stopping": fb.FirstFinished()},
            3,
            [((B_, E), 0.36), ((A, E), 0.30), ((A, A, E), 0.162)],
        ),
        (
            {"beam_size": 3, "finished": "in_place"},
            3,
            [((B_, E), 0.36), ((A, E), 0.30), ((A, A, E), 0.162)],
        ),
        # in place and favouring length: aaE overtakes, and moves to the first slot
        (
            {"beam_size": 3, "finished": "in_place", "length_penalty": 2.0},
            3,
            [((A, A, E), 0.162), ((B_, E), 0.36), ((A, E), 0.30)],
        ),
        # patience 4/3 of three beams is four hypotheses: aaE and abE arrive at step 3
        (
            {"beam_size": 3, "stopping": fb.Patience(4 / 3)},
            3,
            [((B_, E), 0.36), ((A, E), 0.30), ((A, A, E), 0.162)],
        ),
        # half of two beams is one hypothesis
        ({"stopping": fb.Patience(0.5)}, 2, [((B_, E), 0.36)]),
    ],
)
def test_lattice_by_hand(options, steps, expected):
    options = {"beam_size": 2, "max_length": 4, "length_penalty": 0.0, **options}
    search = make(eos_id=E, **options)
    hyps, _, trace = run(search, Lattice(), [9])
    assert len(trace) == steps
    assert listed(hyps, 0) == [(t, t[-1] == E) for t, _ in expected]
    log_probs = torch.tensor([math.log(p) for _, p in expected])
    assert torch.allclose(hyps.log_probs[0, : len(expected)], log_probs, atol=1e-5)
    alpha = options["length_penalty"]
    scores = torch.tensor([math.log(p) / len(t) ** alpha for t, p in expected])
    assert torch.allclose(hyps.scores[0, : len(expected)], scores, atol=1e-5)


def test_lattice_step_by_step():
    search = make(beam_size=3, max_length=4, eos_id=E, length_penalty=0.0, stopping=fb.Exhausted())
    _, _, trace = run(search, Lattice(), [9], steps=3)
    first, second, third = trace
    assert first.tokens[0].tolist() == [A, B_, 0] and first.valid[0].tolist() == [True, True, False]
    assert first.source_rows.tolist() == [0, 0, 0]  # [B, V] logits have one row
    # bE and aE leave; aa .18, ab .12 and ba .04 live on
    assert second.tokens[0].tolist() == [A, B_, A] and second.parents[0].tolist() == [0, 0, 1]
    assert second.source_rows.tolist() == [0, 0, 1] and second.valid.all()
    # aaE .162, abE .084 and aba .036 are the three best; baE .030 is fourth: neither finished nor live
    assert third.tokens[0].tolist() == [A, B_, B_] and third.parents[0].tolist() == [1, 0, 2]


def test_in_place_frozen_hypotheses_move_between_slots():
    search = make(beam_size=3, max_length=4, eos_id=E, length_penalty=0.0, finished="in_place")
    state = search.init(batch_size=1, device="cpu")
    lattice = Lattice()
    tokens, cache = torch.tensor([9]), None
    steps = []
    for _ in range(3):
        logits, cache = lattice(tokens, cache)
        steps.append(search.step(state, logits))
        tokens, cache = steps[-1].tokens.flatten(), fb.reorder(cache, steps[-1].source_rows)
    assert steps[1].parents[0].tolist() == [1, 0, 0]
    # bE and aE keep slots 0 and 1: their tokens are padding and their rows their own
    assert steps[2].tokens[0, :2].tolist() == [0, 0] and steps[2].source_rows[:2].tolist() == [0, 1]
    assert state.all_done()


@pytest.mark.parametrize(("eos", "a"), [(3, 1), (1, 3)])
def test_in_place_a_frozen_hypothesis_ties_as_its_slots_candidate(eos, a):
    """Token a or EOS, evenly, then surely token 2: equal scores, so the order of the slots stays."""
    first, then = torch.full((1, 4), -math.inf), torch.full((2, 4), -math.inf)
    first[0, [a, eos]], then[:, 2] = 0.0, 0.0
    search = make(beam_size=2, max_length=4, eos_id=eos, length_penalty=0.0, finished="in_place")
    state = search.init(batch_size=1, device="cpu")
    search.step(state, first)
    for _ in range(2):
        step = search.step(state, then)
        assert step.parents[0].tolist() == [0, 1] and step.source_rows.tolist() == [0, 1]
        assert step.tokens[0].tolist() == ([2, 0] if a < eos else [0, 2])


def test_uniform_logits_take_the_first_parent_and_the_lowest_tokens():
    model = logits_model([torch.zeros(1, 4)] * 3)
    search = make(beam_size=3, max_length=2, eos_id=3, length_penalty=0.0)
    hyps, _, _ = run(search, model, [9])
    assert listed(hyps, 0) == [((0, 0), False), ((0, 1), False), ((0, 2), False)]
    # EOS = 0 is the best of step 1 and again of step 2, for the first parent
    search = make(beam_size=3, max_length=2, eos_id=0, length_penalty=0.0, pad_id=1, stopping=fb.Exhausted())
    hyps, _, _ = run(search, model, [9])
    assert listed(hyps, 0) == [((0,), True), ((1, 0), True), ((1, 1), False)]
    # in place the finished hypothesis is the better one from step 1 on, and keeps a slot
    search = make(beam_size=3, max_length=2, eos_id=0, length_penalty=0.0, pad_id=1, finished="in_place")
    hyps, _, _ = run(search, model, [9])
    assert listed(hyps, 0) == [((0,), True), ((1, 0), True), ((1, 1), False)]


@pytest.mark.parametrize("finished", REGIMES)
@pytest.mark.parametrize("stopping", ["exact", "exhausted", 1.0])
def test_of_equal_scores_the_earlier_end_is_first(stopping, finished):
    """Token a or EOS, evenly; after a surely EOS: both hypotheses have log(1/2), to the bit."""
    inf = math.inf
    common = {"max_length": 4, "length_penalty": 0.0, "stopping": library_stopping(stopping), "finished": finished}
    for eos, a in [(3, 1), (1, 3)]:
        first, then = torch.full((1, 4), -inf), torch.full((1, 4), -inf)
        first[0, [a, eos]], then[0, eos] = 0.0, 0.0
        model = logits_model([first, then, then, then])
        hyps, _, _ = run(make(beam_size=2, eos_id=eos, **common), model, [1])
        assert listed(hyps, 0) == [((eos,), True), ((a, eos), True)]
        assert hyps.scores[0, 0] == hyps.scores[0, 1]
    if finished == "pool":  # EOS is the lower token, finishes first, and its equal cannot replace it
        hyps, _, trace = run(make(beam_size=1, eos_id=1, **common), model, [1])
        assert listed(hyps, 0) == [((1,), True)]
        assert len(trace) == (2 if stopping == "exhausted" else 1)


def test_eos_is_not_forced_at_max_length():
    """EOS has probability 0.01: the K best candidates of the last step are kept as they are."""
    p = torch.tensor([[0.5, 0.3, 0.19, 0.01]]).log()
    search = make(beam_size=3, max_length=1, eos_id=3)
    hyps, state, _ = run(search, logits_model([p]), [9])
    assert listed(hyps, 0) == [((0,), False), ((1,), False), ((2,), False)]
    assert state.done.tolist() == [True]
    # and an EOS among them has finished; the fourth candidate is none of them, however many hypotheses are asked for
    search = make(beam_size=3, max_length=1, eos_id=1)
    hyps, state, _ = run(search, logits_model([p]), [9])
    assert listed(hyps, 0) == [((0,), False), ((1,), True), ((2,), False)]
    assert listed(search.finalize(state, num_hypotheses=9), 0) == listed(hyps, 0)


def test_eos_below_the_k_best_neither_finishes_nor_lives():
    p = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    search = make(beam_size=2, max_length=3, eos_id=2, stopping=fb.Exhausted())
    hyps, _, trace = run(search, logits_model([p] * 3), [9])
    assert trace[0].tokens[0].tolist() == [0, 1]
    assert all(not ended for _, ended in listed(hyps, 0))


def test_request_ended_by_its_rule_returns_its_pool_only():
    search = make(beam_size=2, max_length=6, eos_id=E, stopping=fb.Patience(0.5), length_penalty=0.0)
    hyps, state, trace = run(search, Lattice(), [9])
    assert len(trace) == 2 and hyps.valid[0].tolist() == [True, False]
    assert state.done.tolist() == [True]


def test_early_finalize_lets_live_beams_compete():
    search = make(beam_size=3, max_length=4, eos_id=E, stopping=fb.Exhausted(), length_penalty=0.0)
    hyps, state, _ = run(search, Lattice(), [9], steps=2)
    assert not state.all_done()
    assert listed(hyps, 0) == [((B_, E), True), ((A, E), True), ((A, A), False)]
    assert torch.allclose(hyps.log_probs[0].exp(), torch.tensor([0.36, 0.30, 0.18]), atol=1e-5)


def test_finalize_early_and_go_on():
    lm = TableLM(5, 3, eos=[4])
    search = make(beam_size=3, max_length=5, eos_id=4, stopping=fb.Exhausted())
    whole, _, _ = run(search, lm, [1, 2])
    state = search.init(batch_size=2, device="cpu")
    tokens, cache = torch.tensor([1, 2]), None
    while not state.all_done():
        logits, cache = lm(tokens, cache)
        step = search.step(state, logits)
        search.finalize(state)
        search.finalize(state, num_hypotheses=1)
        state.best()
        tokens, cache = step.tokens.flatten(), fb.reorder(cache, step.source_rows)
    same_hyps(search.finalize(state), whole)


# ---------------------------------------------------------------------------------------------------------------------
# laws


@pytest.mark.parametrize("finished", REGIMES)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_every_hypothesis_rescores_from_scratch(finished, temperature):
    model = TinyAttention(vocab=11, seed=5)
    for K, T, stopping in [(4, 7, fb.Exhausted()), (3, 6, fb.FirstFinished()), (1, 5, fb.Exact())]:
        search = make(
            beam_size=K, max_length=T, eos_id=[10, 9], finished=finished, stopping=stopping, temperature=temperature
        )
        bos = [1, 2, 3]
        hyps, _, _ = run(search, model, bos)
        well_formed(hyps, 3, K, T)
        for b in range(3):
            for i, (tokens, ended) in enumerate(listed(hyps, b)):
                assert ended == (tokens[-1] in (9, 10))
                assert not set(tokens[:-1]) & {9, 10}
                truth = model.rescore(bos[b], list(tokens), temperature)
                assert abs(sum(truth) - float(hyps.log_probs[b, i])) < 1e-4
                reported = hyps.token_log_probs[b, i, : len(tokens)].double()
                assert torch.allclose(reported, torch.tensor(truth, dtype=torch.float64), atol=1e-4)
                assert abs(sum(truth) / len(tokens) - float(hyps.scores[b, i])) < 1e-4


@pytest.mark.parametrize("finished", REGIMES)
def test_one_beam_is_greedy(finished):
    for seed in range(20):
        lm = TableLM(6, seed, eos=[5], eos_bias=0.5)
        hyps, _, _ = run(make(beam_size=1, max_length=6, eos_id=5, finished=finished), lm, [1, 2])
        for b, bos in enumerate([1, 2]):
            tokens = ()
            while len(tokens) < 6 and (not tokens or tokens[-1] != 5):
                tokens = (*tokens, int(lm.logits((bos, *tokens)).argmax()))
            assert listed(hyps, b) == [(tokens, tokens[-1] == 5)]


@pytest.mark.parametrize("finished", REGIMES)
@pytest.mark.parametrize("stopping", ["exhausted", 1.0])
def test_permuting_the_batch_permutes_the_result(finished, stopping):
    lm = TableLM(7, 8, eos=[6])
    bos = torch.tensor([5, 3, 8, 1, 9])
    order = torch.tensor([3, 0, 4, 2, 1])
    search = make(beam_size=3, max_length=6, eos_id=6, finished=finished, stopping=library_stopping(stopping))
    a, state_a, _ = run(search, lm, bos)
    b, state_b, _ = run(search, lm, bos[order])
    same_hyps(a, b, rows_a=order)
    assert torch.equal(state_a.flags[order], state_b.flags)


@pytest.mark.parametrize("V", [3001, 9000])
@pytest.mark.parametrize("finished", REGIMES)
def test_a_request_is_bitwise_the_same_alone_and_in_any_batch(V, finished):
    lm = TableLM(V, 2, scale=3.0, eos=[V - 1], eos_bias=6.0)
    bos = [4, 5, 6, 7, 8, 9, 10, 11]  # 24 rows together and 3 alone: neither parity nor vector width agree
    common = {"max_length": 5, "eos_id": V - 1, "finished": finished}
    together, _, _ = run(make(beam_size=3, **common), lm, bos)
    for b, s in enumerate(bos):
        alone, _, _ = run(make(beam_size=3, **common), lm, [s])
        same_hyps(alone, together, rows_b=slice(b, b + 1))
    # among requests with other parameters
    mixed = make(beam_size=[3] * 3 + [2] * 5, **{**common, "max_length": [5, 5, 5, 3, 4, 5, 1, 2]},
                 temperature=[1.0] * 3 + [0.5] * 5, min_length=[0] * 3 + [1, 2, 0, 0, 0],
                 length_penalty=[1.0] * 3 + [0.3, 0.0, -1.0, 2.0, 1.0])  # fmt: skip
    others, _, _ = run(mixed, lm, bos)
    same_hyps(others, together, rows_a=slice(0, 3), rows_b=slice(0, 3))


def test_a_request_is_bitwise_the_same_with_any_number_of_threads():
    V = 20000
    rng = torch.Generator().manual_seed(0)
    rows = [torch.randn(3, V, generator=rng) * 4 for _ in range(4)]
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            search = make(beam_size=4, max_length=4, eos_id=None)
            results.append(run(search, logits_model(rows), [1, 1, 1])[0])
            alone = run(make(beam_size=4, max_length=4, eos_id=None), logits_model([r[1:2] for r in rows]), [1])[0]
            same_hyps(alone, results[0], rows_b=slice(1, 2))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        same_hyps(results[0], other)


@pytest.mark.parametrize("normalize", ["vocab", "allowed"])
@pytest.mark.parametrize("finished", REGIMES)
def test_an_all_ones_bitmask_changes_nothing(normalize, finished):
    for V in (5, 32, 33, 70, 3000):
        lm = TableLM(V, 1, eos=[4], eos_bias=2.0)
        search = make(beam_size=3, max_length=5, eos_id=4, normalize=normalize, finished=finished)
        plain, _, _ = run(search, lm, [1, 2])
        for word in (-1, None):  # the bits beyond V are nobody's business

            def ones(cache, word=word, V=V):
                rows = len(cache["prefix"])
                if word is None:
                    return torch.from_numpy(pack_by_hand(np.ones((rows, V), bool)))
                return torch.full((rows, (V + 31) // 32), word, dtype=torch.int32)

            masked, _, _ = run(search, lm, [1, 2], bitmask=ones)
            same_hyps(masked, plain)


def test_bitmask_shapes_are_equivalent():
    V, K = 40, 3
    lm = TableLM(V, 4, eos=[39])
    search = make(beam_size=K, max_length=4, eos_id=39)

    def mask(cache):
        prefix = cache["prefix"].numpy()
        return torch.from_numpy(pack_by_hand((prefix.sum(1)[:, None] + np.arange(V)) % 3 > 0))

    flat, _, _ = run(search, lm, [1, 2], bitmask=mask)

    def cube(cache):
        packed = mask(cache)
        return packed if len(packed) == 2 else packed.reshape(2, K, -1)

    same_hyps(run(search, lm, [1, 2], bitmask=cube)[0], flat)
    same_hyps(run(search, lm, [1, 2], bitmask=mask, wide=K)[0], flat)
    for b, bos in enumerate([1, 2]):
        for tokens, _ in listed(flat, b):
            for i, token in enumerate(tokens):
                assert (bos + sum(tokens[:i]) + token) % 3 > 0


def test_masked_out_data_faults_do_not_matter_when_renormalised():
    """What is neither allowed nor in the normaliser never reaches arithmetic."""
    V = 37
    lm = TableLM(V, 4, eos=[36])
    search = make(beam_size=3, max_length=4, eos_id=36, normalize="allowed")
    allowed = np.arange(V) % 5 != 0
    packed = torch.from_numpy(pack_by_hand(allowed[None]))

    def mask(cache):
        return packed.expand(len(cache["prefix"]), -1)

    clean, _, _ = run(search, lm, [1, 2], bitmask=mask)

    def dirty(tokens, cache):
        logits, cache = lm(tokens, cache)
        logits = logits.clone()
        logits[:, ~allowed] = torch.tensor([math.nan, 1e30, -math.inf, 3.0])[torch.arange(V // 5 + 1) % 4]
        return logits, cache

    same_hyps(run(search, dirty, [1, 2], bitmask=mask)[0], clean)


@pytest.mark.parametrize("finished", REGIMES)
@pytest.mark.parametrize("split", [1, 2, 4])
def test_a_clone_goes_on_from_where_it_was_taken(finished, split):
    lm = TableLM(6, 21, eos=[5])
    search = make(beam_size=3, max_length=6, eos_id=5, finished=finished, stopping=fb.Exhausted())
    whole, _, _ = run(search, lm, [1, 2])
    state = search.init(batch_size=2, device="cpu")
    tokens, cache = torch.tensor([1, 2]), None

    def advance(state, tokens, cache, n):
        for _ in range(n):
            logits, cache = lm(tokens, cache)
            step = search.step(state, logits)
            tokens, cache = step.tokens.flatten().clone(), fb.reorder(cache, step.source_rows)
        return tokens, cache

    tokens, cache = advance(state, tokens, cache, split)
    snapshot = state.clone()
    early = search.finalize(snapshot)
    # the original goes astray, then to its end
    wrong = search.step(state, torch.randn(6, 6))
    advance(state, wrong.tokens.flatten().clone(), cache, 6 - split - 1)
    same_hyps(search.finalize(snapshot), early)
    again = snapshot.clone()
    for branch in (snapshot, again):
        advance(branch, tokens, cache, 6 - split)
        same_hyps(search.finalize(branch), whole)


@pytest.mark.parametrize("finished", REGIMES)
def test_one_row_or_k_rows_per_request_at_first(finished):
    for seed in range(5):
        lm = TableLM(6, seed, eos=[5])
        search = make(beam_size=4, max_length=5, eos_id=5, finished=finished)
        one, _, _ = run(search, lm, [1, 2, 3])
        many, _, trace = run(search, lm, [1, 2, 3], wide=4)
        same_hyps(many, one)
        valid = trace[0].valid.flatten()
        rows = trace[0].source_rows
        assert (rows[valid] == (torch.arange(12) // 4 * 4)[valid]).all()  # slot 0 is the only live one
        assert torch.equal(rows[~valid], torch.arange(12)[~valid])
        three = search.init(batch_size=3, device="cpu")
        logits, _ = lm(torch.tensor([1, 2, 3]).repeat_interleave(4), None)
        step = search.step(three, logits.reshape(3, 4, 6))
        assert torch.equal(step.tokens, trace[0].tokens) and torch.equal(step.source_rows, rows)


def test_only_slot_0_counts_in_wide_first_logits():
    lm = TableLM(6, 1, eos=[5])
    search = make(beam_size=3, max_length=4, eos_id=5)
    want, _, _ = run(search, lm, [1, 2])

    def noisy(tokens, cache):
        first = cache is None
        logits, cache = lm(tokens, cache)
        if first:
            logits = logits.clone()
            logits[1::3] = 9.0
            logits[2::3] = math.nan
        return logits, cache

    got, state_b, _ = run(search, noisy, [1, 2], wide=3)
    same_hyps(got, want)
    assert state_b.flags.tolist() == [0, 0]


@pytest.mark.parametrize("penalty", [Power(0.0), Power(1.0), Power(2.0), Power(-0.5), Gnmt(1.0), Gnmt(-0.6)])
@pytest.mark.parametrize("finished", REGIMES)
def test_exact_returns_what_exhausted_does_in_fewer_steps(finished, penalty):
    saved = 0
    for seed in range(9):
        V = 3 + seed % 4
        lm = TableLM(V, seed, eos=[V - 1], eos_bias=1.0 * (seed % 3))
        common = {
            "beam_size": 1 + seed % 4,
            "max_length": 8,
            "min_length": seed % 4,
            "eos_id": V - 1,
            "length_penalty": library_penalty(penalty),
            "finished": finished,
        }
        exact, _, short = run(make(stopping=fb.Exact(), **common), lm, [1, 2, 3])
        full, _, long = run(make(stopping=fb.Exhausted(), **common), lm, [1, 2, 3])
        same_hyps(exact, full)
        saved += len(long) - len(short)
        assert len(short) <= len(long)
    if finished == "pool" and penalty.alpha <= 0:
        assert saved > 0


def test_patience_keeps_hypotheses_in_order_of_arrival_and_other_rules_the_best():
    """EOS is 2 or 3. E (.1) arrives at step 1, 02 (.34) and 03 (.255) at step 2; two are kept."""
    model = logits_model([torch.tensor([p]).log() for p in ([0.85, 0.05, 0.1, 0.0], [0.1, 0.2, 0.4, 0.3])] * 2)
    for stopping, kept in [
        (fb.FirstFinished(), [(0, 2), (2,)]),
        (fb.Patience(1), [(0, 2), (2,)]),
        (fb.Patience(1.5), [(0, 2), (0, 3)]),
        (fb.Exact(), [(0, 2), (0, 3)]),
        (fb.Exhausted(), [(0, 2), (0, 3)]),
    ]:
        search = make(beam_size=2, max_length=4, eos_id=[2, 3], length_penalty=0.0, stopping=stopping)
        hyps, _, trace = run(search, model, [1])
        assert listed(hyps, 0) == [(tokens, True) for tokens in kept]
        assert len(trace) == (4 if isinstance(stopping, fb.Exhausted) else 2)


def test_patience_counts_are_guarded_against_float_error():
    """ceil(p * K): 0.28 * 25 is 7.000000000000001 in floats, and seven is meant."""
    assert math.ceil(0.28 * 25) == 8
    p = torch.zeros(1, 40)
    search = make(beam_size=25, max_length=6, eos_id=[1, 2, 3, 4, 5], stopping=fb.Patience(0.28), length_penalty=0.0)
    # step 1: of the 25 best, tokens 0..24, five are EOS. step 2: five more, of the first parent; two are kept
    state = search.init(batch_size=1, device="cpu")
    search.step(state, p)
    assert state.done.tolist() == [False]
    search.step(state, p.expand(25, 40))
    assert state.done.tolist() == [True]
    hyps = search.finalize(state, num_hypotheses=12)
    assert [t for t, _ in listed(hyps, 0)] == [(1,), (2,), (3,), (4,), (5,), (0, 1), (0, 2)]


@pytest.mark.parametrize("finished", REGIMES)
def test_min_length_bans_eos_before_it(finished):
    lm = TableLM(4, 0, eos=[2, 3], eos_bias=3.0)
    for minimum in (0, 1, 2, 3, 5):
        search = make(beam_size=3, max_length=5, min_length=minimum, eos_id=[2, 3], finished=finished)
        hyps, _, _ = run(search, lm, [1, 2, 3])
        lengths = hyps.lengths[hyps.finished]
        assert (lengths >= minimum).all()
        assert (lengths == max(minimum, 1)).any()  # and allows it at exactly that length
        assert not torch.isin(hyps.tokens[..., : max(minimum - 1, 0)], torch.tensor([2, 3])).any()


@pytest.mark.parametrize("finished", REGIMES)
@pytest.mark.parametrize("normalize", ["vocab", "allowed"])
def test_eos_anywhere_in_the_vocabulary(normalize, finished):
    """The first and last bits of words, neighbours, and ids 64 and 2048 apart."""
    for V, eos in [(70, [31, 32]), (70, [0, 63, 69]), (300, [5, 69, 133, 261]), (2300, [7, 71, 2055, 2299])]:
        lm = TableLM(V, 5, eos=eos, eos_bias=math.log(V) / 2 + 1)
        setting = {"beam_size": 3, "max_length": 3, "min_length": 2, "eos": eos, "penalty": Power(0.0)}
        for temperature in (1.0, 0.8):
            setting["temperature"] = temperature
            assert check_against_naive(V, setting, lm, 1.0, finished, exact=False, normalize=normalize) > 1


def test_several_eos_ids_finish_alike():
    lm = TableLM(6, 4)
    hyps, _, _ = run(make(beam_size=4, max_length=5, eos_id=[1, 3, 5], stopping=fb.Exhausted()), lm, [1, 2, 3, 4])
    last = [tokens[-1] for b in range(4) for tokens, ended in listed(hyps, b) if ended]
    assert set(last) == {1, 3, 5}
    for b in range(4):
        for tokens, ended in listed(hyps, b):
            assert ended == (tokens[-1] in (1, 3, 5)) and not set(tokens[:-1]) & {1, 3, 5}
    same_hyps(run(make(beam_size=4, max_length=5, eos_id=[5, 1, 3], stopping=fb.Exhausted()), lm, [1, 2, 3, 4])[0],
              hyps)  # fmt: skip


def test_without_eos_all_hypotheses_have_max_length():
    hyps, _, trace = run(make(beam_size=3, max_length=4, eos_id=None), TableLM(5, 1), [1, 2])
    assert len(trace) == 4 and (hyps.lengths == 4).all() and hyps.valid.all() and not hyps.finished.any()


def test_pad_may_be_eos_and_a_model_token():
    lm = TableLM(4, 6, eos=[3])
    a, _, _ = run(make(beam_size=3, max_length=5, eos_id=3, pad_id=3), lm, [1, 2])
    b, _, _ = run(make(beam_size=3, max_length=5, eos_id=3, pad_id=0), lm, [1, 2])
    for i in range(2):
        assert listed(a, i) == listed(b, i)
    assert torch.equal(a.scores, b.scores)
    assert any(0 in tokens for tokens, _ in listed(b, 0) + listed(b, 1))  # token 0 is an ordinary token too
    well_formed(a, 2, 3, 5, pad=3)


# ---------------------------------------------------------------------------------------------------------------------
# slots, faults, dead ends


@pytest.mark.parametrize("finished", REGIMES)
def test_fewer_continuations_than_beams(finished):
    """Two of five tokens are possible: 2, then 4 beams, of six."""
    row = torch.full((1, 5), -math.inf)
    row[0, 1], row[0, 3] = math.log(0.6), math.log(0.4)
    search = make(beam_size=6, max_length=2, eos_id=4, finished=finished)
    hyps, state, trace = run(search, logits_model([row] * 2), [1])
    assert trace[0].valid[0].tolist() == [True, True, False, False, False, False]
    assert trace[0].tokens[0].tolist() == [1, 3, 0, 0, 0, 0]
    assert [t for t, _ in listed(hyps, 0)] == [(1, 1), (1, 3), (3, 1), (3, 3)]
    well_formed(hyps, 1, 6, 2)
    assert state.flags.tolist() == [0]


@pytest.mark.parametrize("finished", REGIMES)
@pytest.mark.parametrize("at", [0, 2])
@pytest.mark.parametrize("fault", ["nan", "inf", "all_neg_inf", "all_nan", "all_masked"])
def test_a_faulty_request_is_flagged_and_disturbs_nobody(fault, at, finished):
    V, K = 6, 3
    lm = TableLM(V, 2, eos=[5])
    search = make(beam_size=K, max_length=5, eos_id=5, finished=finished, stopping=fb.Exhausted(), length_penalty=0.0)
    bos = [1, 2, 3]
    clean, _, _ = run(search, lm, bos)

    def faulty(logits, step):
        if step != at:
            return logits
        logits = logits.clone().reshape(3, -1, V)
        if fault == "nan":
            logits[1, :, 2] = math.nan
        elif fault == "inf":
            logits[1, :, 2] = math.inf
        elif fault == "all_neg_inf":
            logits[1] = -math.inf
        elif fault == "all_nan":
            logits[1] = math.nan
        return logits.reshape(-1, V)

    state = search.init(batch_size=3, device="cpu")
    tokens, cache, t, before = torch.tensor(bos), None, 0, None
    while not state.all_done():
        logits, cache = lm(tokens, cache)
        rows = len(logits) // 3
        mask = torch.full((3, rows, 1), -1, dtype=torch.int32)
        if fault == "all_masked" and t == at:
            mask[1] = 0
        if t == at:
            before = search.finalize(state, num_hypotheses=2 * K) if t else None
        step = search.step(state, faulty(logits, t), bitmask=mask.reshape(-1, 1))
        assert ((step.tokens >= 0) & (step.tokens < V)).all()
        assert ((step.source_rows >= 0) & (step.source_rows < len(logits))).all()
        tokens, cache = step.tokens.flatten(), fb.reorder(cache, step.source_rows)
        t += 1
    hyps = search.finalize(state)
    well_formed(hyps, 3, K, 5)
    for b in (0, 2):
        same_hyps(hyps, clean, rows_a=slice(b, b + 1), rows_b=slice(b, b + 1))
    flags = state.flags.tolist()
    assert flags[0] == 0 and flags[2] == 0
    assert fb.FLAG_NAN == FLAG_NAN and fb.FLAG_INF == FLAG_INF and fb.FLAG_DEAD_END == FLAG_DEAD_END
    if fault in ("nan", "all_nan"):
        assert flags[1] & FLAG_NAN and not flags[1] & FLAG_INF
    if fault == "inf":
        assert flags[1] & FLAG_INF and not flags[1] & FLAG_NAN
    if fault == "nan":
        assert not flags[1] & FLAG_DEAD_END and hyps.valid[1].any()
        assert all(len(tokens) <= at or tokens[at] != 2 for tokens, _ in listed(hyps, 1))
    elif at == 0:
        assert flags[1] & FLAG_DEAD_END
        assert not hyps.valid[1].any() and (hyps.tokens[1] == 0).all()
    else:  # what had finished before survives, nothing that was live does
        kept = [h for h in listed(before, 1) if h[1]]
        assert listed(hyps, 1) == kept
        assert bool(flags[1] & FLAG_DEAD_END) or kept


def test_nan_is_read_as_neg_inf():
    lm = TableLM(6, 2, eos=[5])
    search = make(beam_size=3, max_length=4, eos_id=5)

    def holes(value):
        def model(tokens, cache):
            logits, cache = lm(tokens, cache)
            logits = logits.clone()
            logits[:, 1] = value
            return logits, cache

        return model

    same_hyps(run(search, holes(math.nan), [1, 2])[0], run(search, holes(-math.inf), [1, 2])[0])


@pytest.mark.parametrize("finished", REGIMES)
def test_one_faulty_row_kills_one_beam_only(finished):
    """+inf in the row of the second beam: the first lives on."""
    search = make(beam_size=2, max_length=2, eos_id=3, finished=finished, length_penalty=0.0)
    state = search.init(batch_size=1, device="cpu")
    search.step(state, torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log())
    rows = torch.tensor([[0.1, 0.2, 0.4, 0.3], [0.25, 0.25, 0.25, 0.25]]).log()
    rows[1, 0] = math.inf
    search.step(state, rows)
    hyps = search.finalize(state)
    assert listed(hyps, 0) == [((0, 2), False), ((0, 3), True)]
    assert torch.allclose(hyps.log_probs[0].exp(), torch.tensor([0.2, 0.15]), atol=1e-5)
    assert state.flags[0] & FLAG_INF


@pytest.mark.parametrize("finished", REGIMES)
def test_rows_of_invalid_and_finished_slots_are_never_read(finished):
    """Whatever the model says for a slot without a live beam changes neither results nor flags."""
    lm, K = Lattice(), 3
    common = {"beam_size": K, "finished": finished}
    own = [  # the second ends by its rule, the third at its max_length with live beams, both before the first
        {"penalty": Power(2.0), "min_length": 3, "max_length": 5},
        {"penalty": Power(0.0), "min_length": 0, "max_length": 5},
        {"penalty": Power(1.0), "min_length": 2, "max_length": 2},
    ]
    naive = [naive_search(lm.logits, 9, eos=[E], **common, **o) for o in own]
    assert naive[0].steps > naive[1].steps > naive[2].steps == 2
    lists = {name: [o[name] for o in own] for name in ("min_length", "max_length")}
    search = make(**common, eos_id=E, length_penalty=[o["penalty"].alpha for o in own], **lists)
    clean, state, _ = run(search, lm, [9, 9, 9])
    for b in range(3):
        matches_naive(clean, b, naive[b])
    assert state.flags.tolist() == [0, 0, 0]

    def live(b, t, k):  # does slot k of request b hold a live beam after t steps?
        if t > len(naive[b].trace) or naive[b].trace[t - 1].done:
            return False
        step = naive[b].trace[t - 1]
        return k < len(step.tokens) and not step.frozen[k] and not step.ended[k]

    for value in (math.nan, math.inf, -math.inf, 1e30, 0.0):

        def noisy(tokens, cache, value=value):
            logits, cache = lm(tokens, cache)
            logits, t = logits.clone(), cache["prefix"].shape[1] - 1
            for row in range(len(logits) if t else 0):
                if not live(row // K, t, row % K):
                    logits[row] = value
            return logits, cache

        hyps, other, _ = run(search, noisy, [9, 9, 9])
        same_hyps(hyps, clean)
        assert other.flags.tolist() == [0, 0, 0]


@pytest.mark.parametrize("finished", REGIMES)
def test_steps_after_the_end_change_nothing(finished):
    """The host reads the flag when it chooses to, so late steps come."""
    lm = TableLM(5, 7, eos=[4], eos_bias=1.0)
    search = make(beam_size=3, max_length=4, eos_id=4, finished=finished)
    want, state, _trace = run(search, lm, [1, 2, 3])
    got, late, _ = run(search, lm, [1, 2, 3], extra=4)
    same_hyps(got, want)
    assert late.all_done() is True and late.done.all()
    assert torch.equal(late.flags, state.flags)


def test_finished_requests_wait_for_the_others_unchanged():
    sharp, flat = [torch.tensor([[0.0, 0.0, 9.0]])] * 6, [torch.tensor([[0.0, 0.0, -9.0]])] * 6
    model = logits_model([torch.cat(pair) for pair in zip(sharp, flat, strict=True)])
    search = make(beam_size=2, max_length=6, eos_id=2)
    hyps, _state, trace = run(search, model, [1, 1])
    done = [step.done.tolist() for step in trace]
    assert len(trace) == 6 and done[-1] == [True, True]
    first = next(i for i, d in enumerate(done) if d[0])
    assert first < 3 and all(d[0] for d in done[first:]) and not any(d[1] for d in done[:-1])
    alone, _, _ = run(search, logits_model(sharp), [1])
    same_hyps(alone, hyps, rows_b=slice(0, 1))
    for step in trace[first + 1 :]:
        assert (step.tokens[0] == 0).all() and step.source_rows[:2].tolist() == [0, 1]


# ---------------------------------------------------------------------------------------------------------------------
# the interface


def test_all_done_is_a_bool_and_done_a_tensor():
    search = make(beam_size=2, max_length=3, eos_id=2)
    state = search.init(batch_size=4, device="cpu")
    assert state.all_done() is False
    assert state.done.shape == (4,) and state.done.dtype == torch.bool and not state.done.any()
    assert state.flags.shape == (4,) and state.flags.dtype == torch.int32 and not state.flags.any()


def test_step_fields():
    search = make(beam_size=3, max_length=3, eos_id=2)
    state = search.init(batch_size=2, device="cpu")
    for logits in (torch.randn(2, 8), torch.randn(6, 8), torch.randn(2, 3, 8)):
        step = search.step(state, logits)
        for name, shape, dtype in [
            ("tokens", (2, 3), torch.int64),
            ("parents", (2, 3), torch.int64),
            ("source_rows", (6,), torch.int64),
            ("valid", (2, 3), torch.bool),
        ]:
            assert getattr(step, name).shape == shape and getattr(step, name).dtype == dtype, name


def test_best_is_the_first_of_finalize():
    lm = TableLM(5, 3, eos=[4])
    search = make(beam_size=3, max_length=6, eos_id=4, stopping=fb.Exhausted())
    for steps in (1, 2, 3, 6):
        hyps, state, _ = run(search, lm, [1, 2, 3], steps=steps)
        best = state.best()
        assert torch.equal(best.tokens.reshape(3, -1), hyps.tokens[:, 0])
        for name in ("scores", "log_probs", "lengths", "finished", "valid"):
            assert torch.equal(getattr(best, name).reshape(-1), getattr(hyps, name)[:, 0]), name


@pytest.mark.parametrize("finished", REGIMES)
def test_num_hypotheses(finished):
    lm = TableLM(5, 3, eos=[4])
    search = make(beam_size=3, max_length=5, eos_id=4, finished=finished, stopping=fb.Exhausted())
    hyps, state, _ = run(search, lm, [1, 2])
    for n in (1, 2, 3, 7, 50):
        other = search.finalize(state, num_hypotheses=n)
        well_formed(other, 2, n, 5)
        m = min(n, 3)
        assert torch.equal(other.tokens[:, :m], hyps.tokens[:, :m])
        assert torch.equal(other.scores[:, :m], hyps.scores[:, :m])
        assert not other.valid[:, 30:].any()
    assert search.finalize(state, 2).tokens.shape[1] == 2


def test_patience_above_one_keeps_more_than_k():
    lm = TableLM(5, 3, eos=[4], eos_bias=2.0)
    search = make(beam_size=2, max_length=9, eos_id=4, stopping=fb.Patience(2.0))
    _, state, _trace = run(search, lm, [1, 2, 3])
    hyps = search.finalize(state, num_hypotheses=6)
    for b, s in enumerate([1, 2, 3]):
        naive = naive_search(lm.logits, s, beam_size=2, max_length=9, eos=[4], stopping=2.0, num_hypotheses=6)
        assert naive.steps < 9 and naive.margin > NOISE
        matches_naive(hyps, b, naive)
        assert int(hyps.valid[b].sum()) == 4


@pytest.mark.parametrize("finished", REGIMES)
def test_decode_is_the_manual_loop(finished):
    for seed in range(4):
        lm = TableLM(6, seed, eos=[5])
        search = make(beam_size=3, max_length=5, eos_id=5, finished=finished)
        want, _, _ = run(search, lm, [1, 2, 3])
        same_hyps(fb.decode(search, lm, torch.tensor([1, 2, 3]), None), want)
    attention = TinyAttention(9)
    search = make(beam_size=3, max_length=5, eos_id=8, finished=finished)
    same_hyps(fb.decode(search, attention, torch.tensor([1, 2, 3]), None), run(search, attention, [1, 2, 3])[0])


@pytest.mark.parametrize(("stopping", "finished"), RULES)
def test_numbers_per_request_equal_separate_searches(stopping, finished):
    lm = TableLM(7, 13, eos=[6], eos_bias=0.5)
    bos = [1, 2, 3, 4, 5]
    numbers = {
        "beam_size": [3, 1, 4, 2, 4],
        "max_length": [5, 6, 2, 7, 1],
        "min_length": [0, 3, 2, 4, 0],
        "temperature": [1.0, 0.5, 2.0, 0.9, 1.3],
        "length_penalty": [1.0, 0.0, 0.6, -0.5, 2.0],
    }
    common = {"eos_id": 6, "finished": finished, "stopping": library_stopping(stopping)}
    search = make(**numbers, **common)
    together, state, _ = run(search, lm, bos)
    more = search.finalize(state, num_hypotheses=9)
    well_formed(together, 5, 4, 7)
    tensors = {name: torch.tensor(values) for name, values in numbers.items()}
    same_hyps(run(make(**tensors, **common), lm, bos)[0], together)
    for b, s in enumerate(bos):
        own = {name: values[b] for name, values in numbers.items()}
        search = make(**own, **common)
        alone, state, _ = run(search, lm, [s])
        assert listed(search.finalize(state, num_hypotheses=9), 0) == listed(more, b)
        K, T = own["beam_size"], own["max_length"]
        for name in ("tokens", "token_log_probs"):
            assert torch.equal(getattr(together, name)[b, :K, :T], getattr(alone, name)[0]), name
        for name in ("lengths", "scores", "log_probs", "valid", "finished"):
            assert torch.equal(getattr(together, name)[b, :K], getattr(alone, name)[0]), name
        assert not together.valid[b, K:].any()
    for name in numbers:  # one list among plain numbers
        if name in ("length_penalty", "temperature", "min_length"):
            plain = {"beam_size": 3, "max_length": 6, **common, name: numbers[name]}
            mixed, _, _ = run(make(**plain), lm, bos)
            for b, s in enumerate(bos):
                alone, _, _ = run(make(**{**plain, name: numbers[name][b]}), lm, [s])
                same_hyps(alone, mixed, rows_b=slice(b, b + 1))


def test_slots_beyond_a_requests_own_beam_size_are_invalid():
    lm = TableLM(7, 13)
    search = make(beam_size=[2, 4], max_length=3, eos_id=None)
    _, _, trace = run(search, lm, [1, 2])
    for t, step in enumerate(trace[:-1]):
        assert step.valid.tolist() == [[True, True, False, False], [True] * 4]
        assert step.tokens[0, 2:].tolist() == [0, 0]
        assert step.source_rows[2:4].tolist() == ([0, 0] if t == 0 else [2, 3])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_count_as_their_float32_values(dtype):
    lm = TableLM(50, 3, eos=[7], coarse=0.0625)
    search = make(beam_size=4, max_length=5, eos_id=7, temperature=0.8)

    def half(tokens, cache):
        logits, cache = lm(tokens, cache)
        return logits.to(dtype), cache

    def upcast(tokens, cache):
        logits, cache = half(tokens, cache)
        return logits.float(), cache

    same_hyps(run(search, half, [1, 2])[0], run(search, upcast, [1, 2])[0])


@pytest.mark.parametrize("tail", [math.nan, math.inf, 1e30, -math.inf])
def test_a_padded_vocabulary_is_cut_off(tail):
    lm = TableLM(45, 3, eos=[7], eos_bias=2.0)
    plain, _, _ = run(make(beam_size=3, max_length=5, eos_id=7), lm, [1, 2])

    def padded(tokens, cache):
        logits, cache = lm(tokens, cache)
        return torch.cat([logits, torch.full((len(logits), 19), tail)], 1), cache

    hyps, state, _ = run(make(beam_size=3, max_length=5, eos_id=7, vocab_size=45), padded, [1, 2])
    same_hyps(hyps, plain)
    assert state.flags.tolist() == [0, 0]


def test_strided_logits():
    lm = TableLM(40, 3, eos=[7], eos_bias=2.0)
    search = make(beam_size=3, max_length=5, eos_id=7)
    plain, _, _ = run(search, lm, [1, 2])

    def strided(tokens, cache):
        logits, cache = lm(tokens, cache)
        buffer = torch.full((2 * len(logits), 53), math.nan)
        buffer[::2, 5:45] = logits
        return buffer[::2, 5:45], cache

    same_hyps(run(search, strided, [1, 2])[0], plain)


def test_the_users_logits_and_bitmask_are_not_modified():
    search = make(beam_size=3, max_length=4, eos_id=2, min_length=2, temperature=0.5)
    state = search.init(batch_size=2, device="cpu")
    for rows in (2, 6, 6):
        logits = torch.randn(rows, 9)
        logits[0, 3] = math.nan
        mask = torch.full((rows, 1), 0b101111111, dtype=torch.int32)
        a, b = logits.clone(), mask.clone()
        search.step(state, logits, bitmask=mask)
        assert torch.equal(torch.nan_to_num(a, 77.0), torch.nan_to_num(logits, 77.0)) and torch.equal(b, mask)


def test_inference_mode_and_gradients():
    lm = TableLM(6, 3, eos=[5])
    search = make(beam_size=3, max_length=4, eos_id=5)
    plain, _, _ = run(search, lm, [1, 2])
    with torch.inference_mode():
        same_hyps(run(search, lm, [1, 2])[0], plain)

    def learning(tokens, cache):
        logits, cache = lm(tokens, cache)
        return logits.clone().requires_grad_(), cache

    hyps, _, _ = run(search, learning, [1, 2])
    same_hyps(hyps, plain)
    assert not hyps.scores.requires_grad and not hyps.token_log_probs.requires_grad


def test_a_search_serves_many_states_at_once():
    lm = TableLM(6, 3, eos=[5])
    search = make(beam_size=3, max_length=4, eos_id=5)
    want = [run(search, lm, bos)[0] for bos in ([1, 2], [3])]
    states = [search.init(batch_size=2, device="cpu"), search.init(batch_size=1, device="cpu")]
    tokens, caches = [torch.tensor([1, 2]), torch.tensor([3])], [None, None]
    for _ in range(4):
        for i in range(2):
            logits, cache = lm(tokens[i], caches[i])
            step = search.step(states[i], logits)
            tokens[i], caches[i] = step.tokens.flatten().clone(), fb.reorder(cache, step.source_rows)
    for i in range(2):
        same_hyps(search.finalize(states[i]), want[i])


class Pair(NamedTuple):
    key: torch.Tensor
    value: torch.Tensor


@dataclasses.dataclass
class Layer:
    key: torch.Tensor
    more: list


def test_reorder_takes_any_nest():
    rows = torch.tensor([2, 2, 0, 1])
    x = torch.arange(24.0).reshape(4, 3, 2)
    nest = {"a": [x, (x * 2, Pair(x * 3, (x * 4).long()))], "b": Layer(x.bfloat16(), [x > 3])}
    before = x.clone()
    out = fb.reorder(nest, rows)
    assert torch.equal(x, before)
    assert isinstance(out["a"][1], tuple) and isinstance(out["a"][1][1], Pair) and isinstance(out["b"], Layer)
    assert torch.equal(out["a"][0], x[rows]) and torch.equal(out["a"][1][0], 2 * x[rows])
    assert torch.equal(out["a"][1][1].key, 3 * x[rows]) and torch.equal(out["a"][1][1].value, (4 * x[rows]).long())
    assert torch.equal(out["b"].key, x[rows].bfloat16()) and torch.equal(out["b"].more[0], x[rows] > 3)
    assert torch.equal(fb.reorder(x, rows), x[rows])


def test_reorder_grows_and_shrinks_and_takes_dim():
    x = torch.randn(3, 5, 2)
    for rows in ([0, 0, 1, 1, 2, 2], [2], [1, 0, 2]):
        rows = torch.tensor(rows)
        assert torch.equal(fb.reorder([x], rows)[0], x[rows])
    rows = torch.tensor([4, 0, 0, 3, 3])
    assert torch.equal(fb.reorder({"kv": x}, rows, dim=1)["kv"], x[:, rows])
    assert torch.equal(fb.reorder({"kv": x.transpose(0, 1)}, rows)["kv"], x.transpose(0, 1)[rows])


def test_reorder_into_out():
    x, rows = torch.randn(4, 3), torch.tensor([3, 3, 1, 0])
    out = {"a": torch.empty(4, 3), "b": (torch.empty(4, 3),)}
    got = fb.reorder({"a": x, "b": (2 * x,)}, rows, out=out)
    assert got["a"].data_ptr() == out["a"].data_ptr() and got["b"][0].data_ptr() == out["b"][0].data_ptr()
    assert torch.equal(out["a"], x[rows]) and torch.equal(out["b"][0], 2 * x[rows])


# ---------------------------------------------------------------------------------------------------------------------
# errors

GOOD = {"beam_size": 2, "max_length": 4, "eos_id": 2}


def expect(argument):
    return pytest.raises((ValueError, TypeError), match=rf"^{argument}(\[\d+\])?: expected .+, got .+")


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("beam_size", 0),
        ("beam_size", -3),
        ("beam_size", 2.5),
        ("beam_size", "four"),
        ("beam_size", None),
        ("beam_size", [2, 0]),
        ("beam_size", []),
        ("beam_size", torch.tensor([[2, 2]])),
        ("max_length", 0),
        ("max_length", [4, -1]),
        ("max_length", 3.5),
        ("min_length", -1),
        ("min_length", [0, -1]),
        ("min_length", 1.5),
        ("temperature", 0.0),
        ("temperature", -1.0),
        ("temperature", math.nan),
        ("temperature", [1.0, 0.0]),
        ("temperature", "hot"),
        ("temperature", torch.tensor([1.0, -1.0])),
        ("length_penalty", math.nan),
        ("length_penalty", "long"),
        ("length_penalty", [1.0, math.nan]),
        ("stopping", "exact"),
        ("stopping", 1.0),
        ("finished", "both"),
        ("finished", 1),
        ("normalize", "row"),
        ("selection", "topk"),
        ("selection", 3),
        ("vocab_size", 0),
        ("vocab_size", 10.5),
        ("eos_id", "</s>"),
        ("eos_id", 1.5),
        ("eos_id", [1, -1]),
        ("eos_id", -1),
        ("pad_id", -1),
        ("pad_id", 0.5),
        ("pad_id", None),
    ],
)
def test_constructor_rejects(argument, value):
    with expect(argument):
        search = fb.BeamSearch(**{**GOOD, argument: value})
        # ids are checked when the first logits arrive, at the latest
        if argument in ("eos_id", "pad_id"):
            search.step(search.init(batch_size=2, device="cpu"), torch.zeros(2, 10))


@pytest.mark.parametrize("argument", ["beam_size", "max_length", "min_length", "temperature", "length_penalty"])
def test_device_tensors_are_refused_by_name(argument):
    with expect(argument):
        fb.BeamSearch(**{**GOOD, argument: torch.ones(2, dtype=torch.int64, device="meta")})


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, "p", None])
def test_patience_rejects(value):
    with pytest.raises((ValueError, TypeError), match=r"expected .+, got .+"):
        fb.Patience(value)


@pytest.mark.parametrize("value", [math.nan, "alpha", None])
def test_gnmt_rejects(value):
    with pytest.raises((ValueError, TypeError), match=r"expected .+, got .+"):
        fb.GNMT(value)


@pytest.mark.parametrize("argument", ["beam_size", "max_length", "min_length", "temperature", "length_penalty"])
def test_lists_must_have_the_batch_size(argument):
    search = fb.BeamSearch(**{**GOOD, argument: [1, 2, 3]})
    search.init(batch_size=3, device="cpu")
    for batch_size in (1, 2, 4):
        with expect(argument):
            search.init(batch_size=batch_size, device="cpu")


def test_init_rejects_bad_batch_sizes():
    search = fb.BeamSearch(**GOOD)
    for batch_size in (-1, 1.5, "2"):
        with expect("batch_size"):
            search.init(batch_size=batch_size, device="cpu")


BAD_STEPS = [
    ("logits", torch.zeros(7, 40), {}),
    ("logits", torch.zeros(40), {}),
    ("logits", torch.zeros(2, 3, 40), {}),
    ("logits", torch.zeros(4, 40, dtype=torch.int64), {}),
    ("logits", torch.zeros(4, 40, dtype=torch.float64), {}),
    ("logits", torch.zeros(4, 40, device="meta"), {}),
    ("bitmask", torch.zeros(4, 40), {"bitmask": torch.zeros(4, 2)}),
    ("bitmask", torch.zeros(4, 40), {"bitmask": torch.zeros(4, 2, dtype=torch.int64)}),
    ("bitmask", torch.zeros(4, 40), {"bitmask": torch.zeros(4, 1, dtype=torch.int32)}),
    ("bitmask", torch.zeros(4, 40), {"bitmask": torch.zeros(3, 2, dtype=torch.int32)}),
]


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(("argument", "logits", "options"), BAD_STEPS)
def test_a_refused_step_leaves_the_state_as_it_was(argument, logits, options, first):
    search = fb.BeamSearch(**GOOD, length_penalty=0.0, stopping=fb.Exhausted())
    torch.manual_seed(0)
    rows = [torch.randn(2, 40)] + [torch.randn(4, 40) for _ in range(3)]

    def go(interrupted):
        state = search.init(batch_size=2, device="cpu")
        for t, row in enumerate(rows):
            if interrupted and t == (0 if first else 2):
                with expect(argument):
                    search.step(state, logits, **options)
            search.step(state, row)
        return search.finalize(state)

    same_hyps(go(True), go(False))


@pytest.mark.parametrize(
    ("argument", "options", "recovers"),
    [
        ("eos_id", {"eos_id": 10}, True),
        ("eos_id", {"eos_id": [1, 99]}, True),
        ("pad_id", {"pad_id": 10}, True),
        ("eos_id", {"eos_id": 9, "vocab_size": 9}, False),
        ("pad_id", {"pad_id": 9, "vocab_size": 9}, False),
        ("(vocab_size|logits)", {"vocab_size": 11}, True),
    ],
)
def test_ids_outside_the_vocabulary_are_refused_at_the_first_logits(argument, options, recovers):
    search = fb.BeamSearch(**{**GOOD, **options})
    state = search.init(batch_size=2, device="cpu")
    with expect(argument):
        search.step(state, torch.zeros(2, 10))
    if recovers:  # a larger vocabulary, and the same state goes on as if nothing had happened
        logits = torch.randn(2, 200)
        fresh = search.init(batch_size=2, device="cpu")
        a, b = search.step(state, logits), search.step(fresh, logits)
        assert torch.equal(a.tokens, b.tokens) and torch.equal(a.source_rows, b.source_rows)


def test_num_hypotheses_is_checked():
    search = fb.BeamSearch(**GOOD)
    state = search.init(batch_size=1, device="cpu")
    search.step(state, torch.zeros(1, 10))
    for value in (0, -1, 1.5):
        with expect("num_hypotheses"):
            search.finalize(state, num_hypotheses=value)
