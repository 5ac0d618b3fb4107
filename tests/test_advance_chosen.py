"""The bookkeeping of a step that is decided: against Python, and kernel against torch, every tensor of the state."""

from __future__ import annotations

import random

import pytest
import torch
from torch.utils import _pytree as pytree

import flashbeam as fb
from flashbeam.kernels import advance_chosen, draw, pack_bitmask
from flashbeam.kernels import random as noise
from flashbeam.kernels.advance_chosen import Choice, advance_chosen_
from flashbeam.kernels.beamstate import Draws, History, Limits, Requests, Slots
from flashbeam.kernels.triton.advance_chosen import launch_advance_chosen_
from flashbeam.kernels.triton.draw import launch_draw
from oracles import TableLM
from test_random import mix_by_hand

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
# 64-bit hashes wrap, as they must
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

INF = float("inf")
DEFINITION = advance_chosen._op
ROW_FLAGS, DEAD_END = (1, 2, 8), 4  # NaN, +inf, inexact


def random_step(seed, batch=3, beams=4, steps=5, vocab_size=9):
    """Arguments of the operation: any state, and any choice. Some requests are done, some slots hold nothing."""
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, beams)

    def floats(*sizes):
        return -torch.rand(sizes, generator=generator) * 9

    def ids(high, *sizes, dtype=torch.int64):
        return torch.randint(high, sizes, generator=generator).to(dtype)

    def bools(p, *sizes):
        return torch.rand(sizes, generator=generator) < p

    def bits(*sizes):
        return torch.randint(-(2**63), 2**63 - 1, sizes, generator=generator)

    chosen = floats(*shape).masked_fill(bools(rng.choice([0.0, 0.3, 0.9]), *shape), -INF)
    choice = Choice(
        ids(vocab_size, *shape),
        ids(beams, *shape),
        floats(*shape),
        chosen,
        *(floats(*shape) for _ in range(3)),
        bits(*shape),
    )
    slots = Slots(
        floats(*shape),
        ids(steps, *shape, dtype=torch.int32),
        ids(beams, *shape, dtype=torch.int32),
        bools(rng.choice([0.0, 0.3, 0.9]), *shape),
        bools(0.5, *shape),
        floats(*shape),
    )
    done = bools(0.25, batch)
    made = ids(steps, batch, dtype=torch.int32)
    table = (batch, steps + 1)
    limits = Limits(
        1 + ids(beams, batch, dtype=torch.int32) if rng.random() < 0.5 else torch.full((batch,), beams).int(),
        torch.zeros(batch, dtype=torch.int32),
        torch.where(bools(0.3, batch), made + 1, steps).int(),
        torch.full((batch,), beams).int(),
        torch.ones(table),
        torch.ones(table),
    )
    rows = batch * rng.choice([1, beams])
    flags = torch.zeros(rows, dtype=torch.int32)
    if rng.random() < 0.5:
        flags = (ids(16, rows, dtype=torch.int32) & sum(ROW_FLAGS)) * bools(0.3, rows)
    eos = rng.choice([None, torch.tensor([2]), torch.tensor([0, 5, 8])])
    per_step = (steps, *shape)
    return [
        choice,
        flags,
        eos,
        slots,
        Draws(bits(*shape), floats(*shape), floats(*shape), bits(*shape)),
        Requests(done, ids(8, batch, dtype=torch.int32), torch.where(done, made + 1, made)),
        History(ids(9, *per_step, dtype=torch.int32), ids(9, *per_step, dtype=torch.int32), floats(*per_step)),
        limits,
        rng.randint(0, 3),
    ]


def copied(arguments, device="cpu"):
    """Lists, as the schema has them, of copies of every tensor."""
    moved = pytree.tree_map_only(torch.Tensor, lambda t: t.clone().to(device), arguments)
    return [list(a) if isinstance(a, tuple) else a for a in moved]


def assert_same(got, want):
    got, want = (pytree.tree_leaves(pytree.tree_map_only(tuple, list, tree)) for tree in (got, want))
    for i, (x, y) in enumerate(zip(got, want, strict=True)):
        if torch.is_tensor(x):
            assert x.dtype == y.dtype and torch.equal(x.cpu(), y.cpu()), i
        else:
            assert x == y


