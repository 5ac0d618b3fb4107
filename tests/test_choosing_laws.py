"""The laws of the rules that draw, against enumeration: thousands of independent requests of one model.

Written from the contract (design.md, sections 3 and 4; algorithms.md, sections 1 to 3) through the public interface
alone. Seeds are fixed, so a test is deterministic; ``ALPHA`` is the chance that a right implementation, with another
seed, fails one of its checks.
"""

from __future__ import annotations

import functools
import itertools
import math

import numpy as np
import pytest
import torch

import flashbeam as fb
from test_choosing_contract import Table, drive, equal_rows, listed, make

ALPHA = 1e-4


# ---------------------------------------------------------------------------------------------------------------------
# statistics


def chi_square_p(observed, expected):
    """p-value of counts against expected counts of the same total; small cells are put together."""
    observed, expected = np.ravel(observed).astype(float), np.ravel(expected).astype(float)
    assert (observed[expected == 0] == 0).all(), "something impossible was drawn"
    order = np.argsort(expected)
    pooled, o, e = [], 0.0, 0.0
    for i in order[expected[order] > 0]:
        o, e = o + observed[i], e + expected[i]
        if e >= 8:
            pooled.append((o, e))
            o = e = 0.0
    if pooled and e:
        pooled[-1] = (pooled[-1][0] + o, pooled[-1][1] + e)
    statistic = sum((o - e) ** 2 / e for o, e in pooled)
    freedom = len(pooled) - 1
    assert freedom > 0
    return float(torch.special.gammaincc(torch.tensor(freedom / 2).double(), torch.tensor(statistic / 2).double()))


def binomial_p(count, n, p):
    """Two-sided: twice the smaller tail."""
    if p <= 0 or p >= 1:
        return float(count == round(n * p))
    k = np.arange(n + 1)
    logs = [math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) for i in k]
    mass = np.exp(np.array(logs) + k * math.log(p) + (n - k) * math.log1p(-p))
    return min(1.0, 2 * min(mass[: count + 1].sum(), mass[count:].sum()))


def inclusion_p(counts, n, probabilities):
    """The smallest p-value of the cells, times their number."""
    return min(
        1.0, len(counts) * min(binomial_p(int(c), n, float(p)) for c, p in zip(counts, probabilities, strict=True))
    )


def kolmogorov_p(uniforms):
    """p-value of a sample against U(0, 1)."""
    u = np.sort(np.ravel(uniforms))
    n = len(u)
    d = max((np.arange(1, n + 1) / n - u).max(), (u - np.arange(n) / n).max())
    x = (math.sqrt(n) + 0.12 + 0.11 / math.sqrt(n)) * d
    return min(1.0, 2 * sum((-1) ** (j - 1) * math.exp(-2 * j * j * x * x) for j in range(1, 101)))


def mean_p(values, truth):
    """p-value of a mean, by the normal law."""
    values = np.asarray(values, float)
    error = values.std(ddof=1) / math.sqrt(len(values))
    return math.erfc(abs(values.mean() - truth) / max(error, 1e-12) / math.sqrt(2))


# ---------------------------------------------------------------------------------------------------------------------
# exact laws


def ordered_law(log_q, k):
    """Plackett-Luce: the probability of every ordered k-tuple, as an array [n] * k."""
    p = np.exp(np.asarray(log_q))
    n = len(p)
    law, left, used = np.ones(()), np.ones(()), []
    for d in range(k):
        step = law[..., None] * p / np.maximum(left, 1e-300)[..., None]
        for axis in range(d):
            same = np.eye(n, dtype=bool).reshape([n if a in (axis, d) else 1 for a in range(d + 1)])
            step = np.where(same, 0.0, step)
        law, left = step, np.broadcast_to(left[..., None] - p, step.shape)
        used.append(d)
    return law


def inclusion_of(law):
    axes = range(law.ndim)
    return sum(law.sum(tuple(a for a in axes if a != keep)) for keep in axes)


def poisson_sets(log_p, k):
    """Conditional Poisson: [(indices, probability)] of every k-subset, and the inclusion probabilities."""
    n = len(log_p)
    if n <= k:
        return [(tuple(range(n)), 1.0)], np.ones(n)
    log_w = np.asarray(log_p) - np.log(-np.expm1(np.asarray(log_p)))
    sets = list(itertools.combinations(range(n), k))
    weight = np.array([log_w[list(s)].sum() for s in sets])
    weight = np.exp(weight - weight.max())
    weight /= weight.sum()
    pi = np.zeros(n)
    for s, w in zip(sets, weight, strict=True):
        pi[list(s)] += w
    return list(zip(sets, weight, strict=True)), pi


def poisson_runs(table, k, steps, **kwargs):
    """Every run: {(frozenset of (tokens, rounded log pi))} -> probability, by enumerating the sets of every step."""
    probabilities = {}
    for leaf in table.leaves(normalize="allowed", **kwargs):
        for n in range(len(leaf.tokens) + 1):
            key = leaf.tokens[:n]
            probabilities[key] = probabilities.get(key, 0.0) + math.exp(leaf.log_prob)
    ends = {x.tokens for x in table.leaves(normalize="allowed", **kwargs)}
    runs = {frozenset({((), 0.0)}): 1.0}
    for _ in range(steps):
        after = {}
        for beams, chance in runs.items():
            candidates = []
            for tokens, log_pi in sorted(beams):
                if tokens in ends:
                    candidates.append((tokens, log_pi))
                else:
                    children = [(*tokens, v) for v in range(table.vocab)]
                    candidates += [(c, log_pi) for c in children if c in probabilities]
            sets, pi = poisson_sets([math.log(probabilities[c]) for c, _ in candidates], k)
            for chosen, weight in sets:
                key = frozenset((candidates[i][0], candidates[i][1] + math.log(pi[i])) for i in chosen)
                after[key] = after.get(key, 0.0) + chance * weight
        runs = after
    return runs, probabilities


