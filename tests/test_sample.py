"""Draws from logits: their law, their log-probabilities, and what they depend on."""

from __future__ import annotations

import pytest
import torch

from flashbeam.kernels import FLAG_INF, FLAG_NAN, pack_bitmask, unpack_bitmask
from flashbeam.kernels.filters import filter_bitmask_op
from flashbeam.kernels.sample import sample

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
INF, NAN = float("inf"), float("nan")
DRAWS, V = 10000, 300
ALLOWED = torch.arange(V) % 3 != 0


def filtered(x, top_k=None, top_p=None, min_p=None, temperature=None, bitmask=None):
    """float64 probabilities of one row, by sorting."""
    adjusted = x.double() / (1.0 if temperature is None else temperature)
    if bitmask is not None:
        adjusted = adjusted.masked_fill(~ALLOWED, -INF)
    values, order = adjusted.sort(descending=True, stable=True)
    p = values[:top_k].softmax(0)
    if top_p is not None:
        p = p[: int((p.cumsum(0) < top_p).sum()) + 1]
    if min_p is not None:
        p = p[p >= min_p * p[0]]
    return torch.zeros_like(adjusted).scatter_(0, order[: len(p)], p / p.sum())


# p of a chi-square test; 1e-4 for a true law, whatever the seed
def chi_square(counts, p):
    assert counts[p == 0].sum() == 0
    expected = p * counts.sum()
    many = expected >= 5
    expected = torch.cat([expected[many], expected[~many].sum()[None]])
    observed = torch.cat([counts[many], counts[~many].sum()[None]])
    if expected[-1] == 0:
        expected, observed = expected[:-1], observed[:-1]
    statistic = ((observed - expected) ** 2 / expected).sum()
    return torch.special.gammaincc(torch.tensor((len(expected) - 1) / 2).double(), statistic / 2)


