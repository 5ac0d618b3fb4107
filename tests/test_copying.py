"""``fb.Copy`` against trying every way to cut an output into spans of the source."""

import functools
import itertools

import numpy as np
import pytest
import torch

import flashbeam as fb
from flashbeam import AllOf, Copy, NoRepeatNgram
from legal import as_dicts, assert_batch_invariant, assert_enumerates, assert_masks, context, enumerated, search_all
from oracles import TableLM


@functools.cache
def is_copy(output, source, monotone, min_span, begin=0):
    """Whether ``output`` is made of spans of ``source``, those from ``begin`` on if they must be in order."""
    if not output:
        return True
    return any(
        source[i : i + n] == output[:n] and is_copy(output[n:], source, monotone, min_span, i + n if monotone else 0)
        for n in range(min_span, len(output) + 1)
        for i in range(begin, len(source) - n + 1)
    )


def copies(source, monotone=True, min_span=1, *, vocab=4, eos=(), min_length=0, max_length=4):
    """Whether ``token`` can still lead to an output that is a copy and has a legal length."""
    copied = functools.partial(is_copy, source=tuple(source), monotone=monotone, min_span=min_span)
    lengths = range(max(min_length - 1, 0), max_length + 1) if eos else [max_length]  # without EOS
    outputs = [
        output
        for length in lengths
        for output in itertools.product(sorted(set(source)), repeat=length)
        if copied(output)
    ]
    begun = {output[:n] for output in outputs for n in range(len(output) + 1)}

    def allowed(said, token):
        return copied(said) if token in eos else (*said, token) in begun

    return allowed


def settings(rng, tokens, longest):
    return rng.integers(0, tokens, rng.integers(0, longest)).tolist(), bool(rng.integers(2)), int(rng.integers(1, 5))


LENGTHS = [
    dict(eos=(), max_length=5),
    dict(eos=(3,), max_length=5),
    dict(eos=(3,), max_length=5, min_length=4),
    dict(eos=(2, 3), max_length=4, min_length=4),
]


@pytest.mark.parametrize("lengths", LENGTHS)
def test_masks_match_every_way_to_cut(lengths):
    rng = np.random.default_rng(0)
    tokens = 4 - len(lengths["eos"] or (3,))
    given = [settings(rng, tokens, 8) for _ in range(40)]
    sequences = np.array(list(itertools.product(range(tokens), repeat=lengths["max_length"])))
    oracles = [functools.cache(copies(*each, **lengths)) for each in given]
    where = context(40, len(sequences), 4, **lengths)
    legal = assert_masks([Copy(*each) for each in given], oracles, np.tile(sequences, (40, 1)), where)
    assert legal.any() and not legal.all()


@pytest.mark.parametrize("monotone", [True, False])
def test_numbers_of_tokens_that_spans_make(monotone):
    """Where spans are long, only some lengths can be made: everything else is barred from the beginning."""
    for length, min_span, size in itertools.product(range(1, 12), (2, 3, 4), (3, 4, 5)):
        possible = any(
            k * min_span <= length <= k * size
            for k in range(length + 1)
            if size >= min_span and (k < 2 or not monotone)
        )
        bound = Copy.bind([Copy(range(size), monotone, min_span)], context(1, 1, 6, max_length=length))
        assert bool(bound.bitmask(bound.init()).any()) == possible


