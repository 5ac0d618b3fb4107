"""Conditional Poisson samples against sums over all subsets, exact decimals, and, with a tail, all candidates."""

from __future__ import annotations

import math
from decimal import Decimal, getcontext
from itertools import combinations

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from flashbeam.kernels.poisson import conditional_poisson, words_needed

INF = float("inf")
getcontext().prec = 60


def draw(log_probs, sizes, k, seed=0, **tail):
    """A sample with words of torch's generator; one size for all requests, or one each."""
    log_probs = torch.as_tensor(log_probs, dtype=torch.float32)
    batch = log_probs.shape[0]
    sizes = torch.as_tensor(sizes).expand(batch).contiguous()
    words = torch.randint(0, 1 << 32, (batch, words_needed(k)), generator=torch.Generator().manual_seed(seed))
    return conditional_poisson(log_probs, sizes, k, words, **tail)


def random_log_probs(n, seed=0, scale=1.5, rest=0.2):
    """Candidates that leave a share ``rest`` of the mass to others."""
    generator = torch.Generator().manual_seed(seed)
    return torch.log_softmax(torch.randn(n, generator=generator) * scale, 0) + math.log1p(-rest)


def odds(log_probs):
    """p / (1 - p) as decimals; the candidates must not be certain."""
    p = [Decimal(float(x)).exp() if x > -INF else Decimal(0) for x in log_probs]
    return [x / (1 - x) for x in p]


def symmetric(weights, k):
    """Elementary symmetric polynomials up to degree k."""
    e = [Decimal(1)] + [Decimal(0)] * k
    for w in weights:
        for m in range(k, 0, -1):
            e[m] += w * e[m - 1]
    return e


def exact_pi(log_probs, k):
    """All inclusion probabilities, by leaving each candidate out in turn."""
    w = odds(log_probs)
    whole = symmetric(w, k)[k]
    return [float(x * symmetric(w[:i] + w[i + 1 :], k - 1)[k - 1] / whole) for i, x in enumerate(w)]


def subset_law(log_probs, k):
    w = [float(x) for x in odds(log_probs)]
    law = {subset: math.prod(w[i] for i in subset) for subset in combinations(range(len(w)), k)}
    whole = sum(law.values())
    return {subset: x / whole for subset, x in law.items()}


def check_pi(sample, pi, rtol=1e-5):
    """Every pi of every request equals the one of its candidate."""
    chosen = sample.chosen
    got = sample.log_inclusion.double()
    want = torch.tensor(pi, dtype=torch.float64).log()[chosen.clamp(min=0)]
    assert bool((chosen >= 0).any())
    torch.testing.assert_close(got[chosen >= 0], want[chosen >= 0], rtol=rtol, atol=rtol)


def chi_square_p(counts, expected):
    """Upper tail by Wilson and Hilferty's cube root; cells expected less than 5 times are pooled."""
    counts, expected = np.asarray(counts, float), np.asarray(expected, float)
    small = expected < 5
    counts, expected = (
        np.append(counts[~small], counts[small].sum()),
        np.append(expected[~small], expected[small].sum()),
    )
    if expected[-1] == 0:
        assert counts[-1] == 0
        counts, expected = counts[:-1], expected[:-1]
    free = len(counts) - 1
    if free == 0:
        return 1.0
    statistic = ((counts - expected) ** 2 / expected).sum()
    z = ((statistic / free) ** (1 / 3) - (1 - 2 / (9 * free))) / math.sqrt(2 / (9 * free))
    return 0.5 * math.erfc(z / math.sqrt(2))


