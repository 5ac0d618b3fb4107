"""When requests end, what is provably the best then, budgets, and limits that the source sets."""

import json
from itertools import pairwise, product
from pathlib import Path

import pytest
import torch

import flashbeam as fb
from flashbeam import budget as budget_module

V, EOS, T, K, B = 7, 0, 12, 4, 300
INF = float("inf")
RULES = [fb.FirstFinished(), fb.Patience(0.5), fb.Patience(2.0, "step"), fb.Filled(), fb.BestLive(), fb.Exact()]
NORMS = [-0.7, 0.0, 0.6, 1.0, 2.0, fb.GNMT(0.8)]


class HashLM:
    """Logits looked up by a hash of the prefix, for all rows at once; counts the rows it is run on after the first."""

    def __init__(self, seed, eos_bias=0.0):
        self.table = torch.randn(4099, V, generator=torch.Generator().manual_seed(seed)) * 1.5
        self.table[:, EOS] += eos_bias
        self.rows = 0

    def __call__(self, tokens, cache):
        hashes = tokens * 7919 + 1 if cache is None else (cache * 31 + tokens + 1) % 1000003
        self.rows += 0 if cache is None else len(tokens)
        return self.table[hashes % 4099], hashes


def run(rule, norm, seed, *, bias=0.0, batch=B, num_hypotheses=None, **options):
    search = fb.BeamSearch(K, T, EOS, pad_id=EOS, length_penalty=norm, stopping=rule, **options)
    state = search.init(batch)
    tokens, cache, model = torch.arange(batch), None, HashLM(seed, bias)
    while not state.all_done():
        logits, cache = model(tokens, cache)
        step = search.step(state, logits)
        tokens, cache = step.tokens.flatten(), cache[step.source_rows]
    return search.finalize(state, num_hypotheses), state


def same(one, other):
    """bool [B]: the same n-best."""
    alike = (one.tokens == other.tokens).all(2) & (one.scores == other.scores)
    return alike.all(1)


@pytest.mark.parametrize("norm", NORMS, ids=str)
def test_exact_is_exhaustion_in_fewer_steps(norm):
    whole, long = run(fb.Exhausted(), norm, 1)
    found, short = run(fb.Exact(), norm, 1)
    assert same(found, whole).all() and found.exact.all() and whole.exact.all()
    assert (short.requests.steps <= long.requests.steps).all()
    # far from it where a long hypothesis may still win
    assert norm == 2.0 or short.requests.steps.sum() < long.requests.steps.sum()


@pytest.mark.parametrize("norm", NORMS, ids=str)
@pytest.mark.parametrize("rule", RULES[:-1], ids=str)
def test_exact_tells_the_truth(rule, norm):
    """Where an early stop says that it changed nothing, it did not; and it does not say so of everything."""
    whole, _ = run(fb.Exhausted(), norm, 2)
    found, _ = run(rule, norm, 2)
    assert same(found, whole)[found.exact].all()
    assert found.exact.any() and (not found.exact.all() or same(found, whole).all())


def test_exact_is_of_the_hypotheses_asked_for():
    """The best one is known before the K-th is; more than K are only known at the end."""
    shares = [run(fb.FirstFinished(), 0.0, 3, num_hypotheses=n)[0].exact.float().mean() for n in (1, 2, K, K + 1)]
    assert shares[0] > shares[1] > shares[2] > shares[3]
    best, whole = (run(rule, 0.0, 3, num_hypotheses=1)[0] for rule in (fb.FirstFinished(), fb.Exhausted()))
    assert same(best, whole)[best.exact].all()


@pytest.mark.parametrize("rule", [*RULES, fb.Exhausted()], ids=str)
def test_more_than_the_beam_are_exact_only_if_nothing_stopped(rule):
    """A pool in order of arrival holds others than the best K by score and what lives on."""
    whole, found = (run(each, 0.0, 2, num_hypotheses=2 * K)[0] for each in (fb.Exhausted(), rule))
    assert same(found, whole)[found.exact].all()
    assert found.exact.any() == (not rule.rule.by_arrival)


def test_a_search_under_way_is_exact_only_where_nothing_can_follow():
    search = fb.BeamSearch(2, 5, EOS, length_penalty=0.0, stopping=fb.Exhausted())
    state = search.init(2)
    assert not search.finalize(state).exact.any()
    logits = torch.full((2, V), -INF)
    logits[0, [EOS, 1]] = 0.0
    logits[1, EOS] = 0.0  # nothing else may follow
    search.step(state, logits)
    assert search.finalize(state).exact.tolist() == [False, True]
    logits = torch.full((4, V), -INF)
    logits[:, [EOS, 1]] = torch.tensor([3.0, -9.0])
    search.step(state, logits)  # two finished, and what lives is behind them for good
    assert search.finalize(state).exact.tolist() == [True, True] and not state.all_done()