# ---------------------------------------------------------------------------------------------------------------------
# samples


def index_of(hyps, leaves):
    """[B, N]: which leaf each hypothesis is, -1 where not valid; what is no leaf fails."""
    T = hyps.tokens.shape[2]
    base = int(max(max(x.tokens) for x in leaves)) + 2
    place = (base ** torch.arange(T)).long()
    inside = torch.arange(T) < hyps.lengths[..., None]
    codes = (torch.where(inside, hyps.tokens + 1, 0) * place).sum(-1)
    table = {sum((v + 1) * base**t for t, v in enumerate(x.tokens)): i for i, x in enumerate(leaves)}
    table = {**table, -1: -1}
    codes = torch.where(hyps.valid, codes, -1)
    unique, inverse = codes.unique(return_inverse=True)
    return torch.tensor([table[c] for c in unique.tolist()])[inverse].numpy()


MODELS = {
    # 15 leaves
    "plain": ({"vocab": 3, "length": 3, "seed": 51, "eos": [2], "scale": 1.0}, {}, {"eos_id": 2, "max_length": 3}),
    # two EOS ids, a mask, a minimum length, a temperature
    "masked": (
        {"vocab": 5, "length": 3, "seed": 52, "eos": [1, 4], "scale": 1.5, "allow": 0.7},
        {"min_length": 2, "temperature": 1.4},
        {"eos_id": [1, 4], "max_length": 3, "min_length": 2, "temperature": 1.4},
    ),
}


@functools.cache
def model_of(name):
    settings, enumeration, _ = MODELS[name]
    table = Table(**settings)
    leaves = table.leaves(normalize="allowed", **enumeration)
    log_q = np.array([x.log_prob for x in leaves])
    assert abs(np.exp(log_q).sum() - 1) < 1e-9
    return table, leaves, log_q


@functools.cache
def sample(name, selection, k, requests=1500, first=0):
    """Hypotheses of ``requests`` independent requests, and which leaves they are."""
    table, leaves, _ = model_of(name)
    search = make(beam_size=k, selection=selection, **MODELS[name][2])
    ids = torch.arange(first, first + requests)
    hyps, state = drive(search, table, torch.zeros(requests, dtype=torch.long), ids=ids)
    assert (state.flags == 0).all()
    return hyps, index_of(hyps, leaves)


def entropy_and_more(leaves, log_q):
    """Two functions of a leaf: their values and expectations."""
    q = np.exp(log_q)
    other = np.array([len(x.tokens) + 3.0 * (x.tokens[0] == 0) for x in leaves])
    return [(-log_q, float(-(q * log_q).sum())), (other, float((q * other).sum()))]


def check_unbiased(hyps, index, leaves, log_q):
    for values, truth in entropy_and_more(leaves, log_q):
        f = torch.from_numpy(np.where(index >= 0, values[index], 0.0))
        estimates = fb.estimate(hyps, f, normalized=False)
        assert mean_p(estimates.numpy(), truth) > ALPHA
        weights = fb.weights(hyps, normalized=False)
        assert torch.allclose((weights * f).sum(1), estimates.double(), rtol=1e-5)
        share = fb.weights(hyps)
        assert torch.allclose(share.sum(1), torch.ones(()).double(), atol=1e-9)
        assert torch.allclose((share * f).sum(1), fb.estimate(hyps, f).double(), rtol=1e-5)
        assert torch.allclose(share, weights / weights.sum(1, keepdim=True), atol=1e-9)


# ---------------------------------------------------------------------------------------------------------------------
# Stochastic


@pytest.mark.parametrize(("name", "k"), [("plain", 3), ("masked", 3)])
def test_stochastic_is_plackett_luce(name, k):
    _, leaves, log_q = model_of(name)
    hyps, index = sample(name, fb.Stochastic(11), k)
    n = len(index)
    assert (index >= 0).all()
    law = ordered_law(log_q, k)
    counts = np.bincount(index.ravel(), minlength=len(leaves))
    assert (np.sort(index, 1)[:, 1:] != np.sort(index, 1)[:, :-1]).all(), "a leaf twice"
    assert inclusion_p(counts, n, inclusion_of(law)) > ALPHA
    assert chi_square_p(np.bincount(index[:, 0], minlength=len(leaves)), n * np.exp(log_q)) > ALPHA
    pairs = np.bincount(index[:, 0] * len(leaves) + index[:, 1], minlength=len(leaves) ** 2)
    assert chi_square_p(pairs, n * ordered_law(log_q, 2)) > ALPHA
    last = law.sum(tuple(range(k - 1)))
    assert chi_square_p(np.bincount(index[:, -1], minlength=len(leaves)), n * last) > ALPHA
    # the greatest perturbed value is the root's: a standard Gumbel, independent of which leaf has it
    root = np.exp(-np.exp(-hyps.perturbed[:, 0].double().numpy()))
    assert kolmogorov_p(root) > ALPHA
    likely = int(np.argmax(log_q))
    assert kolmogorov_p(root[index[:, 0] == likely]) > ALPHA


