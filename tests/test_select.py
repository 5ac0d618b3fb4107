"""The exact best candidates: kernel against torch definition, bit for bit, and both against sorting everything."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from flashbeam.kernels import pack_bitmask, select_beams, top_candidates, topk_log_probs
from flashbeam.kernels.lse import row_lse_op
from flashbeam.kernels.select import _select_op as select_op
from flashbeam.kernels.summary import summarize_op
from flashbeam.kernels.tiles import TILE, Tiles
from flashbeam.kernels.triton.select import launch_select
from test_summary import adversarial_rows, far_apart

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
INF, NAN = float("inf"), float("nan")
OPTIONS = ("bitmask", "temperature", "exclude", "divisor")


@pytest.fixture(autouse=True)
def _threads():
    """Tests of threads set their own number; the others are faster with one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def allowed_by(bitmask, vocab_size):
    token = torch.arange(vocab_size)
    return (bitmask[:, token // 32] >> (token % 32)) & 1 == 1


def by_sorting(logits, log_probs, lse, vocab_size, k, bitmask=None, temperature=None, exclude=None, divisor=None):
    """All P * V candidates of each request in float32, sorted by the four keys of the total order."""
    batch, parents = log_probs.shape
    adjusted = logits[:, :vocab_size].float()
    if temperature is not None:
        adjusted = adjusted / temperature[:, None]
    barred = adjusted.isnan() | ~lse.isfinite()[:, None]
    if bitmask is not None:
        barred |= ~allowed_by(bitmask, vocab_size)
    if exclude is not None:
        barred[:, exclude] = True
    adjusted = adjusted.masked_fill(barred, -INF)
    increment = (adjusted - lse.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)[:, None]).clamp(max=0.0)
    log_prob = log_probs.view(-1, 1) + increment
    log_prob = log_prob.view(batch, parents * vocab_size)
    score = log_prob if divisor is None else log_prob / divisor[:, None]
    adjusted = adjusted.view(batch, parents * vocab_size)
    parent, token = np.divmod(np.arange(parents * vocab_size), vocab_size)
    out = (
        torch.full((batch, k), -INF),
        torch.zeros(batch, k, dtype=torch.int64),
        torch.zeros(batch, k, dtype=torch.int64),
        torch.full((batch, k), -INF),
    )
    for b in range(batch):
        # lexsort's last key is the first; adding 0.0 turns -0.0 into +0.0
        order = np.lexsort((token, -adjusted[b].numpy() + 0.0, parent, -score[b].numpy() + 0.0))
        order = [i for i in order[:k] if log_prob[b, i] > -INF]
        for field, values in zip(out, (log_prob[b], parent, token, adjusted[b]), strict=True):
            field[b, : len(order)] = torch.as_tensor(values)[order]
    return out


def check(logits, log_probs, k, device, vocab_size=None, kernel=True, lse_error=0.0, **options):
    """Definition and kernel, given one summary, both equal to sorting. Returns what they agree on."""
    vocab_size = logits.shape[1] if vocab_size is None else vocab_size
    values = [options.get(name) for name in OPTIONS]
    bitmask, temperature, exclude, _ = values
    tiles = Tiles(*summarize_op(logits, vocab_size, bitmask, temperature, None, exclude, False, False))
    group_max, tile_max = tiles.group_max, tiles.tile_max
    lse = row_lse_op(tiles.tile_ref, tiles.tile_sum, temperature)[0] + lse_error
    want = by_sorting(logits, log_probs, lse, vocab_size, k, **options)
    results = [select_op(logits, log_probs, group_max, tile_max, lse, vocab_size, k, *values)]
    if kernel:
        moved = [None if t is None else t.to(device) for t in (logits, log_probs, group_max, tile_max, lse, *values)]
        results.append([field.cpu() for field in launch_select(*moved[:5], vocab_size, k, *moved[5:])])
    for got in results:
        for field, wanted, name in zip(got, want, ("log_probs", "parents", "tokens", "adjusted"), strict=True):
            assert field.dtype == wanted.dtype and torch.equal(field, wanted), name
    return want


# one shape (B, P, V, k) per path: one candidate; k beyond the candidates; a group missing; one tile and k beyond its
# groups; a ragged second tile with more tiles than k; k beyond the tiles; k beyond all groups of all tiles; wide
SHAPES = [
    (1, 1, 1, 1),
    (2, 3, 2, 9),
    (1, 2, 63, 5),
    (2, 1, 100, 40),
    (1, 5, 2049, 4),
    (2, 4, 5000, 40),
    (1, 1, 33, 128),
]


@pytest.mark.parametrize("shape", SHAPES)
def test_matches_reference(shape, device):
    batch, parents, vocab_size, k = shape
    logits, log_probs = torch.randn(batch * parents, vocab_size) * 3, -torch.rand(batch, parents) * 5
    check(logits, log_probs, k, device)
    bits = pack_bitmask(torch.rand(batch * parents, vocab_size) < 0.6)
    everything = {
        "bitmask": bits,
        "temperature": torch.rand(batch * parents) + 0.5,
        "exclude": torch.tensor([0, vocab_size - 1, vocab_size // 2]),
        "divisor": torch.linspace(0.3, 3.7, batch),
    }
    check(logits.bfloat16(), log_probs.round() * 100, k, device, **everything)
    coarse = logits.round().half()
    check(coarse, log_probs.round(), k, device, divisor=everything["divisor"], exclude=everything["exclude"])


def test_wide_beam(device):
    """Eight warps and larger blocks; ranks of 128 take two blocks."""
    logits = (torch.randn(2, 4 * TILE + 70) * 3).bfloat16()
    check(logits, torch.tensor([[0.0, -0.5]]), 128, device)


def test_no_request(device):
    empty = check(torch.zeros(0, 70), torch.zeros(0, 2), 3, device)
    assert [field.shape for field in empty] == [(0, 3)] * 4


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65, torch.float32), (2049, torch.float16)])
def test_adversarial_rows(vocab_size, dtype, device):
    """Each row is a parent: with -0.0, NaN, +inf, nothing, one token, and 1e4 above and below."""
    logits = adversarial_rows(vocab_size, dtype)
    log_probs = -torch.rand(1, len(logits))
    check(logits, log_probs, 40, device)
    if vocab_size == 65:
        check(logits, log_probs.view(-1, 1), 5, device)  # and each row is a request


