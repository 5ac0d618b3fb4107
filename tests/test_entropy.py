"""The entropy of rows: against float64, kernel against torch definition, and the same bits in any batch."""

import pytest
import torch

from flashbeam.kernels import pack_bitmask, row_entropy, summarize
from flashbeam.kernels.triton.entropy import launch_row_entropy

INF, NAN = float("inf"), float("nan")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def in_float64(logits, allowed, temperature, active):
    """[R], straight from the definition; 0 where there is no distribution."""
    x = logits.double() / (1.0 if temperature is None else temperature.double()[:, None])
    x = x.masked_fill(x.isnan() if allowed is None else x.isnan() | ~allowed, -INF)
    p = x.softmax(1).nan_to_num(0.0)
    found = -torch.xlogy(p, p).sum(1)
    return found if active is None else found * active


# one size for each path: alone, below and above a power of two, a tile and more with a ragged tail
@pytest.mark.parametrize("vocab_size", [1, 33, 2048, 4500])
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_float64(vocab_size, dtype, device):
    logits = (torch.randn(7, vocab_size + 5) * 5).to(dtype)[:, :vocab_size]  # rows with a stride
    logits[1] = -INF
    logits[2, 0] = NAN
    logits[3] = 1.5  # flat: log V
    logits[4, vocab_size // 2] = 60.0  # all but certain
    allowed = torch.rand(7, vocab_size) < 0.5
    allowed[5] = False
    temperature, active = torch.rand(7) + 0.3, torch.arange(7) != 6
    for mask, t, on in ((None, None, None), (allowed, temperature, active)):
        options = {"bitmask": None if mask is None else pack_bitmask(mask), "temperature": t, "active": on}
        lse = summarize(logits, normalize="allowed", **options).lse
        found = row_entropy(logits, lse, **options)
        want = in_float64(logits, mask, t, on)
        torch.testing.assert_close(found.double(), want, atol=3e-6, rtol=2e-6)
        moved = [None if each is None else each.to(device) for each in (lse, *options.values())]
        kernel = launch_row_entropy(logits.to(device), vocab_size, *moved)
        torch.testing.assert_close(kernel.cpu().double(), want, atol=3e-6, rtol=2e-6)
    lse = summarize(logits).lse
    assert row_entropy(logits, lse)[3].item() == pytest.approx(torch.tensor(float(vocab_size)).log().item(), abs=2e-6)


def test_columns_behind_the_vocabulary_and_inactive_rows_are_not_read():
    logits = torch.randn(3, 100)
    lse = summarize(logits, vocab_size=70).lse
    want = row_entropy(logits[:, :70], lse)
    logits[:, 70:] = NAN
    logits[1] = NAN
    active = torch.tensor([True, False, True])
    assert torch.equal(row_entropy(logits, lse, vocab_size=70, active=active), want * active)


def test_a_row_that_holds_inf_is_no_distribution():
    logits = torch.randn(2, 50)
    logits[0, 3] = INF
    found = row_entropy(logits, summarize(logits).lse)
    assert found[0] == 0 and found[1] > 0


@pytest.mark.parametrize("vocab_size", [50, 3000, 70000])
def test_rows_are_bitwise_the_same_in_any_batch_and_with_any_number_of_threads(vocab_size):
    logits = torch.randn(9, vocab_size) * 4
    lse = summarize(logits).lse
    whole, before = row_entropy(logits, lse), torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for low, high in ((0, 9), (0, 1), (4, 5), (2, 8)):
                assert torch.equal(row_entropy(logits[low:high], lse[low:high]), whole[low:high])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    logits = torch.randn(2, 40).to(dtype)
    mask = pack_bitmask(torch.rand(2, 40) < 0.7)
    lse = summarize(logits, bitmask=mask, normalize="allowed").lse
    for args in ((logits, 40, lse, None, None, None), (logits, 40, lse, mask, torch.ones(2), torch.ones(2).bool())):
        torch.library.opcheck(torch.ops.flashbeam.row_entropy.default, args)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.randn(2, 5), torch.zeros(3)), ValueError, r"lse: expected shape \[R\] = \[2\], got \[3\]"),
        ((torch.randn(2, 5), torch.zeros(2).double()), TypeError, r"lse: expected float32, got float64"),
        ((torch.zeros(2, 5).int(), torch.zeros(2)), TypeError, r"logits: expected float32 or float16 or bfloat16"),
    ],
)
def test_rejects_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        row_entropy(*arguments)
