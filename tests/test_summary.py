"""The pass over the logits and the log-sum-exp of rows: kernels, torch definitions, and both against float64."""

from __future__ import annotations

import mmap

import pytest
import torch

import flashbeam.kernels.summary
from flashbeam.kernels import FLAG_INF, FLAG_NAN, pack_bitmask, summarize
from flashbeam.kernels import place as place_of
from flashbeam.kernels.lse import merge_tiles
from flashbeam.kernels.summary import summarize_op
from flashbeam.kernels.summary_parts import active_spans, lightly_masked
from flashbeam.kernels.tiles import GROUP_SIZE, GROUPS, TILE, Tiles
from flashbeam.kernels.triton.lse import launch_row_lse
from flashbeam.kernels.triton.summary import launch_summarize

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
# infinities are meant; numpy, which the interpreter computes with, warns of log(0)
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
INF, NAN = float("inf"), float("nan")
OPTIONS = ("bitmask", "temperature", "active", "exclude", "renormalize", "mass")

# one size per path: one token, a group column missing, one row of groups, one token in the second row of groups,
# a ragged tile, a whole tile, a tile of one token, a ragged third tile, a second program (four tiles each)
SIZES = [1, 63, 64, 65, 2047, 2048, 2049, 5000, 4 * TILE + 100]


