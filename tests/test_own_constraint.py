"""Constraints of a user's own: masks, vetoes, acceptance at ``max_length``, per request, together."""

from itertools import pairwise

import numpy as np
import pytest
import torch

import flashbeam as fb
from flashbeam.kernels import pack_bitmask
from oracles import TableLM, enumerate_leaves

V, EOS, BOS = 5, 4, 0


class Ban:
    """Never ``token``, as a mask."""

    def __init__(self, token):
        self.token = token

    def init(self, batch_size, beam_size, vocab_size, device):
        allowed = torch.ones(vocab_size, dtype=torch.bool, device=device)
        allowed[self.token] = False
        return pack_bitmask(allowed).repeat(batch_size * beam_size, 1)

    def bitmask(self, state):
        return state

    def advance(self, state, tokens):
        return state


class NoRepeat:
    """No token twice in a row, EOS aside: a veto with a state, the token before."""

    def __init__(self, considers=None):
        if considers is not None:
            self.considers = considers
        self.shown = []

    def init(self, batch_size, beam_size, vocab_size, device):
        return torch.full((batch_size * beam_size,), -1, device=device)

    def veto(self, state, proposed):
        self.shown.append(proposed.tokens.shape[1])
        assert proposed.rows.shape == proposed.tokens.shape == proposed.log_probs.shape
        return state[proposed.rows] == proposed.tokens

    def advance(self, state, tokens):
        return tokens


class EvenLength:
    """What ends at ``max_length`` must have an even sum of tokens; EOS may follow at any time."""

    def init(self, batch_size, beam_size, vocab_size, device):
        return torch.zeros(batch_size * beam_size, dtype=torch.int64, device=device)

    def bitmask(self, state):
        return torch.full((state.shape[0], 1), -1, dtype=torch.int32, device=state.device)

    def accepts(self, state):
        return state % 2 == 0

    def advance(self, state, tokens):
        return state + tokens


def run(constraint, seed=0, batch=1, eos=EOS, **options):
    options = {"beam_size": 400, "max_length": 4, "length_penalty": 0, "stopping": fb.Exhausted(), **options}
    search = fb.BeamSearch(eos_id=eos, constraint=constraint, **options)
    return fb.decode(search, TableLM(V, seed), torch.arange(batch))


def found(hyps, request=0):
    return {
        tuple(tokens[:length]): log_prob
        for tokens, length, log_prob, valid in zip(
            hyps.tokens[request].tolist(),
            hyps.lengths[request].tolist(),
            hyps.log_probs[request].tolist(),
            hyps.valid[request].tolist(),
            strict=True,
        )
        if valid
    }


def expected(legal, seed=0, bos=BOS, mask=None, eos=(EOS,), **options):
    leaves = enumerate_leaves(TableLM(V, seed).logits, bos, eos=eos, max_length=4, mask=mask, **options)
    return {leaf.tokens: leaf.log_prob for leaf in leaves if legal(leaf.tokens, leaf.finished)}


def assert_same(got, want):
    assert got.keys() == want.keys()
    for tokens, log_prob in want.items():
        assert got[tokens] == pytest.approx(log_prob, abs=1e-5)


def no_repeat(tokens, finished=True):
    return all(a != b for a, b in pairwise(tokens))


