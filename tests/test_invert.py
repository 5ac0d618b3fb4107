"""Inverting the distribution: integers against Python's, kernel against torch definition, counts of a lattice."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch

from flashbeam.kernels import invert_cdf, pack_bitmask
from flashbeam.kernels.invert import divide, invert_cdf_op, multiply
from flashbeam.kernels.summary import summarize_op
from flashbeam.kernels.tiles import GROUPS, TILE
from flashbeam.kernels.triton.invert import launch_invert_cdf

INF, NAN = float("inf"), float("nan")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
EDGES = [0, 1, -1, -2, 2**63 - 1, -(2**63), 2**62]


def random_codes(count):
    return torch.randint(-(2**63), 2**63 - 1, (count,))


def unsigned(codes):
    return [code % 2**64 for code in codes.tolist()]


def tiles_of(logits, vocab_size, bitmask, temperature):
    return summarize_op(logits, vocab_size, bitmask, temperature, None, None, True, False)[2:4]


def draw(logits, rows, codes, bitmask=None, temperature=None, vocab_size=None):
    vocab_size = vocab_size or logits.shape[1]
    ref, total = tiles_of(logits, vocab_size, bitmask, temperature)
    return invert_cdf_op(logits, ref, total, rows, codes, vocab_size, bitmask, temperature)


def check(logits, rows, codes, device, bitmask=None, temperature=None, vocab_size=None, exact=False):
    """The definition and the kernel, given one summary, draw the same tokens."""
    vocab_size = vocab_size or logits.shape[1]
    ref, total = tiles_of(logits, vocab_size, bitmask, temperature)
    want = invert_cdf_op(logits, ref, total, rows, codes, vocab_size, bitmask, temperature)
    moved = [t if t is None else t.to(device) for t in (logits, ref, total, rows, codes, bitmask, temperature)]
    got = [field.cpu() for field in launch_invert_cdf(*moved[:5], vocab_size, *moved[5:])]
    assert torch.equal(got[0], want[0]) and got[0].dtype == got[1].dtype == torch.int64
    if exact:
        assert torch.equal(got[1], want[1])
    # an ulp of an exponential moves a code by as much as the token's interval is smaller than the row's
    x = logits[:, :vocab_size].double() / (1.0 if temperature is None else temperature[:, None])
    p = x.nan_to_num(nan=-INF).softmax(-1)[rows, want[0]].nan_to_num(nan=1.0).clamp(min=1e-9).numpy()
    distance = np.abs(np.array(unsigned(got[1]), np.float64) - np.array(unsigned(want[1]), np.float64))
    assert (distance <= 3e-6 * 2.0**64 / p).all()
    return want


# ---------------------------------------------------------------------------------------------------------------------
# the integers


def test_products_and_quotients_are_those_of_python():
    rng = random.Random(0)
    sizes = [rng.randrange(1, 2 ** rng.randrange(1, 33)) for _ in range(300)] + [1, 2**32, 2**32 - 1]
    codes = [rng.getrandbits(64) for _ in sizes[:-3]] + [2**64 - 1] * 3
    totals = [rng.randrange(1, 2 ** rng.randrange(1, 63)) for _ in sizes[:-3]] + [2**62, 2**45, 1]
    signed = torch.tensor([code - 2**64 if code >> 63 else code for code in codes])
    upper, lower = multiply(signed, torch.tensor(totals))
    products = [code * total for code, total in zip(codes, totals, strict=True)]
    assert upper.tolist() == [product >> 64 for product in products]
    assert unsigned(lower) == [product % 2**64 for product in products]
    uppers = [rng.randrange(size) for size in sizes]
    quotients = divide(torch.tensor(uppers), signed, torch.tensor(sizes))
    exact = [(high * 2**64 + low) // size for high, low, size in zip(uppers, codes, sizes, strict=True)]
    assert unsigned(quotients) == exact


def descend_by_hand(mass, code):
    """One step in Python's integers, from float32 masses."""
    top = max(mass)
    share = [max(1, int(np.float32(m / top) * np.float32(2**32) + np.float32(0.5))) if m > 0 else 0 for m in mass]
    whole = code * sum(share) >> 64
    before = 0
    for child, size in enumerate(share):
        if before <= whole < before + size:
            return child, (code * sum(share) - (before << 64)) // size
        before += size
    raise AssertionError


def draw_by_hand(x, tile_ref, tile_sum, code):
    """The formula at the top of ``kernels/invert.py`` for one row of float32 numbers without temperature."""

    def masses(values, top):
        exponent = torch.as_tensor(values) - torch.as_tensor(top)
        return torch.where(exponent >= -87, exponent.exp(), 0.0)

    tile, code = descend_by_hand((masses(tile_ref, tile_ref.max()) * tile_sum).numpy(), code)
    inside = np.full(TILE, -np.inf, np.float32)
    part = x[tile * TILE : (tile + 1) * TILE]
    inside[: len(part)] = part
    mass = masses(inside, inside.max()).numpy().reshape(32, GROUPS)
    sums = [
        np.float32(max(1, sum(int(m * np.float32(2**32) + np.float32(0.5)) for m in column))) if column.max() > 0 else 0
        for column in mass.T
    ]
    group, code = descend_by_hand(np.array(sums, np.float32), code)
    place, code = descend_by_hand(mass[:, group], code)
    return tile * TILE + place * GROUPS + group, code


