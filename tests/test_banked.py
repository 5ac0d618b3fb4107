"""Searches with phrases: all legal sequences with beams enough, satisfied ones with few, and the order of banks."""

from __future__ import annotations

import random
from itertools import pairwise

import numpy as np
import pytest
import torch

import flashbeam as fb
from oracles import TableLM, enumerate_leaves, log_softmax64
from phrase_oracles import fewest, random_phrases, satisfied

EOS = 0
REGIMES = ["pool", "in_place"]


def constraint_of(phrases, ordered=False):
    return fb.Phrases([[list(word) for word in phrase] for phrase in phrases], ordered) if phrases else None


def body(tokens, ends=(EOS,)):
    return tokens[:-1] if tokens and tokens[-1] in ends else tokens


def sequences(hyps, b=0):
    """The hypotheses of a request, best first."""
    rows = zip(hyps.tokens[b].tolist(), hyps.lengths[b].tolist(), hyps.valid[b].tolist(), strict=True)
    return [tuple(row[:length]) for row, length, valid in rows if valid]


# ---------------------------------------------------------------------------------------------------------------------
# beams enough for everything


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("normalize", ["vocab", "allowed"])
@pytest.mark.parametrize("eos", [0, None, [0, 4]])
@pytest.mark.parametrize("ordered", [False, True])
def test_equals_enumeration(ordered, eos, normalize, regime):
    """Requests with phrases of their own, one of them with none, and one that must be long."""
    ends = [] if eos is None else [eos] if isinstance(eos, int) else eos
    phrases = [(((1, 2),), ((2, 1),)), (((3,), (1, 1, 1)), ((2,),)), (), (((2, 2),), ((2,),), ((3,), (1,)))]
    min_lengths, temperatures, bos = [0, 0, 0, 4], [1.0, 0.7, 1.0, 1.3], [6, 7, 8, 9]
    model = TableLM(5, 3)
    search = fb.BeamSearch(
        640,
        4,
        eos,
        min_length=min_lengths,
        temperature=temperatures,
        finished=regime,
        stopping=fb.Exhausted(),
        length_penalty=0.0,
        normalize=normalize,
        constraint=[constraint_of(each, ordered) for each in phrases],
    )
    hyps = fb.decode(search, model, torch.tensor(bos))
    for b, own in enumerate(phrases):

        def mask(prefix, own=own):
            text = prefix[1:]
            if not own:
                return np.ones(5, bool)
            allowed = [fewest((*text, token), own, ordered) <= 3 - len(text) for token in range(5)]
            for end in ends:
                allowed[end] = satisfied(text, own, ordered)
            return np.array(allowed)

        options = {"eos": ends, "max_length": 4, "min_length": min_lengths[b], "temperature": temperatures[b]}
        leaves = enumerate_leaves(model.logits, bos[b], mask=mask, normalize=normalize, **options)
        every = enumerate_leaves(model.logits, bos[b], **options)
        want = {leaf.tokens for leaf in every if not own or satisfied(body(leaf.tokens, ends), own, ordered)}
        assert {leaf.tokens for leaf in leaves} == want and 0 < len(want) <= 640
        leaves.sort(key=lambda leaf: -leaf.log_prob)
        assert len(sequences(hyps, b)) == len(leaves) and set(sequences(hyps, b)) == want
        scores = torch.tensor([leaf.log_prob for leaf in leaves]).float()
        assert torch.allclose(hyps.log_probs[b, : len(leaves)], scores, atol=1e-5)
        by_tokens = {leaf.tokens: leaf.finished for leaf in leaves}
        finished = hyps.finished[b, : len(leaves)].tolist()
        assert finished == [by_tokens[tokens] for tokens in sequences(hyps, b)]


