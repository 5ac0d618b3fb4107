"""Phrases that must not be generated, against plain search."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

import flashbeam as fb
from flashbeam.constraint import Context
from flashbeam.kernels import unpack_bitmask
from oracles import TableLM, enumerate_leaves
from phrase_oracles import contains, random_phrases

V = 6


def bind(settings, vocab_size=V, eos=(), rows=1):
    batch = len(settings)
    context = Context(batch, rows, vocab_size, torch.device("cpu"), eos, (0,) * batch, (99,) * batch)
    return fb.ForbiddenPhrases.bind(settings, context)


def barred(phrases, text, vocab_size=V):
    return [any(contains((*text, token), phrase) for phrase in phrases) for token in range(vocab_size)]


def random_setting(rng, tokens=4):
    phrases = random_phrases(rng, list(range(tokens)), rng.randint(1, 6), 4)
    return tuple(phrase[0] for phrase in phrases)


def test_bars_what_a_plain_search_would_find():
    """Texts that obey, of requests with phrases of their own or none."""
    rng, bans, steps = random.Random(0), 0, 0
    for _ in range(40):
        phrases = [random_setting(rng) if rng.random() < 0.8 else () for _ in range(4)]
        bound = bind([fb.ForbiddenPhrases(each) if each else None for each in phrases], rows=3)
        state, texts = bound.init(), [() for _ in range(12)]
        for _ in range(9):
            allowed = unpack_bitmask(bound.bitmask(state), V).tolist()
            tokens = []
            for row, text in enumerate(texts):
                want = barred(phrases[row // 3], text)
                assert [not bit for bit in allowed[row]] == want, (phrases[row // 3], text)
                tokens.append(rng.choice([token for token in range(V) if not want[token]]))
                texts[row] = (*text, tokens[-1])
                bans, steps = bans + any(want), steps + 1
            state = bound.advance(state, torch.tensor(tokens))
    assert steps / 4 < bans < steps


def test_thousands_of_phrases_over_a_large_vocabulary():
    """Common beginnings, phrases inside others, and tables that grow with the tokens, not their square."""
    rng, vocab_size = random.Random(1), 40_000
    heads = [tuple(rng.randrange(vocab_size) for _ in range(3)) for _ in range(20)]
    phrases = [(*rng.choice(heads)[: rng.randint(0, 3)], rng.randrange(vocab_size)) for _ in range(4000)]
    phrases += [(7, *phrase) for phrase in phrases[:500]]
    setting = fb.ForbiddenPhrases(phrases)
    assert sum(array.size for array in setting._host) < 8 * sum(map(len, phrases))
    bound = bind([setting, None, setting], vocab_size)
    assert len(bound.edges.indptr) - 1 == len(setting._host[0])  # once, and a state for nothing
    single = {phrase[0] for phrase in phrases if len(phrase) == 1}
    for head in heads:
        state, text = bound.init(), ()
        for token in (7, *head):
            state, text = bound.advance(state, torch.tensor([token, token, 5])), (*text, token)
            if any(contains(text, phrase) for phrase in phrases):
                break
            ends = {
                phrase[-1]
                for phrase in phrases
                if contains(text, phrase[:-1]) and text[len(text) - len(phrase) + 1 :] == phrase[:-1]
            }
            got = ~unpack_bitmask(bound.bitmask(state), vocab_size)
            assert set(got[0].nonzero()[:, 0].tolist()) == ends
            assert not got[1].any() and set(got[2].nonzero()[:, 0].tolist()) == single


def search_with(phrases, model, bos, regime="pool", eos=0, **options):
    search = fb.BeamSearch(
        260,
        4,
        eos,
        finished=regime,
        stopping=fb.Exhausted(),
        length_penalty=0.0,
        constraint=[fb.ForbiddenPhrases(each) if each else None for each in phrases],
        **options,
    )
    return fb.decode(search, model, torch.tensor(bos))


@pytest.mark.parametrize("regime", ["pool", "in_place"])
@pytest.mark.parametrize("normalize", ["vocab", "allowed"])
@pytest.mark.parametrize("eos", [0, None, [0, 3]])
def test_equals_enumeration(eos, normalize, regime):
    """Every sequence that contains none, EOS included: a phrase may end in it."""
    vocab = 4
    ends = [] if eos is None else [eos] if isinstance(eos, int) else eos
    phrases = [((1, 2), (2, 2, 1)), ((1, 1), (2, 1), (2, 1, 1)), ()]
    if ends:
        phrases[0] += ((2, 0), (1, 1, 0), *([(3,)] if 3 in ends else []))
    model, bos = TableLM(vocab, 5), [7, 8, 9]
    hyps = search_with(phrases, model, bos, regime, eos, normalize=normalize, min_length=[0, 2, 0])
    for b, (own, first) in enumerate(zip(phrases, bos, strict=True)):

        def mask(prefix, own=own):
            return np.array([not bad for bad in barred(own, prefix[1:], vocab)])

        options = {"eos": ends, "max_length": 4, "min_length": [0, 2, 0][b], "normalize": normalize}
        leaves = enumerate_leaves(model.logits, first, mask=mask, **options)
        leaves.sort(key=lambda leaf: -leaf.log_prob)
        got = [tuple(row[:n]) for row, n in zip(hyps.tokens[b].tolist(), hyps.lengths[b].tolist(), strict=True) if n]
        assert 3 < len(leaves) <= 256 and set(got) == {leaf.tokens for leaf in leaves} and len(got) == len(leaves)
        want = torch.tensor([leaf.log_prob for leaf in leaves])
        assert torch.allclose(hyps.log_probs[b, : len(leaves)], want.float(), atol=1e-5)


def test_a_forced_prefix_counts():
    model = TableLM(V, 1, eos=[0], eos_bias=-9.0)
    constraint = fb.AllOf(fb.Prefix([1, 2]), fb.ForbiddenPhrases([[2, 3], [1, 2, 4]]))
    hyps = fb.decode(fb.BeamSearch(30, 3, 0, constraint=constraint), model, torch.tensor([5]))
    assert hyps.valid[0].sum() == 4  # of 0, 1, 2, 3, 4, 5
    assert set(hyps.tokens[0, hyps.valid[0], 2].tolist()) == {0, 1, 2, 5}
    state_of_a_contradiction = fb.AllOf(fb.Prefix([1, 2]), fb.ForbiddenPhrases([[1, 2]]))
    search = fb.BeamSearch(3, 3, 0, constraint=state_of_a_contradiction)
    state = search.init(1)
    search.step(state, torch.zeros(1, V))
    search.step(state, torch.zeros(3, V))
    assert state.done.item() and state.flags.item() == fb.FLAG_DEAD_END


@pytest.mark.parametrize("regime", ["pool", "in_place"])
def test_batch_invariant_bitwise(regime):
    phrases = [((1, 2), (2, 2), (4,)), (), ((3, 1, 2), (3, 0)), ((5,),)]
    model, bos = TableLM(V, 2), [1, 2, 3, 4]

    def found(chosen, widths):
        settings = [fb.ForbiddenPhrases(phrases[i]) if phrases[i] else None for i in chosen]
        search = fb.BeamSearch(widths, 6, 0, finished=regime, constraint=settings)
        return fb.decode(search, model, torch.tensor([bos[i] for i in chosen]))

    together = found([3, 1, 0, 2], [2, 3, 3, 6])
    for row, i in enumerate([3, 1, 0, 2]):
        width = [2, 3, 3, 6][row]
        alone = found([i], [width])
        for name in ("tokens", "scores", "log_probs", "token_log_probs", "valid"):
            assert torch.equal(getattr(together, name)[row, :width], getattr(alone, name)[0]), name


@pytest.mark.parametrize(
    ("phrases", "error", "message"),
    [
        ([], ValueError, "phrases: expected at least one phrase, got none"),
        ([[]], ValueError, r"phrases\[0\]: expected at least one token, got none"),
        ([[1], [-2]], ValueError, r"phrases\[1\]: expected ints from 0 to"),
        ([[[1]]], ValueError, r"phrases\[0\]: expected one dimension"),
        ([["a"]], TypeError, r"phrases\[0\]: expected ints"),
        ([3], TypeError, r"phrases\[0\]: expected a list, got int"),
    ],
)
def test_bad_phrases_are_refused_by_name(phrases, error, message):
    with pytest.raises(error, match=message):
        fb.ForbiddenPhrases(phrases)


@pytest.mark.parametrize(
    ("phrases", "message"),
    [
        ([[1, 9]], "phrases: expected ids inside the vocabulary of 6, got 9"),
        ([[1], [0, 1]], r"phrases: expected EOS at the end of a phrase only, got \[0, 1\]"),
    ],
)
def test_tokens_are_checked_at_the_first_step(phrases, message):
    search = fb.BeamSearch(2, 5, 0, constraint=fb.ForbiddenPhrases(phrases))
    state = search.init(1)
    with pytest.raises(ValueError, match=message):
        search.step(state, torch.zeros(1, V))
    assert repr(fb.ForbiddenPhrases([(1, 2)])) == "ForbiddenPhrases([[1, 2]])"


def test_tables_of_a_device_are_made_once():
    setting = fb.ForbiddenPhrases([[1, 2], [3]])
    first, second = bind([setting, setting]), bind([setting])
    assert setting._tables_on(torch.device("cpu")) is setting._tables_on(torch.device("cpu"))
    assert torch.equal(first.always[0], second.always[0])
