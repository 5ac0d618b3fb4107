"""``fb.RepetitionPenalty`` against the formula in numpy, and against transformers where it is installed."""

import itertools
import math

import numpy as np
import pytest
import torch

import flashbeam as fb
from flashbeam import AllOf, NoRepeatNgram, RepetitionPenalty
from legal import as_dicts, assert_batch_invariant, assert_same, context, search_all
from oracles import TableLM, enumerate_leaves


def penalised(logits, said, penalty):
    """float32 ``[V]``."""
    logits = logits.astype(np.float32)
    for token in set(said):
        if logits[token] > 0:
            logits[token] /= np.float32(penalty)
        else:
            logits[token] *= np.float32(penalty)
    return logits


def bound_to(constraints, **where):
    return RepetitionPenalty.bind(constraints, context(len(constraints), **where))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_adjusts_as_the_formula_says(dtype):
    constraints = [RepetitionPenalty(1.3), RepetitionPenalty(0.7, [4, 4, 0]), None, RepetitionPenalty(5, [2])]
    bound = bound_to(constraints, beams=2, vocab=6, max_length=5)
    rng = np.random.default_rng(0)
    sequences, state = rng.integers(0, 6, (8, 5)), bound.init()
    for t in range(6):
        logits = torch.from_numpy(rng.normal(size=(8, 6)).astype(np.float32)).to(dtype)
        logits[:, 1], logits[0, 2], logits[7, 2] = -0.0, -math.inf, math.inf
        before = logits.clone()
        got = bound.adjust(state, logits)
        assert torch.equal(logits, before) and got.dtype == torch.float32
        for row, constraint in enumerate(np.repeat(constraints, 2)):
            want = logits[row].float().numpy()
            if constraint is not None:
                want = penalised(want, [*constraint.prompt, *sequences[row, :t]], constraint.penalty)
            assert torch.equal(got[row].view(torch.int32), torch.from_numpy(want).view(torch.int32)), (t, row)
        if t < 5:
            state = bound.advance(state, torch.from_numpy(sequences[:, t]))


def test_matches_transformers():
    transformers = pytest.importorskip("transformers")
    bound = bound_to([RepetitionPenalty(1.7, [5, 2])], beams=3, vocab=40, max_length=8)
    peer = transformers.RepetitionPenaltyLogitsProcessor(1.7)
    state, said = bound.init(), torch.tensor([[5, 2]] * 3)
    for _ in range(8):
        logits = torch.randn(3, 40)
        assert torch.equal(bound.adjust(state, logits), peer(said, logits.clone()))
        tokens = torch.randint(0, 40, (3,))
        state, said = bound.advance(state, tokens), torch.cat([said, tokens[:, None]], 1)


def test_nan_stays():
    bound = bound_to([RepetitionPenalty(2.0, [0, 1])])
    got = bound.adjust(bound.init(), torch.tensor([[math.nan, math.inf, math.nan, 1.0]]))
    assert got.isnan().tolist() == [[True, False, True, False]] and got[0, 1] == math.inf


def test_one_changes_nothing():
    bound, logits = bound_to([RepetitionPenalty(1.0, [0]), None]), torch.randn(2, 4)
    assert bound.adjust(bound.init(), logits) is logits
    bound = bound_to([RepetitionPenalty(1.0, [0, 1]), RepetitionPenalty(2.0, [0])])
    assert torch.equal(bound.adjust(bound.init(), logits)[0], logits[0])


def expected(penalty, prompt=(), bos=0, temperature=1.0, legal=None, **options):
    model = TableLM(4)

    def logits(prefix):
        return penalised(model.logits(prefix), [*prompt, *prefix[1:]], penalty)

    mask = None if legal is None else lambda prefix: np.array([legal(prefix[1:], token) for token in range(4)])
    leaves = enumerate_leaves(logits, bos, temperature=temperature, mask=mask, **options)
    return {leaf.tokens: leaf.log_prob for leaf in leaves}


