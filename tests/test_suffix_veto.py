"""``fb.SuffixVeto`` against searching for substrings."""

import itertools
import pickle

import numpy as np
import pytest
import torch

import flashbeam as fb
from flashbeam import AllOf, NoRepeatNgram, SuffixVeto
from flashbeam.constraint.suffix_array import followed_spans, span_ranks
from flashbeam.kernels import place
from legal import assert_batch_invariant, assert_enumerates, assert_masks, context, search_all

DOCUMENTS = [[0, 1, 0, 1, 2, 2, 2], [], [2], [1, 1, 0, 2]]


def contains(document, span):
    return any(tuple(document[i : i + len(span)]) == tuple(span) for i in range(len(document) - len(span) + 1))


def no_long_span(documents, longest, eos=()):
    """Whether the last ``longest + 1`` tokens, ``token`` included, are nowhere in ``documents``."""

    def allowed(said, token):
        span = (*said, token)[-longest - 1 :]
        return token in eos or len(span) <= longest or not any(contains(document, span) for document in documents)

    return allowed


@pytest.mark.parametrize("length", [0, 1, 2, 3, 4, 5, 7, 8, 30])
def test_span_ranks_order_spans(length):
    text = np.random.default_rng(length).integers(0, 2, 25).astype(np.int32)
    spans = [tuple(text[i : i + length]) for i in range(len(text))]
    order = sorted(set(spans))
    assert span_ranks(text, length).tolist() == [order.index(span) for span in spans]


@pytest.mark.parametrize("length", [0, 1, 2, 3, 6, 7])
def test_followed_spans(length):
    spans = followed_spans([np.array(document, np.int32) for document in DOCUMENTS], length)
    want = {}
    for document in DOCUMENTS:
        for i in range(len(document) - length):
            want.setdefault(tuple(document[i : i + length]), set()).add(document[i + length])
    text = spans.text.tolist()
    got = [tuple(text[start : start + length]) for start in spans.starts]
    assert got == sorted(want)
    for span, first, end in zip(got, spans.indptr, spans.indptr[1:], strict=False):
        tokens = spans.tokens[first:end].tolist()
        assert set(tokens) == want[span]
        assert tokens == sorted(set(tokens), key=lambda token: int(place(torch.tensor(token))))


@pytest.mark.parametrize("longest", [0, 1, 2, 3, 5])
def test_masks_match_substring_search(longest):
    rng = np.random.default_rng(longest)
    documents = [rng.integers(0, 3, n).tolist() for n in (40, 3, 1, 0, 17)]
    sequences = rng.integers(0, 3, (50, 12))
    where = context(1, 50, 4, max_length=12)
    assert_masks([SuffixVeto(documents, longest)], [no_long_span(documents, longest)], sequences, where)


def test_large_vocabulary_and_several_rounds():
    rng = np.random.default_rng(0)
    corpus = rng.integers(0, 70, 3000)
    where = context(1, 40, 1000, max_length=4)
    spans = set(zip(*(corpus[i:].tolist() for i in range(3)), strict=False))  # or the search takes minutes
    at = rng.integers(0, 2990, 40)
    sequences = corpus[at[:, None] + np.arange(4)]
    sequences[20:, 2] = rng.integers(0, 1000, 20)
    oracle = lambda said, token: (*said[-2:], token) not in spans  # noqa: E731
    legal = assert_masks([SuffixVeto(corpus, 2)], [oracle], sequences, where)
    assert not legal[:20].any() and legal[20:].any()


def test_requests_differ():
    rng = np.random.default_rng(3)
    corpora, longest = [DOCUMENTS, [[0, 1, 2] * 5], [[2, 1]], [[]], [[1] * 9], DOCUMENTS], [2, 4, 0, 1, 3, 50]
    constraints = [SuffixVeto(*each) for each in zip(corpora, longest, strict=True)]
    oracles = [no_long_span(*each, (3,)) for each in zip(corpora, longest, strict=True)]
    where = context(8, 12, 4, eos=(3,), max_length=8)
    sequences = rng.integers(0, 3, (96, 8))
    assert_masks([*constraints, None, constraints[0]], [*oracles, None, oracles[0]], sequences, where)


def test_eos_of_the_corpus_is_not_barred():
    where = context(1, 2, 4, eos=(3,))
    corpus = [0, 3, 1, 3]
    sequences = np.array([[0, 2], [1, 2]])
    assert_masks([SuffixVeto(corpus, 0)], [no_long_span([corpus], 0, (3,))], sequences, where)


