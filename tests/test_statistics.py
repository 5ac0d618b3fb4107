"""Statistics of steps: against a search that records everything, the same in any batch, and nothing when off."""

import pytest
import torch

import flashbeam as fb
from flashbeam.kernels import summarize
from oracles import TableLM
from recorder import record
from test_launches import LOGITS, STREAM, recorded

EOS = (2,)
FIELDS = ("entropy", "expanded", "width", "margin", "finished", "endings")


def run(search, model, bos=(5, 7, 9), steps=None):
    """The state behind a search of a table model, and its hypotheses."""
    state = search.init(len(bos))
    tokens, cache, made = torch.tensor(bos), None, 0
    while not state.all_done() and made != steps:
        logits, cache = model(tokens, cache)
        step = search.step(state, logits)
        tokens, cache = step.tokens.flatten(), fb.reorder(cache, step.source_rows)
        made += 1
    return state, search.finalize(state)


class Some:
    """A constraint of one's own: after ``k`` only tokens that are not ``k`` and not above ``k + reach``."""

    def __init__(self, reach=4):
        self.reach = reach

    def allowed(self, last, vocab):
        token = torch.arange(vocab)
        return (token != last) & (token <= last + self.reach) if last >= 0 else torch.ones(vocab, dtype=torch.bool)

    def init(self, batch_size, beam_size, vocab_size, device):
        self.table = torch.stack([self.allowed(last, vocab_size) for last in range(-1, vocab_size)])
        return torch.full((batch_size * beam_size,), -1)

    def bitmask(self, state):
        from flashbeam.kernels import pack_bitmask

        return pack_bitmask(self.table[state + 1])

    def advance(self, state, tokens):
        return tokens


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize(("stopping", "patience"), [(fb.Exhausted(), None), (fb.FirstFinished(), 1.0)])
@pytest.mark.parametrize("normalize", ["vocab", "allowed"])
def test_equal_those_of_a_search_that_records_everything(in_place, stopping, patience, normalize):
    finished, margins = 0, 0
    for seed in range(6):
        K, T, V = (1, 2, 4)[seed % 3], 6, 12
        model = TableLM(V, seed, eos=EOS, eos_bias=1.5)
        search = fb.BeamSearch(
            K,
            T,
            EOS[0],
            stopping=stopping,
            finished="in_place" if in_place else "pool",
            constraint=Some() if seed % 2 else None,
            normalize=normalize,
            statistics=True,
        )
        state, hyps = run(search, model)
        for b, bos in enumerate((5, 7, 9)):
            allowed = None if not seed % 2 else lambda tokens: Some().allowed(tokens[-1] if tokens else -1, 12).numpy()
            want = record(
                model.logits,
                bos,
                beam_size=K,
                max_length=T,
                eos=EOS,
                patience=None if in_place else patience,
                in_place=in_place,
                allowed=allowed,
                normalize=normalize,
            )
            if want.closest < 1e-5:
                continue
            got = hyps.statistics
            assert int(state.requests.steps[b]) == len(want.steps)
            for t, step in enumerate(want.steps):
                expanded = got.expanded[b, t]
                assert got.entropy[b, t][expanded].tolist() == pytest.approx(step.entropies, abs=1e-5)
                assert (got.entropy[b, t][~expanded] == 0).all()
                assert got.margin[b, t].item() == pytest.approx(step.margin, abs=1e-5)
                assert (int(got.width[b, t]), int(got.finished[b, t])) == (step.width, step.finished)
                assert int((got.endings[b, t] > -torch.inf).sum()) == step.finished
                finished, margins = finished + step.finished, margins + (step.margin < torch.inf)
    assert finished > 10 and margins > 30


SEARCHES = {
    "topk": {},
    "in place": {"finished": "in_place"},
    "groups": {"selection": fb.DiverseGroups(2, 0.05), "beam_size": 4},
    "siblings": {"selection": fb.DiverseSiblings(0.3)},
    "stochastic": {"selection": fb.Stochastic(3)},
    "sample": {"selection": fb.Sample(3, top_k=6)},
    "poisson": {"selection": fb.ConditionalPoisson(3)},
    "arithmetic": {"selection": fb.Arithmetic(3)},
    "width": {"selection": fb.DynamicWidth(0.4)},
    "trie": {"constraint": fb.Trie([[1, 3], [3, 4, 5], [6, 7, 8], [1, 9]]), "normalize": "allowed", "eos_id": 2},
    "phrases": {"constraint": fb.Phrases([[3, 4], [6]])},
    "exact, per request": {"stopping": fb.Exact(), "beam_size": [2, 4, 3], "temperature": [1.0, 0.7, 1.5]},
    "shrinking": {"stopping": fb.Shrinking(), "eos_id": [2, 4, 1]},
    "row": {"dialect": fb.Dialect(finishes="row"), "eos_id": [2, 4]},
    "terms": {"terms": (fb.TokenReward(0.3),)},
}


def search_of(name, statistics):
    settings = {"beam_size": 3, "max_length": 6, "eos_id": [2], **SEARCHES[name]}
    return fb.BeamSearch(**settings, statistics=statistics)


