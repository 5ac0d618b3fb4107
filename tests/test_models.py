"""Several models in one search: against enumeration of the formulas, and against searches of one model."""

from __future__ import annotations

import importlib
import math

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import pad

import flashbeam as fb
from flashbeam.kernels import mixture, pack_bitmask, summarize
from oracles import TableLM, enumerate_leaves, log_softmax64

INF, NAN = float("inf"), float("nan")
EOS = 1


class Pair:
    """Two or more table models over one vocabulary, as one that returns the logits of each."""

    def __init__(self, vocab=5, models=2, dtypes=(torch.float32, torch.float32), **options):
        self.each = [TableLM(vocab, seed=i, eos=[EOS], **options) for i in range(models)]
        self.dtypes = (*dtypes, *[torch.float32] * models)[:models]

    def __call__(self, tokens, cache):
        found = [model(tokens, cache) for model in self.each]
        return tuple(x.to(d) for (x, _), d in zip(found, self.dtypes, strict=True)), found[0][1]

    def rows(self, prefix):
        """float32, as the models give them."""
        return [
            torch.tensor(m.logits(prefix)).to(d).float().numpy() for m, d in zip(self.each, self.dtypes, strict=True)
        ]


def run(search, model, *, batch=1, bos=(7, 8, 9), extras=None, bitmask=None, steps=None):
    """The loop; ``model`` says what it says for each prefix, ``extras(prefixes)`` what ``step`` is given beside it."""
    tokens, cache = torch.tensor(bos[:batch]), None
    state = search.init(batch)
    while not state.all_done() and steps != 0:
        logits, cache = model(tokens, cache)
        given = {} if extras is None else extras(cache["prefix"].tolist())
        step = search.step(state, logits, bitmask, **given)
        tokens, cache = step.tokens.flatten(), fb.reorder(cache, step.source_rows)
        steps = None if steps is None else steps - 1
    return search.finalize(state), state


def listed(hyps, b=0):
    """tokens -> (score, log_prob)"""
    return {
        tuple(hyps.tokens[b, n, : hyps.lengths[b, n]].tolist()): (float(hyps.scores[b, n]), float(hyps.log_probs[b, n]))
        for n in range(hyps.tokens.shape[1])
        if hyps.valid[b, n]
    }


def same(one, other):
    for field in ("tokens", "scores", "log_probs", "token_log_probs", "lengths", "valid", "finished"):
        assert torch.equal(getattr(one, field), getattr(other, field)), field


def log_sum(weights, rows):
    """log sum_i w_i p_i of log-probabilities, float64."""
    return np.logaddexp.reduce(
        [math.log(w) + l if w else np.full(len(l), -INF) for w, l in zip(weights, rows, strict=True)]
    )


def softmaxes(rows, temperatures=(1.0, 1.0, 1.0)):
    return [log_softmax64(x.astype(np.float64) / t) for x, t in zip(rows, temperatures, strict=False)]


# ---------------------------------------------------------------------------------------------------------------------
# enumeration

WIDE = {"max_length": 3, "eos_id": EOS, "length_penalty": 0, "stopping": fb.Exhausted()}


def check_leaves(models, pair, row, *, temperature=1.0, extras=None, **options):
    """A beam wider than the tree returns its leaves, with the log-probabilities of ``row(prefix)``."""
    search = fb.BeamSearch(100, **WIDE, models=models, temperature=temperature, **options)
    hyps, state = run(search, pair, extras=extras)
    leaves = enumerate_leaves(row, 7, eos=[EOS], max_length=3, temperature=temperature)
    got, want = listed(hyps), {leaf.tokens: leaf.log_prob for leaf in leaves}
    assert got.keys() == want.keys() and int(state.flags.sum()) == 0
    for tokens, log_prob in want.items():
        assert abs(got[tokens][1] - log_prob) < 1e-5 and got[tokens][0] == got[tokens][1]
    assert abs(np.logaddexp.reduce([log_prob for _, log_prob in got.values()])) < 1e-5  # it is a distribution


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("temperatures", [None, [0.5, 1.5]])
@pytest.mark.parametrize("kind", ["probability", "log"])
def test_mixture_is_its_formula(kind, temperatures, temperature):
    pair = Pair(dtypes=(torch.float32, torch.bfloat16))
    weights = [0.3, 0.7] if kind == "probability" else [0.4, 1.3]

    def row(prefix):
        log_probs = softmaxes(pair.rows(prefix), temperatures or (1.0, 1.0))
        return log_sum(weights, log_probs) if kind == "probability" else np.dot(weights, log_probs)

    check_leaves(fb.Mixture(weights, kind, temperatures), pair, row, temperature=temperature)