def test_what_a_quota_left_out_counts_as_possible():
    """The last step finishes two and there is place for one; the other is better than what finished first."""
    search = fb.BeamSearch(2, 2, [0, 1], pad_id=2, stopping=fb.Patience(1.0, "never"))
    state = search.init(1)
    search.step(state, torch.tensor([[0.06, 0.0, 0.02, 0.92]]).log())
    search.step(state, torch.tensor([[0.0, 0.0, 0.0, 1.0], [0.6, 0.4, 0.0, 0.0]]).log()[[1, 0]])
    hyps = search.finalize(state)
    assert state.done.all() and hyps.tokens[0, :, :2].tolist() == [[3, 0], [0, 2]]
    left_out = torch.tensor(0.92 * 0.4).log() / 2
    assert hyps.scores[0, 1] < left_out and state.bound[0] == pytest.approx(left_out.item()) and not hyps.exact.any()


def test_groups_are_exact_only_as_a_whole():
    """A group that stops early no longer penalises those behind it."""
    whole, _ = run(fb.Exhausted(), 0.0, 4, selection=fb.DiverseGroups(2, 0.5))
    early, _ = run(fb.FirstFinished(), 0.0, 4, selection=fb.DiverseGroups(2, 0.5))
    assert whole.exact.all() and not early.exact.all() and same(early, whole)[early.exact].all()


@pytest.mark.parametrize("selection", [fb.TopK(), fb.Stochastic(1)], ids=repr)
def test_in_place_all_that_ended_is_exact(selection):
    """Every slot ends, or reaches max_length; a search cut short has not."""
    search = fb.BeamSearch(K, T, EOS, length_penalty=0.0, finished="in_place", selection=selection)
    state, model = search.init(B), HashLM(5, 1.0)
    logits, cache = model(torch.arange(B), None)
    step = search.step(state, logits)
    assert not search.finalize(state).exact.any()
    while not state.all_done():
        logits, cache = model(step.tokens.flatten(), cache[step.source_rows])
        step = search.step(state, logits)
    assert search.finalize(state).exact.all()


def test_the_best_candidate_may_end_below_a_full_pool():
    """It finishes, and is worse than what finished before: the quota is met and the best has finished."""
    search = fb.BeamSearch(2, 9, [0, 1], length_penalty=0.0, pad_id=2, stopping=fb.BestFinished(2))
    state = search.init(1)
    # two finish behind the best candidate, which lives on, becomes unlikely, and ends below them
    search.step(state, torch.tensor([[0.0, 0.3, 0.2, 0.5]]).log())
    search.step(state, torch.tensor([[0.45, 0.0, 0.05, 0.5], [0.0, 0.0, 0.5, 0.5]]).log())
    assert state.pool.log_probs[0].exp().tolist() == pytest.approx([0.3, 0.225]) and not state.done[0]
    search.step(state, torch.tensor([[0.5, 0.0, 0.25, 0.25], [0.0, 0.0, 0.5, 0.5]]).log())
    assert state.pool.log_probs[0].exp().tolist() == pytest.approx([0.3, 0.225]) and state.done[0]


def shrinking_by_hand(request, seed, bias, norm):
    """Python lists: (score, tokens) of what finished, best first; a beam less for each."""
    model = HashLM(seed, bias)
    live, pool = [(0.0, (), None)], []
    for t in range(1, T + 1):
        candidates = []
        for parent, (log_prob, tokens, cache) in enumerate(live):
            last = request if cache is None else tokens[-1]
            logits, now = model(torch.tensor([last]), cache)
            row = torch.log_softmax(logits[0].double(), 0).tolist()
            candidates += [(-(log_prob + row[v]), parent, v, (*tokens, v), now) for v in range(V)]
        best = sorted(candidates, key=lambda c: c[:3])[: K - len(pool)]
        pool += [(-score / t**norm, tokens) for score, _, v, tokens, _ in best if v == EOS]
        live = [(-score, tokens, cache) for score, _, v, tokens, cache in best if v != EOS]
        if not live:
            break
    pool += [(log_prob / t**norm, tokens) for log_prob, tokens, _ in live]
    return sorted(pool, key=lambda item: -item[0])


