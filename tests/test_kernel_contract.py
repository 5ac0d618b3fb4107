"""The public operations against sorting everything in float32, given a log-sum-exp that is checked in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flashbeam.kernels import apply_bitmask_, backtrace, pack_bitmask, select_beams, summarize, topk_log_probs
from oracles import F32, NEG_INF, adjusted_logits, lse64, pack_by_hand, select_by_sorting

SIZES = [1, 2, 31, 64, 100, 2047, 2048, 2049, 5000, 20000]


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny tensors: threads cost more than they give. The tests of threads set their own number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ---------------------------------------------------------------------------------------------------------------------
# rows made to hurt


def maxima_at(V, positions, rng):
    row = rng.normal(size=V) - 8
    row[np.unique(np.asarray(positions) % V)] = 3.0
    return row


def adversarial_rows(V: int, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng([seed, V])
    index = np.arange(V)
    normal = rng.normal(size=V) * 3
    rows = {
        "normal": normal,
        "ascending": index / V * 5,
        "descending": -index / V * 5,
        "all equal": np.full(V, 1.25),
        "all zero of both signs": np.where(rng.random(V) < 0.5, 0.0, -0.0),
        "zeros above": np.where(rng.random(V) < 0.3, np.where(rng.random(V) < 0.5, 0.0, -0.0), -4.0),
        "clusters": np.round(normal) + rng.integers(0, 3, V) * 2.0**-20,
        "two values": rng.integers(0, 2, V) * 1.0,
        "coarse": torch.from_numpy(normal).bfloat16().double().numpy(),
        "maxima at the end": maxima_at(V, V - 1 - np.arange(min(V, 90)), rng),
        "maxima at random": maxima_at(V, rng.integers(0, V, 150), rng),
        "falling in steps": -(index // 37) * 0.5,
        "rising in steps": (index // 37) * 0.5,
        "sawtooth": (index % 16) * 1.0,
        "reverse sawtooth": -(index % 128) * 1.0,
        "equal but for the adjusted logit": rng.permutation(V) * 1e-9,
        "one finite": np.where(index == V * 2 // 3, -7.0, -np.inf),
        "few finite": np.where(rng.random(V) < 3 / V, normal, -np.inf),
        "none": np.full(V, -np.inf),
        "some nan": np.where(rng.random(V) < 0.3, np.nan, normal),
        "all nan": np.full(V, np.nan),
        "plus inf": np.where(index == V // 2, np.inf, normal),
        "huge": normal * 1e30,
        "far below": normal - 1e4,
    }
    for stride in (2, 7, 31, 32, 33, 64, 128, 256, 1000, 2048):
        rows[f"maxima every {stride}, from the end"] = maxima_at(V, V - 1 - stride * np.arange(40), rng)
        rows[f"maxima every {stride}"] = maxima_at(V, stride * np.arange(40) + stride // 2, rng)
    return {name: row.astype(F32) for name, row in rows.items()}


def stack(rows: dict[str, np.ndarray]) -> np.ndarray:
    return np.stack(list(rows.values()))


def packed(allowed: np.ndarray | None) -> torch.Tensor | None:
    return None if allowed is None else torch.from_numpy(pack_by_hand(allowed))


def true_lse(logits, temperature=None, allowed=None, normalize="vocab") -> np.ndarray:
    adjusted = adjusted_logits(logits, temperature)
    if normalize == "allowed" and allowed is not None:
        adjusted = np.where(allowed, adjusted, NEG_INF)
    return np.array([lse64(row) for row in adjusted])


def check_lse(lse: np.ndarray, truth: np.ndarray) -> None:
    finite = np.isfinite(truth)
    assert lse.dtype == F32
    error = np.abs(lse[finite].astype(np.float64) - truth[finite])
    assert (error <= 2e-6 + 2.0**-22 * np.abs(truth[finite])).all(), error.max()


def check_topk(logits: np.ndarray, k, temperature=None, allowed=None, tensor=None, **options):
    tensor = torch.from_numpy(logits) if tensor is None else tensor
    t = None if temperature is None else torch.from_numpy(np.asarray(temperature, F32))
    log_probs, tokens, lse = topk_log_probs(tensor, k, bitmask=packed(allowed), temperature=t, **options)
    R, V = logits.shape
    assert log_probs.shape == tokens.shape == (R, k) and lse.shape == (R,)
    assert log_probs.dtype == torch.float32 and tokens.dtype == torch.int64
    assert ((tokens >= 0) & (tokens < V)).all()
    check_lse(lse.numpy(), true_lse(logits, temperature, allowed, options.get("normalize", "vocab")))
    adjusted = adjusted_logits(logits, temperature)
    for r in range(R):
        want = select_by_sorting(
            adjusted[r : r + 1],
            np.zeros(1, F32),
            lse[r : r + 1].numpy(),
            k,
            None if allowed is None else allowed[r : r + 1],
        )
        assert np.array_equal(log_probs[r].numpy(), want.log_probs), r
        assert np.array_equal(tokens[r].numpy()[want.valid], want.tokens[want.valid]), r
    return log_probs, tokens, lse


def check_select(logits: np.ndarray, log_probs: np.ndarray, k, temperature=None, allowed=None, **options):
    """``logits [B, K, V]``, ``log_probs [B, K]``; ``temperature [B * K]``, ``allowed [B, K, V]``."""
    B, K, V = logits.shape
    flat = torch.from_numpy(logits.reshape(B * K, V))
    kwargs = dict(options)
    if temperature is not None:
        kwargs["temperature"] = torch.from_numpy(np.asarray(temperature, F32))
    if allowed is not None:
        kwargs["bitmask"] = packed(allowed.reshape(B * K, V))
    lse = topk_log_probs(flat, 1, **kwargs)[2].numpy().reshape(B, K)
    parents_log_probs = torch.from_numpy(log_probs)
    out = select_beams(flat, parents_log_probs, k, **kwargs)
    cube = select_beams(flat.reshape(B, K, V), parents_log_probs, k, **kwargs)
    for x, y in zip(out, cube, strict=True):
        assert torch.equal(x, y)
    got_log_probs, parents, tokens, valid = out
    for x, dtype in [
        (got_log_probs, torch.float32),
        (parents, torch.int64),
        (tokens, torch.int64),
        (valid, torch.bool),
    ]:
        assert x.shape == (B, k) and x.dtype == dtype
    assert ((tokens >= 0) & (tokens < V)).all() and ((parents >= 0) & (parents < K)).all()
    adjusted = adjusted_logits(logits.reshape(B * K, V), temperature).reshape(B, K, V)
    for b in range(B):
        want = select_by_sorting(adjusted[b], log_probs[b], lse[b], k, None if allowed is None else allowed[b])
        assert np.array_equal(valid[b].numpy(), want.valid), b
        assert np.array_equal(got_log_probs[b].numpy(), want.log_probs), b
        assert np.array_equal(parents[b].numpy()[want.valid], want.parents[want.valid]), b
        assert np.array_equal(tokens[b].numpy()[want.valid], want.tokens[want.valid]), b
    return out


# ---------------------------------------------------------------------------------------------------------------------
# topk_log_probs


def counts(V: int) -> list[int]:
    return sorted({k for k in (1, 2, 5, 16, 33, 70, 300, 1024, V, V + 3) if k <= 1024 and (k <= V + 3)})


@pytest.mark.parametrize("V", SIZES)
def test_topk_of_adversarial_rows(V):
    logits = stack(adversarial_rows(V))
    ks = counts(V)
    check_topk(logits, ks[-1])  # against sorting, once; fewer must be the head of more
    most = topk_log_probs(torch.from_numpy(logits), ks[-1])
    for k in ks:
        log_probs, tokens, lse = topk_log_probs(torch.from_numpy(logits), k)
        live = log_probs > -np.inf
        assert torch.equal(log_probs, most[0][:, :k]) and torch.equal(lse, most[2])
        assert torch.equal(tokens[live], most[1][:, :k][live])


@pytest.mark.parametrize("V", [2, 31, 100, 2049, 5000])
def test_topk_with_temperature(V):
    logits = stack(adversarial_rows(V))
    for value in (0.3, 1.0, 3.7):
        check_topk(logits, min(V, 40), temperature=np.full(len(logits), value))
    rng = np.random.default_rng(V)
    check_topk(logits, min(V, 40), temperature=rng.choice([0.5, 1.0, 1.1, 100.0], len(logits)))


def test_temperature_that_makes_distinct_logits_equal():
    """Neighbouring floats divided by 1.5 may fall on one float: then the lower token is first, not the larger logit."""
    values = [F32(1.6)]
    for _ in range(200):
        values.append(np.nextafter(values[-1], F32(2)))
    row = np.array(values, F32)
    adjusted = (row / F32(1.5)).astype(F32)
    assert len(set(adjusted.tolist())) < len(set(row.tolist()))
    logits = np.stack([row, row[::-1], np.random.default_rng(0).permutation(row)])
    _, tokens, _ = check_topk(logits, 20, temperature=np.full(3, 1.5))
    last = max(i for i in range(200) if adjusted[i] != adjusted[-1])
    assert tokens[0, 0] == last + 1  # the first of the largest, though its logit is not the largest


@pytest.mark.parametrize("normalize", ["vocab", "allowed"])
@pytest.mark.parametrize("V", [1, 2, 31, 64, 100, 2049, 5000])
def test_topk_with_bitmask(V, normalize):
    rows = adversarial_rows(V)
    # what +inf means where it is masked is said nowhere
    logits = stack({name: row for name, row in rows.items() if name != "plus inf"})
    rng = np.random.default_rng(V)
    for density in (0.9, 0.5, 3 / V, 0.0, 1.0):
        allowed = rng.random(logits.shape) < density
        check_topk(logits, min(V + 2, 50), allowed=allowed, normalize=normalize)
        check_topk(
            logits, min(V, 9), allowed=allowed, normalize=normalize, temperature=np.full(len(logits), 0.7)
        )  # fmt: skip


@pytest.mark.parametrize("V", [5, 40, 3000])
def test_masked_tokens_never_reach_arithmetic(V):
    rng = np.random.default_rng(V)
    logits = rng.normal(size=(6, V)).astype(F32)
    allowed = rng.random((6, V)) < 0.5
    want = check_topk(logits, min(V, 20), allowed=allowed, normalize="allowed")
    for junk in (np.nan, np.inf, -np.inf, 3e38, 1.0):
        dirty = np.where(allowed, logits, F32(junk))
        mask, k = packed(allowed), min(V, 20)
        got = topk_log_probs(torch.from_numpy(dirty), k, bitmask=mask, normalize="allowed")
        for x, y in zip(got, want, strict=True):
            assert torch.equal(x, y)


@pytest.mark.parametrize("V", [31, 100, 2049])
def test_all_ones_bitmask_changes_no_bit(V):
    logits = torch.from_numpy(stack(adversarial_rows(V)))
    ones = torch.full((len(logits), (V + 31) // 32), -1, dtype=torch.int32)
    plain = topk_log_probs(logits, 20)
    for normalize in ("vocab", "allowed"):
        for x, y in zip(topk_log_probs(logits, 20, bitmask=ones, normalize=normalize), plain, strict=True):
            assert torch.equal(x, y)


@pytest.mark.parametrize("V", [1, 33, 2049, 5000])
def test_strided_and_padded_rows(V):
    logits = stack(adversarial_rows(V))
    plain = check_topk(logits, min(V, 30))
    R = len(logits)
    buffer = torch.full((2 * R, V + 13), float("nan"))
    buffer[::2, 6 : 6 + V] = torch.from_numpy(logits)
    padded = torch.full((R, V + 1), float("inf"))
    padded[:, :V] = torch.from_numpy(logits)
    for view in (buffer[::2, 6 : 6 + V], padded[:, :V]):
        for x, y in zip(topk_log_probs(view, min(V, 30)), plain, strict=True):
            assert torch.equal(x, y)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("V", [31, 2049, 5000])
def test_half_precision_is_its_float32_value(V, dtype):
    rows = {name: row for name, row in adversarial_rows(V).items() if name != "huge"}
    half = torch.from_numpy(stack(rows)).to(dtype)
    check_topk(half.float().numpy(), 40 if V > 40 else V, tensor=half)
    check_topk(half.float().numpy(), 20, temperature=np.full(len(half), 0.6), tensor=half)
    log_probs = torch.linspace(0, -3, len(half)).reshape(1, -1)
    for x, y in zip(select_beams(half, log_probs, 40), select_beams(half.float(), log_probs, 40), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("V", [100, 5000, 50000])
def test_rows_are_bitwise_the_same_in_any_batch_and_with_any_number_of_threads(V):
    rng = np.random.default_rng(V)
    logits = torch.from_numpy(rng.normal(size=(12, V)).astype(F32) * 4)
    log_probs = torch.from_numpy(-rng.random((4, 3)).astype(F32))
    whole, beams = topk_log_probs(logits, 9), select_beams(logits, log_probs, 5)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for lo, hi in [(0, 12), (0, 1), (5, 6), (3, 10)]:
                for x, y in zip(topk_log_probs(logits[lo:hi], 9), whole, strict=True):
                    assert torch.equal(x, y[lo:hi])
            for b in range(4):
                alone = select_beams(logits[3 * b : 3 * b + 3], log_probs[b : b + 1], 5)
                for x, y in zip(alone, beams, strict=True):
                    assert torch.equal(x, y[b : b + 1])
            for x, y in zip(select_beams(logits, log_probs, 5), beams, strict=True):
                assert torch.equal(x, y)
    finally:
        torch.set_num_threads(before)


def test_where_threads_meet_changes_no_bit():
    """All the weight of some rows lies where equal shares of the block end: there vector code ends in scalar code."""
    rng = np.random.default_rng(0)
    before = torch.get_num_threads()
    try:
        for V in (1024, 2048):
            for threads in (2, 3, 5, 7):
                for R in range(65, 128, 3):
                    logits = np.full(R * V, -1e4, F32)
                    share = -(-R * V // threads)
                    for end in range(share, R * V, share):
                        logits[end - 8 : end] = rng.normal(size=8)
                    rows = torch.from_numpy(logits.reshape(R, V))
                    torch.set_num_threads(1)
                    alone = summarize(rows).lse
                    torch.set_num_threads(threads)
                    assert torch.equal(summarize(rows).lse, alone)
    finally:
        torch.set_num_threads(before)


# ---------------------------------------------------------------------------------------------------------------------
# select_beams


def parents_of(kind: str, B: int, K: int, rng) -> np.ndarray:
    x = {
        "zero": np.zeros((B, K)),
        "random": -rng.random((B, K)) * 5,
        "falling": -np.broadcast_to(np.arange(K), (B, K)) * 0.25,
        "rising": -np.broadcast_to(np.arange(K)[::-1], (B, K)) * 0.25,
        "first only": np.where(np.arange(K) == 0, 0.0, -np.inf) * np.ones((B, 1)),
        "some dead": np.where(rng.random((B, K)) < 0.4, -np.inf, -rng.random((B, K))),
        "all dead": np.full((B, K), -np.inf),
        "thousand": np.full((B, K), -1000.0),
        "thousands": -1000.0 - rng.random((B, K)) * 1e-3,
        "ten million": np.full((B, K), -1e7),
        "ten millions": -1e7 - rng.integers(0, 4, (B, K)),
    }[kind]
    return x.astype(F32)


KINDS = [
    "zero", "random", "falling", "rising", "first only", "some dead", "all dead",
    "thousand", "thousands", "ten million", "ten millions",
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("V", [1, 2, 31, 100, 2048, 2049])
def test_select_of_adversarial_rows(V, kind):
    rows = stack(adversarial_rows(V))
    rng = np.random.default_rng([V, KINDS.index(kind)])
    for K, k in [(1, 1), (1, 7), (2, 3), (3, 3), (4, 9), (8, 16), (5, 64)]:
        B = 5
        logits = rows[rng.integers(0, len(rows), B * K)].reshape(B, K, V)
        check_select(logits, parents_of(kind, B, K, rng), k)
    everything = rows[rng.integers(0, len(rows), 2 * 3)].reshape(2, 3, V)
    if V <= 31:
        check_select(everything, parents_of(kind, 2, 3, rng), 3 * V + 4)


@pytest.mark.parametrize("kind", ["zero", "random", "thousand", "ten millions"])
@pytest.mark.parametrize("V", [5000, 20000])
def test_select_of_adversarial_rows_over_large_vocabularies(V, kind):
    rows = stack(adversarial_rows(V))
    rng = np.random.default_rng([V, KINDS.index(kind)])
    for K, k in [(1, 4), (3, 40), (4, 4), (2, 200)]:
        logits = rows[rng.integers(0, len(rows), 3 * K)].reshape(3, K, V)
        check_select(logits, parents_of(kind, 3, K, rng), k)


@pytest.mark.parametrize("kind", ["zero", "falling", "thousand", "ten million"])
@pytest.mark.parametrize("name", list(adversarial_rows(2)))
def test_select_among_equal_rows(name, kind):
    """All beams see one row: the ties are across parents too."""
    for V in (3, 100, 2500):
        row = adversarial_rows(V)[name]
        logits = np.broadcast_to(row, (2, 4, V)).copy()
        rng = np.random.default_rng(0)
        check_select(logits, parents_of(kind, 2, 4, rng), 6)
        check_select(logits, parents_of(kind, 2, 4, rng), 50)


@pytest.mark.parametrize("normalize", ["vocab", "allowed"])
@pytest.mark.parametrize("V", [2, 31, 100, 2049])
def test_select_with_bitmask_and_temperature(V, normalize):
    rows = adversarial_rows(V)
    rows = stack({name: row for name, row in rows.items() if name != "plus inf"})
    rng = np.random.default_rng(V)
    for K, k in [(1, 3), (3, 4), (6, 20)]:
        logits = rows[rng.integers(0, len(rows), 4 * K)].reshape(4, K, V)
        for density in (0.8, 2 / V, 0.0):
            allowed = rng.random(logits.shape) < density
            log_probs = parents_of(["random", "thousand"][K % 2], 4, K, rng)
            check_select(logits, log_probs, k, allowed=allowed, normalize=normalize)
            temperature = rng.choice([0.4, 1.0, 1.3], 4 * K)
            check_select(logits, log_probs, k, allowed=allowed, normalize=normalize, temperature=temperature)


def test_scores_that_collide_by_rounding_are_ordered_by_parent_then_adjusted_logit():
    """At a parent's -1000 float32 steps are 2**-14: logits 2**-24 apart give equal scores."""
    V, step = 300, F32(2.0**-24)
    rising = (np.arange(V) * step).astype(F32)
    logits = np.stack([rising - 1, rising, rising + 0])[None]  # a shift changes no log-probability, up to rounding
    log_probs = np.full((1, 3), -1000, F32)
    out, parents, tokens, valid = check_select(logits, log_probs, 12)
    assert valid.all() and out[0, 0] == out[0, 11]
    assert (parents == 0).all() and tokens[0].tolist() == list(range(V - 1, V - 13, -1))
    # one slot later and better by half a step: rounds to the same score, and the earlier parent stays first
    later = np.array([[-1000, np.nextafter(F32(-1000), F32(0)), -1000]], F32)
    check_select(logits, later, 12)
    # the order is by the float32 score, not by what it was before rounding
    a, b = F32(-0.7), np.nextafter(F32(-0.7), F32(0))
    logits = np.log(np.array([[[0.25, 0.75], [0.25 + 1e-7, 0.75 - 1e-7]]])).astype(F32)
    for low, high in [(a, b), (b, a), (a, a)]:
        check_select(logits, np.array([[low - 900, high - 900]], F32), 4)


