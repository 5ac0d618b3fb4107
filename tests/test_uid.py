"""UID regularisers: told anew from the tokens, by enumeration, and by the laws they obey; exact stopping with terms."""

import itertools
import random

import numpy as np
import pytest
import torch

import flashbeam as fb
import scoring_oracles as oracle
from flashbeam.kernels import pack_bitmask
from flashbeam.scoring import Seen
from oracles import TableLM, enumerate_leaves

KINDS = ["greedy", "square", "max", "variance", "local"]
REGIMES = ["pool", "in_place"]
EOS = 1
FIELDS = ("tokens", "lengths", "scores", "log_probs", "token_log_probs", "valid", "finished")


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run(search, model, bos, bitmask=None, **options):
    """Hypotheses and the final state."""
    state, tokens, cache = search.init(len(bos), **options), torch.tensor(bos), None
    while not state.all_done():
        logits, cache = model(tokens, cache)
        step = search.step(state, logits, None if bitmask is None else bitmask.expand(logits.shape[0], -1))
        tokens, cache = step.tokens.flatten(), fb.reorder(cache, step.source_rows)
    return search.finalize(state), state


def assert_same(one, other, rows=slice(None)):
    for name in FIELDS:
        assert torch.equal(getattr(one, name)[rows], getattr(other, name)), name


def returned(hyps, b):
    for i in np.flatnonzero(hyps.valid[b].numpy()):
        yield tuple(hyps.tokens[b, i, : hyps.lengths[b, i]].tolist()), float(hyps.scores[b, i])


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_what_the_tokens_say(kind, regime):
    for seed in range(4):
        lm, bos = TableLM(6, seed, eos=[EOS], eos_bias=-0.5), [3, 9, 4]
        strength, alpha, start = [0.02, 0.3, 5.0][seed % 3], [0.0, 1.0, -0.4][seed % 3], seed % 2 == 1
        temperature, low = [1.0, 0.6][seed % 2], seed % 3
        search = fb.BeamSearch(
            [2, 3, 5], 7, EOS, min_length=low, length_penalty=alpha, temperature=temperature, finished=regime,
            terms=fb.UID(kind, strength, start), stopping=fb.Exhausted(),
        )  # fmt: skip
        hyps, _ = run(search, lm, bos)

        def may(prefix, low=low):
            return np.arange(6) != EOS if len(prefix) < low else np.ones(6, bool)

        for b, first in enumerate(bos):
            for tokens, score in returned(hyps, b):
                path = oracle.path(lm.logits, first, tokens, temperature=temperature, allowed=may)
                told = oracle.score(path, len(tokens) ** alpha, [oracle.uid(kind, strength, start)])
                assert score == pytest.approx(told, rel=2e-6, abs=2e-6)


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_beam_wide_enough_finds_the_best_of_all(kind, regime):
    for seed, (strength, penalty) in enumerate(itertools.product([0.1, 1.5], [0.0, 1.0])):
        lm, start = TableLM(3, seed), bool(seed % 2)
        search = fb.BeamSearch(
            40, 4, EOS, length_penalty=penalty, finished=regime, terms=[fb.UID(kind, strength, start)],
            stopping=fb.Exact(),
        )  # fmt: skip
        hyps, _ = run(search, lm, [5])
        leaves = enumerate_leaves(lm.logits, 5, eos=[EOS], max_length=4)
        term = oracle.uid(kind, strength, start)
        best = sorted(
            ((oracle.score(oracle.path(lm.logits, 5, leaf.tokens), len(leaf.tokens) ** penalty, [term]), leaf.tokens)
             for leaf in leaves), reverse=True,
        )  # fmt: skip
        found = list(returned(hyps, 0))
        assert len(found) == len(leaves)
        assert [score for _, score in found] == pytest.approx([score for score, _ in best], rel=3e-6, abs=3e-6)
        assert {tokens for tokens, _ in found} == {tokens for _, tokens in best}
        assert found[0][0] == best[0][1]


