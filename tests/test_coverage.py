"""Coverage penalties: by hand, told anew, by enumeration, and whatever the padding."""

import math

import pytest
import torch

import flashbeam as fb
import scoring_oracles as oracle
from oracles import TableLM, enumerate_leaves

EOS = 1
REGIMES = ["pool", "in_place"]
FIELDS = ("tokens", "scores", "log_probs", "valid")


def decode(search, model, bos, source_lengths=None, dtype=torch.float32):
    state, tokens, cache = search.init(len(bos), source_lengths=source_lengths), torch.tensor(bos), None
    while not state.all_done():
        logits, cache, attention = model(tokens, cache)
        step = search.step(state, logits, attention=attention.to(dtype))
        tokens, cache = step.tokens.flatten(), fb.reorder(cache, step.source_rows)
    return search.finalize(state)


def returned(hyps, b=0):
    return [
        (tuple(hyps.tokens[b, i, : hyps.lengths[b, i]].tolist()), float(hyps.scores[b, i]))
        for i in range(hyps.valid[b].sum())
    ]


def test_by_hand():
    """Two tokens and EOS are certain; positions are paid 1.5, 0.5, 1.0 in all, and one is never looked at."""
    paid = torch.tensor([[0.75, 0.25, 0.0, 0.0], [0.5, 0.25, 0.25, 0.0], [0.25, 0.0, 0.75, 0.0]])
    said = [3, 2, EOS]
    terms = {
        ("gnmt", None): math.log(0.5),  # what nobody looks at is taken for padding
        ("gnmt", 4): math.log(0.5) + math.log(torch.finfo(torch.float32).tiny),
        ("summary", None): -0.5,
        ("summary", 4): -0.5,
    }
    for (kind, source), want in terms.items():
        search = fb.BeamSearch(1, 5, EOS, length_penalty=0, terms=fb.Coverage(0.2, kind))
        state = search.init(1, source_lengths=None if source is None else [source])
        for token, attention in zip(said, paid, strict=True):
            logits = torch.full((1, 5), -torch.inf)
            logits[0, token] = 0.0
            search.step(state, logits, attention=attention[None])
        hyps = search.finalize(state)
        assert hyps.tokens[0, 0, :3].tolist() == said and float(hyps.log_probs[0, 0]) == 0.0
        assert float(hyps.scores[0, 0]) == pytest.approx(0.2 * want, rel=1e-6)


@pytest.mark.parametrize("kind", ["gnmt", "summary"])
@pytest.mark.parametrize("regime", REGIMES)
def test_a_beam_wide_enough_finds_the_best_of_all(kind, regime):
    for seed, (alpha, told_lengths) in enumerate([(0.0, True), (1.0, False), (0.6, True)]):
        model = oracle.AttendingLM(TableLM(4, seed), {5: 2, 6: 3}, seed=seed)
        others = [(), fb.UID("variance", 0.2)][seed % 2]
        terms = [fb.Coverage([0.4, 1.5], kind), *([others] if others else [])]
        search = fb.BeamSearch(60, 4, EOS, length_penalty=alpha, finished=regime, terms=terms, stopping=fb.Exact())
        hyps = decode(search, model, [5, 6], [2, 3] if told_lengths else None)
        for b, (bos, beta) in enumerate([(5, 0.4), (6, 1.5)]):
            told = [oracle.coverage(beta, kind), *([oracle.uid("variance", 0.2)] if others else [])]
            want = {
                leaf.tokens: oracle.score(
                    oracle.path(model.lm.logits, bos, leaf.tokens, attention=model), len(leaf.tokens) ** alpha, told
                )
                for leaf in enumerate_leaves(model.lm.logits, bos, eos=[EOS], max_length=4)
            }
            found = returned(hyps, b)
            best = sorted(want.values(), reverse=True)[:60]
            assert [score for _, score in found] == pytest.approx(best, rel=5e-6, abs=5e-6)
            for tokens, score in found:
                assert score == pytest.approx(want[tokens], rel=5e-6, abs=5e-6)


@pytest.mark.parametrize("kind", ["gnmt", "summary"])
def test_padding_and_company_change_no_bit(kind):
    sizes = {5: 3, 6: 7, 7: 1, 8: 30}
    options = dict(length_penalty=1.0, terms=fb.Coverage(0.7, kind), stopping=fb.Exact())
    search = fb.BeamSearch(3, 7, EOS, **options)
    lm = TableLM(7, 0)
    together = decode(search, oracle.AttendingLM(lm, sizes, pad_to=45), list(sizes), list(sizes.values()))
    for b, (bos, size) in enumerate(sizes.items()):
        for known in (None, [size]):
            alone = decode(search, oracle.AttendingLM(lm, {bos: size}), [bos], known)
            for name in FIELDS:
                assert torch.equal(getattr(alone, name)[0], getattr(together, name)[b]), (name, size)


