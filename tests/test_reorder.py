"""Rows in a new order: kernels against ``index_select``, in every layout, and in place under every source."""

from __future__ import annotations

import pytest
import torch

from flashbeam.kernels.reorder import reorder
from flashbeam.kernels.triton.reorder import launch_reorder, launch_reorder_, launch_reorder_out

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")

DTYPES = [
    torch.float32,
    torch.float16,
    torch.bool,
    torch.int8,
    torch.uint16,
    torch.int64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
]
# shape, dim: a column of scalars, a row of one byte times odd, aligned, one block and a tail, rows in the middle, last,
# a lone row, no columns
CASES = [
    ((9,), 0),
    ((6, 33), 0),
    ((5, 64), 0),
    ((3, 1500), 0),
    ((2, 5, 3, 8), 1),
    ((3, 4, 5), 2),
    ((1, 20), 0),
    ((3, 0), 0),
]


def values(shape, dtype=torch.float32, device="cpu"):
    return torch.randint(0, 2 if dtype == torch.bool else 100, shape, device=device).to(dtype)


def gathered(x, source_rows, dim):
    """The definition, by slices."""
    return torch.stack([x.select(dim, min(max(row, 0), x.shape[dim] - 1)) for row in source_rows.tolist()], dim)


def same(a, b):
    """Equal dtypes, shapes and bits; ``torch.equal`` does not know every dtype."""
    as_int = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.view(as_int), b.view(as_int))


def rows_in_groups(rows, group_size, device):
    first = torch.arange(rows, device=device) // group_size * group_size
    return first + torch.randint(0, group_size, (rows,), device=device)


@pytest.mark.parametrize("gather", [lambda x, rows, dim: reorder(x, rows, dim=dim), launch_reorder])
@pytest.mark.parametrize(("shape", "dim"), CASES)
def test_matches_reference(gather, shape, dim, device):
    x = values(shape, device=device)
    for count in (0, 1, 7):
        rows = torch.randint(0, shape[dim], (count,), device=device)
        assert same(gather(x, rows, dim), x.index_select(dim, rows))


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_dtype(dtype, device):
    x, rows = values((4, 3, 5), dtype, device), torch.tensor([3, 0, 0, 1, 2], device=device)
    want = gathered(x, rows, 0)
    assert same(reorder(x, rows), want) and same(launch_reorder(x, rows, 0), want)
    out = torch.empty_like(want)
    reorder(x, rows, out=out)
    assert same(out, want)
    launch_reorder_out(x, rows, 0, out.zero_())
    assert same(out, want)
    for group_size in (None, 4):
        y, z = x.clone(), x.clone()
        reorder(y, rows[:4], out=y, group_size=group_size)
        launch_reorder_(z, rows[:4], 0, group_size)
        assert same(y, gathered(x, rows[:4], 0)) and same(z, y)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_source_rows_of_either_width_and_any_stride(dtype, device):
    x, rows = values((4, 6), device=device), torch.tensor([3, 9, 0, 9, 0, 9, 2, 9], device=device).to(dtype)[::2]
    assert torch.equal(reorder(x, rows), x[[3, 0, 0, 2]]) and torch.equal(launch_reorder(x, rows, 0), x[[3, 0, 0, 2]])


def test_source_rows_out_of_range_are_clamped(device):
    x, rows = values((3, 5), device=device), torch.tensor([-1, 3, 2**40, -(2**40), 1], device=device)
    want = x[[0, 2, 2, 0, 1]]
    assert torch.equal(reorder(x, rows), want) and torch.equal(launch_reorder(x, rows, 0), want)


# rows at the slow, a middle and the fast end; a permuted tensor; a slice of a longer cache; every other column;
# an expanded dimension; aligned rows at unaligned distances; more dimensions than the kernel has strides for
LAYOUTS = [
    (lambda device: values((6, 4, 10), device=device).transpose(0, 2), 0),
    (lambda device: values((6, 4, 10), device=device).transpose(1, 2), 1),
    (lambda device: values((6, 4, 10), device=device).permute(1, 2, 0), 2),
    (lambda device: values((5, 3, 9, 8), device=device)[:, :, :6], 0),
    (lambda device: values((5, 34), device=device)[:, 1::2], 0),
    (lambda device: values((5, 1, 8), device=device).expand(5, 3, 8), 0),
    (lambda device: values((5, 9), device=device)[:, :8], 0),
    (lambda device: values((3, 1, 2, 3, 2, 4, 4), device=device).permute(2, 0, 4, 1, 5, 3, 6)[..., ::2], 4),
]


@pytest.mark.parametrize(("make", "dim"), LAYOUTS)
def test_strided_rows(make, dim, device):
    x = make(device)
    rows = torch.randint(0, x.shape[dim], (x.shape[dim] + 1,), device=device)
    want = gathered(x, rows, dim)
    assert torch.equal(reorder(x, rows, dim=dim), want) and torch.equal(reorder(x, rows, dim=dim - x.dim()), want)
    got = launch_reorder(x, rows, dim)
    assert torch.equal(got, want) and got.is_contiguous()
    out = torch.zeros(*want.shape[::-1], 2, device=device)[..., 0].permute(*reversed(range(want.dim())))
    assert torch.equal(reorder(x, rows, dim=dim, out=out), want)
    launch_reorder_out(x, rows, dim, out.zero_())
    assert torch.equal(out, want)