def test_longer_sources():
    rng = np.random.default_rng(1)
    source = rng.integers(0, 70, 300)
    for monotone, min_span in [(True, 1), (True, 3), (False, 1), (False, 4)]:
        bound = Copy.bind([Copy(source, monotone, min_span), None], context(2, 4, 70, max_length=12))
        state, said = bound.init(), [[] for _ in range(8)]
        for _ in range(12):
            bits = bound.bitmask(state)
            allowed = [[t for t in range(70) if bits[row, t // 32] >> t % 32 & 1] for row in range(8)]
            assert allowed[4:] == [list(range(70))] * 4
            tokens = [int(rng.choice(each)) for each in allowed]
            said = [[*each, token] for each, token in zip(said, tokens, strict=True)]
            state = bound.advance(state, torch.tensor(tokens))
        for output in said[:4]:
            assert is_copy(tuple(output), tuple(source.tolist()), monotone, min_span)


@pytest.mark.parametrize(
    "options",
    [
        dict(eos=(), max_length=4),
        dict(eos=(3,), max_length=4),
        dict(eos=(3,), max_length=4, min_length=3),
        dict(eos=(3,), max_length=4, finished="in_place"),
        dict(eos=(3,), max_length=4, min_length=2, normalize="allowed", finished="in_place"),
        dict(eos=(), max_length=4, normalize="allowed"),
        dict(eos=(3,), max_length=4, min_length=2, selection=fb.Stochastic(seed=1)),
    ],
)
def test_search_finds_exactly_the_legal(options):
    lengths = {name: options[name] for name in ("eos", "min_length", "max_length") if name in options}
    given = [([0, 1, 2, 0],), ([1, 0, 1, 1, 2], False), ([0, 2, 1, 1, 0], True, 2), ([0, 1, 2, 2], False, 2), ([],)]
    oracles = [copies(*each, **lengths) for each in given]
    assert_enumerates([*(Copy(*each) for each in given), None], [*oracles, None], 4, **options)


def test_increasing_indices():
    found = search_all([Copy(range(n)) for n in (3, 5, 0)], 6, 3, max_length=5, eos_id=5)
    for n, plans in zip((3, 5, 0), found, strict=True):
        subsets = [plan for size in range(n + 1) for plan in itertools.combinations(range(n), size)]
        assert {plan[:-1] if plan[-1] == 5 else plan for plan in plans} == set(subsets)


def test_with_other_constraints():
    both = AllOf(Copy([0, 1, 2, 1, 0], False), NoRepeatNgram(2), Copy([0, 1, 0, 2, 1]))
    parts = [copies([0, 1, 2, 1, 0], False, eos=(3,)), copies([0, 1, 0, 2, 1], eos=(3,))]

    def allowed(said, token):
        repeats = (*said[-1:], token) in itertools.pairwise(said)
        return not repeats and all(part(said, token) for part in parts)

    assert_enumerates([both], [allowed], 4, eos=(3,), max_length=4, finished="in_place")


def test_nothing_long_enough_is_a_dead_end():
    search = fb.BeamSearch(2, 4, constraint=[Copy([0, 1, 2], True), Copy([0, 1, 2], False, 3), Copy([0, 1], False, 3)])
    state = search.init(3)
    search.step(state, torch.zeros(3, 4))
    assert state.flags.tolist() == [fb.FLAG_DEAD_END] * 3 and state.done.all()


def test_small_beams_never_run_into_a_dead_end():
    search = fb.BeamSearch(2, 7, 4, min_length=7, constraint=Copy([0, 1, 2, 3, 0, 1, 2, 3], True, 3))
    hyps = fb.decode(search, TableLM(5), torch.arange(20))
    for found in as_dicts(hyps):
        assert found
        for tokens in found:
            output = tuple(token for token in tokens if token != 4)
            assert is_copy(output, (0, 1, 2, 3, 0, 1, 2, 3), True, 3)


@pytest.mark.parametrize("selection", [fb.TopK(), fb.Stochastic(seed=3)])
def test_batch_invariant(selection):
    constraints = [Copy([1, 2, 1, 5, 4, 0, 0]), None, Copy([2, 1], False), Copy([0, 1, 2, 3, 4, 5] * 3, True, 4)]
    assert_batch_invariant(constraints, 7, max_length=6, eos_id=6, selection=selection)


def test_lengths_per_request():
    limits = dict(min_length=[0, 3, 2], max_length=[2, 4, 3])
    found = search_all(Copy([0, 1, 2, 0, 1], True, 2), 4, 3, eos_id=3, **limits)
    for bos, (low, high) in enumerate(zip(*limits.values(), strict=True)):
        oracle = copies([0, 1, 2, 0, 1], True, 2, eos=(3,), min_length=low, max_length=high)
        want = enumerated(oracle, 4, bos, eos=(3,), min_length=low, max_length=high)
        assert found[bos].keys() == want.keys()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((3,), ValueError, r"source: expected one dimension, got shape \[\]"),
        (([0.5],), TypeError, "source: expected ints, got float64"),
        (([-1],), ValueError, "source: expected ints from 0 to"),
        (([1], 1), TypeError, "monotone: expected a bool, got int"),
        (([1], True, 0), ValueError, "min_span: expected an int >= 1, got 0"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        Copy(*arguments)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([1, 5], "source: expected ids inside the vocabulary of 5, got 5"),
        ([1, 4, 2], "source: expected no EOS, got 4"),
    ],
)
def test_refused_at_the_first_step(source, message):
    search = fb.BeamSearch(2, 4, 4, constraint=[None, Copy(source)])
    state = search.init(2)
    with pytest.raises(ValueError, match=message):
        search.step(state, torch.zeros(2, 5))
    assert state.vocab_size is None
