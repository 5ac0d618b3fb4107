"""What every choosing rule must keep whatever it draws, and naive loops for those that draw nothing.

Written from the contract (design.md, sections 3 and 4) through the public interface alone. The laws of the rules that
draw are in test_choosing_laws.py.
"""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import flashbeam as fb
from oracles import FLAG_DEAD_END, FLAG_INF, FLAG_NAN, TableLM, enumerate_leaves, log_softmax64, pack_by_hand

FIELDS = ["tokens", "lengths", "scores", "log_probs", "token_log_probs", "valid", "finished"]
DRAWN = ["sampling_log_probs", "log_inclusion", "perturbed"]
STOCHASTIC = {
    "stochastic": lambda: fb.Stochastic(5),
    "conditional_poisson": lambda: fb.ConditionalPoisson(5),
    "sample": lambda: fb.Sample(5),
    "sample_filtered": lambda: fb.Sample(5, top_k=4, top_p=0.9, min_p=0.05),
    "arithmetic": lambda: fb.Arithmetic(5),
    "arithmetic_plain": lambda: fb.Arithmetic(5, rotate=False),
}
CHOOSING = {
    **STOCHASTIC,
    "groups": lambda: fb.DiverseGroups(2, 0.7),
    "siblings": lambda: fb.DiverseSiblings(0.4),
    "width": lambda: fb.DynamicWidth(0.8),
}
IN_PLACE = [*STOCHASTIC, "width"]


# ---------------------------------------------------------------------------------------------------------------------
# a model as one table, and the loop


class Table:
    """The logits of every prefix of ``models`` table LMs in one tensor; a prompt is the number of its model."""

    def __init__(self, vocab, length, models=1, *, dtype=torch.float32, allow=None, eos=(), **kwargs):
        self.lm = TableLM(vocab, eos=eos, **kwargs)
        self.vocab, self.length, self.eos = vocab, length, list(eos)
        prefixes = [p for n in range(length) for p in itertools.product(range(vocab), repeat=n)]
        rows = [[self.lm.logits((m, *p)) for p in prefixes] for m in range(models)]
        self.logits = torch.from_numpy(np.array(rows)).to(dtype)  # [models, prefixes, V]; children of n: n*V + 1 ...
        self.mask, self.words = None, None
        if allow is not None:  # the share of the tokens that may follow; token 0 always may
            self.mask = np.random.default_rng(7).random(self.logits.shape) < allow
            self.mask[..., 0] = True
            self.words = torch.from_numpy(pack_by_hand(self.mask))

    def __call__(self, tokens, cache):
        if cache is None:
            cache = {"model": tokens, "node": torch.zeros_like(tokens)}
        else:
            node = (cache["node"] * self.vocab + tokens + 1) % self.logits.shape[1]
            cache = {"model": cache["model"], "node": node}
        return self.logits[cache["model"], cache["node"]], cache

    def bitmask(self, cache):
        return None if self.words is None else self.words[cache["model"], cache["node"]]

    def allowed(self, prefix):
        node = 0
        for token in prefix[1:]:
            node = node * self.vocab + token + 1
        return self.mask[prefix[0], node]

    def leaves(self, model=0, *, max_length=None, **kwargs):
        mask = None if self.mask is None else self.allowed
        return enumerate_leaves(
            self.lm.logits, model, eos=self.eos, max_length=max_length or self.length, mask=mask, **kwargs
        )


def same_bits(a, b):
    return torch.equal(torch.nan_to_num(a, nan=123.0), torch.nan_to_num(b, nan=123.0))