# ---------------------------------------------------------------------------------------------------------------------
# few beams


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("ordered", [False, True])
def test_few_beams_satisfy_whatever_can_be_satisfied(ordered, regime):
    """As tight as it gets: often there is room for the shortest text only. What cannot be is flagged."""
    rng, tight, impossible = random.Random(int(ordered)), 0, 0
    for case in range(30):
        vocab, batch = rng.randint(5, 9), 3
        counts = [rng.randint(1, 3 if ordered else 10 if case % 3 == 0 else 4) for _ in range(batch)]
        phrases = [random_phrases(rng, list(range(1, 4 + case % 2)), count, 3, 1 + case % 2) for count in counts]
        least = [fewest((), own, ordered) for own in phrases]
        lengths = [max(1, n + rng.choice([-1, 0, 0, 1, 3])) for n in least]
        tight += sum(length == n for length, n in zip(lengths, least, strict=True))
        search = fb.BeamSearch(
            [rng.randint(2, 10) for _ in range(batch)],
            lengths,
            EOS,
            min_length=[rng.choice([0, length]) for length in lengths],
            finished=regime,
            normalize=rng.choice(["vocab", "allowed"]),
            length_penalty=rng.choice([0.0, 1.0]),
            constraint=[constraint_of(own, ordered) for own in phrases],
        )
        model = TableLM(vocab, case, eos=[EOS], eos_bias=rng.choice([-2.0, 2.0]))
        state = search.init(batch)
        tokens, cache = torch.arange(batch) + 10, None
        while not state.all_done():
            logits, cache = model(tokens, cache)
            step = search.step(state, logits)
            tokens, cache = step.tokens.flatten(), fb.reorder(cache, step.source_rows)
        hyps = search.finalize(state)
        for b, own in enumerate(phrases):
            found = sequences(hyps, b)
            assert all(satisfied(body(tokens), own, ordered) for tokens in found)
            assert bool(found) == (least[b] <= lengths[b]), (own, lengths[b])
            assert state.flags[b] == (0 if found else fb.FLAG_DEAD_END)
            impossible += not found
    assert tight > 15 and impossible > 5


def test_what_cannot_be_satisfied_ends_at_the_first_step():
    search = fb.BeamSearch(3, 4, EOS, constraint=[fb.Phrases([[1, 2], [3, 4, 5]]), fb.Phrases([[1, 2], [2, 3, 4]])])
    state = search.init(2)
    search.step(state, torch.zeros(2, 7))
    assert state.done.tolist() == [True, False] and state.flags.tolist() == [fb.FLAG_DEAD_END, 0]


@pytest.mark.parametrize("regime", REGIMES)
def test_above_ten_phrases_banks_find_the_way(regime):
    """Where there is room for all of them side by side. What is left unsatisfied is no hypothesis."""
    rng = random.Random(8)
    for case in range(4):
        phrases = tuple({random_phrases(rng, [1, 2, 3, 4, 5], 1, 2)[0]: None for _ in range(30)})[:14]
        assert len(phrases) > 10
        whole = sum(len(phrase[0]) for phrase in phrases)
        model = TableLM(7, case, eos=[EOS], eos_bias=1.0)
        for room in (whole, fewest((), phrases[:11]) - 1):
            search = fb.BeamSearch(4, room, EOS, finished=regime, constraint=constraint_of(phrases))
            state = search.init(1)
            tokens, cache = torch.tensor([9]), None
            while not state.all_done():
                logits, cache = model(tokens, cache)
                step = search.step(state, logits)
                tokens, cache = step.tokens.flatten(), fb.reorder(cache, step.source_rows)
            found = sequences(search.finalize(state))
            assert all(satisfied(body(each), phrases) for each in found)
            assert bool(found) == (room == whole)
            assert state.flags.item() == (0 if found else fb.FLAG_DEAD_END)


def test_other_selections_take_phrases_as_a_mask():
    phrases = (((1, 2),), ((2, 3),))
    model = TableLM(6, 1, eos=[EOS], eos_bias=1.0)
    rules = [fb.Stochastic(1), fb.Sample(1), fb.ConditionalPoisson(1), fb.Arithmetic(1), fb.DynamicWidth(0.9)]
    for rule in [*rules, fb.DiverseGroups(2, 0.5), fb.DiverseSiblings(0.5)]:
        search = fb.BeamSearch(4, 5, EOS, selection=rule, constraint=constraint_of(phrases))
        found = sequences(fb.decode(search, model, torch.tensor([9])))
        assert found and all(satisfied(body(tokens), phrases) for tokens in found)