def test_three_models_and_exact_stopping():
    trio = Pair(models=3)
    weights = [0.2, 0.5, 0.3]
    check_leaves(fb.Mixture(weights), trio, lambda prefix: log_sum(weights, softmaxes(trio.rows(prefix))))
    results = [
        run(fb.BeamSearch(3, 6, EOS, stopping=rule, models=fb.Mixture(weights)), trio)[0]
        for rule in (fb.Exact(), fb.Exhausted())
    ]
    same(*results)


def test_a_contrast_has_no_bound_and_says_so():
    """What stops early might have missed something; what runs to the end has not."""
    for stopping, exact in ((fb.FirstFinished(), False), (fb.Exhausted(), True)):
        search = fb.BeamSearch(2, 9, EOS, stopping=stopping, models=fb.Contrast(alpha=0.05))
        assert run(search, Pair(eos_bias=1.0))[0].exact.tolist() == [exact]


def test_weights_of_requests_and_of_rows():
    pair, weights = Pair(), [[0.9, 0.1], [0.2, 0.8]]
    own = fb.BeamSearch(4, 4, EOS, models=fb.Mixture(weights))
    hyps, _ = run(own, pair, batch=2)
    for b, row in enumerate(weights):
        alone, _ = run(fb.BeamSearch(4, 4, EOS, models=fb.Mixture(row)), pair, bos=(7 + b,))
        assert listed(alone) == listed(hyps, b)
    given, _ = run(
        fb.BeamSearch(4, 4, EOS, models=fb.Mixture()),
        pair,
        batch=2,
        extras=lambda _: {"weights": torch.tensor(weights)},
    )
    same(given, hyps)
    exact = [[0.25, 0.75], [1.0, 0.0]]
    assert fb.Mixture(torch.tensor(exact)) == fb.Mixture(np.array(exact)) == fb.Mixture(exact)

    def weight(prefix):
        return (prefix[-1] + 1) / 10

    check_leaves(
        fb.Mixture([0.5, 0.5]),
        pair,
        lambda prefix: log_sum([weight(prefix), 1 - weight(prefix)], softmaxes(pair.rows(prefix))),
        extras=lambda prefixes: {"weights": torch.tensor([[3 * weight(p), 3 - 3 * weight(p)] for p in prefixes])},
    )


def test_shallow_fusion_is_its_formula():
    pair, beta = Pair(), 0.6
    search = fb.BeamSearch(100, **WIDE, models=fb.Mixture([1.0, beta], "log", normalize=False), temperature=0.8)
    hyps, _ = run(search, pair)
    got = listed(hyps)
    one, other = (
        {leaf.tokens: leaf.log_prob for leaf in enumerate_leaves(m.logits, 7, eos=[EOS], max_length=3, temperature=t)}
        for m, t in zip(pair.each, (0.8, 1.0), strict=True)
    )
    want = {tokens: (log_prob + beta * other[tokens], log_prob) for tokens, log_prob in one.items()}
    assert got.keys() == want.keys()
    for tokens, values in want.items():
        assert np.abs(np.subtract(got[tokens], values)).max() < 1e-5
    assert (hyps.scores[:, :-1] >= hyps.scores[:, 1:])[hyps.valid[:, 1:]].all()


@pytest.mark.parametrize("alpha", [0.0, 1.0, -0.5])
def test_shallow_fusion_stops_exactly_and_early(alpha):
    """Its scores only fall, so Exact has its bound: what it returns is Exhausted's, in fewer steps."""
    pair, bos = Pair(vocab=30, eos_bias=2.5), tuple(range(7, 67))
    fused = fb.Mixture([1.0, 0.5], "log", normalize=False)
    (exact, early), (exhausted, whole), (first, _) = (
        run(fb.BeamSearch(3, 12, EOS, length_penalty=alpha, stopping=rule, models=fused), pair, batch=60, bos=bos)
        for rule in (fb.Exact(), fb.Exhausted(), fb.FirstFinished())
    )
    same(exact, exhausted)
    steps = [state.requests.steps.sum() for state in (early, whole)]
    assert steps[0] < (1.0 if alpha > 0 else 0.8) * steps[1] and exact.exact.all()
    assert first.exact.any() or alpha > 0
    for b in first.exact.nonzero()[:, 0].tolist():
        assert listed(first, b) == listed(exhausted, b)


def contrast_leaves(pair, *, weight, alpha, expert_t=1.0, amateur_t=1.0, choose=None, max_length=3, allowed=None):
    """tokens -> (score, log_prob) of every sequence of plausible tokens."""
    found = {}

    def visit(prefix, score, log_prob):
        rows = pair.rows((7, *prefix))
        e = log_softmax64(rows[0].astype(np.float64) / expert_t)
        candidates = [log_softmax64(x.astype(np.float64) / amateur_t) for x in rows[1:]]
        a = candidates[0 if choose is None else choose(e, candidates)]
        ok = np.ones(len(e), bool) if allowed is None else allowed
        for token in np.flatnonzero(ok & (e >= e[ok].max() + math.log(alpha))):
            gain = e[token] - a[token] if weight is None else e[token] + weight * (e[token] - a[token])
            child, values = (*prefix, int(token)), (score + gain, log_prob + e[token])
            if token == EOS or len(child) == max_length:
                found[child] = values
            else:
                visit(child, *values)

    visit((), 0.0, 0.0)
    return found