@pytest.mark.parametrize(
    "options",
    [
        dict(eos=(), max_length=4),
        dict(eos=(3,), max_length=4, temperature=0.5),
        dict(eos=(3,), max_length=4, min_length=3, finished="in_place"),
        dict(eos=(1, 3), max_length=4, normalize="allowed", temperature=2.0),
        dict(eos=(3,), max_length=4, min_length=2, selection=fb.Stochastic(seed=1)),
    ],
)
def test_search_ranks_penalised_log_probs(options):
    penalties = [(1.5, []), (0.5, [2, 3]), (1.0, [1]), (30.0, [0, 0])]
    constraints = [RepetitionPenalty(*each) for each in penalties]
    eos = options["eos"]
    asked = {name: value for name, value in options.items() if name != "eos"}
    got = search_all([*constraints, None], 4, 5, eos_id=list(eos) or None, **asked)
    known = {name: value for name, value in options.items() if name not in ("finished", "selection")}
    for bos, (penalty, prompt) in enumerate([*penalties, (1.0, [])]):
        assert_same(got[bos], expected(penalty, prompt, bos, **known))


def test_with_other_constraints():
    both = AllOf(RepetitionPenalty(1.5, [1]), NoRepeatNgram(2), RepetitionPenalty(2.0, [1]))
    legal = lambda said, token: (*said[-1:], token) not in itertools.pairwise(said)  # noqa: E731
    model = TableLM(4)

    def logits(prefix):
        once = penalised(model.logits(prefix), [1, *prefix[1:]], 1.5)
        return penalised(once, [1, *prefix[1:]], 2.0)

    leaves = enumerate_leaves(
        logits, 0, eos=(), max_length=4, mask=lambda p: np.array([legal(p[1:], token) for token in range(4)])
    )
    assert_same(search_all(both, 4, max_length=4)[0], {leaf.tokens: leaf.log_prob for leaf in leaves})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("selection", [fb.TopK(), fb.Stochastic(seed=3), fb.ConditionalPoisson(seed=3)])
def test_batch_invariant(selection, dtype):
    class Model(TableLM):
        def __call__(self, tokens, cache):
            logits, cache = super().__call__(tokens, cache)
            return logits.to(dtype), cache

    constraints = [RepetitionPenalty(1.5, [1, 2, 1]), None, RepetitionPenalty(1.0), RepetitionPenalty(3.0)]
    assert_batch_invariant(constraints, 70, model=Model(70), max_length=6, eos_id=6, selection=selection)


def test_padded_vocabulary():
    search = fb.BeamSearch(2, 3, vocab_size=3, constraint=RepetitionPenalty(2.0, [0]))
    state = search.init(1)
    search.step(state, torch.tensor([[1.0, 0.0, 0.0, 9.0]]))
    want = torch.log_softmax(torch.tensor([0.5, 0.0, 0.0]), 0)
    assert torch.allclose(state.log_probs[0], want[:2])


def test_discourages():
    model = lambda tokens, cache: (torch.tensor([[2.0, 1.5, -1.0]]).repeat(len(tokens), 1), cache)  # noqa: E731
    search = fb.BeamSearch(1, 4, constraint=RepetitionPenalty(2.0))
    hyps = fb.decode(search, model, torch.tensor([0]), torch.zeros(1))
    assert next(iter(as_dicts(hyps)[0])) == (0, 1, 0, 0)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0,), ValueError, "penalty: expected a number above 0, got 0"),
        (("2",), TypeError, "penalty: expected a number, got str"),
        ((math.inf,), ValueError, "penalty: expected a finite number, got inf"),
        ((2.0, [0.5]), TypeError, "prompt: expected ints, got float64"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        RepetitionPenalty(*arguments)


def test_ids_outside_the_vocabulary():
    search = fb.BeamSearch(2, 4, constraint=RepetitionPenalty(2.0, [7]))
    with pytest.raises(ValueError, match="prompt: expected ids inside the vocabulary of 5, got 7"):
        search.step(search.init(1), torch.zeros(1, 5))