def drive(search, model, prompts, *, ids=None, wide=1, shape=2, clone_at=None):
    """The contract's loop. ``wide``: rows per request of the first logits; ``shape``: 3 for ``[B, K, V]``."""
    prompts = torch.as_tensor(prompts)
    B = len(prompts)
    state = search.init(batch_size=B, device="cpu", request_ids=ids)
    tokens, cache, steps = prompts.repeat_interleave(wide), None, 0
    while not state.all_done():
        assert steps < 50
        logits, cache = model(tokens, cache)
        words = model.bitmask(cache) if hasattr(model, "bitmask") else None
        rows = len(logits)
        if shape == 3 and rows > B:
            logits = logits.view(B, rows // B, -1)
        before = logits.clone()
        if steps == clone_at:
            snapshot, state = state, state.clone()
            step = search.step(snapshot, logits, bitmask=words)  # goes elsewhere; must not touch the clone
            search.step(snapshot, model(step.tokens.flatten(), fb.reorder(cache, step.source_rows))[0].flip(-1))
        step = search.step(state, logits, bitmask=words)
        assert same_bits(before, logits), "the user's logits were modified"
        assert step.tokens.shape == step.parents.shape == step.valid.shape == (B, state.beam_size)
        assert ((step.tokens >= 0) & (step.tokens < logits.shape[-1])).all()
        assert ((step.parents >= 0) & (step.parents < state.beam_size)).all()
        assert ((step.source_rows >= 0) & (step.source_rows < rows)).all()
        assert torch.equal(step.source_rows // (rows // B), torch.arange(B).repeat_interleave(state.beam_size))
        tokens, cache, steps = step.tokens.flatten(), fb.reorder(cache, step.source_rows), steps + 1
    return search.finalize(state), state


def listed(hyps, b):
    n = int(hyps.valid[b].sum())
    return [tuple(hyps.tokens[b, i, : hyps.lengths[b, i]].tolist()) for i in range(n)]


def equal_rows(a, b, rows_a, rows_b, width=None, length=None):
    """Bitwise: these requests of one result are those of another, in the first ``width`` rows."""
    for name in FIELDS + DRAWN:
        x, y = getattr(a, name), getattr(b, name)
        assert (x is None) == (y is None), name
        if x is None:
            continue
        x, y = x[rows_a][:, :width], y[rows_b][:, :width]
        if x.dim() == 3:
            x, y = x[..., :length], y[..., :length]
        assert same_bits(x, y), name


def make(**kwargs):
    return fb.BeamSearch(**{"pad_id": 0, **kwargs})


# ---------------------------------------------------------------------------------------------------------------------
# every rule


@pytest.mark.parametrize("normalize", ["vocab", "allowed"])
@pytest.mark.parametrize("allow", [None, 0.7])
@pytest.mark.parametrize("rule", CHOOSING)
def test_results_are_sequences_of_the_model(rule, allow, normalize):
    """Rescoring, under the model and under what is sampled, with two EOS ids, min_length, temperature and a mask."""
    settings = {"temperature": 1.7, "min_length": 2}
    table = Table(5, 4, 6, seed=21, eos=[2, 4], eos_bias=0.3, allow=allow)
    search = make(beam_size=4, max_length=4, eos_id=[2, 4], selection=CHOOSING[rule](), normalize=normalize, **settings)
    hyps, state = drive(search, table, range(6))
    assert (state.flags == 0).all() and state.done.all()
    assert torch.equal(hyps.valid, hyps.valid.cummin(1).values)
    assert (hyps.scores[:, :-1] >= hyps.scores[:, 1:]).all()
    for b in range(6):
        model = {x.tokens: x for x in table.leaves(b, normalize=normalize, **settings)}
        q = {x.tokens: x for x in table.leaves(b, normalize="allowed", **settings)}
        found = listed(hyps, b)
        assert found, "nothing found"
        if rule.startswith(("sample", "arithmetic")):
            assert len(found) == 4
        elif rule != "groups":
            assert len(set(found)) == len(found), "a sequence twice"
        for i, tokens in enumerate(found):
            assert tokens in model and bool(hyps.finished[b, i]) == model[tokens].finished
            assert abs(float(hyps.log_probs[b, i]) - model[tokens].log_prob) < 2e-5
            total = float(hyps.token_log_probs[b, i, : len(tokens)].double().sum())
            assert abs(total - model[tokens].log_prob) < 2e-5
            if rule in STOCHASTIC and rule != "sample_filtered":
                assert abs(float(hyps.sampling_log_probs[b, i]) - q[tokens].log_prob) < 2e-5
            assert (hyps.tokens[b, i, len(tokens) :] == 0).all()


@pytest.mark.parametrize("rule", CHOOSING)
def test_a_request_is_the_same_anywhere(rule):
    """Alone, in a batch, permuted; with settings of its own; from [B, V], [B*K, V] and [B, K, V] logits."""
    table = Table(6, 4, 5, seed=22, eos=[5], eos_bias=0.5, allow=0.8)
    widths, lengths, temperatures = [4, 2, 4, 2, 4], [4, 3, 2, 4, 4], [1.0, 0.6, 2.0, 1.3, 0.9]
    ids = torch.tensor([3, 1, 4, 1_000_000_007_000, 5])

    def search(rows):
        def of(x):
            return [x[r] for r in rows]

        return make(
            beam_size=of(widths), max_length=of(lengths), temperature=of(temperatures), eos_id=5,
            selection=CHOOSING[rule](),
        )  # fmt: skip

    order = [3, 0, 4, 2, 1]
    whole, whole_state = drive(search(range(5)), table, range(5), ids=ids)
    shuffled, shuffled_state = drive(search(order), table, order, ids=ids[order])
    equal_rows(whole, shuffled, order, list(range(5)))
    assert torch.equal(whole_state.flags[order], shuffled_state.flags)
    for b in range(5):
        alone, _ = drive(search([b]), table, [b], ids=ids[[b]])
        equal_rows(whole, alone, [b], [0], widths[b], lengths[b])
        assert (~whole.valid[b, widths[b] :]).all()
    for wide, shape in [(4, 2), (4, 3), (1, 3)]:
        again, _ = drive(search(range(5)), table, range(5), ids=ids, wide=wide, shape=shape)
        equal_rows(whole, again, list(range(5)), list(range(5)))
    decoded = fb.decode(
        make(beam_size=4, max_length=4, eos_id=5, selection=CHOOSING[rule]()),
        lambda tokens, cache: table(tokens, cache), torch.arange(5), request_ids=ids,
    )  # fmt: skip
    table.words = None
    driven, _ = drive(make(beam_size=4, max_length=4, eos_id=5, selection=CHOOSING[rule]()), table, range(5), ids=ids)
    equal_rows(decoded, driven, list(range(5)), list(range(5)))


@pytest.mark.parametrize("rule", CHOOSING)
def test_snapshots_and_dtypes(rule):
    """A clone goes on as the original would have; logits that a dtype can hold give the same in that dtype."""
    tables = {
        dtype: Table(6, 4, 3, seed=23, eos=[5], eos_bias=0.5, coarse=0.125, dtype=dtype)
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
    }
    search = make(beam_size=4, max_length=4, eos_id=5, selection=CHOOSING[rule]())
    rows = [0, 1, 2]
    whole, _ = drive(search, tables[torch.float32], rows)
    for at in (0, 1, 2):
        again, _ = drive(search, tables[torch.float32], rows, clone_at=at)
        equal_rows(whole, again, rows, rows)
    for table in tables.values():
        again, _ = drive(search, table, rows)
        equal_rows(whole, again, rows, rows)


@pytest.mark.parametrize("rule", CHOOSING)
def test_faults_are_flagged(rule):
    """NaN counts as -inf, +inf empties a row, a dead end leaves nothing: all flagged, no neighbour touched."""
    search = make(beam_size=2, max_length=3, eos_id=4, selection=CHOOSING[rule]())
    table = Table(5, 3, 6, seed=24, eos=[4])
    clean, _ = drive(search, table, range(6))
    clean_logits = table.logits.clone()
    holes = torch.rand(table.logits.shape, generator=torch.Generator().manual_seed(3)) < 0.3
    holes[..., 0] = False
    holes[:4] = False
    holes[4, 0, 1] = True
    table.logits[holes] = -math.inf
    without, without_state = drive(search, table, range(6))
    table.logits[holes] = math.nan
    nan, nan_state = drive(search, table, range(6))
    equal_rows(without, nan, list(range(6)), list(range(6)))
    equal_rows(clean, nan, [0, 1, 2, 3], [0, 1, 2, 3])
    assert without_state.flags.tolist() == [0] * 6
    assert nan_state.flags[:5].tolist() == [0, 0, 0, 0, FLAG_NAN]

    table.logits = clean_logits.clone()
    table.logits[1, 0, 2] = math.inf  # the first row of request 1
    table.logits[2, 0] = -math.inf  # nothing may follow
    table.logits[3, 1:] = -math.inf  # nothing may follow the first token
    table.logits[3, 0, 4] = -math.inf  # which is not EOS
    table.logits[4, 1:] = -math.inf  # nothing may follow the first token, but for EOS, which has happened
    table.logits[4, 0] = -math.inf
    table.logits[4, 0, 4] = 1.0
    hyps, state = drive(search, table, range(6))
    assert state.flags[0] == 0 and state.flags[5] == 0
    equal_rows(clean, hyps, [0, 5], [0, 5])
    assert state.flags[1] & FLAG_INF and not hyps.valid[1].any()
    assert state.flags[2] == FLAG_DEAD_END and not hyps.valid[2].any()
    assert state.flags[3] == FLAG_DEAD_END and not hyps.valid[3].any()
    assert state.flags[4] == 0 and set(listed(hyps, 4)) == {(4,)}
    for name in ("scores", "log_probs"):
        assert (getattr(hyps, name)[~hyps.valid] == -math.inf).all()
    for name in FIELDS + DRAWN:
        x = getattr(hyps, name)
        assert x is None or not torch.isnan(x.float()).any(), name

    masked = Table(5, 3, 6, seed=24, eos=[4], allow=1.0)
    masked.words[2, 0] = 0
    masked.words[3, 1:] = 0
    masked.words[3, 0] = 0b01111
    hyps, state = drive(search, masked, range(6))
    assert state.flags.tolist() == [0, 0, FLAG_DEAD_END, FLAG_DEAD_END, 0, 0]
    assert hyps.valid.any(1).tolist() == [True, True, False, False, True, True]


@pytest.mark.parametrize("rule", IN_PLACE)
def test_in_place_rules_refuse_a_pool(rule):
    with pytest.raises(ValueError, match="finished"):
        make(selection=CHOOSING[rule](), eos_id=1, finished="pool")
    make(selection=CHOOSING[rule](), eos_id=1, finished="in_place")


@pytest.mark.parametrize("rule", STOCHASTIC)
def test_what_does_not_apply_is_refused_by_name(rule):
    for penalty in (0.6, 2.0, -1.0, fb.GNMT(0.6)):
        with pytest.raises(ValueError, match="length_penalty"):
            make(selection=CHOOSING[rule](), eos_id=1, length_penalty=penalty)
    for stopping in (fb.Patience(2.0), fb.Exact(), fb.Exhausted()):
        with pytest.raises(ValueError, match="stopping"):
            make(selection=CHOOSING[rule](), eos_id=1, stopping=stopping)
    table = Table(5, 3, 2, seed=25, eos=[4])
    results = [
        drive(make(beam_size=3, max_length=3, eos_id=4, selection=CHOOSING[rule](), **kwargs), table, [0, 1])[0]
        for kwargs in ({}, {"length_penalty": 0.0}, {"stopping": fb.FirstFinished()})
    ]
    for other in results[1:]:
        equal_rows(results[0], other, [0, 1], [0, 1])


def test_arguments_of_rules_are_checked():
    for groups, width in [(2, 3), (3, 4), (4, 2), (2, [4, 3])]:
        with pytest.raises(ValueError, match=r"groups|beam_size"):
            make(beam_size=width, selection=fb.DiverseGroups(groups, 0.5))
    with pytest.raises(ValueError, match="groups"):
        fb.DiverseGroups(0, 0.5)
    for strength in (-0.1, math.nan):
        with pytest.raises(ValueError, match="strength"):
            fb.DiverseGroups(2, strength)
    for p in (-0.1, 1.5, math.nan):
        with pytest.raises(ValueError, match="p"):
            fb.DynamicWidth(p)
        with pytest.raises(ValueError, match="top_p"):
            fb.Sample(0, top_p=p)
        with pytest.raises(ValueError, match="min_p"):
            fb.Sample(0, min_p=p)
    with pytest.raises(ValueError, match="top_k"):
        fb.Sample(0, top_k=0)
    with pytest.raises(ValueError, match="rate"):
        fb.DiverseSiblings(math.nan)


def test_padded_vocabulary_is_never_chosen():
    table = Table(6, 3, 4, seed=26, eos=[3], allow=None)
    table.logits[..., 4:] += 8.0  # the padding would win
    for rule, selection in CHOOSING.items():
        search = make(beam_size=4, max_length=3, eos_id=3, vocab_size=4, selection=selection())
        hyps, state = drive(search, table, range(4))
        assert (hyps.tokens < 4).all() and (state.flags == 0).all(), rule
        small = {(b, x.tokens): x for b in range(4) for x in cut_leaves(table, b, 4)}
        for b in range(4):
            for i, tokens in enumerate(listed(hyps, b)):
                assert abs(float(hyps.log_probs[b, i]) - small[b, tokens].log_prob) < 2e-5, rule


def cut_leaves(table, b, vocab):
    return enumerate_leaves(lambda prefix: table.lm.logits(prefix)[:vocab], b, eos=table.eos, max_length=table.length)


# ---------------------------------------------------------------------------------------------------------------------
# rules without randomness: a literal loop


def naive(
    table, b, *, K, T, eos, alpha=1.0, stopping=1.0, finished="pool", temperature=1.0, min_length=0,
    groups=1, strength=0.0, rate=0.0, p=None,
):  # fmt: skip
    """One request, in float64: [(tokens, log_prob, score, finished)] best first, and the smallest gap that decided.

    Beams are (tokens, log_prob, paid, frozen), ``paid`` being the log-probability less all penalties.
    """
    size = K // groups
    capacity = math.ceil(stopping * size - 1e-9) if isinstance(stopping, float) else size
    parts = [SimpleNamespace(beams=[((), 0.0, 0.0, False)], pool=[], done=False) for _ in range(groups)]
    gap = math.inf

    def best(hypotheses):
        return sorted(hypotheses, key=lambda h: (-h[2], len(h[0])))

    for t in range(T):
        counts = np.zeros(table.vocab)
        for part in parts:
            if part.done:
                continue
            candidates = []  # rank score, slot, beam
            for slot, beam in enumerate(part.beams):
                tokens, log_prob, paid, frozen = beam
                if frozen:
                    candidates.append((paid / len(tokens) ** alpha, slot, beam))
                    continue
                row = table.lm.logits((b, *tokens)) / np.float32(temperature)
                lp = log_softmax64(row)
                allowed = np.ones(table.vocab, bool) if table.mask is None else table.allowed((b, *tokens)).copy()
                if t + 1 < min_length:
                    allowed[eos] = False
                children = sorted(np.flatnonzero(allowed).tolist(), key=lambda v: (-lp[v], v))
                for rank, v in enumerate(children, 1):
                    score = paid + lp[v] - strength * counts[v] - (rate * rank if t > 0 else 0.0)
                    child = ((*tokens, v), log_prob + lp[v], score, v in eos)
                    candidates.append((score if finished == "pool" else score / (t + 1) ** alpha, slot, child))
            candidates.sort(key=lambda c: (-c[0], c[1]))
            gap = min([gap, *(x[0] - y[0] for x, y in itertools.pairwise(candidates))])
            width = size
            if p is not None:
                mass = np.cumsum([math.exp(c[2][1]) for c in candidates])
                share = mass / mass[-1]
                if p < 1:
                    gap = min(gap, np.abs(share - p).min())
                    width = min(size, 1 + int(np.flatnonzero(share >= p)[0]))
            top = [c[2] for c in candidates[:width]]
            last = t + 1 == T
            if finished == "in_place":
                part.beams = top
                part.done = last or all(x[3] for x in top)
                part.pool = best([(x[0], x[1], x[2] / len(x[0]) ** alpha, x[3]) for x in top])
                continue
            arrivals = [(x[0], x[1], x[2] / (t + 1) ** alpha, x[3]) for x in top if x[3] or last]
            part.beams = [] if last else [c[2] for c in candidates if not c[2][3]][:size]
            part.pool += arrivals
            if not last:
                part.pool = (part.pool if isinstance(stopping, float) else best(part.pool))[:capacity]
            for x in part.beams + [x for x in top if x[3] or last]:
                counts[x[0][-1]] += 1
            part.done = last or not part.beams or (stopping != "exhausted" and len(part.pool) >= capacity)
    hypotheses = best([h for part in parts for h in best(part.pool)[:size]])
    gap = min([gap, *(x[2] - y[2] for x, y in itertools.pairwise(hypotheses) if x[0] != y[0])])
    return hypotheses, gap


def agrees(hyps, b, expected):
    assert listed(hyps, b) == [h[0] for h in expected]
    for i, (_, log_prob, score, ended) in enumerate(expected):
        assert abs(float(hyps.log_probs[b, i]) - log_prob) < 3e-5
        assert abs(float(hyps.scores[b, i]) - score) < 3e-5
        assert bool(hyps.finished[b, i]) == ended


def library_stopping(stopping):
    return fb.Exhausted() if stopping == "exhausted" else fb.Patience(stopping)


def compare(table, requests, selection, oracle, **settings):
    """Library against ``naive`` on every request that no gap below float32's noise decides; returns how many."""
    kwargs = {"length_penalty": settings.pop("alpha", 1.0), **settings.pop("library", {})}
    oracle |= {"alpha": kwargs["length_penalty"], **settings}
    search = make(
        beam_size=settings.pop("K"), max_length=settings.pop("T"), eos_id=settings.pop("eos"), selection=selection,
        **kwargs, **settings,
    )  # fmt: skip
    hyps, state = drive(search, table, range(requests))
    assert (state.flags == 0).all()
    compared = 0
    for b in range(requests):
        expected, gap = naive(table, b, **oracle)
        if gap > 2e-5:
            agrees(hyps, b, expected)
            compared += 1
    return compared


@pytest.mark.parametrize("allow", [None, 0.8])
@pytest.mark.parametrize("stopping", [1.0, 0.5, 2.0, "exhausted"])
@pytest.mark.parametrize(
    ("groups", "size", "strength", "alpha"),
    [(2, 2, 0.5, 1.0), (3, 2, 1.0, 0.0), (3, 1, 4.0, 0.6), (2, 3, 0.8, -0.5), (1, 3, 2.0, 1.0)],
)
def test_diverse_groups_are_the_naive_loops(groups, size, strength, alpha, stopping, allow):
    table = Table(5, 4, 12, seed=31, eos=[1, 4], eos_bias=0.2, scale=1.2, allow=allow)
    compared = compare(
        table, 12, fb.DiverseGroups(groups, strength), {"groups": groups, "strength": strength, "stopping": stopping},
        K=groups * size, T=4, eos=[1, 4], alpha=alpha, temperature=1.2,
        library={"stopping": library_stopping(stopping)},
    )  # fmt: skip
    assert compared >= 10


def test_diverse_groups_with_min_length():
    table = Table(5, 4, 12, seed=32, eos=[4], eos_bias=1.5)
    compared = compare(
        table, 12, fb.DiverseGroups(2, 0.7), {"groups": 2, "strength": 0.7}, K=4, T=4, eos=[4], min_length=3
    )
    assert compared >= 10


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_groups_without_strength_are_copies(alpha):
    """strength 0: every group is the same search of its width; one group is TopK, whatever the strength."""
    table = Table(6, 4, 8, seed=33, eos=[5], eos_bias=0.5)
    kwargs = {"max_length": 4, "eos_id": 5, "length_penalty": alpha}
    rows = list(range(8))
    single, _ = drive(make(beam_size=2, **kwargs), table, rows)
    three, _ = drive(make(beam_size=6, selection=fb.DiverseGroups(3, 0.0), **kwargs), table, rows)
    for name in FIELDS:
        assert torch.equal(getattr(single, name).repeat_interleave(3, 1), getattr(three, name)), name
    for strength in (0.0, 0.5, 50.0):
        one, _ = drive(make(beam_size=2, selection=fb.DiverseGroups(1, strength), **kwargs), table, rows)
        equal_rows(single, one, rows, rows)


def test_strong_groups_differ_at_every_step():
    table = Table(6, 3, 8, seed=34)
    search = make(beam_size=6, max_length=3, selection=fb.DiverseGroups(6, 1e4))
    hyps, _ = drive(search, table, range(8))
    for t in range(3):
        assert (hyps.tokens[:, :, t].sort(1).values == torch.arange(6)).all()
    # a strength beyond any score still leaves hypotheses with the model's log-probabilities
    truth = [{x.tokens: x.log_prob for x in table.leaves(b)} for b in range(8)]
    for b in range(8):
        for i, tokens in enumerate(listed(hyps, b)):
            assert abs(float(hyps.log_probs[b, i]) - truth[b][tokens]) < 2e-5


@pytest.mark.parametrize("finished", ["pool", "in_place"])
@pytest.mark.parametrize("alpha", [0.0, 1.0, -0.5])
@pytest.mark.parametrize(
    ("K", "rate", "stopping", "allow"),
    [(3, 0.3, 1.0, None), (4, 1.0, "exhausted", 0.8), (2, 0.5, 2.0, None), (4, 30.0, 1.0, None)],
)
def test_diverse_siblings_are_the_naive_loops(K, rate, stopping, allow, alpha, finished):
    if finished == "in_place" and stopping == 2.0:
        pytest.skip("patience has no meaning in place")
    table = Table(5, 4, 12, seed=35, eos=[1, 4], scale=1.2, allow=allow)
    compared = compare(
        table, 12, fb.DiverseSiblings(rate), {"rate": rate, "stopping": stopping},
        K=K, T=4, eos=[1, 4], alpha=alpha, temperature=0.8, min_length=2, finished=finished,
        library={"stopping": library_stopping(stopping)},
    )  # fmt: skip
    assert compared >= 10


@pytest.mark.parametrize("finished", ["pool", "in_place"])
@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_siblings_at_no_rate_are_topk(alpha, finished):
    table = Table(6, 4, 8, seed=36, eos=[5], eos_bias=0.5, coarse=0.5)  # many exact ties
    kwargs = {"beam_size": 4, "max_length": 4, "eos_id": 5, "length_penalty": alpha, "finished": finished}
    plain, _ = drive(make(**kwargs), table, range(8))
    free, _ = drive(make(selection=fb.DiverseSiblings(0.0), **kwargs), table, range(8))
    equal_rows(plain, free, list(range(8)), list(range(8)))


def test_siblings_rank_ties_by_token():
    """Equal children: the lower token is the elder; worked by hand. Step 2 costs 1 per rank."""

    def model(tokens, cache):
        t = 0 if cache is None else int(cache[0])
        row = torch.tensor([[0.0, 0.0, -9.0, -99.0], [0.0, 0.0, -1.0, -99.0]][t])
        return row.repeat(len(tokens), 1), torch.full((len(tokens),), t + 1)

    search = make(beam_size=4, max_length=2, selection=fb.DiverseSiblings(1.0), length_penalty=0.0)
    hyps, _ = drive(search, model, [0])
    assert listed(hyps, 0) == [(0, 0), (1, 0), (0, 1), (1, 1)]
    first = -math.log(2 + math.exp(-9)) - math.log(2 + math.exp(-1))
    assert torch.allclose(hyps.scores[0], torch.tensor([first - 1, first - 1, first - 2, first - 2]), atol=1e-5)
    assert torch.allclose(hyps.log_probs[0], torch.tensor(first), atol=1e-5)


@pytest.mark.parametrize("alpha", [0.0, 1.0, -0.7])
def test_exact_stopping_is_exhausted_under_penalties(alpha):
    """Siblings only: a group that has stopped no longer chooses, so the later groups of the two differ by right."""
    table = Table(5, 5, 8, seed=37, eos=[4], eos_bias=0.7)
    results = []
    for stopping in (fb.Exact(), fb.Exhausted()):
        search = make(
            beam_size=4, max_length=5, eos_id=4, length_penalty=alpha, stopping=stopping,
            selection=fb.DiverseSiblings(0.4),
        )  # fmt: skip
        results.append(drive(search, table, range(8))[0])
    equal_rows(*results, list(range(8)), list(range(8)))


@pytest.mark.parametrize("allow", [None, 0.7])
@pytest.mark.parametrize("alpha", [0.0, 1.0])
@pytest.mark.parametrize(("K", "p"), [(4, 0.5), (4, 0.8), (6, 0.95), (2, 0.9), (3, 0.05), (3, 1.0)])
def test_dynamic_width_is_the_naive_loop(K, p, alpha, allow):
    table = Table(5, 4, 12, seed=38, eos=[4], eos_bias=0.4, scale=1.5, allow=allow)
    compared = compare(
        table, 12, fb.DynamicWidth(p), {"p": p, "finished": "in_place"},
        K=K, T=4, eos=[4], alpha=alpha, temperature=0.9, min_length=2,
    )  # fmt: skip
    assert compared >= 10


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_limits_of_dynamic_width(alpha):
    """p = 1 is TopK in place; a small p, and K = 1, are greedy."""
    table = Table(6, 4, 8, seed=39, eos=[5], eos_bias=0.5)
    rows = list(range(8))
    kwargs = {"max_length": 4, "eos_id": 5, "length_penalty": alpha}
    plain, _ = drive(make(beam_size=4, finished="in_place", **kwargs), table, rows)
    whole, _ = drive(make(beam_size=4, selection=fb.DynamicWidth(1.0), **kwargs), table, rows)
    equal_rows(plain, whole, rows, rows)
    greedy, _ = drive(make(beam_size=1, **kwargs), table, rows)
    for K, p in [(4, 1e-6), (1, 0.7)]:
        narrow, _ = drive(make(beam_size=K, selection=fb.DynamicWidth(p), **kwargs), table, rows)
        assert narrow.valid.sum(1).tolist() == [1] * 8
        for name in FIELDS:
            assert torch.equal(getattr(narrow, name)[:, :1], getattr(greedy, name)), name


@pytest.mark.parametrize("rule", ["groups", "siblings"])
def test_one_beam_is_greedy_but_for_what_it_pays(rule):
    table = Table(6, 4, 8, seed=40, eos=[5], eos_bias=0.5)
    selection = fb.DiverseGroups(1, 3.0) if rule == "groups" else fb.DiverseSiblings(0.4)
    greedy, _ = drive(make(beam_size=1, max_length=4, eos_id=5), table, range(8))
    one, _ = drive(make(beam_size=1, max_length=4, eos_id=5, selection=selection), table, range(8))
    for name in ("tokens", "lengths", "log_probs", "finished"):
        assert torch.equal(getattr(greedy, name), getattr(one, name)), name