def check_contrast(hyps, want):
    got = listed(hyps)
    assert got.keys() == want.keys()
    for tokens, values in want.items():
        assert np.abs(np.subtract(got[tokens], values)).max() < 2e-5, tokens
    assert (hyps.scores[:, :-1] >= hyps.scores[:, 1:])[hyps.valid[:, 1:]].all()


@pytest.mark.parametrize("weight", [None, 0.5])
@pytest.mark.parametrize("finished", ["pool", "in_place"])
def test_contrast_is_its_formula(weight, finished):
    pair = Pair(dtypes=(torch.bfloat16, torch.float32))
    models = fb.Contrast(weight, alpha=0.2, amateur_temperature=0.5)
    options = {**WIDE, "stopping": None} if finished == "in_place" else WIDE
    hyps, state = run(fb.BeamSearch(80, **options, finished=finished, models=models, temperature=1.3), pair)
    check_contrast(hyps, contrast_leaves(pair, weight=weight, alpha=0.2, expert_t=1.3, amateur_t=0.5))
    assert int(state.flags.sum()) == 0 and (weight is not None or (hyps.scores[hyps.valid] > 0).any())


def jensen_shannon(p, q):
    m = np.logaddexp(p, q) - math.log(2)
    return (np.sum(np.exp(p) * (p - m)) + np.sum(np.exp(q) * (q - m))) / 2


def swapped(p, q):
    """F.kl_div(log p, m) and F.kl_div(log q, m), averaged, as the reference implementation of DoLa has them."""
    m = (np.exp(p) + np.exp(q)) / 2
    return (np.mean(m * (np.log(m) - p)) + np.mean(m * (np.log(m) - q))) / 2


@pytest.mark.parametrize("divergence", ["jsd", "dola"])
def test_every_row_takes_the_layer_that_diverges_most(divergence):
    measure = {"jsd": jensen_shannon, "dola": swapped}[divergence]
    layers = Pair(vocab=6, models=4)
    chosen = []

    def choose(e, candidates):
        apart = [measure(e, a) for a in candidates]
        chosen.append((int(np.argmax(apart)), int(np.argmax([jensen_shannon(e, a) for a in candidates]))))
        return chosen[-1][0]

    want = contrast_leaves(layers, weight=None, alpha=0.1, expert_t=1.3, amateur_t=0.5, choose=choose)
    models = fb.Contrast(amateur_temperature=0.5, divergence=divergence)
    hyps, _ = run(fb.BeamSearch(220, **WIDE, models=models, temperature=1.3), layers)
    check_contrast(hyps, want)
    ours, true = zip(*chosen, strict=True)
    assert len(set(ours)) == 3 and (ours != true) == (divergence == "dola")


def test_normalized_contrast_is_a_distribution_over_the_head():
    pair = Pair()

    def row(prefix):
        e, a = softmaxes(pair.rows(prefix))
        return np.where(e >= e.max() + math.log(0.2), e + 0.5 * (e - a), -INF)

    check_leaves(fb.Contrast(0.5, 0.2, normalize=True), pair, row, temperature=0.7)


@pytest.mark.parametrize("greedy", [None, "certain"])
def test_soft_switch_is_its_formula(greedy):
    pair = Pair()

    def gate(prefix):
        return [0.0, 1.0, 0.25, 0.8, 0.5, 0.1][prefix[-1] % 6]

    def row(prefix):
        aligned, critical = softmaxes(pair.rows(prefix), (1.0, 0.6))
        if greedy:
            critical = np.where(np.arange(5) == critical.argmax(), 0.0, -INF)
        return log_sum([1 - gate(prefix), gate(prefix)], [aligned, critical])

    check_leaves(
        fb.Switch(greedy, temperatures=[1.0, 0.6]),
        pair,
        row,
        extras=lambda prefixes: {"gate": torch.tensor([gate(p) for p in prefixes])},
    )


# ---------------------------------------------------------------------------------------------------------------------
# laws


def settings(name):
    return {
        "plain": {},
        "options": {
            "min_length": 2,
            "temperature": 0.7,
            "normalize": "allowed",
            "constraint": fb.ForbiddenPhrases([[2, 3]]),
            "length_penalty": 0.6,
        },
        "in place": {"finished": "in_place", "vocab_size": 60},
    }[name]


def one_of(pair, i):
    return lambda tokens, cache: ((found := pair(tokens, cache))[0][i], found[1])


