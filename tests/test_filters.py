"""Top-k, top-p and min-p: against sorting in float64, and kernel against torch definition, bit for bit."""

from __future__ import annotations

import math

import pytest
import torch

from flashbeam.kernels import pack_bitmask, unpack_bitmask
from flashbeam.kernels.filters import filter_bitmask_op, keep_of_best, least_exponent, parts_of
from flashbeam.kernels.triton.filters import launch_filter_bitmask

INF, NAN = float("inf"), float("nan")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
OFF = (0, 1.0, 0.0)
# each is top_k, then top_p, then min_p
FILTERS = [OFF, (7, 1.0, 0.0), (0, 0.9, 0.0), (0, 1.0, 0.05), (20, 0.7, 0.1)]


def by_sorting(logits, bitmask, temperature, top_k, top_p, min_p):
    """bool [R, V]: sort everything, in float64."""
    out = torch.zeros(logits.shape, dtype=torch.bool)
    for row, x in enumerate(logits.float()):
        adjusted = x if temperature is None else x / temperature[row]
        adjusted = adjusted.double().nan_to_num(nan=-INF, posinf=INF, neginf=-INF)
        if bitmask is not None:
            adjusted[~unpack_bitmask(bitmask[row], logits.shape[1])] = -INF
        order = adjusted.sort(descending=True, stable=True).indices
        order = order[adjusted[order] > -INF]
        if len(order) == 0 or adjusted[order[0]] == INF:
            continue
        order = order[: top_k or None]
        p = (adjusted[order] - adjusted[order[0]]).exp()
        if top_p < 1:
            reached = p.cumsum(0) >= top_p * p.sum() * (1 - 1e-9)
            order = order[: reached.double().argmax() + 1]
        if min_p > 0:
            order = order[p[: len(order)] >= min_p * (1 - 1e-7)]
        out[row, order] = True
    return out