def test_log_probabilities_never_exceed_their_parents():
    """min(logit - lse, 0): a rounded log-sum-exp must not lift a beam."""
    rng = np.random.default_rng(0)
    for V in (1, 2, 100):
        peaked = np.full((50, 1, V), -60.0, F32)
        peaked[:, 0, V // 2] = rng.normal(size=50) * 30
        log_probs = -rng.random((50, 1)).astype(F32)
        out, *_ = check_select(peaked, log_probs, 1)
        assert (out <= torch.from_numpy(log_probs)).all()


def test_dead_parents_are_never_chosen_even_when_nothing_else_is_left():
    logits = np.zeros((1, 3, 4), F32)
    out, parents, _, valid = check_select(logits, np.array([[-np.inf, -2, -np.inf]], F32), 9)
    assert valid[0].tolist() == [True] * 4 + [False] * 5 and (parents[valid] == 1).all()
    assert (out[0, 4:] == -np.inf).all()


def test_rows_of_dead_parents_are_never_read():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2, 3, 500)).astype(F32)
    log_probs = np.array([[0, -np.inf, -1], [-np.inf, -0.5, -np.inf]], F32)
    want = check_select(logits, log_probs, 5)
    for junk in (np.nan, np.inf, -np.inf, 1e38):
        dirty = np.where(np.isfinite(log_probs)[..., None], logits, F32(junk))
        got = select_beams(torch.from_numpy(dirty), torch.from_numpy(log_probs), 5)
        for x, y in zip(got, want, strict=True):
            assert torch.equal(x, y)


