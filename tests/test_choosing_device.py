"""What the choosing rules ask of the device: no value is waited for, and the randomness is in tensors it holds."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import flashbeam as fb
from test_launches import recorded

RULES = [
    fb.TopK(),
    fb.Stochastic(1),
    fb.ConditionalPoisson(1),
    fb.Sample(1),
    fb.Sample(1, top_k=5, top_p=0.9, min_p=0.1),
    fb.Arithmetic(1),
    fb.DiverseGroups(2, 0.5),
    fb.DiverseSiblings(0.5),
    fb.DynamicWidth(0.9),
]
SAMPLERS = [rule for rule in RULES if rule.seed is not None]


@pytest.mark.parametrize("rule", RULES, ids=repr)
@pytest.mark.parametrize("vocab", [50, 3000, 9000])  # conditional Poisson lists all, looks at all, or at tiles
@pytest.mark.parametrize("options", [False, True])
@pytest.mark.parametrize("wide_first", [False, True])
def test_no_value_is_waited_for(rule, vocab, options, wide_first):
    # tensors without values: what asked for one would raise
    settings = {"eos_id": None}
    if options:
        settings = {"eos_id": [2, 3], "min_length": 2, "temperature": [0.5, 2.0], "normalize": "allowed"}
    with FakeTensorMode():
        search = fb.BeamSearch([4, 2], 6, selection=rule, **settings)
        state = search.init(2)
        mask = torch.zeros(2, -(-vocab // 32), dtype=torch.int32) if options else None
        step = search.step(state, torch.zeros(8 if wide_first else 2, vocab), mask)
        for dtype in (torch.float32, torch.bfloat16):
            step = search.step(state, torch.zeros(8, vocab, dtype=dtype), mask)
        assert [tuple(field.shape) for field in step] == [(2, 4), (2, 4), (8,), (2, 4)]
        assert state.done.shape == state.flags.shape == (2,)
        assert state.log_probs.shape == (2, 4)
        if rule.groups == 1:
            hyps = search.finalize(state)
            assert hyps.tokens.shape == (2, 4, 6)


LOGITS = [torch.randn(2, 50), *torch.randn(4, 6, 50)]


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule.groups == 1], ids=repr)
def test_the_number_of_operations_does_not_grow_with_the_step(rule):
    search = fb.BeamSearch(3, 40, None, selection=rule)
    assert len(recorded(search, 2, LOGITS)) == len(recorded(search, 2, LOGITS + LOGITS[1:] * 5))


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_one_pass_over_the_logits(rule):
    search = fb.BeamSearch(4, 9, 2, selection=rule)
    names = recorded(search, 2, [torch.randn(2, 50), torch.randn(8, 50)])
    passes = 2 if rule == RULES[4] else 1  # what filters leave is summarised again
    assert names.count("flashbeam::summarize") == passes


@pytest.mark.parametrize("rule", SAMPLERS, ids=repr)
def test_the_seed_is_read_from_the_device_at_every_step(rule):
    # a captured graph replays the same operations on the same tensors
    def run(seed):
        search = fb.BeamSearch(3, 4, None, selection=rule)
        state = search.init(20)
        if seed is not None:
            state.seed.fill_(seed)
        search.step(state, LOGITS[0][:1].expand(20, -1))
        for logits in LOGITS[1:4]:
            search.step(state, logits[:1].expand(60, -1))
        return search.finalize(state).tokens

    assert torch.equal(run(None), run(rule.seed))
    assert not torch.equal(run(None), run(7))


@pytest.mark.parametrize("rule", SAMPLERS, ids=repr)
def test_steps_draw_fresh_numbers(rule):
    # the same logits at every step: only the prefix tells the steps apart
    search = fb.BeamSearch(1, 12, None, selection=rule)
    state = search.init(8)
    for _ in range(12):
        search.step(state, torch.zeros(8, 50))
    tokens = search.finalize(state).tokens[:, 0]
    assert all(len(set(row)) > 3 for row in tokens.tolist())
    assert len({tuple(row) for row in tokens.tolist()}) == 8


@pytest.mark.skipif(not torch.cuda.is_available(), reason="captures a CUDA graph")
@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_a_captured_step_goes_on_as_an_eager_one(rule):
    search = fb.BeamSearch(4, 12, 2, selection=rule, temperature=0.7)
    logits = torch.randn(8, 9001, device="cuda")
    first = torch.randn(2, 9001, device="cuda")
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