@pytest.mark.parametrize(("name", "k"), [("plain", 3), ("masked", 3)])
def test_stochastic_reports(name, k):
    _, _, log_q = model_of(name)
    hyps, index = sample(name, fb.Stochastic(11), k)
    assert torch.equal(hyps.scores, hyps.perturbed)
    assert (hyps.perturbed[:, :-1] > hyps.perturbed[:, 1:]).all()
    lq, g = hyps.sampling_log_probs.double(), hyps.perturbed.double()
    assert np.abs(lq.numpy() - log_q[index]).max() < 2e-5
    expected = torch.log(-torch.expm1(-torch.exp(lq - g[:, -1:])))
    assert torch.allclose(hyps.log_inclusion.double(), expected, atol=1e-5)
    weights = fb.weights(hyps, normalized=False)
    assert (weights[:, -1] == 0).all() and (weights[:, :-1] > 0).all()
    assert torch.allclose(weights[:, :-1], torch.exp(lq - expected)[:, :-1], rtol=1e-4)


@pytest.mark.parametrize(("name", "k"), [("plain", 3), ("masked", 3)])
def test_stochastic_estimates_are_unbiased(name, k):
    _, leaves, log_q = model_of(name)
    check_unbiased(*sample(name, fb.Stochastic(11), k), leaves, log_q)


@pytest.mark.parametrize("name", ["plain", "masked"])
def test_all_perturbed_values_are_independent_gumbels(name):
    """More beams than leaves: every leaf comes, and perturbed - log q are independent standard Gumbels."""
    _, leaves, log_q = model_of(name)
    k = len(leaves) + 1
    hyps, index = sample(name, fb.Stochastic(12), k, 600)
    assert (hyps.valid.sum(1) == len(leaves)).all()
    assert (np.sort(index[:, :-1], 1) == np.arange(len(leaves))).all()
    assert (hyps.log_inclusion[hyps.valid] == 0).all()
    g = np.empty((len(index), len(leaves)))
    np.put_along_axis(g, index[:, :-1], hyps.perturbed[:, :-1].double().numpy(), 1)
    u = np.exp(-np.exp(-(g - log_q)))
    assert kolmogorov_p(u) > ALPHA
    for i in range(len(leaves)):
        assert kolmogorov_p(u[:, i]) > ALPHA / len(leaves)
    pairs = list(itertools.combinations(range(len(leaves)), 2))
    cells = (u * 3).astype(int)
    for i, j in pairs:
        table = np.bincount(cells[:, i] * 3 + cells[:, j], minlength=9)
        assert chi_square_p(table, np.full(9, len(u) / 9)) > ALPHA / len(pairs)
    for values, truth in entropy_and_more(leaves, log_q):
        f = torch.from_numpy(np.where(index >= 0, values[index], math.nan))  # filler is ignored
        for normalized in (True, False):
            assert torch.allclose(fb.estimate(hyps, f, normalized), torch.tensor(truth).double(), atol=1e-5)


def test_as_many_beams_as_leaves():
    """No fewer than K leaves exist, so the K-th perturbed value is kappa and the K-th is given up."""
    _, leaves, log_q = model_of("plain")
    hyps, index = sample("plain", fb.Stochastic(12), len(leaves), 1000)
    assert hyps.valid.all() and (np.sort(index, 1) == np.arange(len(leaves))).all()
    kappa = hyps.perturbed[:, -1:].double()
    expected = torch.log(-torch.expm1(-torch.exp(hyps.sampling_log_probs.double() - kappa)))
    assert torch.allclose(hyps.log_inclusion.double(), expected, atol=1e-5)
    check_unbiased(hyps, index, leaves, log_q)


def test_stochastic_nests_in_k():
    rows = list(range(350))
    widest, _ = sample("masked", fb.Stochastic(13), 7, 350)
    for k in (1, 2, 4):
        hyps, _ = sample("masked", fb.Stochastic(13), k, 350)
        for name in ("tokens", "lengths", "perturbed", "scores", "log_probs", "sampling_log_probs", "valid"):
            assert torch.equal(getattr(hyps, name), getattr(widest, name)[:, :k]), name
    table, _, _ = model_of("masked")
    mixed = make(beam_size=[1 + b % 7 for b in rows], selection=fb.Stochastic(13), **MODELS["masked"][2])
    hyps, _ = drive(mixed, table, torch.zeros(350, dtype=torch.long))
    for k in range(1, 8):
        mine = rows[k - 1 :: 7]
        alone, _ = sample("masked", fb.Stochastic(13), k, 350)
        equal_rows(hyps, alone, mine, mine, k)


def test_asking_for_fewer_hypotheses_keeps_their_inclusion():
    table, _, _ = model_of("plain")
    search = make(beam_size=4, selection=fb.Stochastic(3), **MODELS["plain"][2])
    hyps, state = drive(search, table, [0] * 50)
    equal_rows(search.finalize(state, num_hypotheses=2), hyps, list(range(50)), list(range(50)), 2)
    with pytest.raises(ValueError):
        fb.estimate(search.finalize(state, num_hypotheses=2), torch.zeros(50, 2))


# ---------------------------------------------------------------------------------------------------------------------
# randomness


@pytest.mark.parametrize(
    "make_rule",
    [fb.Stochastic, fb.Sample, fb.Arithmetic, fb.ConditionalPoisson],
    ids=["stochastic", "sample", "arithmetic", "conditional_poisson"],
)
def test_seeds_and_requests_draw_independently(make_rule):
    """Neighbouring requests and seeds, and requests that differ in the upper half of their id, are independent."""

    def feature(seed, first=0):
        """A number in 0..6 of each request's sample."""
        _, index = sample("plain", make_rule(seed), 2, 1200, first)
        return (index[:, 0] * 4 + index[:, 1]) % 7

    def independent(x, y):
        joint = np.zeros((7, 7))
        np.add.at(joint, (x, y), 1)
        return chi_square_p(joint, np.outer(joint.sum(1), joint.sum(0)) / joint.sum())

    x = feature(1)
    assert independent(x[:-1], x[1:]) > ALPHA
    assert independent(x, feature(2)) > ALPHA
    assert independent(x, feature(1, 2**32)) > ALPHA
    assert independent(x, feature(1, 2**40)) > ALPHA