@pytest.mark.parametrize("regime", ["pool", "in_place"])
class TestVeto:
    def test_every_sequence_that_passes_and_no_other(self, regime):
        assert_same(found(run(NoRepeat(), finished=regime)), expected(no_repeat))

    def test_eos_may_be_vetoed(self, regime):
        class NoEosAfterOne(NoRepeat):
            def veto(self, state, proposed):
                return (state[proposed.rows] == 1) & (proposed.tokens == EOS)

        legal = lambda tokens, finished: not finished or len(tokens) < 2 or tokens[-2] != 1  # noqa: E731
        assert_same(found(run(NoEosAfterOne(), finished=regime)), expected(legal))

    def test_sees_the_best_and_as_many_as_it_asks_for(self, regime):
        veto = NoRepeat(considers=7)
        run(veto, beam_size=3, finished=regime)
        assert veto.shown == [7 + 1] + [7 + 3] * 3  # and the EOS candidates of all parents

    def test_what_it_lets_pass_is_the_best(self, regime):
        search = fb.BeamSearch(3, 4, EOS, constraint=NoRepeat(), finished=regime, length_penalty=0)
        state = search.init(1)
        logits = torch.tensor([[5.0, 4.0, 3.0, 2.0, -9.0]])
        assert search.step(state, logits).tokens.tolist() == [[0, 1, 2]]
        step = search.step(state, logits.expand(3, -1))
        pairs = [(int(p), int(t)) for p, t in zip(step.parents[0], step.tokens[0], strict=True)]
        assert pairs == [(0, 1), (1, 0), (0, 2)]  # ties: the lower parent first

    def test_flags_a_request_whose_rest_was_not_shown(self, regime):
        class Everything(NoRepeat):
            def veto(self, state, proposed):
                return proposed.log_probs > proposed.log_probs.amin()

        search = fb.BeamSearch(2, 4, None, constraint=Everything(considers=3), finished=regime)
        state = search.init(1)
        step = search.step(state, torch.tensor([[3.0, 2.0, 1.0, 0.0]]))
        assert step.valid.tolist() == [[True, False]] and step.tokens[0, 0] == 2
        assert state.flags.tolist() == [fb.FLAG_INEXACT]

    def test_all_vetoed_is_a_dead_end(self, regime):
        class Everything(NoRepeat):
            def veto(self, state, proposed):
                return torch.ones_like(proposed.tokens, dtype=torch.bool)

        search = fb.BeamSearch(2, 4, EOS, constraint=Everything(), finished=regime)
        state = search.init(1)
        assert not search.step(state, torch.zeros(1, V)).valid.any()
        assert state.all_done() and state.flags.tolist() == [fb.FLAG_DEAD_END]
        assert not search.finalize(state).valid.any()


def test_veto_is_refused_by_rules_that_weigh_all():
    for rule in (fb.Stochastic(0), fb.Sample(0), fb.DynamicWidth(0.9), fb.DiverseGroups(2, 0.5)):
        search = fb.BeamSearch(2, 4, EOS, constraint=NoRepeat(), selection=rule)
        state = search.init(1)
        with pytest.raises(ValueError, match=f"constraint: expected one without a veto for fb.{type(rule).__name__}"):
            search.step(state, torch.zeros(1, V))
        assert state.requests.steps.tolist() == [0] * len(state.requests.steps)


@pytest.mark.parametrize("regime", ["pool", "in_place"])
def test_what_is_not_accepted_at_max_length_is_no_hypothesis(regime):
    legal = lambda tokens, finished: finished or sum(tokens) % 2 == 0  # noqa: E731
    assert_same(found(run(EvenLength(), finished=regime)), expected(legal))


@pytest.mark.parametrize("regime", ["pool", "in_place"])
def test_nothing_accepted_is_a_dead_end(regime):
    class Nothing(EvenLength):
        def accepts(self, state):
            return torch.zeros_like(state, dtype=torch.bool)

    search = fb.BeamSearch(2, 2, None, constraint=Nothing(), finished=regime)
    state = search.init(1)
    search.step(state, torch.zeros(1, V))
    assert not state.all_done() and state.flags.tolist() == [0]
    step = search.step(state, torch.zeros(2, V))
    assert not step.valid.any() and state.flags.tolist() == [fb.FLAG_DEAD_END]
    assert not search.finalize(state).valid.any()


@pytest.mark.parametrize("rule", [fb.Sample(3), fb.Stochastic(3), fb.DiverseGroups(2, 0.1), fb.DynamicWidth(1.0)])
def test_acceptance_under_every_rule(rule):
    stopping = fb.Exhausted() if rule.seed is None else fb.FirstFinished()
    check_even(run(EvenLength(), beam_size=8, batch=3, selection=rule, stopping=stopping))


def check_even(hyps):
    for request in range(hyps.tokens.shape[0]):
        for tokens in found(hyps, request):
            assert tokens[-1] == EOS or sum(tokens) % 2 == 0
    assert hyps.valid.any()