def test_forms_of_a_corpus():
    forms = [[0, 1, 2], (0, 1, 2), np.array([0, 1, 2]), torch.tensor([0, 1, 2]), [[0, 1, 2]], [np.array([0, 1, 2])]]
    forms += [[torch.tensor([0, 1, 2])], np.array([[0, 1, 2]], np.uint8), [[], [0, 1, 2]]]
    for form in forms:
        spans = SuffixVeto(form, 1).spans
        assert (spans.starts.tolist(), spans.tokens.tolist()) == ([0, 1], [1, 2])
    assert len(SuffixVeto([], 1).spans.starts) == 0


@pytest.mark.parametrize(
    "options",
    [
        dict(eos=(), max_length=4),
        dict(eos=(3,), max_length=4),
        dict(eos=(3,), max_length=4, min_length=3),
        dict(eos=(1, 3), max_length=4, finished="in_place"),
        dict(eos=(3,), max_length=4, normalize="allowed", finished="in_place"),
        dict(eos=(3,), max_length=4, min_length=2, selection=fb.Stochastic(seed=1)),
    ],
)
def test_search_finds_exactly_the_legal(options):
    settings = [(DOCUMENTS, 1), (DOCUMENTS, 3), ([[0, 2, 0, 2, 2]], 0), ([[0, 1, 2]], 9)]
    oracles = [no_long_span(*each, options["eos"]) for each in settings]
    assert_enumerates([*(SuffixVeto(*each) for each in settings), None], [*oracles, None], 4, **options)


def test_with_other_constraints():
    both = AllOf(SuffixVeto(DOCUMENTS, 1), NoRepeatNgram(2), SuffixVeto([3, 3, 1], 1))
    oracles = no_long_span(DOCUMENTS, 1), no_long_span([[3, 3, 1]], 1)

    def allowed(said, token):
        repeats = (*said[-1:], token) in itertools.pairwise(said)
        return not repeats and all(oracle(said, token) for oracle in oracles)

    assert_enumerates([both], [allowed], 4, max_length=4, finished="in_place")


def test_no_output_has_a_long_span_of_a_large_corpus():
    corpus = np.random.default_rng(0).integers(0, 4, 3000)
    text = corpus.tolist()
    for longest in (3, 4):  # nearly every span of 4 occurs
        for options in (dict(), dict(selection=fb.Stochastic(seed=5))):
            found = search_all(SuffixVeto(corpus, longest), 5, 3, beam_size=8, max_length=9, **options)
            for tokens in itertools.chain.from_iterable(found):
                assert not any(contains(text, tokens[i : i + longest + 1]) for i in range(9 - longest))


def test_spans_longer_than_any_change_nothing():
    given = dict(beam_size=5, max_length=5, eos_id=3)
    plain = search_all(None, 4, **given)
    assert search_all(SuffixVeto([0, 1, 2, 0, 1, 2], 5), 4, **given) == plain
    assert search_all(SuffixVeto([0, 1], 2), 4, **given) == plain


def test_no_continuation_is_a_dead_end():
    search = fb.BeamSearch(2, 5, None, constraint=SuffixVeto([0, 0, 1, 1, 0], 1))
    state = search.init(1)
    search.step(state, torch.zeros(1, 2))
    search.step(state, torch.zeros(2, 2))
    assert state.flags.tolist() == [fb.FLAG_DEAD_END]


@pytest.mark.parametrize("selection", [fb.TopK(), fb.Stochastic(seed=3)])
def test_batch_invariant(selection):
    constraints = [SuffixVeto(DOCUMENTS, 1), None, SuffixVeto([[5, 5, 1, 0] * 9], 2), SuffixVeto([1, 2, 3], 0)]
    assert_batch_invariant(constraints, 7, max_length=6, eos_id=6, selection=selection)


def test_pickles():
    veto = SuffixVeto(DOCUMENTS, 2)
    search_all(veto, 4, max_length=4)
    again = pickle.loads(pickle.dumps(veto))
    assert search_all(again, 4, max_length=4) == search_all(veto, 4, max_length=4)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([1], -1), ValueError, "max_span: expected an int >= 0, got -1"),
        (([1], 1.0), TypeError, "max_span: expected an int >= 0, got float"),
        (([0.5], 1), TypeError, "corpus: expected ints, got float64"),
        (([[1], [0.5]], 1), TypeError, r"corpus\[1\]: expected ints, got float64"),
        (([[1], 2], 1), ValueError, r"corpus\[1\]: expected one dimension, got shape \[\]"),
        (([-1], 1), ValueError, "corpus: expected ints from 0 to"),
        ((3, 1), ValueError, r"corpus: expected one dimension, got shape \[\]"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        SuffixVeto(*arguments)


def test_ids_outside_the_vocabulary():
    search = fb.BeamSearch(2, 4, constraint=SuffixVeto([7], 9))
    with pytest.raises(ValueError, match="corpus: expected ids inside the vocabulary of 5, got 7"):
        search.step(search.init(1), torch.zeros(1, 5))
