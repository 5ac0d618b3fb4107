"""Random words: known answers, kernels against their torch definitions, and the laws they are drawn for."""

from __future__ import annotations

import functools
import math

import pytest
import torch
import triton
import triton.language as tl

from flashbeam.kernels import random
from flashbeam.kernels.random import Stream, child_nodes, gumbel, random_bits, random_codes, root_nodes
from flashbeam.kernels.triton import random as jit
from flashbeam.kernels.triton.random import launch_random_bits

# 32- and 64-bit words wrap, as they must
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

WORD, LOW, HIGH = 2**32 - 1, -(2**63), 2**63 - 1
# Random123, kat_vectors: counter, key, words of philox4x32-10
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]
SHAPES = [(), (1,), (7,), (3, 5), (2, 3, 4), (129,), (0,), (2, 0)]
P_VALUE = 1e-4  # of each test of a law; words are fixed, so that a test which passes once passes always


def integers(text):
    return [int(word, 16) for word in text.split()]


def signed(bits):
    return bits - 2**64 if bits >> 63 else bits


def random_int64(*shape):
    """All 64 bits, the extremes among them."""
    values = torch.randint(LOW, HIGH, shape)
    for extreme in (LOW, HIGH, -1, 0, 1, WORD, -WORD - 1):
        values = values.masked_fill(torch.rand(shape) < 0.03, extreme)
    return values


def seeded(value=12345, device="cpu"):
    return torch.tensor([value], device=device)


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_known_answers(counter, key, words, device):
    """The torch function, then both operations: seed, node, part and stream are where the formula has them."""
    (k0, k1), counter, words = integers(key), integers(counter), integers(words)
    seed = torch.tensor([signed(k1 << 32 | k0)])
    got = random.philox(seed, *(torch.tensor([c]) for c in counter[:3]), counter[3])
    assert [int(word) for word in got] == words
    node, part = torch.tensor([signed(counter[1] << 32 | counter[0])]), torch.tensor([counter[2]])
    assert random._random_bits(seed, node, part, 4, counter[3]).tolist() == [words]
    assert launch_random_bits(*(x.to(device) for x in (seed, node, part)), 4, counter[3]).tolist() == [words]


def philox_by_hand(seed, counter):
    """Philox4x32-10 as the paper has it, in Python integers."""
    k0, k1 = seed & WORD, seed >> 32 & WORD
    c0, c1, c2, c3 = counter
    for _ in range(10):
        first, third = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = third >> 32 ^ c1 ^ k0, third & WORD, first >> 32 ^ c3 ^ k1, first & WORD
        k0, k1 = k0 + 0x9E3779B9 & WORD, k1 + 0xBB67AE85 & WORD
    return [c0, c1, c2, c3]


