"""What constraints ask of the device: no value is waited for, lists are not read past, captured steps go on."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import flashbeam as fb
from test_launches import recorded

V = 60
CONSTRAINTS = {
    "trie": lambda: fb.Trie([[3, 4, 5], [3, 4], [9, 9, 9, 9]]),
    "automaton": lambda: fb.Automaton([0, 3, 4, 4], [3, 4, 5, 9], [1, 0, 2, 2], [False, False, True]),
    "phrases": lambda: fb.Phrases([[3, 4], [[5], [6, 7]]]),
    "ordered phrases": lambda: fb.Phrases([[3, 4], [5]], ordered=True),
    "forbidden": lambda: fb.ForbiddenPhrases([[3, 4], [5]]),
    "ngram": lambda: fb.NoRepeatNgram(2),
    "prefix": lambda: fb.Prefix([3, 4]),
    "penalty": lambda: fb.RepetitionPenalty(1.3),
    "veto": lambda: fb.SuffixVeto([3, 4, 5, 6, 7, 8], 2),
    "copy": lambda: fb.Copy([3, 4, 5, 6, 7, 8, 9], monotone=False, min_span=2),
    "all of": lambda: fb.AllOf(fb.Trie([[3, 4, 5], [6, 3]]), fb.NoRepeatNgram(1), fb.RepetitionPenalty(1.1)),
}
NAMES = pytest.mark.parametrize("name", CONSTRAINTS)


@NAMES
@pytest.mark.parametrize("rule", [fb.TopK(), fb.Stochastic(1), fb.DiverseGroups(2, 0.5)], ids=repr)
@pytest.mark.parametrize("options", [False, True])
def test_no_value_is_waited_for(name, rule, options):
    # tensors without values: what asked for one would raise
    settings = {"eos_id": 2}
    if options:
        settings = {"eos_id": [1, 2], "min_length": 2, "temperature": [0.5, 2.0], "normalize": "allowed"}
    constraint = [CONSTRAINTS[name](), None if options else CONSTRAINTS[name]()]
    with FakeTensorMode():
        search = fb.BeamSearch([4, 2], 6, selection=rule, constraint=constraint, **settings)
        state = search.init(2)
        search.step(state, torch.zeros(2, V))
        step = search.step(state, torch.zeros(8, V))
        step = search.step(state, torch.zeros(8, V))
        assert [tuple(field.shape) for field in step] == [(2, 4), (2, 4), (8,), (2, 4)]


@NAMES
def test_the_number_of_operations_does_not_grow_with_the_step(name):
    logits = [torch.randn(2, V), *torch.randn(4, 6, V)]
    search = fb.BeamSearch(3, 40, 2, constraint=CONSTRAINTS[name]())
    assert len(recorded(search, 2, logits)) == len(recorded(search, 2, logits + logits[1:] * 5))


def test_a_listed_step_makes_no_pass_where_the_list_is_the_distribution():
    logits = [torch.randn(2, V), torch.randn(6, V), torch.randn(6, V)]
    for normalize, passes in (("allowed", 0), ("vocab", 1)):
        search = fb.BeamSearch(3, 5, 2, constraint=CONSTRAINTS["trie"](), normalize=normalize)
        assert recorded(search, 2, logits).count("flashbeam::summarize") == passes


@pytest.mark.skipif(not torch.cuda.is_available(), reason="captures a CUDA graph")
@NAMES
def test_a_captured_step_goes_on_as_an_eager_one(name):
    search = fb.BeamSearch(4, 12, 2, constraint=CONSTRAINTS[name]())
    logits, first = torch.randn(8, 9001, device="cuda"), torch.randn(2, 9001, device="cuda")
    eager, replayed = search.init(2, "cuda"), search.init(2, "cuda")
    for state in (eager, replayed):
        search.step(state, first)
        search.step(state, logits)  # compiles
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        search.step(replayed.clone(), logits)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        search.step(replayed, logits)  # recorded, not run
    for _ in range(5):
        graph.replay()
        search.step(eager, logits)
    one, other = search.finalize(eager), search.finalize(replayed)
    assert torch.equal(one.tokens, other.tokens)
    assert torch.equal(one.scores, other.scores)
