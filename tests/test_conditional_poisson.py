"""Conditional Poisson beams over vocabularies with a tail: the law of one step, and what the tail is made of."""

import math
from itertools import permutations

import pytest
import torch

import flashbeam as fb
from flashbeam.kernels import draw_distinct
from flashbeam.selection import conditional_poisson, poisson_tail


def exact_pi(log_probs, k):
    """Inclusion probabilities float64 by prefix and suffix tables over all candidates."""
    p = log_probs.double().exp()
    w = p / -torch.expm1(log_probs.double())
    w = w / w.sum() * k
    n = len(w)
    prefix, suffix = torch.zeros(n + 1, k + 1, dtype=torch.float64), torch.zeros(n + 1, k + 1, dtype=torch.float64)
    prefix[0, 0] = suffix[n, 0] = 1
    for i in range(n):
        prefix[i + 1] = prefix[i]
        prefix[i + 1, 1:] += w[i] * prefix[i, :-1]
        j = n - 1 - i
        suffix[j] = suffix[j + 1]
        suffix[j, 1:] += w[j] * suffix[j + 1, :-1]
    without = sum(prefix[:-1, a] * suffix[1:, k - 1 - a] for a in range(k))
    return w * without / prefix[n, k]


def chi_square_p(observed, expected):
    """Upper tail of chi-square by the Wilson-Hilferty normal approximation."""
    df = len(observed) - 1
    x = float(((observed - expected) ** 2 / expected).sum())
    z = ((x / df) ** (1 / 3) - (1 - 2 / (9 * df))) / math.sqrt(2 / (9 * df))
    return 0.5 * math.erfc(z / math.sqrt(2))


def one_step(logits, k, batch, seed=0, **options):
    """The samples of one step of many requests with the same logits."""
    search = fb.BeamSearch(k, 1, None, selection=fb.ConditionalPoisson(seed), **options)
    state = search.init(batch)
    search.step(state, logits.expand(batch, -1))
    return search.finalize(state), state.flags


@pytest.mark.parametrize("way", ["all", "tiles"])
def test_law_of_a_step_with_a_tail(monkeypatch, way):
    # most of the mass is in the tail, so that its treatment shows
    vocab, k, batch = 5000, 4, 1500
    monkeypatch.setattr(conditional_poisson, "_DENSE", 8192 if way == "all" else 0)
    monkeypatch.setattr(poisson_tail, "_OF_ALL", 16)
    monkeypatch.setattr(poisson_tail, "_OF_WIDTH", 1)
    monkeypatch.setattr(poisson_tail, "_OF_TILES", 16)
    logits = -0.7 * torch.arange(1, vocab + 1).float().log()
    logits = logits[torch.randperm(vocab, generator=torch.Generator().manual_seed(1))]
    pi = exact_pi(logits.log_softmax(0), k)
    hyps, flags = one_step(logits, k, batch)
    tokens = hyps.tokens[:, :, 0]
    assert bool(hyps.valid.all())
    assert all(len(set(row)) == k for row in tokens.tolist())
    # as often as they should be: the best ones by themselves, the others in bins of about equal weight
    order = pi.argsort(descending=True)
    edges = torch.cat([torch.arange(12), (12 + (vocab - 12) * torch.linspace(0, 1, 9) ** 3).long()])
    rank = torch.empty_like(order).scatter_(0, order, torch.arange(vocab))
    bins = torch.bucketize(rank, edges, right=True) - 1
    expected = torch.zeros(int(bins.max()) + 1, dtype=torch.float64).scatter_add_(0, bins, pi) * batch
    observed = torch.bincount(bins[tokens.flatten()], minlength=len(expected)).double()
    assert chi_square_p(observed, expected) > 1e-4  # the counts of a set vary less than independent ones
    error = (hyps.log_inclusion.double().exp() - pi[tokens]).abs()
    assert float((error / pi[tokens]).max()) < 0.02
    assert bool((flags == fb.FLAG_INEXACT).any()) or float(error.max()) < 1e-4