@pytest.mark.parametrize("options", ["plain", "options", "in place"])
@pytest.mark.parametrize("i", [0, 1])
def test_one_model_alone_is_that_models_search_bit_for_bit(i, options):
    pair = Pair(vocab=70, dtypes=(torch.float32, torch.bfloat16))
    alone, _ = run(fb.BeamSearch(4, 5, EOS, **settings(options)), one_of(pair, i), batch=3)
    weights = [float(j == i) for j in range(2)]
    for kind in ("probability", "log"):
        mixed, _ = run(fb.BeamSearch(4, 5, EOS, models=fb.Mixture(weights, kind), **settings(options)), pair, batch=3)
        same(mixed, alone)
    gates = (torch.full((3,), bool(i)), torch.full((3,), i), torch.full((3,), float(i)))
    for gate in gates:
        search = fb.BeamSearch(4, 5, EOS, models=fb.Switch(), **settings(options))
        same(run(search, pair, batch=3, extras=lambda _, g=gate: {"gate": g})[0], alone)
    if i == 0:
        fused = fb.Mixture([1.0, 0.0], "log", normalize=False)
        same(run(fb.BeamSearch(4, 5, EOS, models=fused, **settings(options)), pair, batch=3)[0], alone)
        greedy = fb.BeamSearch(4, 5, EOS, models=fb.Switch("certain"), **settings(options))
        same(run(greedy, pair, batch=3, extras=lambda _: {"gate": torch.zeros(3, dtype=torch.bool)})[0], alone)


@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0.7, "min_length": 2, "length_penalty": 0.6}, {"finished": "in_place", "vocab_size": 60}],
)
def test_contrast_without_weight_is_the_experts_search_in_the_head(options):
    pair = Pair(vocab=70)
    search = fb.BeamSearch(4, 5, EOS, models=fb.Contrast(0.0, 0.3), **options)
    plain = fb.BeamSearch(4, 5, EOS, **options)
    state, other, tokens, cache = search.init(1), plain.init(1), torch.tensor([7]), None
    while not state.all_done():
        logits, cache = pair(tokens, cache)
        scaled = logits[0] / options.get("temperature", 1.0)
        scaled[:, options.get("vocab_size", 70) :] = -INF
        if cache["prefix"].shape[1] < options.get("min_length", 0):
            scaled[:, EOS] = -INF
        head = pack_bitmask(scaled - scaled.amax(1, keepdim=True) >= math.log(0.3))
        step, want = search.step(state, logits), plain.step(other, logits[0], head)
        assert all(map(torch.equal, step, want))
        tokens, cache = step.tokens.flatten(), fb.reorder(cache, step.source_rows)
    same(search.finalize(state), plain.finalize(other))


def test_contrast_with_itself_falls_back_on_the_expert():
    model = TableLM(40, seed=3, scale=0.5)
    search = fb.BeamSearch(5, 1, models=fb.Contrast(alpha=0.05))
    logits, _ = model(torch.tensor([7]), None)
    state = search.init(1)
    search.step(state, (logits, logits.clone()))
    hyps = search.finalize(state)
    assert (hyps.scores == 0).all()
    assert torch.equal(hyps.tokens[0, :, 0], logits[0].topk(5).indices)


def test_weighted_contrast_with_itself_is_the_experts_search():
    model = TableLM(40, seed=3, scale=0.5)

    def twice(tokens, cache):
        logits, cache = model(tokens, cache)
        return (logits, logits), cache

    contrasted, _ = run(fb.BeamSearch(5, 4, models=fb.Contrast(0.5, alpha=1e-9)), twice)
    same(contrasted, run(fb.BeamSearch(5, 4), model)[0])


