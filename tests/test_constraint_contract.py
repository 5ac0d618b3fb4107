"""What each constraint allows, against enumeration and by naive search, from the contract (design.md, 3 and 4)."""

import functools
import itertools
import re
from typing import ClassVar

import numpy as np
import pytest
import torch

import flashbeam as fb
from constraint_cases import (
    KINDS,
    assert_enumerates,
    assert_exactly,
    assert_legal,
    assert_same_bits,
    csr,
    listed,
    nothing,
    search_with,
    some_tokens,
)
from constraint_oracles import (
    Begins,
    Contains,
    ContainsNone,
    Copied,
    Items,
    Matches,
    NoLongSpan,
    NoNgramTwice,
    Penalised,
    Setting,
    Together,
    Words,
    alternatives,
    enumerate_legal,
    viable,
)
from oracles import NOISE, Power, TableLM, log_softmax64, naive_search

REGIMES = pytest.mark.parametrize("regime", ["pool", "in_place"])


def ident(setting):
    return f"V{setting.vocab}-T{setting.max_length}-eos{setting.eos}-min{setting.min_length}".replace(" ", "")


class TestEverythingLegalAndNothingElse:
    SETTINGS: ClassVar = [
        Setting(5, 4, (4,)),
        Setting(4, 4, ()),
        Setting(5, 4, (1, 3), 2),
        Setting(6, 3, (0,), 1),
        Setting(4, 5, (2,), 3),
        Setting(7, 3, ()),
    ]
    MODES: ClassVar = [
        ("pool", "vocab", 1.0),
        ("in_place", "allowed", 0.6),
        ("pool", "allowed", 1.7),
        ("in_place", "vocab", 0.8),
    ]

    @pytest.mark.parametrize("setting", SETTINGS, ids=ident)
    @pytest.mark.parametrize("kind", KINDS)
    def test_each_constraint(self, kind, setting):
        unconstrained = kind != "penalty" and setting.vocab**setting.max_length < 400
        first = self.SETTINGS.index(setting) % 2
        for seed, (regime, normalize, temperature) in list(enumerate(self.MODES))[first::2]:
            rng = np.random.default_rng([seed, setting.vocab, setting.max_length, len(setting.eos)])
            many = 1 if kind == "penalty" else 3
            cases = [KINDS[kind](rng, setting) for _ in range(many)]
            if unconstrained:
                cases.insert(1, nothing(rng, setting))
            assert_enumerates(
                cases, setting, seed, finished=regime, normalize=normalize, temperature=temperature, spare=seed % 2
            )

    @REGIMES
    def test_numbers_per_request(self, regime):
        # lengths, temperatures and widths differ: what is looked ahead must be each request's own
        rng = np.random.default_rng(3)
        wide = Setting(4, 5, (3,))
        settings = [Setting(4, T, (3,), m) for T, m in [(5, 0), (2, 1), (4, 4), (3, 2)]]
        model = TableLM(4, 1)
        for kind in ("trie", "automaton", "phrases", "copy"):
            cases = [KINDS[kind](rng, wide) for _ in settings]
            temperatures = [0.7, 1.0, 2.0, 1.3]
            wants = [
                enumerate_legal(model.logits, bos, rule, setting, temperature=t)
                for bos, ((rule, _), setting, t) in enumerate(zip(cases, settings, temperatures, strict=True))
            ]
            search = fb.BeamSearch(
                [want.widest for want in wants],
                [setting.max_length for setting in settings],
                3,
                min_length=[setting.min_length for setting in settings],
                temperature=temperatures,
                constraint=[constraint for _, constraint in cases],
                length_penalty=0,
                stopping=fb.Exhausted(),
                finished=regime,
            )
            state, tokens, cache = search.init(4), torch.arange(4), None
            while not state.all_done():
                logits, cache = model(tokens, cache)
                step = search.step(state, logits)
                tokens, cache = step.tokens.flatten(), fb.reorder(cache, step.source_rows)
            hyps = search.finalize(state)
            for request, want in enumerate(wants):
                assert_exactly(hyps, state, request, want, settings[request])


class TestFewBeams:
    """The contract's search, written literally over Python lists, and with K too small for everything."""

    STOPPING: ClassVar = [
        (1.0, fb.FirstFinished()),
        ("exact", fb.Exact()),
        ("exhausted", fb.Exhausted()),
        (2.0, fb.Patience(2.0)),
    ]

    @pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("phrases", "penalty")])
    def test_the_literal_search(self, kind):
        compared = 0
        for seed, setting in enumerate([Setting(5, 4, (4,)), Setting(4, 4, ()), Setting(5, 4, (1, 3), 2)]):
            rng = np.random.default_rng([seed, 77])
            cases = [KINDS[kind](rng, setting) for _ in range(4)]
            for i, regime in enumerate(["pool", "in_place"]):
                stopping, rule_of = self.STOPPING[(seed + i) % (3 if i else 4)]
                penalty, normalize = [1.0, 0.0, -0.5][seed], ["vocab", "allowed"][(seed + i) % 2]
                hyps, _ = search_with(
                    TableLM(setting.vocab, seed),
                    [c for _, c in cases],
                    setting,
                    range(4),
                    beam_size=[1, 2, 3, 4],
                    finished=regime,
                    normalize=normalize,
                    stopping=rule_of,
                    length_penalty=penalty,
                )
                for request, (rule, _) in enumerate(cases):

                    def mask(prefix, rule=rule, setting=setting):
                        return np.array([rule.may(prefix[1:], token, setting) for token in range(setting.vocab)])

                    want = naive_search(
                        TableLM(setting.vocab, seed).logits,
                        request,
                        beam_size=request + 1,
                        max_length=setting.max_length,
                        eos=setting.eos,
                        min_length=setting.min_length,
                        penalty=Power(penalty),
                        stopping=stopping,
                        finished=regime,
                        normalize=normalize,
                        mask=mask,
                    )
                    if want.margin < NOISE:
                        continue
                    compared += 1
                    legal = [h for h in want.hypotheses if rule.legal(h.tokens, h.finished, setting)]
                    assert [tokens for tokens, _ in listed(hyps, request)] == [h.tokens for h in legal]
                    scores = hyps.scores[request, : len(legal)].tolist()
                    assert scores == pytest.approx([float(h.score) for h in legal], abs=1e-5)
        assert compared > 15

    @pytest.mark.parametrize("kind", KINDS)
    def test_exact_returns_what_exhausted_would(self, kind):
        setting = Setting(5, 4, (4,))
        cases = [KINDS[kind](np.random.default_rng([seed, 3]), setting) for seed in range(8)]
        for penalty in (0.0, 1.0, -1.0):
            one, other = (
                search_with(
                    TableLM(5, 1, eos=(4,), eos_bias=1.0),
                    [c for _, c in cases],
                    setting,
                    range(8),
                    beam_size=[1, 2, 3, 4] * 2,
                    stopping=stopping,
                    length_penalty=penalty,
                )[0]
                for stopping in (fb.Exact(), fb.Exhausted())
            )
            for request in range(8):
                assert_same_bits(one, other, request, request)


def by_banks(candidates, need):
    """The best of every bank, the most advanced first, then the second best of each, and so on."""
    banks = {}
    for candidate in sorted(candidates, key=lambda c: (-c[1], c[2], c[3], c[4])):
        banks.setdefault(need(candidate), []).append(candidate)
    places = [(place, bank, -c[1], c) for bank, row in banks.items() for place, c in enumerate(row)]
    return [c for *_, c in sorted(places, key=lambda place: place[:3])]


