"""Deciding from lists: bitwise what the pass with the bitmask of the list decides, kernels and definitions alike."""

from __future__ import annotations

import pytest
import torch

from automata import random_edges
from flashbeam.kernels import (
    Edges,
    Listed,
    listed_bitmask,
    pack_bitmask,
    place,
    summarize,
    summarize_listed,
    top_candidates,
    top_listed,
)
from flashbeam.kernels.listed_select import select_listed_op
from flashbeam.kernels.listed_summary import summarize_listed_op
from flashbeam.kernels.lse import row_lse_op
from flashbeam.kernels.tiles import TILE
from flashbeam.kernels.triton.listed_select import launch_select_listed
from flashbeam.kernels.triton.listed_summary import launch_summarize_listed
from flashbeam.kernels.triton.listed_top import launch_top_listed
from flashbeam.kernels.triton.summary import launch_summarize
from test_summary import adversarial_rows, far_apart

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
# infinities are meant; numpy, which the interpreter computes with, warns of them
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
INF, NAN = float("inf"), float("nan")
ENDS = (0, 33)


def to(value, device):
    """Tensors, alone or in tuples, on a device."""
    if isinstance(value, tuple):
        return type(value)(*(to(field, device) for field in value)) if hasattr(value, "_fields") else value
    return value.to(device) if isinstance(value, torch.Tensor) else value


def random_list(rows, vocab_size, most, *, tree=False, window=True, states=20) -> Listed:
    """Rows all over a random automaton, dead ones and the widest state among them."""
    edges = random_edges(states, vocab_size, most, tree=tree, ends=ENDS)
    at = torch.randint(-1, len(edges.indptr) - 1, (rows,), dtype=torch.int32)
    at[0], at[-1] = 0, -1
    lengths = edges.reach.shape[1]
    windows = torch.randint(-(2**31), 2**31, (rows, lengths)).int() if window else None
    return Listed(edges, at, windows, torch.rand(rows) < 0.5)


