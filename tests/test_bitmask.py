"""Packed token masks: kernels against their torch definitions, and both against bits counted by hand."""

from __future__ import annotations

import pytest
import torch

from flashbeam.kernels.bitmask import apply_bitmask_, bits_at, mark_bits, pack_bitmask, unpack_bitmask
from flashbeam.kernels.triton.bitmask import (
    launch_apply_bitmask_,
    launch_mark_bits,
    launch_pack_bitmask,
    launch_unpack_bitmask,
)

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")

# one shape per path: within a word, a whole word, a word and a bit, one block, ragged second block, one row per rank,
# no row, no token
SHAPES = [(1,), (31,), (3, 32), (2, 33), (2048,), (2, 4100), (2, 3, 70), (0, 40), (2, 0)]


def random_mask(*shape, device="cpu"):
    return torch.rand(shape, device=device) < 0.5


def bits_by_hand(mask):
    """The words of a flat mask, as Python ints."""
    words = [0] * -(-len(mask) // 32)
    for token, allowed in enumerate(mask):
        words[token // 32] |= int(allowed) << (token % 32)
    return [word - 2**32 if word >= 2**31 else word for word in words]


@pytest.mark.parametrize("shape", SHAPES)
def test_matches_reference(shape, device):
    mask = random_mask(*shape, device=device)
    bits = pack_bitmask(mask.cpu())
    assert torch.equal(launch_pack_bitmask(mask).cpu(), bits)
    assert torch.equal(launch_unpack_bitmask(bits.to(device), shape[-1]), mask)
    assert torch.equal(unpack_bitmask(bits, shape[-1]), mask.cpu())


# more pairs than a program takes, expanded rows, one pair, none marked, no pair, no row
@pytest.mark.parametrize(
    ("rows", "count", "vocab", "share"),
    [
        (3, 700, 1000, 0.5),
        (2, 64, 64, 1.0),
        (1, 1, 32, 1.0),
        (4, 40, 70, 0.0),
        (2, 0, 70, 0.5),
        (0, 5, 70, 0.5),
    ],
)
def test_marks_the_pairs_that_are_marked(rows, count, vocab, share, device):
    tokens = torch.stack(
        [torch.randperm(vocab)[:count] for _ in range(rows)] or [torch.zeros(count, dtype=torch.int64)]
    )
    tokens = tokens[:rows]
    row = torch.arange(rows)[:, None].expand_as(tokens)
    marked = torch.rand(tokens.shape) < share
    allowed = torch.zeros(rows, vocab, dtype=torch.bool)
    allowed[row[marked], tokens[marked]] = True
    expected = torch.tensor([bits_by_hand(line) for line in allowed.tolist()], dtype=torch.int32)
    expected = expected.view(rows, -(-vocab // 32))
    assert torch.equal(mark_bits(row, tokens, marked, rows, vocab), expected)
    found = launch_mark_bits(row.to(device), tokens.to(device), marked.to(device), rows, vocab)
    assert torch.equal(found.cpu(), expected)
    # what is not marked may be out of range
    tokens = tokens.int().masked_fill(~marked, -1)
    assert torch.equal(mark_bits(row, tokens, marked, rows, vocab), expected)
    found = launch_mark_bits(row.to(device), tokens.to(device), marked.to(device), rows, vocab)
    assert torch.equal(found.cpu(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(31,), (3, 4100), (2, 3, 70), (0, 40), (2, 0)])
def test_apply_matches_reference(shape, dtype, device):
    logits, mask = torch.randn(shape).to(dtype), random_mask(*shape)
    by_kernel = logits.to(device)
    launch_apply_bitmask_(by_kernel, pack_bitmask(mask).to(device))
    want = torch.where(mask, logits, torch.tensor(-torch.inf, dtype=dtype))
    assert torch.equal(by_kernel.cpu(), want)
    assert apply_bitmask_(logits, pack_bitmask(mask)) is logits
    assert torch.equal(logits, want)


@pytest.mark.parametrize("pack", [pack_bitmask, launch_pack_bitmask])
@pytest.mark.parametrize("vocab_size", [1, 31, 32, 33, 95])
def test_layout_is_bit_j_mod_32_of_word_j_div_32(pack, vocab_size, device):
    mask = random_mask(2, vocab_size, device=device)
    assert pack(mask).tolist() == [bits_by_hand(row) for row in mask.tolist()]


@pytest.mark.parametrize("pack", [pack_bitmask, launch_pack_bitmask])
def test_bits_past_the_vocabulary_are_zero(pack, device):
    assert pack(torch.ones(2, 35, dtype=torch.bool, device=device)).tolist() == [[-1, 7], [-1, 7]]


def test_bits_past_the_vocabulary_are_not_read(device):
    bits = torch.full((1, 2), -1, dtype=torch.int32, device=device)
    bits[0, 1] = -8  # tokens 32, 33 and 34 disallowed; the tail is all ones
    for unpack in (unpack_bitmask, launch_unpack_bitmask):
        assert unpack(bits, 35)[0].tolist() == [True] * 32 + [False] * 3


@pytest.mark.parametrize("apply", [apply_bitmask_, launch_apply_bitmask_])
def test_wider_bitmask_is_cut_off(apply, device):
    logits, mask = torch.zeros(3, 40, device=device), random_mask(3, 200, device=device)
    apply(logits, pack_bitmask(mask))
    assert torch.equal(logits == 0, mask[:, :40])


@pytest.mark.parametrize("apply", [apply_bitmask_, launch_apply_bitmask_])
def test_allowed_nan_and_infinity_stay_and_barred_ones_go(apply, device):
    logits = torch.tensor([[float("nan"), float("inf"), float("nan"), float("inf"), -0.0]], device=device)
    apply(logits, torch.tensor([[0b10011]], dtype=torch.int32, device=device))
    assert logits[0, 0].isnan() and logits[0, 1:4].tolist() == [float("inf"), -float("inf"), -float("inf")]
    assert torch.signbit(logits[0, 4])


def test_row_without_allowed_token_is_neg_inf(device):
    logits = torch.randn(2, 50, device=device)
    launch_apply_bitmask_(logits, torch.zeros(2, 2, dtype=torch.int32, device=device))
    assert torch.equal(logits, torch.full_like(logits, -torch.inf))


def test_bits_at_reads_single_tokens():
    mask = random_mask(4, 100)
    bits, rows, tokens = pack_bitmask(mask), torch.tensor([[0, 3], [2, 2]]), torch.tensor([[31, 99], [32, 0]])
    assert torch.equal(bits_at(bits, rows, tokens), mask[rows, tokens])
    assert torch.equal(bits_at(bits, slice(None), tokens[0]), mask[:, tokens[0]])


def test_batch_invariant_bitwise(device):
    logits, mask = torch.randn(7, 300, device=device), random_mask(7, 300, device=device)
    alone, bits = logits[4:5].clone(), pack_bitmask(mask)
    assert torch.equal(launch_pack_bitmask(mask[4:5]), bits[4:5])
    launch_apply_bitmask_(logits, bits)
    launch_apply_bitmask_(alone, bits[4:5])
    assert torch.equal(alone, logits[4:5])


@pytest.mark.parametrize("apply", [apply_bitmask_, launch_apply_bitmask_])
def test_strided_rows(apply, device):
    whole, mask = torch.randn(4, 3, 200, device=device), random_mask(3, 4, 100, device=device)
    before, wide = whole.clone(), torch.zeros(3, 8, 8, dtype=torch.int32, device=device)
    bits = wide[:, ::2, ::2]
    bits.copy_(pack_bitmask(mask))
    apply(whole[:, :, ::2].transpose(0, 1), bits)  # [3, 4, 100]
    assert torch.equal(whole[:, :, 1::2], before[:, :, 1::2])
    allowed = mask.transpose(0, 1)
    assert torch.equal(whole[:, :, ::2], before[:, :, ::2].masked_fill(~allowed, -torch.inf))


@pytest.mark.parametrize("pack", [pack_bitmask, launch_pack_bitmask])
def test_strided_mask(pack, device):
    mask = random_mask(90, 2, 3, device=device).permute(2, 1, 0)
    assert torch.equal(pack(mask), pack(mask.contiguous()))
    bits = torch.stack([pack(mask)] * 2, -1)[..., 1].transpose(0, 1)
    for unpack in (unpack_bitmask, launch_unpack_bitmask):
        assert torch.equal(unpack(bits, 90), mask.transpose(0, 1))


def test_input_not_modified(device):
    mask = random_mask(3, 70, device=device)
    bits = pack_bitmask(mask)
    kept = mask.clone(), bits.clone()
    for pack, unpack, apply in (
        (pack_bitmask, unpack_bitmask, apply_bitmask_),
        (launch_pack_bitmask, launch_unpack_bitmask, launch_apply_bitmask_),
    ):
        pack(mask)
        unpack(bits, 70)
        apply(torch.zeros(3, 70, device=device), bits)
    assert torch.equal(mask, kept[0]) and torch.equal(bits, kept[1])


def test_logits_that_require_grad_are_detached(device):
    logits = torch.zeros(1, 2, requires_grad=True, device=device)
    apply_bitmask_(logits, torch.tensor([[1]], dtype=torch.int32, device=device))
    assert logits.tolist() == [[0.0, -float("inf")]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_opcheck(dtype, device):
    mask = random_mask(3, 70, device=device)
    bits = pack_bitmask(mask)
    ops = torch.ops.flashbeam
    torch.library.opcheck(ops.apply_bitmask_, (torch.randn(3, 70, device=device).to(dtype), bits))
    if dtype == torch.float32:
        torch.library.opcheck(ops.pack_bitmask, (mask,))
        torch.library.opcheck(ops.pack_bitmask, (mask.t(),))
        torch.library.opcheck(ops.unpack_bitmask, (bits, 70))
        torch.library.opcheck(ops.unpack_bitmask, (bits, 96))
        pairs = torch.arange(12, device=device).view(3, 4)
        torch.library.opcheck(ops.mark_bits, (pairs // 4, pairs * 5, pairs % 2 == 0, 3, 70))


def test_compiles_without_graph_break(device):
    def step(logits, mask):
        bits = pack_bitmask(mask)
        return apply_bitmask_(logits * 2, bits), unpack_bitmask(bits, 70)

    logits, mask = torch.randn(3, 70, device=device), random_mask(3, 70, device=device)
    backend = "inductor" if device == "cuda" else "aot_eager"
    got, unpacked = torch.compile(step, fullgraph=True, backend=backend)(logits, mask)
    assert torch.equal(got, (logits * 2).masked_fill(~mask, -torch.inf)) and torch.equal(unpacked, mask)


@needs_gpu
def test_cuda_graph_replay_reads_new_inputs():
    mask, logits = random_mask(4, 5000, device="cuda"), torch.randn(4, 5000, device="cuda")
    source = logits.clone()

    def step():
        logits.copy_(source)
        bits = pack_bitmask(mask)
        return apply_bitmask_(logits, bits), unpack_bitmask(bits, 5000)

    step()  # compiled and loaded outside the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got, unpacked = step()
    mask.logical_not_()
    source.normal_()
    graph.replay()
    assert torch.equal(got, source.masked_fill(~mask, -torch.inf)) and torch.equal(unpacked, mask)


def ints(*shape):
    return torch.zeros(shape, dtype=torch.int32)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: pack_bitmask([True]), TypeError, "mask: expected a tensor, got list"),
        (lambda: pack_bitmask(ints(3)), TypeError, "mask: expected bool, got int32"),
        (lambda: pack_bitmask(torch.tensor(True)), ValueError, "mask: expected at least 1 dimension, got 0"),
        (lambda: unpack_bitmask(torch.zeros(3), 4), TypeError, "bitmask: expected int32, got float32"),
        (lambda: unpack_bitmask(ints(), 4), ValueError, "bitmask: expected at least 1 dimension, got 0"),
        (lambda: unpack_bitmask(ints(2), 65), ValueError, "vocab_size: expected an int in [0, 64], got 65"),
        (lambda: unpack_bitmask(ints(2), -1), ValueError, "vocab_size: expected an int in [0, 64], got -1"),
        (lambda: unpack_bitmask(ints(2), 1.0), TypeError, "vocab_size: expected an int in [0, 64], got float"),
        (
            lambda: apply_bitmask_(torch.zeros(4).double(), ints(1)),
            TypeError,
            "logits: expected float32 or float16 or bfloat16, got float64",
        ),
        (
            lambda: apply_bitmask_(torch.zeros(()), ints(1)),
            ValueError,
            "logits: expected shape [V], [R, V] or [B, K, V], got []",
        ),
        (lambda: apply_bitmask_(torch.zeros(4), torch.zeros(1)), TypeError, "bitmask: expected int32, got float32"),
        (
            lambda: apply_bitmask_(torch.zeros(4), ints()),
            ValueError,
            "bitmask: expected at least 1 dimension, got 0",
        ),
        (
            lambda: apply_bitmask_(torch.zeros(2, 33), ints(2, 1)),
            ValueError,
            "bitmask: expected at least 2 words a row, got 1",
        ),
        (
            lambda: apply_bitmask_(torch.zeros(2, 33), ints(3, 2)),
            ValueError,
            "bitmask: expected shape [..., W] = [2, 2], got [3, 2]",
        ),
        (
            lambda: apply_bitmask_(torch.zeros(1, 33).expand(2, 33), ints(2, 2)),
            ValueError,
            "logits: expected a tensor without expanded dimensions, got strides (0, 1)",
        ),
        (
            lambda: apply_bitmask_(torch.zeros(2, 33), ints(2, 2).to("meta")),
            ValueError,
            "bitmask: expected all tensors on one device, got logits on cpu, bitmask on meta",
        ),
        (
            lambda: mark_bits(torch.zeros(2, dtype=torch.int64), torch.ones(2), torch.ones(2, dtype=torch.bool), 1, 9),
            TypeError,
            "tokens: expected int64 or int32, got float32",
        ),
        (
            lambda: mark_bits(*torch.zeros(2, 2, dtype=torch.int64), torch.ones(3, dtype=torch.bool), 1, 9),
            ValueError,
            "marked: expected the shape of rows, [2], got [3]",
        ),
    ],
)
def test_rejects_bad_arguments(call, error, message):
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == message
