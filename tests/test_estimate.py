"""Estimates of expectations, and the weights behind them."""

import pytest
import torch

import flashbeam as fb


def logits_of(prefix_sum, vocab=4):
    """A model whose distribution depends on the sum of the tokens so far."""
    generator = torch.Generator().manual_seed(3)
    return (torch.randn(13, vocab, generator=generator) * 1.5)[prefix_sum]


def decode(rule, beams, batch, dead, steps=3, seed_ids=0):
    """Every request the same model; prefixes whose sum is in ``dead`` have no continuation."""
    search = fb.BeamSearch(beams, steps, None, selection=rule)
    state = search.init(batch, request_ids=torch.arange(batch) + seed_ids)
    total = torch.zeros(batch, dtype=torch.int64)
    for step in range(steps):
        mask = torch.full((len(total), 1), -1, dtype=torch.int32)
        if step:
            mask[torch.isin(total, torch.tensor(dead))] = 0
        moved = search.step(state, logits_of(total), mask)
        total = total[moved.source_rows] + moved.tokens.flatten()
    return search.finalize(state)


def alive_mass(dead, steps=3, vocab=4):
    """The probability that no prefix is dead, by enumeration."""
    mass = {0: 1.0}
    for step in range(steps):
        found = {}
        for total, p in mass.items():
            if step and total in dead:
                continue
            for token, q in enumerate(logits_of(torch.tensor(total)).double().softmax(0).tolist()):
                found[total + token] = found.get(total + token, 0.0) + p * q
        mass = found
    return sum(mass.values())


@pytest.mark.parametrize("beams", [2, 4, 8])
@pytest.mark.parametrize("dead", [[], [1, 4], [0, 2, 3]])
@pytest.mark.parametrize("rule", [fb.Stochastic, fb.ConditionalPoisson])
def test_unbiased_where_prefixes_are_dead(rule, dead, beams):
    batch = 6000
    hyps = decode(rule(5), beams, batch, dead)
    found = fb.estimate(hyps, hyps.valid.double(), normalized=False)
    error = float(found.std()) / batch**0.5
    assert abs(float(found.mean()) - alive_mass(dead)) < 4 * error + 3e-6  # log-probabilities are float32
    assert error < 0.02


def test_no_sequence_counts_at_or_below_the_threshold():
    hyps = decode(fb.Stochastic(1), 4, 500, [1, 4])
    shares = fb.weights(hyps, normalized=False)
    assert torch.equal(shares > 0, hyps.perturbed > hyps.threshold[:, None])
    hyps = decode(fb.Stochastic(1), 4, 500, [])
    assert torch.equal(hyps.threshold, hyps.perturbed[:, 3])
    assert bool((fb.weights(hyps)[:, 3] == 0).all())
    torch.testing.assert_close(fb.weights(hyps).sum(1), torch.ones(500, dtype=torch.float64))


def test_all_there_is_gives_the_expectation_itself():
    hyps = decode(fb.Stochastic(1), 80, 3, [])
    assert bool((hyps.threshold == -torch.inf).all())
    assert int(hyps.valid.sum()) == 3 * 64
    entropy = fb.estimate(hyps, -hyps.log_probs, normalized=False)
    torch.testing.assert_close(entropy, entropy[:1].expand(3))
    total = fb.weights(hyps, normalized=False).sum(1)
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=3e-6)  # log-probabilities are float32


def test_independent_samples_count_alike():
    hyps = decode(fb.Sample(1), 5, 7, [])
    assert bool((fb.weights(hyps) == 0.2).all())
    torch.testing.assert_close(fb.estimate(hyps, hyps.log_probs), hyps.log_probs.double().mean(1))
    hyps = decode(fb.Sample(1), 5, 200, [1, 4])
    found = fb.weights(hyps, normalized=False)  # those that died count 0
    assert bool((found == hyps.valid.double() / 5).all())
    assert bool((fb.weights(hyps).sum(1)[hyps.valid.any(1)] - 1).abs().max() < 1e-12)


def test_what_it_refuses():
    hyps = decode(fb.Stochastic(1), 4, 2, [])
    with pytest.raises(TypeError, match=r"values: expected a tensor, got list"):
        fb.estimate(hyps, [1.0])
    with pytest.raises(ValueError, match=r"values: expected shape \[2, 4\], got \[4\]"):
        fb.estimate(hyps, torch.ones(4))
    with pytest.raises(ValueError, match=r"hyps: expected a beam_size of 2 or more"):
        fb.weights(decode(fb.Stochastic(1), 1, 2, []))
    with pytest.raises(ValueError, match=r"hyps: expected a sample"):
        fb.weights(decode(fb.TopK(), 4, 2, []))
    search = fb.BeamSearch(4, 1, None, selection=fb.Stochastic(1))
    state = search.init(2)
    search.step(state, torch.randn(2, 9))
    with pytest.raises(ValueError, match=r"hyps: expected all 4 hypotheses of each request, got 3"):
        fb.weights(search.finalize(state, 3))