def mask_of(listed, vocab_size, ends=None, bitmask=None):
    """The bitmask the list stands for."""
    mask = listed_bitmask(listed.edges, listed.states, listed.window, vocab_size)
    for end in [] if ends is None or listed.may_end is None else set(ends.tolist()):
        if 0 <= end < vocab_size:
            mask[:, end // 32] |= listed.may_end.int() << (end % 32)
    return mask if bitmask is None else mask & bitmask[:, : mask.shape[1]]


def tensors(listed):
    return (*listed.edges, listed.states, listed.window)


def check_sums(logits, listed, device, vocab_size=None, *, kernel=True, **options):
    """Tiles of the definition against those of the pass, and of the kernel against those of the pass's kernel."""
    vocab_size = logits.shape[1] if vocab_size is None else vocab_size
    bitmask, temperature, active, ends = (options.get(n) for n in ("bitmask", "temperature", "active", "ends"))
    mask = mask_of(listed, vocab_size, ends, bitmask)
    given = (vocab_size, bitmask, temperature, active, ends, listed.may_end)
    got = summarize_listed_op(*tensors(listed), logits, *given)
    want = summarize(
        logits, bitmask=mask, temperature=temperature, active=active, normalize="allowed", vocab_size=vocab_size
    ).tiles
    same_tiles(got, want)
    if kernel:
        x, mask, temperature, active = (to(t, device) for t in (logits, mask, temperature, active))
        got = launch_summarize_listed(
            *(to(t, device) for t in (*tensors(listed), logits, *given)),
        )
        same_tiles(got, launch_summarize(x, vocab_size, mask, temperature, active, None, True, False)[2:4])
    return want


def same_tiles(got, want):
    if hasattr(want, "tile_ref"):
        want = want.tile_ref, want.tile_sum
    for field, wanted in zip(got, want, strict=True):
        assert field.dtype == wanted.dtype and torch.equal(field, wanted)
        assert torch.equal(field.signbit()[field != 0], wanted.signbit()[field != 0])


def check_best(logits, log_probs, k, listed, device, *, kernel=True, **options):
    """All fields of both ways to decide, with both normalisers; the kernel on the definition's log-sum-exps."""
    ends = options.pop("ends", None)
    vocab_size = options.get("vocab_size", logits.shape[1])
    mask = mask_of(listed, vocab_size, ends, options.get("bitmask"))
    for normalize in ("vocab", "allowed"):
        shared = {**options, "normalize": normalize}
        got = top_listed(logits, log_probs, k, listed, ends=ends, **shared)
        want = top_candidates(logits, log_probs, k, **{**shared, "bitmask": mask}, exclude=ends)
        for name, field in want._asdict().items():
            assert getattr(got, name).dtype == field.dtype and torch.equal(getattr(got, name), field), name
    if kernel:
        names = ("bitmask", "temperature", "divisor")
        given = (logits, log_probs, want.lse, vocab_size, k, *(options.get(n) for n in names))
        best = launch_select_listed(*(to(t, device) for t in (*tensors(listed), *given)))
        for field, wanted in zip(best, want[:4], strict=True):
            assert field.dtype == wanted.dtype and torch.equal(field.cpu(), wanted)
        # its own log-sum-exps may differ from the definition's by ulps: what is chosen follows from them
        names = ("bitmask", "temperature", "active")
        given = (logits, log_probs, vocab_size, k, *(options.get(n) for n in names), ends, listed.may_end)
        *found, lse, flags = launch_top_listed(
            *(to(t, device) for t in (*tensors(listed), *given, options.get("divisor")))
        )
        assert torch.equal(flags.cpu(), want.flags)
        torch.testing.assert_close(lse.cpu(), want.lse, rtol=1e-6, atol=1e-6)
        given = (logits, log_probs, lse.cpu(), vocab_size, k, *(options.get(n) for n in names[:2]))
        best = select_listed_op(*tensors(listed), *given, options.get("divisor"))
        for field, wanted in zip(found, best, strict=True):
            assert torch.equal(field.cpu(), wanted)
    return want


# one shape (B, P, V, most edges, k) per path: one token; k beyond the candidates; a ragged tile; several tiles, more
# edges than a block; a list longer than the k best and a chunk
SHAPES = [(1, 1, 2, 1, 1), (2, 3, 70, 9, 40), (1, 5, 2100, 60, 4), (2, 2, 5000, 700, 9), (1, 2, 3000, 1500, 3)]


@pytest.mark.parametrize("shape", SHAPES)
def test_lists_and_masks_decide_alike(shape, device):
    batch, parents, vocab_size, most, k = shape
    rows = batch * parents
    logits, log_probs = torch.randn(rows, vocab_size) * 3, -torch.rand(batch, parents) * 5
    ends = torch.tensor([*ENDS, ENDS[0], vocab_size - 1 + ENDS[0], -1, vocab_size])
    plain = random_list(rows, vocab_size, most, tree=True, window=False)._replace(may_end=None)
    check_sums(logits, plain, device)
    check_best(logits, log_probs, k, plain, device)
    options = {
        "bitmask": pack_bitmask(torch.rand(rows, vocab_size) < 0.6),
        "temperature": torch.rand(rows) + 0.5,
        "active": torch.arange(rows) != 1,
        "ends": ends[:3],
    }
    listed = random_list(rows, vocab_size, most)
    check_sums(logits.bfloat16(), listed, device, **options)
    divisor = torch.linspace(0.3, 3.7, batch)
    coarse = logits.round().half()
    check_best(coarse, log_probs.round(), k, listed, device, **options, divisor=divisor)
    if vocab_size > 40:  # ends outside the vocabulary, or none that a row may take
        check_sums(logits, listed, device, ends=ends[[0, 1, 4, 5]], kernel=vocab_size == 70)
        check_sums(logits, listed._replace(may_end=None), device, ends=ends[:2], kernel=vocab_size == 70)


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65, torch.float32), (2049, torch.float16)])
def test_adversarial_rows(vocab_size, dtype, device):
    """Each row is a parent: with -0.0, NaN, +inf, nothing, one token, and 1e4 above and below."""
    logits = adversarial_rows(vocab_size, dtype)
    listed = random_list(len(logits), vocab_size, vocab_size - 2, window=False, states=3)
    listed = listed._replace(states=torch.arange(len(logits), dtype=torch.int32) % 2)
    ends = torch.tensor([0])
    want = check_sums(logits, listed, device, ends=ends)
    assert (want.tile_sum < 0).any() and (want.tile_ref == INF).any() and (want.tile_ref == -INF).any()
    check_best(logits, -torch.rand(1, len(logits)), 40, listed, device, ends=ends, kernel=vocab_size == 65)
    check_best(logits, -torch.rand(len(logits), 1), 5, listed, device, ends=ends, kernel=False)