@pytest.mark.parametrize(
    "models",
    [
        fb.Mixture([0.3, 0.7]),
        fb.Mixture([1.0, 0.5], "log"),
        fb.Mixture([1.0, 0.5], "log", normalize=False),
        fb.Contrast(),
        fb.Contrast(0.5, divergence="dola", normalize=True),
        fb.Switch("certain", [0.5, 2.0]),
        fb.Switch("model"),
    ],
    ids=str,
)
def test_a_request_is_bitwise_the_same_alone_and_in_a_batch(models):
    pair = Pair(vocab=3000, dtypes=(torch.bfloat16, torch.float32))

    def extras(prefixes):
        return {"gate": torch.tensor([p[-1] % 2 == 0 for p in prefixes])} if models.reads == "gate" else {}

    search = fb.BeamSearch(3, 3, EOS, models=models, temperature=0.9)
    together, _ = run(search, pair, batch=3, extras=extras)
    for b in range(3):
        alone, _ = run(search, pair, bos=(7 + b,), extras=extras)
        assert torch.equal(alone.tokens[0], together.tokens[b]) and torch.equal(alone.scores[0], together.scores[b])


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # numpy, under the interpreter
@pytest.mark.parametrize(
    ("models", "count"),
    [
        (fb.Mixture([0.3, 0.1, 0.2, 0.3, 0.1], temperatures=[1, 2, 1, 1, 0.5]), 5),
        (fb.Mixture([1.0, 0.5], "log", normalize=False), 2),
        (fb.Contrast(0.5, amateur_temperature=0.7, divergence="dola"), 4),
        (fb.Switch("certain"), 2),
    ],
    ids=str,
)
def test_searches_through_the_kernels_equal_those_through_torch(models, count, device, monkeypatch):
    """Exponentials may differ by ulps, so scores are close and tokens equal."""
    several = Pair(vocab=70, models=count, dtypes=(torch.float32, torch.bfloat16))
    search = fb.BeamSearch([3, 2], 4, EOS, models=models, temperature=[1.0, 0.8], vocab_size=69, min_length=2)

    def on(target):
        state, tokens, cache = search.init(2, target), torch.tensor([7, 8]), None
        while not state.all_done():
            logits, cache = several(tokens, cache)
            gate = torch.tensor([[0.0, 1.0, 0.4][p[-1] % 3] for p in cache["prefix"].tolist()]).to(target)
            given = {"gate": gate} if models.reads == "gate" else {}
            step = search.step(state, [x.to(target) for x in logits], **given)
            tokens, cache = step.tokens.flatten().cpu(), fb.reorder(cache, step.source_rows.cpu())
        return search.finalize(state)

    want = on("cpu")
    if device == "cpu":
        for name in ("mixture", "contrast", "divergence"):
            launcher = importlib.import_module(f"flashbeam.kernels.triton.{name}")
            operation = importlib.import_module(f"flashbeam.kernels.{name}")
            monkeypatch.setattr(operation, f"{name}_op", getattr(launcher, f"launch_{name}"))
    got = on(device)
    for name in ("tokens", "lengths", "valid", "finished"):
        assert torch.equal(getattr(got, name).cpu(), getattr(want, name)), name
    for name in ("scores", "log_probs"):
        assert torch.allclose(getattr(got, name).cpu(), getattr(want, name), atol=1e-5), name


RULES = [
    fb.TopK(),
    fb.Stochastic(1),
    fb.ConditionalPoisson(1),
    fb.Arithmetic(1),
    fb.Sample(1, top_k=5, top_p=0.9),
    fb.DiverseGroups(2, 0.5),
    fb.DiverseSiblings(0.5),
    fb.DynamicWidth(0.9),
]


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_every_selection_searches_the_combined_rows(rule):
    pair, weights = Pair(vocab=50, dtypes=(torch.float32, torch.bfloat16)), [0.4, 0.6]

    def combined(tokens, cache):
        logits, cache = pair(tokens, cache)
        lse = torch.stack([summarize(x).lse for x in logits], 1)
        return mixture(logits, torch.tensor(weights).expand(len(lse), -1), lse=lse), cache

    one, _ = run(fb.BeamSearch(4, 4, EOS, selection=rule, models=fb.Mixture(weights)), pair, batch=2)
    same(one, run(fb.BeamSearch(4, 4, EOS, selection=rule), combined, batch=2)[0])
    normalized = fb.BeamSearch(4, 4, EOS, selection=rule, models=fb.Contrast(1.0, normalize=True))
    hyps, state = run(normalized, pair, batch=2)
    assert hyps.valid.all() and int(state.flags.sum()) == 0


@pytest.mark.parametrize("rule", [fb.TopK(), fb.DiverseGroups(2, 0.5)], ids=repr)
def test_one_row_or_k_rows_per_request_at_first(rule):
    search = fb.BeamSearch(4, 5, EOS, selection=rule, models=fb.Switch())
    narrow, wide = search.init(2), search.init(2)
    x, y, gate = torch.randn(2, 30), torch.randn(2, 30), torch.tensor([0.3, 1.0])
    one = search.step(narrow, (x, y), gate=gate)
    junk = torch.full((2, 4, 30), NAN)
    junk[:, 0] = x
    other = search.step(wide, (junk, y[:, None].expand(2, 4, 30)), gate=gate[:, None].repeat(1, 4))
    assert torch.equal(one.tokens, other.tokens) and torch.equal(narrow.log_probs, wide.log_probs)
    assert one.source_rows.tolist() == [0] * 4 + [1] * 4 and other.source_rows.tolist() == [0] * 4 + [4] * 4
    for given in (gate, gate.repeat_interleave(4)):  # per request, and per row
        rows = (torch.arange(240.0).view(8, 30) % 7, torch.arange(240.0).view(8, 30) % 5)
        assert torch.equal(
            search.step(narrow.clone(), rows, gate=given).tokens, search.step(wide.clone(), rows, gate=gate).tokens
        )