# ---------------------------------------------------------------------------------------------------------------------
# Sample


@pytest.mark.parametrize("name", ["plain", "masked"])
def test_sample_rows_are_independent_draws(name):
    _, leaves, log_q = model_of(name)
    n = len(leaves)
    hyps, index = sample(name, fb.Sample(14), 4, 800)
    assert hyps.valid.all()
    assert chi_square_p(np.bincount(index.ravel(), minlength=n), index.size * np.exp(log_q)) > ALPHA
    assert np.abs(hyps.sampling_log_probs.double().numpy() - log_q[index]).max() < 2e-5
    _, index = sample(name, fb.Sample(15), 2)
    index = np.sort(index, 1)  # whatever the order of the rows: the law of an unordered pair
    q = np.exp(log_q)
    law = np.triu(2 * np.outer(q, q), 1) + np.diag(q * q)
    assert chi_square_p(np.bincount(index[:, 0] * n + index[:, 1], minlength=n * n), len(index) * law) > ALPHA
    check_unbiased(*sample(name, fb.Sample(15), 2), leaves, log_q)


def naive_filter(row, temperature=1.0, top_k=None, top_p=None, min_p=None):
    """float64 probabilities after the filters, each on what the one before it left; ties to the lower token."""
    x = row.astype(np.float64) / temperature
    p = np.exp(x - x.max())
    p /= p.sum()
    order = np.array(sorted(range(len(p)), key=lambda v: (-row[v], v)))
    keep = order
    if top_k is not None:
        keep = keep[:top_k]
    if top_p is not None:
        mass = np.cumsum(p[keep] / p[keep].sum())
        keep = keep[: 1 + int(np.flatnonzero(mass >= top_p * (1 - 1e-12))[0])] if top_p < 1 else keep
    if min_p is not None:
        keep = keep[p[keep] >= min_p * p[keep].max() * (1 - 1e-6)]
    q = np.zeros_like(p)
    q[keep] = p[keep] / p[keep].sum()
    return q


ROWS = {
    "flat": np.array([0.3, 0.1, 0.9, 0.0, -0.4, 0.7], np.float32),
    "ties": np.array([1.0, 0.0, 1.0, 1.0, 0.0, 1.0], np.float32),
    "peak": np.array([0.0, 4.0, 1.0, 2.5, -3.0, 2.0], np.float32),
}


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize(
    "filters",
    [
        {"top_k": 3}, {"top_k": 1}, {"top_k": 50}, {"top_p": 0.55}, {"top_p": 0.02}, {"top_p": 1.0}, {"min_p": 0.4},
        {"min_p": 1.0}, {"top_k": 4, "top_p": 0.7}, {"top_k": 3, "min_p": 0.5}, {"top_p": 0.8, "min_p": 0.3},
        {"top_k": 5, "top_p": 0.9, "min_p": 0.2, "temperature": 2.0}, {"top_p": 0.7, "temperature": 0.5},
    ],
    ids=str,
)  # fmt: skip
def test_filters(row, filters):
    """One step: the support and the law of what is left, and the probabilities reported."""
    x, settings = ROWS[row], dict(filters)
    temperature = settings.pop("temperature", 1.0)
    q = naive_filter(x, temperature, **settings)
    search = make(beam_size=8, max_length=1, temperature=temperature, selection=fb.Sample(16, **settings))
    hyps, _ = drive(search, lambda tokens, cache: (torch.from_numpy(x).repeat(len(tokens), 1), tokens), [0] * 150)
    assert hyps.valid.all()
    tokens = hyps.tokens[..., 0]
    counts = np.bincount(tokens.flatten(), minlength=6)
    assert (counts[q == 0] == 0).all(), "drawn though filtered"
    assert (counts[q > 0] > 0).all() or q[q > 0].min() < 0.01, "never drawn though kept"
    if (q > 0).sum() > 1:
        assert chi_square_p(counts, tokens.numel() * q) > ALPHA
    with np.errstate(divide="ignore"):
        expected = torch.from_numpy(np.log(q))[tokens]
    assert torch.allclose(hyps.sampling_log_probs.double(), expected, atol=1e-5)
    model = torch.log_softmax(torch.from_numpy(x).double() / temperature, 0)[tokens]
    assert torch.allclose(hyps.log_probs.double(), model, atol=1e-5)


def test_filters_see_what_is_allowed():
    """Masks come first: filters act on the renormalised allowed distribution, at every step of a model."""
    table = Table(6, 3, 1, seed=53, eos=[4], allow=0.8, scale=1.0)
    settings = {"top_k": 3, "top_p": 0.9, "min_p": 0.15}
    law = {}

    def visit(tokens, chance, total):
        if tokens and (tokens[-1] == 4 or len(tokens) == 3):
            law[tokens] = (chance, total)
            return
        allowed = table.allowed((0, *tokens)).copy()
        allowed[4] &= bool(tokens)  # min_length 2
        row = table.lm.logits((0, *tokens))
        q = naive_filter(np.where(allowed, row, -np.inf).astype(np.float32), **settings)
        log_p = row - np.log(np.exp(row.astype(np.float64)).sum())
        for v in np.flatnonzero(q):
            visit((*tokens, int(v)), chance * q[v], total + log_p[v])

    visit((), 1.0, 0.0)
    search = make(beam_size=4, max_length=3, eos_id=4, min_length=2, selection=fb.Sample(17, **settings))
    hyps, _ = drive(search, table, [0] * 600)
    leaves = sorted(law)
    assert len(leaves) > 8
    counts = dict.fromkeys(leaves, 0)
    for b in range(600):
        for i, tokens in enumerate(listed(hyps, b)):
            counts[tokens] += 1
            assert abs(float(hyps.sampling_log_probs[b, i]) - math.log(law[tokens][0])) < 2e-5
            assert abs(float(hyps.log_probs[b, i]) - law[tokens][1]) < 2e-5
    assert chi_square_p([counts[x] for x in leaves], [2400 * law[x][0] for x in leaves]) > ALPHA