@pytest.fixture(autouse=True)
def _threads():
    """Tests of threads set their own number; the others are faster with one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def by_definition(logits, vocab_size, device="cpu", **options):
    """Tiles from the torch definition, whatever the device of the test."""
    return Tiles(*summarize_op(logits, vocab_size, *arguments(options)))


def by_kernel(logits, vocab_size, device, **options):
    """Tiles from the kernel, back on the CPU."""
    values = [v.to(device) if isinstance(v, torch.Tensor) else v for v in arguments(options)]
    return Tiles(*(field.cpu() for field in launch_summarize(logits.to(device), vocab_size, *values)))


def arguments(options):
    assert set(options) <= set(OPTIONS)
    return [options.get(name) for name in OPTIONS[:4]] + [options.get(name, False) for name in OPTIONS[4:]]


def lse_by_kernel(tile_ref, tile_sum, temperature, device):
    temperature = None if temperature is None else temperature.to(device)
    lse, flags = launch_row_lse(tile_ref.to(device), tile_sum.to(device), temperature)
    return lse.cpu(), flags.cpu()


BOTH = pytest.mark.parametrize("tiles_by", [by_definition, by_kernel])


def random_bits(rows, vocab_size, share=0.5):
    return pack_bitmask(torch.rand(rows, vocab_size) < share)


def in_tiles(x, fill):
    """``[R, V]`` -> ``[R, N, 32, 64]``, padded with ``fill``."""
    return torch.nn.functional.pad(x, (0, -x.shape[1] % TILE), value=fill).unflatten(1, (-1, GROUP_SIZE, GROUPS))


def expected(logits, vocab_size, precision=torch.float64, **options):
    """The formulas at the top of kernels/summary.py, every token in memory: (Tiles, lse, flags)."""
    x = logits[:, :vocab_size]
    rows, nan, dtype = x.shape[0], x.isnan(), x.dtype
    candidates, normalised = torch.ones_like(nan), torch.ones_like(nan)
    if options.get("bitmask") is not None:
        bits = options["bitmask"]
        token = torch.arange(vocab_size)
        candidates = (bits[:, token // 32] >> (token % 32)) & 1 == 1
        if options.get("renormalize"):
            normalised = candidates.clone()
    if options.get("active") is not None:
        candidates = candidates & options["active"][:, None]
        normalised = normalised & options["active"][:, None]
    if options.get("exclude") is not None:
        candidates = candidates.index_fill(1, options["exclude"], False)
    temperature = options.get("temperature")
    temperature = torch.ones(rows) if temperature is None else temperature
    temperature = temperature.to(precision)[:, None, None, None]
    x = x.masked_fill(nan, -INF).to(precision)
    c = in_tiles(x.masked_fill(~candidates, -INF), -INF)
    n = in_tiles(x.masked_fill(~normalised, -INF), -INF)
    group_max, tile_ref = c.amax(2), n.amax((2, 3))
    finite_ref = tile_ref.masked_fill(tile_ref.isinf(), 0.0)[:, :, None, None]
    finite_max = group_max.masked_fill(group_max.isinf(), 0.0)[:, :, None]
    tile_sum = ((n - finite_ref) / temperature).exp().sum((2, 3))
    group_mass = ((c - finite_max) / temperature).exp().sum(2)
    saw_nan = in_tiles(nan & normalised, False).any(3).any(2)
    tile_sum = torch.where(saw_nan, -tile_sum.clamp(min=1.0), tile_sum)
    if not options.get("mass"):
        group_mass = group_mass[:, :0]
    lse = (n / temperature).flatten(1).logsumexp(1)
    tile_max = group_max.amax(-1)
    tiles = Tiles(group_max.to(dtype), tile_max.to(dtype), tile_ref.to(dtype), tile_sum, group_mass)
    return tiles, lse, saw_nan.any(1) * FLAG_NAN + (lse == INF) * FLAG_INF


def check_budget(got, want, reference):
    """Within twice the worst error of torch in float32, plus 2**-20; relative where values exceed 1."""
    assert got.dtype == torch.float32 and got.shape == want.shape
    special = ~want.isfinite()
    assert torch.equal(got[special].double(), want[special])
    got, want, reference = got[~special].double(), want[~special], reference[~special].double()
    if want.numel() == 0:
        return
    assert torch.equal(got.signbit(), want.signbit()) or (got - want).abs().max() < 1e-6
    scale = want.abs().clamp(min=1.0)
    error, allowance = ((got - want).abs() / scale).max(), ((reference - want).abs() / scale).max()
    assert error <= 2 * allowance + 2.0**-20, (float(error), float(allowance))


def check(tiles_by, logits, vocab_size, device, **options):
    """Tiles, log-sum-exp and flags against float64."""
    tiles = tiles_by(logits, vocab_size, device, **options)
    want, want_lse, want_flags = expected(logits, vocab_size, **options)
    in_float32, lse_in_float32, _ = expected(logits, vocab_size, torch.float32, **options)
    for name in ("group_max", "tile_max", "tile_ref"):
        assert getattr(tiles, name).dtype == logits.dtype, name
        assert torch.equal(getattr(tiles, name), getattr(want, name)), name
    for name in ("tile_sum", "group_mass"):
        check_budget(getattr(tiles, name), getattr(want, name), getattr(in_float32, name))
    temperature = options.get("temperature")
    if tiles_by is by_kernel:
        lse, flags = lse_by_kernel(tiles.tile_ref, tiles.tile_sum, temperature, device)
    else:
        lse, flags = merge_tiles(tiles.tile_ref, tiles.tile_sum, temperature)
    check_budget(lse, want_lse, lse_in_float32)
    assert flags.dtype == torch.int32 and torch.equal(flags, want_flags.int())
    return tiles


def combinations(vocab_size, rows):
    """Every option alone, and the two ways to normalise with everything else on."""
    temperature = torch.rand(rows) * 2 + 0.25
    active = torch.arange(rows) != 1
    exclude = torch.tensor(sorted({0, vocab_size // 2, vocab_size - 1}))
    bits = random_bits(rows, vocab_size)
    return [
        {},
        {"temperature": temperature},
        {"bitmask": bits},
        {"bitmask": bits, "renormalize": True, "active": active},
        {"exclude": exclude},
        {"mass": True, "active": active},
        {"bitmask": bits, "temperature": temperature, "active": active, "exclude": exclude},
        {"bitmask": bits, "temperature": temperature, "renormalize": True, "mass": True},
    ]


@BOTH
@pytest.mark.parametrize("vocab_size", SIZES)
def test_matches_reference(vocab_size, tiles_by, device):
    logits = torch.randn(3, vocab_size) * 3
    for i, options in enumerate(combinations(vocab_size, 3)):
        check(tiles_by, logits.to(DTYPES[i % 3]), vocab_size, device, **options)


@BOTH
def test_no_row(tiles_by, device):
    tiles = check(tiles_by, torch.zeros(0, 70), 70, device, mass=True)
    assert tiles.group_max.shape == tiles.group_mass.shape == (0, 1, 64)


def adversarial_rows(vocab_size, dtype=torch.float32):
    """Rows made to hurt, ``[R, V]``."""
    index = torch.arange(vocab_size)
    normal = torch.randn(vocab_size) * 3
    middle, last = index == vocab_size // 2, index == vocab_size - 1
    rows = {
        "ascending": index / vocab_size * 9,
        "descending": -index / vocab_size * 9,
        "all equal": torch.full((vocab_size,), 1.25),
        "one finite": torch.where(last, -7.0, -INF),
        "all -inf": torch.full((vocab_size,), -INF),
        "one nan": torch.where(middle, NAN, normal),
        "many nan": torch.where(torch.rand(vocab_size) < 0.4, NAN, normal),
        "all nan": torch.full((vocab_size,), NAN),
        "+inf": torch.where(middle, INF, normal),
        "nan and +inf": torch.where(last, INF, torch.where(middle, NAN, normal)),
        "nan, else -inf": torch.where(middle, NAN, -INF),
        "zeros of both signs": torch.where(torch.rand(vocab_size) < 0.5, 0.0, -0.0),
        "far above": normal + 1e4,
        "far below": normal - 1e4,
        "between the largest of float16": torch.where(index % 3 == 0, 65504.0, -65504.0),
    }
    return torch.stack(list(rows.values())).to(dtype)


@BOTH
@pytest.mark.parametrize(
    ("vocab_size", "dtype"), [*((v, torch.float32) for v in SIZES[:-1]), *((2049, d) for d in DTYPES[1:])]
)
def test_adversarial_rows(vocab_size, dtype, tiles_by, device):
    logits = adversarial_rows(vocab_size, dtype)
    check(tiles_by, logits, vocab_size, device, mass=True)
    if vocab_size in (65, 2049):
        options = combinations(vocab_size, len(logits))
        check(tiles_by, logits, vocab_size, device, **options[2])
        check(tiles_by, logits, vocab_size, device, **options[-1])


@BOTH
def test_small_temperature(tiles_by, device):
    """A hundredth of a degree multiplies by 144 what is exponentiated."""
    logits, cold = torch.randn(3, 2100) * 10, torch.tensor([0.01, 0.1, 100.0])
    check(tiles_by, logits, 2100, device, temperature=cold, mass=True)


@BOTH
@pytest.mark.parametrize(
    ("top", "temperature"), [(3e38, 1.0), (-3e38, 1.0), (1e10, 1.0), (60000.0, 1e-6), (20.0, 1e-8)]
)
def test_scaled_logits_beyond_2_31(top, temperature, tiles_by, device):
    """There the rounding error of ``ref * scale`` alone is beyond what exp2 can take."""
    tops = top * (1 - torch.rand(16, 1) / 4)
    logits = torch.cat([tops, tops - abs(top) * torch.rand(16, 69) / 8, tops - 40 * temperature], 1)
    check(tiles_by, logits, 71, device, temperature=torch.full((16,), temperature), mass=True)


@BOTH
def test_row_without_allowed_token_has_no_candidates_and_no_mass(tiles_by, device):
    none = torch.zeros(2, 66, dtype=torch.int32)
    tiles = tiles_by(torch.randn(2, 2100), 2100, device, bitmask=none, renormalize=True, mass=True)
    assert (tiles.group_max == -INF).all() and (tiles.tile_max == -INF).all() and (tiles.tile_ref == -INF).all()
    assert (tiles.tile_sum == 0).all() and (tiles.group_mass == 0).all()
    lse, flags = merge_tiles(tiles.tile_ref, tiles.tile_sum, None)
    assert lse.tolist() == [-INF, -INF] and flags.tolist() == [0, 0]


def tree_sums(x):
    """Sums of tiles ``x [R, N, 32, 64]`` float32, added up in the one order, pair by pair."""
    for half in (16, 8, 4, 2, 1):
        x = x[:, :, :half] + x[:, :, half : 2 * half]
    x = x[:, :, 0]
    while x.shape[2] > 1:
        x = x[:, :, ::2] + x[:, :, 1::2]
    return x[:, :, 0]


@BOTH
@pytest.mark.parametrize("vocab_size", [*SIZES[:4], 700, *SIZES[4:]])
def test_sums_are_the_fixed_tree(vocab_size, tiles_by, device):
    """Exponentials are powers of two, hence exact, and of sizes that make every other order round otherwise."""
    power = torch.randint(-30, 1, (6, vocab_size)).float()
    allowed = torch.rand(6, vocab_size) < torch.tensor([1.0, 0.9, 0.5, 0.1, 0.01, 0.001])[:, None]
    temperature = torch.full((6,), 1.4426950408889634)  # log2(e): the scale is 1
    options = {"bitmask": pack_bitmask(allowed), "temperature": temperature, "renormalize": True}
    tiles = tiles_by(power + 7.0, vocab_size, device, **options)
    x = in_tiles(power.masked_fill(~allowed, -INF), -INF)
    x = (x - x.amax((2, 3), keepdim=True).clamp(min=-100)).exp2()
    assert torch.equal(tiles.tile_sum, tree_sums(x))
    assert vocab_size < 700 or not torch.equal(tiles.tile_sum, x.flatten(2).cumsum(2)[..., -1])


def test_place_numbers_the_tokens_as_the_tree_merges_them():
    token = torch.arange(2 * TILE)
    order = place_of(token).argsort()
    assert torch.equal(place_of(token).sort().values, token)
    assert torch.equal(order[:TILE] + TILE, order[TILE:])
    at = order[:TILE]  # the token at each place
    for level, apart in enumerate([16 * 64, 8 * 64, 4 * 64, 2 * 64, 64, 1, 2, 4, 8, 16, 32]):
        assert torch.equal(at[torch.arange(TILE) ^ (1 << level)], at ^ apart)
    assert torch.equal(place_of(token.int()), place_of(token).int())


@BOTH
def test_a_row_has_one_result_wherever_it_lies(tiles_by, device):
    """Alignment and strides change how a kernel loads a row, and must not change the order of its sums."""
    logits = torch.randn(3, 2112).to(device if tiles_by is by_kernel else "cpu")
    want = tiles_by(logits, 2112, device, mass=True)
    for offset, stride in ((1, 2112), (3, 2115), (16, 2128)):
        lying = logits.new_zeros(offset + 3 * stride).as_strided((3, 2112), (stride, 1), offset)
        lying.copy_(logits)
        for field, wanted in zip(tiles_by(lying, 2112, device, mass=True), want, strict=True):
            assert torch.equal(field, wanted)


@pytest.mark.parametrize("vocab_size", [2048, 4 * TILE + 100, 9 * TILE])
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_masks_that_bar_little_change_no_bit(vocab_size, dtype, monkeypatch):
    """Rows with all ones, or few zeros, where the maxima are for one, are taken without their masks and put right."""
    normal = torch.randn(4, vocab_size) * 3
    logits = torch.cat([normal.round(), normal, adversarial_rows(vocab_size)]).to(dtype)
    rows = len(logits)
    allowed = torch.ones(rows, vocab_size, dtype=torch.bool)
    for row in range(rows):
        count = row * 4 // rows  # from none to three
        if count:
            least = [logits[row].nan_to_num(nan=INF).argmax(), *torch.randint(vocab_size, (count - 1,))]
            allowed[row, least] = False
    allowed[-1] = torch.rand(vocab_size) < 0.5
    took = []

    def watched(*args):
        took.append(lightly_masked(*args))
        return took[-1]

    def heavily(bitmask, vocab_size, active, renormalize):
        return [], active_spans(active, len(bitmask)), None

    every = {
        "temperature": torch.rand(rows) + 0.5,
        "active": torch.arange(rows) % 7 != 3,
        "exclude": torch.tensor([0, vocab_size - 1, int(logits[1].argmax())]),
        "mass": True,
    }
    for options in ({}, {"mass": True}, {"active": every["active"]}, every):
        for renormalize in (False, True):
            given = {**options, "bitmask": pack_bitmask(allowed), "renormalize": renormalize}
            monkeypatch.setattr(flashbeam.kernels.summary, "lightly_masked", watched)
            got = by_definition(logits, vocab_size, **given)
            monkeypatch.setattr(flashbeam.kernels.summary, "lightly_masked", heavily)
            for field, want in zip(got, by_definition(logits, vocab_size, **given), strict=True):
                assert torch.equal(field, want)
    # the way that is tested was taken
    assert vocab_size == 2048 or all(light and heavy and barred is not None for light, heavy, barred in took)


@BOTH
def test_mass_leaves_excluded_tokens_out(tiles_by, device):
    check(tiles_by, torch.randn(2, 100), 100, device, mass=True, exclude=torch.tensor([3, 40]))


@BOTH
def test_masked_tokens_never_reach_arithmetic(tiles_by, device):
    """Renormalising over what is allowed, a NaN or +inf elsewhere changes no bit and raises no flag."""
    allowed = torch.rand(3, 2100) < 0.5
    clean = torch.randn(3, 2100)
    dirty = torch.where(allowed, clean, torch.tensor([NAN, INF, -INF])[torch.arange(2100) % 3])
    options = {"bitmask": pack_bitmask(allowed), "renormalize": True, "mass": True}
    want, got = (tiles_by(x, 2100, device, **options) for x in (clean, dirty))
    for name, field in want._asdict().items():
        assert torch.equal(field, getattr(got, name)), name
    assert merge_tiles(got.tile_ref, got.tile_sum, None)[1].tolist() == [0, 0, 0]


@BOTH
@pytest.mark.parametrize("vocab_size", [1, 65, 2048, 2050])
def test_columns_past_the_vocabulary_are_never_read(vocab_size, tiles_by, device):
    clean = torch.randn(2, vocab_size)
    dirty = torch.cat([clean, torch.tensor([NAN, INF]).repeat(2, 1100)], 1)
    ones = torch.full((2, 200), -1, dtype=torch.int32)  # set bits past the vocabulary must not count either
    for options in ({"mass": True}, {"bitmask": ones, "renormalize": True}):
        want, got = (tiles_by(x, vocab_size, device, **options) for x in (clean, dirty))
        for name, field in want._asdict().items():
            assert torch.equal(field, getattr(got, name)), name


@BOTH
def test_rows_that_are_not_active_are_never_read(tiles_by, device):
    logits = torch.randn(4, 2100)
    logits[1], logits[3] = NAN, INF
    active = torch.tensor([True, False, True, False])
    tiles = check(tiles_by, logits, 2100, device, active=active, mass=True)
    assert (tiles.tile_sum[~active] == 0).all() and (tiles.tile_ref[~active] == -INF).all()
    check(tiles_by, logits, 2100, device, active=active, exclude=torch.tensor([2099]))


@BOTH
def test_no_row_is_active(tiles_by, device):
    check(tiles_by, torch.full((2, 70), NAN), 70, device, active=torch.tensor([False, False]), mass=True)


def far_apart(rows, columns, stride, dtype=torch.bfloat16):
    """Rows ``stride`` elements apart. Untouched pages of an anonymous mapping take no memory.

    The first row lies 2**31 elements into the mapping: an offset that wrapped around reads zeros, not foreign memory.
    """
    size = (2**31 + rows * stride) * dtype.itemsize
    try:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
        pages = torch.frombuffer(mmap.mmap(-1, size, flags=flags), dtype=dtype)
    except (OSError, ValueError):
        pytest.skip(f"no {size >> 30} GiB of address space")
    return pages.as_strided((rows, columns), (stride, 1), 2**31)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the trick is a CPU's; on a GPU the memory would be real")
def test_rows_beyond_2_31_elements():
    """The stride itself fits int32, so only the cast of the row keeps the product from wrapping."""
    near = torch.randn(3, 70).bfloat16()
    far = far_apart(3, 70, 2**30 + 8)
    far.copy_(near)
    bits = random_bits(3, 70)
    far_bits = far_apart(3, 3, 2**30 + 8, torch.int32)
    far_bits.copy_(bits)
    for tiles_by in (by_definition, by_kernel):
        want = tiles_by(near, 70, "cpu", bitmask=bits, exclude=torch.tensor([7]))
        got = tiles_by(far, 70, "cpu", bitmask=far_bits, exclude=torch.tensor([7]))
        for name, field in want._asdict().items():
            assert torch.equal(field, getattr(got, name)), name


# one number of tiles per path: one, two, a ragged power of two, more than a vector
@pytest.mark.parametrize("tiles", [1, 2, 5, 67])
@pytest.mark.parametrize("cold", [False, True])
def test_row_lse_matches_reference(tiles, cold, device):
    ref = (torch.randn(6, tiles) * 20).bfloat16()
    total = torch.rand(6, tiles) * 2000 + 1
    ref[1], total[1] = -INF, 0.0  # an empty row
    ref[2, -1], total[2, -1] = -INF, 0.0  # an empty tile
    ref[3, tiles // 2] = INF
    total[4, 0] *= -1  # a NaN was there
    ref[5, 0], total[5, 0] = INF, -INF
    temperature = torch.rand(6) + 0.1 if cold else None

    def reference(precision):
        x = ref.to(precision)
        x = x if temperature is None else x / temperature.to(precision)[:, None]
        return (x + total.abs().to(precision).log()).nan_to_num(nan=INF, posinf=INF, neginf=-INF).logsumexp(-1)

    flags = torch.tensor([0, 0, 0, FLAG_INF, FLAG_NAN, FLAG_NAN | FLAG_INF], dtype=torch.int32)
    for got in (merge_tiles(ref, total, temperature), lse_by_kernel(ref, total, temperature, device)):
        check_budget(got[0], reference(torch.float64), reference(torch.float32))
        assert torch.equal(got[1], flags)


def test_public_function_and_its_equivalents(device):
    logits, temperature = torch.randn(3, 5000, device=device) * 3, torch.rand(3, device=device) + 0.5
    summary = summarize(logits, temperature=temperature)
    lse = (logits / temperature[:, None]).logsumexp(-1)
    assert torch.allclose(summary.lse, lse, atol=2e-6)
    assert torch.equal(summary.flags, torch.zeros(3, dtype=torch.int32, device=device))
    assert torch.equal(summary.tiles.tile_ref, summary.tiles.tile_max)
    assert torch.equal(summary.tiles.group_max[1, 2, 5], logits[1, 4096 + 5 : 5000 : 64].amax())
    assert summary.tiles.group_mass.shape == (3, 0, 64)
    assert torch.equal(summarize(logits, vocab_size=64).tiles.tile_max[:, 0], logits[:, :64].amax(-1))
    bits = random_bits(3, 5000).to(device)
    over_allowed = summarize(logits, bitmask=bits, normalize="allowed").lse
    assert (over_allowed < summarize(logits, bitmask=bits).lse).all()


def test_logits_that_require_grad_are_detached():
    assert not summarize(torch.zeros(1, 2, requires_grad=True)).lse.requires_grad


def everything(tiles, temperature):
    return [*tiles, *merge_tiles(tiles.tile_ref, tiles.tile_sum, temperature)]


def check_rows_alone(tiles_by, vocab_size, device, batches, *options):
    """A row has one set of bits: alone, and at any place of any batch, inactive neighbours or not."""
    rows = max(batches)
    logits = torch.randn(rows, vocab_size) * 5
    bits, temperature = random_bits(rows, vocab_size, 0.9), torch.rand(rows) + 0.5

    def run(index, active=None):
        chosen = {}
        if "bitmask" in options:
            chosen["bitmask"] = bits[index]
        if "temperature" in options:
            chosen["temperature"] = temperature[index]
        tiles = tiles_by(logits[index], vocab_size, device, active=active, mass=True, **chosen)
        if tiles_by is by_definition:
            return everything(tiles, chosen.get("temperature"))
        return [*tiles, *lse_by_kernel(tiles.tile_ref, tiles.tile_sum, chosen.get("temperature"), device)]

    row = rows // 2
    alone = run(torch.tensor([row]))
    for batch in batches:
        for place in (0, batch - 1, batch // 3):
            index = torch.randperm(rows)[:batch]
            index[place] = row
            active = torch.rand(batch) < 0.5
            active[place] = True
            for field, want in zip(run(index, active if place else None), alone, strict=True):
                assert torch.equal(field[place], want[0])


# blocks of the definition end at 128 tiles: a row of many blocks, rows that share one, tails of every kind
@pytest.mark.parametrize("vocab_size", [1, 65, 1000, 2049, 5000, 30011, 128 * TILE + 77])
def test_definition_is_batch_invariant_bitwise(vocab_size):
    """Rows alone and all over a batch, some neighbours inactive, with any number of threads.

    In rows of few finite logits a group's mass is a sum of few terms, and one ulp in one of them is seen.
    """
    dense, share = torch.randn(8, vocab_size) * 3, torch.rand(8, vocab_size)
    rows = torch.cat([dense, torch.where(share < 1 / 8, dense, -INF)])
    bits, temperature = random_bits(16, vocab_size, 0.9), torch.rand(16) + 0.5

    def run(index, told, active=None):
        options = {"bitmask": bits[index], "temperature": temperature[index]} if told else {}
        tiles = by_definition(rows[index], vocab_size, active=active, mass=True, **options)
        return everything(tiles, options.get("temperature"))

    batches = [2, 7, *[64] * (6 if vocab_size == 5000 else 1)] if vocab_size <= 30011 else [2, 7]
    for told in (False, True):
        singly = [run(torch.tensor([row]), told) for row in range(16)]
        alone = [torch.cat(field) for field in zip(*singly, strict=True)]
        for threads in (1, 2, 3, 5, 8):
            torch.set_num_threads(threads)
            for batch in batches:
                index, active = torch.randint(16, (batch,)), torch.rand(batch) < (0.9 if batch == 7 else 2.0)
                for field, want in zip(run(index, told, active if batch == 7 else None), alone, strict=True):
                    assert torch.equal(field[active], want[index[active]])


def test_definition_is_bitwise_the_same_with_any_number_of_threads():
    logits, seen = torch.randn(40, 5000) * 5, []
    for threads in (1, 2, 3, 5, 8):
        torch.set_num_threads(threads)
        seen.append(everything(by_definition(logits, 5000, mass=True), None))
    for other in seen[1:]:
        for field, want in zip(other, seen[0], strict=True):
            assert torch.equal(field, want)


def test_kernel_is_batch_invariant_bitwise(device):
    check_rows_alone(by_kernel, 65, device, [2, 7], "bitmask")
    check_rows_alone(by_kernel, 2100, device, [2], "temperature")
    many = torch.randn(64, 70)
    want, got = by_kernel(many[40:41], 70, device), by_kernel(many, 70, device)
    for field, alone in zip(got, want, strict=True):
        assert torch.equal(field[40:41], alone)


@pytest.mark.parametrize("tiles", [1, 3, 63, 128, 491])
def test_row_lse_is_batch_invariant_bitwise(tiles, device):
    ref, total, temperature = torch.randn(64, tiles) * 5, torch.rand(64, tiles) * 2000 + 1, torch.rand(64) + 0.5
    for threads in (1, 2, 3, 5, 8):
        torch.set_num_threads(threads)
        for divisor in (None, temperature):
            whole = merge_tiles(ref, total, divisor)[0]
            for rows in (slice(0, 1), slice(13, 14), slice(63, 64), slice(5, 12), slice(61, 63)):
                part = merge_tiles(ref[rows], total[rows], None if divisor is None else divisor[rows])[0]
                assert torch.equal(part, whole[rows])
    whole = lse_by_kernel(ref[:7], total[:7], temperature[:7], device)[0]
    assert torch.equal(lse_by_kernel(ref[5:6], total[5:6], temperature[5:6], device)[0], whole[5:6])


@BOTH
def test_strided_rows(tiles_by, device):
    wide = torch.full((6, 5300), NAN)
    logits = wide[::2, 100:5100]
    logits.copy_(torch.randn(3, 5000))
    bits = random_bits(3, 5000)
    wide_bits = torch.zeros(6, 400, dtype=torch.int32)[1::2, 100:300]
    wide_bits[:, : bits.shape[1]] = bits
    if device != "cpu":  # a copy to the device would be dense
        logits, wide_bits = wide.to(device)[::2, 100:5100], wide_bits.to(device)
    want = tiles_by(logits.contiguous().cpu(), 5000, device, bitmask=bits, exclude=torch.tensor([4999]))
    got = tiles_by(
        logits if tiles_by is by_kernel else logits.cpu(),
        5000,
        device,
        bitmask=wide_bits if tiles_by is by_kernel else wide_bits.cpu(),
        exclude=torch.tensor([4999]),
    )
    for name, field in want._asdict().items():
        assert torch.equal(field, getattr(got, name)), name


@BOTH
def test_input_not_modified(tiles_by, device):
    logits = adversarial_rows(2100).to(device if tiles_by is by_kernel else "cpu")
    options = combinations(2100, len(logits))[6]
    before = [logits.clone(), *(value.clone() for value in options.values())]
    tiles = tiles_by(logits, 2100, device, **options)
    kept = tiles.tile_ref.clone(), tiles.tile_sum.clone()
    merge_tiles(tiles.tile_ref, tiles.tile_sum, options["temperature"])
    lse_by_kernel(tiles.tile_ref, tiles.tile_sum, options["temperature"], device)
    assert torch.equal(kept[0], tiles.tile_ref) and torch.equal(kept[1], tiles.tile_sum)
    for now, then in zip([logits, *options.values()], before, strict=True):
        assert torch.equal(now.nan_to_num(nan=0.5), then.nan_to_num(nan=0.5))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("full", [False, True])
def test_opcheck(full, dtype, device):
    logits = torch.randn(3, 2100, device=device).to(dtype)
    options = {}
    if full:
        options = {**combinations(2100, 3)[6], "renormalize": True, "mass": True}
        options = {name: v.to(device) if isinstance(v, torch.Tensor) else v for name, v in options.items()}
    torch.library.opcheck(torch.ops.flashbeam.summarize, (logits, 2100, *arguments(options)))
    tiles = summarize_op(logits, 2100, *arguments(options))
    torch.library.opcheck(torch.ops.flashbeam.row_lse, (tiles[2], tiles[3], options.get("temperature")))


@pytest.mark.parametrize("normalize", ["vocab", "allowed"])
def test_compiles_without_graph_break(normalize, device):
    def step(logits, bitmask, temperature):
        summary = summarize(logits * 2, bitmask=bitmask, temperature=temperature, normalize=normalize, mass=True)
        return *summary.tiles, summary.lse, summary.flags

    logits, bits = torch.randn(3, 2100, device=device), random_bits(3, 2100).to(device)
    temperature = torch.rand(3, device=device) + 0.5
    backend = "inductor" if device == "cuda" else "aot_eager"
    got = torch.compile(step, fullgraph=True, backend=backend)(logits, bits, temperature)
    for field, want in zip(got, step(logits, bits, temperature), strict=True):
        assert torch.equal(field, want)


@needs_gpu
def test_cuda_graph_replay_reads_new_inputs():
    logits, bits = torch.randn(4, 5000, device="cuda"), random_bits(4, 5000).to("cuda")
    temperature, active = torch.rand(4, device="cuda") + 0.5, torch.ones(4, dtype=torch.bool, device="cuda")

    def step():
        return summarize(logits, bitmask=bits, temperature=temperature, active=active, mass=True)

    step()  # compiled and loaded outside the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    logits.normal_()
    bits.bitwise_not_()
    temperature.add_(1.0)
    active[2] = False
    graph.replay()
    want = step()
    for field, wanted in zip((*got.tiles, got.lse, got.flags), (*want.tiles, want.lse, want.flags), strict=True):
        assert torch.equal(field, wanted)


def zeros(*shape, dtype=torch.float32, device="cpu"):
    return torch.zeros(shape, dtype=dtype, device=device)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: summarize([1.0]), TypeError, "logits: expected a tensor, got list"),
        (
            lambda: summarize(zeros(2, 3, dtype=torch.float64)),
            TypeError,
            "logits: expected float32 or float16 or bfloat16, got float64",
        ),
        (lambda: summarize(zeros(3)), ValueError, "logits: expected shape [R, V], got [3]"),
        (lambda: summarize(zeros(2, 0)), ValueError, "logits: expected at least one column, got shape [2, 0]"),
        (
            lambda: summarize(zeros(3, 2).t()),
            ValueError,
            "logits: expected unit stride in the last dimension, got strides (1, 2)",
        ),
        (
            lambda: summarize(zeros(2, 3), vocab_size=4),
            ValueError,
            "vocab_size: expected an int in [1, 3], got 4",
        ),
        (lambda: summarize(zeros(2, 3), vocab_size=0), ValueError, "vocab_size: expected an int in [1, 3], got 0"),
        (lambda: summarize(zeros(2, 3), vocab_size=1.5), TypeError, "vocab_size: expected an int in [1, 3], got float"),
        (lambda: summarize(zeros(2, 3), bitmask=zeros(2, 1)), TypeError, "bitmask: expected int32, got float32"),
        (
            lambda: summarize(zeros(2, 33), bitmask=zeros(2, 1, dtype=torch.int32)),
            ValueError,
            "bitmask: expected shape [R, ceil(V / 32)] = [2, 2], got [2, 1]",
        ),
        (
            lambda: summarize(zeros(2, 33), bitmask=zeros(2, 2, dtype=torch.int32).t().contiguous().t()),
            ValueError,
            "bitmask: expected unit stride in the last dimension, got strides (1, 2)",
        ),
        (
            lambda: summarize(zeros(2, 3), temperature=zeros(2, dtype=torch.float64)),
            TypeError,
            "temperature: expected float32, got float64",
        ),
        (
            lambda: summarize(zeros(2, 3), temperature=zeros(3)),
            ValueError,
            "temperature: expected shape [R] = [2], got [3]",
        ),
        (lambda: summarize(zeros(2, 3), active=zeros(2)), TypeError, "active: expected bool, got float32"),
        (
            lambda: summarize(zeros(2, 3), active=zeros(3, dtype=torch.bool)),
            ValueError,
            "active: expected shape [R] = [2], got [3]",
        ),
        (lambda: summarize(zeros(2, 3), exclude=zeros(1)), TypeError, "exclude: expected int64, got float32"),
        (
            lambda: summarize(zeros(2, 3), exclude=zeros(dtype=torch.int64)),
            ValueError,
            "exclude: expected shape [n], got []",
        ),
        (
            lambda: summarize(zeros(2, 3), exclude=zeros(1, dtype=torch.int64, device="meta")),
            ValueError,
            "exclude: expected all tensors on one device, got logits on cpu, exclude on meta",
        ),
        (
            lambda: summarize(zeros(2, 3), temperature=zeros(2, device="meta")),
            ValueError,
            "temperature: expected all tensors on one device, got logits on cpu, temperature on meta",
        ),
        (
            lambda: summarize(zeros(2, 3), normalize="all"),
            ValueError,
            "normalize: expected 'vocab' or 'allowed', got 'all'",
        ),
    ],
)
def test_rejects_bad_arguments(call, error, message):
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == message