def check(logits, filters, device, bitmask=None, temperature=None, vocab_size=None, kernel=True, sort=True):
    """Definition and kernel keep the same tokens, which are those that sorting keeps."""
    vocab_size = vocab_size or logits.shape[1]
    got = filter_bitmask_op(logits, vocab_size, bitmask, temperature, *filters)
    assert got.dtype == torch.int32 and got.shape == (len(logits), -(-vocab_size // 32))
    if sort:
        want = by_sorting(logits[:, :vocab_size], bitmask, temperature, *filters)
        assert torch.equal(unpack_bitmask(got, vocab_size), want)
        assert torch.equal(got, pack_bitmask(want))  # bits behind the vocabulary are 0
    if kernel:
        moved = [t if t is None else t.to(device) for t in (logits, bitmask, temperature)]
        assert torch.equal(launch_filter_bitmask(moved[0], vocab_size, *moved[1:], *filters).cpu(), got)
    return unpack_bitmask(got, vocab_size)


@pytest.mark.parametrize("filters", FILTERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_sorting(dtype, filters, device):
    check((torch.randn(1, 300) * 3).to(dtype), filters, device)
    bits = pack_bitmask(torch.rand(2, 300) < 0.6)
    check((torch.randn(2, 300) * 3).to(dtype), filters, device, bits, torch.tensor([0.6, 1.8]))


@pytest.mark.parametrize("filters", [(7, 1.0, 0.0), (0, 0.9, 0.0), (20, 0.7, 0.1)])
def test_matches_sorting_over_several_blocks(filters, device):
    check(torch.randn(1, 4200) * 3, filters, device)


@pytest.mark.parametrize("scale", [0.01, 1.0, 3.0, 10.0])
@pytest.mark.parametrize("vocab_size", [255, 20000])
def test_every_way_of_the_definition_matches_sorting(vocab_size, scale, device):
    """Few values from groups, all of them, and bins of flat rows; a bfloat16 row ties a lot."""
    logits = torch.randn(5, vocab_size) * scale
    for filters in [(k, 1.0, 0.0) for k in (1, 2, 33, 254, 5000, 10**6)] + [(0, p, 0.0) for p in (1e-12, 0.5, 0.99)]:
        check(logits, filters, device, kernel=False)
        check(logits.bfloat16(), filters, device, kernel=False)
    check(logits, (5000, 0.95, 1e-6), device, kernel=False)


def test_of_equal_tokens_the_lower_are_kept(device):
    logits = torch.full((2, 100), 1.25)
    logits[1, :5], logits[1, 50:60] = -1.0, 3.0
    kept = check(logits, (7, 1.0, 0.0), device)
    assert kept[0].nonzero()[:, 0].tolist() == list(range(7)) and kept[1].nonzero()[:, 0].tolist() == [*range(50, 57)]
    kept = check(logits, (0, 0.9, 0.0), device)
    assert kept[0].nonzero()[:, 0].tolist() == list(range(90))  # not 91, although 0.9 is not a float
    kept = check(logits, (9, 0.5, 0.0), device)  # 4.5 of 9
    assert kept[0].nonzero()[:, 0].tolist() == list(range(5)) and kept[1].nonzero()[:, 0].tolist() == [*range(50, 55)]
    kept = check(logits, (0, 1.0, 1.0), device)
    assert kept.sum(1).tolist() == [100, 10]
    many = torch.zeros(1, 3000)  # more than the definition lists
    many[0, 7] = 1.0
    kept = check(many, (0, 0.5, 0.0), device, kernel=False)
    assert kept[0, : kept.sum()].all()
    zeros = torch.where(torch.arange(70) % 3 == 0, 0.0, -0.0)[None]
    assert check(zeros, (11, 1.0, 0.0), device)[0].nonzero()[:, 0].tolist() == list(range(11))


@pytest.mark.parametrize("filters", [(5, 1.0, 0.0), (23, 1.0, 0.0), (0, 0.6, 0.0), (40, 0.8, 0.0)])
def test_cuts_among_tokens_that_tie(filters, device):
    """Whatever pass of the bisection rejects a value last, what is above the cut is counted."""
    check((torch.randn(6, 10) * 2).repeat(1, 7), filters, device)
    below = torch.tensor(1.5).view(torch.int32) - torch.arange(1, 13, dtype=torch.int32)  # by 1 to 12 steps of float32
    logits = below.view(torch.float32)[:, None].repeat(1, 50)
    logits[:, 20:23] = 1.5
    check(logits, filters, device)


def test_best_tokens_behind_the_last_whole_group(device):
    logits = torch.randn(3, 20011)
    logits[:, -11:] += torch.tensor([5.0, 9.0, 0.0])[:, None]
    for filters in [(1, 1.0, 0.0), (30, 1.0, 0.0), (0, 0.5, 0.0)]:
        check(logits, filters, device, kernel=False)


def test_one_token_is_always_kept(device):
    logits = torch.randn(2, 70) * 20
    for filters in [(1, 1.0, 0.0), (0, 1e-30, 0.0), (0, 1.0, 1.0), (1, 1e-30, 1.0)]:
        assert torch.equal(check(logits, filters, device).nonzero()[:, 1], logits.argmax(1))
    assert check(torch.zeros(2, 1), (3, 0.5, 0.5), device).tolist() == [[True]] * 2


def test_top_p_counts_what_top_k_keeps(device):
    """Of ten equal tokens the four that top_k keeps are all the mass there is: half of it is two."""
    assert check(torch.zeros(1, 10), (4, 0.5, 0.0), device).sum() == 2


@pytest.mark.parametrize("filters", FILTERS)
def test_rows_with_faults(filters, device):
    logits = torch.randn(6, 70)
    logits[0], logits[1], logits[2, 9], logits[3, ::2], logits[4, :-3] = -INF, NAN, INF, NAN, -INF
    bits = pack_bitmask(torch.ones(6, 70, dtype=torch.bool))
    bits[5] = 0
    kept = check(logits, filters, device, bitmask=bits)
    assert kept[[0, 1, 2, 5]].sum() == 0 and kept[3].any() and kept[4].any() and not kept[3, ::2].any()


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")  # numpy, under the interpreter
def test_extreme_logits_and_temperatures(device):
    huge = torch.randn(2, 100) * 7e37
    for filters in FILTERS[2:4]:
        check(huge, filters, device)
    usual, temperature = torch.randn(3, 100), torch.tensor([1e-3, 1e30, 1e-38])
    check(usual, (7, 0.9, 0.01), device, temperature=temperature, sort=False)


def test_padding_is_never_read_and_rows_may_be_strided(device):
    wide = torch.full((4, 400), NAN)
    logits = wide[::2, 100:390]
    logits[:, :90] = torch.randn(2, 90)
    bits = torch.zeros(4, 20, dtype=torch.int32)[1::2, 5:15]
    bits[:, :3] = pack_bitmask(torch.rand(2, 90) < 0.5)
    strided = check(logits, (20, 0.7, 0.01), device, bitmask=bits, vocab_size=90)
    dense = check(logits[:, :90].contiguous(), (20, 0.7, 0.01), device, bitmask=bits[:, :3].contiguous(), kernel=False)
    assert torch.equal(strided, dense)
    assert check(torch.zeros(0, 70), (3, 0.5, 0.5), device).shape == (0, 70)


def test_kept_of_a_list_is_what_is_kept_of_the_row(device):
    logits = (torch.randn(20, 500) * 3).bfloat16().float()
    logits[0], logits[1, 3:] = -INF, -INF
    best = logits.sort(dim=1, descending=True, stable=True)
    for top_p, min_p in [(1.0, 0.0), (0.8, 0.0), (1.0, 0.1), (0.9, 0.05)]:
        keep = keep_of_best(best.values[:, :40], top_p, min_p)
        listed = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, best.indices[:, :40], keep)
        assert torch.equal(listed, check(logits, (40, top_p, min_p), device, kernel=False))


def test_parts_are_rounded_down():
    assert parts_of(0.5) == 2**29 and parts_of(math.nextafter(1, 0)) == 2**30 - 1 and parts_of(1e-30) == 0
    assert least_exponent(1.0) == 0.0 and least_exponent(0.0) == -INF


def test_batch_invariant_bitwise():
    logits = torch.randn(200, 12000) * torch.linspace(0.1, 5, 200)[:, None]
    whole = filter_bitmask_op(logits, 12000, None, None, 0, 0.8, 0.0)
    for threads in (1, 3):
        torch.set_num_threads(threads)
        for row in (0, 90, 199):
            alone = filter_bitmask_op(logits[row : row + 1], 12000, None, None, 0, 0.8, 0.0)
            assert torch.equal(alone[0], whole[row])
    torch.set_num_threads(1)


@pytest.mark.parametrize("full", [False, True])
def test_opcheck(full, device):
    logits, temperature = torch.randn(4, 300, device=device), torch.rand(4, device=device) + 0.5 if full else None
    bits = pack_bitmask(torch.rand(4, 300, device=device) < 0.5) if full else None
    torch.library.opcheck(torch.ops.flashbeam.filter_bitmask, (logits, 300, bits, temperature, 20, 0.9, 0.01))