@pytest.mark.parametrize("name", SEARCHES)
def test_change_no_bit_of_the_results(name):
    model = TableLM(12, 1, eos=EOS, eos_bias=1.0)
    (off, plain), (on, hyps) = (run(search_of(name, statistics), model) for statistics in (False, True))
    assert off.statistics is None and plain.statistics is None
    for field, value in vars(plain).items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, getattr(hyps, field)), field
    for part in ("slots", "requests", "history", "pool", "draws"):
        for a, b in zip(getattr(off, part), getattr(on, part), strict=True):
            assert torch.equal(a, b), part
    found, (B, T, K) = hyps.statistics, (3, 6, off.beam_size)
    shapes = {"entropy": (B, T, K), "expanded": (B, T, K), "endings": (B, T, K, len(on.eos))}
    for field in FIELDS:
        assert getattr(found, field).shape == shapes.get(field, (B, T)), field
    assert (found.margin[found.margin == found.margin] >= 0).all()
    made = (torch.arange(T) < on.requests.steps.view(B, -1).amax(1)[:, None])[:, :, None].expand(B, T, K)
    assert (found.entropy[~made] == 0).all() and not found.expanded[~made].any()
    assert (found.width[~made[:, :, 0]] == 0).all() and (found.finished[~made[:, :, 0]] == 0).all()
    assert found.expanded[:, 0].sum() == 3 * on.groups and (found.expanded.any(2) == made[:, :, 0]).all()
    by_score = name not in ("stochastic", "sample", "poisson", "arithmetic", "width", "phrases")
    assert torch.equal(found.margin.isnan(), ~made[:, :, 0] if by_score else torch.ones(B, T, dtype=torch.bool))
    if name == "shrinking":  # what has finished takes no beam any more
        assert (found.width + found.finished.cumsum(1) <= K).all() and (found.finished.sum(1) == K).any()


@pytest.mark.parametrize("name", SEARCHES)
def test_are_bitwise_the_same_alone_and_in_a_batch(name):
    if "per request" in name:
        pytest.skip("its settings are of this batch")
    model = TableLM(12, 4, eos=EOS, eos_bias=1.0)
    _, together = run(search_of(name, True), model)
    for b, bos in enumerate((5, 7, 9)):
        search = search_of(name, True)
        state = search.init(1, request_ids=[b])
        tokens, cache = torch.tensor([bos]), None
        while not state.all_done():
            logits, cache = model(tokens, cache)
            step = search.step(state, logits)
            tokens, cache = step.tokens.flatten(), fb.reorder(cache, step.source_rows)
        for field in FIELDS:
            alone, whole = getattr(state.statistics, field)[0], getattr(together.statistics, field)[b]
            assert torch.equal(alone.nan_to_num(nan=-1.0), whole.nan_to_num(nan=-1.0)), field


def test_off_they_cost_no_operation_and_on_they_never_ask_for_a_value():
    off = recorded(fb.BeamSearch(3, 9, 2), 2, LOGITS)
    assert off == [*STREAM, "flashbeam::advance_pool_"]
    for settings in ({}, {"finished": "in_place"}, {"selection": fb.Sample(1)}):
        names = recorded(fb.BeamSearch(3, 9, 2, statistics=True, **settings), 2, LOGITS)
        assert "flashbeam::row_entropy" in names
        assert not {"aten::item", "aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero"} & set(names)


@pytest.mark.parametrize("regime", ["pool", "in_place"])
def test_every_eos_that_finished_is_recorded(regime):
    model = TableLM(12, 0, eos=(2, 4), eos_bias=1.0)
    search = fb.BeamSearch(4, 6, [2, 4], stopping=fb.Exhausted(), finished=regime, statistics=True)
    _, hyps = run(search, model)
    found = hyps.statistics
    assert torch.equal((found.endings > -torch.inf).sum((2, 3)), found.finished)
    assert regime == "in_place" or (found.finished.sum(1) > 4).any()  # more than the pool has room for
    ends = set()
    for b in range(3):
        for n in range(4):
            if hyps.finished[b, n]:
                last = int(hyps.lengths[b, n]) - 1
                number = [2, 4].index(int(hyps.tokens[b, n, last]))
                assert found.endings[b, last, hyps.slots[b, n, last], number] == hyps.token_log_probs[b, n, last]
                ends.add(number)
    assert ends == {0, 1}


def test_nothing_is_rejected_where_there_are_no_more_candidates_than_beams():
    search = fb.BeamSearch(8, 3, 2, statistics=True)
    state = search.init(1)
    search.step(state, torch.randn(1, 4))
    assert state.statistics.margin[0].isinf()[0] and state.statistics.width[0, 0] == 3


def test_a_snapshot_and_a_result_keep_theirs():
    model = TableLM(12, 3, eos=EOS)
    search = fb.BeamSearch(2, 6, EOS[0], statistics=True)
    state, hyps = run(search, model, steps=2)
    snapshot, before = state.clone(), hyps.statistics.entropy.clone()
    search.step(state, torch.randn(6, 12))
    assert torch.equal(hyps.statistics.entropy, before) and torch.equal(snapshot.statistics.entropy, before)
    assert not torch.equal(state.statistics.entropy, before)


def test_entropy_of_what_a_filter_leaves_is_not_meant():
    """``fb.Sample`` draws from the filtered rows; its log-probabilities and entropies are the model's."""
    logits = torch.randn(1, 50)
    search = fb.BeamSearch(2, 3, selection=fb.Sample(0, top_k=2), statistics=True)
    state = search.init(1)
    search.step(state, logits)
    p = (logits.double() - summarize(logits).lse.double()).exp()
    assert state.statistics.entropy[0, 0, 0].item() == pytest.approx(-(p * p.log()).sum().item(), abs=1e-5)
    assert state.statistics.margin[0, 0].isnan()


def test_rejects_what_is_no_bool():
    with pytest.raises(TypeError, match=r"statistics: expected a bool, got int"):
        fb.BeamSearch(statistics=1)
