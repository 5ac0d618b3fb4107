"""Top-down sampling without replacement: against enumerating every token, against its law, and kernel against torch."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

import flashbeam as fb
from flashbeam.kernels import draw, draw_children, pack_bitmask, summarize
from flashbeam.kernels.random import child_nodes, random_bits, root_nodes
from flashbeam.kernels.tiles import TILE
from flashbeam.kernels.triton import draw as jit
from flashbeam.kernels.triton.draw import launch_draw
from oracles import TableLM
from test_random import kolmogorov_p
from test_summary import far_apart

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
# infinities are meant and 32-bit words wrap; numpy, which the interpreter computes with, warns of both
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

INF, NAN = float("inf"), float("nan")
FIELDS = ("perturbed", "parents", "tokens", "adjusted")
BUDGET = 1e-5  # of a perturbed log-probability: its terms are up to about 30, in float32
P_VALUE = 1e-4  # of each test of a law; seeds are fixed, so that a test which passes once passes always


def case(batch, parents, vocab_size, *, dtype=torch.float32, mask=False, temperature=False, stride=None):
    """Arguments of ``draw_children`` but k and seed: random rows, and with several parents one that is not read."""
    rows = batch * parents
    logits = torch.full((rows, stride or vocab_size), INF, dtype=dtype)
    logits[:, :vocab_size] = torch.randn(rows, vocab_size) * 3
    log_probs = -torch.rand(batch, parents) * 5
    perturbed = log_probs - torch.log(-torch.log(torch.rand(batch, parents)))
    if batch and parents > 1:
        log_probs[0, 1] = perturbed[0, 1] = -INF
    options = {"vocab_size": vocab_size}
    if mask:
        options["bitmask"] = pack_bitmask(torch.rand(rows, vocab_size) < 0.6)
    if temperature:
        options["temperature"] = torch.rand(rows) + 0.5
    active = (log_probs > -INF).flatten()
    summary = summarize(logits, normalize="allowed", active=active, **options)
    logits[~active] = NAN
    nodes = root_nodes(torch.arange(100, 100 + rows)).view(batch, parents)
    tiles = summary.tiles
    return (logits, log_probs, perturbed, nodes, tiles.tile_ref, tiles.tile_sum, summary.lse), options


def seeded(seed=2024, device="cpu"):
    return torch.tensor([seed], device=device)


def by_kernel(fields, k, seed, options, device):
    given = [*fields, seed, options.get("bitmask"), options.get("temperature")]
    *fields, seed, bitmask, temperature = [None if t is None else t.to(device) for t in given]
    got = launch_draw(*fields, options["vocab_size"], k, bitmask, temperature, seed)
    return draw.Drawn(*(t.cpu() for t in got))


def same(got, want, budget=0.0):
    """Ids and logits are equal, perturbed values within the budget."""
    for name in FIELDS:
        field, wanted = getattr(got, name), getattr(want, name)
        assert field.dtype == wanted.dtype and field.shape == wanted.shape, name
        if name == "perturbed" and budget:
            assert torch.equal(field == -INF, wanted == -INF)
            assert torch.allclose(field, wanted, rtol=0, atol=budget)
        else:
            assert torch.equal(field, wanted), name


# ---------------------------------------------------------------------------------------------------------------------
# the kernel

# (B, P, V, k), a reason each: one candidate; more places than candidates; a group missing; groups of one and two; a
# ragged second tile with more tiles than k; several tiles, k beyond them; more places than the groups have keys
SHAPES = [(1, 1, 1, 1), (2, 3, 2, 9), (1, 2, 63, 5), (1, 1, 100, 9), (2, 3, 2049, 4), (1, 2, 5000, 7), (1, 1, 33, 2050)]


@pytest.mark.parametrize("shape", SHAPES)
def test_matches_reference(shape, device):
    *sizes, k = shape
    everything = {"mask": True, "temperature": True, "dtype": torch.float16 if k % 2 else torch.bfloat16}
    for options in [everything, {}][: 1 if k > TILE else 2]:  # the interpreter is slow
        fields, options = case(*sizes, **options)
        seed = seeded(-sizes[2])
        want = draw_children(*fields, k, seed, **options)
        got = by_kernel(fields, k, seed, options, device)
        same(got, want, BUDGET)
        assert torch.equal(got.perturbed[:, 0], want.perturbed[:, 0])  # the parent's: nothing is rounded


@triton.jit
def _perturb_kernel(phi_ptr, noise_ptr, greatest_ptr, out_ptr, n, BLOCK: tl.constexpr):
    row, place = tl.program_id(0), tl.arange(0, BLOCK)
    phi = tl.load(phi_ptr + row * n + place, mask=place < n, other=-float("inf"))
    noise = tl.load(noise_ptr + row * n + place, mask=place < n, other=0.0)
    out = jit._perturb(phi, tl.load(greatest_ptr + row), noise)
    tl.store(out_ptr + row * n + place, out, mask=place < n)


@pytest.mark.parametrize("side", ["torch", "kernel"])
def test_perturb_is_accurate(side, device):
    """Against float64: gaps from one rounding to far below, parents above and below what was drawn."""
    gap = torch.cat([torch.zeros(1), -torch.logspace(-7, 2, 400), torch.tensor([-0.6929, -0.6931, -INF])])
    for top, greatest in ((0.0, 0.0), (0.0, -9.0), (0.0, 9.0), (-2.0, -1.5), (-25.0, -24.0), (1.0, -3.0)):
        noise = torch.full_like(gap, top)
        want = truncate((gap + noise).double().numpy(), greatest)
        if side == "torch":
            got = draw.perturb(gap, torch.tensor(greatest), noise)
        else:
            got = torch.empty(1, len(gap), device=device)
            options = {"BLOCK": 512, "enable_fp_fusion": False}
            given = [t.to(device) for t in (gap, noise, torch.tensor([greatest]))]
            _perturb_kernel[(1,)](*given, got, len(gap), **options)
            got = got[0].cpu()
        assert got[0] == greatest and (got <= greatest).all() and got[-1] == -INF
        assert np.abs(got.double().numpy()[:-1] - want[:-1]).max() < BUDGET


# ---------------------------------------------------------------------------------------------------------------------
# the oracle: every token of the tree, nothing pruned, in float64


def gumbels(seed, nodes, count, stream, parts=None):
    u = (random_bits(seed, nodes, count, stream, parts).double().numpy() + 0.5) / 2.0**32
    return -np.log(-np.log1p(-u))


def truncate(free, greatest):
    """Gumbels conditioned on their maximum, another form of the same: exp(-G) - exp(-Z) + exp(-H) is what is left."""
    if not free.size or free.max() == -np.inf or greatest == -np.inf:
        return np.full(free.shape, -np.inf)
    with np.errstate(divide="ignore", over="ignore"):
        # relative to the parent, so that nothing overflows on the way to the maximum
        rest = np.exp(greatest - free) - np.exp(greatest - free.max())
        return greatest - np.log1p(rest)


def log_sum(x, axis):
    top = x.max(axis, keepdims=True)
    top[~np.isfinite(top)] = 0.0
    with np.errstate(divide="ignore"):
        return np.log(np.exp(x - top).sum(axis)) + top.squeeze(axis)


def perturb_row(seed, node, log_probs, greatest):
    """The perturbed log-probability of every token of a row of cumulative log-probabilities ``[V]``, float64."""
    tiles = -(-len(log_probs) // 2048)
    phi = np.full(tiles * 2048, -np.inf)
    phi[: len(log_probs)] = log_probs
    phi = phi.reshape(tiles, 32, 64)  # token = tile * 2048 + member * 64 + group
    of_tiles = truncate(log_sum(phi.reshape(tiles, -1), 1) + gumbels(seed, node, tiles, 1)[0], greatest)
    out = np.full(phi.shape, -np.inf)
    for tile in range(tiles):
        part = torch.tensor([tile])
        of_groups = truncate(log_sum(phi[tile], 0) + gumbels(seed, node, 64, 2, part)[0], of_tiles[tile])
        noise = gumbels(seed, node.expand(64), 32, 3, tile * 64 + torch.arange(64))
        for group in range(64):
            out[tile, :, group] = truncate(phi[tile, :, group] + noise[group], of_groups[group])
    return out.reshape(-1)[: len(log_probs)]


def log_softmax64(row, allowed, temperature):
    x = np.where(allowed, row.astype(np.float64) / temperature, -np.inf)
    return x - log_sum(x, 0)


def every_leaf(logits, vocab_size, eos, max_length, seed, request, allowed, temperature):
    """(perturbed, log-probability, tokens) of every sequence of the tree, best first."""
    root = root_nodes(torch.tensor([request]))
    open_paths = [((), 0.0, gumbels(seed, root, 1, 0)[0, 0], root)]
    leaves = []
    for length in range(1, max_length + 1):
        grown = []
        for path, log_prob, greatest, node in open_paths:
            phi = log_prob + log_softmax64(logits((request, *path)), allowed, temperature)
            values = perturb_row(seed, node, phi, greatest)
            for token in range(vocab_size):
                if values[token] > -np.inf:
                    child = child_nodes(node, torch.tensor([token]))
                    grown.append(((*path, token), phi[token], values[token], child))
        ends = [path[-1] in eos or length == max_length for path, *_ in grown]
        leaves += [(value, log_prob, path) for end, (path, log_prob, value, _) in zip(ends, grown, strict=True) if end]
        open_paths = [path for end, path in zip(ends, grown, strict=True) if not end]
    return sorted(leaves, reverse=True)


# (V, T, K, EOS): several steps of tokens in groups of their own; groups of two tokens; all there is; no EOS
TREES = [(6, 4, 12, [2]), (70, 2, 20, [3, 69]), (3, 3, 40, [1]), (12, 2, 30, None)]


@pytest.mark.parametrize(("vocab_size", "max_length", "beams", "eos"), TREES)
def test_search_finds_the_best_leaves_of_the_whole_tree(vocab_size, max_length, beams, eos):
    """fb.Stochastic against enumeration with the same noise: sequences, perturbed values and log-probabilities."""
    seed, temperature = 77 + vocab_size, [1.0, 0.6]
    allowed = np.random.default_rng(vocab_size).random(vocab_size) < 0.8
    allowed[:2] = True
    bits = pack_bitmask(torch.from_numpy(allowed)[None]).repeat(2, 1)
    model = TableLM(vocab_size, seed=3)
    search = fb.BeamSearch(beams, max_length, eos, selection=fb.Stochastic(seed), temperature=temperature)
    state = search.init(2)
    tokens, cache = torch.tensor([0, 1]), None  # the model's first token is the request's id
    while not state.all_done():
        logits, cache = model(tokens, cache)
        step = search.step(state, logits, bits)
        cache = fb.reorder(cache, step.source_rows)
        tokens = step.tokens.flatten()
    got = search.finalize(state, beams)
    for request in range(2):
        arguments = vocab_size, eos or [], max_length, seeded(seed), request, allowed, temperature[request]
        leaves = every_leaf(model.logits, *arguments)
        want, count = leaves[:beams], min(beams, len(leaves))
        assert got.valid[request].sum() == count
        found = zip(got.tokens[request, :count].tolist(), got.lengths[request].tolist(), strict=False)
        assert [tuple(row[:length]) for row, length in found] == [path for *_, path in want]
        for field, place in ((got.perturbed, 0), (got.sampling_log_probs, 1)):
            wanted = np.array([leaf[place] for leaf in want])
            assert np.abs(field[request, :count].numpy() - wanted).max() < 1e-4


@pytest.mark.parametrize(("vocab_size", "mask"), [(5000, False), (5000, True), (100, True)])
def test_best_children_of_all_tokens(vocab_size, mask):
    """One level, several parents: what the narrowing finds is what perturbing every token finds."""
    (logits, *rest), options = case(2, 3, vocab_size, mask=mask, temperature=mask, dtype=torch.bfloat16)
    _, greatest, nodes, *_ = rest
    drawn = draw_children(logits, *rest, 60, seeded(), **options)
    allowed = torch.ones(6, vocab_size, dtype=torch.bool)
    if mask:
        allowed = fb.kernels.unpack_bitmask(options["bitmask"], vocab_size)
    temperature = options.get("temperature", torch.ones(6)).double()
    for request in range(2):
        every = []
        for parent in range(3):
            if (row := request * 3 + parent) == 1:  # not read
                continue
            phi = rest[0][request, parent].item() + log_softmax64(
                logits[row].float().numpy(), allowed[row].numpy(), temperature[row].item()
            )
            values = perturb_row(seeded(), nodes[request, parent][None], phi, greatest[request, parent].item())
            every += [(value, parent, token) for token, value in enumerate(values)]
        want = sorted(every, reverse=True)[:60]
        found = zip(drawn.parents[request].tolist(), drawn.tokens[request].tolist(), strict=True)
        assert list(found) == [(parent, token) for _, parent, token in want]
        assert np.abs(drawn.perturbed[request].numpy() - [value for value, *_ in want]).max() < 1e-4
        row = drawn.parents[request] + request * 3
        own = logits[row, drawn.tokens[request]].float()
        assert torch.equal(drawn.adjusted[request], own / temperature[row].float() if mask else own)


@pytest.mark.parametrize("vocab_size", [40, 300, 5000])
def test_fewer_children_are_the_first_of_more(vocab_size):
    fields, options = case(3, 4, vocab_size, mask=True)
    most = draw_children(*fields, 200, seeded(), **options)
    for k in (1, 2, 7, 65, 199):
        same(draw_children(*fields, k, seeded(), **options), draw.Drawn(*(field[:, :k] for field in most)))


@pytest.mark.parametrize("vocab_size", [5, 130, 5000])
def test_greatest_child_of_a_parent_has_its_value(vocab_size):
    """To the bit, for every parent, however many levels lie between; and no child exceeds its parent."""
    fields, options = case(20, 3, vocab_size, temperature=True)
    greatest = fields[2]
    drawn = draw_children(*fields, 700, seeded(), **options)
    assert torch.equal(drawn.perturbed[:, 0], greatest.amax(1))
    for parent in range(3):
        own = drawn.perturbed.masked_fill(drawn.parents != parent, -INF).amax(1)
        if vocab_size < 200:  # all children are there
            assert torch.equal(own, greatest[:, parent])
    assert (drawn.perturbed <= greatest.gather(1, drawn.parents)).all()


def test_seed_node_and_row_decide_the_noise():
    """Another seed or another node gives other children; another place in the batch does not."""
    fields, options = case(2, 1, 300)
    logits, log_probs, perturbed, nodes, *summary = (torch.cat([field, field]) for field in fields)
    nodes[2] += 1
    drawn = draw_children(logits, log_probs, perturbed, nodes, *summary, 9, seeded(), **options)
    other = draw_children(*fields, 9, seeded(2025), **options)
    assert torch.equal(drawn.tokens[1], drawn.tokens[3]) and torch.equal(drawn.perturbed[1], drawn.perturbed[3])
    assert not torch.equal(drawn.tokens[0], drawn.tokens[2]) and not torch.equal(drawn.tokens[:2], other.tokens)


@pytest.mark.parametrize("vocab_size", [70, 5000])
def test_dtype_does_not_change_the_noise(vocab_size, device):
    """Logits that bfloat16 holds exactly give the same children whatever they are stored as."""
    coarse = (torch.randn(6, vocab_size) * 3).bfloat16()
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        logits = coarse.to(device, dtype)
        nodes = root_nodes(torch.arange(6, device=device)).view(2, 3)
        summary = summarize(logits, normalize="allowed")
        zeros = torch.zeros(2, 3, device=device)
        tiles = summary.tiles
        drawn = draw_children(
            logits, zeros, zeros, nodes, tiles.tile_ref, tiles.tile_sum, summary.lse, 50, seeded(1, device)
        )
        results.append(drawn)
    same(*results, BUDGET)


# ---------------------------------------------------------------------------------------------------------------------
# the law


def chi_square_p(counts, probabilities):
    """The p-value of Pearson's statistic; cells that expect less than ten are put together."""
    expected = probabilities.flatten() * counts.sum()
    rare = expected < 10
    observed, expected = (
        torch.cat([x[~rare], x[rare].sum()[None]]) if rare.any() and x[rare].sum() > 0 else x[~rare]
        for x in (counts.flatten().double(), expected)
    )
    statistic = ((observed - expected) ** 2 / expected).sum()
    return torch.special.gammaincc(torch.tensor((len(expected) - 1) / 2).double(), statistic / 2).item()