@pytest.mark.parametrize(("make", "dim"), [layout for i, layout in enumerate(LAYOUTS) if i != 5])
def test_in_place_in_any_layout(make, dim, device):
    for group_size in (None, 1, make(device).shape[dim]):
        x = make(device)
        rows = rows_in_groups(x.shape[dim], group_size or x.shape[dim], device)
        want, y = gathered(x, rows, dim), make(device).copy_(x)
        launch_reorder_(y, rows, dim, group_size)
        assert torch.equal(y, want)
        assert reorder(x, rows, dim=dim, out=x, group_size=group_size) is x
        assert torch.equal(x, want)


def test_leaves_the_rest_of_the_buffer_alone(device):
    cache = values((4, 3, 10, 8), device=device)
    before, rows = cache.clone(), torch.tensor([3, 3, 0, 1], device=device)
    for group_size in (None, 4):
        for write in (launch_reorder_, lambda x, rows, dim, g: reorder(x, rows, dim=dim, out=x, group_size=g)):
            cache.copy_(before)
            write(cache[:, :, 2:7], rows, 0, group_size)
            assert torch.equal(cache[:, :, 2:7], before[rows, :, 2:7])
            assert torch.equal(cache[:, :, :2], before[:, :, :2]) and torch.equal(cache[:, :, 7:], before[:, :, 7:])


@pytest.mark.parametrize(
    ("rows", "columns", "group_size"),
    # tiny rows, many groups a program; groups not a power of two; one group; more rows a group than the kernel holds
    [(600, 1, 4), (12, 40, 3), (10, 1100, 5), (64, 64, 64), (300, 2, 300), (8, 3, 1)],
)
def test_in_place_in_groups(rows, columns, group_size, device):
    x = torch.arange(rows * columns, device=device).view(rows, columns)
    source = rows_in_groups(rows, group_size, device)
    want, y = x[source], x.clone()
    launch_reorder_(y, source, 0, group_size)
    assert torch.equal(y, want)
    assert torch.equal(reorder(x, source, out=x, group_size=group_size), want)


@pytest.mark.parametrize(
    "source",
    # identity, reversal, a cycle, one row for all, a swap with a row that stays, clamped
    [[0, 1, 2, 3], [3, 2, 1, 0], [1, 2, 3, 0], [2, 2, 2, 2], [0, 2, 1, 3], [-7, 0, 9, 1]],
)
@pytest.mark.parametrize("group_size", [None, 4])
def test_in_place_is_right_for_any_source(source, group_size, device):
    x, source = values((4, 37), device=device), torch.tensor(source, device=device)
    want, y = x[source.clamp(0, 3)], x.clone()
    launch_reorder_(y, source, 0, group_size)
    assert torch.equal(y, want)
    assert torch.equal(reorder(x, source, out=x, group_size=group_size), want)


def test_unaligned_addresses(device):
    rows = torch.tensor([2, 0, 0], device=device)
    for offset in (0, 1, 2, 4, 8):
        memory = values((8 + 3 * 32,), torch.int8, device)
        x = memory[offset : offset + 96].view(3, 32)
        assert torch.equal(launch_reorder(x, rows, 0), x[rows])
        out = torch.zeros_like(memory)[offset : offset + 96].view(3, 32)
        launch_reorder_out(x, rows, 0, out)
        assert torch.equal(out, x[rows])


def test_batch_invariant_bitwise(device):
    x = torch.randn(12, 50, device=device)
    rows = rows_in_groups(12, 4, device)
    assert torch.equal(launch_reorder(x, rows, 0)[4:8], launch_reorder(x[4:8], rows[4:8] - 4, 0))
    alone = x[4:8].clone()
    launch_reorder_(x, rows, 0, 4)
    launch_reorder_(alone, rows[4:8] - 4, 0, 4)
    assert torch.equal(x[4:8], alone)


def test_input_not_modified(device):
    x, rows = values((4, 20), device=device), torch.tensor([1, 1, 7, -2], device=device)
    kept = x.clone(), rows.clone()
    out = torch.empty_like(x)
    reorder(x, rows)
    reorder(x, rows, out=out)
    launch_reorder(x, rows, 0)
    launch_reorder_out(x, rows, 0, out)
    launch_reorder_(out, rows, 0, 4)
    launch_reorder_(out, rows, 0, None)
    assert torch.equal(x, kept[0]) and torch.equal(rows, kept[1])


def test_result_never_aliases_the_input(device):
    x = values((3, 4), device=device)
    for gather in (reorder(x, torch.arange(3, device=device)), launch_reorder(x, torch.arange(3, device=device), 0)):
        assert gather.data_ptr() != x.data_ptr()