def equal_maxima(columns, rows, tile=0, vocab_size=5000, top=3.0):
    """A row whose maxima lie at (row, column) of one tile."""
    logits = torch.randn(vocab_size).clamp(max=2.0)
    logits[tile * TILE + torch.as_tensor(rows) * 64 + torch.as_tensor(columns)] = top
    return logits


@pytest.mark.parametrize("k", [1, 3, 40])
def test_more_equal_maxima_than_k_in_another_order_than_their_groups(k, device):
    """The lowest tokens lie in the highest columns, so the order of the groups is not that of the tokens."""
    column = torch.arange(64)
    logits = torch.stack(
        [
            equal_maxima(column, (63 - column) // 2),
            equal_maxima(column, (column != 63) * 31),  # the winner is the last group of the 64
            equal_maxima(column, 31 - column // 2, tile=1),
        ]
    )
    _, _, tokens, _ = check(logits, torch.zeros(3, 1), k, device)
    assert tokens[1, 0] == 63
    # and with as many strictly better groups in front as k leaves room for
    better = equal_maxima(column, (column != 63) * 31)
    better[TILE : TILE + k - 1] = 4.0
    check(better[None], torch.zeros(1, 1), k, device)


@pytest.mark.parametrize("k", [1, 5, 70])
def test_all_equal_logits_take_the_first_parent_and_the_lowest_tokens(k, device):
    logits = torch.full((6, 2100), 1.25)
    _, parents, tokens, _ = check(logits, torch.zeros(2, 3), k, device)
    assert parents.tolist() == [[0] * k] * 2 and tokens.tolist() == [list(range(k))] * 2


def test_ties_across_parents_go_to_the_lower_slot(device):
    logits = torch.randn(1, 100).repeat(3, 1)
    _, parents, tokens, _ = check(logits, torch.tensor([[-1.0, -1.0, -1.0]]), 7, device)
    assert parents.tolist() == [[0, 1, 2, 0, 1, 2, 0]] and tokens[0, 0] == tokens[0, 2] == logits[0].argmax()
    # equal sums of different terms, the larger logit in the later parent
    logits = torch.zeros(2, 2)
    logits[0, 1] = logits[1, 0] = 1.0
    check(logits, torch.tensor([[-2.0, -1.0]]), 4, device)


def test_scores_that_collide_in_float32_are_ordered_by_adjusted_logit(device):
    """At -1000 a float32 step is 6e-5: logits 1e-5 apart give one score."""
    logits = torch.randperm(2100).view(1, -1).repeat(2, 1) * 1e-8
    log_probs, parents, tokens, adjusted = check(logits, torch.tensor([[-1000.0, -1000.0]]), 9, device)
    assert (log_probs == log_probs[0, 0]).all() and (parents == 0).all()
    assert (adjusted[0, 1:] < adjusted[0, :-1]).all() and tokens[0].tolist() != sorted(tokens[0].tolist())
    # a coarse divisor makes scores collide that log_probs tell apart: then the parent comes first
    apart = torch.tensor([[-1000.0, -999.9999, -1000.0001]])
    check(torch.randn(3, 70) * 1e-6, apart, 9, device, divisor=torch.tensor([3e38]))


def test_temperature_that_makes_distinct_logits_equal_leaves_the_lower_token_first(device):
    steps = torch.arange(200, dtype=torch.int32) + torch.tensor(1.6).view(torch.int32)
    logits = torch.stack([steps.view(torch.float32), steps.flip(0).view(torch.float32)])
    assert len((logits[0] / 1.5).unique()) < 200
    check(logits, torch.zeros(2, 1), 40, device, temperature=torch.full((2,), 1.5))
    check(logits, torch.zeros(1, 2), 40, device, temperature=torch.tensor([1.5, 1.25]))


def test_zeros_of_both_signs_are_equal(device):
    logits = torch.where(torch.arange(130) % 3 == 0, 0.0, -0.0)[None]
    _, _, tokens, _ = check(logits, torch.zeros(1, 1), 70, device)
    assert tokens[0].tolist() == list(range(70))
    # the score too: a parent at -0.0 and a certain token
    certain = torch.tensor([[5.0, -INF], [5.0, -INF]])
    _, parents, _, _ = check(certain, torch.tensor([[-0.0, 0.0]]), 3, device)
    assert parents.tolist() == [[0, 1, 0]]


def test_more_places_than_candidates_are_invalid_with_ids_in_range(device):
    logits = torch.full((2, 2050), -INF)
    logits[0, 2049], logits[1, 7] = 1.0, 2.0
    log_probs, parents, tokens, adjusted = check(logits, torch.tensor([[-1.0, -0.5]]), 40, device)
    assert (log_probs[0, 2:] == -INF).all() and (adjusted[0, 2:] == -INF).all()
    assert parents[0].tolist() == [1, *[0] * 39] and tokens[0].tolist() == [7, 2049, *[0] * 38]


def test_invalid_parents_have_no_candidates(device):
    logits = torch.randn(6, 70)
    logits[1], logits[4] = NAN, INF
    _, parents, _, _ = check(logits, torch.tensor([[-1.0, -INF, -INF], [-INF, 0.0, -2.0]]), 80, device)
    assert (parents[0] == 0).all() and set(parents[1].tolist()) == {0, 2}
    check(logits, torch.full((2, 3), -INF), 5, device)


def test_log_probs_never_exceed_their_parent(device):
    """A log-sum-exp may round below the largest logit; increments are cut at 0, and then the larger logit is first."""
    logits, log_probs = torch.full((2, 70), -30.0), torch.tensor([[-0.125, -0.125]])
    logits[0, 9], logits[0, 3], logits[1, 2] = 16.0, 15.9, 0.0
    got, parents, tokens, _ = check(logits, log_probs, 3, device, lse_error=-2.0)
    assert got.tolist() == [[-0.125] * 3] and parents.tolist() == [[0, 0, 1]] and tokens.tolist() == [[9, 3, 2]]


def test_columns_past_the_vocabulary_and_masked_tokens_are_never_chosen(device):
    logits = torch.randn(2, 2200)
    logits[:, 2050:] = torch.tensor([NAN, INF, 1e4]).repeat(50)
    ones = torch.full((2, 70), -1, dtype=torch.int32)
    check(logits, torch.zeros(1, 2), 40, device, vocab_size=2050)
    check(logits, torch.zeros(1, 2), 40, device, vocab_size=2050, bitmask=ones, exclude=torch.tensor([2049]))


def test_batch_invariant_bitwise(device):
    logits, log_probs = (torch.randn(64 * 3, 2100) * 3).bfloat16(), -torch.rand(64, 3)
    bits = pack_bitmask(torch.rand(64 * 3, 2100) < 0.5)

    def definition(requests, k):
        rows = (requests[:, None] * 3 + torch.arange(3)).flatten()
        return top_candidates(logits[rows], log_probs[requests], k, bitmask=bits[rows])

    for threads in (1, 2, 3, 5, 8):
        torch.set_num_threads(threads)
        alone = definition(torch.tensor([11]), 9)
        for batch in (2, 7, 64):
            for place in (0, batch - 1):
                requests = torch.randperm(64)[:batch]
                requests[place] = 11
                got = definition(requests, 9)
                for name in ("log_probs", "parents", "tokens", "adjusted"):
                    assert torch.equal(getattr(got, name)[place], getattr(alone, name)[0]), name
                assert torch.equal(got.lse.view(-1, 3)[place], alone.lse)
    torch.set_num_threads(1)
    few = check(logits[:9], log_probs[:3], 9, device)
    for place in range(3):
        one = check(logits[place * 3 : place * 3 + 3], log_probs[place : place + 1], 9, device, kernel=place == 1)
        for field, alone in zip(few, one, strict=True):
            assert torch.equal(field[place : place + 1], alone)


def test_strided_rows(device):
    wide = torch.full((8, 2400), INF)
    logits = wide[::2, 100:2200]
    logits.copy_(torch.randn(4, 2100))
    bits = torch.zeros(8, 200, dtype=torch.int32)[1::2, 50:150]
    bits[:, :66] = pack_bitmask(torch.rand(4, 2100) < 0.5)
    assert logits.stride(0) == 4800 and bits.stride(0) == 400
    strided = check(logits, torch.zeros(2, 2), 9, device, bitmask=bits)
    dense = check(logits.contiguous(), torch.zeros(2, 2), 9, device, bitmask=bits.contiguous(), kernel=False)
    for field, other in zip(strided, dense, strict=True):
        assert torch.equal(field, other)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the trick is a CPU's; on a GPU the memory would be real")
def test_rows_beyond_2_31_elements(device):
    """The stride itself fits int32, so only the cast of the parent keeps the product from wrapping."""
    logits = far_apart(3, 70, 2**30 + 8)
    logits.copy_(torch.randn(3, 70))
    bits = far_apart(3, 3, 2**30 + 8, torch.int32)
    bits.copy_(pack_bitmask(torch.rand(3, 70) < 0.5))
    check(logits, torch.zeros(1, 3), 40, device, bitmask=bits)
    check(logits, torch.zeros(3, 1), 40, device, bitmask=bits)


def test_input_not_modified(device):
    inputs = {
        "logits": torch.randn(4, 100),
        "log_probs": -torch.rand(2, 2),
        "bitmask": pack_bitmask(torch.rand(4, 100) < 0.5),
        "temperature": torch.rand(4) + 0.5,
        "exclude": torch.tensor([5, 6]),
        "divisor": torch.tensor([1.0, 2.0]),
    }
    before = {name: value.clone() for name, value in inputs.items()}
    check(**inputs, k=5, device=device)
    top_candidates(**inputs, k=5)
    for name, value in inputs.items():
        assert torch.equal(value, before[name]), name


def test_public_functions_agree(device):
    logits, log_probs = torch.randn(6, 300, device=device), -torch.rand(2, 3, device=device)
    rows = topk_log_probs(logits, 300)
    assert torch.allclose(rows.log_probs, logits.log_softmax(-1).sort(dim=-1, descending=True).values, atol=2e-6)
    assert torch.equal(rows.tokens, logits.sort(dim=-1, descending=True, stable=True).indices)
    assert torch.allclose(rows.lse, logits.logsumexp(-1), atol=2e-6)
    for given in (logits, logits.view(2, 3, 300)):
        best = select_beams(given, log_probs, 9)
        scores = (log_probs[:, :, None] + logits.log_softmax(-1).view(2, 3, 300)).flatten(1)
        want = scores.topk(9)
        assert torch.allclose(best.log_probs, want.values, atol=2e-6) and best.valid.all()
        assert torch.equal(best.parents * 300 + best.tokens, want.indices)
    narrow = select_beams(logits, log_probs, 9, width=torch.tensor([2, 9], device=device))
    assert narrow.valid.sum(1).tolist() == [2, 9]
    assert narrow.tokens[0, 2:].tolist() == [0] * 7 and narrow.log_probs[0, 2:].tolist() == [-INF] * 7
    two = torch.full((6,), 2.0, device=device)
    hot = [select_beams(logits, log_probs, 9, temperature=given) for given in (2.0, two[:2], two)]
    for other in hot[1:]:
        for field, wanted in zip(other, hot[0], strict=True):
            assert torch.equal(field, wanted)
    bits = pack_bitmask(torch.rand(6, 300, device=device) < 0.5)
    flat, cube = (select_beams(logits, log_probs, 9, bitmask=given) for given in (bits, bits.view(2, 3, -1)))
    for field, wanted in zip(cube, flat, strict=True):
        assert torch.equal(field, wanted)


def test_rows_of_dead_parents_are_not_read(device):
    """Not read, so their faults raise no flag; active says the same of top_candidates."""
    logits, log_probs = torch.randn(2, 70, device=device), torch.tensor([[0.0, -INF]], device=device)
    want = select_beams(logits, log_probs, 5)
    logits[1] = NAN
    for field, wanted in zip(select_beams(logits, log_probs, 5), want, strict=True):
        assert torch.equal(field, wanted)
    active = torch.tensor([True, False], device=device)
    best = top_candidates(logits, log_probs, 5, active=active)
    assert best.flags.tolist() == [0, 0] and best.lse[1] == -INF
    assert top_candidates(logits, log_probs, 5).flags.tolist() == [0, 1]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("full", [False, True])
def test_opcheck(full, dtype, device):
    logits, log_probs = torch.randn(4, 2100, device=device).to(dtype), -torch.rand(2, 2, device=device)
    bitmask = temperature = exclude = divisor = None
    if full:
        bitmask = pack_bitmask(torch.rand(4, 2100, device=device) < 0.5)
        temperature, exclude = torch.rand(4, device=device) + 0.5, torch.tensor([3], device=device)
        divisor = torch.rand(2, device=device) + 0.5
    tiles = Tiles(*summarize_op(logits, 2100, bitmask, temperature, None, exclude, False, False))
    lse, _ = row_lse_op(tiles.tile_ref.clone(), tiles.tile_sum, temperature)
    for k in (5, 5000):  # also more than there are candidates
        arguments = (logits, log_probs, tiles.group_max, tiles.tile_max, lse, 2100, k)
        torch.library.opcheck(torch.ops.flashbeam.select, (*arguments, bitmask, temperature, exclude, divisor))


def test_compiles_without_graph_break(device):
    def step(logits, log_probs, bitmask, temperature):
        best = select_beams(logits * 2, log_probs, 5, bitmask=bitmask, temperature=temperature)
        return *best, *topk_log_probs(logits, 3, temperature=0.5, normalize="allowed", bitmask=bitmask)

    inputs = (
        torch.randn(4, 2100, device=device),
        -torch.rand(2, 2, device=device),
        pack_bitmask(torch.rand(4, 2100, device=device) < 0.5),
        torch.rand(4, device=device) + 0.5,
    )
    backend = "inductor" if device == "cuda" else "aot_eager"
    got = torch.compile(step, fullgraph=True, backend=backend)(*inputs)
    for field, want in zip(got, step(*inputs), strict=True):
        assert torch.equal(field, want)


@needs_gpu
def test_cuda_graph_replay_reads_new_inputs():
    logits, log_probs = torch.randn(6, 5000, device="cuda"), -torch.rand(2, 3, device="cuda")
    bits = pack_bitmask(torch.rand(6, 5000, device="cuda") < 0.5)

    def step():
        return select_beams(logits, log_probs, 9, bitmask=bits)

    step()  # compiled and loaded outside the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    logits.normal_()
    log_probs.sub_(torch.rand_like(log_probs))
    bits.bitwise_not_()
    graph.replay()
    for field, want in zip(got, step(), strict=True):
        assert torch.equal(field, want)


def zeros(*shape, dtype=torch.float32, device="cpu"):
    return torch.zeros(shape, dtype=dtype, device=device)


X, PARENTS = zeros(4, 40), zeros(2, 2)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: topk_log_probs([1.0], 1), TypeError, "logits: expected a tensor, got list"),
        (lambda: topk_log_probs(zeros(3), 1), ValueError, "logits: expected shape [B, P, V] or [R, V], got [3]"),
        (
            lambda: topk_log_probs(X.double(), 1),
            TypeError,
            "logits: expected float32 or float16 or bfloat16, got float64",
        ),
        (lambda: topk_log_probs(X, 0), ValueError, "k: expected an int >= 1, got 0"),
        (lambda: topk_log_probs(X, 1.0), TypeError, "k: expected an int >= 1, got float"),
        (lambda: topk_log_probs(X, True), TypeError, "k: expected an int >= 1, got bool"),
        (
            lambda: topk_log_probs(X, 1, temperature="1"),
            TypeError,
            "temperature: expected a number or a tensor, got str",
        ),
        (lambda: topk_log_probs(X, 1, temperature=0.0), ValueError, "temperature: expected a number above 0, got 0.0"),
        (lambda: topk_log_probs(X, 1, temperature=NAN), ValueError, "temperature: expected a number above 0, got nan"),
        (
            lambda: topk_log_probs(X, 1, temperature=zeros(3)),
            ValueError,
            "temperature: expected shape [R] = [4], got [3]",
        ),
        (lambda: topk_log_probs(X, 1, bitmask=zeros(4, 2)), TypeError, "bitmask: expected int32, got float32"),
        (
            lambda: topk_log_probs(X, 1, bitmask=zeros(4, 1, dtype=torch.int32)),
            ValueError,
            "bitmask: expected shape [R, ceil(V / 32)] = [4, 2], got [4, 1]",
        ),
        (lambda: topk_log_probs(X, 1, vocab_size=41), ValueError, "vocab_size: expected an int in [1, 40], got 41"),
        (
            lambda: topk_log_probs(X, 1, normalize="no"),
            ValueError,
            "normalize: expected 'vocab' or 'allowed', got 'no'",
        ),
        (lambda: select_beams(X, [0.0], 1), TypeError, "log_probs: expected a tensor, got list"),
        (lambda: select_beams(X, PARENTS.double(), 1), TypeError, "log_probs: expected float32, got float64"),
        (lambda: select_beams(X, zeros(4), 1), ValueError, "log_probs: expected shape [B, P], got [4]"),
        (
            lambda: select_beams(X, zeros(3, 2), 1),
            ValueError,
            "log_probs: expected one per row of logits, 4, got [3, 2]",
        ),
        (lambda: select_beams(X, PARENTS, 1, width=zeros(2)), TypeError, "width: expected int64, got float32"),
        (
            lambda: select_beams(X, PARENTS, 1, width=zeros(4, dtype=torch.int64)),
            ValueError,
            "width: expected shape [B] = [2], got [4]",
        ),
        (
            lambda: top_candidates(X, PARENTS, 1, divisor=zeros(2).half()),
            TypeError,
            "divisor: expected float32, got float16",
        ),
        (
            lambda: top_candidates(X, PARENTS, 1, divisor=zeros(4)),
            ValueError,
            "divisor: expected shape [B] = [2], got [4]",
        ),
        (
            lambda: top_candidates(X, zeros(2, 2, device="meta"), 1),
            ValueError,
            "log_probs: expected all tensors on one device, got logits on cpu, log_probs on meta",
        ),
        (lambda: top_candidates(X, PARENTS, 1, exclude=zeros(1)), TypeError, "exclude: expected int64, got float32"),
        (
            lambda: top_candidates(X, PARENTS, 1, active=zeros(3, dtype=torch.bool)),
            ValueError,
            "active: expected shape [R] = [4], got [3]",
        ),
        (
            lambda: select_beams(zeros(40, 4).t(), PARENTS, 1),
            ValueError,
            "logits: expected unit stride in the last dimension, got strides (1, 4)",
        ),
    ],
)
def test_rejects_bad_arguments(call, error, message):
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == message