@pytest.mark.parametrize("norm", [0.0, 1.0])
def test_shrinking_beam(norm):
    found, _ = run(fb.Shrinking(), norm, 6, bias=0.5, batch=25)
    assert found.exact.all()
    for b in range(25):
        wanted = shrinking_by_hand(b, 6, 0.5, norm)
        assert [tuple(t[:n].tolist()) for t, n in zip(found.tokens[b], found.lengths[b], strict=True)] == [
            tokens for _, tokens in wanted
        ]
        assert found.scores[b].tolist() == pytest.approx([score for score, _ in wanted], abs=1e-5)


@pytest.mark.parametrize("selection", [fb.TopK(), fb.DiverseSiblings(0.0)], ids=repr)
@pytest.mark.parametrize(
    ("constraint", "contents"),
    [
        (fb.Phrases([[1, 2], [3]]), [c for c in product(range(1, 5), repeat=3) if (1, 2) in pairwise(c) and 3 in c]),
        (fb.Trie([[1, 2, 3], [2], [3, 3, 4, 1]]), [(1, 2, 3), (2,)]),
        (fb.Copy([1, 2, 3, 4], min_span=2), [(), (1, 2), (2, 3), (3, 4), (1, 2, 3), (2, 3, 4)]),
    ],
    ids=["phrases", "trie", "copy"],
)
def test_constraints_look_ahead_to_a_forced_end(constraint, contents, selection):
    """The last token can only be EOS: what it takes is complete a token earlier, and no beam strands."""
    search = fb.BeamSearch(
        60, 4, EOS, constraint=constraint, selection=selection, dialect=fb.Dialect(at_max_length="end"),
        stopping=fb.Exhausted(),
    )  # fmt: skip
    found = fb.decode(search, HashLM(3), torch.tensor([1]))
    tokens = [tuple(t[: n - 1].tolist()) for t, n in zip(found.tokens[0], found.lengths[0], strict=True)]
    held = found.valid[0].tolist()
    assert found.finished[0].tolist() == held
    assert sorted(t for t, valid in zip(tokens, held, strict=True) if valid) == sorted(contents)
    narrow = fb.BeamSearch(1, 4, EOS, constraint=constraint, selection=selection, dialect=search.dialect)
    assert fb.decode(narrow, HashLM(3), torch.tensor([1])).valid.all()


class TestBudget:
    @pytest.mark.parametrize("tokens", [1, 7, 23])
    def test_tokens(self, tokens):
        """No more rows are run than it allows, and what is returned is the search at that point."""
        search = fb.BeamSearch(K, T, EOS, pad_id=EOS, stopping=fb.Exhausted(), budget=fb.Budget(tokens))
        plain = fb.BeamSearch(K, T, EOS, pad_id=EOS, stopping=fb.Exhausted())
        state, other = search.init(1), plain.init(1)
        model, token, cache = HashLM(7, -9.0), torch.tensor([3]), None
        while not state.all_done():
            logits, cache = model(token, cache)
            step = search.step(state, logits)
            assert torch.equal(step.tokens, plain.step(other, logits).tokens)
            token, cache = step.tokens.flatten(), cache[step.source_rows]
        assert model.rows == tokens // K * K and not other.all_done()
        found, early = search.finalize(state), plain.finalize(other)
        assert torch.equal(found.tokens, early.tokens) and torch.equal(found.scores, early.scores)
        assert found.valid.all() and not found.exact.any()

    def test_tokens_of_each_request_and_of_all_groups(self):
        budget = fb.Budget(tokens=[8, 1000])
        groups = fb.DiverseGroups(2, 0.5)
        found, state = run(fb.Exhausted(), 0.0, 8, bias=-9.0, batch=2, selection=groups, budget=budget)
        assert state.requests.steps.tolist() == [3, 3, T, T] and found.exact.tolist() == [False, True]

    def test_enough_changes_nothing(self):
        found, _ = run(fb.Exact(), 1.0, 9, budget=fb.Budget(tokens=K * T, seconds=1000))
        plain, _ = run(fb.Exact(), 1.0, 9)
        assert same(found, plain).all() and found.exact.all()

    def test_seconds(self, monkeypatch):
        now = [100.0]
        monkeypatch.setattr(budget_module.time, "monotonic", lambda: now[0])
        search = fb.BeamSearch(K, T, EOS, pad_id=EOS, budget=fb.Budget(seconds=2))
        state = search.init(1)
        search.step(state, HashLM(10, -9.0)(torch.tensor([1]), None)[0])
        now[0] = 101.9
        assert not state.all_done() and not state.clone().all_done()
        now[0] = 102.0
        assert state.all_done() and not state.done.any()
        assert search.finalize(state).valid.all() and not search.finalize(state).exact.any()

    @pytest.mark.parametrize(
        ("arguments", "error"),
        [
            ({}, "tokens: expected a number of tokens or of seconds, got neither"),
            ({"tokens": 0}, "tokens: expected an int >= 1, got 0"),
            ({"seconds": -1}, "seconds: expected a number above 0, got -1"),
        ],
    )
    def test_errors(self, arguments, error):
        with pytest.raises(ValueError, match=error):
            fb.Budget(**arguments)

    def test_length_is_the_batch(self):
        with pytest.raises(ValueError, match="tokens: expected one value per request, 3, got 2"):
            fb.BeamSearch(budget=fb.Budget([1, 2])).init(3)