def test_gradients_are_detached(device):
    x, rows = torch.randn(3, 4, device=device, requires_grad=True), torch.tensor([2, 0, 0], device=device)
    got = reorder(x, rows)
    assert not got.requires_grad and torch.equal(got, x.detach()[rows])
    assert not reorder(x, rows, out=torch.empty_like(got)).requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.int8, torch.int64])
def test_opcheck(dtype, device):
    rows = torch.tensor([1, 0, 0, 3], device=device)
    ops = torch.ops.flashbeam
    for x, dim in ((values((4, 6), dtype, device), 0), (values((2, 4, 3), dtype, device).transpose(0, 2), 1)):
        torch.library.opcheck(ops.reorder, (x, rows, dim))
        torch.library.opcheck(ops.reorder, (x, rows[:3], dim))
        torch.library.opcheck(ops.reorder_out, (x, rows, dim, values(x.shape, dtype, device)))
        torch.library.opcheck(ops.reorder_, (x, rows, dim, None))
        torch.library.opcheck(ops.reorder_, (x, rows % 2, dim, 4))


def test_compiles_without_graph_break(device):
    def step(x, rows, buffer):
        y = reorder(x, rows)
        reorder(y, rows, out=buffer)
        return reorder(y, rows, out=y, group_size=4), buffer

    x, rows = torch.randn(4, 6, device=device), torch.tensor([3, 1, 1, 0], device=device)
    backend = "inductor" if device == "cuda" else "aot_eager"
    got = torch.compile(step, fullgraph=True, backend=backend)(x, rows, torch.zeros_like(x))
    assert torch.equal(got[0], x[rows][rows]) and torch.equal(got[1], x[rows][rows])


@needs_gpu
def test_cuda_graph_replay_reads_new_inputs():
    x, rows = torch.randn(8, 3, 1000, device="cuda"), torch.arange(8, device="cuda")
    in_place = [x.clone(), x.clone()]
    before = x.clone()

    def step():
        for y, group_size in zip(in_place, (None, 4), strict=True):
            y.copy_(before)
            reorder(y, rows, out=y, group_size=group_size)
        return reorder(x, rows)

    step()  # compiled and loaded outside the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    rows.copy_(torch.tensor([3, 3, 0, 1, 7, 4, 4, 4]))
    graph.replay()
    assert all(torch.equal(y, x[rows]) for y in (got, *in_place))


X, ROWS = torch.zeros(4, 3), torch.tensor([0, 1, 2, 3])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"x": [1]}, TypeError, "x: expected a tensor, got list"),
        ({"x": X.to(torch.complex64)}, TypeError, "x: expected a real dtype, got complex64"),
        ({"x": torch.tensor(1)}, ValueError, "x: expected at least 1 dimension, got 0"),
        ({"dim": 2}, ValueError, "x: expected at least 3 dimensions, got 2"),
        ({"dim": -3}, ValueError, "x: expected at least 3 dimensions, got 2"),
        ({"dim": "0"}, TypeError, "dim: expected an int in [-64, 63], got str"),
        ({"source_rows": [0]}, TypeError, "source_rows: expected a tensor, got list"),
        ({"source_rows": torch.zeros(4)}, TypeError, "source_rows: expected int64 or int32, got float32"),
        ({"source_rows": ROWS[None]}, ValueError, "source_rows: expected shape [R_out], got [1, 4]"),
        ({"x": torch.zeros(0, 3)}, ValueError, "x: expected at least 1 row at dimension 0, got 0"),
        (
            {"source_rows": ROWS.to("meta")},
            ValueError,
            "source_rows: expected all tensors on one device, got x on cpu, source_rows on meta",
        ),
        ({"group_size": 3}, ValueError, "group_size: expected a divisor of 4, the rows of x, got 3"),
        ({"group_size": 0}, ValueError, "group_size: expected an int >= 1, got 0"),
        ({"group_size": 2.0}, TypeError, "group_size: expected an int >= 1, got float"),
        ({"out": 3}, TypeError, "out: expected a tensor, got int"),
        ({"out": X.half()}, TypeError, "out: expected float32, got float16"),
        ({"out": X[:3]}, ValueError, "out: expected shape of x with R_out rows = [4, 3], got [3, 3]"),
        (
            {"out": X[:1].clone().expand(4, 3)},
            ValueError,
            "out: expected a tensor without expanded dimensions, got strides (0, 1)",
        ),
        (
            {"out": X.to("meta")},
            ValueError,
            "out: expected all tensors on one device, got x on cpu, out on meta",
        ),
        ({"out": X.view(4, 3)}, ValueError, "out: expected memory apart from x, got a tensor that overlaps it"),
        (
            {"out": X, "source_rows": ROWS[:3]},
            ValueError,
            "source_rows: expected shape [R_out] = [4], got [3]",
        ),
    ],
)
def test_rejects_bad_arguments(arguments, error, message):
    with pytest.raises(error) as caught:
        reorder(**{"x": X, "source_rows": ROWS, **arguments})
    assert str(caught.value) == message