@pytest.mark.parametrize(("n", "k"), [(n, k) for n in (1, 2, 3, 5, 8, 10) for k in range(1, n + 1)])
def test_law_and_inclusion_over_all_subsets(n, k):
    log_probs = random_log_probs(n, seed=n)
    batch = 20000 if k in (1, n // 2, n - 1) else 500
    sample = draw(log_probs.expand(batch, n), k, k, seed=100 * n + k)
    law = subset_law(log_probs, k)
    pi = [sum(p for subset, p in law.items() if i in subset) for i in range(n)]
    check_pi(sample, pi)
    subsets, counts = sample.chosen.sort(1).values.unique(dim=0, return_counts=True)
    found = {tuple(subset): count for subset, count in zip(subsets.tolist(), counts.tolist(), strict=True)}
    assert set(found) <= set(law)
    p_value = chi_square_p([found.get(subset, 0) for subset in law], [batch * p for p in law.values()])
    assert p_value > 1e-4


@pytest.mark.parametrize(("n", "k"), [(7, 3), (33, 8), (100, 20)])
def test_inclusion_probabilities_of_all_candidates_add_up_to_the_size(n, k):
    log_probs = random_log_probs(n, seed=k)
    pi = torch.full((n,), torch.nan, dtype=torch.float64)
    for seed in range(20):
        sample = draw(log_probs.expand(500, n), k, k, seed=seed)
        pi[sample.chosen] = sample.log_inclusion.double().exp()
    assert float(pi.nansum()) == pytest.approx(k, rel=1e-3 if bool(pi.isnan().any()) else 1e-6)
    check_pi(sample, exact_pi(log_probs, k))


def test_places_go_from_the_most_to_the_least_probable():
    log_probs = random_log_probs(50)
    chosen = draw(log_probs.expand(100, 50), 6, 6).chosen
    values = log_probs[chosen]
    assert bool((values[:, 1:] <= values[:, :-1]).all())


@pytest.mark.parametrize("certain", [0.0, -1e-8, 1e-9])
def test_certain_candidates_are_always_taken(certain):
    log_probs = torch.cat((random_log_probs(9), torch.tensor([certain])))
    sample = draw(log_probs.expand(2000, 10), 3, 3)
    assert bool((sample.chosen[:, 0] == 9).all())
    assert bool((sample.log_inclusion[:, 0] == 0).all())
    others = draw(log_probs[:9].expand(2000, 9), 2, 2)
    pi = exact_pi(log_probs[:9], 2)
    check_pi(others, pi)
    check_pi(sample, [*pi, 1.0])
    frequency = torch.bincount(sample.chosen[:, 1:].flatten(), minlength=9) / 2000
    assert bool(((frequency - torch.tensor(pi)).abs() < 0.06).all())


def test_more_certain_candidates_than_places():
    # rounding can make two: either is taken, and nothing else
    chosen = draw(torch.tensor([-20.0, 0.0, 1e-8]).expand(2000, 3), 1, 1).chosen
    assert abs(float((chosen == 1).float().mean()) - 0.5) < 0.05
    assert int(chosen.min()) == 1


@pytest.mark.parametrize("missing", [-INF, float("nan")])
def test_no_more_candidates_than_places(missing):
    log_probs = torch.full((4, 9), missing)
    log_probs[0, 3], log_probs[0, 7] = -5.0, -90.0
    log_probs[1, :4] = torch.tensor([-1.0, -2.0, -900.0, -3.0])
    log_probs[2, 5] = 0.0
    sample = draw(log_probs, 4, 5)
    assert sample.chosen.tolist() == [[3, 7, -1, -1, -1], [0, 1, 3, 2, -1], [5, -1, -1, -1, -1], [-1] * 5]
    assert bool((sample.log_inclusion == 0).all())
    assert bool((sample.bound == 0).all())


def test_what_is_no_candidate_is_never_chosen():
    log_probs = random_log_probs(40)
    log_probs[::3] = -INF
    sample = draw(log_probs.expand(3000, 40), 5, 5)
    assert bool((log_probs[sample.chosen] > -INF).all())
    check_pi(sample, exact_pi(log_probs, 5))


def test_each_request_has_its_size():
    log_probs = random_log_probs(17)
    sizes = torch.arange(300) % 7
    sample = draw(log_probs.expand(300, 17), sizes, 6)
    assert bool(((sample.chosen >= 0).sum(1) == sizes).all())
    assert all(len(set(row[:size])) == size for row, size in zip(sample.chosen.tolist(), sizes.tolist(), strict=True))
    assert bool((sample.log_inclusion[sample.chosen < 0] == 0).all())
    for size in range(1, 7):
        rows = [field[sizes == size] for field in sample]
        check_pi(type(sample)(*rows), exact_pi(log_probs, size))


EXTREME = {
    "all tiny": -300 - 3 * torch.rand(40, generator=torch.Generator().manual_seed(1)),
    "one nearly certain": torch.cat((torch.tensor([math.log1p(-1.2e-7)]), torch.full((60,), -200.0))),
    "nothing between": torch.cat((torch.full((5,), -2.0), torch.full((60,), -400.0))),
    "far apart": -60.0 * torch.arange(30) - 1,
    "beyond float64": -1000.0 - 400 * torch.arange(20),
    "flat and long": torch.full((3000,), -8.1),
    "one and two halves": torch.tensor([-0.69315, -0.69316, -20.0, -21.0, -22.0, -90.0]),
}


@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("name", EXTREME)
def test_extreme_weights(name, k):
    log_probs = EXTREME[name].float()
    sample = draw(log_probs.expand(50, -1), k, k)
    pi = [k / len(log_probs)] * len(log_probs) if name == "flat and long" else exact_pi(log_probs, k)
    check_pi(sample, pi)
    most = np.argsort(-np.asarray(pi), kind="stable")[:k]
    if min(np.asarray(pi)[most]) > 1 - 1e-9:
        assert bool((sample.chosen.sort(1).values == torch.tensor(np.sort(most))).all())


def test_many_candidates_and_places_against_decimals():
    log_probs = random_log_probs(700, scale=3.0)
    sample = draw(log_probs.expand(4, 700), 40, 40)
    w = odds(log_probs)
    whole = symmetric(w, 40)
    for i in sample.chosen[0, ::8].tolist():
        without = symmetric(w[:i] + w[i + 1 :], 39)[39]
        place = sample.chosen[0].tolist().index(i)
        assert float(sample.log_inclusion[0, place]) == pytest.approx(
            float((w[i] * without / whole[40]).ln()), abs=1e-5
        )


def test_order_of_candidates_does_not_matter_to_inclusion():
    log_probs = random_log_probs(37)
    order = torch.randperm(37, generator=torch.Generator().manual_seed(3))
    one, two = (draw(x.expand(3000, 37), 4, 4, seed=seed) for seed, x in enumerate((log_probs, log_probs[order])))
    pi = torch.full((37,), torch.nan)
    pi[one.chosen] = one.log_inclusion
    assert not bool(pi.isnan().any())
    torch.testing.assert_close(two.log_inclusion, pi[order[two.chosen]], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("n", "k"), [(1, 1), (9, 1), (64, 3), (513, 8), (300, 20)])
def test_a_request_alone_is_the_request_in_a_batch(n, k):
    generator = torch.Generator().manual_seed(n)
    log_probs = torch.log_softmax(torch.randn(6, n, generator=generator) * 3, 1)
    words = torch.randint(0, 1 << 32, (6, words_needed(k)), generator=generator)
    tail = {
        "tail": torch.tensor([-1.0, -2.0, -INF, -8.0, -0.1, 0.5]),
        "tail_log_probs": -12 - torch.rand(6, k, generator=generator),
        "tail_squares": torch.full((6,), -11.0),
        "tail_max": torch.full((6,), -9.0),
    }
    sizes = torch.tensor([k, k - 1, k, k // 2, 0, k])
    for options in {}, tail:
        together = conditional_poisson(log_probs, sizes, k, words, **options)
        for b in range(6):
            mine = {name: value[b : b + 1] for name, value in options.items()}
            alone = conditional_poisson(log_probs[b : b + 1], sizes[b : b + 1], k, words[b : b + 1], **mine)
            assert all(torch.equal(x[0], y[b]) for x, y in zip(alone, together, strict=True))


def float_pi(weights, k):
    """All inclusion probabilities in float64, by prefixes and suffixes, which add positive terms only."""
    w = weights / weights.sum() * k  # near 1 in sum over a sample: nothing underflows
    prefix, suffix = (np.zeros((len(w) + 1, k + 1)) for _ in range(2))
    prefix[0, 0] = suffix[-1, 0] = 1
    for i in range(len(w)):
        prefix[i + 1] = prefix[i] + w[i] * np.append(0, prefix[i, :-1])
        suffix[-i - 2] = suffix[-i - 1] + w[-i - 1] * np.append(0, suffix[-i - 1, :-1])
    without = sum(prefix[:-1, j] * suffix[1:, k - 1 - j] for j in range(k))
    return w * without / prefix[-1, k]


def listed_and_tail(log_probs, n, batch, k, seed=0):
    """The n best listed, and the rest as a tail with a sample without replacement for each request."""
    log_probs = log_probs.float().sort(descending=True).values
    rest = log_probs[n:].double()
    weights = rest.exp() / -torch.expm1(rest)
    generator = torch.Generator().manual_seed(seed)
    keys = weights.log() - torch.rand(batch, len(rest), generator=generator).log().neg().log()
    items = keys.topk(min(k, len(rest)), dim=1).indices
    first = torch.nn.functional.pad(rest.float()[items], (0, k - items.shape[1]), value=-INF)
    tail = {
        "tail": weights.sum().log().float().expand(batch),
        "tail_log_probs": first,
        "tail_squares": weights.square().sum().log().float().expand(batch),
        "tail_max": weights.max().log().float().expand(batch),
    }
    return log_probs, items + n, tail


FLAT = torch.full((20000,), -math.log(20000))
ZIPF = torch.log_softmax(-torch.arange(1, 20001).double().log(), 0)
LUMPY = torch.log_softmax(-0.5 * torch.arange(1, 301).double().log(), 0)


@pytest.mark.parametrize(
    ("log_probs", "n", "most"),
    [(FLAT, 1024, 2e-6), (ZIPF, 1024, 1e-5), (LUMPY, 40, 3e-2)],
    ids=["flat", "zipf", "lumpy"],
)
def test_tail_against_all_candidates(log_probs, n, most):
    k, batch = 8, 60
    log_probs, items, tail = listed_and_tail(log_probs, n, batch, k)
    sample = draw(log_probs[:n].expand(batch, n), k, k, **tail)
    w = log_probs.double().exp() / -torch.expm1(log_probs.double())
    pi = torch.from_numpy(float_pi(w.numpy(), k))
    from_tail = (sample.chosen - n).clamp(min=0)
    chosen = torch.where(sample.chosen < n, sample.chosen, items.gather(1, from_tail))
    assert bool((sample.chosen >= n).any())
    assert bool((sample.chosen < n).any())
    error = (sample.log_inclusion.double().exp() - pi[chosen]).abs() - 1e-6 * pi[chosen]  # as float32 rounds
    assert bool((error <= sample.bound[:, None]).all())
    assert 0 < float(sample.bound.max()) < most
    # the tail's places are the first ones drawn
    for row in sample.chosen.tolist():
        assert sorted(x - n for x in row if x >= n) == list(range(sum(x >= n for x in row)))


def test_bound_covers_an_error_that_is_there():
    # six candidates, four of them in a tail that is not small at all
    log_probs, items, tail = listed_and_tail(torch.tensor([0.3, 0.2, 0.13, 0.12, 0.11, 0.1]).log(), 2, 300, 3)
    sample = draw(log_probs[:2].expand(300, 2), 3, 3, **tail)
    pi = torch.tensor(exact_pi(log_probs, 3))
    chosen = torch.where(sample.chosen < 2, sample.chosen, items.gather(1, (sample.chosen - 2).clamp(min=0)))
    error = (sample.log_inclusion.exp() - pi[chosen]).abs()
    assert bool((error <= sample.bound[:, None]).all())
    assert float(error.max()) > 0.02


def test_bound_covers_a_total_that_is_off():
    log_probs, _, tail = listed_and_tail(LUMPY, 40, 200, 6)
    exact = draw(log_probs[:40].expand(200, 40), 6, 6, **tail)
    off = {**tail, "tail": tail["tail"] + math.log1p(0.01)}
    sample = draw(log_probs[:40].expand(200, 40), 6, 6, **off, tail_error=torch.full((200,), 0.01))
    same = (sample.chosen == exact.chosen) & (sample.chosen < 40)
    assert int(same.sum()) > 200
    error = (sample.log_inclusion.double().exp() - exact.log_inclusion.double().exp()).abs()[same]
    without = draw(log_probs[:40].expand(200, 40), 6, 6, **off)
    assert bool((error <= sample.bound[:, None].expand_as(same)[same]).all())
    assert bool((sample.bound > without.bound).all())
    assert float(error.max()) > 1e-4


def test_number_of_tail_items():
    n, k, batch = 64, 6, 20000
    log_probs = ZIPF.float()
    w = (log_probs.double().exp() / -torch.expm1(log_probs.double())).numpy()
    tail = {
        "tail": torch.tensor(w[n:].sum()).log().float().expand(batch),
        "tail_log_probs": log_probs[n : n + k].expand(batch, k),
        "tail_squares": torch.tensor(np.square(w[n:]).sum()).log().float().expand(batch),
        "tail_max": torch.tensor(w[n]).log().float().expand(batch),
    }
    sample = draw(log_probs[:n].expand(batch, n), k, k, **tail)
    listed = np.array([float(x) for x in symmetric([Decimal(x) for x in w[:n]], k)])
    total = w[n:].sum()
    squares = np.square(w[n:] / total).sum()
    differ = [1 - math.comb(m, 2) * squares for m in range(k + 1)]
    assert min(differ) > 0.5
    law = np.array([listed[k - m] * total**m / math.factorial(m) * differ[m] for m in range(k + 1)])
    counts = torch.bincount((sample.chosen >= n).sum(1), minlength=k + 1)
    assert chi_square_p(counts.numpy(), batch * law / law.sum()) > 1e-4
    mean = (law * np.arange(k + 1)).sum() / law.sum()
    share = sample.log_inclusion.double().exp()[sample.chosen == n]
    torch.testing.assert_close(share, torch.full_like(share, w[n] / total * mean), rtol=1e-5, atol=0)


def test_a_tail_of_few_items():
    # with three in the tail and two listed, five of six places are taken, and all of them with certainty
    tail = {
        "tail": torch.tensor([-2.0, -2.0, -INF]),
        "tail_log_probs": torch.tensor([[-3.0, -4.0, -5.0, -INF, -INF, -INF]] * 3),
        "tail_squares": torch.full((3,), -3.0),
        "tail_max": torch.full((3,), -3.0),
    }
    log_probs = torch.tensor([[-3.5, -INF, -1.0]] * 3)
    sample = draw(log_probs, torch.tensor([6, 5, 6]), 6, **tail)
    assert sample.chosen.tolist() == [[2, 3, 0, 4, 5, -1]] * 2 + [[2, 0, -1, -1, -1, -1]]
    assert bool((sample.log_inclusion == 0).all())
    assert bool((sample.bound == 0).all())
    fewer = draw(
        log_probs[:1].expand(500, 3), 4, 6, **{name: x[:1].expand(500, *x.shape[1:]) for name, x in tail.items()}
    )
    assert bool(((fewer.chosen >= 0).sum(1) == 4).all())
    assert int(fewer.chosen.max()) == 5


def test_no_tail_is_a_tail_without_weight():
    log_probs = random_log_probs(30).expand(50, 30)
    nothing = {
        "tail": torch.full((50,), -INF),
        "tail_log_probs": torch.full((50, 4), -INF),
        "tail_squares": torch.full((50,), -INF),
        "tail_max": torch.full((50,), -INF),
    }
    assert all(torch.equal(x, y) for x, y in zip(draw(log_probs, 4, 4), draw(log_probs, 4, 4, **nothing), strict=True))


def test_nothing_synchronises():
    # tensors without values: what asked for one would raise
    with FakeTensorMode():
        floats, counts = torch.zeros(3, 70), torch.ones(3, dtype=torch.int64)
        words = torch.zeros(3, words_needed(20), dtype=torch.int64)
        for options in (), (floats[:, 0], floats[:, :20], floats[:, 0], floats[:, 0]):
            sample = conditional_poisson(floats, counts, 20, words, *options)
            assert [tuple(x.shape) for x in sample] == [(3, 20), (3, 20), (3,)]
            assert [x.dtype for x in sample] == [torch.int64, torch.float32, torch.float32]


def test_no_requests():
    sample = draw(torch.zeros(0, 5), 2, 3)
    assert [tuple(x.shape) for x in sample] == [(0, 3), (0, 3), (0,)]


def test_what_it_refuses():
    good = {"log_probs": torch.zeros(2, 5), "sizes": torch.ones(2, dtype=torch.int64), "k": 2}
    good["words"] = torch.zeros(2, words_needed(2), dtype=torch.int64)
    conditional_poisson(**good)
    for name, value, error in (
        ("log_probs", torch.zeros(2, 5, dtype=torch.float64), TypeError),
        ("log_probs", torch.zeros(2, 0), ValueError),
        ("sizes", torch.ones(3, dtype=torch.int64), ValueError),
        ("k", 0, ValueError),
        ("words", good["words"][:, 1:], ValueError),
        ("tail", torch.zeros(2), ValueError),
    ):
        with pytest.raises(error, match=f"^{name}: expected .*, got "):
            conditional_poisson(**{**good, name: value})