# ---------------------------------------------------------------------------------------------------------------------
# Arithmetic


def prefix_masses(leaves, log_q, depth):
    masses = {}
    for leaf, lq in zip(leaves, log_q, strict=True):
        masses[leaf.tokens[:depth]] = masses.get(leaf.tokens[:depth], 0.0) + math.exp(lq)
    return masses


def check_counts(index, leaves, log_q, depth):
    """[B, N] leaves: every prefix of this length comes floor or ceil of N * p times in every request."""
    masses = prefix_masses(leaves, log_q, depth)
    n = index.shape[1]
    for prefix, mass in masses.items():
        expected = n * mass
        members = np.array([x.tokens[:depth] == prefix for x in leaves])
        counts = members[index].sum(1)
        slack = 1e-4 if abs(expected - round(expected)) < 1e-4 else 0.0
        assert counts.min() >= math.floor(expected - slack) and counts.max() <= math.ceil(expected + slack), prefix


@pytest.mark.parametrize("name", ["plain", "masked"])
@pytest.mark.parametrize("n", [3, 16])
def test_arithmetic_counts(name, n):
    _, leaves, log_q = model_of(name)
    hyps, index = sample(name, fb.Arithmetic(18), n, 80)
    assert hyps.valid.all()
    check_counts(index, leaves, log_q, 1)
    hyps, index = sample(name, fb.Arithmetic(18, rotate=False), n, 80)
    assert hyps.valid.all()
    for depth in (1, 2, 3):
        check_counts(index, leaves, log_q, depth)


@pytest.mark.parametrize("rotate", [True, False])
@pytest.mark.parametrize(("name", "n"), [("plain", 4), ("masked", 5)])
def test_arithmetic_marginals(name, n, rotate):
    _, leaves, log_q = model_of(name)
    requests = 600
    hyps, index = sample(name, fb.Arithmetic(19, rotate=rotate), n, requests)
    assert np.abs(hyps.sampling_log_probs.double().numpy() - log_q[index]).max() < 2e-5
    counts = np.stack([np.bincount(row, minlength=len(leaves)) for row in index])
    for depth in (1, 2, 3):
        for prefix, mass in prefix_masses(leaves, log_q, depth).items():
            mine = counts[:, [x.tokens[:depth] == prefix for x in leaves]].sum(1)
            expected = n * mass
            if expected * requests < 20 or abs(expected - round(expected)) < 1e-3:
                continue
            assert mean_p(mine, expected) > ALPHA / 30, prefix
    for values, truth in entropy_and_more(leaves, log_q):
        assert mean_p(values[index].mean(1), truth) > ALPHA
    assert torch.allclose(fb.weights(hyps), torch.full((), 1 / n).double())


@pytest.mark.parametrize(
    "selection", [fb.Stochastic(20), fb.Sample(20), fb.Arithmetic(20), fb.Arithmetic(20, rotate=False)], ids=str
)
def test_one_row_is_one_exact_sample(selection):
    _, leaves, log_q = model_of("plain")
    _, index = sample("plain", selection, 1)
    assert chi_square_p(np.bincount(index[:, 0], minlength=len(leaves)), len(index) * np.exp(log_q)) > ALPHA


def test_arithmetic_codes_do_not_run_out():
    """200 fair bits are 200 fair bits, independent along the sequence: 64 bits of a code are not the end."""

    def model(tokens, cache):
        return torch.zeros(len(tokens), 2), tokens

    search = make(beam_size=4, max_length=200, selection=fb.Arithmetic(21))
    state = search.init(batch_size=40, device="cpu")
    tokens = torch.zeros(40, dtype=torch.long)
    for _ in range(200):
        tokens = search.step(state, model(tokens, None)[0]).tokens.flatten()
    bits = search.finalize(state).tokens.numpy()  # [40, 4, 200]
    assert (bits.sum(1)[:, 0] == 2).all()
    late = bits[:, :, 100:]
    assert binomial_p(int(late.sum()), late.size, 0.5) > ALPHA
    pairs = np.bincount((late[..., :-1] * 2 + late[..., 1:]).ravel(), minlength=4)
    assert chi_square_p(pairs, np.full(4, pairs.sum() / 4)) > ALPHA
    assert len({tuple(x) for x in late.reshape(-1, 100).tolist()}) == 160


# ---------------------------------------------------------------------------------------------------------------------
# ConditionalPoisson


