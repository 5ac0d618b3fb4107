"""Constraints together: with each other, per request, under every choosing rule, and with the search's own promises."""

import itertools
import math
from typing import ClassVar

import numpy as np
import pytest
import torch

import flashbeam as fb
from constraint_cases import (
    KINDS,
    all_of,
    assert_enumerates,
    assert_legal,
    assert_same_bits,
    listed,
    nothing,
    search_with,
)
from constraint_oracles import Contains, Rule, Setting, Together, enumerate_legal, viable
from flashbeam.kernels import pack_bitmask
from oracles import TableLM

REGIMES = pytest.mark.parametrize("regime", ["pool", "in_place"])
SETTINGS = [
    Setting(5, 4, (4,)),
    Setting(4, 4, ()),
    Setting(5, 4, (1, 3), 2),
    Setting(6, 3, (0,), 1),
    Setting(4, 5, (2,)),
]
HARD = [kind for kind in KINDS if kind != "penalty"]  # those that bar something
PAIRS = list(itertools.combinations_with_replacement(KINDS, 2))


def random_cases(rng, setting, kinds=HARD, many=6):
    """One constraint of each kind in turn, pairs and triples of them, and none."""
    order = [kinds[i] for i in rng.permutation(len(kinds))]
    cases = [KINDS[kind](rng, setting) for kind in order[: many - 3]]
    cases += [all_of(order[-2:], rng, setting), all_of(order[-4:-1], rng, setting), nothing(rng, setting)]
    return [cases[i] for i in rng.permutation(len(cases))]