class TestPerRequest:
    @pytest.mark.parametrize("regime", ["pool", "in_place"])
    def test_each_request_has_its_own(self, regime):
        constraints = [Ban(1), None, NoRepeat(), EvenLength(), fb.AllOf(Ban(2), NoRepeat())]
        together = run(constraints, batch=5, finished=regime)
        legal = [
            lambda tokens, finished: 1 not in tokens,
            lambda tokens, finished: True,
            no_repeat,
            lambda tokens, finished: finished or sum(tokens) % 2 == 0,
            lambda tokens, finished: 2 not in tokens and no_repeat(tokens),
        ]
        for request, rule in enumerate(legal):
            assert_same(found(together, request), expected(rule, bos=request))

    def test_one_object_in_several_requests_is_asked_once(self):
        veto = NoRepeat()
        run([veto, Ban(1), veto], batch=3, beam_size=2)
        assert len(veto.shown) == 4

    def test_bitwise_as_alone(self):
        constraints = [Ban(1), None, EvenLength()]
        together = run(constraints, batch=3, beam_size=4)
        for request, constraint in enumerate(constraints):
            search = fb.BeamSearch(4, 4, EOS, constraint=constraint, length_penalty=0, stopping=fb.Exhausted())
            alone = fb.decode(search, TableLM(V, 0), torch.tensor([request]))
            assert torch.equal(alone.tokens[0], together.tokens[request])
            assert torch.equal(alone.scores[0], together.scores[request])

    def test_length_must_be_the_batch_size(self):
        search = fb.BeamSearch(2, 4, EOS, constraint=[None, Ban(1)])
        with pytest.raises(ValueError, match="constraint: expected one value per request, 3, got 2"):
            search.init(3)
        with pytest.raises(ValueError, match="constraint: expected as many values as beam_size, 3, got 2"):
            fb.BeamSearch([2, 2, 2], 4, EOS, constraint=[None, Ban(1)])


class TestAllOf:
    def test_all_of_nothing_allows_everything(self):
        for nothing in (fb.AllOf(), fb.AllOf(fb.AllOf())):
            assert_same(found(run(nothing)), expected(lambda tokens, finished: True))

    def test_nested(self):
        both = fb.AllOf(fb.AllOf(Ban(1)), fb.AllOf(NoRepeat(), Ban(2)))
        legal = lambda tokens, finished: not {1, 2} & set(tokens) and no_repeat(tokens)  # noqa: E731
        assert_same(found(run(both)), expected(legal))

    def test_normalize_allowed(self):
        mask = lambda prefix: np.array([True, False, False, True, True])  # noqa: E731
        want = expected(lambda tokens, finished: True, mask=mask, normalize="allowed")
        assert_same(found(run(fb.AllOf(Ban(1), Ban(2)), normalize="allowed")), want)

    def test_first_step_with_rows_of_all_slots(self):
        search = fb.BeamSearch(3, 4, EOS, constraint=fb.AllOf(Ban(1), NoRepeat()))
        row = torch.randn(2, 1, V)
        one, all_slots = search.init(2), search.init(2)
        a, b = search.step(one, row[:, 0]), search.step(all_slots, row.expand(2, 3, V).contiguous())
        assert torch.equal(a.tokens, b.tokens) and torch.equal(a.valid, b.valid)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (3, "constraint: expected a constraint, got 3"),
        ("tokens", "constraint: expected a constraint, got 'tokens'"),
        (Ban, "constraint: expected a constraint, got <class"),
        ([None, 3], r"constraint\[1\]: expected a constraint, got 3"),
    ],
)
def test_rejects_what_is_no_constraint(given, message):
    with pytest.raises(TypeError, match=message):
        fb.BeamSearch(2, 4, EOS, constraint=given)


def test_all_of_rejects_what_is_no_constraint():
    with pytest.raises(TypeError, match=r"constraints\[1\]: expected a constraint, got 5"):
        fb.AllOf(Ban(1), 5)
    with pytest.raises(TypeError, match=r"constraints\[0\]: expected a constraint, got None"):
        fb.AllOf(None)