@pytest.mark.parametrize("k", [1, 2, 3])
def test_conditional_poisson_one_step(k):
    table = Table(6, 1, 1, seed=54, scale=1.3)
    log_p = np.array([x.log_prob for x in table.leaves()])
    sets, pi = poisson_sets(log_p, k)
    hyps, state = drive(make(beam_size=k, max_length=1, selection=fb.ConditionalPoisson(22)), table, [0] * 3000)
    assert (state.flags == 0).all() and hyps.valid.all()
    chosen = hyps.tokens[..., 0].numpy()
    assert np.abs(hyps.log_inclusion.numpy() - np.log(pi)[chosen]).max() < 1e-4
    assert inclusion_p(np.bincount(chosen.ravel(), minlength=6), 3000, pi) > ALPHA
    counts = {s: 0 for s, _ in sets}
    for row in np.sort(chosen, 1).tolist():
        counts[tuple(row)] += 1
    assert chi_square_p([counts[s] for s, _ in sets], [3000 * w for _, w in sets]) > ALPHA


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize(
    ("k", "settings"),
    [
        (2, {"vocab": 4, "seed": 55, "eos": [3], "eos_bias": 0.5}),
        (3, {"vocab": 3, "seed": 56, "eos": [2]}),
        (2, {"vocab": 4, "seed": 57, "eos": [3], "allow": 0.7}),
    ],
)
def test_conditional_poisson_two_steps(k, settings, mixed):
    """Every set with its path probabilities, as often as the enumeration of all runs says; alone and beside wider."""
    table = Table(length=2, scale=1.0, **settings)
    law, mass = poisson_runs(table, k, 2)
    # the estimator is unbiased over all runs: a check of the oracle
    total = sum(w * sum(mass[x] / math.exp(pi) for x, pi in run) for run, w in law.items())
    assert abs(total - 1) < 1e-9
    runs = [(sorted(x for x, _ in run), dict(run), w) for run, w in law.items()]
    sets = {}
    for names, _, w in runs:
        sets[tuple(names)] = sets.get(tuple(names), 0.0) + w
    requests = 1500
    wider = k + 2 if mixed else k
    widths = [k if b % 2 == 0 else wider for b in range(requests)]
    search = make(beam_size=widths, max_length=2, eos_id=settings["eos"], selection=fb.ConditionalPoisson(23))
    hyps, state = drive(search, table, [0] * requests)
    assert (state.flags == 0).all()
    rows = range(0, requests, 2 if mixed else 1)
    counts = dict.fromkeys(sets, 0)
    paths = {}
    for names, run, _ in runs:
        paths.setdefault(tuple(names), []).append([run[x] for x in names])
    paths = {s: np.array(x) for s, x in paths.items()}
    for b in rows:
        found = listed(hyps, b)
        order = sorted(range(len(found)), key=lambda i: found[i])
        names = tuple(found[i] for i in order)
        counts[names] += 1
        mine = hyps.log_inclusion[b].double().numpy()[order]
        assert np.abs(paths[names] - mine).max(1).min() < 1e-4, "no run has these inclusion probabilities"
        for i in range(len(found)):
            assert abs(float(hyps.sampling_log_probs[b, i]) - math.log(mass[found[i]])) < 2e-5
    assert chi_square_p([counts[s] for s in sets], [len(rows) * w for w in sets.values()]) > ALPHA
    if not mixed:
        leaves = table.leaves(normalize="allowed")
        check_unbiased(hyps, index_of(hyps, leaves), leaves, np.array([x.log_prob for x in leaves]))


@pytest.mark.parametrize(("name", "k"), [("plain", 2), ("plain", 4), ("masked", 3)])
def test_conditional_poisson_estimates_are_unbiased(name, k):
    _, leaves, log_q = model_of(name)
    hyps, index = sample(name, fb.ConditionalPoisson(24), k)
    assert (np.sort(index, 1)[:, 1:] != np.sort(index, 1)[:, :-1]).all(), "a leaf twice"
    assert np.abs(hyps.sampling_log_probs.double().numpy() - log_q[index]).max() < 2e-5
    check_unbiased(hyps, index, leaves, log_q)
    if name == "plain" and k == 2:
        law, _ = poisson_runs(model_of(name)[0], k, 3)
        pi = np.zeros(len(leaves))
        place = {x.tokens: i for i, x in enumerate(leaves)}
        for run, w in law.items():
            for tokens, _ in run:
                pi[place[tokens]] += w
        assert inclusion_p(np.bincount(index.ravel(), minlength=len(leaves)), len(index), pi) > ALPHA


@pytest.mark.parametrize("more", [0, 1])
def test_conditional_poisson_takes_all_there_are(more):
    _, leaves, log_q = model_of("plain")
    hyps, index = sample("plain", fb.ConditionalPoisson(25), len(leaves) + more, 50)
    assert (hyps.valid.sum(1) == len(leaves)).all()
    assert (np.sort(index[:, : len(leaves)], 1) == np.arange(len(leaves))).all()
    assert (hyps.log_inclusion[hyps.valid] == 0).all()
    for values, truth in entropy_and_more(leaves, log_q):
        f = torch.from_numpy(np.where(index >= 0, values[index], math.nan))
        for normalized in (True, False):
            assert torch.allclose(fb.estimate(hyps, f, normalized), torch.tensor(truth).double(), atol=1e-5)


def test_conditional_poisson_forces_what_is_certain():
    """p = 1 in float32: always there with log pi = 0; the rest of the set follows the law of the others."""
    row = torch.tensor([-30.0, 0.0, -30.7, -31.1, -29.5])
    search = make(beam_size=3, max_length=1, selection=fb.ConditionalPoisson(26))
    hyps, state = drive(search, lambda tokens, cache: (row.repeat(len(tokens), 1), tokens), [0] * 2000)
    assert hyps.valid.all() and (state.flags == 0).all()
    chosen = hyps.tokens[..., 0]
    certain = chosen == 1
    assert (certain.sum(1) == 1).all()
    assert (hyps.log_inclusion[certain] == 0).all()
    others = [0, 2, 3, 4]
    sets, pi = poisson_sets(row[others].double().numpy(), 2)
    full = np.zeros(5)
    full[others] = pi
    full[1] = 1.0
    assert np.abs(hyps.log_inclusion.exp().numpy() - full[chosen.numpy()]).max() < 1e-4
    counts = {s: 0 for s, _ in sets}
    for r in chosen.tolist():
        counts[tuple(sorted(others.index(v) for v in r if v != 1))] += 1
    assert chi_square_p([counts[s] for s, _ in sets], [2000 * w for _, w in sets]) > ALPHA