def step_by_hand(choice, row_flags, eos, slots, draws, requests, history, limits, pad_id):
    """One request and one slot at a time; changes the tensors, returns the moves as lists."""
    batch, beams = slots.log_probs.shape
    per_request = len(row_flags) // batch
    eos = [] if eos is None else eos.tolist()
    tokens, parents, sources, valid = [], [], [], []
    for b in range(batch):
        live, step = not requests.done[b], int(requests.steps[b])
        before = [[field[b].tolist() for field in group] for group in (slots, draws)]
        old_lengths, old_ended, old_nodes = before[0][1], before[0][3], before[1][0]
        kept = [live and slot < limits.width[b] and choice.log_probs[b, slot].item() > -INF for slot in range(beams)]
        own = [choice.parents[b, slot].item() for slot in range(beams)]
        token = [choice.tokens[b, slot].item() for slot in range(beams)]
        frozen = [old_ended[parent] for parent in own]
        ends = [frozen[slot] or token[slot] in eos for slot in range(beams)]
        for flag in ROW_FLAGS:
            if any(f & flag for f in row_flags[b * per_request : (b + 1) * per_request].tolist()):
                requests.flags[b] |= flag
        for slot in range(beams):
            tokens.append(token[slot] if kept[slot] else pad_id)
            parents.append(own[slot] if kept[slot] else slot)
            moves = kept[slot] and not frozen[slot]
            sources.append(b * per_request + (own[slot] if moves else min(slot, per_request - 1)))
            valid.append(kept[slot])
        goes_on = [kept[slot] and not ends[slot] for slot in range(beams)]
        if live:
            if not any(kept):
                requests.flags[b] |= DEAD_END
            requests.done[b] = not any(goes_on) or step + 1 == limits.max_length[b]
            requests.steps[b] += 1
            each = [x if keep else -INF for x, keep in zip(choice.token_log_probs[b].tolist(), kept, strict=True)]
            for field, values in zip(history, (token, own, each), strict=True):
                field[step, b] = torch.as_tensor(values).to(field.dtype)
        for slot in range(beams):
            slots.active[b, slot] = goes_on[slot] and not requests.done[b]
            if not live:
                continue
            keep = kept[slot]
            for field, value in (
                (slots.log_probs, choice.log_probs[b, slot] if keep else -INF),
                (slots.scores, choice.scores[b, slot] if keep else -INF),
                (draws.sampling_log_probs, choice.sampling_log_probs[b, slot] if keep else -INF),
                (draws.inclusion, choice.inclusion[b, slot] if keep else 0.0),
                (draws.codes, choice.codes[b, slot]),
                (slots.lengths, old_lengths[own[slot]] if frozen[slot] else step + 1),
                (slots.ranks, slot),
                (slots.ended, keep and ends[slot]),
            ):
                field[b, slot] = value
            node = old_nodes[own[slot]]
            child = mix_by_hand(node * 0xD1342543DE82EF95 + token[slot] + 1)
            draws.nodes[b, slot] = node if frozen[slot] else child
    return tokens, parents, sources, valid


@pytest.mark.parametrize("seed", range(60))
def test_matches_python(seed):
    arguments = random_step(seed)
    by_hand = pytree.tree_map_only(torch.Tensor, torch.clone, arguments)
    choice, flags, eos, *state, pad_id = arguments
    moves = advance_chosen_(choice, flags, *state, eos=eos, pad_id=pad_id)
    wanted = step_by_hand(*by_hand)
    for field, want in zip(moves, wanted, strict=True):
        assert field.flatten().tolist() == want
    assert_same(arguments, by_hand)


@pytest.mark.parametrize("seed", range(24))
def test_matches_reference(seed, device):
    arguments = random_step(seed, batch=2, beams=1 + seed % 5)
    copies = copied(arguments, device)
    want = DEFINITION(*arguments)
    assert_same(launch_advance_chosen_(*copies), want)
    assert_same(copies, arguments)


def test_wide_beam(device):
    """Eight warps, 128 slots of which 70 are used."""
    for seed in range(2):
        arguments = random_step(seed, beams=70, vocab_size=40)
        copies = copied(arguments, device)
        want = DEFINITION(*arguments)
        assert_same(launch_advance_chosen_(*copies), want)
        assert_same(copies, arguments)


def test_batch_invariant_bitwise(device):
    """A request alone, and as the second of three."""
    arguments = random_step(5)
    alone = pytree.tree_map_only(torch.Tensor, torch.clone, arguments)
    alone[1] = alone[1].view(3, -1)[1]
    for i in (0, 3, 4, 5, 7):
        alone[i] = type(alone[i])(*(field[1:2].clone() for field in alone[i]))
    alone[6] = History(*(field[:, 1:2].clone() for field in alone[6]))
    given = [copied(arguments), copied(alone), copied(arguments, device), copied(alone, device)]
    for together, single, op in ((*given[:2], DEFINITION), (*given[2:], launch_advance_chosen_)):
        op(*together)
        op(*single)
        for i in (3, 4, 5):
            assert_same(single[i], [field[1:2] for field in together[i]])
        assert_same(single[6], [field[:, 1:2] for field in together[6]])