def test_a_clone_goes_its_own_way():
    search = fb.BeamSearch(2, 4, EOS, constraint=fb.AllOf(NoRepeat(), EvenLength()))
    state = search.init(1)
    search.step(state, torch.randn(1, V))
    copy = state.clone()
    logits = [torch.randn(2, V) for _ in range(3)]
    results = []
    for each in (state, copy):
        for row in logits:
            search.step(each, row)
        results.append(search.finalize(each))
    assert torch.equal(results[0].tokens, results[1].tokens) and torch.equal(results[0].scores, results[1].scores)


class TestWhereTheStateIs:
    def test_it_stays_in_its_memory(self):
        # a captured graph reads and writes the same tensors at every replay
        search = fb.BeamSearch(2, 6, EOS, constraint=fb.AllOf(NoRepeat(), EvenLength()))
        state = search.init(1)
        search.step(state, torch.randn(1, V))
        memory = [leaf.data_ptr() for leaf in state.constraint_state]
        for _ in range(3):
            search.step(state, torch.randn(2, V))
        assert [leaf.data_ptr() for leaf in state.constraint_state] == memory

    def test_it_may_grow(self):
        class History(Ban):
            def init(self, batch_size, beam_size, vocab_size, device):
                self.words = super().init(batch_size, beam_size, vocab_size, device)
                return torch.zeros(batch_size * beam_size, 0, dtype=torch.int64, device=device)

            def bitmask(self, said):
                return self.words[: said.shape[0]]

            def advance(self, said, tokens):
                return torch.cat([said, tokens[:, None]], 1)

        search = fb.BeamSearch(2, 4, None, constraint=History(1))
        state = search.init(1)
        for rows in (1, 2, 2):
            search.step(state, torch.randn(rows, V))
        best = search.finalize(state)
        slots = [row.tolist() for row in state.constraint_state]
        assert sorted(slots) == sorted(tokens[:3] for tokens in best.tokens[0].tolist())

    def test_inside_and_outside_inference_mode(self):
        search = fb.BeamSearch(2, 6, EOS, constraint=fb.AllOf(NoRepeat(), EvenLength()))
        state = search.init(1)
        with torch.inference_mode():
            search.step(state, torch.randn(1, V))
        search.step(state, torch.randn(2, V))
        with torch.inference_mode():
            search.step(state, torch.randn(2, V))
        assert state.requests.steps.tolist() == [3]


def test_a_group_that_strands_is_no_dead_end_of_its_request():
    ban = fb.ForbiddenPhrases([[1, 0], [1, 1], [1, 2]])
    search = fb.BeamSearch(2, 2, None, constraint=ban, selection=fb.DiverseGroups(2, 5.0))
    state = search.init(1)
    search.step(state, torch.tensor([[2.0, 1.0, -9.0]]))  # one group takes 0, the other 1, which leads nowhere
    search.step(state, torch.zeros(2, 3))
    assert state.flags.tolist() == [0]
    assert search.finalize(state).valid.tolist() == [[True, False]]


class TestWhoIsDone:
    @pytest.mark.parametrize("regime", ["pool", "in_place"])
    def test_is_not_judged_again(self, regime):
        # the first request is over long before the second, and its state goes on with padding
        class EndsInOne(EvenLength):
            def accepts(self, state):
                return state == 1

            def advance(self, state, tokens):
                return tokens

        options = {"finished": regime, "length_penalty": 0, "stopping": fb.Exhausted()}
        together = fb.BeamSearch(4, [2, 5], None, constraint=[EndsInOne(), None], **options)
        alone = fb.BeamSearch(4, 2, None, constraint=EndsInOne(), **options)
        model = TableLM(V, 0)
        a, b = fb.decode(together, model, torch.tensor([0, 1])), fb.decode(alone, model, torch.tensor([0]))
        assert b.valid.any() and torch.equal(a.valid[0], b.valid[0])
        assert torch.equal(a.tokens[0, :, :2], b.tokens[0]) and torch.equal(a.scores[0], b.scores[0])

    @pytest.mark.parametrize("rows", [1, 3])
    def test_what_is_rejected_emits_padding_and_its_own_row(self, rows):
        class Nothing(EvenLength):
            def accepts(self, state):
                return torch.zeros_like(state, dtype=torch.bool)

        search = fb.BeamSearch(3, 1, None, constraint=Nothing(), pad_id=2)
        state = search.init(2)
        step = search.step(state, torch.randn(2 * rows, V))
        own = torch.arange(3).clamp(max=rows - 1)
        assert step.tokens.eq(2).all() and not step.valid.any()
        assert step.parents.tolist() == [[0, 1, 2]] * 2
        assert step.source_rows.tolist() == [*own.tolist(), *(own + rows).tolist()]