OPTIONS = [
    {},
    {"temperature": 0.7},
    {"bitmask": True},
    {"top_k": 20},
    {"top_k": 280},  # more than are listed
    {"top_p": 0.8},
    {"min_p": 0.05},
    {"top_k": 30, "top_p": 0.9, "min_p": 0.02, "temperature": 1.5, "bitmask": True},
    {"top_k": 270, "top_p": 0.95, "min_p": 0.01, "temperature": 1.5, "bitmask": True},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_law(options, device):
    x = torch.randn(V) * 2
    given = dict(options)
    if "bitmask" in given:
        given["bitmask"] = pack_bitmask(ALLOWED)[None].expand(DRAWS, -1).to(device)
    drawn = sample(x.to(device).expand(DRAWS, V), 7, **given)
    p = filtered(x, **options)
    assert chi_square(drawn.tokens.cpu().bincount(minlength=V), p) > 1e-4
    tempered = (x.double() / options.get("temperature", 1.0)).log_softmax(0)
    assert torch.allclose(drawn.log_probs.cpu().double(), tempered[drawn.tokens.cpu()], atol=2e-6)
    assert (drawn.flags == 0).all()


def test_law_of_a_vocabulary_of_many_tiles(device):
    x = torch.randn(9000) * 1.5
    drawn = sample(x.to(device).expand(DRAWS, -1), 3).tokens.cpu()
    p = x.double().softmax(0)
    assert chi_square(drawn.bincount(minlength=9000), p) > 1e-4
    parts = torch.arange(9000) // 500  # and of coarser events, of more power
    want = torch.zeros(18).double().index_add_(0, parts, p)
    assert chi_square(parts[drawn].bincount(minlength=18), want) > 1e-4


def test_offsets_and_seeds_give_other_numbers_and_pairs_are_independent(device):
    x = torch.zeros(4, device=device).expand(4000, 4)
    draws = [sample(x, seed, offset=offset).tokens for seed, offset in [(1, None), (1, 1), (2, 0), (1, 2**40)]]
    for i, first in enumerate(draws):
        for second in draws[:i]:
            counts = (first * 4 + second).bincount(minlength=16).cpu()
            assert chi_square(counts, torch.full((16,), 1 / 16).double()) > 1e-4


def test_the_draw_follows_from_seed_offset_and_id_alone(device):
    logits = torch.randn(50, 3000, device=device) * 2
    ids = torch.randint(0, 2**40, (50,), device=device)
    bits = pack_bitmask(torch.rand(50, 3000, device=device) < 0.5)
    for options in ({}, {"top_k": 40}, {"top_p": 0.9}, {"top_k": 300, "min_p": 1e-3, "bitmask": bits}):

        def draw(rows, options=options, **more):
            options = {name: v[rows] if name == "bitmask" else v for name, v in options.items()}
            return sample(logits[rows], 5, offset=3, row_ids=ids[rows], **options, **more)

        whole = draw(torch.arange(50))
        for rows in (torch.tensor([17]), torch.tensor([49, 3, 17]), torch.randperm(50)):
            for field, all_of_it in zip(draw(rows), whole, strict=True):
                assert torch.equal(field, all_of_it[rows])
    on_device = sample(logits, torch.tensor([5], device=device), offset=torch.tensor([3], device=device), row_ids=ids)
    for field, want in zip(on_device, sample(logits, 5, offset=3, row_ids=ids), strict=True):
        assert torch.equal(field, want)
    same = sample(logits[:1].expand(50, -1), 5, row_ids=torch.full((50,), 9, device=device))
    assert (same.tokens == same.tokens[0]).all()
    first = sample(logits, 5)
    assert torch.equal(first.tokens, sample(logits, 5, offset=0, row_ids=torch.arange(50, device=device)).tokens)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtypes_and_shapes(dtype, device):
    logits = (torch.randn(2, 3, 130, device=device) * 3).to(dtype)
    temperature = torch.rand(2, 3, device=device) + 0.5
    bits = pack_bitmask(torch.rand(2, 3, 130, device=device) < 0.5)
    for options in ({}, {"top_k": 5}, {"top_p": 0.7}):
        cube = sample(logits, 1, temperature=temperature, bitmask=bits, **options)
        flat = sample(
            logits.view(6, 130), 1, temperature=temperature.view(6), bitmask=bits.view(6, -1), row_ids=None, **options
        )
        assert cube.tokens.shape == cube.log_probs.shape == cube.flags.shape == (2, 3)
        assert cube.tokens.dtype == torch.int64 and cube.log_probs.dtype == torch.float32
        for a, b in zip(cube, flat, strict=True):
            assert torch.equal(a.flatten(), b)
        assert unpack_bitmask(bits, 130).gather(2, cube.tokens[:, :, None]).all()
        want = (logits.float() / temperature[:, :, None]).log_softmax(-1).gather(2, cube.tokens[:, :, None])[:, :, 0]
        assert torch.allclose(cube.log_probs, want, atol=2e-6)


@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_p": 0.9}, {"bitmask": True}])
def test_rows_with_faults(options, device):
    logits = torch.randn(6, 70, device=device)
    logits[0], logits[1], logits[2, 9], logits[3, ::2] = -INF, NAN, INF, NAN
    if "bitmask" in options:
        bits = pack_bitmask(torch.ones(6, 70, dtype=torch.bool, device=device))
        bits[5] = 0
        options = {"bitmask": bits}
    drawn = sample(logits, 1, **options)
    assert drawn.flags.tolist() == [0, FLAG_NAN, FLAG_INF, FLAG_NAN, 0, 0]
    dead = [0, 1, 2] + [5] * ("bitmask" in options)
    assert (drawn.tokens[dead] == 0).all() and (drawn.log_probs[dead] == -INF).all()
    live = [row for row in range(6) if row not in dead]
    assert drawn.log_probs[live].isfinite().all() and drawn.tokens[3] % 2 == 1


def test_certain_and_single_tokens(device):
    logits = torch.full((500, 3000), -INF, device=device)
    logits[:, 2500] = -3.0
    for options in ({}, {"top_k": 1}, {"top_p": 0.1}, {"min_p": 1.0}):
        drawn = sample(logits, 1, **options)
        assert (drawn.tokens == 2500).all() and (drawn.log_probs == 0).all()
        alone = sample(torch.zeros(3, 1, device=device), 1, **options)
        assert alone.tokens.tolist() == [0] * 3 and alone.log_probs.tolist() == [0.0] * 3
    best = torch.randn(50, 3000, device=device)
    assert torch.equal(sample(best, 2, top_k=1).tokens, best.argmax(1))
    assert sample(torch.zeros(0, 7, device=device), 1).tokens.shape == (0,)


def test_padding_is_never_read_and_rows_may_be_strided(device):
    wide = torch.full((80, 400), INF, device=device)
    logits = wide[::2, 100:390]
    logits[:, :90] = torch.randn(40, 90, device=device)
    for options in ({}, {"top_k": 5}, {"top_p": 0.8}):
        strided = sample(logits, 1, vocab_size=90, **options)
        for field, want in zip(strided, sample(logits[:, :90].contiguous(), 1, **options), strict=True):
            assert torch.equal(field, want)


def test_what_is_filtered_out_is_never_drawn(device):
    logits = torch.randn(3000, 1000, device=device)
    for top_k, top_p, min_p in [(0, 0.3, 0.0), (0, 1.0, 0.2), (300, 0.5, 0.1), (50, 0.5, 0.1)]:
        kept = unpack_bitmask(filter_bitmask_op(logits, 1000, None, None, top_k, top_p, min_p), 1000)
        drawn = sample(logits, 1, top_k=top_k or None, top_p=top_p, min_p=min_p)
        assert kept.gather(1, drawn.tokens[:, None]).all()


def test_compiles_without_graph_break(device):
    def step(logits, seed, offset, bitmask):
        plain = sample(logits * 2, seed, offset=offset)
        listed = sample(logits, seed, offset=offset, top_k=5, top_p=0.9, temperature=0.8, bitmask=bitmask)
        return *plain, *listed, *sample(logits, 3, min_p=0.01, bitmask=bitmask)

    inputs = (
        torch.randn(4, 2100, device=device),
        torch.tensor([11], device=device),
        torch.tensor([2], device=device),
        pack_bitmask(torch.rand(4, 2100, device=device) < 0.5),
    )
    before = [value.clone() for value in inputs]
    backend = "inductor" if device == "cuda" else "aot_eager"
    got = torch.compile(step, fullgraph=True, backend=backend)(*inputs)
    for field, want in zip(got, step(*inputs), strict=True):
        assert torch.equal(field, want)
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))  # not modified