class TestTogether:
    """What the conjunction allows is what each allows; each looks ahead on its own."""

    @pytest.mark.parametrize("pair", PAIRS, ids="-".join)
    def test_pairs(self, pair):
        seed = PAIRS.index(pair)
        for setting, normalize in zip(SETTINGS[seed % 2 :: 2], ["vocab", "allowed", "allowed"], strict=False):
            rng = np.random.default_rng([seed, setting.vocab])
            cases = [all_of(pair, rng, setting), all_of(pair[::-1], rng, setting), KINDS[pair[0]](rng, setting)]
            cases = cases[:1] if "penalty" in pair else cases
            regime = ["pool", "in_place"][(seed + setting.vocab) % 2]
            assert_enumerates(cases, setting, seed, normalize=normalize, finished=regime, temperature=0.8)

    @pytest.mark.parametrize("seed", range(12))
    def test_triples_in_one_batch(self, seed):
        rng, setting = np.random.default_rng([seed, 3]), SETTINGS[seed % len(SETTINGS)]
        kinds = list(KINDS)
        cases = [all_of([kinds[i] for i in rng.choice(len(kinds), 3)], rng, setting) for _ in range(3)]
        regime, normalize = ["pool", "in_place"][seed % 2], ["vocab", "allowed"][seed // 2 % 2]
        assert_enumerates(
            [*cases, KINDS[kinds[seed % 9]](rng, setting)], setting, seed, finished=regime, normalize=normalize
        )

    def test_nested(self):
        setting, rng = SETTINGS[0], np.random.default_rng(2)
        parts = [KINDS[kind](rng, setting) for kind in ("ngram", "forbidden", "copy", "suffix_veto")]
        rules, made = [rule for rule, _ in parts], [constraint for _, constraint in parts]
        cut = len(made) // 2
        flat = fb.AllOf(*made)
        deep = fb.AllOf(fb.AllOf(made[0], fb.AllOf(*made[1:cut])), fb.AllOf(), fb.AllOf(*made[cut:]))
        for each in (flat, deep, fb.AllOf(*made[::-1])):
            assert_enumerates([(Together(rules), each)], setting, 1)

    def test_what_only_the_conjunction_rules_out_is_a_dead_end(self):
        setting = Setting(5, 4, (4,))
        both = fb.AllOf(fb.Trie([[0, 1], [0, 2]]), fb.ForbiddenPhrases([[1], [2]]))
        for regime in ("pool", "in_place"):
            hyps, state = search_with(TableLM(5), both, setting, beam_size=3, finished=regime)
            assert not hyps.valid.any() and state.flags.tolist() == [fb.FLAG_DEAD_END]
            assert (hyps.lengths == 0).all() or not hyps.valid.any()

    def test_phrases_in_a_trie(self):
        setting = Setting(6, 4, (5,))
        items = [[0, 1, 2], [1, 2, 0], [3, 3], [2, 1, 2, 3], [0, 0]]
        both = fb.AllOf(fb.Trie(items), fb.Phrases([[1, 2]]))
        hyps, _ = search_with(TableLM(6), both, setting, beam_size=5)
        assert sorted(t[:-1] if f else t for t, f in listed(hyps)) == [(0, 1, 2), (1, 2, 0), (2, 1, 2, 3)]

    def test_two_phrases_constraints_are_one_of_all_phrases(self):
        setting = Setting(5, 5, (4,))
        both = fb.AllOf(fb.Phrases([[1, 2]]), fb.Phrases([[2, 0]]))
        model = TableLM(5, 3)
        rule = Together([Contains([[1, 2]]), Contains([[2, 0]])])
        want = enumerate_legal(model.logits, 0, rule, setting)
        hyps, _ = search_with(model, both, setting, beam_size=want.widest, stopping=fb.Exhausted())
        assert sorted(t for t, _ in listed(hyps)) == sorted(want.log_probs)

    @REGIMES
    def test_two_phrases_constraints_are_banked_as_one(self, regime):
        # as long as there is room for everything; the phrases share no token
        model = TableLM(8, 2)
        both = fb.AllOf(fb.Phrases([[1, 2]]), fb.Phrases([[3], [4, 5]]))
        runs = []
        for made in (both, fb.Phrases([[1, 2], [3], [4, 5]])):
            search = fb.BeamSearch(4, 12, 7, constraint=made, finished=regime, stopping=fb.Exhausted())
            state, tokens, cache = search.init(3), torch.arange(3), None
            for _ in range(6):
                logits, cache = model(tokens, cache)
                step = search.step(state, logits)
                tokens, cache = step.tokens.flatten(), fb.reorder(cache, step.source_rows)
                runs.append(step)
        for one, other in zip(runs[:6], runs[6:], strict=True):
            assert torch.equal(one.tokens, other.tokens) and torch.equal(one.parents, other.parents)


class TestFewBeams:
    @REGIMES
    @pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: f"V{s.vocab}T{s.max_length}")
    def test_everything_returned_is_legal(self, setting, regime):
        for seed in range(5):
            rng = np.random.default_rng([seed, setting.vocab])
            cases = random_cases(rng, setting, many=8)
            options = {"beam_size": rng.integers(1, 5, len(cases)).tolist(), "finished": regime}
            options["stopping"] = [fb.FirstFinished(), fb.Exact(), fb.Exhausted()][seed // 2]
            options["length_penalty"] = [0, 1.0, -0.5][seed % 3]
            options["normalize"] = ["vocab", "allowed"][seed % 2]
            hyps, state = search_with(
                TableLM(setting.vocab, seed), [c for _, c in cases], setting, range(len(cases)), **options
            )
            for request, (rule, _) in enumerate(cases):
                many = assert_legal(hyps, request, rule, setting)
                tokens = [t for t, _ in listed(hyps, request)]
                assert len(set(tokens)) == many, "duplicates"
                assert bool(state.flags[request] & fb.FLAG_DEAD_END) == (many == 0)
                if rule.looks_ahead and not isinstance(rule, Together):
                    leaves = sum(leaf in viable(rule, setting) for leaf in setting.leaves())
                    assert (many > 0) == (leaves > 0)

    @pytest.mark.parametrize(
        "kind", [kind for kind in HARD if kind not in ("forbidden", "ngram", "suffix_veto", "prefix")]
    )
    def test_in_place_no_beam_is_lost_to_a_dead_end(self, kind):
        # looking ahead is exact: once K beams live, K hypotheses come out
        for seed, setting in enumerate(SETTINGS):
            cases = [KINDS[kind](np.random.default_rng([seed, i]), setting) for i in range(8)]
            hyps, _ = search_with(
                TableLM(setting.vocab, seed), [c for _, c in cases], setting, range(8), beam_size=3, finished="in_place"
            )
            for request, (rule, _) in enumerate(cases):
                possible = sum(leaf in viable(rule, setting) for leaf in setting.leaves())
                assert len(listed(hyps, request)) == min(3, possible)


class TestBatchInvariance:
    RULES: ClassVar = {
        "top-k": lambda: fb.TopK(),
        "stochastic": lambda: fb.Stochastic(3),
        "sample": lambda: fb.Sample(3),
        "groups": lambda: fb.DiverseGroups(2, 0.3),
    }

    @pytest.mark.parametrize("rule", RULES)
    @pytest.mark.parametrize("seed", range(4))
    def test_alone_in_a_batch_and_permuted(self, rule, seed):
        setting = SETTINGS[seed]
        rng = np.random.default_rng([seed, 5])
        cases = random_cases(rng, setting, many=7)
        B = len(cases)
        made, prompts = [c for _, c in cases], list(range(B))
        options = {"selection": self.RULES[rule](), "beam_size": 4, "temperature": 0.9}
        if rule == "top-k":
            options |= {"finished": ["pool", "in_place"][seed % 2], "normalize": ["allowed", "vocab"][seed // 2]}
        model = TableLM(setting.vocab, seed, coarse=0.5)  # ties
        together, _ = search_with(model, made, setting, prompts, list(range(B)), **options)
        order = rng.permutation(B).tolist()
        permuted, _ = search_with(model, [made[i] for i in order], setting, order, order, **options)
        for place, i in enumerate(order):
            assert_same_bits(permuted, together, place, i)
        for i in range(B):
            alone, _ = search_with(model, made[i], setting, [i], [i], **options)
            assert_same_bits(alone, together, 0, i)
        twice, _ = search_with(model, made[0], setting, [0, 0], [0, 0], **options)  # one for all
        assert_same_bits(twice, together, 1, 0)

    def test_a_constraint_of_another_request_changes_no_bit(self):
        # wide beside narrow: longer phrases, larger tries, longer prefixes than one's own
        setting = Setting(6, 5, (5,))
        rng = np.random.default_rng(0)
        Phrases, Trie, Prefix = fb.Phrases, fb.Trie, fb.Prefix
        small = [Phrases([[1]]), Trie([[1, 2], [3]]), Prefix([2])]
        large = [
            Phrases([[1, 2], [3], [[4], [0, 0]], [2, 3]]),
            Trie(rng.integers(0, 5, (300, 5)).tolist()),
            Prefix([2, 2, 2, 2, 2]),
        ]
        model = TableLM(6, 1)
        for one, other in zip(small, large, strict=True):
            alone, _ = search_with(model, one, setting, [0], [0], beam_size=3)
            beside, _ = search_with(model, [other, one, None], setting, [1, 0, 2], [1, 0, 2], beam_size=[7, 3, 5])
            assert_same_bits(alone, beside, 0, 1)


CHOOSING = {
    "stochastic": lambda: fb.Stochastic(5),
    "conditional_poisson": lambda: fb.ConditionalPoisson(5),
    "arithmetic": lambda: fb.Arithmetic(5),
    "arithmetic_plain": lambda: fb.Arithmetic(5, rotate=False),
    "sample": lambda: fb.Sample(5),
    "sample_filtered": lambda: fb.Sample(5, top_k=3, top_p=0.8, min_p=0.1),
    "groups": lambda: fb.DiverseGroups(2, 0.7),
    "siblings": lambda: fb.DiverseSiblings(0.4),
    "width": lambda: fb.DynamicWidth(0.8),
}


class TestEveryChoosingRule:
    @pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: f"V{s.vocab}T{s.max_length}")
    @pytest.mark.parametrize("rule", CHOOSING)
    def test_everything_returned_is_legal(self, rule, setting):
        rng = np.random.default_rng([setting.vocab, setting.max_length])
        kinds = [kind for kind in HARD if kind != "penalty"]
        cases = [KINDS[kind](rng, setting) for kind in kinds] + random_cases(rng, setting)
        hyps, state = search_with(
            TableLM(setting.vocab, 1),
            [c for _, c in cases],
            setting,
            range(len(cases)),
            beam_size=4,
            selection=CHOOSING[rule](),
        )
        for request, (oracle, _) in enumerate(cases):
            many = assert_legal(hyps, request, oracle, setting)
            distinct = len({t for t, _ in listed(hyps, request)})
            if rule not in ("sample", "sample_filtered", "arithmetic", "arithmetic_plain", "groups"):
                assert distinct == many
            assert bool(state.flags[request] & fb.FLAG_DEAD_END) == (many == 0)
            if oracle.looks_ahead and not isinstance(oracle, Together):
                possible = sum(leaf in viable(oracle, setting) for leaf in setting.leaves())
                assert (many > 0) == (possible > 0)
                if rule in ("stochastic", "conditional_poisson"):
                    assert many == min(4, possible)
                if "sample" in rule or "arithmetic" in rule:
                    assert many == 4 * (possible > 0)

    def test_sampling_log_probs_are_of_the_renormalised_distribution(self):
        setting, rng = SETTINGS[0], np.random.default_rng(4)
        model = TableLM(5, 2)
        for kind in ("trie", "automaton", "phrases", "ngram", "copy"):
            rule, made = KINDS[kind](rng, setting)
            plain = enumerate_legal(model.logits, 0, rule, setting, temperature=0.7)
            own = enumerate_legal(model.logits, 0, rule, setting, normalize="allowed", temperature=0.7)
            for selection in (fb.Sample(1), fb.Stochastic(1), fb.Arithmetic(1)):
                hyps, _ = search_with(model, made, setting, beam_size=6, selection=selection, temperature=0.7)
                for i, (tokens, _) in enumerate(listed(hyps)):
                    assert float(hyps.sampling_log_probs[0, i]) == pytest.approx(own.log_probs[tokens], abs=1e-5)
                    assert float(hyps.log_probs[0, i]) == pytest.approx(plain.log_probs[tokens], abs=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# laws. With the seeds given a test of level 1e-3 passes or fails for good


def tail_of_chi_square(statistic: float, freedom: int) -> float:
    """P(X >= statistic), by Wilson and Hilferty's cube root: within 1e-4 of the truth where it matters here."""
    z = ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
    return 0.5 * math.erfc(z / math.sqrt(2))


def p_value(counts: dict, law: dict, draws: int) -> float:
    """Chi-square of the counts; cells that expect fewer than 5 are taken together."""
    assert math.fsum(law.values()) == pytest.approx(1.0, abs=1e-6)
    assert set(counts) <= set(law)
    cells, rest = [], [0.0, 0.0]
    for outcome, p in law.items():
        if p * draws >= 5:
            cells.append((counts.get(outcome, 0), p * draws))
        else:
            rest = [rest[0] + counts.get(outcome, 0), rest[1] + p * draws]
    if rest[1] > 0:
        cells.append(tuple(rest))
    return tail_of_chi_square(sum((o - e) ** 2 / e for o, e in cells), max(1, len(cells) - 1))


def tally(outcomes):
    counts = {}
    for outcome in outcomes:
        counts[outcome] = counts.get(outcome, 0) + 1
    return counts


LAWS = {
    "trie": lambda: KINDS["trie"](np.random.default_rng(5), Setting(5, 4, (4,))),
    "phrases": lambda: (Contains([[1, 0]]), fb.Phrases([[1, 0]])),
}


@pytest.mark.parametrize("kind", LAWS)
class TestLaws:
    """The p-value of each is above 1e-3."""

    SETTING = Setting(5, 4, (4,))
    B = 600

    def law(self, kind, model):
        rule, made = LAWS[kind]()
        leaves = enumerate_legal(model.logits, 0, rule, self.SETTING, normalize="allowed").log_probs
        assert len(leaves) > 4
        return {leaf: math.exp(log_prob) for leaf, log_prob in leaves.items()}, made

    def test_sample(self, kind):
        model = TableLM(5, 3, scale=1.0)
        law, made = self.law(kind, model)
        hyps, _ = search_with(model, made, self.SETTING, [0] * self.B, beam_size=3, selection=fb.Sample(2))
        counts = tally(t for b in range(self.B) for t, _ in listed(hyps, b))
        assert sum(counts.values()) == 3 * self.B
        assert p_value(counts, law, 3 * self.B) > 1e-3

    def test_stochastic_draws_without_putting_back(self, kind):
        model = TableLM(5, 3, scale=1.0)
        law, made = self.law(kind, model)
        hyps, _ = search_with(model, made, self.SETTING, [0] * self.B, beam_size=2, selection=fb.Stochastic(2))
        counts = tally(tuple(t for t, _ in listed(hyps, b)) for b in range(self.B))
        pairs = {(a, b): law[a] * law[b] / (1 - law[a]) for a in law for b in law if a != b}
        assert p_value(counts, pairs, self.B) > 1e-3


# ---------------------------------------------------------------------------------------------------------------------
# constraints of a user's own


class Tour:
    """A tour visits each of the V tokens at most once. As in docs/api.md."""

    def init(self, batch_size, beam_size, vocab_size, device):
        return torch.zeros(batch_size * beam_size, vocab_size, dtype=torch.bool, device=device)

    def bitmask(self, visited):
        return pack_bitmask(~visited)

    def advance(self, visited, tokens):
        return visited.scatter(1, tokens[:, None], True)


class Permutations(Rule):
    looks_ahead = False

    def legal(self, tokens, finished, setting):
        return len(set(tokens)) == len(tokens)


class SumsTo:
    """What ends at ``max_length`` has a sum that ``divisor`` divides. EOS may follow at any time."""

    def __init__(self, divisor):
        self.divisor = divisor

    def init(self, batch_size, beam_size, vocab_size, device):
        return torch.zeros(batch_size * beam_size, dtype=torch.int64, device=device)

    def bitmask(self, state):
        return torch.full((state.shape[0], 1), -1, dtype=torch.int32, device=state.device)

    def accepts(self, state):
        return state % self.divisor == 0

    def advance(self, state, tokens):
        return state + tokens


class Divides(Rule):
    looks_ahead = False

    def __init__(self, divisor):
        self.divisor = divisor

    def may(self, prefix, token, setting):
        return True  # what is not accepted in the end has been a candidate all the same

    def legal(self, tokens, finished, setting):
        return finished or sum(tokens) % self.divisor == 0


class TestOwn:
    @REGIMES
    def test_at_max_length_all_must_accept(self, regime):
        for setting in (Setting(5, 4, (4,)), Setting(4, 4, ())):
            cases = [(Together([Divides(2), Divides(3)]), fb.AllOf(SumsTo(2), SumsTo(3))), (Divides(2), SumsTo(2))]
            assert_enumerates(cases, setting, 1, finished=regime)

    @REGIMES
    @pytest.mark.parametrize("normalize", ["vocab", "allowed"])
    def test_tours_are_permutations(self, regime, normalize):
        for setting in (Setting(5, 5, ()), Setting(4, 4, (3,)), Setting(5, 3, (0, 1), 2)):
            assert_enumerates([(Permutations(), Tour())], setting, 1, finished=regime, normalize=normalize)

    def test_the_shortest_tour(self):
        n, rng = 6, np.random.default_rng(2)
        distances = torch.from_numpy(rng.random((n, n)).astype(np.float32))
        search = fb.BeamSearch(720, n, constraint=Tour(), length_penalty=0)
        tours = fb.decode(search, lambda at, cache: (-distances[at], cache), torch.zeros(1, dtype=torch.int64))
        logits = torch.log_softmax(-distances.double(), 1)
        scores = {
            p: float(sum(logits[a, b] for a, b in itertools.pairwise((0, *p))))
            for p in itertools.permutations(range(n))
        }
        best = sorted(scores, key=scores.get, reverse=True)
        assert [tuple(t) for t in tours.tokens[0, :20].tolist()] == best[:20] and tours.valid.all()

    def test_beside_the_librarys(self):
        setting, rng = Setting(5, 4, (4,)), np.random.default_rng(0)
        for kind in HARD:
            rule, made = KINDS[kind](rng, setting)
            cases = [(Together([Permutations(), rule]), fb.AllOf(Tour(), made)), (rule, made), (Permutations(), Tour())]
            assert_enumerates(cases, setting, 2, normalize="allowed")

    def test_as_alone_bitwise(self):
        setting, rng = Setting(5, 4, (4,)), np.random.default_rng(1)
        made = [Tour(), KINDS["trie"](rng, setting)[1], None, fb.AllOf(Tour(), KINDS["phrases"](rng, setting)[1])]
        together, _ = search_with(TableLM(5), made, setting, range(4), range(4), beam_size=3)
        for i, each in enumerate(made):
            alone, _ = search_with(TableLM(5), each, setting, [i], [i], beam_size=3)
            assert_same_bits(alone, together, 0, i)

    @pytest.mark.parametrize("rule", CHOOSING)
    def test_under_every_rule(self, rule):
        setting = Setting(5, 5, (4,))
        hyps, _ = search_with(TableLM(5), Tour(), setting, range(3), beam_size=4, selection=CHOOSING[rule]())
        for request in range(3):
            assert assert_legal(hyps, request, Permutations(), setting)


# ---------------------------------------------------------------------------------------------------------------------
# the promises of the search


def every_kind(setting, seed=0):
    rng = np.random.default_rng(seed)
    found = {kind: KINDS[kind](rng, setting) for kind in KINDS}
    return found | {"own": (Permutations(), Tour()), "all": all_of(["automaton", "ngram", "phrases"], rng, setting)}


NAMES = [*KINDS, "own", "all"]


@pytest.mark.parametrize("kind", NAMES)
class TestStates:
    SETTING = Setting(5, 4, (4,))

    def case(self, kind, seed=2):
        if kind in KINDS:
            return KINDS[kind](np.random.default_rng(seed), self.SETTING)
        return every_kind(self.SETTING, seed)[kind]

    @pytest.mark.parametrize("regime", ["pool", "in_place"])
    def test_no_value_is_asked_for(self, kind, regime):
        # on the device "meta" tensors have no values: what reads one raises
        _, made = self.case(kind)
        search = fb.BeamSearch([3, 2], 4, 4, constraint=[made, None], finished=regime, min_length=1, temperature=0.5)
        state = search.init(2, "meta")
        for rows in (2, 6, 6, 6):
            step = search.step(state, torch.zeros(rows, 5, device="meta"))
            assert step.tokens.shape == (2, 3) and step.tokens.device.type == "meta"

    @pytest.mark.parametrize("selection", [fb.TopK(), fb.Stochastic(3), fb.DynamicWidth(0.9)], ids=repr)
    def test_snapshots(self, kind, selection):
        rule, made = self.case(kind)
        search = fb.BeamSearch(3, 4, 4, constraint=made, selection=selection)
        model = TableLM(5, 1)

        def go_on(state, tokens, cache, steps=9):
            while not state.all_done() and steps:
                logits, cache = model(tokens, cache)
                step = search.step(state, logits)
                tokens, cache, steps = step.tokens.flatten(), fb.reorder(cache, step.source_rows), steps - 1
            return tokens, cache

        want, whole = search.init(2), search.init(2)
        go_on(want, torch.tensor([0, 1]), None)
        tokens, cache = go_on(whole, torch.tensor([0, 1]), None, 2)
        copy = whole.clone()
        while not copy.all_done():  # goes elsewhere
            search.step(copy, torch.randn(6, 5))
        again = whole.clone()
        go_on(whole, tokens, cache)
        go_on(again, tokens, cache)
        want, one, other = (search.finalize(state) for state in (want, whole, again))
        for request in range(2):
            assert_same_bits(one, want, request, request)
            assert_same_bits(other, want, request, request)
        for request in range(2):
            assert_legal(search.finalize(copy), request, rule, self.SETTING)

    @pytest.mark.parametrize("regime", ["pool", "in_place"])
    def test_streaming_shows_beginnings_of_what_is_legal(self, kind, regime):
        rule, made = self.case(kind)
        model = TableLM(5, 1)
        search = fb.BeamSearch(3, 4, 4, constraint=made, finished=regime)
        state, tokens, cache = search.init(1), torch.tensor([0]), None
        while not state.all_done():
            logits, cache = model(tokens, cache)
            step = search.step(state, logits)
            tokens, cache = step.tokens.flatten(), fb.reorder(cache, step.source_rows)
            best = state.best()
            for said, finished in listed(best):
                assert finished == (said[-1] in self.SETTING.eos)
                assert all(rule.may(said[:n], said[n], self.SETTING) for n in range(len(said)))
        assert listed(state.best())[:1] == listed(search.finalize(state))[:1]

    def test_the_first_step_may_have_rows_of_all_slots(self, kind):
        _, made = self.case(kind)
        search = fb.BeamSearch(3, 4, 4, constraint=[made, None])
        row, rest = torch.randn(2, 1, 5), torch.randn(2, 6, 5)
        states = [search.init(2), search.init(2), search.init(2)]
        first = [row[:, 0], row.expand(2, 3, 5).contiguous(), row.expand(2, 3, 5).reshape(6, 5)]
        for state, logits in zip(states, first, strict=True):
            search.step(state, logits)
            for each in rest:
                search.step(state, each)
        results = [search.finalize(state) for state in states]
        for other in results[1:]:
            for request in range(2):
                assert_same_bits(results[0], other, request, request)

    def test_a_bitmask_of_the_caller_is_obeyed_too(self, kind):
        rule, made = self.case(kind)
        allowed = torch.ones(5, dtype=torch.bool)
        allowed[1] = False
        search = fb.BeamSearch(3, 4, 4, constraint=made, stopping=fb.Exhausted())
        state = search.init(1)
        while not state.all_done():
            rows = 3 if int(state.requests.steps[0]) else 1
            search.step(state, torch.randn(rows, 5), pack_bitmask(allowed[None]))
        hyps = search.finalize(state)
        assert_legal(hyps, 0, rule, self.SETTING)
        assert all(1 not in tokens for tokens, _ in listed(hyps))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_logits_of_16_bits(self, kind, dtype):
        rule, made = self.case(kind)
        model = TableLM(5, 1)
        hyps, _ = search_with(lambda t, c: (lambda r: (r[0].to(dtype), r[1]))(model(t, c)), made, self.SETTING, [0, 1])
        for request in range(2):
            assert_legal(hyps, request, rule, self.SETTING)

    def test_padding_of_the_vocabulary_is_never_chosen(self, kind):
        rule, made = self.case(kind)
        hyps, _ = search_with(
            TableLM(9, 1, eos=(5, 6, 7, 8), eos_bias=9.0), made, self.SETTING, [0, 1], vocab_size=5, beam_size=3
        )
        for request in range(2):
            for tokens, _ in listed(hyps, request):
                assert max(tokens) < 5
            assert_legal(hyps, request, rule, self.SETTING)

    def test_one_object_serves_many_searches(self, kind):
        # no memory of an earlier search, of another vocabulary, length or batch
        rule, made = self.case(kind)
        for setting in (Setting(5, 3, (4,)), Setting(8, 4, (7, 4)), Setting(5, 4, (4,), 2), Setting(5, 3, (4,))):
            hyps, _ = search_with(TableLM(setting.vocab, 1), made, setting, [0, 1], beam_size=3)
            for request in range(2):
                assert_legal(hyps, request, rule, setting)


def test_nan_and_infinite_logits_are_flagged_and_nothing_illegal_comes_of_them():
    setting = Setting(5, 4, (4,))
    for kind, (rule, made) in every_kind(setting, 2).items():
        search = fb.BeamSearch(3, 4, 4, constraint=made, stopping=fb.Exhausted())
        state = search.init(2)
        for t in range(4):
            logits = torch.randn(6 if t else 2, 5)
            logits[0, 2] = torch.nan
            if t == 2:
                logits[3, 0] = torch.inf
            search.step(state, logits)
        hyps = search.finalize(state)
        for request in range(2):
            assert_legal(hyps, request, rule, setting), kind
        if kind in ("ngram", "own"):
            assert state.flags[0] & fb.FLAG_NAN