@pytest.mark.parametrize("vocab_size", [1, 70, 2 * TILE + 100])
def test_matches_the_formula_in_big_integers(vocab_size):
    logits = torch.randn(2, vocab_size) * 4
    logits[1, ::3] -= 95.0  # of no mass, or of one unit
    codes = torch.cat([torch.tensor(EDGES), random_codes(23)])
    tiles = tiles_of(logits, vocab_size, None, None)
    for row in range(2):
        ref, total = (field[row] for field in tiles)
        tokens, rest = draw(logits, torch.full_like(codes, row), codes)
        for i, code in enumerate(unsigned(codes)):
            assert (tokens[i].item(), unsigned(rest)[i]) == draw_by_hand(logits[row].numpy(), ref, total, code)


@pytest.mark.parametrize("tiles", [1, 4])
def test_equal_powers_of_two_read_the_bits_of_the_code(tiles, device):
    """Of 2^n equal tokens, each step takes the upper bits of the code and leaves the others, all of them."""
    logits = torch.full((1, tiles * TILE), -3.5)
    codes = torch.cat([torch.tensor(EDGES), random_codes(7)])
    tokens, rest = check(logits, torch.zeros_like(codes), codes, device, exact=True)
    taken = 11 + int(math.log2(tiles))
    for code, token, left in zip(unsigned(codes), tokens.tolist(), unsigned(rest), strict=True):
        tile, group, place = code >> (64 - taken + 11), code >> (64 - taken + 5), code >> (64 - taken)
        assert token == tile * TILE + (place % 32) * 64 + group % 64
        assert left == (code << taken) % 2**64


# ---------------------------------------------------------------------------------------------------------------------
# laws


