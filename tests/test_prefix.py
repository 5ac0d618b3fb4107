"""``fb.Prefix`` against comparing with the prefix."""

import math

import numpy as np
import pytest
import torch

import flashbeam as fb
from flashbeam import AllOf, NoRepeatNgram, Prefix
from legal import assert_batch_invariant, assert_enumerates, assert_masks, context, search_all
from oracles import TableLM, log_softmax64

SETTINGS = [
    dict(eos=(), max_length=4),
    dict(eos=(3,), max_length=4),
    dict(eos=(3,), max_length=4, min_length=3),
    dict(eos=(1, 3), max_length=4, finished="in_place"),
    dict(eos=(3,), max_length=4, normalize="allowed", finished="in_place"),
    dict(eos=(3,), max_length=4, min_length=2, selection=fb.Stochastic(seed=1)),
]


def begins(prefix):
    """Whether ``token`` goes on as ``prefix`` does."""
    return lambda said, token: len(said) >= len(prefix) or token == prefix[len(said)]


def test_masks():
    prefixes = [[31, 0, 32], [], [63], [5, 5, 5, 5, 5, 5]]
    sequences = np.random.default_rng(0).integers(0, 70, (10, 5))
    sequences[0, :3], sequences[4, 0], sequences[7] = [31, 0, 32], 63, 5
    legal = assert_masks(
        [*map(Prefix, prefixes), None], [*map(begins, prefixes), None], sequences, context(5, 2, 70, max_length=5)
    )
    assert legal.tolist() == [True, False, True, True, True, False, False, True, True, True]


@pytest.mark.parametrize("options", SETTINGS)
def test_search_finds_exactly_the_legal(options):
    prefixes = [[2, 0], [], [0], [2, 2, 0, 2]]
    assert_enumerates([*map(Prefix, prefixes), None], [*map(begins, prefixes), None], 4, **options)


def test_forced_tokens_have_the_log_probability_of_the_model():
    hyps = fb.decode(fb.BeamSearch(3, 3, constraint=Prefix([2, 1])), TableLM(4), torch.tensor([0]))
    for t, token in enumerate([2, 1]):
        want = log_softmax64(TableLM(4).logits((0, 2, 1)[: t + 1]))[token]
        assert hyps.token_log_probs[0, :, t].tolist() == pytest.approx([want] * 3, abs=1e-5)
    assert hyps.lengths.tolist() == [[3, 3, 3]]


def test_longer_than_max_length_is_followed_as_far_as_it_fits():
    found = search_all([Prefix([1, 2, 0, 2]), Prefix([2])], 4, 2, max_length=[2, 3], eos_id=3)
    assert list(found[0]) == [(1, 2)] and len(found[1]) == 1 + 3 * 4


@pytest.mark.parametrize("finished", ["pool", "in_place"])
def test_may_end_in_eos(finished):
    assert [*search_all(Prefix([1, 3]), 4, max_length=4, eos_id=3, finished=finished)[0]] == [(1, 3)]


def test_forced_eos_before_min_length_is_a_dead_end():
    search = fb.BeamSearch(2, 4, 3, min_length=3, constraint=Prefix([1, 3]))
    state = search.init(1)
    search.step(state, torch.zeros(1, 4))
    search.step(state, torch.zeros(2, 4))
    assert state.done.all() and state.flags.tolist() == [fb.FLAG_DEAD_END]


def test_with_other_constraints():
    both = AllOf(Prefix([2, 1]), NoRepeatNgram(1))
    assert_enumerates([both], [lambda said, token: begins([2, 1])(said, token) and token not in said], 4, max_length=4)
    assert search_all(AllOf(Prefix([1]), Prefix([2])), 4, max_length=3) == [{}]


@pytest.mark.parametrize("selection", [fb.TopK(), fb.Stochastic(seed=3)])
def test_batch_invariant(selection):
    constraints = [Prefix([1, 2, 1, 1]), None, Prefix([]), Prefix([4])]
    assert_batch_invariant(constraints, 7, max_length=6, eos_id=6, selection=selection)


def test_nothing_forced_changes_nothing():
    given = dict(beam_size=5, max_length=5, eos_id=3)
    assert search_all(Prefix([]), 4, **given) == search_all(None, 4, **given)


def test_rows_of_16_bits():
    search = fb.BeamSearch(2, 3, constraint=Prefix([1]))
    state = search.init(1)
    step = search.step(state, torch.zeros(1, 4, dtype=torch.bfloat16))
    assert step.tokens.tolist() == [[1, 0]] and step.valid.tolist() == [[True, False]]
    assert state.log_probs[0, 0].item() == pytest.approx(-math.log(4))


@pytest.mark.parametrize(
    ("tokens", "error", "message"),
    [
        (3, ValueError, r"tokens: expected one dimension, got shape \[\]"),
        (None, TypeError, "tokens: expected ints, got object"),
        ("ab", TypeError, "tokens: expected ints, got"),
        ([-1], ValueError, "tokens: expected ints from 0 to"),
    ],
)
def test_bad_arguments(tokens, error, message):
    with pytest.raises(error, match=message):
        Prefix(tokens)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([1, 5], "tokens: expected ids inside the vocabulary of 5, got 5"),
        ([4, 1], r"tokens: expected EOS only as the last token, got \[4, 1\]"),
    ],
)
def test_refused_at_the_first_step(tokens, message):
    search = fb.BeamSearch(2, 4, 4, constraint=[None, Prefix(tokens)])
    state = search.init(2)
    with pytest.raises(ValueError, match=message):
        search.step(state, torch.zeros(2, 5))
    assert state.vocab_size is None