def test_what_is_not_declared_is_not_modified(device):
    arguments = random_step(3)
    for copies, op in ((copied(arguments), DEFINITION), (copied(arguments, device), launch_advance_chosen_)):
        op(*copies)
        assert_same([copies[i] for i in (0, 1, 2, 7)], [arguments[i] for i in (0, 1, 2, 7)])


SEARCH = {"eos_id": [4, 9], "selection": fb.Stochastic(3), "temperature": [1.0, 0.8], "vocab_size": 69}


def test_search_through_the_kernels_equals_the_search_through_torch(device, monkeypatch):
    """Drawing and bookkeeping; sums may differ by ulps, so the scores are close and the tokens equal."""
    model = TableLM(70, seed=5, eos=[4], eos_bias=3.0)

    def on(target):
        def wrapped(tokens, cache):
            logits, cache = model(tokens.cpu(), pytree.tree_map_only(torch.Tensor, torch.Tensor.cpu, cache))
            return logits.to(target), pytree.tree_map(lambda t: t.to(target), cache)

        return fb.decode(fb.BeamSearch([3, 2], 4, **SEARCH), wrapped, torch.tensor([7, 8], device=target))

    want = on("cpu")
    if device == "cpu":
        monkeypatch.setattr(draw, "_op", launch_draw)
        monkeypatch.setattr(advance_chosen, "_op", launch_advance_chosen_)
    got = on(device)
    assert want.valid.any(1).all() and want.finished.any()
    for name in ("tokens", "lengths", "valid", "finished"):
        assert torch.equal(getattr(got, name).cpu(), getattr(want, name)), name
    for name in ("scores", "log_probs", "token_log_probs", "sampling_log_probs", "log_inclusion", "perturbed"):
        assert torch.allclose(getattr(got, name).cpu(), getattr(want, name), atol=1e-4), name


def test_frozen_hypothesis_keeps_its_node_and_length():
    """All else moves on around it."""
    search = fb.BeamSearch(3, 6, 0, selection=fb.Stochastic(1))
    state = search.init(1)
    logits = torch.zeros(3, 5)
    logits[:, 0] = 1.0
    while not (state.slots.ended.any() or state.all_done()):
        search.step(state, logits)
    slot = int(state.slots.ended.int().argmax())
    before = state.draws.nodes[0, slot].item(), state.slots.lengths[0, slot].item(), state.slots.scores[0, slot].item()
    step = search.step(state, logits)
    here = (step.parents[0] == slot).nonzero()
    here = int(here)  # with this seed the finished hypothesis stays, and nothing continues it
    after = [field[0, here].item() for field in (state.draws.nodes, state.slots.lengths, state.slots.scores)]
    assert tuple(after) == before
    assert not torch.isin(noise.child_nodes(torch.tensor(before[0]), torch.arange(5)), state.draws.nodes).any()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_opcheck(seed, device):
    """The mutated lists of tensors too: state is written, the choice and the limits are not."""
    arguments = copied(random_step(seed), device)
    torch.library.opcheck(DEFINITION, tuple(arguments))
    declared = DEFINITION._schema.arguments
    mutable = {a.name for a in declared if a.alias_info is not None and a.alias_info.is_write}
    assert mutable == {"slots", "draws", "requests", "history"}


def test_compiles_without_graph_break(device):
    torch._dynamo.reset()

    def step(arguments):
        choice, flags, eos, *state, pad_id = arguments
        return advance_chosen_(choice, flags, *state, eos=eos, pad_id=pad_id)

    compiled = torch.compile(step, fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager")
    for seed in range(2):
        arguments = pytree.tree_map_only(torch.Tensor, lambda t: t.to(device), random_step(seed))
        want = pytree.tree_map_only(torch.Tensor, torch.clone, arguments)
        assert_same(compiled(arguments), step(want))
        assert_same(arguments, want)


@needs_gpu
def test_cuda_graph_replay_reads_new_inputs():
    search = fb.BeamSearch([3, 2], 6, **SEARCH)
    state, logits = search.init(2, "cuda"), torch.randn(6, 70, device="cuda")
    mask = pack_bitmask(torch.rand(6, 70, device="cuda") < 0.9)
    search.step(state, logits, mask)  # compiled and loaded outside the capture
    want = state.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        moves = search.step(state, logits, mask)
    for _ in range(5):
        logits.normal_()
        graph.replay()
        assert_same(moves, search.step(want, logits, mask))
        assert_same([state.slots, state.draws, state.requests], [want.slots, want.draws, want.requests])