# ---------------------------------------------------------------------------------------------------------------------
# the order of banks, literally


class Beam:
    """A text, its log-probability in float64, and whether it has ended."""

    def __init__(self, tokens, log_prob, ended=False):
        self.tokens, self.log_prob, self.ended = tokens, log_prob, ended

    def score(self, alpha):
        return self.log_prob / len(self.tokens) ** alpha


def by_banks(beams, bank, alpha, gaps):
    """The order of banks: the best of each bank, most advanced first, then the second of each, and so on."""
    ranked = sorted(beams, key=lambda beam: -beam.score(alpha))
    gaps += [a.score(alpha) - b.score(alpha) for a, b in pairwise(ranked)]
    banks = {}
    for beam in ranked:
        banks.setdefault(bank(beam), []).append(beam)
    depth = max(map(len, banks.values()), default=0)
    return [banks[b][n] for n in range(depth) for b in sorted(banks, reverse=True) if n < len(banks[b])]


def naive_search(model, bos, phrases, ordered, width, max_length, min_length, regime, alpha, normalize):
    """Returns token sequences, best first, and the smallest gap between scores that were compared."""
    total, live, pool, gaps = fewest((), phrases, ordered), [Beam((), 0.0)], [], [np.inf]

    def bank(beam):
        return total - fewest(body(beam.tokens), phrases, ordered)

    for length in range(1, max_length + 1):
        found = [beam for beam in live if beam.ended]
        for beam in live:
            if beam.ended:
                continue
            row = model.logits((bos, *beam.tokens))
            allowed = np.zeros(len(row), bool)
            for token in range(len(row)):
                if token == EOS:
                    allowed[token] = satisfied(beam.tokens, phrases, ordered) and length >= min_length
                else:
                    allowed[token] = fewest((*beam.tokens, token), phrases, ordered) <= max_length - length
            if not allowed.any():
                continue
            log_probs = log_softmax64(row, allowed if normalize == "allowed" else None)
            found += [
                Beam((*beam.tokens, int(token)), beam.log_prob + log_probs[token], token == EOS)
                for token in np.flatnonzero(allowed)
            ]
        order = by_banks(found, bank, alpha if regime == "in_place" else 0.0, gaps)
        if regime == "in_place":
            live = order[:width]
            if all(beam.ended for beam in live):
                break
            continue
        pool = sorted(pool + [b for b in order[:width] if b.ended], key=lambda b: -b.score(alpha))[:width]
        others = [beam for beam in found if not beam.ended]
        if length == max_length:
            pool += [b for b in order[:width] if not b.ended]
        live = by_banks(others, bank, 0.0, gaps)[:width]
    ranked = sorted(pool if regime == "pool" else live, key=lambda beam: -beam.score(alpha))
    gaps += [a.score(alpha) - b.score(alpha) for a, b in pairwise(ranked)]
    return [beam.tokens for beam in ranked], min(gap for gap in gaps if gap > 0)


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("normalize", ["vocab", "allowed"])
def test_equals_a_search_that_ranks_literally_by_banks(normalize, regime):
    rng, compared = random.Random(2), 0
    for case in range(24):
        ordered = case % 3 == 0
        phrases = random_phrases(rng, [1, 2, 3], rng.randint(1, 2 if ordered else 3), 3, 2)
        width, max_length = rng.randint(1, 5), fewest((), phrases, ordered) + rng.randint(0, 4)
        min_length, alpha = rng.choice([0, 0, max_length]), rng.choice([0.0, 1.0])
        model = TableLM(6, case, eos=[EOS], eos_bias=rng.choice([-2.0, 0.0, 2.0]))
        settings = (phrases, ordered, width, max_length, min_length, regime, alpha, normalize)
        want, gap = naive_search(model, 9, *settings)
        search = fb.BeamSearch(
            [width, width + 2],
            [max_length, max_length + 1],
            EOS,
            min_length=[min_length, 0],
            finished=regime,
            stopping=fb.Exhausted(),
            length_penalty=alpha,
            normalize=normalize,
            constraint=[constraint_of(phrases, ordered), constraint_of(phrases[:1])],
        )
        hyps = fb.decode(search, model, torch.tensor([9, 8]), num_hypotheses=2 * width)
        if gap > 1e-5:  # else another log-sum-exp may decide otherwise
            assert sequences(hyps) == want, settings
            compared += 1
    assert compared > 16