def test_chi_square_p_is_a_p_value():
    """Against tables (18.307 is exceeded with 5 % at ten degrees of freedom)."""
    expected = torch.full((11,), 1000.0)
    off = math.sqrt(18.307 * 1000 / 2)
    observed = expected + torch.tensor([off, -off, *[0.0] * 9])
    assert chi_square_p(observed, expected / 11000) == pytest.approx(0.05, abs=1e-4)


@functools.cache
def sample(vocab_size, count):
    """Two children of each of ``count`` requests of one law: probabilities [V], tokens, perturbed."""
    generator = torch.Generator().manual_seed(vocab_size)
    row = torch.randn(1, vocab_size, generator=generator) * 1.5
    options = {"vocab_size": vocab_size}
    if vocab_size > 5:
        allowed = torch.rand(1, vocab_size, generator=generator) < 0.7
        options |= {"bitmask": pack_bitmask(allowed), "temperature": torch.tensor([0.8])}
    summary = summarize(row, normalize="allowed", **options)
    adjusted = row.double()
    if vocab_size > 5:
        adjusted = (adjusted / 0.8).masked_fill(~allowed, -INF)
    chunks = []
    size = min(count, 5000 if vocab_size < TILE else 1000)
    fields = [t.expand(size, -1) for t in (summary.tiles.tile_ref, summary.tiles.tile_sum)]
    given = {name: t.expand(size, *t.shape[1:]) for name, t in options.items() if name != "vocab_size"}
    zeros = torch.zeros(size, 1)
    for first in range(0, count, size):
        nodes = root_nodes(torch.arange(first, first + size))[:, None]
        greatest = torch.from_numpy(gumbels(seeded(), nodes, 1, 0)[:, :, 0]).float()
        chunks.append(
            draw_children(
                row.expand(size, -1),
                zeros,
                greatest,
                nodes,
                *fields,
                summary.lse.expand(size),
                2,
                seeded(),
                vocab_size=vocab_size,
                **given,
            )
        )
    tokens, perturbed = (torch.cat([getattr(chunk, name) for chunk in chunks]) for name in ("tokens", "perturbed"))
    return adjusted.softmax(-1)[0], tokens, perturbed