@needs_gpu
def test_cuda_graph_replay_draws_new_numbers():
    logits, offset = torch.randn(64, 5000, device="cuda"), torch.zeros(1, dtype=torch.int64, device="cuda")

    def step():
        return *sample(logits, 3, offset=offset), *sample(logits, 3, offset=offset, top_p=0.9)

    step()  # compiled and loaded outside the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    before = [field.clone() for field in got]
    offset += 1
    graph.replay()
    for field, want in zip(got, step(), strict=True):
        assert torch.equal(field, want)
    assert not torch.equal(got[0], before[0])


X = torch.zeros(4, 40)
NUMBER = "expected a number in"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"logits": [1.0]}, TypeError, "logits: expected a tensor, got list"),
        ({"logits": X.double()}, TypeError, "logits: expected float32 or float16 or bfloat16, got float64"),
        ({"logits": X[0]}, ValueError, "logits: expected at least 2 dimensions, got 1"),
        (
            {"logits": torch.zeros(40, 4).t()},
            ValueError,
            "logits: expected unit stride in the last dimension, got strides (1, 4)",
        ),
        ({"seed": 1.5}, TypeError, f"seed: expected an int in [{-(2**63)}, {2**63 - 1}], got float"),
        ({"seed": 2**63}, ValueError, f"seed: expected an int in [{-(2**63)}, {2**63 - 1}], got {2**63}"),
        ({"seed": torch.zeros(1)}, TypeError, "seed: expected int64, got float32"),
        ({"offset": torch.zeros(2).long()}, ValueError, "offset: expected shape [1] = [1], got [2]"),
        ({"row_ids": torch.zeros(4)}, TypeError, "row_ids: expected int64, got float32"),
        ({"row_ids": torch.arange(3)}, ValueError, "row_ids: expected one per row of logits, 4, got [3]"),
        ({"top_k": 0}, ValueError, "top_k: expected an int >= 1, got 0"),
        ({"top_k": 2.0}, TypeError, "top_k: expected an int >= 1, got float"),
        ({"top_p": 0}, ValueError, f"top_p: {NUMBER} (0, 1], got 0"),
        ({"top_p": 1.5}, ValueError, f"top_p: {NUMBER} (0, 1], got 1.5"),
        ({"top_p": NAN}, ValueError, f"top_p: {NUMBER} (0, 1], got nan"),
        ({"top_p": "1"}, TypeError, f"top_p: {NUMBER} (0, 1], got str"),
        ({"min_p": -0.1}, ValueError, f"min_p: {NUMBER} [0, 1], got -0.1"),
        ({"min_p": True}, TypeError, f"min_p: {NUMBER} [0, 1], got bool"),
        ({"temperature": 0.0}, ValueError, "temperature: expected a number above 0, got 0.0"),
        ({"temperature": torch.ones(3)}, ValueError, "temperature: expected shape [R] = [4], got [3]"),
        ({"temperature": torch.ones(4).double()}, TypeError, "temperature: expected float32, got float64"),
        (
            {"bitmask": torch.zeros(4, 1, dtype=torch.int32)},
            ValueError,
            "bitmask: expected shape [R, ceil(V / 32)] = [4, 2], got [4, 1]",
        ),
        ({"vocab_size": 41}, ValueError, "vocab_size: expected an int in [1, 40], got 41"),
    ],
)
def test_rejects_bad_arguments(options, error, message):
    given = {"logits": X, "seed": 1} | options
    with pytest.raises(error) as caught:
        sample(**given)
    assert str(caught.value) == message