class TestLimitsOfTheSource:
    def test_per_request(self):
        search = fb.BeamSearch(
            2,
            lambda n: n + 2,
            EOS,
            pad_id=EOS,
            min_length=lambda n: n // 2,
            stopping=fb.Exhausted(),
            length_penalty=0.0,
        )
        state = search.init(3, source_lengths=[1, 4, 8])
        plain = fb.BeamSearch(2, [3, 6, 10], EOS, pad_id=EOS, min_length=[0, 2, 4], stopping=fb.Exhausted())
        other = plain.init(3)
        for field, wanted in zip(state.limits[:4], other.limits[:4], strict=True):
            assert torch.equal(field, wanted)
        found = fb.decode(search, HashLM(1, 2.0), torch.arange(3), source_lengths=[1, 4, 8])
        assert found.tokens.shape[2] == 10 and (found.lengths >= torch.tensor([[1], [2], [4]])).all()
        assert (found.lengths <= torch.tensor([[3], [6], [10]])).all()

    def test_errors(self):
        search = fb.BeamSearch(2, lambda n: 2 * n, EOS, min_length=3)
        with pytest.raises(
            ValueError, match=r"source_lengths: expected one length per request, .*max_length.* got None"
        ):
            search.init(2)
        with pytest.raises(ValueError, match="source_lengths: expected one value per request, 2, got 3"):
            search.init(2, source_lengths=[1, 2, 3])
        with pytest.raises(ValueError, match=r"max_length\(0\): expected an int >= 1, got 0"):
            search.init(2, source_lengths=[0, 5])
        with pytest.raises(ValueError, match="min_length: expected at most max_length, 2, got 3"):
            search.init(2, source_lengths=[1, 5])
        with pytest.raises(TypeError, match="max_length: expected an int >= 1 or a function of the source's length"):
            fb.BeamSearch(2, "long")


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"stopping": fb.Shrinking(), "finished": "in_place"}, "stopping: expected a rule that lets every slot end"),
        ({"stopping": fb.BestLive(), "finished": "in_place"}, "stopping: expected a rule that lets every slot end"),
        ({"dialect": fb.Dialect("row"), "finished": "in_place"}, "dialect: expected the default"),
        ({"dialect": fb.Dialect("row"), "selection": fb.DiverseSiblings(1)}, "dialect: expected finishes='beam'"),
        ({"dialect": fb.Dialect(at_max_length="end"), "eos_id": None}, "eos_id: expected a token to end with"),
        ({"dialect": fb.Dialect(counts_eos=False)}, "length_penalty: expected a norm .* for length 0, .* got 0 of"),
        ({"dialect": fb.Dialect(counts_eos=False), "length_penalty": -1.0}, "length_penalty: .* length 0, .* got inf"),
    ],
)
def test_what_does_not_go_together(options, error):
    with pytest.raises(ValueError, match=error):
        fb.BeamSearch(2, 5, **{"eos_id": EOS, **options})


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: fb.Dialect("all"), "finishes: expected one of"),
        (lambda: fb.Dialect(at_max_length="stop"), "at_max_length: expected one of"),
        (lambda: fb.Patience(1.0, "all"), "overflow: expected one of"),
        (lambda: fb.BestFinished(0), "count: expected an int >= 1"),
    ],
)
def test_unknown_choices(make, error):
    with pytest.raises(ValueError, match=error):
        make()


def test_the_page_says_what_the_study_found():
    """docs/stopping.md has the rows that docs/examples/stopping.py makes of its JSON, and Exact never differs."""
    root = Path(__file__).parents[1] / "docs"
    results = json.loads((root / "examples" / "stopping.json").read_text())
    page = (root / "stopping.md").read_text()
    for records in results.values():
        for record in records:
            shares = " | ".join(f"{100 * record[name]:.1f} %" for name in ("same_best", "same_n_best", "told_exact"))
            row = f"| {record['length_penalty']} | `{record['rule']}` | {record['steps']:.1f} | {shares} |"
            assert row in page
            assert record["rule"] != "Exact" or record["same_n_best"] == record["told_exact"] == 1.0