@pytest.mark.parametrize(("top", "temperature"), [(3e38, 1.0), (-3e38, 1.0), (1e10, 1.0), (20.0, 1e-8)])
def test_scaled_logits_beyond_2_31(top, temperature, device):
    """There the pass's kernel takes a tile in another way, and so must the list's."""
    tops = top * (1 - torch.rand(6, 1) / 4)
    logits = torch.cat([tops, tops - abs(top) * torch.rand(6, 69) / 8, tops - 40 * temperature], 1)
    listed = random_list(6, 71, 60)
    check_sums(logits, listed, device, temperature=torch.full((6,), temperature), ends=torch.tensor(ENDS))


def test_sums_of_every_density(device):
    """One token a tile, two, some, most, all: wherever zeros are left out, the same numbers meet in the same order."""
    vocab_size, counts = 2 * TILE + 100, (1, 2, 3, 40, 1000, 3000, 2 * TILE + 100)
    tokens = [torch.randperm(vocab_size)[:count] for count in counts]
    tokens = torch.cat([chosen[place(chosen).argsort()] for chosen in tokens]).int()
    indptr = torch.tensor((0, *counts)).cumsum(0).int()
    reach = torch.ones(len(tokens) + 1, 1, dtype=torch.int32)
    edges = Edges(indptr, tokens, torch.zeros_like(tokens), reach[: len(counts)])
    listed = Listed(edges, torch.arange(len(counts), dtype=torch.int32), None, None)
    check_sums(torch.randn(len(counts), vocab_size) * 4, listed, device)