@pytest.mark.parametrize("count", [1, 7, 64, 1000])
@pytest.mark.parametrize("vocab_size", [3, 70, 5000])
def test_tokens_get_floor_or_ceil_of_their_share_of_a_lattice(vocab_size, count):
    logits = torch.randn(1, vocab_size) * 3
    expected = logits[0].double().softmax(0) * count
    for shift in (0, 2**64 - 1, random.getrandbits(64)):
        lattice = [(i * 2**64 // count + shift) % 2**64 for i in range(count)]
        codes = torch.tensor([code - 2**64 if code >> 63 else code for code in lattice])
        tokens, _ = draw(logits, torch.zeros(count, dtype=torch.int64), codes)
        counts = tokens.bincount(minlength=vocab_size)
        slack = 1e-6 * expected + 1e-5
        assert (counts >= (expected - slack).floor()).all() and (counts <= (expected + slack).ceil()).all()


def test_what_is_left_of_a_code_is_uniform_and_draws_on():
    logits = torch.randn(1, 300)
    codes = torch.tensor([code - 2**63 for code in range(0, 2**64, 2**64 // 4000)][:4000])
    rows = torch.zeros_like(codes)
    for _ in range(10):  # 80 bits
        tokens, codes = draw(logits, rows, codes)
    p = logits[0].double().softmax(0)
    statistic = ((tokens.bincount(minlength=300) - 4000 * p) ** 2 / (4000 * p)).sum()
    assert torch.special.gammaincc(torch.tensor(299 / 2).double(), statistic / 2) > 1e-4
    assert len(set(codes.tolist())) > 3990


def test_tokens_without_mass_are_never_drawn(device):
    """At either end of the codes, and with the ends of the vocabulary, of tiles and of groups barred."""
    vocab_size = TILE + 200
    logits = torch.randn(3, vocab_size)
    logits[0, :64], logits[0, -100:] = -INF, NAN
    logits[1, :], logits[1, 1000], logits[1, TILE + 5] = -INF, 0.0, -40.0
    logits[2, TILE:] = -200.0
    allowed = torch.rand(3, vocab_size) < 0.5
    allowed[1, 1000] = allowed[1, TILE + 5] = True
    codes, rows = torch.tensor(EDGES).repeat(3), torch.arange(3).repeat_interleave(len(EDGES))
    tokens, _ = check(logits, rows, codes, device, bitmask=pack_bitmask(allowed))
    assert allowed[rows, tokens].all() and (logits[rows, tokens] > -INF).all()
    assert set(tokens[rows == 1].tolist()) == {1000, TILE + 5}  # of all codes, the last belongs to the last tile
    assert (tokens[rows == 2] < TILE).all()


# ---------------------------------------------------------------------------------------------------------------------
# kernel and definition


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab_size", [1, 63, 2 * TILE + 1])
def test_kernel_matches_definition(vocab_size, dtype, device):
    logits = (torch.randn(3, vocab_size) * 3).to(dtype)
    codes, rows = random_codes(9), torch.tensor([2, 0, 1]).repeat(3)
    check(logits, rows, codes, device)
    bits = pack_bitmask(torch.rand(3, vocab_size) < 0.6)
    check(logits, rows, codes, device, bitmask=bits, temperature=torch.tensor([0.3, 1.0, 2.5]))


def test_rows_without_a_distribution_give_token_0_and_keep_the_code(device):
    logits = torch.randn(5, 3000)
    logits[0], logits[1], logits[2, 2500], logits[3, 0] = -INF, NAN, INF, INF
    bits = pack_bitmask(torch.ones(5, 3000, dtype=torch.bool))
    bits[4] = 0
    codes = random_codes(5)
    tokens, rest = check(logits, torch.arange(5), codes, device, bitmask=bits, exact=True)
    assert tokens.tolist() == [0] * 5 and torch.equal(rest, codes)


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")  # numpy, under the interpreter
def test_extreme_logits_and_temperatures(device):
    logits = torch.randn(4, 100) * 7e37
    rows, codes = torch.arange(4), torch.tensor([0, -1, 5, 2**63 - 1])
    tokens, _ = check(logits, rows, codes, device)
    assert torch.equal(tokens, logits.argmax(1))
    check(torch.randn(4, 100), rows, codes, device, temperature=torch.tensor([1e-30, 1e30, 1e-38, 1e-3]))


def test_padding_is_never_read_and_rows_may_be_strided(device):
    wide = torch.full((6, 2400), NAN)
    logits = wide[::2, 100:2300]
    logits[:, :2100] = torch.randn(3, 2100)
    bits = torch.zeros(6, 200, dtype=torch.int32)[1::2, 50:150]
    bits[:, :66] = pack_bitmask(torch.rand(3, 2100) < 0.5)
    rows, codes = torch.arange(3).repeat(2), random_codes(6)
    strided = check(logits, rows, codes, device, bitmask=bits, vocab_size=2100)
    dense = draw(logits[:, :2100].contiguous(), rows, codes, bits[:, :66].contiguous())
    assert all(torch.equal(a, b) for a, b in zip(strided, dense, strict=True))


def test_no_draw(device):
    tokens, rest = check(torch.randn(2, 70), torch.zeros(0, dtype=torch.int64), random_codes(0), device, exact=True)
    assert tokens.shape == rest.shape == (0,)


def test_more_than_2_24_tokens(device):
    logits = torch.zeros(1, 2**24 + 70, dtype=torch.float16)
    logits[0, -1] = 17.0
    tokens, _ = check(logits, torch.zeros(4, dtype=torch.int64), torch.tensor([0, -1, 2**62, -(2**62)]), device)
    assert tokens[0] == 0 and tokens[1] >= 2**24  # the last group that has tokens, by column


def test_batch_invariant_bitwise():
    logits, codes = torch.randn(8, 5000) * 3, random_codes(600)
    rows = torch.randint(0, 8, (600,))
    tokens, rest = draw(logits, rows, codes)
    for threads in (1, 3):
        torch.set_num_threads(threads)
        for i in (0, 255, 256, 599):
            alone = draw(logits[rows[i : i + 1]], torch.zeros(1, dtype=torch.int64), codes[i : i + 1])
            assert (alone[0].item(), alone[1].item()) == (tokens[i].item(), rest[i].item())
    torch.set_num_threads(1)


@pytest.mark.parametrize("full", [False, True])
def test_opcheck(full, device):
    logits, temperature = torch.randn(4, 2100, device=device), torch.rand(4, device=device) + 0.5 if full else None
    bits = pack_bitmask(torch.rand(4, 2100, device=device) < 0.5) if full else None
    ref, total = (field.clone() for field in tiles_of(logits, 2100, bits, temperature))
    rows, codes = torch.tensor([3, 0, 3], device=device), random_codes(3).to(device)
    arguments = (logits, ref, total, rows, codes, 2100, bits, temperature)
    torch.library.opcheck(torch.ops.flashbeam.invert_cdf, arguments)


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("rows", torch.zeros(3), TypeError, "rows: expected int64"),
        ("codes", torch.zeros(3, dtype=torch.int32), TypeError, "codes: expected int64"),
        ("codes", torch.zeros(4, dtype=torch.int64), ValueError, "codes: expected"),
        ("tile_ref", torch.zeros(6, 2), ValueError, "tile_ref: expected"),
        ("tile_sum", torch.zeros(6, 1).half(), TypeError, "tile_sum: expected float32"),
        ("vocab_size", 51, ValueError, "vocab_size: expected"),
    ],
)
def test_the_public_form_rejects_bad_arguments(name, value, error, message):
    good = {
        "logits": torch.zeros(6, 50),
        "tile_ref": torch.zeros(6, 1),
        "tile_sum": torch.ones(6, 1),
        "rows": torch.zeros(3, dtype=torch.int64),
        "codes": torch.zeros(3, dtype=torch.int64),
    }
    invert_cdf(**good)
    with pytest.raises(error, match=f"^{message}"):
        invert_cdf(**{**good, name: value})