@pytest.mark.parametrize("n", [9000, 70001])
@pytest.mark.parametrize("scale", [0.0, 1.0, 4.0])
def test_conditional_poisson_of_many_candidates(scale, n):
    """Within 1e-4 of the exact inclusion probabilities, or flagged."""
    k = 4
    row = torch.from_numpy(np.random.default_rng(8).normal(size=n) * scale).float()
    log_p = torch.log_softmax(row.double(), 0).numpy()
    w = np.exp(log_p) / -np.expm1(log_p)
    search = make(beam_size=k, max_length=1, selection=fb.ConditionalPoisson(27))
    hyps, state = drive(search, lambda tokens, cache: (row.repeat(len(tokens), 1), tokens), [0] * 20)
    # e_j of all, then of all but one by the recursion e_j(-i) = e_j - w_i e_{j-1}(-i)
    e = [1.0] + [0.0] * k
    for x in w:
        for j in range(k, 0, -1):
            e[j] += x * e[j - 1]
    without = np.ones_like(w)
    for j in range(1, k):
        without = e[j] - w * without
    pi = w * without / e[k]
    assert abs(pi.sum() - k) < 1e-6
    error = np.abs(hyps.log_inclusion.exp().numpy() - pi[hyps.tokens[..., 0].numpy()]).max(1)
    flagged = (state.flags & fb.FLAG_INEXACT).numpy() != 0
    assert ((error < 1e-4) | flagged).all()


# ---------------------------------------------------------------------------------------------------------------------
# a wide vocabulary: more than one chunk and group of the summary, and a width that divides by nothing


@functools.cache
def wide_sample(selection, k, requests=1000):
    rng = np.random.default_rng(61)
    row = torch.from_numpy(rng.normal(size=5003) * 2.2).float()
    allowed = rng.random(5003) < 0.8
    words = np.zeros(5024, bool)
    words[:5003] = allowed
    bits = torch.from_numpy(np.packbits(words, bitorder="little").view(np.int32))[None]

    class Model:
        def __call__(self, tokens, cache):
            return row.repeat(len(tokens), 1), tokens

        def bitmask(self, cache):
            return bits.repeat(len(cache), 1)

    log_q = row.double().numpy() - np.log(np.exp(row.double().numpy()[allowed]).sum())
    log_q[~allowed] = -np.inf
    search = make(beam_size=k, max_length=1, selection=selection)
    hyps, state = drive(search, Model(), [0] * requests)
    assert hyps.valid.all() and (state.flags == 0).all()
    tokens = hyps.tokens[..., 0].numpy()
    assert allowed[tokens].all()
    assert np.abs(hyps.sampling_log_probs.double().numpy() - log_q[tokens]).max() < 2e-5
    return hyps, tokens, log_q


def check_wide_estimates(hyps, tokens, log_q):
    q = np.exp(log_q)
    finite = np.where(q > 0, log_q, 0.0)
    for values in (-finite, (np.arange(len(q)) % 7 < 3).astype(float)):
        estimates = fb.estimate(hyps, torch.from_numpy(values[tokens]), normalized=False)
        assert mean_p(estimates.numpy(), float((q * values).sum())) > ALPHA


def test_stochastic_over_a_wide_vocabulary():
    hyps, tokens, log_q = wide_sample(fb.Stochastic(28), 4)
    q = np.exp(log_q)
    n = len(tokens)
    assert (np.sort(tokens, 1)[:, 1:] != np.sort(tokens, 1)[:, :-1]).all()
    assert chi_square_p(np.bincount(tokens[:, 0], minlength=len(q)), n * q) > ALPHA
    second = q * ((q / (1 - q)).sum() - q / (1 - q))
    assert chi_square_p(np.bincount(tokens[:, 1], minlength=len(q)), n * second) > ALPHA
    assert kolmogorov_p(np.exp(-np.exp(-hyps.perturbed[:, 0].double().numpy()))) > ALPHA
    # Plackett-Luce's gaps: exp(-G) of the k best is a Poisson process thinned by what is gone, uniform after a change
    times = np.exp(-hyps.perturbed.double().numpy())
    gone = np.cumsum(np.concatenate([np.zeros((n, 1)), q[tokens[:, :-1]]], 1), 1)
    waits = np.diff(np.concatenate([np.zeros((n, 1)), times], 1), axis=1) * (1 - gone)
    for j in range(4):
        assert kolmogorov_p(-np.expm1(-waits[:, j])) > ALPHA
    check_wide_estimates(hyps, tokens, log_q)


def test_conditional_poisson_over_a_wide_vocabulary():
    hyps, tokens, log_q = wide_sample(fb.ConditionalPoisson(28), 2)
    w = np.exp(log_q) / -np.expm1(log_q)
    pi = w * (w.sum() - w)
    pi *= 2 / pi.sum()
    assert np.abs(hyps.log_inclusion.double().exp().numpy() - pi[tokens]).max() < 1e-4
    assert (tokens[:, 0] != tokens[:, 1]).all()
    best = np.argsort(-pi)[:40]
    counts = np.bincount(tokens.ravel(), minlength=len(w))
    assert inclusion_p(counts[best], len(tokens), pi[best]) > ALPHA
    check_wide_estimates(hyps, tokens, log_q)