def test_hard_switch_with_greedy_model():
    """Where the gate is set the one candidate is the critical model's best token, at its own log-probability or 0."""
    pair = Pair(vocab=9)
    for greedy in ("certain", "model"):
        search = fb.BeamSearch(3, 4, models=fb.Switch(greedy), length_penalty=0)
        hyps, _ = run(search, pair, extras=lambda prefixes: {"gate": torch.tensor([len(p) == 2 for p in prefixes])})
        for n in range(3):
            prefix = (7,)
            for t, token in enumerate(hyps.tokens[0, n].tolist()):
                log_probs = softmaxes(pair.rows(prefix))[int(t == 1)]
                want = log_probs[token]
                if t == 1:
                    assert token == log_probs.argmax()
                    want = 0.0 if greedy == "certain" else want
                assert abs(float(hyps.token_log_probs[0, n, t]) - want) < 1e-5
                prefix = (*prefix, token)


def test_the_greedy_token_is_one_that_may_follow():
    row = torch.tensor([[0.0, 5.0, 4.0, 3.0]])
    mask = pack_bitmask(torch.tensor([[True, True, False, True]]))
    for greedy in ("certain", "model"):
        search = fb.BeamSearch(2, 4, eos_id=1, min_length=2, models=fb.Switch(greedy))
        step = search.step(search.init(1), (torch.zeros(1, 4), row), mask, gate=torch.tensor([1]))
        assert step.tokens[0, 0] == 3 and step.valid.tolist() == [[True, False]]
    trie = fb.BeamSearch(2, 2, models=fb.Switch("certain"), constraint=fb.Trie([[0, 1], [2, 3]]))
    row = pad(row, (0, 396))  # of a large vocabulary a trie would list what may follow
    assert trie.step(trie.init(1), (torch.zeros(1, 400), row), gate=torch.tensor([1])).tokens[0, 0] == 2


def test_the_head_is_of_what_may_follow():
    expert, amateur = torch.tensor([[0.0, 9.0, 4.0, 3.5]]), torch.tensor([[0.0, 0.0, 5.0, 0.0]])
    for normalize in (False, True):
        search = fb.BeamSearch(
            2, 2, eos_id=1, min_length=2, models=fb.Contrast(normalize=normalize), constraint=fb.Prefix([])
        )
        step = search.step(search.init(1), (expert, amateur))
        assert step.tokens[0].tolist() == [3, 2] and step.valid.all()
        trie = fb.BeamSearch(2, 2, models=fb.Contrast(normalize=normalize), constraint=fb.Trie([[0, 1], [2, 3]]))
        step = trie.step(trie.init(1), (pad(expert, (0, 396)), pad(amateur, (0, 396))))
        assert step.tokens[0, 0] == 2 and step.valid.tolist() == [[True, False]]


def test_a_penalty_on_repetition_changes_the_rows_that_are_searched():
    pair, penalty = Pair(vocab=12), fb.RepetitionPenalty(3.0)
    for models in (fb.Mixture([0.5, 0.5]), fb.Contrast(0.5)):
        plain, _ = run(fb.BeamSearch(4, 6, models=models), pair)
        paid, _ = run(fb.BeamSearch(4, 6, models=models, constraint=penalty), pair)
        assert not torch.equal(plain.tokens, paid.tokens)
    same(
        run(fb.BeamSearch(4, 6, models=fb.Mixture([1.0, 0.0]), constraint=penalty), pair)[0],
        run(fb.BeamSearch(4, 6, constraint=penalty), one_of(pair, 0))[0],
    )


def test_a_veto_sees_the_candidates_of_a_contrast():
    pair = Pair(vocab=30)
    free, _ = run(fb.BeamSearch(3, 4, models=fb.Contrast(alpha=0.01)), pair)
    corpus = free.tokens[0, 0].tolist()
    search = fb.BeamSearch(3, 4, models=fb.Contrast(alpha=0.01), constraint=fb.SuffixVeto([corpus], max_span=3))
    assert corpus not in run(search, pair)[0].tokens[0].tolist()


# ---------------------------------------------------------------------------------------------------------------------
# faults and errors


@pytest.mark.parametrize(
    ("models", "extras"),
    [
        (fb.Mixture([0.5, 0.5]), {}),
        (fb.Mixture([0.5, 0.5], "log"), {}),
        (fb.Mixture([1.0, 0.5], "log", normalize=False), {}),
        (fb.Contrast(), {}),
        (fb.Contrast(normalize=True), {}),
        (fb.Switch("certain"), {"gate": torch.tensor([True] * 4)}),
        (fb.Switch("certain"), {"gate": torch.tensor([0.5] * 4)}),
        (fb.Switch("model"), {"gate": torch.tensor([1] * 4)}),
    ],
    ids=str,
)
def test_faults_of_every_model_are_flagged(models, extras):
    x, y = torch.randn(4, 40), torch.randn(4, 40)
    y[1, 5], y[2, 6] = NAN, INF
    search = fb.BeamSearch(2, 3, models=models)
    state = search.init(4)
    step = search.step(state, (x, y), **extras)
    assert state.flags.tolist()[0::3] == [0, 0] and state.flags[1] == fb.FLAG_NAN and state.flags[2] & fb.FLAG_INF
    assert step.valid.any(1).tolist() == [True, True, False, True] and 5 not in step.tokens[1].tolist()


