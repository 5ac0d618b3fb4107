"""Phrases as a constraint: what is satisfied, and how few tokens still satisfy the rest, against plain search."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

import flashbeam as fb
from flashbeam.constraint import Context
from flashbeam.kernels import unpack_bitmask
from phrase_oracles import fewest, random_phrases, satisfied

EOS = 0


def bound_of(constraints, rows=1, vocab_size=6, max_length=9, eos=(EOS,)):
    """``constraints``, one per request, ``rows`` beams each."""
    lengths = max_length if isinstance(max_length, tuple) else (max_length,) * len(constraints)
    context = Context(len(constraints), rows, vocab_size, torch.device("cpu"), eos, (0,) * len(constraints), lengths)
    return fb.Phrases.bind(constraints, context)


def after(bound, texts):
    """The state after ``texts [R]``, all of one length."""
    state = bound.init()
    for tokens in torch.tensor(texts).T if texts[0] else []:
        state = bound.advance(state, tokens)
    return state


def needed(bound, texts):
    state = after(bound, texts)
    return bound.tables.needed(state.states, state.met).tolist()


def as_lists(phrases):
    return [[list(word) for word in phrase] for phrase in phrases]


def random_texts(rng, tokens, length, count=12):
    return [tuple(rng.choice(tokens) for _ in range(length)) for _ in range(count)]


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("alternatives", [1, 3])
def test_satisfied_where_a_plain_search_finds_every_phrase(ordered, alternatives):
    rng, found = random.Random(alternatives), 0
    for _ in range(60):
        phrases = random_phrases(rng, [1, 2, 3], rng.randint(1, 4), 3, alternatives)
        texts = random_texts(rng, [1, 1, 2, 2, 3, 4], rng.randint(0, 14))
        bound = bound_of([fb.Phrases(as_lists(phrases), ordered)], len(texts))
        want = [satisfied(text, phrases, ordered) for text in texts]
        assert [count == 0 for count in needed(bound, texts)] == want, phrases
        may_end = unpack_bitmask(bound.bitmask(after(bound, texts)), 6)[:, EOS]
        assert may_end.tolist() == want
        found += sum(want)
    assert 100 < found < 600


@pytest.mark.parametrize(
    ("phrases", "text", "ordered", "want"),
    [
        ([[1, 1, 2]], [1, 1, 1, 2], False, 0),  # falls back by one token, not to the start
        ([[1, 1, 2]], [1, 1, 1], False, 1),
        ([[1, 2, 3], [2]], [1, 2, 3], False, 0),  # one inside another
        ([[2], [1, 2, 3]], [1, 2], False, 1),
        ([[1, 2], [2, 3]], [1, 2, 3], False, 0),  # overlapping
        ([[1, 2], [2, 3]], [], False, 3),
        ([[1, 2], [1, 2], [1, 2]], [1, 2], False, 0),  # the same one
        ([[1, 2], [1, 3]], [1], False, 3),  # a common beginning
        ([[[1, 2], [3]], [4]], [1], False, 2),  # either alternative
        ([[[1, 2, 3, 4], [5]], [2, 3]], [1, 2, 3], False, 1),
        ([[1, 2], [3, 4]], [1, 2, 3, 5, 3, 4], True, 0),  # what is complete stays so
        ([[1, 2], [2, 3]], [1, 2, 3], True, 2),  # no overlap in order
        ([[1, 2], [2, 3]], [], True, 4),
        ([[1], [1]], [1], True, 1),  # twice in order
        ([[3, 4], [1, 2]], [1, 2, 3, 4], True, 2),
        ([[[1, 2, 3], [2]], [3]], [1, 2], True, 1),  # the alternative that ends first
    ],
)
def test_known_texts(phrases, text, ordered, want):
    assert needed(bound_of([fb.Phrases(phrases, ordered)]), [text]) == [want]


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("alternatives", [1, 3])
def test_needed_is_the_fewest_tokens(ordered, alternatives):
    rng = random.Random(10 + alternatives)
    for case in range(40):
        count = rng.randint(1, 2 if ordered else 5)
        phrases = random_phrases(rng, [1, 2, 3][: 2 + case % 2], count, 3 if ordered else 4, alternatives)
        texts = random_texts(rng, [1, 2, 3, 4], rng.randint(0, 5), 6)
        got = needed(bound_of([fb.Phrases(as_lists(phrases), ordered)], len(texts)), texts)
        assert got == [fewest(text, phrases, ordered) for text in texts], phrases


@pytest.mark.parametrize("ordered", [False, True])
def test_bitmask_bars_exactly_what_leaves_too_few_tokens(ordered):
    rng = random.Random(3)
    for _ in range(25):
        phrases = random_phrases(rng, [1, 2, 3], rng.randint(1, 2 if ordered else 4), 3, 2)
        length = rng.randint(0, 4)
        texts, max_length = random_texts(rng, [1, 2, 3, 4], length, 6), length + rng.randint(1, 5)
        bound = bound_of([fb.Phrases(as_lists(phrases), ordered)], len(texts), max_length=max_length)
        allowed = unpack_bitmask(bound.bitmask(after(bound, texts)), 6)
        for text, row in zip(texts, allowed.tolist(), strict=True):
            left = max_length - length - 1
            want = [fewest((*text, token), phrases, ordered) <= left for token in range(1, 6)]
            assert row[1:] == want and row[0] == satisfied(text, phrases, ordered)


def test_requests_have_phrases_and_lengths_of_their_own():
    settings = [fb.Phrases([[1, 2]]), None, fb.Phrases([[3], [[4, 1], [2]]], ordered=True), None]
    settings[3] = settings[0]
    lengths, rng = (3, 5, 6, 9), random.Random(0)
    texts = random_texts(rng, [1, 2, 3, 4], 2, 4)
    bound = bound_of(settings, 1, 40, lengths)
    together = bound.bitmask(after(bound, texts))
    for row, (setting, length, text) in enumerate(zip(settings, lengths, texts, strict=True)):
        if setting is None:
            assert (together[row] & 255 == 255).all()
        else:
            alone = bound_of([setting], 1, 40, length)
            got = unpack_bitmask(together[row], 40)
            assert torch.equal(got, unpack_bitmask(alone.bitmask(after(alone, [text]))[0], 40))


def many_phrases(rng, count):
    """Different phrases of one or two tokens."""
    found = {}
    while len(found) < count:
        found[random_phrases(rng, [1, 2, 3, 4], 1, 2)[0]] = None
    return tuple(found)


def test_above_ten_phrases_nothing_possible_is_barred_and_the_end_is_judged():
    rng, close = random.Random(5), 0
    for _ in range(6):
        phrases = many_phrases(rng, rng.randint(11, 16))
        texts = random_texts(rng, [1, 2, 3, 4], 12, 4)
        bound = bound_of([None, fb.Phrases(as_lists(phrases))], len(texts), max_length=16)
        state = after(bound, texts * 2)
        got = bound.tables.needed(state.states, state.met).tolist()
        assert got[: len(texts)] == [0] * len(texts)
        want = [fewest(text, phrases) for text in texts]
        for least, exactly in zip(got[len(texts) :], want, strict=True):
            assert least <= exactly and (least == 0) == (exactly == 0)
            close += exactly > 0
        assert bound.accepts(state).tolist() == [True] * len(texts) + [exactly == 0 for exactly in want]
        allowed = unpack_bitmask(bound.bitmask(state), 6)[len(texts) :].tolist()
        for text, row in zip(texts, allowed, strict=True):
            for token in range(1, 6):
                assert row[token] or fewest((*text, token), phrases) > 3
    assert close
    # ten different ones, some given twice, are looked ahead exactly: nothing is left to judge
    ten = as_lists(many_phrases(rng, 10))
    exact = bound_of([fb.Phrases(ten + ten[:5])])
    assert exact.accepts(exact.init()) is None


def test_some_token_always_makes_progress_and_none_more_than_one_step():
    rng = random.Random(7)
    for case in range(30):
        ordered = case % 3 == 0
        phrases = many_phrases(rng, 12) if case % 3 == 1 else random_phrases(rng, [1, 2, 3], 3, 4, 2)
        bound = bound_of([fb.Phrases(as_lists(phrases), ordered)], 4)
        tokens = torch.arange(6).expand(4, -1).reshape(1, -1)
        rows = torch.arange(4).repeat_interleave(6)[None]
        total, before = bound.tables.totals.item(), None
        texts = random_texts(rng, [1, 2, 3, 4], 8, 4)
        for length in range(9):
            state = after(bound, [text[:length] for text in texts])
            banks = bound.banks(state)
            now = banks.progress(rows, tokens).view(4, 6)
            least = bound.tables.needed(state.states, state.met)
            assert ((now >= 0) & (now <= total)).all()
            # tokens that make no difference to progress are alike
            outside = torch.tensor([[token not in set(row) for token in range(6)] for row in banks.alphabet.tolist()])
            assert all(len(set(now[row][outside[row]].tolist())) == 1 for row in range(4))
            if before is not None:
                taken = before.gather(1, torch.tensor([[text[length - 1]] for text in texts]))
                up = now.amax(1) - taken[:, 0]
                if bound.tables.exact:
                    assert torch.equal(up, torch.where(taken[:, 0] < total, 1, 0))
                assert torch.equal(up > 0, taken[:, 0] < total)  # without overlaps, several may be completed at once
                assert torch.equal(taken[:, 0] == total, least == 0)
            before = now


def test_a_phrase_list_is_bound_once():
    setting = fb.Phrases([[1, 2]])
    bound = bound_of([setting, setting, None], 2)
    assert bound.tables.totals.tolist() == [2, 2, 0] and len(set(bound.tables.roots.tolist())) == 2


@pytest.mark.parametrize(
    ("phrases", "error", "message"),
    [
        ([], ValueError, "phrases: expected at least one phrase, got none"),
        ([[]], ValueError, r"phrases\[0\]: expected at least one token, got none"),
        ([[1], [[2], []]], ValueError, r"phrases\[1\]\[1\]: expected at least one token, got none"),
        ([[1, -1]], ValueError, r"phrases\[0\]: expected ints from 0 to"),
        ([[1] * 3] * 63, ValueError, "phrases: expected at most 62 phrases in any order, got 63"),
        ([[1.5]], TypeError, r"phrases\[0\]: expected ints, got float64"),
        ([[True]], TypeError, r"phrases\[0\]: expected ints, got bool"),
        ([1, 2], TypeError, r"phrases\[0\]: expected a list, got int"),
        ([[[1], 2]], TypeError, r"phrases\[0\]\[1\]: expected a list, got int"),
        ("12", TypeError, "phrases: expected a list, got str"),
        (None, TypeError, "phrases: expected a list, got NoneType"),
    ],
)
def test_bad_phrases_are_refused_by_name(phrases, error, message):
    with pytest.raises(error, match=message):
        fb.Phrases(phrases)


def test_bad_order_is_refused_and_many_phrases_in_order_are_not():
    with pytest.raises(TypeError, match="ordered: expected a bool, got int"):
        fb.Phrases([[1]], ordered=1)
    assert needed(bound_of([fb.Phrases([[1]] * 70, ordered=True)], max_length=99), [[1, 1, 2]]) == [68]


def test_tokens_are_checked_against_the_vocabulary_and_eos_at_the_first_step():
    assert repr(fb.Phrases([np.array([1, 2]), [torch.tensor([3])]])) == "Phrases([[[1, 2]], [[3]]], ordered=False)"
    for phrases, message in (
        ([[1, 6]], "phrases: expected ids inside the vocabulary of 6, got 6"),
        ([[1, EOS]], "phrases: expected no EOS, got 0"),
    ):
        search = fb.BeamSearch(2, 5, EOS, constraint=fb.Phrases(phrases))
        state = search.init(1)
        with pytest.raises(ValueError, match=message):
            search.step(state, torch.zeros(1, 6))
        assert state.vocab_size is None