# ---------------------------------------------------------------------------------------------------------------------
# laws


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("normalize", ["vocab", "allowed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batch_invariant_bitwise(dtype, normalize, regime):
    """Alone and beside wider, longer and freer requests, one with none of its own, which is then a plain search."""
    rng = random.Random(4)
    phrases = [random_phrases(rng, [1, 2, 3], count, 3, 2) for count in (2, 3, 1)]
    settings = [constraint_of(phrases[0]), None, constraint_of(phrases[1]), constraint_of(phrases[2], True)]
    settings.append(fb.Phrases([[token] for token in range(1, 12)]))  # not looked ahead exactly
    model, widths, lengths = TableLM(13, 6, coarse=0.5, eos=[EOS], eos_bias=2.0), [2, 3, 5, 3, 4], [9, 8, 11, 7, 14]

    def found(chosen):
        search = fb.BeamSearch(
            [widths[i] for i in chosen],
            [lengths[i] for i in chosen],
            EOS,
            finished=regime,
            normalize=normalize,
            constraint=[settings[i] for i in chosen],
        )

        def wrapped(tokens, cache):
            logits, cache = model(tokens, cache)
            return logits.to(dtype), cache

        return fb.decode(search, wrapped, torch.tensor(chosen) + 20)

    order = [2, 1, 0, 4, 3]
    together = found(order)
    for row, i in enumerate(order):
        alone, n, t = found([i]), widths[i], lengths[i]
        assert alone.valid[0].any()
        for name in ("scores", "log_probs", "valid", "lengths", "finished"):
            assert torch.equal(getattr(together, name)[row, :n], getattr(alone, name)[0]), name
        for name in ("tokens", "token_log_probs"):
            assert torch.equal(getattr(together, name)[row, :n, :t], getattr(alone, name)[0]), name


@pytest.mark.parametrize("regime", REGIMES)
def test_more_phrases_never_raise_the_best_score(regime):
    """With beams enough for everything: one request for each number of phrases."""
    phrases = (*random_phrases(random.Random(6), [1, 2, 3], 4, 1), ((1, 2),))
    settings = [constraint_of(phrases[:count]) for count in range(6)]
    search = fb.BeamSearch(625, 4, None, finished=regime, length_penalty=0.0, constraint=settings)
    best = fb.decode(search, TableLM(5, 1), torch.full((6,), 9)).log_probs[:, 0].tolist()
    assert all(a >= b for a, b in pairwise(best)) and best[0] > best[-1] > -np.inf


@pytest.mark.parametrize("regime", REGIMES)
def test_all_of_joins_phrases_with_others(regime):
    """Two lists of phrases share their banks, a forced prefix counts, and a veto is heard."""

    class NoFour:
        """A veto of one token."""

        def init(self, batch_size, beam_size, vocab_size, device):
            return torch.zeros(batch_size * beam_size, device=device)

        def advance(self, state, tokens):
            return state

        def veto(self, state, proposed):
            assert (proposed.log_probs.diff(dim=1) <= 0).logical_or(proposed.log_probs[:, 1:] == -torch.inf).all()
            return proposed.tokens == 4

    model = TableLM(6, 2, eos=[EOS], eos_bias=1.0)
    both = (((2, 1),), ((1, 3),), ((2, 2),))
    constraint = fb.AllOf(
        fb.Phrases([[2, 1]]),
        fb.Prefix([5, 1, 2]),
        fb.Phrases([[1, 3], [2, 2]]),
        fb.ForbiddenPhrases([[5, 5]]),
        NoFour(),
    )
    hyps = fb.decode(fb.BeamSearch(6, 8, EOS, finished=regime, constraint=constraint), model, torch.tensor([9]))
    found = sequences(hyps)
    assert len(found) == 6 and all(satisfied(body(tokens), both) for tokens in found)
    assert all(tokens[:3] == (5, 1, 2) and 4 not in tokens for tokens in found)