def test_a_token_without_an_amateur_is_barred_and_flagged():
    x, y = torch.randn(1, 40), torch.randn(1, 40)
    y[0, int(x.argmax())] = -INF
    search = fb.BeamSearch(2, 3, models=fb.Contrast(alpha=1e-6))
    state = search.init(1)
    step = search.step(state, (x, y))
    assert state.flags.tolist() == [fb.FLAG_INF] and step.valid.all() and int(x.argmax()) not in step.tokens[0].tolist()


@pytest.mark.parametrize("normalize", [False, True])
def test_what_may_not_follow_needs_no_amateur(normalize):
    """Neither a bitmask's bans nor EOS before its time are in the head, so they have nothing to be flagged for."""
    expert, amateur = torch.tensor([[2.0, 5.0, 1.5, 1.0]]), torch.tensor([[0.0, -INF, 0.5, 0.0]])
    for options, mask in (({}, torch.tensor([[0b1101]], dtype=torch.int32)), ({"eos_id": EOS, "min_length": 2}, None)):
        search = fb.BeamSearch(3, 3, models=fb.Contrast(normalize=normalize), **options)
        state = search.init(1)
        step = search.step(state, (expert, amateur), mask)
        assert state.flags.tolist() == [0] and sorted(step.tokens[0].tolist()) == [0, 2, 3]


def test_a_gate_that_names_no_model_is_a_dead_end():
    search = fb.BeamSearch(2, 3, models=fb.Switch())
    state = search.init(2)
    search.step(state, (torch.zeros(2, 9), torch.zeros(2, 9)), gate=torch.tensor([2, 0]))
    assert state.flags.tolist() == [fb.FLAG_DEAD_END, 0]