def test_nothing_but_listed_logits_is_read(device):
    """Elsewhere lies NaN, which would be flagged, and +inf, which would spoil the row."""
    vocab_size, ends = 2500, torch.tensor([33])
    listed = random_list(6, vocab_size, 50)
    mask = mask_of(listed, vocab_size, ends)
    token = torch.arange(vocab_size)
    allowed = (mask[:, token // 32] >> (token % 32)) & 1 == 1
    clean = torch.randn(6, vocab_size)
    dirty = torch.where(allowed, clean, torch.tensor([NAN, INF, NAN])[token % 3])
    want = top_listed(clean, torch.zeros(2, 3), 5, listed, ends=ends, normalize="allowed")
    got = top_listed(dirty, torch.zeros(2, 3), 5, listed, ends=ends, normalize="allowed")
    for name, field in want._asdict().items():
        assert torch.equal(getattr(got, name), field), name
    check_best(dirty, torch.zeros(2, 3), 5, listed, device, ends=ends)
    check_sums(dirty, listed, device, ends=ends)


def test_rows_that_are_not_active_are_never_read(device):
    listed = random_list(6, 300, 50)._replace(may_end=torch.ones(6, dtype=torch.bool))
    logits, active = torch.randn(6, 300), torch.tensor([True, False, True, True, False, True])
    logits[~active] = NAN
    want = check_sums(logits, listed, device, active=active, ends=torch.tensor(ENDS))
    assert (want.tile_ref[~active] == -INF).all() and (want.tile_sum[~active] == 0).all()
    best = check_best(logits, torch.zeros(2, 3), 5, listed, device, active=active)
    assert best.flags.tolist() == [0] * 6


def test_ties_are_ordered_as_ever(device):
    """Equal logits, and scores that collide in float32: parents first, then adjusted logits, then tokens."""
    listed = random_list(6, 2100, 80, window=False, states=4)
    alike = listed._replace(states=torch.zeros(6, dtype=torch.int32))
    best = check_best(torch.full((6, 2100), 1.25), torch.zeros(2, 3), 70, alike, device)
    first = listed.edges.tokens[: listed.edges.indptr[1]].sort().values
    assert best.tokens[0].tolist() == first[:70].tolist() and not best.parents[0].any()
    listed = listed._replace(states=torch.tensor([0, 1, 0, 2, 3, 3], dtype=torch.int32))
    near = torch.randperm(2100).view(1, -1).repeat(6, 1) * 1e-8
    check_best(near, torch.full((2, 3), -1000.0), 9, listed, device)
    steps = torch.arange(2100, dtype=torch.int32) + torch.tensor(1.6).view(torch.int32)
    logits = steps.view(torch.float32).repeat(6, 1)
    check_best(logits, torch.zeros(2, 3), 9, listed, device, temperature=torch.full((6,), 1.5))


def test_more_places_than_candidates_are_invalid_with_ids_in_range(device):
    edges = Edges(*(torch.tensor(x).int() for x in ([0, 2, 2], [5, 9], [1, 1], [[1], [1]])))
    states = torch.tensor([1, 0, -1, 0, 0, 1]).int()
    log_probs = torch.tensor([[0.0, -1.0, 0.0], [-INF, -2.0, 0.0]])
    best = check_best(torch.randn(6, 40), log_probs, 7, Listed(edges, states, None, None), device)
    assert (best.log_probs > -INF).sum(1).tolist() == [2, 2]
    assert best.parents.tolist() == [[1, 1, 0, 0, 0, 0, 0]] * 2
    assert sorted(best.tokens[0, :2].tolist()) == [5, 9] and not best.tokens[:, 2:].any()


def test_no_request(device):
    listed = random_list(2, 70, 5)
    none = Listed(listed.edges, listed.states[:0], listed.window[:0], listed.may_end[:0])
    best = check_best(torch.zeros(0, 70), torch.zeros(0, 2), 3, none, device)
    assert best.tokens.shape == (0, 3) and check_sums(torch.zeros(0, 70), none, device).tile_ref.shape == (0, 1)


def test_columns_past_the_vocabulary_are_never_read(device):
    listed = random_list(4, 2050, 60)
    logits = torch.randn(4, 2200)
    logits[:, 2050:] = NAN
    ones = torch.full((4, 70), -1, dtype=torch.int32)
    check_sums(logits, listed, device, 2050, bitmask=ones, ends=torch.tensor([2100, 33]))
    check_best(logits, torch.zeros(2, 2), 9, listed, device, vocab_size=2050, bitmask=ones)


def test_wide_beam_over_several_chunks(device):
    """Sixteen warps, larger blocks, and more edges than one chunk holds."""
    listed = random_list(3, 5000, 3500, window=False)
    listed = listed._replace(states=torch.tensor([0, 5, 0]).int())
    check_best((torch.randn(3, 5000) * 3).bfloat16(), torch.tensor([[0.0, -0.5, -0.25]]), 70, listed, device)


def test_batch_invariant_bitwise(device):
    listed, ends = random_list(32 * 2, 2100, 90), torch.tensor(ENDS)
    logits, log_probs, temperature = torch.randn(64, 2100) * 3, -torch.rand(32, 2), torch.rand(64) + 0.5

    def rows_of(requests):
        rows = (requests[:, None] * 2 + torch.arange(2)).flatten()
        edges, *fields = listed
        return rows, Listed(edges, *(field[rows] for field in fields))

    def decide(requests):
        rows, part = rows_of(requests)
        options = {"ends": ends, "normalize": "allowed", "temperature": temperature[rows]}
        return top_listed(logits[rows], log_probs[requests], 9, part, **options)

    threads = torch.get_num_threads()
    for number in (1, 2, 3):
        torch.set_num_threads(number)
        alone = decide(torch.tensor([11]))
        for batch in (2, 7, 32):
            for at in (0, batch - 1):
                requests = torch.randperm(32)[:batch]
                requests[at] = 11
                got = decide(requests)
                for name in ("log_probs", "parents", "tokens", "adjusted"):
                    assert torch.equal(getattr(got, name)[at], getattr(alone, name)[0]), name
                assert torch.equal(got.lse.view(-1, 2)[at], alone.lse)
    torch.set_num_threads(threads)
    rows, part = rows_of(torch.tensor([3, 11, 5]))
    check_sums(logits[rows], part, device, ends=ends)
    check_best(logits[rows], log_probs[[3, 11, 5]], 9, part, device, ends=ends)


def test_strided_rows_and_unmodified_inputs(device):
    wide = torch.full((8, 2400), INF)
    logits = wide[::2, 100:2200]
    logits.copy_(torch.randn(4, 2100))
    bits = torch.zeros(8, 200, dtype=torch.int32)[1::2, 50:150]
    bits[:, :66] = pack_bitmask(torch.rand(4, 2100) < 0.7)
    listed = random_list(8, 2100, 90)
    listed = Listed(listed.edges, listed.states[::2], listed.window.t().contiguous().t()[::2], listed.may_end[::2])
    before = [t.clone() for t in (logits, bits, *tensors(listed), listed.may_end)]
    dense = listed._replace(window=listed.window.contiguous(), states=listed.states.contiguous())
    strided = top_listed(logits, torch.zeros(2, 2), 9, listed, bitmask=bits, ends=torch.tensor(ENDS))
    same = top_listed(logits.contiguous(), torch.zeros(2, 2), 9, dense, bitmask=bits, ends=torch.tensor(ENDS))
    for field, other in zip(strided, same, strict=True):
        assert torch.equal(field, other)
    dense = dense._replace(may_end=dense.may_end.contiguous())
    check_sums(logits, dense, device, bitmask=bits, ends=torch.tensor(ENDS))
    check_best(logits, torch.zeros(2, 2), 9, dense, device, bitmask=bits)
    for field, kept in zip((logits, bits, *tensors(listed), listed.may_end), before, strict=True):
        assert torch.equal(field, kept)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the trick is a CPU's; on a GPU the memory would be real")
def test_rows_beyond_2_31_elements(device):
    logits, bits = far_apart(3, 70, 2**30 + 8), far_apart(3, 3, 2**30 + 8, torch.int32)
    logits.copy_(torch.randn(3, 70))
    bits.copy_(pack_bitmask(torch.rand(3, 70) < 0.7))
    listed = random_list(3, 70, 30)._replace(states=torch.tensor([0, 0, 0]).int())
    want = summarize_listed(logits.clone(), listed, bitmask=bits.clone())
    given = (70, bits, None, None, None, None)
    for summed in (summarize_listed_op, launch_summarize_listed):
        assert torch.equal(summed(*tensors(listed), logits, *given)[0], want[0])
    lse, _ = row_lse_op(*want, None)
    for parents in (1, 3):
        given = (torch.zeros(3 // parents, parents), lse, 70, 40)
        want_best = select_listed_op(*tensors(listed), logits.clone(), *given, bits.clone(), None, None)
        for select in (select_listed_op, launch_select_listed):
            for field, wanted in zip(
                select(*tensors(listed), logits, *given, bits, None, None), want_best, strict=True
            ):
                assert torch.equal(field, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("full", [False, True])
def test_opcheck(full, dtype, device):
    listed = to(random_list(4, 2100, 90, tree=not full, window=full), device)
    logits, log_probs = torch.randn(4, 2100, device=device).to(dtype), -torch.rand(2, 2, device=device)
    bitmask = temperature = active = ends = may_end = divisor = None
    if full:
        bitmask = pack_bitmask(torch.rand(4, 2100, device=device) < 0.5)
        temperature, active = torch.rand(4, device=device) + 0.5, torch.ones(4, dtype=torch.bool, device=device)
        ends, may_end, divisor = torch.tensor(ENDS, device=device), listed.may_end, torch.rand(2, device=device) + 0.5
    ops, edges = torch.ops.flashbeam, tensors(listed)
    given = (logits, 2100, bitmask, temperature, active, ends, may_end)
    torch.library.opcheck(ops.summarize_listed, (*edges, *given))
    lse, _ = row_lse_op(*summarize_listed_op(*edges, *given), temperature)
    for k in (5, 500):  # also more than there are candidates
        torch.library.opcheck(
            ops.select_listed, (*edges, logits, log_probs, lse, 2100, k, bitmask, temperature, divisor)
        )
        rest = (bitmask, temperature, active, ends, may_end, divisor)
        torch.library.opcheck(ops.top_listed, (*edges, logits, log_probs, 2100, k, *rest))


@pytest.mark.parametrize("normalize", ["vocab", "allowed"])
def test_compiles_without_graph_break(normalize, device):
    listed = to(random_list(4, 2100, 90), device)
    ends = torch.tensor(ENDS, device=device)

    def step(logits, log_probs, states, window, may_end):
        at = Listed(listed.edges, states, window, may_end)
        best = top_listed(logits * 2, log_probs, 5, at, ends=ends, normalize=normalize)
        return *best, *summarize_listed(logits, at)

    inputs = torch.randn(4, 2100, device=device), -torch.rand(2, 2, device=device), *listed[1:]
    backend = "inductor" if device == "cuda" else "aot_eager"
    got = torch.compile(step, fullgraph=True, backend=backend)(*inputs)
    for field, want in zip(got, step(*inputs), strict=True):
        assert torch.equal(field, want)


@needs_gpu
def test_cuda_graph_replay_reads_new_inputs():
    listed = to(random_list(6, 5000, 300), "cuda")
    logits, log_probs = torch.randn(6, 5000, device="cuda"), -torch.rand(2, 3, device="cuda")
    ends = torch.tensor(ENDS, device="cuda")

    def step():
        return top_listed(logits, log_probs, 9, listed, ends=ends, normalize="allowed")

    step()  # compiled and loaded outside the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    logits.normal_()
    listed.states.copy_(listed.states.flip(0))
    listed.window.bitwise_not_()
    listed.may_end.logical_not_()
    graph.replay()
    for field, want in zip(got, step(), strict=True):
        assert torch.equal(field, want)


X, PARENTS = torch.zeros(4, 40), torch.zeros(2, 2)
LISTED = Listed(
    Edges(*(torch.zeros(n, dtype=torch.int32) for n in (3, 4, 4)), torch.zeros(2, 1, dtype=torch.int32)),
    torch.zeros(4, dtype=torch.int32),
    None,
    None,
)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: top_listed(X, PARENTS, 1, LISTED.edges), TypeError, "listed: expected Listed, got Edges"),
        (
            lambda: top_listed(X[:2], PARENTS[:1], 1, LISTED),
            ValueError,
            "states: expected shape [R] = [2], got [4]",
        ),
        (lambda: top_listed(X, PARENTS, 0, LISTED), ValueError, "k: expected an int >= 1, got 0"),
        (
            lambda: top_listed(X, PARENTS.view(-1), 1, LISTED),
            ValueError,
            "log_probs: expected shape [B, P], got [4]",
        ),
        (
            lambda: top_listed(X, PARENTS, 1, LISTED._replace(may_end=torch.zeros(4))),
            TypeError,
            "may_end: expected bool, got float32",
        ),
        (
            lambda: top_listed(X, PARENTS, 1, LISTED._replace(may_end=torch.zeros(3) > 0)),
            ValueError,
            "may_end: expected shape [R] = [4], got [3]",
        ),
        (
            lambda: top_listed(X, PARENTS, 1, LISTED, ends=torch.zeros(1)),
            TypeError,
            "ends: expected int64, got float32",
        ),
        (
            lambda: top_listed(X, PARENTS, 1, LISTED, normalize="no"),
            ValueError,
            "normalize: expected 'vocab' or 'allowed', got 'no'",
        ),
        (
            lambda: summarize_listed(X, LISTED, ends=torch.zeros(1, 1).long()),
            ValueError,
            "ends: expected shape [n], got [1, 1]",
        ),
        (
            lambda: summarize_listed(X.to("meta"), LISTED),
            ValueError,
            "states: expected all tensors on one device, got logits on meta, states on cpu",
        ),
        (lambda: summarize_listed(X, LISTED, active=X[:, 0]), TypeError, "active: expected bool, got float32"),
    ],
)
def test_rejects_bad_arguments(call, error, message):
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == message