@pytest.mark.parametrize("kind", KINDS)
def test_narrow_beams_keep_the_best_by_score(kind):
    """Against a search that scores every token of every beam from scratch: the best need not be the most probable."""
    decided = 0
    for seed in range(6):
        strength, alpha, beams = [1.0, 9.0][seed % 2], [0.0, 1.0, 0.5][seed % 3], [1, 2, 3][seed % 3]
        lm = TableLM(12, seed, scale=0.7)
        terms = [oracle.uid(kind, strength), oracle.word_reward(0.3, [2, 5])][: 1 + seed // 3]
        want, gap = oracle.naive_search(lm.logits, 4, terms, beams=beams, longest=4, eos=EOS, alpha=alpha)
        given = [fb.UID(kind, strength), fb.WordReward(0.3, [2, 5])][: 1 + seed // 3]
        search = fb.BeamSearch(beams, 4, EOS, length_penalty=alpha, terms=given, stopping=fb.Exhausted())
        hyps, _ = run(search, lm, [4])
        if gap > 1e-5:
            decided += 1
            assert [tokens for tokens, _ in returned(hyps, 0)] == [tokens for _, tokens in want]
    assert decided >= 4


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("kind", KINDS)
def test_no_strength_changes_no_bit(kind, regime):
    for seed, dtype in enumerate([torch.float32, torch.bfloat16, torch.float16]):
        # coarse logits tie, and -inf is an infinite surprisal
        coarse, generator = [0.5, None, None][seed], torch.Generator().manual_seed(seed)
        lm = TableLM(80, seed, coarse=coarse)
        bitmask = pack_bitmask(torch.rand(1, 80, generator=generator) < 0.7) if seed else None

        def model(tokens, cache, lm=lm, dtype=dtype):
            logits, cache = lm(tokens, cache)
            return logits.masked_fill(logits < -3.0, -torch.inf).to(dtype), cache

        options = dict(finished=regime, temperature=[1.0, 0.8, 1.3][seed], length_penalty=0.7)
        options |= dict(normalize=["vocab", "allowed"][seed % 2], min_length=2, stopping=fb.Exact())
        plain, _ = run(fb.BeamSearch([5, 3], 6, [EOS, 7], **options), model, [2, 6], bitmask)
        termed, _ = run(fb.BeamSearch([5, 3], 6, [EOS, 7], **options, terms=fb.UID(kind, 0)), model, [2, 6], bitmask)
        assert_same(plain, termed)
        assert torch.equal(plain.exact, termed.exact)


def test_however_strong_a_term_what_can_follow_can_be_chosen():
    """An infinite penalty would rank with what does not exist, and an infinite surprisal at strength 0 is no number."""
    logits = torch.tensor([[2.0, -1000.0, -torch.inf, -1000.5]])
    for kind, strength in itertools.product(KINDS, [9e36, 0.0]):
        search = fb.BeamSearch(9, 2, terms=fb.UID(kind, strength), length_penalty=0)
        state = search.init(1)
        search.step(state, logits)
        search.step(state, logits.expand(9, -1))
        hyps = search.finalize(state)
        assert hyps.valid.all() and (hyps.tokens != 2).all() and hyps.scores.isfinite().all()


@pytest.mark.parametrize("regime", REGIMES)
def test_greedy_with_a_huge_strength_puts_the_greedy_path_on_top(regime):
    for seed, beams in itertools.product(range(4), [1, 2, 5]):
        lm = TableLM(8, seed, eos=[EOS], eos_bias=1.0)
        greedy, _ = run(fb.BeamSearch(1, 6, EOS), lm, [3])
        options = dict(length_penalty=0, stopping=fb.Exhausted(), finished=regime)
        hyps, _ = run(fb.BeamSearch(beams, 6, EOS, **options, terms=fb.UID("greedy", 1e6)), lm, [3])
        assert torch.equal(hyps.tokens[0, 0], greedy.tokens[0, 0])
        assert torch.equal(hyps.scores[0, 0], hyps.log_probs[0, 0])


def random_case(random_, requests):
    """Per-request arguments and terms, whatever they may be."""

    def each(choices):
        return [random_.choice(choices) for _ in range(requests)]

    vocab, longest = random_.choice([4, 5, 9]), random_.choice([4, 8])
    kinds = random_.sample(KINDS, random_.choice([0, 1, 1, 2]))
    terms = [fb.UID(kind, each([0, 0.05, 0.3, 1.0]), random_.random() < 0.5) for kind in kinds]
    terms += random_.sample(
        [fb.TokenReward(each([-0.3, 0.2, 0.9])), fb.TokenReward(each([-0.4, 0.5]), up_to=each([2, 5]))],
        random_.choice([0, 0, 1]),
    )
    terms += [fb.WordReward(each([-0.4, 0.3]), [2, 3, EOS])] * random_.choice([0, 0, 1])
    high = [random_.randint(2, longest) for _ in range(requests)]
    options = dict(
        beam_size=each([1, 2, 3, 4]),
        max_length=high,
        min_length=[random_.choice([0, 0, 2]) for _ in high],
        eos_id=[EOS],
        length_penalty=each([0.0, 0.6, 1.0, 2.0, -0.5]),
        terms=terms,
    )
    lm = TableLM(vocab, random_.randrange(10**6), scale=random_.choice([1.0, 2.5]), eos=[EOS], eos_bias=0.7)
    return options, lm, [random_.randrange(3, 50) for _ in range(requests)]


def test_exact_stopping_returns_what_exhaustion_does_in_fewer_steps():
    random_, steps = random.Random(5), np.zeros(3, int)
    for _ in range(24):
        options, lm, bos = random_case(random_, 10)
        rules = fb.Exhausted(), fb.Exact(), fb.FirstFinished()
        ran = [run(fb.BeamSearch(stopping=rule, **options), lm, bos) for rule in rules]
        whole, early, first = (hyps for hyps, _ in ran)
        assert_same(whole, early)
        assert whole.exact.all() and early.exact.all()
        for b in np.flatnonzero(first.exact):  # what is said to be exact is
            width = first.beam_size[b]
            assert torch.equal(first.scores[b, :width], whole.scores[b, :width])
        steps += [int(state.requests.steps.sum()) for _, state in ran]
    assert steps[2] < steps[1] < 0.93 * steps[0]


# a term, and the surprisals, the token and the attention that are best for it
BOUNDED = [
    *((fb.UID(kind, 0.7, start), "zero", 0, 0.0) for kind in KINDS[:3] for start in (False, True)),
    *((fb.UID("variance", 0.7, start), "mean", 0, 0.0) for start in (False, True)),
    *((fb.UID("local", 0.7, start), "last", 0, 0.0) for start in (False, True)),
    *((fb.TokenReward(reward, up_to), "zero", 0, 0.0) for reward in (0.5, -0.5) for up_to in (None, 5)),
    *((fb.WordReward(reward, [0, 2]), "zero", token, 0.0) for reward, token in [(0.5, 0), (-0.5, 1)]),
    *((fb.Coverage(0.5, kind), "zero", 0, paid) for kind, paid in [("gnmt", 1.0), ("summary", 0.0)]),
]


@pytest.mark.parametrize(("term", "surprisal", "token", "paid"), BOUNDED, ids=str)
def test_the_upper_bound_is_what_the_best_continuation_gets(term, surprisal, token, paid):
    rows, longest, generator = 200, 9, torch.Generator().manual_seed(2)
    one, zero = torch.ones(rows, 1), torch.zeros(rows, 1)
    start = getattr(term, "counts_start", False)
    for begun in range(1, longest):  # tokens at random, the others as good as can be
        stats, total, last, values = term.init(rows, torch.device("cpu")), zero, zero, []
        for length in range(1, longest + 1):
            at_random = length <= begun
            best = {"zero": zero, "mean": total / max(1, length - 1 + start), "last": last}[surprisal]
            last = torch.rand(rows, 1, generator=generator) * 4 if at_random else best
            total = total + last
            tokens = torch.randint(3, (rows, 1), generator=generator) if at_random else torch.full((rows, 1), token)
            attention = torch.rand(rows, 1, 4, generator=generator) if at_random else torch.full((rows, 1, 4), paid)
            lengths = length * one, (length + 1) * one, longest * one
            seen = Seen(tokens, -last, zero, *lengths, attention, None)
            value, stats = term.extend(stats, seen)
            values.append(value.expand(rows, 1))
            if length == begun:
                bound = term.upper(value, stats, seen)
        assert (torch.cat(values[begun:], 1).amax(1, keepdim=True) - bound).abs().max() < 1e-5


def test_batch_invariant_and_in_the_same_memory():
    random_ = random.Random(11)
    for regime in [*REGIMES] * 2:
        options, lm, bos = random_case(random_, 3)
        options["terms"] = [fb.UID("variance", [0.1, 0.4, 2.0]), fb.UID("max", 0.3), *options["terms"]]
        whole, _ = run(fb.BeamSearch(finished=regime, **options), lm, bos)
        for b in range(3):
            one = {k: [v[b]] if isinstance(v, list) and k not in ("eos_id", "terms") else v for k, v in options.items()}
            one["terms"] = [alone(term, b) for term in options["terms"]]
            single, _ = run(fb.BeamSearch(finished=regime, **one), lm, [bos[b]])
            count, width = single.tokens.shape[1:]
            for name in FIELDS:
                field = getattr(whole, name)[b : b + 1, :count]
                field = field[:, :, :width] if field.dim() == 3 else field
                assert torch.equal(field, getattr(single, name)), name


def alone(term, b):
    """The term as request ``b`` has it."""
    values = [rate.values[0 if rate.shared else b] for rate in term.per_request]
    if isinstance(term, fb.UID):
        return fb.UID(term.kind, values[0], term.counts_start)
    return fb.TokenReward(*values) if isinstance(term, fb.TokenReward) else fb.WordReward(values[0], term.starts)


def test_statistics_stay_where_a_captured_step_looks_for_them():
    terms = [fb.UID(kind, 0.5) for kind in KINDS] + [fb.WordReward(0.1, [2])]
    search = fb.BeamSearch(3, 6, EOS, terms=terms)
    state = search.init(2)
    search.step(state, torch.randn(2, 9))
    places = [leaf.data_ptr() for stats in state.term_stats for leaf in stats]
    before, copy = [leaf.clone() for stats in state.term_stats for leaf in stats], state.clone()
    search.step(state, torch.randn(6, 9))
    assert [leaf.data_ptr() for stats in state.term_stats for leaf in stats] == places
    assert all(torch.equal(a, b) for a, b in zip(before, [x for s in copy.term_stats for x in s], strict=True))


class NoRepeat:
    """No token twice in a row: a veto."""

    def init(self, batch_size, beam_size, vocab_size, device):
        return torch.full((batch_size * beam_size,), -1, device=device)

    def advance(self, state, tokens):
        return tokens

    def veto(self, state, proposed):
        return state[proposed.rows] == proposed.tokens


@pytest.mark.parametrize("regime", REGIMES)
def test_with_a_veto_a_bitmask_and_a_trie(regime):
    bitmask = pack_bitmask(torch.tensor([[True] * 4 + [False, True]]))
    trie = fb.Trie([[3, 2, 0], [3, 2], [2, 2], [0, 3, 3, 2], [4, 3]])
    for constraint, kind in [(trie, "variance"), (NoRepeat(), "local"), (NoRepeat(), "square")]:
        lm = TableLM(6, 4)
        options = dict(finished=regime, constraint=constraint, stopping=fb.Exhausted(), length_penalty=0)
        plain, _ = run(fb.BeamSearch(200, 4, EOS, **options), lm, [7], bitmask)
        hyps, _ = run(fb.BeamSearch(200, 4, EOS, terms=fb.UID(kind, 0.3), **options), lm, [7], bitmask)
        legal = [tokens for tokens, _ in returned(plain, 0)]
        assert {tokens for tokens, _ in returned(hyps, 0)} == set(legal) and len(legal) in (4, 161)
        for tokens, score in returned(hyps, 0):
            path = oracle.path(lm.logits, 7, tokens)
            assert score == pytest.approx(oracle.score(path, 1.0, [oracle.uid(kind, 0.3)]), rel=3e-6)


@pytest.mark.parametrize("rule", [fb.BestLive(), fb.Filled(), fb.Shrinking(), fb.Patience(2.0)], ids=repr)
def test_with_other_rules_and_a_forced_end(rule):
    terms = [fb.UID("local", 0.4), fb.TokenReward(0.2)]
    told = [oracle.uid("local", 0.4), oracle.token_reward(0.2)]
    lm = TableLM(5, 6)
    for ends in ("compete", "end"):
        options = dict(length_penalty=0.8, dialect=fb.Dialect(at_max_length=ends), stopping=rule)
        hyps, _ = run(fb.BeamSearch(3, 4, EOS, terms=terms, **options), lm, [8])
        found = list(returned(hyps, 0))
        assert found and all(tokens[-1] == EOS for tokens, _ in found if ends == "end")
        for tokens, score in found:
            path = oracle.path(lm.logits, 8, tokens)
            assert score == pytest.approx(oracle.score(path, len(tokens) ** 0.8, told), rel=3e-6, abs=3e-6)


class Unbounded:
    """Likes long hypotheses: a term of one's own, with no bound."""

    monotone = True
    reads_attention = False

    def init(self, rows, device):
        return ()

    def extend(self, stats, seen):
        return seen.lengths.sqrt(), stats


def test_a_term_of_ones_own():
    search = fb.BeamSearch(3, 5, EOS, length_penalty=0, terms=Unbounded())
    lm = TableLM(5, 1)
    hyps, _ = run(search, lm, [4])
    for tokens, score in returned(hyps, 0):
        told = -oracle.path(lm.logits, 4, tokens).surprisals.sum() + len(tokens) ** 0.5
        assert score == pytest.approx(told, rel=3e-6, abs=3e-6)
    assert not run(fb.BeamSearch(1, 5, EOS, terms=Unbounded()), TableLM(5, 1, eos=[EOS], eos_bias=9.0), [4])[0].exact[0]


MAX = fb.UID("max", 1)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            dict(terms=Unbounded(), stopping=fb.Exact()),
            ValueError,
            r"terms\[0\]: expected a term with a bound for",
        ),
        (dict(terms=MAX, selection=fb.Stochastic(1)), ValueError, "terms: expected none with fb.Stochastic, which"),
        (dict(terms=MAX, selection=fb.DiverseSiblings(1)), ValueError, "terms: expected none with fb.DiverseSibl"),
        (dict(terms=MAX, dialect=fb.Dialect(finishes="row")), ValueError, "terms: expected none with Dialect"),
        (dict(terms=MAX, dialect=fb.Dialect(counts_eos=False)), ValueError, "terms: expected none with Dialect"),
        (dict(terms=MAX, dialect=fb.Dialect(at_max_length="spare")), ValueError, "terms: expected none with Dia"),
        (dict(terms="variance"), TypeError, "terms: expected a list of terms"),
        (dict(terms=[fb.UID]), TypeError, r"terms\[0\]: expected a term"),
        (dict(terms=fb.UID("max", [1, 2]), beam_size=[1, 2, 3]), ValueError, "strength: expected as many values as"),
    ],
)
def test_what_does_not_go_together_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        fb.BeamSearch(**{"beam_size": 2, "max_length": 4, "eos_id": EOS, **options})


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("mean", 1.0), ValueError, "kind: expected one of .*'local'.*, got 'mean'"),
        (("local", -1.0), ValueError, "strength: expected a number from 0"),
        (("local", [1.0, "a"]), TypeError, r"strength\[1\]: expected a number, got str"),
        (("local", 1.0, 1), TypeError, "counts_start: expected a bool, got int"),
    ],
)
def test_uid_rejects_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        fb.UID(*arguments)


def test_phrases_are_refused_and_nothing_has_changed():
    search = fb.BeamSearch(2, 4, EOS, constraint=fb.Phrases([[3]]), terms=fb.UID("max", 1))
    state = search.init(1)
    with pytest.raises(ValueError, match="constraint: expected one without banks for a search with terms"):
        search.step(state, torch.zeros(1, 5))
    assert state.vocab_size is None and not state.requests.steps.any()