X = torch.zeros(1, 9)
STRIDED = torch.zeros(1, 18)[:, ::2]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fb.Mixture([0.5, 0.4]), "weights: expected numbers with a sum of 1, got 0.9"),
        (lambda: fb.Mixture([[0.5, 0.5], [1.0]]), r"weights\[1\]: expected 2 numbers, as weights\[0\] has, got 1"),
        (
            lambda: fb.Mixture(torch.ones(1, device="meta")),
            "weights: expected a list or a CPU tensor, got a tensor on meta",
        ),
        (lambda: fb.Mixture([-1, 2]), r"weights\[0\]: expected a number from 0 to 1e37, got -1"),
        (lambda: fb.Mixture([0, 0], "log"), "weights: expected a weight above 0"),
        (lambda: fb.Mixture(0.5), "weights: expected a list of numbers, or one such list per request, got 0.5"),
        (lambda: fb.Mixture([1.0], "sum"), r"kind: expected one of \['probability', 'log'\], got 'sum'"),
        (lambda: fb.Mixture([1.0], normalize=False), "normalize: expected True for kind='probability'"),
        (lambda: fb.Mixture([0.5, 0.5], temperatures=[1]), "temperatures: expected one per weight, 2, got 1"),
        (lambda: fb.Mixture([1], "log", [2], False), r"temperatures\[0\]: expected 1, as it is the search's own"),
        (lambda: fb.Contrast(-1), "weight: expected a number from 0"),
        (lambda: fb.Contrast(alpha=0), "alpha: expected a number above 0 and at most 1, got 0"),
        (lambda: fb.Contrast(divergence="kl"), r"divergence: expected one of \['jsd', 'dola'\], got 'kl'"),
        (lambda: fb.Switch("best"), r"greedy: expected one of \[None, 'certain', 'model'\], got 'best'"),
        (lambda: fb.BeamSearch(models=fb.Mixture), "models: expected a combination such as"),
        (lambda: fb.BeamSearch(models=fb.Contrast(), stopping=fb.Exact()), "stopping: expected a rule without a bound"),
        (
            lambda: fb.BeamSearch(models=fb.Contrast(), selection=fb.DiverseGroups(2, 1.0)),
            "models: expected a distribution for fb.DiverseGroups, which does not rank by scores, got Contrast",
        ),
        (
            lambda: fb.BeamSearch(models=fb.Mixture([1, 1], "log", normalize=False), selection=fb.Sample(1)),
            "models: expected a distribution for fb.Sample",
        ),
        (lambda: fb.BeamSearch(models=fb.Contrast(), terms=fb.TokenReward(0.1)), "terms: expected none with Contrast"),
        (
            lambda: fb.BeamSearch(models=fb.Contrast(), dialect=fb.Dialect(finishes="double"), eos_id=1),
            "dialect: expected finishes='beam' with Contrast",
        ),
        (lambda: fb.BeamSearch(models=fb.Mixture([[1.0]])).init(2), "weights: expected one list per request, 2, got 1"),
    ],
)
def test_settings_are_checked(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()


@pytest.mark.parametrize(
    ("models", "logits", "extras", "message"),
    [
        (None, X, {"gate": torch.tensor([0])}, r"gate: expected None without models=fb.Switch\(...\), got a tensor"),
        (fb.Switch(), (X, X), {"weights": X[:, :2]}, r"weights: expected None without models=fb.Mixture\(...\)"),
        (fb.Mixture([1.0]), X, {}, "logits: expected a tuple of tensors, one per model, got Tensor"),
        (fb.Mixture([1.0]), (), {}, "logits: expected a tuple of tensors, one per model, got none"),
        (fb.Mixture([0.5, 0.5]), (X,), {}, "logits: expected 2 tensors, one per weight, got 1"),
        (
            fb.Mixture(temperatures=[1, 2]),
            (X,),
            {"weights": X[:, :1]},
            "logits: expected 2 tensors, one per temperature",
        ),
        (
            fb.Mixture([0.5, 0.5]),
            (X, X.double()),
            {},
            r"logits\[1\]: expected float32, float16 or bfloat16, got float64",
        ),
        (fb.Mixture([0.5, 0.5]), (X, X[:, :8]), {}, r"logits\[1\]: expected as many rows and columns as logits\[0\]"),
        (fb.Mixture([0.5, 0.5]), (X, X.expand(4, 9)), {}, r"logits\[1\]: expected as many rows and columns as logits"),
        (fb.Mixture([0.5, 0.5]), (X, None), {}, r"logits\[1\]: expected a tensor, got NoneType"),
        (None, STRIDED, {}, "logits: expected unit stride in the last dimension, got strides"),
        (fb.Mixture([0.5, 0.5]), (X, STRIDED), {}, r"logits\[1\]: expected unit stride in the last dimension"),
        (fb.Mixture(), (X, X), {}, r"weights: expected a tensor, as fb.Mixture\(\) has none, got None"),
        (fb.Mixture(), (X, X), {"weights": [[1.0, 2.0]]}, "weights: expected a tensor, got list"),
        (fb.Mixture(), (X, X), {"weights": X[:, :3]}, r"weights: expected shape \[1, 2\] or \[1, 1, 2\], got \[1, 3\]"),
        (fb.Mixture(), (X, X), {"weights": X[:, :2].double()}, "weights: expected float32, got float64"),
        (fb.Contrast(), (X,), {}, "logits: expected those of the expert and of one amateur or more, got 1 tensor"),
        (fb.Switch(), (X, X), {}, "gate: expected a tensor for fb.Switch, got None"),
        (fb.Switch(), (X,), {"gate": torch.tensor([0])}, "logits: expected those of 2 models or more, got 1 tensor"),
        (fb.Switch(), (X, X, X), {"gate": torch.tensor([True])}, "gate: expected int64, the number of one of 3 models"),
        (fb.Switch("model"), (X, X), {"gate": torch.tensor([0.5])}, "gate: expected bool or int64 for greedy='model'"),
        (fb.Switch(), (X, X), {"gate": torch.zeros(2)}, r"gate: expected shape \[1\] or \[1, 1\], got \[2\]"),
    ],
)
def test_a_step_is_checked_and_changes_nothing(models, logits, extras, message):
    search = fb.BeamSearch(4, 3, models=models)
    state = search.init(1)
    with pytest.raises((ValueError, TypeError), match=message):
        search.step(state, logits, **extras)
    assert state.vocab_size is None and int(state.requests.steps) == 0


def test_phrases_are_refused_where_scores_are_no_log_probabilities():
    search = fb.BeamSearch(4, 3, models=fb.Contrast(), constraint=fb.Phrases([[1, 2]]))
    with pytest.raises(ValueError, match="constraint: expected one without banks for a search with Contrast"):
        search.step(search.init(1), (X, X))


def test_decode_takes_a_model_that_returns_several_logits():
    pair, search = Pair(), fb.BeamSearch(3, 4, EOS, models=fb.Mixture([0.5, 0.5]))
    same(fb.decode(search, pair, torch.tensor([7])), run(search, pair)[0])


@pytest.mark.parametrize(
    ("models", "count"),
    [(fb.Mixture([0.5, 0.5]), 2), (fb.Contrast(), 3), (fb.Switch("certain"), 2), (fb.Switch("model"), 3)],
    ids=str,
)
def test_no_value_is_waited_for(models, count):
    with FakeTensorMode():  # tensors without values: what asked for one would raise
        search = fb.BeamSearch(3, 6, 2, min_length=2, temperature=0.5, models=models)
        state = search.init(2)
        for rows in (2, 6, 6):
            given = {"gate": torch.zeros(rows, dtype=torch.int64 if count == 3 else torch.float32)}
            logits = [torch.zeros(rows, 50), *[torch.zeros(rows, 50, dtype=torch.bfloat16)] * (count - 1)]
            step = search.step(state, logits, **(given if models.reads == "gate" else {}))
        assert step.tokens.shape == (2, 3)