def test_samplers_over_a_wide_vocabulary():
    _, tokens, log_q = wide_sample(fb.Sample(28), 4)
    q = np.exp(log_q)
    assert chi_square_p(np.bincount(tokens.ravel(), minlength=len(q)), tokens.size * q) > ALPHA
    _, tokens, _ = wide_sample(fb.Arithmetic(28), 64, 60)
    counts = np.stack([np.bincount(row, minlength=len(q)) for row in tokens])
    expected = 64 * q
    sure = np.abs(expected - np.round(expected)) > 1e-4
    assert (counts >= np.floor(expected))[:, sure].all() and (counts <= np.ceil(expected))[:, sure].all()
    for width in (8, 64, 512):  # any interval of tokens is an interval of codes up to rotation
        part = np.add.reduceat(expected, np.arange(0, len(q), width))
        mine = np.add.reduceat(counts, np.arange(0, len(q), width), axis=1)
        assert (np.abs(mine.mean(0) - part) < 5 * np.sqrt(np.maximum(part, 0.2) / len(counts))).all()


@pytest.mark.parametrize(
    "filters", [{"top_p": 0.9}, {"top_k": 700}, {"top_k": 900, "top_p": 0.8}, {"top_p": 0.95, "min_p": 0.02}], ids=str
)
@pytest.mark.parametrize("coarse", [None, 0.25])
def test_filters_that_keep_hundreds(filters, coarse):
    """What is drawn is kept, and its probability says that all else that should be was kept too."""
    row = np.random.default_rng(63).normal(size=3001) * 0.9
    row = (row if coarse is None else np.round(row / coarse) * coarse).astype(np.float32)
    q = naive_filter(row, **filters)
    assert (q > 0).sum() > 300
    search = make(beam_size=64, max_length=1, selection=fb.Sample(29, **filters))
    hyps, _ = drive(search, lambda tokens, cache: (torch.from_numpy(row).repeat(len(tokens), 1), tokens), [0] * 50)
    tokens = hyps.tokens[..., 0].numpy()
    assert (q[tokens] > 0).all(), "drawn though filtered"
    assert np.abs(hyps.sampling_log_probs.double().numpy() - np.log(q[tokens])).max() < 5e-6
    assert chi_square_p(np.bincount(tokens.ravel(), minlength=3001), tokens.size * q) > ALPHA


class TwoSteps:
    """150 tokens, so that groups of the summary hold several; the second row depends on the first token modulo 5."""

    rows = torch.from_numpy(np.random.default_rng(62).normal(size=(6, 150)) * 1.8).float()

    def __call__(self, tokens, cache):
        place = torch.full_like(tokens, 5) if cache is None else tokens % 5
        return self.rows[place], tokens

    def log_q(self):
        """[150, 150], of both tokens."""
        log_p = torch.log_softmax(self.rows.double(), 1).numpy()
        return log_p[5][:, None] + log_p[np.arange(150) % 5]


@functools.cache
def two_steps(selection, k, requests):
    hyps, state = drive(make(beam_size=k, max_length=2, selection=selection), TwoSteps(), [0] * requests)
    assert hyps.valid.all() and (state.flags == 0).all()
    log_q = TwoSteps().log_q()
    tokens = hyps.tokens.numpy()
    found = tokens[..., 0] * 150 + tokens[..., 1]
    assert np.abs(hyps.sampling_log_probs.double().numpy() - log_q.ravel()[found]).max() < 2e-5
    return hyps, found, log_q


def test_stochastic_in_two_steps_over_groups():
    hyps, found, log_q = two_steps(fb.Stochastic(30), 4, 800)
    q = np.exp(log_q.ravel())
    assert (np.sort(found, 1)[:, 1:] != np.sort(found, 1)[:, :-1]).all()
    assert chi_square_p(np.bincount(found[:, 0], minlength=22500), len(found) * q) > ALPHA
    second = q * ((q / (1 - q)).sum() - q / (1 - q))
    assert chi_square_p(np.bincount(found[:, 1], minlength=22500), len(found) * second) > ALPHA
    times = np.exp(-hyps.perturbed.double().numpy())
    gone = np.cumsum(np.concatenate([np.zeros((len(found), 1)), q[found[:, :-1]]], 1), 1)
    waits = np.diff(np.concatenate([np.zeros((len(found), 1)), times], 1), axis=1) * (1 - gone)
    for j in range(4):
        assert kolmogorov_p(-np.expm1(-waits[:, j])) > ALPHA
    check_wide_estimates(hyps, found, log_q.ravel())


def test_samplers_in_two_steps_over_groups():
    _, found, log_q = two_steps(fb.Sample(30), 4, 800)
    q = np.exp(log_q.ravel())
    assert chi_square_p(np.bincount(found.ravel(), minlength=22500), found.size * q) > ALPHA
    n = 400
    _, found, _ = two_steps(fb.Arithmetic(30, rotate=False), n, 20)
    for masses, events in ((q, found), (q.reshape(150, 150).sum(1), found // 150)):
        counts = np.stack([np.bincount(x, minlength=len(masses)) for x in events])
        expected = n * masses
        sure = np.abs(expected - np.round(expected)) > 1e-3
        assert (counts >= np.floor(expected))[:, sure].all() and (counts <= np.ceil(expected))[:, sure].all()
    _, found, _ = two_steps(fb.Arithmetic(30), 1, 2000)
    assert chi_square_p(np.bincount(found.ravel(), minlength=22500), found.size * q) > ALPHA


def test_conditional_poisson_in_two_steps_over_groups():
    check_wide_estimates(*(lambda h, f, q: (h, f, q.ravel()))(*two_steps(fb.ConditionalPoisson(30), 4, 800)))