class TestWhatGoesWrong:
    @pytest.mark.parametrize("steps", [0, 1])
    def test_a_state_whose_constraint_failed_is_refused(self, steps):
        class Fails(EvenLength):
            left = steps

            def advance(self, state, tokens):
                if self.left == 0:
                    raise ArithmeticError
                self.left -= 1
                return state + tokens

        search = fb.BeamSearch(2, 4, EOS, constraint=Fails())
        state = search.init(1)
        for _ in range(steps):
            search.step(state, torch.randn(1 if steps == 0 else 2, V)[:1])
        with pytest.raises(ArithmeticError):
            search.step(state, torch.randn(1 if steps == 0 else 2, V))
        with pytest.raises(ValueError, match="state: expected one whose steps have succeeded, got one in which"):
            search.step(state, torch.randn(2, V))

    @pytest.mark.parametrize(
        ("vetoed", "error", "message"),
        [
            (
                lambda p: torch.zeros(1, 1, dtype=torch.bool),
                ValueError,
                r"constraint's veto: expected shape \[1, 65\], got",
            ),
            (lambda p: torch.zeros_like(p.tokens), TypeError, "constraint's veto: expected bool, got int64"),
            (lambda p: None, TypeError, "constraint's veto: expected a tensor, got NoneType"),
        ],
    )
    def test_what_a_veto_returns_is_checked(self, vetoed, error, message):
        class Wrong(NoRepeat):
            def veto(self, state, proposed):
                return vetoed(proposed)

        search = fb.BeamSearch(2, 4, EOS, constraint=Wrong())
        state = search.init(1)
        with pytest.raises(error, match=message):
            search.step(state, torch.zeros(1, V))
        assert state.vocab_size is None and state.requests.steps.tolist() == [0]

    def test_what_accepts_returns_is_checked_before_anything_changes(self):
        class Wrong(EvenLength):
            def accepts(self, state):
                return state

        search = fb.BeamSearch(2, 4, EOS, constraint=Wrong())
        state = search.init(1)
        with pytest.raises(TypeError, match="constraint's accepts: expected bool, got int64"):
            search.step(state, torch.zeros(1, V))
        assert state.vocab_size is None and state.requests.steps.tolist() == [0]

    def test_a_veto_that_does_not_say_how_many_it_considers(self):
        class Says(NoRepeat):
            considers = None
            bitmask = None

        assert_same(found(run(Says())), expected(no_repeat))


def test_a_constraint_is_asked_about_its_own_requests_only():
    class Counts(NoRepeat):
        def init(self, batch_size, beam_size, vocab_size, device):
            self.rows = [batch_size * beam_size]
            return super().init(batch_size, beam_size, vocab_size, device)

        def veto(self, state, proposed):
            assert proposed.rows.amax() < len(state) and proposed.rows.shape[0] == 1
            return super().veto(state, proposed)

        def advance(self, state, tokens):
            self.rows.append(len(tokens))
            assert len(state) == len(tokens)
            return tokens

    own = [Counts() for _ in range(4)]
    together = run(own, batch=4, beam_size=3)
    assert all(each.rows == [3] * 5 for each in own)
    for request in range(4):
        search = fb.BeamSearch(3, 4, EOS, constraint=NoRepeat(), length_penalty=0, stopping=fb.Exhausted())
        alone = fb.decode(search, TableLM(V, 0), torch.tensor([request]))
        assert torch.equal(together.tokens[request], alone.tokens[0])