@pytest.mark.parametrize("V", [1, 2, 33, 2049])
def test_width_per_request_and_excluded_tokens_and_padding(V):
    rows = stack(adversarial_rows(V))
    rng = np.random.default_rng(V)
    B, K, k = 4, 3, 7
    logits = rows[rng.integers(0, len(rows), B * K)].reshape(B, K, V)
    log_probs = parents_of("random", B, K, rng)
    whole = check_select(logits, log_probs, k)
    width = torch.tensor([1, 7, 3, 5])
    inside = torch.arange(k) < width[:, None]
    got = select_beams(torch.from_numpy(logits), torch.from_numpy(log_probs), k, width=width)
    assert torch.equal(got.valid, whole.valid & inside)
    assert (got.log_probs[~got.valid] == -torch.inf).all()
    for x, y in zip(got, whole, strict=True):
        assert torch.equal(x[got.valid], y[got.valid])
    # excluded tokens are in the normaliser and are no candidates
    gone = np.unique(rng.integers(0, V, 4))
    lse = topk_log_probs(torch.from_numpy(logits.reshape(B * K, V)), 1).lse.numpy().reshape(B, K)
    adjusted = adjusted_logits(logits.reshape(B * K, V)).reshape(B, K, V)
    for normalize in ("vocab", "allowed"):
        got = select_beams(
            torch.from_numpy(logits),
            torch.from_numpy(log_probs),
            k,
            exclude=torch.from_numpy(gone),
            normalize=normalize,
        )
        for b in range(B):
            want = select_by_sorting(adjusted[b], log_probs[b], lse[b], k, ~np.isin(np.arange(V), gone)[None])
            assert np.array_equal(got.log_probs[b].numpy(), want.log_probs)
            assert np.array_equal(got.tokens[b].numpy()[want.valid], want.tokens[want.valid])
            assert np.array_equal(got.parents[b].numpy()[want.valid], want.parents[want.valid])
    # columns from vocab_size on are padding
    for junk in (np.nan, np.inf, 9.0):
        wide = np.concatenate([logits, np.full((B, K, 40), junk, F32)], 2)
        got = select_beams(torch.from_numpy(wide), torch.from_numpy(log_probs), k, vocab_size=V)
        for x, y in zip(got, whole, strict=True):
            assert torch.equal(x, y)


