"""Rewards for tokens and words, and offsets of length norms: told anew, by enumeration, and in the laws they obey."""

import itertools

import pytest
import torch

import flashbeam as fb
import scoring_oracles as oracle
from oracles import TableLM, enumerate_leaves

EOS = 1
WORDS = [0, 3]


def returned(hyps, b=0):
    return [
        (tuple(hyps.tokens[b, i, : hyps.lengths[b, i]].tolist()), float(hyps.scores[b, i]))
        for i in range(hyps.valid[b].sum())
    ]


CASES = {
    "token": (fb.TokenReward(0.8), oracle.token_reward(0.8)),
    "penalty": (fb.TokenReward(-0.5), oracle.token_reward(-0.5)),
    "bounded": (fb.TokenReward(1.1, up_to=3), oracle.token_reward(1.1, 3)),
    "source": (fb.TokenReward(0.9, per_source_token=1.25), oracle.source_reward(0.9, 1.25)),
    "word": (fb.WordReward(0.7, WORDS), oracle.word_reward(0.7, WORDS)),
    "mask": (fb.WordReward(-0.7, torch.tensor([True, False, False, True])), oracle.word_reward(-0.7, WORDS)),
    "uid": (fb.UID("local", 0.2), oracle.uid("local", 0.2)),
}


@pytest.mark.parametrize("regime", ["pool", "in_place"])
def test_a_beam_wide_enough_finds_the_best_of_all(regime):
    """Every term and every two of them together; vocabulary of four, sources of 2 and 3 tokens."""
    lm = TableLM(4, 8)
    sources = oracle.AttendingLM(lm, {5: 2, 6: 3})
    paths = {
        bos: [
            oracle.path(lm.logits, bos, leaf.tokens, attention=sources)
            for leaf in enumerate_leaves(lm.logits, bos, eos=[EOS], max_length=3)
        ]
        for bos in (5, 6)
    }
    combinations = [*itertools.combinations(CASES, 1), *itertools.combinations(CASES, 2)]
    for number, names in enumerate(combinations):
        alpha = [0.0, 1.0, 0.4][number % 3]
        terms = [CASES[name][0] for name in names]
        search = fb.BeamSearch(40, 3, EOS, length_penalty=alpha, terms=terms, finished=regime, stopping=fb.Exact())
        hyps = fb.decode(search, lm, torch.tensor([5, 6]), source_lengths=[2, 3])
        for b, bos in enumerate([5, 6]):
            told = [CASES[name][1] for name in names]
            want = {path.tokens: oracle.score(path, len(path.tokens) ** alpha, told) for path in paths[bos]}
            found = returned(hyps, b)
            best = sorted(want.values(), reverse=True)
            assert [score for _, score in found] == pytest.approx(best, rel=5e-6, abs=5e-6)
            for tokens, score in found:
                assert score == pytest.approx(want[tokens], rel=5e-6, abs=5e-6)


def test_log_probs_remain_the_models():
    lm = TableLM(6, 3)
    search = fb.BeamSearch(4, 6, EOS, terms=[fb.TokenReward(0.5), fb.WordReward(0.3, WORDS)])
    hyps = fb.decode(search, lm, torch.tensor([4]))
    for i, (tokens, score) in enumerate(returned(hyps)):
        surprisals = oracle.path(lm.logits, 4, tokens).surprisals
        assert float(hyps.log_probs[0, i]) == pytest.approx(-surprisals.sum(), rel=2e-6)
        assert hyps.token_log_probs[0, i, : len(tokens)].tolist() == pytest.approx((-surprisals).tolist(), abs=2e-6)
        words = sum(token in WORDS for token in tokens)
        assert score == pytest.approx(-surprisals.mean() + 0.5 * len(tokens) + 0.3 * words, rel=3e-6)


def test_a_reward_makes_hypotheses_longer_up_to_its_bound():
    lm = TableLM(5, 2, eos=[EOS], eos_bias=1.0)
    lengths = []
    for term in [(), fb.TokenReward(5.0, up_to=4), fb.TokenReward(5.0)]:
        search = fb.BeamSearch(4, 8, EOS, length_penalty=0, stopping=fb.Exact(), terms=term)
        lengths.append(int(fb.decode(search, lm, torch.tensor([9])).lengths[0, 0]))
    assert lengths[0] < lengths[1] < lengths[2] == 8


def test_numbers_may_differ_by_request():
    lm, bos = TableLM(5, 2), torch.tensor([4, 4, 4])
    rewards, bounds = [0.0, 0.4, -0.6], [2, 3, 4]
    search = fb.BeamSearch(3, 6, EOS, terms=[fb.TokenReward(rewards, bounds), fb.WordReward(rewards, WORDS)])
    together = fb.decode(search, lm, bos)
    for b in range(3):
        terms = [fb.TokenReward(rewards[b], bounds[b]), fb.WordReward(rewards[b], WORDS)]
        one = fb.decode(fb.BeamSearch(3, 6, EOS, terms=terms), lm, bos[:1])
        assert torch.equal(one.scores[0], together.scores[b]) and torch.equal(one.tokens[0], together.tokens[b])
    with pytest.raises(ValueError, match="reward: expected one value per request, 2, got 3"):
        search.init(2)


@pytest.mark.parametrize("scoring", [fb.LengthPower, fb.GNMT])
def test_an_offset_counts_tokens_that_were_there_before(scoring):
    lm = TableLM(5, 2)
    offsets = [0, 7, 3]
    penalties = [scoring(0.8, offset=offset) for offset in offsets]
    hyps = fb.decode(fb.BeamSearch(4, 6, EOS, length_penalty=penalties), lm, torch.tensor([4, 4, 4]))
    for b, offset in enumerate(offsets):
        for i, (tokens, score) in enumerate(returned(hyps, b)):
            n = len(tokens) + offset
            norm = n**0.8 if scoring is fb.LengthPower else ((5 + n) / 6) ** 0.8
            assert score == pytest.approx(float(hyps.log_probs[b, i]) / norm, rel=1e-6)
    plain = fb.decode(fb.BeamSearch(4, 6, EOS, length_penalty=scoring(0.8)), lm, torch.tensor([4]))
    assert torch.equal(plain.scores[0], hyps.scores[0])


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: fb.TokenReward("much"), TypeError, "reward: expected a number, got str"),
        (lambda: fb.TokenReward(1.0, 0), ValueError, "up_to: expected a number above 0, got 0"),
        (
            lambda: fb.TokenReward(1.0, 3, per_source_token=1.0),
            ValueError,
            "per_source_token: expected None with",
        ),
        (lambda: fb.WordReward(1.0, "ab"), TypeError, "starts: expected a bool tensor or a list of ids, got str"),
        (lambda: fb.WordReward(1.0, torch.tensor([1, 0])), TypeError, "starts: expected bool, got int64"),
        (lambda: fb.WordReward(1.0, torch.ones(2, 2).bool()), ValueError, r"starts: expected shape \[V\] on cpu, got"),
        (lambda: fb.LengthPower(1.0, -1), ValueError, "offset: expected an int >= 0, got -1"),
        (lambda: fb.GNMT(1.0, 0.5), TypeError, "offset: expected an int >= 0, got float"),
    ],
)
def test_bad_arguments_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_bound_of_the_source_needs_to_know_it():
    search = fb.BeamSearch(2, 4, EOS, terms=fb.TokenReward(1.0, per_source_token=2.0))
    with pytest.raises(ValueError, match=r"source_lengths: expected one length per request for TokenReward\(1.0, per"):
        search.init(1)