@pytest.mark.parametrize("count", [1, 4, 7])
def test_words_against_python(count):
    seed, nodes, parts = random_int64(1), random_int64(20), torch.randint(0, 2**30, (20,))
    got = random_bits(seed, nodes, count, Stream.SAMPLE, parts)
    for node, part, words in zip(nodes.tolist(), parts.tolist(), got.tolist(), strict=True):
        calls = -(-count // 4)
        want = [
            word
            for call in range(calls)
            for word in philox_by_hand(int(seed), [node & WORD, node >> 32 & WORD, part * calls + call, 4])
        ]
        assert words == want[:count]


@pytest.mark.parametrize("count", range(1, 10))
def test_kernel_matches_reference(count, device):
    """Every shape and stream; seeds and nodes of either sign; parts up to where the counter's word is full."""
    calls = -(-count // 4)
    for i, shape in enumerate(SHAPES):
        seed, nodes, stream = random_int64(1), random_int64(*shape), list(Stream)[(i + count) % len(Stream)]
        parts = torch.randint(0, 2**30, shape)
        for extreme in (0, 2**30, (2**32 - 1) // calls):
            parts = parts.masked_fill(torch.rand(shape) < 0.1, extreme)
        want = random_bits(seed, nodes, count, stream, parts)
        assert want.shape == (*shape, count) and want.dtype == torch.int64
        flat = (x.flatten().to(device) for x in (seed, nodes, parts))
        got = launch_random_bits(*flat, count, int(stream))
        assert got.dtype == want.dtype and torch.equal(got.cpu(), want.view(-1, count))
        assert torch.equal(random_bits(seed, nodes, count, stream), random_bits(seed, nodes, count, stream, parts * 0))


@pytest.mark.parametrize("stream", Stream)
def test_kernel_matches_reference_for_every_stream(stream, device):
    seed, nodes = random_int64(1), random_int64(150)
    want = random_bits(seed, nodes, 5, stream, nodes & 7)
    assert torch.equal(launch_random_bits(*(x.to(device) for x in (seed, nodes, nodes & 7)), 5, stream).cpu(), want)


@triton.jit
def _nodes_kernel(x_ptr, tokens_ptr, mixed_ptr, child_ptr, wide_ptr, n, BLOCK: tl.constexpr):
    place = tl.arange(0, BLOCK)
    x, token = (
        tl.load(x_ptr + place, mask=place < n, other=0),
        tl.load(tokens_ptr + place, mask=place < n, other=0),
    )
    tl.store(mixed_ptr + place, jit.mix(x), mask=place < n)
    tl.store(child_ptr + place, jit.child_node(x, token.to(tl.int32)), mask=place < n)
    tl.store(wide_ptr + place, jit.child_node(x, token), mask=place < n)


@triton.jit
def _gumbel_kernel(words_ptr, out_ptr, n, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    word = tl.load(words_ptr + place, mask=place < n, other=0).to(tl.uint32)
    tl.store(out_ptr + place, jit.gumbel(word), mask=place < n)


def gumbel_by_kernel(words, device):
    words = words.to(device)
    out = torch.empty(len(words), dtype=torch.float32, device=device)
    _gumbel_kernel[(triton.cdiv(len(words), 1024),)](words, out, len(words), BLOCK=1024, enable_fp_fusion=False)
    return out.cpu()


def mix_by_hand(x):
    x &= 2**64 - 1
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & 2**64 - 1
    x = (x ^ x >> 27) * 0x94D049BB133111EB & 2**64 - 1
    return signed(x ^ x >> 31)


def test_nodes(device):
    """splitmix64's own numbers (its first outputs from the state 0 and 1234567), Python, torch and the kernels."""
    state = [(seed + i * random.GOLDEN) for seed in (0, 1234567) for i in (1, 2, 3)]
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 6457827717110365317, 3203168211198807973]
    assert [mix_by_hand(x) & 2**64 - 1 for x in state[:5]] == published
    nodes, tokens = random_int64(300), torch.randint(0, 2**31 - 1, (300,))
    mixed = [mix_by_hand(x) for x in nodes.tolist()]
    assert random._mix(nodes).tolist() == mixed
    assert root_nodes(nodes).tolist() == [mix_by_hand(x * 0x9E3779B97F4A7C15 + 1) for x in nodes.tolist()]
    pairs = zip(nodes.tolist(), tokens.tolist(), strict=True)
    children = [mix_by_hand(x * 0xD1342543DE82EF95 + token + 1) for x, token in pairs]
    assert child_nodes(nodes, tokens).tolist() == children
    got = [torch.empty(300, dtype=torch.int64, device=device) for _ in range(3)]
    _nodes_kernel[(1,)](nodes.to(device), tokens.to(device), *got, 300, BLOCK=512)
    assert [x.tolist() for x in got] == [mixed, children, children]


def test_prefixes_have_nodes_of_their_own():
    """All prefixes of up to two tokens of 500 under 20 requests, and no node is that of a similar request id."""
    roots = root_nodes(torch.arange(-10, 10))
    tokens = torch.arange(500)
    first = child_nodes(roots[:, None], tokens)
    second = child_nodes(first[..., None], tokens)
    assert sum(x.unique().numel() for x in (roots, first, second)) == roots.numel() + first.numel() + second.numel()
    assert torch.cat([roots, first.flatten(), second.flatten()]).unique().numel() == 20 * (1 + 500 + 500 * 500)


def test_words_do_not_depend_on_the_batch(device):
    seed, nodes, parts = random_int64(1), random_int64(200), torch.randint(0, 99, (200,))
    together = random_bits(seed, nodes, 6, Stream.TILE, parts)
    order = torch.randperm(200)
    assert torch.equal(random_bits(seed, nodes[order], 6, Stream.TILE, parts[order]), together[order])
    assert torch.equal(random_bits(seed, nodes[::2], 6, Stream.TILE, parts[::2]), together[::2])
    shaped = random_bits(seed, nodes.view(4, 50).T, 6, Stream.TILE, parts.view(4, 50).T)
    assert torch.equal(shaped, together.view(4, 50, 6).transpose(0, 1))
    for i in (0, 150, 199):
        alone = seed, nodes[i : i + 1], parts[i : i + 1]
        assert torch.equal(random_bits(alone[0], alone[1], 6, Stream.TILE, alone[2])[0], together[i])
        assert torch.equal(launch_random_bits(*(x.to(device) for x in alone), 6, 1)[0].cpu(), together[i])


def test_each_argument_changes_every_word():
    """One bit of the seed, the node or the part, and the stream: half of the bits of the words change."""
    given = {"seed": random_int64(1), "nodes": random_int64(400), "parts": torch.randint(0, 2**30, (400,))}

    def draw(stream=Stream.TOKEN, **changed):
        arguments = {**given, **changed}
        return random_bits(arguments["seed"], arguments["nodes"], 4, stream, arguments["parts"])

    def one_bit(bit):
        return signed(1 << bit)

    words = draw()
    others = [draw(seed=given["seed"] ^ one_bit(bit)) for bit in (0, 31, 32, 63)]
    others += [draw(nodes=given["nodes"] ^ one_bit(bit)) for bit in (0, 31, 32, 63)]
    others += [draw(parts=given["parts"] ^ one_bit(bit)) for bit in (0, 29)]
    others += [draw(stream) for stream in Stream if stream != Stream.TOKEN]
    bits = words.numel() * 32
    for other in others:
        changed = sum(((words ^ other) >> bit & 1).sum().item() for bit in range(32))
        assert abs(changed - bits / 2) < normal_quantile(P_VALUE) * math.sqrt(bits / 4)
        assert (words != other).any(1).all()


def test_calls_of_one_node_do_not_share_words():
    """Parts that follow each other, and the calls of each, use counters of their own."""
    seed, node = seeded(), torch.zeros(300, dtype=torch.int64)
    words = random_bits(seed, node, 9, Stream.GROUP, torch.arange(300))
    pairs = words[:, :8].reshape(-1, 2)
    assert ((pairs[:, 0] << 32) | pairs[:, 1]).unique().numel() == len(pairs)


def test_codes():
    seed, nodes = seeded(), random_int64(3, 4)
    words = random_bits(seed, nodes, 2, Stream.ROTATION, nodes & 3)
    codes = random_codes(seed, nodes, Stream.ROTATION, nodes & 3)
    assert codes.shape == nodes.shape and codes.dtype == torch.int64
    for (high, low), code in zip(words.view(-1, 2).tolist(), codes.flatten().tolist(), strict=True):
        assert code == signed(high << 32 | low)
    assert (codes < 0).any() and (codes > 0).any()


# ---------------------------------------------------------------------------------------------------------------------
# laws


def normal_quantile(p):
    """Exceeded in absolute value with probability ``p``."""
    return math.sqrt(2) * torch.erfinv(torch.tensor(1 - p, dtype=torch.float64)).item()


def kolmogorov_p(sample, cdf):
    """The p-value of the largest distance between the distribution of a sample and a law (Stephens 1970)."""
    n = len(sample)
    law = cdf(sample.double().sort().values)
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    distance = torch.maximum((steps[1:] - law).max(), (law - steps[:-1]).max()).item()
    x = (math.sqrt(n) + 0.12 + 0.11 / math.sqrt(n)) * distance
    if x < 0.3:  # the sum converges slowly, and is above 1 - 1e-5
        return 1.0
    return min(1.0, 2 * sum((-1) ** (j - 1) * math.exp(-2 * j * j * x * x) for j in range(1, 101)))


def test_kolmogorov_p_is_a_p_value():
    """Against tables (n = 20: 0.294 at 5 %), and a law that is off by a hundredth is refused at 1e5 draws."""
    middle = (torch.arange(20) + 0.5) / 20
    assert kolmogorov_p(middle + 0.294 - 0.025, lambda x: x) == pytest.approx(0.05, rel=0.02)
    even = (torch.arange(100_000) + 0.5) / 100_000
    assert kolmogorov_p(even, lambda x: x) > 0.999
    assert kolmogorov_p(even, lambda x: (x + 0.01).clamp(max=1)) < P_VALUE


@functools.cache
def many_words():
    """Two million: few nodes with many words and many nodes with few, in equal parts."""
    seed = seeded(2024)
    few = random_bits(seed, root_nodes(torch.arange(10)), 100_000, Stream.NOISE)
    many = random_bits(seed, root_nodes(torch.arange(100_000)), 10, Stream.NOISE, torch.ones(100_000).long())
    return torch.cat([few.flatten(), many.flatten()])


def test_words_are_uniform():
    """Their law, each of their bits, and their bytes in pairs of neighbours: chi-square with 65535 degrees."""
    words = many_words()
    assert words.min() >= 0 and words.max() <= WORD
    for part in (words, *words.view(2, -1)):
        assert kolmogorov_p((part.double() + 0.5) / 2.0**32, lambda x: x) > P_VALUE
        ones = torch.stack([(part >> bit & 1).sum() for bit in range(32)])
        assert ((ones - len(part) / 2).abs() < normal_quantile(P_VALUE / 32) * math.sqrt(len(part) / 4)).all()
    for shift in (0, 24):
        byte = words >> shift & 255
        counts = torch.bincount(byte[:-1] << 8 | byte[1:], minlength=65536).double()
        mean = (len(words) - 1) / 65536
        # neighbours overlap: the statistic less that of single bytes is what is chi-square (Good 1953)
        single = torch.bincount(byte, minlength=256).double()
        pairs = ((counts - mean) ** 2 / mean).sum() - ((single - len(words) / 256) ** 2 / (len(words) / 256)).sum()
        degrees = 65536 - 256
        assert abs(pairs - degrees) < normal_quantile(P_VALUE) * math.sqrt(2 * degrees)


def test_gumbel_law():
    """Mean Euler's constant, variance pi^2 / 6 with kurtosis 12 / 5, and the law exp(-exp(-x))."""
    sample = gumbel(many_words()).double()
    n, variance = len(sample), math.pi**2 / 6
    assert sample.isfinite().all()
    assert abs(sample.mean() - 0.5772156649015329) < normal_quantile(P_VALUE) * math.sqrt(variance / n)
    assert abs(sample.var() - variance) < normal_quantile(P_VALUE) * variance * math.sqrt((2 + 12 / 5) / n)
    for half in sample.view(2, -1):
        assert kolmogorov_p(half, lambda x: torch.exp(-torch.exp(-x))) > P_VALUE


def test_gumbel_large_values_do_not_collide():
    """Of 2e6 draws the 1000 greatest: words coincide 0.2 times, float32 rounds 0.5 together, in expectation."""
    words = many_words()
    top = gumbel(words).topk(1000).values
    # Poisson(0.8): eight or more have probability 5e-6; U of 24 bits would have about 57
    assert 1000 - top.unique().numel() < 8
    least = torch.arange(4096)
    assert (gumbel(least).diff() < 0).all()


def exact_gumbel(words):
    u = (words.double() + 0.5) / 2.0**32
    low = words < 2**31
    v = torch.where(low, u, (WORD - words + 0.5) / 2.0**32)
    return -torch.log(-torch.where(low, torch.log1p(-v), torch.log(v)))


def edge_words():
    small = torch.arange(3000)
    powers = (2 ** torch.arange(1, 32))[:, None] + torch.tensor([-2, -1, 0, 1, 2])
    words = torch.cat([small, WORD - small, powers.flatten(), 2**31 + torch.arange(-200, 200), many_words()[::200]])
    return words.clamp(0, WORD).unique()


@pytest.mark.parametrize("side", ["torch", "kernel"])
def test_gumbel_is_accurate(side, device):
    """Against float64, everywhere: a few ulps of the exponential, whose logarithm the value is."""
    words = edge_words()
    got, want = gumbel(words) if side == "torch" else gumbel_by_kernel(words, device), exact_gumbel(words)
    assert got.dtype == torch.float32
    error = (got.double() - want).abs()
    # an error of e ulps in E moves log(E) by e * 2^-23; the result is rounded once more
    assert (error <= 4 * 2.0**-23 + 2.0**-23 * want.abs()).all(), (error.max(), words[error.argmax()])


def test_gumbel_takes_any_shape():
    words = many_words()[:24].view(2, 3, 4)
    assert torch.equal(gumbel(words).flatten(), gumbel(words.flatten()))


# ---------------------------------------------------------------------------------------------------------------------
# the operation


def test_input_not_modified(device):
    given = [random_int64(1), random_int64(50), torch.randint(0, 99, (50,))]
    before = [x.clone() for x in given]
    random_bits(given[0], given[1], 9, Stream.TILE, given[2])
    launch_random_bits(*(x.to(device) for x in given), 9, 1)
    assert all(torch.equal(x, y) for x, y in zip(given, before, strict=True))


@pytest.mark.parametrize("count", [1, 4, 9])
@pytest.mark.parametrize("n", [0, 1, 12])
def test_opcheck(n, count, device):
    arguments = seeded(device=device), random_int64(n).to(device), torch.arange(n, device=device), count, 3
    torch.library.opcheck(random._random_bits_op, arguments)


def test_compiles_without_graph_break(device):
    """No graph break, and the same words, codes, nodes and Gumbels to a rounding."""
    torch._dynamo.reset()

    def everything(seed, nodes, tokens):
        nodes = child_nodes(root_nodes(nodes), tokens)
        words = random_bits(seed, nodes, 5, Stream.NOISE, tokens)
        return nodes, words, random_codes(seed, nodes, Stream.SAMPLE), gumbel(words)

    compiled = torch.compile(everything, fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager")
    arguments = seeded(-5, device), random_int64(2, 6).to(device), torch.arange(12, device=device).view(2, 6)
    *exact, values = compiled(*arguments)
    *wanted, close = everything(*arguments)
    for field, want in zip(exact, wanted, strict=True):
        assert torch.equal(field, want)
    assert torch.allclose(values, close, atol=1e-5)


NODES = torch.zeros(2, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: random_bits(5, NODES, 1, Stream.TILE), TypeError, "seed: expected a tensor, got int"),
        (
            lambda: random_bits(torch.zeros(1), NODES, 1, Stream.TILE),
            TypeError,
            "seed: expected int64, got float32",
        ),
        (
            lambda: random_bits(NODES[0], NODES, 1, Stream.TILE),
            ValueError,
            "seed: expected shape [1] = [1], got [3]",
        ),
        (
            lambda: random_bits(seeded(), NODES.int(), 1, Stream.TILE),
            TypeError,
            "nodes: expected int64, got int32",
        ),
        (lambda: random_bits(seeded(), NODES, 0, Stream.TILE), ValueError, "count: expected an int >= 1, got 0"),
        (lambda: random_bits(seeded(), NODES, 1.5, Stream.TILE), TypeError, "count: expected an int >= 1, got float"),
        (
            lambda: random_bits(seeded(), NODES, 1, Stream.TILE, NODES.int()),
            TypeError,
            "parts: expected int64, got int32",
        ),
        (
            lambda: random_bits(seeded(), NODES, 1, Stream.TILE, NODES[0]),
            ValueError,
            "parts: expected shape [2, 3], got [3]",
        ),
        (
            lambda: random_bits(seeded(), NODES.to("meta"), 1, Stream.TILE),
            ValueError,
            "nodes: expected all tensors on one device, got seed on cpu, nodes on meta",
        ),
    ],
)
def test_rejects_bad_arguments(call, error, message):
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == message