LAWS = [(5, 40_000), (300, 40_000), (5000, 10_000)]


def bins_of(vocab_size):
    """Cuts of the vocabulary, each finer in another level: by token, group, member and tile."""
    token = torch.arange(vocab_size)
    if vocab_size == 5:
        return [token]
    group, member, tile = token % 64, token % 2048 // 64, token // 2048
    return [token * 7 % 16, group // 4, group % 4 * 5 + member % 5, tile * 5 + member % 5]


@pytest.mark.parametrize(("vocab_size", "count"), LAWS)
def test_law_of_the_tokens(vocab_size, count):
    """Plackett-Luce: the first is drawn by its probability, the second by its share of what is left.

    P(first in a, second in b) = sum over i in a of p_i (P_b - [i in b] p_i) / (1 - p_i); inclusion is the sum of both.
    """
    p, tokens, _ = sample(vocab_size, count)
    assert (p[tokens] > 0).all() and (tokens[:, 0] != tokens[:, 1]).all()
    for cut in bins_of(vocab_size):
        cells = int(cut.max()) + 1
        inside = torch.nn.functional.one_hot(cut, cells).double()  # [V, cells]
        mass = inside.T @ p
        first, second = cut[tokens[:, 0]], cut[tokens[:, 1]]
        odds = p / (1 - p)
        pairs = (inside * odds[:, None]).T @ (mass - inside * p[:, None])
        assert pairs.sum().item() == pytest.approx(1)
        assert chi_square_p(torch.bincount(first, minlength=cells), mass) > P_VALUE
        assert chi_square_p(torch.bincount(first * cells + second, minlength=cells**2), pairs) > P_VALUE
    # inclusion of the likeliest tokens, each as a yes or no
    included = odds * (odds.sum() - odds) / (1 + odds) + p  # sum over j != i of p_j p_i / (1 - p_j), and p_i
    assert included.sum().item() == pytest.approx(2)
    for token in included.topk(min(vocab_size, 8)).indices.tolist():
        held = (tokens == token).any(1).sum()
        share = included[token]
        assert chi_square_p(torch.stack([held, count - held]), torch.stack([share, 1 - share])) > P_VALUE / 8


@pytest.mark.parametrize(("vocab_size", "count"), LAWS)
def test_law_of_the_values(vocab_size, count):
    """exp(-perturbed) are the times of a race: the first waits Exp(1), the second Exp(1 - p_first) more."""
    p, tokens, perturbed = sample(vocab_size, count)
    first, second = (-perturbed.double()).exp().unbind(1)
    wait = (second - first) * (1 - p[tokens[:, 0]])
    for times in (first, wait):
        assert kolmogorov_p(times, lambda x: 1 - torch.exp(-x)) > P_VALUE


def test_law_across_parents():
    """Two parents that were drawn themselves: their children are a sample of all four sequences."""
    count = 40_000
    seed, root = seeded(3), root_nodes(torch.arange(count))[:, None]
    weights = torch.tensor([0.3, 0.7])
    top = torch.from_numpy(gumbels(seed, root, 1, 0)[:, :, 0]).float()

    def level(log_probs, perturbed, nodes, probabilities, k):
        rows = probabilities.log().reshape(-1, 2)
        summary = summarize(rows, normalize="allowed")
        tiles = summary.tiles
        return draw_children(rows, log_probs, perturbed, nodes, tiles.tile_ref, tiles.tile_sum, summary.lse, k, seed)

    first = level(torch.zeros(count, 1), top, root, weights.expand(count, 1, 2), 2)
    ends = torch.tensor([[0.5, 0.5], [0.9, 0.1]])
    nodes = child_nodes(root, first.tokens)
    leaves = level(weights.log()[first.tokens], first.perturbed, nodes, ends[first.tokens], 2)
    leaf = first.tokens.gather(1, leaves.parents) * 2 + leaves.tokens
    p = (weights[:, None] * ends).flatten().double()
    pairs = p[:, None] * p / (1 - p[:, None])
    assert chi_square_p(torch.bincount(leaf[:, 0] * 4 + leaf[:, 1], minlength=16), pairs.fill_diagonal_(0)) > P_VALUE


# ---------------------------------------------------------------------------------------------------------------------
# edges


def test_rows_without_children_are_not_read(device):
    """A row without tokens, one with +inf, and parents without log-probability or value: faults there are not seen."""
    logits = torch.randn(5, 70)
    logits[0], logits[1, 3] = -INF, INF
    summary = summarize(logits, normalize="allowed")
    log_probs, perturbed = torch.zeros(1, 5), torch.zeros(1, 5)
    log_probs[0, 2], perturbed[0, 3] = -INF, -INF
    logits[0:4:2], logits[1:4:2] = NAN, INF
    nodes = root_nodes(torch.arange(5))[None]
    fields = (logits, log_probs, perturbed, nodes, summary.tiles.tile_ref, summary.tiles.tile_sum, summary.lse)
    want = draw_children(*fields, 12, seeded())
    assert (want.parents == 4).all() and want.perturbed.isfinite().all()
    same(by_kernel(fields, 12, seeded(), {"vocab_size": 70}, device), want, BUDGET)
    perturbed[0, 4] = -INF
    want = draw_children(*fields, 2, seeded())
    assert want.perturbed.tolist() == want.adjusted.tolist() == [[-INF, -INF]]
    assert want.parents.tolist() == want.tokens.tolist() == [[0, 0]]
    same(by_kernel(fields, 2, seeded(), {"vocab_size": 70}, device), want)


def test_nan_logits_and_barred_tokens_are_never_drawn(device):
    logits = torch.randn(1, 140)
    logits[0, ::3] = NAN
    bits = pack_bitmask(torch.arange(140)[None] % 2 == 1)
    summary = summarize(logits, bitmask=bits, normalize="allowed", vocab_size=130)
    zeros = torch.zeros(1, 1)
    fields = (logits, zeros, zeros, root_nodes(torch.arange(1))[None], *summary.tiles[2:4], summary.lse)
    options = {"vocab_size": 130, "bitmask": bits}
    want = draw_children(*fields, 50, seeded(), **options)
    possible = [token for token in range(130) if token % 2 and token % 3]
    count = len(possible)
    assert sorted(want.tokens[0, :count].tolist()) == possible
    assert (want.perturbed[0, count:] == -INF).all() and (want.tokens[0, count:] == 0).all()
    same(by_kernel(fields, 6, seeded(), options, device), draw.Drawn(*(field[:, :6] for field in want)), BUDGET)


def test_no_request(device):
    fields, options = case(0, 2, 70)
    for got in (draw_children(*fields, 3, seeded(), **options), by_kernel(fields, 3, seeded(), options, device)):
        assert [field.shape for field in got] == [(0, 3)] * 4


def test_batch_invariant_bitwise(device):
    (logits, *rest), options = case(40, 3, 2100, mask=True, temperature=True, dtype=torch.bfloat16)

    def some(requests):
        rows = (requests[:, None] * 3 + torch.arange(3)).flatten()
        by_request, by_row = (field[requests] for field in rest[:3]), (field[rows] for field in rest[3:])
        given = {name: value[rows] for name, value in options.items() if name != "vocab_size"}
        return (logits[rows], *by_request, *by_row), given | {"vocab_size": 2100}

    def definition(requests):
        fields, given = some(requests)
        return draw_children(*fields, 9, seeded(), **given)

    alone = definition(torch.tensor([11]))
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            for batch in (2, 7, 40):
                for place in (0, batch - 1):
                    requests = torch.randperm(40)[:batch]
                    requests[place] = 11
                    got = definition(requests)
                    same(draw.Drawn(*(field[place : place + 1] for field in got)), alone)
    finally:
        torch.set_num_threads(1)
    fields, given = some(torch.tensor([5, 11]))
    few = by_kernel(fields, 4, seeded(), given, device)
    fields, given = some(torch.tensor([11]))
    same(draw.Drawn(*(field[1:] for field in few)), by_kernel(fields, 4, seeded(), given, device))


def test_strided_rows(device):
    """The rows of the logits and of the bitmask have strides; the temperature of a search's first step does too."""
    fields, options = case(2, 1, 2100, mask=True, temperature=True)
    want = draw_children(*fields, 5, seeded(), **options)
    wide, bits = torch.full((4, 2400), INF), torch.zeros(4, 200, dtype=torch.int32)
    logits, options["bitmask"] = wide[::2, 100:2200], bits[1::2, 50:116].copy_(options["bitmask"])
    logits.copy_(fields[0])
    options["temperature"] = options["temperature"][:, None].repeat(1, 3)[:, 0]
    assert (logits.stride(0), options["bitmask"].stride(0), options["temperature"].stride(0)) == (4800, 400, 3)
    same(draw_children(logits, *fields[1:], 5, seeded(), **options), want)
    seen = []

    def launch(*arguments):
        seen.append(arguments)
        return [field.cpu() for field in launch_draw(*(t.to(device) if torch.is_tensor(t) else t for t in arguments))]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(draw, "_op", launch)
        same(draw_children(logits, *fields[1:], 5, seeded(), **options), want, BUDGET)
    assert seen


@pytest.mark.skipif(torch.cuda.is_available(), reason="the trick is a CPU's; on a GPU the memory would be real")
def test_rows_beyond_2_31_elements(device):
    """The stride itself fits int32, so only the casts keep the product from wrapping."""
    logits, bits = far_apart(3, 70, 2**30 + 8), far_apart(3, 3, 2**30 + 8, torch.int32)
    for batch, parents in ((1, 3), (3, 1)):
        fields, options = case(batch, parents, 70, mask=True, dtype=torch.bfloat16)
        logits.copy_(fields[0])
        bits.copy_(options["bitmask"])
        want = draw_children(*fields, 4, seeded(), **options)
        fields = (logits, *fields[1:])
        same(by_kernel(fields, 4, seeded(), options | {"bitmask": bits}, device), want, BUDGET)


def test_input_not_modified(device):
    fields, options = case(2, 2, 100, mask=True, temperature=True)
    given = [*fields, options["bitmask"], options["temperature"]]
    before = [t.clone() for t in given]
    draw_children(*fields, 3, seeded(), **options)
    by_kernel(fields, 3, seeded(), options, device)
    for t, then in zip(given, before, strict=True):
        assert torch.equal(t.nan_to_num(nan=0.5), then.nan_to_num(nan=0.5))


# ---------------------------------------------------------------------------------------------------------------------
# the operation


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("full", [False, True])
def test_opcheck(full, dtype, device):
    fields, options = case(2, 2, 2100, dtype=dtype, mask=full, temperature=full)
    given = [*fields, options.get("bitmask"), options.get("temperature"), seeded()]
    *fields, bitmask, temperature, seed = [None if t is None else t.to(device) for t in given]
    for k in (5, 5000):  # also more than there are candidates
        torch.library.opcheck(draw._op, (*fields, 2100, k, bitmask, temperature, seed))


def test_compiles_without_graph_break(device):
    """A whole search, and no step but the first two is compiled anew."""
    torch._dynamo.reset()
    search = fb.BeamSearch(3, 5, [1, 2], selection=fb.Stochastic(5), temperature=0.7)
    step = torch.compile(search.step, fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager")
    state, want = search.init(2, device), search.init(2, device)
    for t in range(5):
        logits, mask = torch.randn(6, 40, device=device), pack_bitmask(torch.rand(6, 40, device=device) < 0.9)
        with torch._dynamo.config.patch(error_on_recompile=t > 1):
            moves = step(state, logits, mask)
        for field, wanted in zip(moves, search.step(want, logits, mask), strict=True):
            assert torch.equal(field, wanted)


@needs_gpu
def test_cuda_graph_replay_reads_new_inputs():
    fields, options = case(2, 3, 5000, mask=True)
    fields, seed = [t.cuda() for t in fields], seeded(1, "cuda")
    bits, options["bitmask"] = options["bitmask"], options["bitmask"].cuda()

    def step():
        return draw_children(*fields, 9, seed, **options)

    step()  # compiled and loaded outside the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    seed += 1
    fields[3].copy_(root_nodes(fields[3]))
    options["bitmask"].copy_(bits.roll(1, 1))
    graph.replay()
    same(got, step())


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("k", 0, ValueError, "k: expected"),
        ("log_probs", torch.zeros(2, 3, dtype=torch.float64), TypeError, "log_probs: expected float32"),
        ("perturbed", torch.zeros(3, 2), ValueError, "perturbed: expected one per row"),
        ("nodes", torch.zeros(2, 3), TypeError, "nodes: expected int64"),
        ("lse", torch.zeros(5), ValueError, "lse: expected"),
        ("tile_sum", torch.zeros(6, 2), ValueError, "tile_sum: expected"),
        ("seed", torch.zeros(2, dtype=torch.int64), ValueError, "seed: expected"),
        ("temperature", torch.zeros(5), ValueError, "temperature: expected"),
    ],
)
def test_rejects_bad_arguments(name, value, error, message):
    good = {
        "logits": torch.zeros(6, 50),
        "log_probs": torch.zeros(2, 3),
        "perturbed": torch.zeros(2, 3),
        "nodes": torch.zeros(2, 3, dtype=torch.int64),
        "tile_ref": torch.zeros(6, 1),
        "tile_sum": torch.ones(6, 1),
        "lse": torch.zeros(6),
        "k": 2,
        "seed": torch.zeros(1, dtype=torch.int64),
    }
    draw_children(**good)
    with pytest.raises(error, match=f"^{message}"):
        draw_children(**{**good, name: value})
