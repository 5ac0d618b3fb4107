"""The operations on several models' logits: against float64, and kernels against torch definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from flashbeam.kernels import (
    FLAG_INF,
    contrast,
    divergence,
    filter_bitmask,
    mixture,
    pack_bitmask,
    summarize,
    unpack_bitmask,
)
from flashbeam.kernels.filters import least_exponent
from flashbeam.kernels.triton.contrast import launch_contrast
from flashbeam.kernels.triton.divergence import launch_divergence
from flashbeam.kernels.triton.mixture import launch_mixture

INF, NAN = float("inf"), float("nan")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # numpy, under the interpreter


def rows_of(models, rows=6, vocab=300, scale=4.0):
    return [(torch.randn(rows, vocab) * scale).to(DTYPES[i % 3]) for i in range(models)]


def lse_of(logits, temperature=None, vocab_size=None):
    """float32 [R, M]."""
    each = [None] * len(logits) if temperature is None else temperature.unbind(1)
    pairs = zip(logits, each, strict=True)
    return torch.stack([summarize(x, temperature=t, vocab_size=vocab_size).lse for x, t in pairs], 1)


def log_softmax64(x, temperature=None):
    x = x.double() if temperature is None else x.double() / temperature.double()
    return x.log_softmax(-1)


def within_budget(got, exact, plain):
    """Twice the error of plain float32 torch, plus 2**-20 (docs/numerics.md)."""
    finite = exact.isfinite()
    assert torch.equal(got.isfinite(), finite)
    error, budget = ((y.double() - exact)[finite].abs().max() for y in (got, plain))
    assert error <= 2 * budget + 2**-20, (error, budget)


# ---------------------------------------------------------------------------------------------------------------------
# mixtures


@pytest.mark.parametrize("models", [1, 2, 3, 4, 5, 9])  # a kernel takes four at a time
@pytest.mark.parametrize("tempered", [False, True])
def test_probability_mixture(models, tempered, device):
    logits, weights = rows_of(models), torch.rand(6, models)
    temperature = torch.rand(6, models) + 0.5 if tempered else None
    weights[1], weights[1, models // 2], weights[2], weights[3, 0] = 0.0, 0.7, 0.0, 0.0
    weights[3, -1], logits[0][3] = 1.0, NAN if models > 1 else 0.0  # not read
    lse = lse_of(logits, temperature)
    y = mixture(logits, weights, lse=lse, temperature=temperature)
    assert y.dtype == torch.float32 and y.shape == (6, 300)
    log_probs = torch.stack(
        [log_softmax64(x, None if temperature is None else temperature[:, i, None]) for i, x in enumerate(logits)]
    )
    log_probs[0, 3] = 0.0
    exact = (log_probs + weights.double().log().T[:, :, None]).logsumexp(0)
    plain = (log_probs.float() + weights.log().T[:, :, None]).logsumexp(0)
    shared = [0, 4, 5] if models == 2 else [0, 3, 4, 5] if models > 2 else []
    for row in shared:
        within_budget(y[row], exact[row], plain[row])
    assert (y[2] == -INF).all()
    alone = logits[models // 2][1].float()
    assert torch.equal(y[1], alone if temperature is None else alone / temperature[1, models // 2])
    kernel = launch_mixture(*to(device, logits, weights, lse, temperature, None, None), 300, False)
    assert torch.equal(kernel[1].cpu(), y[1]) and torch.equal(kernel[2].cpu(), y[2])
    for row in shared:
        within_budget(kernel[row].cpu(), exact[row], plain[row])


def to(device, *args):
    return [[x.to(device) for x in a] if isinstance(a, list) else a if a is None else a.to(device) for a in args]


@pytest.mark.parametrize("models", [1, 2, 5])
@pytest.mark.parametrize("normal", [False, True])
def test_log_mixture_is_one_sum_in_order(models, normal, device):
    logits, weights, temperature = rows_of(models), torch.rand(6, models) * 2, torch.rand(6, models) + 0.5
    weights[1, 0], weights[2] = 0.0, 0.0
    lse = lse_of(logits, temperature) if normal else None
    y = mixture(logits, weights, kind="log", lse=lse, temperature=temperature)
    total = np.zeros((6, 300), np.float32)
    for i, x in enumerate(logits):
        a = x.float().numpy() / temperature[:, i, None].numpy()
        if normal:
            a = np.minimum(a - lse[:, i, None].numpy(), np.float32(0))
        total += a * weights[:, i, None].numpy()
    total[(weights == 0).all(1)] = -INF
    assert torch.equal(y, torch.from_numpy(total))
    kernel = launch_mixture(*to(device, logits, weights, lse, temperature, None, None), 300, True)
    assert torch.equal(kernel.cpu(), y)


@pytest.mark.parametrize("kind", ["probability", "log"])
def test_one_hot_models(kind, device):
    logits, weights = rows_of(2), torch.tensor([0.25, 0.75]).repeat(6, 1)
    onehot = torch.full((6, 2), -1)
    onehot[0, 1], onehot[1, 1], weights[1, 0] = 7, 299, 0.0
    logits[1][:2] = NAN  # not read
    lse = lse_of(logits)
    y = mixture(logits, weights, kind=kind, lse=lse, onehot=onehot)
    kernel = launch_mixture(*to(device, logits, weights, lse, None, onehot, None), 300, kind == "log").cpu()
    for got in (y, kernel):
        assert got[1, 299] == 0 and (got[1, :299] == -INF).all()
        p = log_softmax64(logits[0][0])
        if kind == "probability":
            want = (0.25 * p.exp() + 0.75 * (torch.arange(300) == 7)).log()
            assert (got[0].double() - want).abs().max() < 1e-5
        else:
            assert got[0, 7] == 0.25 * (logits[0][0, 7] - lse[0, 0]) and (got[0].isfinite().sum() == 1)
    assert not y[2:].isnan().any()


def test_data_faults_come_through(device):
    logits, weights = rows_of(2), torch.tensor([0.25, 0.75]).repeat(6, 1)
    logits[0][0, 5], logits[1][1, 6], logits[1][2, 7], logits[1][3] = NAN, NAN, INF, -INF
    logits[1][4], weights[4, 1] = NAN, 0.0  # not read
    logits[0][5, 9], logits[1][5, 9] = -INF, -INF
    lse = lse_of(logits)
    for loglinear, given in ((False, lse), (True, None), (True, lse)):
        y = mixture(logits, weights, kind="log" if loglinear else "probability", lse=given)
        kernel = launch_mixture(*to(device, logits, weights, given, None, None, None), 300, loglinear)
        for got in (y, kernel.cpu()):
            assert got[0].isnan().nonzero().tolist() == [[5]] and got[1].isnan().nonzero().tolist() == [[6]]
            assert (got[5] == -INF).nonzero().tolist() == [[9]]
            if loglinear and given is not None:  # log-probabilities: of an infinite normaliser there are none
                assert (got[2] == -INF).all()
            else:
                assert summarize(got).flags.tolist() == [1, 1, 2, 0, 0, 0]
            if loglinear:
                assert (got[3] == -INF).all()
            else:  # only the first model has anything to say there
                want = log_softmax64(logits[0][3]) + math.log(0.25)
                assert (got[3].double() - want).abs().max() < 1e-5


def test_padding_and_inactive_rows_are_not_read(device):
    logits = [torch.full((4, 400), NAN)[::2, 50:350], torch.full((2, 350), NAN).bfloat16()[:, :300]]
    for x in logits:
        x[0, :90] = torch.randn(90)
    active, weights = torch.tensor([True, False]), torch.rand(2, 2)
    dense = [x[:1, :90].contiguous() for x in logits]
    lse = lse_of(dense).repeat(2, 1)
    for loglinear in (False, True):
        kind = "log" if loglinear else "probability"
        y = mixture(logits, weights, kind=kind, lse=lse, active=active, vocab_size=90)
        assert torch.equal(y[:1], mixture(dense, weights[:1], kind=kind, lse=lse[:1])) and y.shape == (2, 90)
        kernel = launch_mixture(*to(device, logits, weights, lse, None, None, active), 90, loglinear).cpu()
        assert torch.allclose(kernel[0], y[0], atol=2e-6)
        assert kernel[1].isnan().all() and y[1].isnan().all()  # as conftest left it
    assert mixture([torch.zeros(0, 9)], torch.zeros(0, 1), kind="log").shape == (0, 9)


# ---------------------------------------------------------------------------------------------------------------------
# contrast


def contrast_both(
    device, expert, amateurs, *, weight=None, alpha=0.1, temperature=None, other=None, choice=None, mask=None
):
    """What definition and kernel say, which is the same."""
    lse = summarize(expert, temperature=temperature).lse
    amateur_lse = torch.stack([summarize(x, temperature=other).lse for x in amateurs], 1)
    top = expert.float().nan_to_num(-INF, INF, -INF)
    top = (top if temperature is None else top / temperature[:, None]).amax(1)
    options = {"temperature": temperature, "amateur_temperature": other, "choice": choice, "bitmask": mask}
    y, flags = contrast(expert, amateurs, lse, amateur_lse, top, weight=weight, alpha=alpha, **options)
    args = to(device, expert, amateurs, lse, amateur_lse, top, temperature, other, choice, None, mask)
    kernel = launch_contrast(*args, expert.shape[1], weight, least_exponent(alpha))
    assert torch.equal(kernel[0].cpu(), y) and torch.equal(kernel[1].cpu(), flags)
    return y, flags


@pytest.mark.parametrize("weight", [None, 0.0, 0.7])
@pytest.mark.parametrize("dtype", DTYPES)
def test_contrast_is_its_formula(weight, dtype, device):
    expert, (amateur,) = (torch.randn(5, 300) * 3).to(dtype), rows_of(1, rows=5)
    temperature, other = torch.rand(5) + 0.5, torch.rand(5) + 0.5
    y, flags = contrast_both(device, expert, [amateur], weight=weight, temperature=temperature, other=other)
    e, a = log_softmax64(expert, temperature[:, None]), log_softmax64(amateur, other[:, None])
    head = unpack_bitmask(filter_bitmask(expert, min_p=0.1, temperature=temperature), 300)
    assert torch.equal(y > -INF, head)
    want = e - a if weight is None else e + weight * (e - a)
    assert (y.double() - want)[head].abs().max() < 1e-5 and flags.sum() == 0
    best = (expert.float() / temperature[:, None]).argmax(1, keepdim=True)
    assert head.gather(1, best).all()


def test_contrast_with_itself(device):
    expert = torch.randn(4, 300)
    y, _ = contrast_both(device, expert, [expert.clone()])
    assert (y[y > -INF] == 0).all() and (y > -INF).any(1).all()
    y, _ = contrast_both(device, expert, [expert.clone()], weight=0.7)
    log_probs = torch.minimum(expert - summarize(expert).lse[:, None], torch.tensor(0.0))
    assert torch.equal(y, log_probs.masked_fill(y == -INF, -INF))
    assert (contrast_both(device, expert, [expert], alpha=1.0)[0] > -INF).sum(1).tolist() == [1] * 4


def test_each_row_has_its_amateur(device):
    expert, *amateurs = rows_of(4)
    choice = torch.tensor([2, 0, 1, 1, 0, 2])
    y, _ = contrast_both(device, expert, amateurs, choice=choice)
    for i, amateur in enumerate(amateurs):
        assert torch.equal(y[choice == i], contrast_both(device, expert, [amateur])[0][choice == i])


def test_faults_of_a_contrast(device):
    expert, amateur = torch.randn(6, 300), torch.randn(6, 300)
    expert[:, 5] = 9.0
    amateur[0, 5], amateur[1, 5], amateur[2, 5], amateur[3], expert[4, 5], expert[5, 7] = -INF, NAN, INF, -INF, INF, NAN
    y, flags = contrast_both(device, expert, [amateur], alpha=1e-9)
    assert flags.tolist() == [FLAG_INF, 0, FLAG_INF, FLAG_INF, 0, 0]  # an amateur's own are the summary's
    assert not (y.isnan() | (y == INF)).any()
    assert (
        (y[[0, 1], 5] == -INF).all() and (y[[0, 1]] > -INF).any(1).all() and (y[2:5] == -INF).all() and y[5, 7] == -INF
    )
    y, flags = contrast_both(device, expert, [amateur], alpha=1e-9, weight=0.0)  # has no use for the amateur
    assert flags.sum() == 0 and (y[:4, 5] > -1).all()


def test_the_head_of_a_contrast_is_of_what_the_bitmask_allows(device):
    expert, amateur, allowed = torch.randn(4, 300), torch.randn(4, 300), torch.rand(4, 300) < 0.5
    allowed[:, 5], expert[:, 5], amateur[:2, 5] = False, 2.0, -INF
    allowed[0, 9], expert[0, 9], amateur[0, 9] = True, 2.0, -INF
    padded = pack_bitmask(torch.cat([allowed, torch.ones(4, 200, dtype=torch.bool)], 1))  # a row stride of its own
    for weight in (None, 0.5, 0.0):
        whole, _ = contrast_both(device, expert, [amateur], alpha=1e-9, weight=weight)
        for mask in (pack_bitmask(allowed), padded):
            y, flags = contrast_both(device, expert, [amateur], alpha=1e-9, weight=weight, mask=mask)
            assert torch.equal(y, whole.masked_fill(~allowed, -INF))
            assert flags.tolist() == [FLAG_INF * (weight != 0), 0, 0, 0]


# ---------------------------------------------------------------------------------------------------------------------
# divergence


@pytest.mark.parametrize("kind", ["jsd", "dola"])
@pytest.mark.parametrize("vocab", [1, 300, 4500])
def test_divergence(kind, vocab, device):
    x, other = torch.randn(4, vocab) * 2, (torch.randn(4, vocab) * 2).bfloat16()
    other[1], x[2, : vocab // 2] = x[1].bfloat16(), -INF
    temperature, tempered = torch.rand(4) + 0.5, torch.rand(4) + 0.5
    lse, other_lse = summarize(x, temperature=temperature).lse, summarize(other, temperature=tempered).lse
    options = {"temperature": temperature, "other_temperature": tempered}
    got = divergence(x, other, lse, other_lse, kind=kind, **options)
    kernel = launch_divergence(
        *to(device, x, other, lse, other_lse, temperature, tempered, None), vocab, kind == "dola"
    ).cpu()
    lp, lq = log_softmax64(x, temperature[:, None]), log_softmax64(other, tempered[:, None])
    p, q = lp.exp(), lq.exp()
    lm = ((p + q) / 2).log()
    if kind == "jsd":
        want = (torch.where(p > 0, p * (lp - lm), 0.0) + q * (lq - lm)).sum(1) / 2
        assert (want >= -1e-9).all() and (want <= math.log(2)).all()
    else:
        m = (p + q) / 2
        want = (m * (lm - lp) + m * (lm - lq)).sum(1) / 2
    for got_of in (got, kernel):
        assert torch.equal(got_of.isinf(), want.isinf())
        assert (got_of - want).nan_to_num(0, 0, 0).abs().max() < 2e-6
    assert torch.equal(
        divergence(other, x, other_lse, lse, kind=kind, temperature=tempered, other_temperature=temperature), got
    )
    assert divergence(x, x, lse, lse, kind=kind, **{key: temperature for key in options})[[0, 1, 3]].abs().max() < 1e-6


# ---------------------------------------------------------------------------------------------------------------------
# all of them


def test_batch_invariant_bitwise():
    logits, weights = [torch.randn(40, 9001) * 3, torch.randn(40, 9001)], torch.rand(40, 2)
    lse = lse_of(logits)
    top, choice = logits[0].amax(1), torch.zeros(40, dtype=torch.int64)

    def run(rows):
        x, y = (field[rows] for field in logits)
        l, m = lse[rows].unbind(1)
        return (
            mixture([x, y], weights[rows], lse=lse[rows]),
            contrast(x, [y], l, m[:, None], top[rows], weight=0.5, choice=choice[rows])[0],
            divergence(x, y, l, m),
            divergence(x, y, l, m, kind="dola"),
        )

    whole = run(slice(None))
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            for row in (0, 17, 39):
                for one, all_rows in zip(run(slice(row, row + 1)), whole, strict=True):
                    assert torch.equal(one[0], all_rows[row])
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("full", [False, True])
def test_opcheck(full, device):
    x, y = torch.randn(4, 300, device=device), torch.randn(4, 300, device=device).bfloat16()
    lse, one = torch.stack([summarize(x).lse, summarize(y).lse], 1), torch.ones(4, device=device)
    temperature = one if full else None
    active = torch.ones(4, dtype=torch.bool, device=device) if full else None
    onehot = torch.full((4, 2), -1, device=device) if full else None
    choice = torch.zeros(4, dtype=torch.int64, device=device) if full else None
    mask = torch.full((4, 10), -1, dtype=torch.int32, device=device) if full else None
    check, ops = torch.library.opcheck, torch.ops.flashbeam
    model_temperature = torch.ones(4, 2, device=device) if full else None
    check(ops.mixture, ([x, y], torch.rand(4, 2, device=device), lse, model_temperature, onehot, active, 300, full))
    rows = (lse[:, 0].contiguous(), lse[:, 1:].contiguous())
    check(
        ops.contrast,
        (x, [y], *rows, one, temperature, temperature, choice, active, mask, 300, 0.5 if full else None, -2.0),
    )
    check(ops.divergence, (x, y, rows[0], rows[1][:, 0].contiguous(), temperature, temperature, active, 300, full))


def test_errors_name_the_argument():
    x, weights, lse = torch.zeros(2, 9), torch.ones(2, 2), torch.zeros(2, 2)
    with pytest.raises(ValueError, match="logits: expected one tensor or more, got none"):
        mixture([], weights)
    with pytest.raises(ValueError, match=r"logits\[1\]: expected shape \[R, V\] = \[2, 9\], got \[2, 8\]"):
        mixture([x, torch.zeros(2, 8)], weights, lse=lse)
    with pytest.raises(TypeError, match=r"logits\[1\]: expected float32 or float16 or bfloat16, got float64"):
        mixture([x, x.double()], weights, lse=lse)
    with pytest.raises(ValueError, match=r"weights: expected shape \[R, M\] = \[2, 2\], got \[2, 1\]"):
        mixture([x, x], weights[:, :1], lse=lse)
    with pytest.raises(ValueError, match="kind: expected 'probability' or 'log', got 'sum'"):
        mixture([x, x], weights, kind="sum")
    with pytest.raises(ValueError, match="lse: expected a tensor for kind='probability', got None"):
        mixture([x, x], weights)
    with pytest.raises(ValueError, match=r"amateurs\[0\]: expected shape"):
        contrast(x, [x[:1]], lse[:, 0], lse[:, :1], lse[:, 0])
    with pytest.raises(ValueError, match="weight: expected a number of 0 or more, or None, got -1"):
        contrast(x, [x], lse[:, 0], lse[:, :1], lse[:, 0], weight=-1)
    with pytest.raises(ValueError, match=r"bitmask: expected shape \[R, ceil\(V / 32\)\] = \[2, 1\], got \[1, 1\]"):
        contrast(x, [x], lse[:, 0], lse[:, :1], lse[:, 0], bitmask=torch.ones(1, 1, dtype=torch.int32))
    with pytest.raises(ValueError, match="kind: expected 'jsd' or 'dola', got 'kl'"):
        divergence(x, x, lse[:, 0], lse[:, 0], kind="kl")