@pytest.mark.parametrize("way", ["all", "tiles"])
def test_without_much_of_a_tail_the_result_is_exact(monkeypatch, way):
    vocab, k = 4999, 8
    logits = torch.randn(vocab, generator=torch.Generator().manual_seed(2)) * 6
    pi = exact_pi(logits.log_softmax(0), k)
    monkeypatch.setattr(conditional_poisson, "_DENSE", 8192 if way == "all" else 0)
    hyps, flags = one_step(logits, k, 20)
    assert bool((flags == 0).all())
    torch.testing.assert_close(hyps.log_inclusion.double().exp(), pi[hyps.tokens[:, :, 0]], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("way", ["all", "tiles"])
def test_masks_and_temperature_reach_the_tail(monkeypatch, way):
    vocab, k, batch = 5000, 4, 400
    monkeypatch.setattr(conditional_poisson, "_DENSE", 8192 if way == "all" else 0)
    monkeypatch.setattr(poisson_tail, "_OF_ALL", 16)
    monkeypatch.setattr(poisson_tail, "_OF_WIDTH", 1)
    monkeypatch.setattr(poisson_tail, "_OF_TILES", 16)
    logits = torch.randn(vocab, generator=torch.Generator().manual_seed(3))
    allowed = torch.rand(vocab, generator=torch.Generator().manual_seed(4)) < 0.3
    logits[~allowed] += 3
    search = fb.BeamSearch(k, 1, None, selection=fb.ConditionalPoisson(0), temperature=0.5)
    state = search.init(batch)
    search.step(state, logits.expand(batch, -1), fb.kernels.pack_bitmask(allowed).expand(batch, -1))
    hyps = search.finalize(state)
    tokens = hyps.tokens[:, :, 0]
    assert bool(allowed[tokens].all())
    q = (logits / 0.5).masked_fill(~allowed, -torch.inf).log_softmax(0)
    torch.testing.assert_close(hyps.sampling_log_probs, q[tokens], rtol=1e-5, atol=2e-5)
    pi = exact_pi(q[allowed], k)
    place = allowed.cumsum(0) - 1
    torch.testing.assert_close(hyps.log_inclusion.double().exp(), pi[place[tokens]], rtol=0.05, atol=1e-3)


@pytest.mark.parametrize("way", ["all", "tiles"])
def test_alone_as_in_a_batch(monkeypatch, way):
    monkeypatch.setattr(conditional_poisson, "_DENSE", 8192 if way == "all" else 0)
    logits = torch.randn(3, 5000, generator=torch.Generator().manual_seed(5)) * 2
    search = fb.BeamSearch(5, 2, None, selection=fb.ConditionalPoisson(7))
    together = search.init(3)
    later = torch.randn(15, 5000, generator=torch.Generator().manual_seed(6)) * 2
    search.step(together, logits)
    search.step(together, later)
    both = search.finalize(together)
    for request in range(3):
        state = search.init(1, request_ids=[request])
        search.step(state, logits[request : request + 1])
        search.step(state, later[5 * request : 5 * request + 5])
        alone = search.finalize(state)
        assert torch.equal(alone.tokens[0], both.tokens[request])
        assert torch.equal(alone.log_inclusion[0], both.log_inclusion[request])


@pytest.mark.parametrize("way", ["all", "tiles"])
def test_tails_of_several_parents_compete(monkeypatch, way):
    vocab, k, batch = 3000, 2, 1500
    monkeypatch.setattr(conditional_poisson, "_DENSE", 8192 if way == "all" else 0)
    monkeypatch.setattr(poisson_tail, "_OF_ALL", 8)
    monkeypatch.setattr(poisson_tail, "_OF_WIDTH", 1)
    monkeypatch.setattr(poisson_tail, "_OF_TILES", 8)
    first = torch.full((vocab,), -torch.inf)
    first[7], first[9] = math.log(0.7), math.log(0.3)  # both are taken
    rows = torch.randn(2, vocab, generator=torch.Generator().manual_seed(8))
    search = fb.BeamSearch(k, 2, None, selection=fb.ConditionalPoisson(3))
    state = search.init(batch)
    step = search.step(state, first.expand(batch, -1))
    search.step(state, rows[(step.tokens == 9).long()].view(-1, vocab))
    hyps = search.finalize(state)
    log_probs = torch.cat([math.log(0.7) + rows[0].log_softmax(0), math.log(0.3) + rows[1].log_softmax(0)])
    pi = exact_pi(log_probs, k)
    place = hyps.tokens[:, :, 1] + vocab * (hyps.tokens[:, :, 0] == 9)
    torch.testing.assert_close(hyps.log_inclusion.double().exp(), pi[place], rtol=0.03, atol=1e-3)
    bins = (torch.arange(2 * vocab) >= vocab) * 4 + torch.arange(2 * vocab) % 4
    expected = torch.zeros(8, dtype=torch.float64).scatter_add_(0, bins, pi) * batch
    observed = torch.bincount(bins[place.flatten()], minlength=8).double()
    assert chi_square_p(observed, expected) > 1e-4


@pytest.mark.parametrize("vocab", [40, 3000, 9000])
def test_beside_a_wider_request(vocab):
    logits = torch.randn(1, vocab, generator=torch.Generator().manual_seed(5)) * 2
    later = torch.randn(7, vocab, generator=torch.Generator().manual_seed(6)) * 2

    def run(widths, ids):
        search = fb.BeamSearch(widths, 3, None, selection=fb.ConditionalPoisson(7))
        state = search.init(len(ids), request_ids=ids)
        step = search.step(state, logits.expand(len(ids), -1))
        for _ in range(2):
            step = search.step(state, later[step.tokens.flatten() % 7])
        return search.finalize(state)

    alone, beside = run([3], [5]), run([8, 3], [9, 5])
    assert torch.equal(alone.tokens[0], beside.tokens[1, :3])
    assert torch.equal(alone.log_inclusion[0], beside.log_inclusion[1, :3])


@pytest.mark.parametrize(("vocab", "widths"), [(300, (4, 9)), (2000, (4, 9)), (400, (3, 300)), (550, (4, 600))])
def test_ties_beside_a_wider_request(vocab, widths):
    # bfloat16 logits tie everywhere, at the end of the list too
    generator = torch.Generator().manual_seed(vocab)
    logits = torch.randn(2, vocab, generator=generator).bfloat16()
    later = torch.randn(5, vocab, generator=generator).bfloat16()
    few, many = widths

    def run(widths, ids, wide_first=False):
        search = fb.BeamSearch(widths, 2, None, selection=fb.ConditionalPoisson(1))
        state = search.init(len(ids), request_ids=ids)
        first = logits[:1].expand(len(ids), -1)
        step = search.step(state, first.repeat_interleave(max(widths), 0) if wide_first else first)
        search.step(state, later[step.tokens.flatten() % 5])
        hyps = search.finalize(state)
        return hyps.tokens[-1, :few], hyps.log_inclusion[-1, :few]

    alone, wide, beside = run([few], [5]), run([few], [5], True), run([many, few], [9, 5])
    for other in (wide, beside):
        assert torch.equal(alone[0], other[0])
        assert torch.equal(alone[1], other[1])


def test_the_best_are_found_in_parts():
    for size in (16384, 16390, 9001, 8200, 2050, 40001):
        x = torch.randn(4, size, generator=torch.Generator().manual_seed(size))
        x[2, 300:] = -torch.inf
        x[3] = x[3].round()  # ties: the lower place goes first
        place = poisson_tail._best(x, 512)
        expected = x.sort(dim=1, descending=True, stable=True).indices[:, :512]
        assert torch.equal(place, expected)


def test_distinct_draws_are_plackett_luce():
    weights = torch.tensor([0.5, 0.2, 0.0, 0.2, 0.1])
    count = 30000
    uniforms = torch.rand(count, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    drawn, total = draw_distinct(weights.expand(count, 5), uniforms, 3)
    assert float(total[0]) == pytest.approx(1.0)
    expected = {}
    for a, b, c in permutations([0, 1, 3, 4], 3):
        p, q, r = weights[[a, b, c]].tolist()
        expected[a, b, c] = count * p * q / (1 - p) * r / (1 - p - q)
    found = list(map(tuple, drawn.tolist()))
    assert set(found) == set(expected)
    observed = torch.tensor([found.count(key) for key in expected]).double()
    assert chi_square_p(observed, torch.tensor(list(expected.values()))) > 1e-4


def test_draws_that_do_not_suffice_leave_places_empty():
    weights = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
    drawn, total = draw_distinct(weights, torch.tensor([[0.1, 0.2, 0.9, 0.3]] * 2, dtype=torch.float64), 3)
    assert drawn.tolist() == [[0, 2, -1], [-1, -1, -1]]
    assert total.tolist() == [2.0, 0.0]


def test_an_error_beyond_the_limit_is_flagged(monkeypatch):
    monkeypatch.setattr(poisson_tail, "_OF_ALL", 16)
    monkeypatch.setattr(poisson_tail, "_OF_WIDTH", 1)
    hyps, flags = one_step(torch.linspace(0, 1, 60), 8, 4)
    assert bool((flags == fb.FLAG_INEXACT).all())
    assert bool(hyps.valid.all())
    _, flags = one_step(torch.linspace(0, 1, 60).expand(60), 8, 4, min_length=0)
    assert flags.shape == (4,)