@pytest.mark.parametrize("normalize", ["vocab", "allowed"])
@pytest.mark.parametrize("V", [40, 3000, 9000])
def test_excluded_tokens_beside_masked_ones(V, normalize):
    """The best tokens are masked, and neighbours of theirs excluded: neither may speak for what lies around it."""
    rng = np.random.default_rng(V)
    B, K = 12, 2
    logits = rng.normal(size=(B, K, V)).astype(F32) * 2
    allowed = rng.random((B, K, V)) < 0.5
    logits[~allowed] += 3
    gone = np.unique(rng.integers(0, V, min(V // 3, 150)))
    mask = packed(allowed.reshape(B * K, V))
    flat, log_probs = torch.from_numpy(logits.reshape(B * K, V)), parents_of("random", B, K, rng)
    lse = topk_log_probs(flat, 1, bitmask=mask, normalize=normalize).lse.numpy().reshape(B, K)
    for k in (1, 2, 9):
        got = select_beams(
            flat,
            torch.from_numpy(log_probs),
            k,
            bitmask=mask,
            exclude=torch.from_numpy(gone),
            normalize=normalize,
        )
        for b in range(B):
            free = allowed[b] & ~np.isin(np.arange(V), gone)
            want = select_by_sorting(logits[b], log_probs[b], lse[b], k, free)
            assert np.array_equal(got.log_probs[b].numpy(), want.log_probs)
            assert np.array_equal(got.tokens[b].numpy()[want.valid], want.tokens[want.valid])
            assert np.array_equal(got.parents[b].numpy()[want.valid], want.parents[want.valid])


VALUES = st.sampled_from([-np.inf, np.nan, np.inf, -0.0, 0.0, 1.0, 1.0 + 2.0**-20, -1.0, 2.0, 2.0 + 2.0**-21, -50.0])
PLAIN = st.sampled_from([-np.inf, -0.0, 0.0, 1.0, 1.0 + 2.0**-20, -1.0, 2.0, 2.0 + 2.0**-21, -50.0])
SCORES = st.sampled_from([0.0, -1.0, -1.0 - 2.0**-20, -1000.0, -1e6, -np.inf])


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_any_small_request(data):
    B, K = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4))
    V = data.draw(st.sampled_from([1, 2, 3, 5, 33, 65]))
    faults = data.draw(st.booleans())
    n = B * K * V
    palette = data.draw(st.lists(VALUES if faults else PLAIN, min_size=1, max_size=5))
    rng = np.random.default_rng(data.draw(st.integers(0, 10**6)))
    logits = rng.choice(np.array(palette, F32), n).reshape(B, K, V)
    parents = data.draw(st.lists(SCORES, min_size=B * K, max_size=B * K))
    log_probs = np.array(parents, F32).reshape(B, K)
    k = data.draw(st.integers(1, K * V + 2))
    options = {}
    if data.draw(st.booleans()):
        options["temperature"] = rng.choice([0.5, 1.0, 3.0], B * K)
    if not faults and data.draw(st.booleans()):
        options["allowed"] = rng.random((B, K, V)) < 0.6
        options["normalize"] = data.draw(st.sampled_from(["vocab", "allowed"]))
    check_select(logits, log_probs, k, **options)


# ---------------------------------------------------------------------------------------------------------------------
# bitmasks, backtrace


@pytest.mark.parametrize("V", [1, 2, 31, 32, 33, 64, 100, 1000])
def test_pack_bitmask_is_xgrammars_layout(V):
    rng = np.random.default_rng(V)
    for shape in [(V,), (3, V), (2, 3, V)]:
        mask = rng.random(shape) < 0.5
        if len(shape) == 1:
            continue
        out = pack_bitmask(torch.from_numpy(mask))
        assert out.dtype == torch.int32 and torch.equal(out, torch.from_numpy(pack_by_hand(mask)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("V", [1, 31, 32, 33, 100, 3000])
def test_apply_bitmask_sets_minus_infinity_in_place(V, dtype):
    rng = np.random.default_rng(V)
    allowed = rng.random((5, V)) < 0.5
    logits = torch.from_numpy(rng.normal(size=(5, V))).to(dtype)
    logits[0, 0] = float("nan")
    want = torch.where(torch.from_numpy(allowed), logits, torch.tensor(-torch.inf, dtype=dtype))
    out = apply_bitmask_(logits, pack_bitmask(torch.from_numpy(allowed)))
    assert torch.equal(torch.nan_to_num(logits, 99.0), torch.nan_to_num(want, 99.0))
    assert out is None or out.data_ptr() == logits.data_ptr()


@pytest.mark.parametrize(("T", "B", "K"), [(1, 1, 1), (1, 2, 3), (7, 2, 4), (20, 3, 1), (5, 4, 9)])
def test_backtrace_follows_parents(T, B, K):
    rng = np.random.default_rng(T)
    tokens = torch.from_numpy(rng.integers(0, 1000, (T, B, K)))
    parents = torch.from_numpy(rng.integers(0, K, (T, B, K)))
    out = backtrace(tokens, parents)
    assert out.shape == (B, K, T)
    for b in range(B):
        for k in range(K):
            slot, path = k, []
            for t in reversed(range(T)):
                path.append(int(tokens[t, b, slot]))
                slot = int(parents[t, b, slot])
            assert out[b, k].tolist() == path[::-1]


# ---------------------------------------------------------------------------------------------------------------------
# arguments


@pytest.mark.parametrize(
    ("argument", "call"),
    [
        ("logits", lambda: topk_log_probs(torch.zeros(5), 1)),
        ("logits", lambda: topk_log_probs(torch.zeros(2, 5, dtype=torch.int64), 1)),
        ("k", lambda: topk_log_probs(torch.zeros(2, 5), 0)),
        ("k", lambda: topk_log_probs(torch.zeros(2, 5), -2)),
        ("bitmask", lambda: topk_log_probs(torch.zeros(2, 5), 1, bitmask=torch.zeros(2, 1))),
        ("bitmask", lambda: topk_log_probs(torch.zeros(2, 40), 1, bitmask=torch.zeros(2, 1, dtype=torch.int32))),
        ("bitmask", lambda: topk_log_probs(torch.zeros(2, 5), 1, bitmask=torch.zeros(3, 1, dtype=torch.int32))),
        ("temperature", lambda: topk_log_probs(torch.zeros(2, 5), 1, temperature=torch.zeros(3))),
        ("normalize", lambda: topk_log_probs(torch.zeros(2, 5), 1, normalize="rows")),
        ("(logits|log_probs)", lambda: select_beams(torch.zeros(5, 7), torch.zeros(2, 3), 1)),
        ("(logits|log_probs)", lambda: select_beams(torch.zeros(2, 2, 7), torch.zeros(2, 3), 1)),
        ("log_probs", lambda: select_beams(torch.zeros(6, 7), torch.zeros(6), 1)),
        ("log_probs", lambda: select_beams(torch.zeros(6, 7), torch.zeros(2, 3, dtype=torch.float64), 1)),
        ("k", lambda: select_beams(torch.zeros(6, 7), torch.zeros(2, 3), 0)),
        ("normalize", lambda: select_beams(torch.zeros(6, 7), torch.zeros(2, 3), 1, normalize=None)),
        ("parents", lambda: backtrace(torch.zeros(3, 1, 2).long(), torch.zeros(3, 1, 3).long())),
        ("tokens", lambda: backtrace(torch.zeros(3, 2).long(), torch.zeros(3, 2).long())),
        ("mask", lambda: pack_bitmask(torch.zeros(3, 2))),
        ("bitmask", lambda: apply_bitmask_(torch.zeros(3, 40), torch.zeros(3, 1, dtype=torch.int32))),
    ],
)
def test_bad_arguments_are_named(argument, call):
    with pytest.raises((ValueError, TypeError), match=rf"^{argument}: expected .+, got .+"):
        call()