@pytest.mark.parametrize("kind", ["gnmt", "summary"])
def test_the_order_of_the_source_changes_no_bit(kind):
    """So that no device's way to add it up can."""
    generator = torch.Generator().manual_seed(0)
    attention = torch.rand(5, 4, 1000, generator=generator) ** 8
    order = torch.randperm(1000, generator=generator)
    found = []
    for paid in (attention, attention[:, :, order]):
        search = fb.BeamSearch(4, 5, EOS, length_penalty=0, terms=fb.Coverage(1.0, kind), stopping=fb.Exhausted())
        state = search.init(1)
        for step, rows in enumerate(paid):
            search.step(state, torch.randn(4, 50, generator=torch.Generator().manual_seed(step)), attention=rows)
        found.append(search.finalize(state))
    assert torch.equal(found[0].scores, found[1].scores) and torch.equal(found[0].tokens, found[1].tokens)


def test_exact_stopping_returns_what_exhaustion_does():
    for seed in range(12):
        model = oracle.AttendingLM(TableLM(6, seed, eos=[EOS], eos_bias=1.0), {5: 2, 6: 4, 7: 3}, seed=seed)
        kind, regime = ["gnmt", "summary"][seed % 2], REGIMES[seed % 3 // 2]
        terms = [fb.Coverage([0.1, 0.4, 1.0], kind), fb.TokenReward(0.2, up_to=3)]
        options = dict(length_penalty=[0.0, 1.0, -0.3], finished=regime, terms=terms)
        whole, early = (
            decode(fb.BeamSearch([1, 2, 4], 8, EOS, stopping=rule, **options), model, [5, 6, 7])
            for rule in (fb.Exhausted(), fb.Exact())
        )
        for name in FIELDS:
            assert torch.equal(getattr(whole, name), getattr(early, name)), name


def test_no_strength_changes_no_bit():
    model = oracle.AttendingLM(TableLM(6, 1), {5: 4})
    for regime in REGIMES:
        options = dict(beam_size=4, max_length=6, eos_id=EOS, finished=regime)
        termed = decode(fb.BeamSearch(**options, terms=fb.Coverage(0)), model, [5], dtype=torch.bfloat16)
        plain = fb.decode(fb.BeamSearch(**options), model.lm, torch.tensor([5]))
        for name in FIELDS:
            assert torch.equal(getattr(plain, name), getattr(termed, name)), name


@pytest.mark.parametrize("capture", [False, True])
def test_decode_passes_attention_on(capture):
    lm = TableLM(6, 1)
    model = oracle.AttendingLM(lm, {5: 4, 6: 2})
    search = fb.BeamSearch(4, 6, EOS, terms=fb.Coverage(0.3))

    def static(tokens, prefix):  # a cache of one shape, as capture asks for
        at = (prefix >= 0).sum(1)[:1]
        prefix = prefix.index_copy(1, at, tokens.reshape(-1, 1))
        rows = [tuple(t for t in row if t >= 0) for row in prefix.tolist()]
        logits = torch.stack([torch.from_numpy(lm.logits(row).copy()) for row in rows])
        return logits, prefix, torch.stack([torch.from_numpy(model.attention(row)) for row in rows]).float()

    want = decode(search, model, [5, 6])
    got = fb.decode(search, static, torch.tensor([5, 6]), torch.full((2, 8), -1), capture=capture)
    for name in FIELDS:
        assert torch.equal(getattr(want, name), getattr(got, name)), name


def test_attention_is_checked_before_anything_changes():
    search = fb.BeamSearch(2, 4, EOS, terms=fb.Coverage(0.1))
    state = search.init(3)

    def refused(error, message, attention, logits=None):
        with pytest.raises(error, match=message):
            search.step(state, torch.zeros(3, 5) if logits is None else logits, attention=attention)

    refused(ValueError, r"attention: expected a tensor for Coverage\(beta=0.1", None)
    refused(TypeError, "attention: expected a tensor, got list", [[1.0]])
    refused(TypeError, "attention: expected float32, float16 or bfloat16, got float64", torch.zeros(3, 4).double())
    refused(ValueError, r"attention: expected shape \[3, S\] or \[3, 1, S\], got \[2, 4\]", torch.zeros(2, 4))
    refused(ValueError, r"attention: expected a tensor on cpu", torch.zeros(3, 4, device="meta"))
    assert state.source_size is None
    search.step(state, torch.zeros(3, 5), attention=torch.ones(3, 1, 4))
    refused(ValueError, r"expected shape \[6, 4\] or \[3, 2, 4\], got \[6, 5\]", torch.zeros(6, 5), torch.zeros(6, 5))
    search.step(state, torch.zeros(6, 5), attention=torch.ones(3, 2, 4))
    plain = fb.BeamSearch(2, 4, EOS)
    with pytest.raises(ValueError, match=r"attention: expected None without a term that reads it, such as fb\.Cov"):
        plain.step(plain.init(3), torch.zeros(3, 5), attention=torch.zeros(3, 4))
    with pytest.raises(ValueError, match="kind: expected 'gnmt' or 'summary', got 'wu'"):
        fb.Coverage(0.1, "wu")
    with pytest.raises(ValueError, match="beta: expected a number from 0"):
        fb.Coverage(-0.1)
