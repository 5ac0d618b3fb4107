"""Paths through the parents: kernels against their torch definitions, and both against a walk in Python."""

from __future__ import annotations

import pytest
import torch

from flashbeam.kernels.history import backtrace, trace_slots, update_ancestry
from flashbeam.kernels.triton.history import launch_trace_slots, launch_update_ancestry, launch_update_ancestry_out

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")

# T, B, K, N: smallest, more hypotheses than slots, more than one program, no step, no request, no hypothesis
TRACES = [(1, 1, 1, 1), (5, 2, 3, 4), (9, 3, 4, 30), (0, 2, 2, 2), (3, 0, 2, 2), (4, 1, 3, 0)]
# B, K, T: smallest, a block and a tail, slots not a power of two, one slot, no step, no request
TABLES = [(1, 1, 1), (2, 4, 1100), (2, 5, 33), (3, 1, 20), (2, 3, 0), (0, 2, 5)]


def traced_by_hand(parents, end_step, end_slot):
    steps, batch, beams = parents.shape
    slots = torch.full((*end_step.shape, steps), -1)
    for b in range(batch):
        for n in range(end_step.shape[1]):
            slot = int(end_slot[b, n].clamp(0, beams - 1))
            for t in range(min(int(end_step[b, n]), steps - 1), -1, -1):
                slots[b, n, t] = slot
                slot = int(parents[t, b, slot].clamp(0, beams - 1))
    return slots


def updated_by_hand(table, parents, step):
    _, beams, steps = table.shape
    new, past = table.clone(), max(0, min(step, steps))
    for b, k in torch.cartesian_prod(*(torch.arange(size) for size in parents.shape)).tolist():
        new[b, k, :past] = table[b, int(parents[b, k].clamp(0, beams - 1)), :past]
        if 0 <= step < steps:
            new[b, k, step] = k
    return new


def random_trace(steps, batch, beams, paths, dtype=torch.int64, device="cpu", slack=0):
    parents = torch.randint(-slack, beams + slack, (steps, batch, beams))
    end_step = torch.randint(-1 - slack, steps + slack, (batch, paths))
    end_slot = torch.randint(-slack, beams + slack, (batch, paths))
    return tuple(x.to(device, dtype) for x in (parents, end_step, end_slot))


def random_table(batch, beams, steps, device="cpu"):
    table = torch.randint(0, 1000, (batch, beams, steps), dtype=torch.int32, device=device)
    return table, torch.randint(0, beams, (batch, beams), device=device)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("sizes", TRACES)
def test_trace_matches_reference(sizes, dtype, device):
    arguments = random_trace(*sizes, dtype, device)
    want = traced_by_hand(*(x.cpu() for x in arguments))
    for got in (trace_slots(*arguments), launch_trace_slots(*arguments)):
        assert got.dtype == torch.int64 and torch.equal(got.cpu(), want)