def banked_search(logits, rule, setting, beam_size, regime):
    """Banked beams, literally. What ends in the pool holds no place among what lives on. ``[tokens]``, best first."""
    words = [a for phrase in rule.phrases for a in alternatives(phrase)]
    letters = sorted({token for word in words for token in word})
    endless = Setting(setting.vocab, 99)

    @functools.cache
    def missing(body):
        """The fewest tokens that satisfy the rest."""
        lengths = (n for n in range(9) for more in itertools.product(letters, repeat=n)
                   if rule.legal((*body, *more), False, endless))  # fmt: skip
        return next(lengths)

    def need(candidate):
        said = candidate[5]
        return 0 if candidate[4] in (-1, *setting.eos) else missing(said)

    beams, pool = [((), 0.0, False)], []
    for length in range(1, setting.max_length + 1):
        candidates = []  # (place holder, log-probability, slot, -logit, token, tokens)
        for slot, (said, log_prob, frozen) in enumerate(beams):
            if frozen:
                candidates.append((0, log_prob, slot, 0, -1, said))
                continue
            row = log_softmax64(logits((0, *said)))
            for token in range(setting.vocab):
                if rule.may(said, token, setting) and not (length < setting.min_length and token in setting.eos):
                    candidates.append((0, log_prob + row[token], slot, -row[token], token, (*said, token)))
        best, last = by_banks(candidates, need)[:beam_size], length == setting.max_length
        if regime == "in_place":
            beams = [(c[5], c[1], c[4] in (-1, *setting.eos)) for c in best]
            continue
        pool += [(c[5], c[1]) for c in best if last or c[4] in setting.eos]
        lives = by_banks([c for c in candidates if c[4] not in setting.eos], need)[:beam_size]
        beams = [] if last else [(c[5], c[1], False) for c in lives]
    found = pool if regime == "pool" else [(said, log_prob) for said, log_prob, _ in beams]
    return [said for said, _ in sorted(found, key=lambda h: -h[1])[:beam_size]]


