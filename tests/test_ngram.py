"""``fb.NoRepeatNgram`` against counting n-grams in Python."""

import itertools

import numpy as np
import pytest
import torch

import flashbeam as fb
from flashbeam import AllOf, NoRepeatNgram, Prefix
from legal import assert_batch_invariant, assert_enumerates, assert_masks, context, search_all

SETTINGS = [
    dict(eos=(), max_length=4),
    dict(eos=(3,), max_length=4),
    dict(eos=(3,), max_length=4, min_length=3),
    dict(eos=(1, 3), max_length=4, finished="in_place"),
    dict(eos=(3,), max_length=4, normalize="allowed"),
    dict(eos=(), max_length=4, normalize="allowed", finished="in_place"),
    dict(eos=(3,), max_length=4, min_length=2, selection=fb.Stochastic(seed=1)),
]


def no_repeat(n, prompt=(), eos=()):
    """Whether ``token`` ends an n-gram that ended before."""

    def allowed(said, token):
        tokens = [*prompt, *said, token]
        grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
        return token in eos or not grams or grams[-1] not in grams[:-1]

    return allowed


@pytest.mark.parametrize("n", [1, 2, 3, 4, 7])
def test_matches_counting(n):
    vocab = 40 if n == 1 else 3  # words with bit 31, and past the first; long repeats of every period
    sequences = np.random.default_rng(n).integers(0, vocab, (30, 20))
    legal = assert_masks([NoRepeatNgram(n)], [no_repeat(n)], sequences, context(1, 30, vocab, max_length=20))
    assert n == 7 or not legal.all()


def test_every_short_sequence():
    sequences = np.array(list(itertools.product(range(3), repeat=6)))
    assert_masks([NoRepeatNgram(3)], [no_repeat(3)], sequences, context(1, len(sequences), 3, max_length=6))


def test_requests_differ():
    rng = np.random.default_rng(0)
    prompts = [(), (0, 1, 2, 0, 1, 2, 2, 2), (2,), (1, 3, 1, 3, 0)]
    constraints = [NoRepeatNgram(n, prompt) for n, prompt in zip((1, 3, 2, 2), prompts, strict=True)]
    oracles = [no_repeat(n, prompt, (3,)) for n, prompt in zip((1, 3, 2, 2), prompts, strict=True)]
    where = context(5, 20, 4, eos=(3,), max_length=9)
    assert_masks([*constraints, None], [*oracles, None], rng.integers(0, 3, (100, 9)), where)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_prompts_that_repeat_themselves(n):
    rng = np.random.default_rng(n)
    for length in range(12):
        prompt = rng.integers(0, 3, length).tolist()
        where = context(1, 15, 3, max_length=7)
        assert_masks([NoRepeatNgram(n, prompt)], [no_repeat(n, prompt)], rng.integers(0, 3, (15, 7)), where)


def test_eos_of_the_prompt_is_not_barred():
    where = context(1, 1, 4, eos=(3,))
    assert_masks(
        [NoRepeatNgram(1, [0, 3])], [lambda said, token: token not in (0, *said)], np.array([[1, 2, 3]]), where
    )


def test_rows_follow_their_beams():
    bound = NoRepeatNgram.bind([NoRepeatNgram(2)], context(1, 3, 4))
    state = bound.advance(bound.init(), torch.tensor([0, 1, 2]))
    state = bound.move(state, torch.tensor([2, 0, 0]), torch.tensor([0, 2, 0]))
    assert state.said.tokens.tolist() == [[2, 0, -1, -1], [0, 2, -1, -1], [0, 0, -1, -1]]


def test_rows_stay_in_range_after_the_end():
    where = context(2, 2, 4, max_length=3)
    bound = NoRepeatNgram.bind([NoRepeatNgram(1), None], where)
    state = bound.init()
    for _ in range(6):
        state = bound.advance(state, torch.zeros(4, dtype=torch.int64))
        assert bound.bitmask(state)[2:].tolist() == [[-1], [-1]]


@pytest.mark.parametrize("options", SETTINGS)
def test_search_finds_exactly_the_legal(options):
    eos = options["eos"]
    constraints = [NoRepeatNgram(2), NoRepeatNgram(1), None, NoRepeatNgram(2, [0, 1, 1])]
    oracles = [no_repeat(2, eos=eos), no_repeat(1, eos=eos), None, no_repeat(2, [0, 1, 1], eos)]
    assert_enumerates(constraints, oracles, 4, **options)


def test_with_other_constraints():
    both = AllOf(NoRepeatNgram(1), NoRepeatNgram(3), Prefix([2]))
    allowed = lambda said, token: no_repeat(1)(said, token) and (said != () or token == 2)  # noqa: E731
    assert_enumerates([both], [allowed], 4, max_length=4, finished="in_place")


def test_no_continuation_is_a_dead_end():
    search = fb.BeamSearch(2, 5, None, constraint=NoRepeatNgram(1))
    state = search.init(1)
    for _ in range(5):
        search.step(state, torch.zeros(2, 3))
    assert state.flags.tolist() == [fb.FLAG_DEAD_END] and not search.finalize(state).valid.any()


@pytest.mark.parametrize("selection", [fb.TopK(), fb.Stochastic(seed=3)])
def test_batch_invariant(selection):
    constraints = [NoRepeatNgram(2, [1, 2, 1]), None, NoRepeatNgram(1), NoRepeatNgram(3)]
    assert_batch_invariant(constraints, 7, max_length=6, eos_id=6, selection=selection)


def test_more_than_can_be_said_changes_nothing():
    given = dict(beam_size=5, max_length=5, eos_id=3)
    assert search_all(NoRepeatNgram(10**12), 4, **given) == search_all(None, 4, **given)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0,), ValueError, "n: expected an int >= 1, got 0"),
        ((1.5,), TypeError, "n: expected an int >= 1, got float"),
        ((2, [0.5]), TypeError, "prompt: expected ints, got float64"),
        ((2, [-1]), ValueError, "prompt: expected ints from 0 to"),
        ((2, [[1]]), ValueError, r"prompt: expected one dimension, got shape \[1, 1\]"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        NoRepeatNgram(*arguments)


def test_ids_outside_the_vocabulary():
    search = fb.BeamSearch(2, 4, constraint=NoRepeatNgram(2, [7]))
    with pytest.raises(ValueError, match="prompt: expected ids inside the vocabulary of 5, got 7"):
        search.step(search.init(1), torch.zeros(1, 5))