@pytest.mark.parametrize("sizes", TABLES)
def test_update_matches_reference(sizes, device):
    table, parents = random_table(*sizes, device)
    for step in sorted({0, 1, sizes[2] // 2, sizes[2] - 1}):
        want = updated_by_hand(table.cpu(), parents.cpu(), step)
        at = torch.tensor(step, device=device)
        for update in (update_ancestry, launch_update_ancestry):
            new = table.clone()
            update(new, parents, at)
            assert torch.equal(new.cpu(), want)
        for update in (lambda *a: update_ancestry(*a[:3], out=a[3]), launch_update_ancestry_out):
            out = torch.empty_like(table)
            update(table, parents.int(), at, out)
            assert torch.equal(out.cpu(), want)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("sizes", TRACES)
def test_backtrace_walks_from_the_last_step(sizes, dtype, device):
    steps, batch, beams, _ = sizes
    parents = torch.randint(-1, beams + 1, (steps, batch, beams), device=device).to(dtype)
    tokens = torch.randint(0, 1000, (steps, batch, beams), device=device).to(dtype)
    got = backtrace(tokens, parents)
    assert got.dtype == torch.int64 and got.shape == (batch, beams, steps)
    for b in range(batch):
        for k in range(beams):
            slot = k
            for t in reversed(range(steps)):
                assert got[b, k, t] == tokens[t, b, slot]
                slot = int(parents[t, b, slot].clamp(0, beams - 1))


def test_backtrace_of_a_drawn_lattice(device):
    # slot 0:  1 --- 3 --- 5
    #             \
    # slot 1:  2   `- 4 --- 6     (2 has no children)
    tokens = torch.tensor([[[1, 2]], [[3, 4]], [[5, 6]]], device=device)
    parents = torch.tensor([[[0, 0]], [[0, 0]], [[0, 1]]], device=device)
    assert backtrace(tokens, parents).tolist() == [[[1, 3, 5], [1, 4, 6]]]


def test_empty_and_too_long_hypotheses(device):
    parents = torch.tensor([[[0, 1]], [[1, 0]], [[1, 0]]], device=device)
    end_step = torch.tensor([[-1, -5, 0, 2, 7]], device=device)
    end_slot = torch.tensor([[0, 1, 1, 0, 0]], device=device)
    empty = [-1, -1, -1]
    want = [[empty, empty, [1, -1, -1], [0, 1, 0], [0, 1, 0]]]
    for trace in (trace_slots, launch_trace_slots):
        assert trace(parents, end_step, end_slot).tolist() == want


def test_slots_out_of_range_are_clamped(device):
    arguments = random_trace(6, 2, 3, 20, device=device, slack=3)
    want = traced_by_hand(*(x.cpu() for x in arguments))
    for trace in (trace_slots, launch_trace_slots):
        assert torch.equal(trace(*arguments).cpu(), want)
    far = torch.full_like(arguments[0], 2**40), *arguments[1:]
    assert torch.equal(launch_trace_slots(*far), trace_slots(*far))

    table, _ = random_table(1, 4, 9, device)
    parents = torch.tensor([[-3, 4, 2**40, 1]], device=device)
    for update in (update_ancestry, launch_update_ancestry):
        new = table.clone()
        update(new, parents, torch.tensor(8, device=device))
        assert torch.equal(new[0, :, :8], table[0, [0, 3, 3, 1], :8])


@pytest.mark.parametrize("step", [-1, -100, 9, 100])
def test_step_out_of_range_writes_no_step(step, device):
    table, parents = random_table(2, 3, 9, device)
    want = table if step < 0 else table.gather(1, parents[:, :, None].expand(-1, -1, 9))
    at, memory = torch.tensor([step], device=device), torch.zeros(2, 3, 20, dtype=torch.int32, device=device)
    for update in (update_ancestry, launch_update_ancestry):
        memory.zero_()
        new = memory[:, :, 5:14]
        new.copy_(table)
        update(new, parents, at)
        assert torch.equal(new, want) and not memory[:, :, :5].any() and not memory[:, :, 14:].any()
    for update in (lambda *a: update_ancestry(*a[:3], out=a[3]), launch_update_ancestry_out):
        out = torch.empty_like(table)
        update(table, parents, at, out)
        assert torch.equal(out, want)


@pytest.mark.parametrize("parents", [[0, 1, 2], [2, 1, 0], [1, 2, 0], [2, 2, 2], [0, 0, 1]])
def test_update_in_place_is_right_for_any_parents(parents, device):
    table, _ = random_table(1, 3, 40, device)
    want = table.clone()
    want[:, :, :30] = table[:, parents, :30]
    want[:, :, 30] = torch.arange(3, device=device)
    for update in (update_ancestry, launch_update_ancestry):
        new = table.clone()
        update(new, torch.tensor([parents], device=device), torch.tensor(30, device=device))
        assert torch.equal(new, want)


def test_table_leads_to_the_tokens_of_backtrace(device):
    steps, batch, beams = 7, 2, 3
    parents = torch.randint(0, beams, (steps, batch, beams), device=device)
    tokens = torch.randint(0, 1000, (steps, batch, beams), device=device)
    table = torch.zeros(batch, beams, steps, dtype=torch.int32, device=device)
    for step in range(steps):
        assert update_ancestry(table, parents[step], step) is table
    assert torch.equal(tokens.permute(1, 2, 0).gather(1, table.long()), backtrace(tokens, parents))


def test_batch_invariant_bitwise(device):
    parents, end_step, end_slot = random_trace(6, 5, 3, 10, device=device)
    alone = launch_trace_slots(parents[:, 2:3], end_step[2:3], end_slot[2:3])
    assert torch.equal(launch_trace_slots(parents, end_step, end_slot)[2:3], alone)
    table, parents = random_table(5, 3, 40, device)
    alone, step = table[2:3].clone(), torch.tensor(20, device=device)
    launch_update_ancestry(table, parents, step)
    launch_update_ancestry(alone, parents[2:3], step)
    assert torch.equal(table[2:3], alone)


def test_strided(device):
    def strided(x):
        """``x`` with its dimensions reversed in memory and every other element unused."""
        memory = torch.zeros(*reversed(x.shape), 2, dtype=x.dtype, device=x.device)[..., 0]
        return memory.permute(*reversed(range(x.dim()))).copy_(x)

    arguments = random_trace(5, 2, 3, 4, device=device)
    want = trace_slots(*arguments)
    for trace in (trace_slots, launch_trace_slots):
        got = trace(*(strided(x) for x in arguments))
        assert torch.equal(got, want) and got.is_contiguous()
    tokens = torch.randint(0, 9, arguments[0].shape, device=device)
    assert torch.equal(backtrace(strided(tokens), strided(arguments[0])), backtrace(tokens, arguments[0]))

    table, parents = random_table(2, 3, 50, device)
    step = torch.tensor(30, device=device)
    want = update_ancestry(table.clone(), parents, step)
    for update in (update_ancestry, launch_update_ancestry):
        new = strided(table)
        update(new, strided(parents), step)
        assert torch.equal(new, want)
    for update in (lambda *a: update_ancestry(*a[:3], out=a[3]), launch_update_ancestry_out):
        out = strided(torch.zeros_like(table))
        update(strided(table), strided(parents), step, out)
        assert torch.equal(out, want)


def test_input_not_modified(device):
    arguments = random_trace(5, 2, 3, 4, device=device, slack=1)
    table, parents = random_table(2, 3, 50, device)
    step, out = torch.tensor(7, device=device), torch.empty_like(table)
    inputs = (*arguments, table, parents, step)
    kept = [x.clone() for x in inputs]
    for trace in (trace_slots, launch_trace_slots):
        trace(*arguments)
    backtrace(arguments[0], arguments[0])
    update_ancestry(table, parents, step, out=out)
    launch_update_ancestry_out(table, parents, step, out)
    update_ancestry(out, parents, step)
    launch_update_ancestry(out, parents, step)
    assert all(torch.equal(x, before) for x, before in zip(inputs, kept, strict=True))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_opcheck(dtype, device):
    ops = torch.ops.flashbeam
    torch.library.opcheck(ops.trace_slots, random_trace(5, 2, 3, 4, dtype, device))
    table, parents = random_table(2, 3, 9, device)
    parents, step = parents.to(dtype), torch.tensor(5, device=device)
    torch.library.opcheck(ops.update_ancestry, (table, parents, step))
    torch.library.opcheck(ops.update_ancestry_out, (table, parents, step, torch.zeros_like(table)))


def test_compiles_without_graph_break(device):
    def run(tokens, parents, table, step):
        update_ancestry(table, parents[3], step)
        moved = update_ancestry(table, parents[4], 4, out=torch.zeros_like(table))
        return backtrace(tokens, parents), trace_slots(parents, table[:, :, 0], table[:, :, 1]), moved

    parents, tokens = torch.randint(0, 3, (2, 5, 2, 3), device=device)
    table, step = torch.zeros(2, 3, 5, dtype=torch.int32, device=device), torch.tensor(3, device=device)
    want = run(tokens, parents, table.clone(), step)
    backend = "inductor" if device == "cuda" else "aot_eager"
    got = torch.compile(run, fullgraph=True, backend=backend)(tokens, parents, table, step)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@needs_gpu
def test_cuda_graph_replay_reads_new_inputs():
    parents, end_step, end_slot = random_trace(6, 2, 4, 5, device="cuda")
    tokens, step = torch.randint(0, 99, (6, 2, 4), device="cuda"), torch.tensor(2, device="cuda")
    table = torch.zeros(2, 4, 6, dtype=torch.int32, device="cuda")

    def run():
        update_ancestry(table, parents[1], step)
        return trace_slots(parents, end_step, end_slot), backtrace(tokens, parents)

    run()  # compiled and loaded outside the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        slots, sequences = run()
    parents.random_(0, 4)
    end_step.random_(-1, 6)
    step.fill_(5)
    table.random_(0, 99)
    want = updated_by_hand(table.cpu(), parents[1].cpu(), 5)
    graph.replay()
    assert torch.equal(table.cpu(), want)
    assert torch.equal(slots.cpu(), traced_by_hand(parents.cpu(), end_step.cpu(), end_slot.cpu()))
    assert torch.equal(sequences.cpu(), backtrace(tokens.cpu(), parents.cpu()))


def ints(*shape, dtype=torch.int64):
    return torch.zeros(shape, dtype=dtype)


TABLE = ints(2, 3, 5, dtype=torch.int32)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: trace_slots(ints(4, 2, 3).float(), ints(2, 1), ints(2, 1)),
            TypeError,
            "parents: expected int64 or int32, got float32",
        ),
        (
            lambda: trace_slots(ints(4, 2), ints(2, 1), ints(2, 1)),
            ValueError,
            "parents: expected shape [T, B, K], got [4, 2]",
        ),
        (
            lambda: trace_slots(ints(4, 2, 0), ints(2, 1), ints(2, 1)),
            ValueError,
            "parents: expected at least 1 slot, got 0",
        ),
        (
            lambda: trace_slots(ints(4, 2, 3), ints(3, 1), ints(2, 1)),
            ValueError,
            "end_step: expected shape [B, N], got [3, 1]",
        ),
        (
            lambda: trace_slots(ints(4, 2, 3), ints(2, 1).bool(), ints(2, 1)),
            TypeError,
            "end_step: expected int64 or int32, got bool",
        ),
        (
            lambda: trace_slots(ints(4, 2, 3), ints(2, 1), ints(2, 2)),
            ValueError,
            "end_slot: expected shape [B, N] = [2, 1], got [2, 2]",
        ),
        (
            lambda: trace_slots(ints(4, 2, 3), ints(2, 1), ints(2, 1).to("meta")),
            ValueError,
            "end_slot: expected all tensors on one device, got parents on cpu, end_slot on meta",
        ),
        (
            lambda: backtrace(ints(4, 2), ints(4, 2, 3)),
            ValueError,
            "tokens: expected shape [T, B, K], got [4, 2]",
        ),
        (
            lambda: backtrace(ints(4, 2, 3), ints(4, 2, 2)),
            ValueError,
            "parents: expected shape [T, B, K] = [4, 2, 3], got [4, 2, 2]",
        ),
        (
            lambda: backtrace(ints(4, 2, 3).float(), ints(4, 2, 3)),
            TypeError,
            "tokens: expected int64 or int32, got float32",
        ),
        (
            lambda: update_ancestry(TABLE.long(), ints(2, 3), 0),
            TypeError,
            "table: expected int32, got int64",
        ),
        (
            lambda: update_ancestry(TABLE, ints(2, 4), 0),
            ValueError,
            "parents: expected shape [B, K] = [2, 3], got [2, 4]",
        ),
        (
            lambda: update_ancestry(TABLE, ints(2, 3), ints(1).int()),
            TypeError,
            "step: expected int64, got int32",
        ),
        (
            lambda: update_ancestry(TABLE, ints(2, 3), ints(2)),
            ValueError,
            "step: expected an int or a tensor with 1 element, got shape [2]",
        ),
        (
            lambda: update_ancestry(TABLE, ints(2, 3), 5),
            ValueError,
            "step: expected an int in [0, 4], got 5",
        ),
        (
            lambda: update_ancestry(TABLE, ints(2, 3), True),
            TypeError,
            "step: expected an int in [0, 4], got bool",
        ),
        (
            lambda: update_ancestry(TABLE, ints(2, 3), ints().to("meta")),
            ValueError,
            "step: expected all tensors on one device, got table on cpu, step on meta",
        ),
        (
            lambda: update_ancestry(TABLE[:1].expand(2, 3, 5), ints(2, 3), 0),
            ValueError,
            "table: expected a tensor without expanded dimensions, got strides (0, 5, 1)",
        ),
        (
            lambda: update_ancestry(TABLE, ints(2, 3), 0, out=TABLE[:1]),
            ValueError,
            "out: expected shape [B, K, T] = [2, 3, 5], got [1, 3, 5]",
        ),
        (
            lambda: update_ancestry(TABLE, ints(2, 3), 0, out=TABLE.long()),
            TypeError,
            "out: expected int32, got int64",
        ),
        (
            lambda: update_ancestry(TABLE, ints(2, 3), 0, out=TABLE.view(2, 3, 5)),
            ValueError,
            "out: expected memory apart from table, got a tensor that overlaps it",
        ),
    ],
)
def test_rejects_bad_arguments(call, error, message):
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == message