class TestTrie:
    SETTING = Setting(6, 4, (5,))

    def items(self, seed, many):
        rng = np.random.default_rng(seed)
        return [some_tokens(rng, self.SETTING, 1, 3) for _ in range(many)]

    def run(self, items, setting=SETTING, beams=8, **options):
        return search_with(TableLM(setting.vocab, 3), fb.Trie(items), setting, beam_size=beams, **options)

    @REGIMES
    @pytest.mark.parametrize("stopping", [fb.FirstFinished(), fb.Exact(), fb.Exhausted()], ids=repr)
    @pytest.mark.parametrize("many", [1, 2, 5])
    def test_fewer_items_than_beams_are_exactly_those_items(self, many, stopping, regime):
        items = self.items(many, many)
        hyps, state = self.run(items, stopping=stopping, finished=regime)
        found = [tokens[:-1] for tokens, finished in listed(hyps)]
        assert sorted(found) == sorted({tuple(item) for item in items})
        assert hyps.valid[0].tolist() == [i < len(found) for i in range(8)]
        assert (hyps.scores[0, len(found) :] == -torch.inf).all() and state.flags.tolist() == [0]

    def test_beginnings_of_items_that_are_items_themselves(self):
        items = [[1], [1, 2], [1, 2, 3], [2, 2]]
        hyps, _ = self.run(items)
        assert sorted(listed(hyps)) == sorted((tuple([*item, 5]), True) for item in items)

    def test_an_item_of_all_of_max_length_needs_no_eos(self):
        hyps, _ = self.run([[1, 2, 3, 4], [1, 2, 3]])
        assert sorted(listed(hyps)) == [((1, 2, 3, 4), False), ((1, 2, 3, 5), True)]

    def test_the_empty_item_is_eos_alone(self):
        assert listed(self.run([[], [3]])[0]) and sorted(listed(self.run([[], [3]])[0])) == [
            ((3, 5), True),
            ((5,), True),
        ]
        assert listed(self.run([[]])[0]) == [((5,), True)]

    @REGIMES
    def test_items_that_are_too_long_are_barred_from_the_start(self, regime):
        # K = 1: a beam that began the longer item would have nothing left
        items = [[0, 1, 2, 3, 4], [1, 0, 0, 0, 0], [4, 4]]
        hyps, state = self.run(items, beams=1, finished=regime)
        assert listed(hyps) == [((4, 4, 5), True)] and state.flags.tolist() == [0]
        hyps, state = self.run(items[:2], finished=regime)
        assert not hyps.valid.any() and state.flags.tolist() == [fb.FLAG_DEAD_END]

    @REGIMES
    def test_without_eos_only_items_of_max_length_count(self, regime):
        setting = Setting(6, 3, ())
        hyps, state = self.run([[1], [1, 2, 3], [4, 5, 0], [2, 2], [1, 1, 1, 1]], setting, finished=regime)
        assert sorted(listed(hyps)) == [((1, 2, 3), False), ((4, 5, 0), False)]
        hyps, state = self.run([[1], [2, 2]], setting, finished=regime)
        assert not hyps.valid.any() and state.flags.tolist() == [fb.FLAG_DEAD_END]

    def test_min_length_bars_short_items_from_the_start(self):
        setting = Setting(6, 4, (5,), 3)
        hyps, _ = self.run([[0], [1, 2], [3, 3, 3], [4]], setting, beams=1)
        assert listed(hyps)[0][0] in [(1, 2, 5), (3, 3, 3, 5)]
        assert len(self.run([[0], [1, 2], [3, 3, 3], [4]], setting)[0].valid[0].nonzero()) == 2

    @REGIMES
    @pytest.mark.parametrize(("eos", "low"), [((), False), ((3,), False), ((3, 2), True)])
    def test_items_of_more_tokens_than_a_word_of_the_table_has_bits(self, eos, low, regime):
        for longest in (33, 70):
            rng, setting = np.random.default_rng(longest), Setting(4, longest, eos, (longest - 12) * low)
            items = [rng.integers(0, 2, rng.integers(1, longest + 8)).tolist() for _ in range(25)]
            items += [rng.integers(0, 2, longest).tolist() for _ in range(5)]
            short = range(max(0, setting.min_length - 1), longest if eos else 0)
            legal = {tuple(item) for item in items if len(item) == longest or len(item) in short}
            hyps, _ = self.run(items, setting, beams=60, finished=regime, stopping=fb.Exhausted())
            assert {setting.body(tokens) for tokens, _ in listed(hyps)} == legal
            hyps, _ = self.run(items, setting, beams=1, finished=regime)
            assert assert_legal(hyps, 0, Items(items), setting) == 1

    def test_duplicates_count_once(self):
        items = [[1, 2], [1, 2], [3], [1, 2], [3]]
        assert sorted(listed(self.run(items)[0])) == [((1, 2, 5), True), ((3, 5), True)]

    def test_lists_arrays_and_tensors_are_the_same(self):
        items = [[1, 2, 0], [1, 4, 0], [3, 0, 0], [0, 0, 0]]
        short = [[1, 2], [1, 4], [3], []]
        forms = [
            fb.Trie(np.array(items), lengths=[2, 2, 1, 0]),
            fb.Trie(torch.tensor(items), lengths=torch.tensor([2, 2, 1, 0])),
            fb.Trie(torch.tensor(items, dtype=torch.int32), pad=0),
            fb.Trie(tuple(tuple(item) for item in short)),
        ]
        for form in forms:
            hyps, _ = search_with(TableLM(6, 3), form, self.SETTING, beam_size=8)
            assert sorted(tokens[:-1] for tokens, _ in listed(hyps)) == sorted(map(tuple, short))

    @pytest.mark.parametrize("mmap", [True, False])
    def test_saved_and_loaded_searches_the_same(self, tmp_path, mmap):
        items = self.items(4, 20)
        made = fb.Trie(items)
        made.save(tmp_path / "items")
        loaded = fb.Trie.load(tmp_path / "items", mmap=mmap)
        one, _ = search_with(TableLM(6, 3), made, self.SETTING, beam_size=30)
        other, _ = search_with(TableLM(6, 3), loaded, self.SETTING, beam_size=30)
        assert torch.equal(one.tokens, other.tokens) and torch.equal(one.scores, other.scores)
        assert int(one.valid.sum()) == len({tuple(item) for item in items})

    def test_load_refuses_what_is_no_trie(self, tmp_path):
        with pytest.raises(FileNotFoundError):
            fb.Trie.load(tmp_path / "nothing")
        fb.Automaton([0, 1], [0], [0], [True]).save(tmp_path / "automaton")
        with pytest.raises(ValueError, match="expected"):
            fb.Trie.load(tmp_path / "automaton")
        fb.Trie([[1, 2], [3]]).save(tmp_path / "trie")
        with pytest.raises(FileExistsError):
            fb.Trie([[1]]).save(tmp_path / "trie")
        for file in sorted((tmp_path / "trie").iterdir()):
            whole = file.read_bytes()
            file.write_bytes(whole[: len(whole) // 2])
            with pytest.raises(ValueError, match="expected"):
                fb.Trie.load(tmp_path / "trie")
            file.write_bytes(whole)
        assert listed(search_with(TableLM(6, 3), fb.Trie.load(tmp_path / "trie"), self.SETTING)[0])

    @pytest.mark.parametrize("normalize", ["vocab", "allowed"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_large_vocabularies(self, normalize, dtype):
        # ids far apart, several EOS, every tile of the vocabulary; oracle: each item rescored in float64
        V, T, eos = 5000, 4, (4999, 17)
        rng = np.random.default_rng(1)
        letters = rng.choice(np.arange(18, 4999), 40)
        items = sorted({tuple(rng.choice(letters, rng.integers(1, T + 1)).tolist()) for _ in range(60)})
        ends = [(*item, end) for item in items if len(item) < T for end in eos] + [i for i in items if len(i) == T]
        rows = functools.cache(lambda p: np.random.default_rng([*p]).normal(size=V).astype(np.float32) * 3)
        following = {}
        for leaf in ends:
            for n in range(len(leaf)):
                following.setdefault(leaf[:n], set()).add(leaf[n])

        def model(tokens, cache):
            column = tokens.reshape(-1, 1)
            prefix = column if cache is None else torch.cat([cache, column], 1)
            return torch.from_numpy(np.stack([rows(tuple(p)) for p in prefix.tolist()])).to(dtype), prefix

        setting = Setting(V, T, eos)
        made = fb.Trie([list(item) for item in items])
        hyps, state = search_with(
            model, made, setting, beam_size=len(ends) + 2, normalize=normalize, temperature=0.7, stopping=fb.Exhausted()
        )
        found = listed(hyps)
        assert sorted(tokens for tokens, _ in found) == sorted(ends) and not state.flags.any()
        for i, (tokens, _) in enumerate(found):
            want = 0.0
            for n in range(len(tokens)):
                row = torch.from_numpy(rows((0, *tokens[:n]))).to(dtype).double().numpy() / np.float32(0.7)
                allowed = np.isin(np.arange(V), list(following[tokens[:n]]))
                want += log_softmax64(row, allowed if normalize == "allowed" else None)[tokens[n]]
            assert float(hyps.log_probs[0, i]) == pytest.approx(want, abs=1e-4)

    @pytest.mark.parametrize("normalize", ["vocab", "allowed"])
    def test_lists_and_bitmasks_are_bitwise_equal(self, normalize):
        # alone it may be a list; beside a request without a constraint it must be a mask; so may it beside others
        setting = Setting(301, 2, (5,))
        for seed in range(16):
            rng = np.random.default_rng([seed, 8])
            trie = fb.Trie([some_tokens(rng, setting, 1, 2, 70) for _ in range(250)])
            options = {"beam_size": 12, "normalize": normalize, "temperature": 0.7}
            model = TableLM(301, seed, scale=[0.3, 2.0][seed % 2])
            alone, _ = search_with(model, trie, setting, **options)
            for other in (fb.AllOf(trie, AllowsAll()), fb.AllOf(AllowsAll(), trie), fb.AllOf(trie, fb.AllOf())):
                assert_same_bits(search_with(model, other, setting, **options)[0], alone, 0, 0)
            beside, _ = search_with(model, [None, trie], setting, [1, 0], **options)
            assert_same_bits(beside, alone, 1, 0)

    @pytest.mark.parametrize("normalize", ["vocab", "allowed"])
    def test_what_else_bars_tokens_of_a_list(self, normalize):
        setting = Setting(40, 3, (5,), 2)
        rng = np.random.default_rng(3)
        items = [some_tokens(rng, setting, 1, 3, 9) for _ in range(40)]
        bans = [
            (ContainsNone([[1], [2, 3]]), fb.ForbiddenPhrases([[1], [2, 3]])),
            (NoNgramTwice(1), fb.NoRepeatNgram(1)),
            (NoLongSpan([[1, 2, 3, 4, 6]], 1), fb.SuffixVeto([1, 2, 3, 4, 6], 1)),
        ]
        for barred in bans:
            rule, made = Branches(items), fb.Trie(items)
            cases = [(Together([rule, barred[0]]), fb.AllOf(made, barred[1]))]
            cases += [(Together([rule, barred[0]]), fb.AllOf(barred[1], made)), (rule, made)]
            for regime in ("pool", "in_place"):
                assert_enumerates(cases, setting, 1, normalize=normalize, finished=regime)


class Branches(Items):
    """Items, whose look-ahead compares beginnings, for vocabularies too large to enumerate."""

    def may(self, prefix, token, setting):
        if token in setting.eos:
            return list(prefix) in self.items and len(prefix) + 1 >= setting.min_length
        low, high = max(setting.min_length - 1, 0) if setting.eos else setting.max_length, setting.max_length
        begun = [*prefix, token]
        return any(item[: len(begun)] == begun and low <= len(item) <= high for item in self.items)


class AllowsAll:
    """A constraint of one's own that bars nothing, through a bitmask."""

    def init(self, batch_size, beam_size, vocab_size, device):
        return torch.zeros(batch_size * beam_size, -(-vocab_size // 32), dtype=torch.int32, device=device)

    def bitmask(self, state):
        return ~state

    def advance(self, state, tokens):
        return state


class TestAutomaton:
    @REGIMES
    def test_a_beam_of_one_is_never_stranded(self, regime):
        # random automata with dead ends and cycles: whatever legal words exist, K = 1 finds one
        setting = Setting(4, 5, (3,))
        cases = [KINDS["automaton"](np.random.default_rng(seed), setting) for seed in range(60)]
        hyps, state = search_with(
            TableLM(4, 5),
            [c for _, c in cases],
            setting,
            range(60),
            beam_size=1,
            finished=regime,
            stopping=fb.Exhausted(),
        )
        possible = [bool(viable(rule, setting)) for rule, _ in cases]
        assert 10 < sum(possible) < 60
        for request, (rule, _) in enumerate(cases):
            assert assert_legal(hyps, request, rule, setting) == possible[request]
        assert (state.flags != 0).tolist() == [not p for p in possible]

    def test_edges_of_a_state_may_come_in_any_order(self):
        setting, rng = Setting(7, 3, (6,)), np.random.default_rng(0)
        edges = {(s, t): int(rng.integers(3)) for s in range(3) for t in range(6)}
        accepting = [False, True, False]
        rule = Words(edges, frozenset([1]), 2)
        for shuffle in (None, np.random.default_rng(1), np.random.default_rng(2)):
            automaton = fb.Automaton(*csr(edges, 3, shuffle), accepting, start=2)
            assert_enumerates([(rule, automaton)], setting, 4)

    def test_start_is_where_it_starts(self):
        setting = Setting(3, 3, (2,))
        table = dict(indptr=[0, 1, 2], tokens=[0, 1], targets=[1, 0], accepting=[True, False])
        found = [listed(search_with(TableLM(3), fb.Automaton(**table, start=s), setting)[0]) for s in range(2)]
        assert sorted(found[0]) == [((0, 1, 2), True), ((2,), True)]
        assert sorted(found[1]) == [((1, 0, 1), False), ((1, 2), True)]

    @REGIMES
    def test_lengths_beyond_a_word_of_the_table(self, regime):
        # how many tokens lead to acceptance, counted here with a set per length; more than 32 and 64 of them
        for seed in range(12):
            rng, states = np.random.default_rng([seed, 91]), 12
            T, low, eos = int(rng.integers(28, 100)), int(rng.integers(0, 60)), [(), (3,), (3, 2)][seed % 3]
            setting = Setting(4, T, eos, min(low, T) if eos else 0)
            edges = {(s, t): int(rng.integers(states)) for s in range(states) for t in (0, 1) if rng.random() < 0.55}
            accepting = set(np.flatnonzero(rng.random(states) < 0.15).tolist())
            now, lengths = {0}, []
            for n in range(T + 1):
                lengths += [n] * bool(now & accepting)
                now = {edges[s, t] for s in now for t in (0, 1) if (s, t) in edges}
            possible = [n for n in lengths if n == T or (eos and setting.min_length - 1 <= n < T)]
            made = fb.Automaton(*csr(edges, states, rng), [s in accepting for s in range(states)])
            rule = Words(edges, frozenset(accepting))
            hyps, state = search_with(TableLM(4, seed), made, setting, [0, 1], beam_size=2, finished=regime)
            for request in range(2):
                assert bool(assert_legal(hyps, request, rule, setting)) == bool(possible)
                assert bool(state.flags[request]) == (not possible)

    @pytest.mark.parametrize("form", [list, np.array, torch.tensor])
    def test_lists_arrays_and_tensors(self, form):
        automaton = fb.Automaton(form([0, 2, 3]), form([0, 1, 1]), form([1, 0, 1]), form([False, True]))
        rule = Words({(0, 0): 1, (0, 1): 0, (1, 1): 1}, frozenset([1]))
        assert_enumerates([(rule, automaton)], Setting(4, 4, (3,)), 2)

    def test_a_state_that_is_accepting_and_final_ends_there(self):
        setting = Setting(4, 4, (3,))
        hyps, _ = search_with(TableLM(4), fb.Automaton([0, 1, 1], [2], [1], [False, True]), setting)
        assert listed(hyps) == [((2, 3), True)]

    def test_saved_and_loaded_searches_the_same(self, tmp_path):
        setting = Setting(5, 4, (4,))
        for seed in range(5):
            rule, made = KINDS["automaton"](np.random.default_rng(seed), setting)
            made.save(tmp_path / str(seed))
            assert_enumerates([(rule, fb.Automaton.load(tmp_path / str(seed)))], setting, seed)


class TestFromRegex:
    # (pattern, vocabulary), EOS last; letters chosen so that tokens split and join characters
    CASES: ClassVar = [
        (r"(?:ab|ba)+", ["a", "b", "ab", "aba", None]),
        (r"a{2,4}b?", ["a", "aa", "b", "ab", None]),
        (r"[^ab]*", ["a", "c", "cd", "bc", None]),
        (r"(?i:ab)c", ["a", "A", "b", "B", "c", None]),
        (r"\d+(?:\.\d)?", ["1", ".", "23", ".4", "x", None]),
        (r"a|ab|abc", ["a", "b", "c", "bc", None]),
        (r"(a*)(b|c)?$", ["a", "b", "c", None]),
        (r"^x?y*\w\Z", ["x", "y", "xy", None]),
        (r"a*?b+?", ["a", "b", "bb", None]),
        (r".+", ["\n", "a", "b\n", None]),
        (r"(?s:.)+", ["\n", "a", None]),
        (r"[é-ü]+ß?", ["é", "ü", "ß", "éß", "z", None]),
        (r"(|a)b", ["a", "b", "ab", None]),
        (r"(a|b)*abb", ["a", "b", "ab", "bb", None]),
    ]

    @pytest.mark.parametrize(("pattern", "vocabulary"), CASES)
    def test_words_are_those_of_fullmatch(self, pattern, vocabulary):
        setting = Setting(len(vocabulary), 4, (len(vocabulary) - 1,))
        made = fb.Automaton.from_regex(pattern, vocabulary)
        assert_enumerates([(Matches(pattern, vocabulary), made)], setting, 1)

    def test_bytes(self):
        pattern, text = "[aé]+z", "éa"
        parts = [b"a", "é".encode()[:1], "é".encode()[1:], b"z", None]
        made = fb.Automaton.from_regex(pattern, parts)
        setting = Setting(5, 5, (4,))
        hyps, _ = search_with(TableLM(5), made, setting, beam_size=200, stopping=fb.Exhausted())
        found = {tokens[:-1] if finished else tokens for tokens, finished in listed(hyps)}
        want = set()
        for n in range(1, 6):
            for body in itertools.product(range(4), repeat=n):
                try:
                    said = b"".join(parts[t] for t in body).decode()
                except UnicodeDecodeError:
                    continue
                if re.fullmatch(pattern, said):
                    want.add(body)
        assert text and found == want

    def test_tokens_without_text_are_never_used(self):
        made = fb.Automaton.from_regex("a*", ["a", "", None, "b"])
        hyps, _ = search_with(TableLM(4), made, Setting(4, 3, (2,)), beam_size=9)
        assert sorted(tokens for tokens, _ in listed(hyps)) == [(0, 0, 0), (0, 0, 2), (0, 2), (2,)]


class TestPrefix:
    def test_ragged_prefixes_and_none(self):
        setting = Setting(5, 4, (4,))
        given = [[], [2], [3, 3, 1], [0, 1, 2, 3], [1, 2], [2, 0, 0, 0, 0]]
        cases = [(Begins(p), fb.Prefix(p)) for p in given]
        for regime in ("pool", "in_place"):
            assert_enumerates(cases, setting, 6, finished=regime)

    def test_its_tokens_carry_the_models_log_probabilities(self):
        model, setting = TableLM(5, 9), Setting(5, 4, (4,))
        hyps, _ = search_with(model, fb.Prefix([3, 3]), setting, beam_size=2)
        for i in range(2):
            for t, prefix in enumerate([(0,), (0, 3)]):
                row = model.logits(prefix).astype(np.float64)
                want = row[3] - np.log(np.exp(row).sum())
                assert float(hyps.token_log_probs[0, i, t]) == pytest.approx(want, abs=1e-5)
        allowed, _ = search_with(model, fb.Prefix([3, 3]), setting, beam_size=2, normalize="allowed")
        assert allowed.token_log_probs[0, :, :2].tolist() == [[0.0, 0.0]] * 2

    def test_the_empty_prefix_forces_nothing_bitwise(self):
        setting = Setting(5, 4, (4,))
        one, _ = search_with(TableLM(5), fb.Prefix([]), setting, beam_size=3)
        other, _ = search_with(TableLM(5), None, setting, beam_size=3)
        assert torch.equal(one.tokens, other.tokens) and torch.equal(one.scores, other.scores)

    def test_it_may_end_in_eos(self):
        setting = Setting(5, 4, (4,))
        hyps, _ = search_with(TableLM(5), fb.Prefix([2, 1, 4]), setting, beam_size=4)
        assert listed(hyps) == [((2, 1, 4), True)]

    def test_it_counts_in_the_length(self):
        setting = Setting(5, 4, (4,), 3)
        hyps, _ = search_with(TableLM(5, 2), fb.Prefix([1, 2]), setting, beam_size=30, stopping=fb.Exhausted())
        assert (1, 2, 4) in [tokens for tokens, _ in listed(hyps)]


class TestNgrams:
    @pytest.mark.parametrize("n", [1, 2, 3, 4])
    @pytest.mark.parametrize("setting", [Setting(4, 5, (3,)), Setting(3, 7, ()), Setting(3, 7, (0,), 5)], ids=ident)
    def test_no_ngram_twice(self, n, setting):
        assert_enumerates([(NoNgramTwice(n), fb.NoRepeatNgram(n))], setting, n)

    @pytest.mark.parametrize("n", [1, 2, 3])
    def test_the_prompt_counts(self, n):
        setting = Setting(5, 4, (4,))
        prompts = [[0, 1, 0, 1, 2], [3], [2, 2, 2, 2, 2, 2, 1], [4, 1, 4, 1]]  # and an EOS that is never barred
        cases = [(NoNgramTwice(n, tuple(p)), fb.NoRepeatNgram(n, prompt=p)) for p in prompts]
        assert_enumerates(cases, setting, 3)

    def test_long_hypotheses_of_a_beam(self):
        setting = Setting(6, 60, (5,))
        for n in (2, 3):
            hyps, _ = search_with(
                TableLM(6, n, eos=(5,), eos_bias=-9), fb.NoRepeatNgram(n), setting, [0, 1], beam_size=4
            )
            for request in range(2):
                assert assert_legal(hyps, request, NoNgramTwice(n), setting) and hyps.lengths[request].max() > 20


class TestForbidden:
    @pytest.mark.parametrize(
        "given",
        [
            [[0]],
            [[0, 0]],
            [[0, 1, 0], [1, 0, 0]],
            [[0, 0, 0, 0]],
            [[1, 2], [2], [0, 1, 2]],
            [[0, 1], [1, 1, 0], [1, 0, 1]],
        ],
        ids=str,
    )
    def test_overlaps(self, given):
        for setting in (Setting(4, 5, (3,)), Setting(3, 6, ())):
            assert_enumerates([(ContainsNone(given), fb.ForbiddenPhrases(given))], setting, 1)

    def test_long_hypotheses_of_a_beam(self):
        setting, rng = Setting(4, 60, (3,)), np.random.default_rng(0)
        given = [some_tokens(rng, setting, 2, 5) for _ in range(8)]
        hyps, _ = search_with(TableLM(4, 1, eos=(3,), eos_bias=-5), fb.ForbiddenPhrases(given), setting)
        assert assert_legal(hyps, 0, ContainsNone(given), setting)

    def test_a_phrase_may_end_in_eos(self):
        for given in (
            [[1, 4]],
            [[4]],
            [[0, 1, 4], [1, 1]],
            [
                [3, 4],
                [
                    4,
                ],
            ],
        ):
            for setting in (Setting(5, 4, (4,)), Setting(5, 3, (4, 2), 1)):
                assert_enumerates([(ContainsNone(given), fb.ForbiddenPhrases(given))], setting, 1)


class TestSuffixVeto:
    def test_no_span_crosses_documents(self):
        setting = Setting(4, 4, (3,))
        documents = [[0, 1], [2, 0], [1]]
        cases = [(NoLongSpan(d, 1), fb.SuffixVeto(d, 1)) for d in (documents, [[0, 1, 2, 0, 1]])]
        assert_enumerates(cases, setting, 1)

    def test_a_span_of_none_bars_every_token_of_the_corpus(self):
        setting = Setting(5, 4, (4,))
        assert_enumerates([(NoLongSpan([[0, 2]], 0), fb.SuffixVeto([0, 2], 0))], setting, 1)

    def test_eos_is_never_barred(self):
        setting = Setting(5, 4, (4,))
        corpus = [1, 4, 0, 4, 2, 3, 4]
        assert_enumerates([(NoLongSpan([corpus], 1), fb.SuffixVeto(corpus, 1))], setting, 1)

    @pytest.mark.parametrize("longest", [1, 2, 3, 5])
    def test_no_long_span_of_the_corpus(self, longest):
        rng = np.random.default_rng(longest)
        for setting in (Setting(4, 5, (3,)), Setting(3, 6, ())):
            corpora = [some_tokens(rng, setting, 1, 40) for _ in range(3)]
            cases = [(NoLongSpan([c], longest), fb.SuffixVeto(c, longest)) for c in corpora]
            assert_enumerates(cases, setting, longest)

    def test_long_hypotheses_of_a_beam(self):
        setting, rng = Setting(6, 60, (5,)), np.random.default_rng(0)
        corpus = rng.integers(0, 5, 2000).tolist()
        hyps, _ = search_with(TableLM(6, 1, eos=(5,), eos_bias=-5), fb.SuffixVeto(corpus, 4), setting)
        assert assert_legal(hyps, 0, NoLongSpan([corpus], 4), setting)


class TestCopy:
    @pytest.mark.parametrize("monotone", [False, True])
    @pytest.mark.parametrize("least", [1, 2, 3])
    def test_spans_of_the_source(self, monotone, least):
        for setting in (Setting(4, 5, (3,)), Setting(4, 5, ()), Setting(4, 5, (3,), 4)):
            for source in ([0, 1, 2, 0, 1], [1, 1, 1], [2], [0, 1, 0, 2, 0, 1, 2, 2]):
                rule = Copied(source, monotone, least)
                made = fb.Copy(source, monotone=monotone, min_span=least)
                assert_enumerates([(rule, made)], setting, least)

    @pytest.mark.parametrize("n", [3, 4])
    def test_plans_are_all_increasing_sequences(self, n):
        # extractive plans: indices of sentences, strictly increasing; 2**n of them, the empty one EOS alone
        setting = Setting(n + 1, n + 1, (n,))
        made = fb.Copy(list(range(n)), monotone=True, min_span=1)
        hyps, _ = search_with(TableLM(n + 1), made, setting, beam_size=2**n + 3, stopping=fb.Exhausted())
        plans = sorted(tokens[:-1] for tokens, _ in listed(hyps))
        assert plans == sorted(c for k in range(n + 1) for c in itertools.combinations(range(n), k))
        assert (hyps.scores[0, : 2**n].diff() <= 0).all()

    def test_long_hypotheses_of_a_beam(self):
        setting, rng = Setting(6, 40, (5,)), np.random.default_rng(0)
        source = rng.integers(0, 5, 60).tolist()
        for monotone, least in itertools.product([False, True], [1, 3]):
            made = fb.Copy(source, monotone=monotone, min_span=least)
            hyps, _ = search_with(TableLM(6, 1, eos=(5,), eos_bias=-5), made, setting)
            assert assert_legal(hyps, 0, Copied(source, monotone, least), setting)


class TestRepetitionPenalty:
    @pytest.mark.parametrize("penalty", [0.5, 1.0, 1.2, 8.0])
    def test_logits_are_penalised_before_the_temperature(self, penalty):
        setting = Setting(4, 4, (3,), 1)
        made = fb.RepetitionPenalty(penalty)
        for temperature in (0.5, 1.0, 2.0):
            assert_enumerates([(Penalised(penalty), made)], setting, 2, temperature=temperature)

    def test_the_prompt_counts(self):
        prompts = [[1], [0, 0, 2], [1, 2]]
        cases = [(Penalised(1.7, tuple(p)), fb.RepetitionPenalty(1.7, prompt=p)) for p in prompts]
        assert_enumerates(cases, Setting(4, 3, (3,)), 2)

    def test_bans_and_penalties_in_one_batch(self):
        setting = Setting(4, 3, ())
        rng = np.random.default_rng(1)
        cases = [KINDS["penalty"](rng, setting), KINDS["trie"](rng, setting), nothing(rng, setting)]
        assert_enumerates(cases, setting, 2, normalize="allowed")


def shortest(phrases, ordered) -> int:
    """The fewest tokens that contain all phrases, by breadth-first search over strings."""
    words = [[phrase] if isinstance(phrase[0], int) else phrase for phrase in phrases]
    if ordered:
        return sum(min(map(len, word)) for word in words)
    letters = sorted({t for word in words for a in word for t in a})
    reach = max(len(a) for word in words for a in word)
    found, depth = {((), frozenset())}, 0
    seen = set(found)
    while not any(len(met) == len(words) for _, met in found):
        depth += 1
        grown = set()
        for said, met in found:
            for letter in letters:
                tail = (*said, letter)[-reach:]
                new = {i for i, w in enumerate(words) if any(tail[-len(a) :] == tuple(a) for a in w)}
                grown.add((tail[max(0, len(tail) - reach + 1) :] if reach > 1 else (), met | new))
        found = grown - seen
        seen |= found
    return depth


def tempting(vocab, seed):
    """A model that would rather end, and whose favourites are seldom what is asked for."""
    return TableLM(vocab, seed, scale=4.0, eos=(vocab - 1,), eos_bias=8.0)


class TestPhrases:
    def random(self, rng, vocab, many, longest=2):
        def word():
            return rng.integers(0, vocab - 1, rng.integers(1, longest + 1)).tolist()

        return [[word(), word()] if rng.random() < 0.25 else word() for _ in range(many)]

    @REGIMES
    @pytest.mark.parametrize("ordered", [False, True])
    def test_always_satisfied_where_it_is_possible(self, ordered, regime):
        # as many beams as 1, 2, 3, 4, as many tokens as just suffice, and some more
        rng, vocab, eos = np.random.default_rng(int(ordered)), 10, 9
        given = [self.random(rng, vocab, many, 3 if many < 8 else 2) for many in (1, 2, 3, 4, 5, 6, 8, 9, 10)]
        lengths = [shortest(phrases, ordered) for phrases in given]
        made = [fb.Phrases(phrases, ordered=ordered) for phrases in given]
        requests = [(i, beams, spare) for i in range(len(given)) for beams in (1, 2, 3, 4) for spare in (0, 1, 3)]
        model = tempting(vocab, 1)
        search = fb.BeamSearch(
            [beams for _, beams, _ in requests],
            [lengths[i] + spare for i, _, spare in requests],
            eos,
            constraint=[made[i] for i, _, _ in requests],
            finished=regime,
        )
        state, tokens, cache = search.init(len(requests)), torch.arange(len(requests)), None
        while not state.all_done():
            logits, cache = model(tokens, cache)
            step = search.step(state, logits)
            tokens, cache = step.tokens.flatten(), fb.reorder(cache, step.source_rows)
        hyps = search.finalize(state)
        for request, (i, _, spare) in enumerate(requests):
            setting = Setting(vocab, lengths[i] + spare, (eos,))
            assert assert_legal(hyps, request, Contains(given[i], ordered), setting) >= 1, (given[i], setting)
        assert not state.flags.any()

    @pytest.mark.parametrize("ordered", [False, True])
    def test_without_eos(self, ordered):
        rng, vocab = np.random.default_rng(5), 8
        for many in (1, 3, 6):
            given = self.random(rng, vocab, many)
            setting = Setting(vocab, shortest(given, ordered), ())
            hyps, _ = search_with(tempting(vocab, 1), fb.Phrases(given, ordered=ordered), setting, beam_size=2)
            assert assert_legal(hyps, 0, Contains(given, ordered), setting) >= 1

    @REGIMES
    @pytest.mark.parametrize("ordered", [False, True])
    def test_what_does_not_fit_is_flagged(self, ordered, regime):
        rng, vocab = np.random.default_rng(9), 8
        for many in (1, 2, 4, 10):
            given = [*self.random(rng, vocab, many), [1, 2, 3]]
            setting = Setting(vocab, shortest(given, ordered) - 1, (vocab - 1,))
            made = fb.Phrases(given, ordered=ordered)
            hyps, state = search_with(tempting(vocab, 1), made, setting, beam_size=3, finished=regime)
            assert not hyps.valid.any() and state.flags.tolist() == [fb.FLAG_DEAD_END]
            assert (hyps.scores == -torch.inf).all()

    def test_more_than_ten_are_never_pruned_too_early(self):
        # all the short substrings of one string: only some strings of two letters have them all
        setting = Setting(3, 8, (2,))
        for seed in range(3):
            text = np.random.default_rng(seed).integers(0, 2, 7).tolist()
            given = sorted({tuple(text[i:j]) for i in range(7) for j in range(i + 1, min(7, i + 4) + 1)})
            given = [list(phrase) for phrase in given]
            assert len(given) > 10
            model = TableLM(3, seed)
            rule = Contains(given)
            want = enumerate_legal(model.logits, 0, rule, setting)
            assert want.log_probs
            hyps, state = search_with(model, fb.Phrases(given), setting, beam_size=2**9, stopping=fb.Exhausted())
            assert_exactly(hyps, state, 0, want, setting)

    def test_a_forced_prefix_counts(self):
        setting = Setting(6, 4, (5,))
        both = fb.AllOf(fb.Prefix([1, 2]), fb.Phrases([[2, 3], [1]]))
        hyps, _ = search_with(tempting(6, 0), both, setting, beam_size=1)
        assert listed(hyps) == [((1, 2, 3, 5), True)]

    @pytest.mark.parametrize(
        ("given", "ordered", "length"),
        [
            ([[0, 0, 1]], False, 3),  # failure links: in 0 0 0 1 too
            ([[0, 1, 0], [0, 1, 0]], False, 3),  # once is enough for both
            ([[0, 1, 0], [0, 1, 0]], True, 6),  # twice, disjoint
            ([[0, 1, 0], [1, 0, 2]], False, 4),  # overlapping
            ([[0, 1, 0], [1, 0, 2]], True, 6),  # one after the other
            ([[1], [0, 1, 2]], False, 3),  # inside
            ([[0, 1, 2], [1]], False, 3),
            ([[[0], [0, 1]], [1]], True, 2),  # the shorter alternative
            ([[[0, 1, 2], [1]], [[2, 1]]], False, 2),
            ([[[0, 1, 2], [1]]], True, 1),  # the shorter one ends inside the longer one
            ([[[0, 1, 2], [1]], [2]], True, 2),
            ([[0, 1], [2, 0]], True, 4),  # 0 1 9 2 0 goes on after a mismatch
        ],
    )
    def test_by_hand(self, given, ordered, length):
        made, rule = fb.Phrases(given, ordered=ordered), Contains(given, ordered)
        for T in range(max(1, length - 1), min(length + 2, 6)):
            wants = assert_enumerates([(rule, made)], Setting(4, T, (3,)), T)
            assert bool(wants[0].log_probs) == (length <= T)

    def test_eos_is_legal_exactly_when_all_is_satisfied(self):
        setting = Setting(5, 5, (4,))
        made = fb.Phrases([[1, 2], [2, 0]])
        model = TableLM(5, 0, eos=(4,), eos_bias=50.0)  # EOS as soon as it is allowed
        hyps, _ = search_with(model, made, setting, beam_size=1)
        ((tokens, finished),) = listed(hyps)
        assert (finished and tokens == (1, 2, 0, 4)) or Contains([[1, 2], [2, 0]]).legal(tokens, finished, setting)
        assert len(tokens) < 2 or not Contains([[1, 2], [2, 0]]).legal(tokens[:-2], False, setting)

    @REGIMES
    def test_banks_literally(self, regime):
        for seed in range(18):
            setting = [Setting(6, 5, (5,)), Setting(5, 5, ()), Setting(5, 5, (1, 3), 3)][seed % 3]
            rule, made = KINDS["phrases"](np.random.default_rng([seed, 80]), setting)
            beams = seed % 5 + 1
            model = TableLM(setting.vocab, seed)
            hyps, _ = search_with(model, made, setting, beam_size=beams, finished=regime, stopping=fb.Exhausted())
            want = banked_search(model.logits, rule, setting, beams, regime)
            assert [tokens for tokens, _ in listed(hyps)] == want

    def test_beams_of_every_progress_are_kept(self):
        # by score alone four beams would fill with hypotheses that have begun nothing, until the last moment
        setting, vocab = Setting(12, 12, (11,)), 12
        given = [[7, 8], [9]]
        row = np.full(vocab, -9.0, np.float32)
        row[:5], row[7:10] = 0.0, -6.0

        def model(tokens, cache):
            prefix = tokens.reshape(-1, 1)
            return torch.from_numpy(np.repeat(row[None], len(prefix), 0)), {}

        hyps, _ = search_with(model, fb.Phrases(given), setting, beam_size=4, length_penalty=1.0)
        early = [tokens for tokens, _ in listed(hyps)]
        assert early and all(Contains(given).legal(tokens, True, setting) for tokens in early)


class Text(Matches):
    """A grammar allows what can go on to a text of it, however long: it does not look ahead to ``max_length``."""

    looks_ahead = False

    def may(self, prefix, token, setting):
        if token in setting.eos:
            return self.legal((*prefix, token), True, setting)
        wide = Setting(setting.vocab, setting.max_length + 2, setting.eos)
        return (*prefix, token) in viable(self, wide)


class TestGrammar:
    VOCABULARY: ClassVar = ["a", "b", "ab", None]

    def case(self, pattern):
        xgrammar = pytest.importorskip("xgrammar", reason="the extra `grammar`")
        words = [word or "</s>" for word in self.VOCABULARY]
        info = xgrammar.TokenizerInfo(words, vocab_size=4, stop_token_ids=[3])
        return Text(pattern, self.VOCABULARY), fb.Grammar(xgrammar.GrammarCompiler(info).compile_regex(pattern))

    @pytest.mark.parametrize("normalize", ["vocab", "allowed"])
    @REGIMES
    def test_texts_are_those_of_fullmatch(self, regime, normalize):
        cases = [self.case(pattern) for pattern in ("(ab|ba)+", "a{1,2}b?", "(a|b)*abb")]
        for setting in (Setting(4, 4, (3,)), Setting(4, 3, (3,), 2)):
            assert_enumerates([*cases, nothing(None, setting)], setting, 1, finished=regime, normalize=normalize)

    def test_with_others_and_as_alone(self):
        setting, rng = Setting(4, 4, (3,)), np.random.default_rng(0)
        rule, made = self.case("(ab|ba)+a?")
        for kind in ("ngram", "phrases", "trie"):
            other, constraint = KINDS[kind](rng, setting)
            cases = [(Together([rule, other]), fb.AllOf(made, constraint)), (rule, made), (other, constraint)]
            assert_enumerates(cases, setting, 2)
            prompts = [0, 1, 2]
            constraints = [c for _, c in cases]
            together, _ = search_with(TableLM(4), constraints, setting, prompts, prompts, beam_size=2)
            for i in prompts:
                alone, _ = search_with(TableLM(4), constraints[i], setting, [i], [i], beam_size=2)
                assert_same_bits(alone, together, 0, i)

    @pytest.mark.parametrize(
        "selection", [fb.Stochastic(1), fb.Sample(1), fb.DiverseGroups(2, 0.4), fb.DynamicWidth(0.7)]
    )
    def test_under_other_rules(self, selection):
        setting = Setting(4, 5, (3,))
        rule, made = self.case("(a|ba)*")
        hyps, _ = search_with(TableLM(4), made, setting, range(3), beam_size=4, selection=selection)
        for request in range(3):
            assert assert_legal(hyps, request, rule, setting)

    def test_what_it_is_given_is_checked(self):
        with pytest.raises(TypeError, match=r"^compiled: expected"):
            fb.Grammar("a+")


# ---------------------------------------------------------------------------------------------------------------------
# bad arguments


GOOD = dict(indptr=[0, 2, 3], tokens=[0, 1, 1], targets=[1, 0, 1], accepting=[True, False])
BAD = [
    ("Trie", ([],), {}, ValueError, "sequences"),
    ("Trie", (7,), {}, TypeError, "sequences"),
    ("Trie", (None,), {}, TypeError, "sequences"),
    ("Trie", ("abc",), {}, TypeError, "sequences"),
    ("Trie", ([1, 2],), {}, TypeError, "sequences"),
    ("Trie", ([[1.5]],), {}, TypeError, "sequences"),
    ("Trie", ([[-1]],), {}, ValueError, "sequences"),
    ("Trie", ([["a"]],), {}, TypeError, "sequences"),
    ("Trie", (np.zeros((2, 2), int),), {"lengths": [1]}, ValueError, "lengths"),
    ("Trie", (np.zeros((2, 2), int),), {"lengths": [1, 3]}, ValueError, "lengths"),
    ("Trie", (np.zeros((2, 2), int),), {"lengths": [1, -1]}, ValueError, "lengths"),
    ("Trie", (torch.zeros(2, 2, dtype=torch.int64, device="meta"),), {}, ValueError, "sequences"),
    ("Automaton", (), GOOD | {"indptr": [0, 2]}, ValueError, r"\w+"),
    ("Automaton", (), GOOD | {"indptr": [0, 3, 2]}, ValueError, "indptr"),
    ("Automaton", (), GOOD | {"indptr": [1, 2, 3]}, ValueError, "indptr"),
    ("Automaton", (), GOOD | {"tokens": [0, 0, 1]}, ValueError, "tokens"),
    ("Automaton", (), GOOD | {"tokens": [0, -1, 1]}, ValueError, "tokens"),
    ("Automaton", (), GOOD | {"tokens": [0, 1]}, ValueError, r"\w+"),
    ("Automaton", (), GOOD | {"targets": [0, 1]}, ValueError, "targets"),
    ("Automaton", (), GOOD | {"targets": [0, 1, 2]}, ValueError, "targets"),
    ("Automaton", (), GOOD | {"targets": [0, 1, -1]}, ValueError, "targets"),
    ("Automaton", (), GOOD | {"accepting": [True]}, ValueError, "accepting"),
    ("Automaton", (), GOOD | {"accepting": [1, 0]}, TypeError, "accepting"),
    ("Automaton", (), GOOD | {"start": 2}, ValueError, "start"),
    ("Automaton", (), GOOD | {"start": -1}, ValueError, "start"),
    ("Automaton", (), GOOD | {"start": "x"}, TypeError, "start"),
    ("Phrases", ([],), {}, ValueError, "phrases"),
    ("Phrases", ([[]],), {}, ValueError, r"phrases\[0\]"),
    ("Phrases", ([[1], []],), {}, ValueError, r"phrases\[1\]"),
    ("Phrases", ([[[1], []]],), {}, ValueError, r"phrases\[0\]"),
    ("Phrases", (5,), {}, TypeError, "phrases"),
    ("Phrases", ([5],), {}, TypeError, r"phrases\[0\]"),
    ("Phrases", ([[1.5]],), {}, TypeError, r"phrases\[0\]"),
    ("Phrases", ([[-2]],), {}, ValueError, r"phrases\[0\]"),
    ("Phrases", ([[1]],), {"ordered": 1}, TypeError, "ordered"),
    ("ForbiddenPhrases", ([[]],), {}, ValueError, "phrases"),
    ("ForbiddenPhrases", (5,), {}, TypeError, "phrases"),
    ("ForbiddenPhrases", ([[1.5]],), {}, TypeError, "phrases"),
    ("ForbiddenPhrases", ([[-2]],), {}, ValueError, "phrases"),
    ("NoRepeatNgram", (0,), {}, ValueError, "n"),
    ("NoRepeatNgram", (-1,), {}, ValueError, "n"),
    ("NoRepeatNgram", (2.0,), {}, TypeError, "n"),
    ("NoRepeatNgram", (True,), {}, TypeError, "n"),
    ("Prefix", (3,), {}, (TypeError, ValueError), "tokens"),
    ("Prefix", ([1.5],), {}, TypeError, "tokens"),
    ("Prefix", ([-1],), {}, ValueError, "tokens"),
    ("Prefix", ([[1]],), {}, (TypeError, ValueError), "tokens"),
    ("RepetitionPenalty", (0,), {}, ValueError, "penalty"),
    ("RepetitionPenalty", (-1.5,), {}, ValueError, "penalty"),
    ("RepetitionPenalty", (float("nan"),), {}, ValueError, "penalty"),
    ("RepetitionPenalty", ("2",), {}, TypeError, "penalty"),
    ("SuffixVeto", ([1, 2], -1), {}, ValueError, "max_span"),
    ("SuffixVeto", ([1, 2], 1.5), {}, TypeError, "max_span"),
    ("SuffixVeto", (4, 1), {}, (TypeError, ValueError), "corpus"),
    ("SuffixVeto", ([-4], 1), {}, ValueError, "corpus"),
    ("SuffixVeto", ([0.5], 1), {}, TypeError, "corpus"),
    ("Copy", ([1, 2],), {"min_span": 0}, ValueError, "min_span"),
    ("Copy", ([1, 2],), {"min_span": 1.0}, TypeError, "min_span"),
    ("Copy", ([1, 2],), {"monotone": 1}, TypeError, "monotone"),
    ("Copy", (4,), {}, (TypeError, ValueError), "source"),
    ("Copy", ([-4],), {}, ValueError, "source"),
    ("Copy", ([0.5],), {}, TypeError, "source"),
]


class TestBadArguments:
    @pytest.mark.parametrize(("name", "args", "kwargs", "error", "argument"), BAD)
    def test_in_the_constructor(self, name, args, kwargs, error, argument):
        kind = getattr(fb, name)
        with pytest.raises(error, match=rf"^{argument}(\[\d+\])*: expected "):
            kind(*args, **kwargs)

    # what only the search can know: the vocabulary, EOS
    AT_FIRST_STEP: ClassVar = [
        ("Trie", ([[1, 2], [9]],), "sequences"),
        ("Trie", ([[1, 2], [4]],), "sequences"),
        ("Automaton", ([0, 1], [9], [0], [True]), "tokens"),
        ("Automaton", ([0, 1], [4], [0], [True]), "tokens"),
        ("Phrases", ([[1], [2, 9]],), "phrases"),
        ("Phrases", ([[1], [2, 4]],), "phrases"),
        ("ForbiddenPhrases", ([[9]],), "phrases"),
        ("NoRepeatNgram", (2, [9]), "prompt"),
        ("Prefix", ([1, 9],), "tokens"),
        ("Prefix", ([4, 1],), "tokens"),
        ("RepetitionPenalty", (1.2, [9]), "prompt"),
        ("SuffixVeto", ([1, 9], 1), "corpus"),
        ("Copy", ([1, 9],), "source"),
        ("Copy", ([1, 4],), "source"),
    ]

    @pytest.mark.parametrize(("name", "args", "argument"), AT_FIRST_STEP)
    @pytest.mark.parametrize("place", ["alone", "second", "inside"])
    def test_at_the_first_step_and_nothing_has_changed(self, name, args, argument, place):
        made = getattr(fb, name)(*args)
        constraint = {
            "alone": made,
            "second": [None, made],
            "inside": [None, fb.AllOf(fb.NoRepeatNgram(2), made)],
        }
        search = fb.BeamSearch(2, 4, 4, constraint=constraint[place])
        state, untouched = search.init(2), search.init(2)
        for _ in range(2):
            with pytest.raises(ValueError, match=rf"^{argument}(\[\d+\])*: expected "):
                search.step(state, torch.zeros(2, 6))
        for one, other in zip(tensors(state), tensors(untouched), strict=True):
            assert torch.equal(torch.nan_to_num(one), torch.nan_to_num(other))

    def test_wrong_logits_at_a_later_step_change_nothing(self):
        setting = Setting(5, 4, (4,))
        for kind in KINDS:
            if kind == "regex":
                continue
            _, made = KINDS[kind](np.random.default_rng(1), setting)
            search = fb.BeamSearch(3, 4, 4, constraint=made)
            state, other = search.init(1), search.init(1)
            rows = torch.randn(3, 3, 5)
            for each in (state, other):
                search.step(each, rows[0, :1])
            for wrong in (torch.zeros(3, 6), torch.zeros(2, 5), torch.zeros(3, 5, dtype=torch.int64), "x"):
                with pytest.raises((ValueError, TypeError), match=r"^logits: expected"):
                    search.step(state, wrong)
            for row in rows[1:]:
                a, b = search.step(state, row), search.step(other, row)
                assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def tensors(nest):
    """Every tensor that a state holds, in order."""
    if isinstance(nest, torch.Tensor):
        return [nest]
    if isinstance(nest, dict):
        return [t for value in nest.values() for t in tensors(value)]
    if isinstance(nest, (list, tuple)):
        return [t for value in nest for t in tensors(value)]
    if type(nest).__module__.startswith("flashbeam") and hasattr(nest, "__dict__"):
        return [t for value in vars(nest).values() for t in tensors(value)]
    return []
