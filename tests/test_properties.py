"""Whatever the shapes, dtypes and options: the public operations against sorting, a search against itself."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import flashbeam as fb
from flashbeam.kernels import pack_bitmask, select_beams, summarize, topk_log_probs
from test_select import by_sorting
from test_summary import check_budget, expected

INF, NAN = float("inf"), float("nan")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True, scope="module")
def _threads():
    """Tiny tensors: threads cost more than they give. For the module: hypothesis runs a test many times."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@st.composite
def requests(draw, beams=True):
    """Logits with ties and faults in rows that may be strided, and what an operation may be told about them."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1), label="seed"))
    batch = draw(st.integers(0, 3), label="B")
    parents = draw(st.integers(1, 5), label="P") if beams else 1
    # around every boundary: words of 32, rows of 64, tiles of 2048
    boundary = draw(st.sampled_from([2, 32, 64, 128, 2048, 4096]), label="boundary")
    columns = max(1, boundary + draw(st.integers(-2, 70), label="more"))
    vocab_size = draw(st.sampled_from([None, max(1, columns - 1), (columns + 1) // 2]), label="vocab_size")
    rows, used = batch * parents, columns if vocab_size is None else vocab_size
    wide = torch.randn(rows, columns + draw(st.integers(0, 9), label="padding"), generator=generator)
    logits = wide[:, wide.shape[1] - columns :].mul_(draw(st.sampled_from([0.0, 1e-6, 3.0, 1000.0]), label="scale"))
    if draw(st.booleans(), label="coarse"):
        logits.round_()
    for fault in draw(st.lists(st.sampled_from([NAN, INF, -INF, -0.0]), max_size=3), label="faults"):
        if rows:
            row = int(torch.randint(rows, (1,), generator=generator))
            share = draw(st.sampled_from([2.0 / columns, 0.5, 1.0]), label="share")
            logits[row, torch.rand(columns, generator=generator) < share] = fault
    logits = logits.to(draw(st.sampled_from(DTYPES), label="dtype"))
    options = {"vocab_size": vocab_size}
    if draw(st.booleans(), label="bitmask"):
        share = draw(st.sampled_from([0.02, 0.5, 1.0]), label="allowed")
        options["bitmask"] = pack_bitmask(torch.rand(rows, used, generator=generator) < share)
        options["normalize"] = draw(st.sampled_from(["vocab", "allowed"]), label="normalize")
    if draw(st.booleans(), label="temperature"):
        options["temperature"] = torch.rand(rows, generator=generator) * 2 + 0.1
    k = draw(st.sampled_from([1, 2, 5, 17, 64, 150]), label="k")
    if not beams:
        return logits, k, options
    log_probs = -torch.rand(batch, parents, generator=generator) * draw(
        st.sampled_from([0.0, 3.0, 2000.0]), label="depth"
    )
    log_probs[torch.rand(batch, parents, generator=generator) < draw(st.sampled_from([0.0, 0.3]), label="dead")] = -INF
    if draw(st.booleans(), label="exclude"):
        options["exclude"] = torch.randint(used, (draw(st.integers(0, 3), label="n"),), generator=generator)
    return logits, log_probs, k, options


def size_of(logits, options):
    return logits.shape[1] if options["vocab_size"] is None else options["vocab_size"]


@settings(max_examples=150)
@given(requests(beams=False))
def test_topk_log_probs(request):
    logits, k, options = request
    vocab_size = size_of(logits, options)
    got = topk_log_probs(logits, k, **options)
    told = {name: options.get(name) for name in ("bitmask", "temperature")}
    told["renormalize"] = options.get("normalize") == "allowed"
    _, lse, _ = expected(logits, vocab_size, **told)
    _, in_float32, _ = expected(logits, vocab_size, torch.float32, **told)
    check_budget(got.lse, lse, in_float32)
    told.pop("renormalize")
    want = by_sorting(logits, torch.zeros(len(logits), 1), got.lse, vocab_size, k, **told)
    assert torch.equal(got.log_probs, want[0]) and torch.equal(got.tokens, want[2])


@settings(max_examples=150)
@given(requests())
def test_select_beams(request):
    logits, log_probs, k, options = request
    vocab_size = size_of(logits, options)
    exclude = options.get("exclude")
    live = (log_probs > -INF).flatten()
    lse = summarize(logits, active=live, **{n: v for n, v in options.items() if n != "exclude"}).lse
    got = select_beams(logits, log_probs, k, **options)
    told = {name: options.get(name) for name in ("bitmask", "temperature")}
    want = by_sorting(logits, log_probs, lse, vocab_size, k, **told, exclude=exclude)
    assert torch.equal(got.log_probs, want[0]) and torch.equal(got.parents, want[1])
    assert torch.equal(got.tokens, want[2]) and torch.equal(got.valid, want[0] > -INF)
    # the best k are the first k of more
    more = select_beams(logits, log_probs, k + 3, **options)
    for field, longer in zip(got, more, strict=True):
        assert torch.equal(field, longer[:, :k])


@settings(max_examples=50)
@given(st.data())
def test_search_of_a_permuted_batch_is_the_permuted_search(data):
    """Per-request settings travel along; the other order may hold a subset, or a request twice."""
    batch = data.draw(st.integers(1, 4), label="B")
    order = data.draw(st.lists(st.integers(0, batch - 1), min_size=1, max_size=5), label="order")
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32 - 1), label="seed"))
    vocab_size = data.draw(st.sampled_from([5, 40, 70]), label="V")

    def each(values):
        return data.draw(st.lists(st.sampled_from(values), min_size=batch, max_size=batch))

    regime = data.draw(st.sampled_from(["pool", "in_place"]), label="finished")
    rules = [fb.FirstFinished(), fb.Exact(), fb.Exhausted(), fb.Patience(0.5), fb.Patience(1.5)]
    shared = {
        "eos_id": data.draw(st.sampled_from([None, 0, [1, 3], [4, 0, 2]]), label="eos_id"),
        "finished": regime,
        "stopping": data.draw(st.sampled_from(rules if regime == "pool" else rules[:3]), label="stopping"),
        "normalize": data.draw(st.sampled_from(["vocab", "allowed"]), label="normalize"),
    }
    own = {
        "beam_size": each([1, 2, 4]),
        "max_length": each([2, 3, 5]),
        "min_length": each([0, 1, 2]),
        "temperature": each([0.5, 1.0, 1.5]),
        "length_penalty": each([0.0, 1.0, -0.5, fb.GNMT(0.8)]),
    }
    steps, beams = max(own["max_length"]), max(own["beam_size"])
    logits = torch.randn(steps, batch, beams, vocab_size, generator=generator)
    if data.draw(st.booleans(), label="coarse"):
        logits.round_()
    bits = None
    if data.draw(st.booleans(), label="bitmask"):
        bits = pack_bitmask(torch.rand(steps, batch, beams, vocab_size, generator=generator) < 0.7)

    def run(chosen):
        picked = {name: [values[i] for i in chosen] for name, values in own.items()}
        width = max(picked["beam_size"])
        search = fb.BeamSearch(**shared, **picked)
        state = search.init(len(chosen))
        for t in range(max(picked["max_length"])):
            search.step(state, logits[t, chosen, :width], None if bits is None else bits[t, chosen, :width])
        assert state.all_done()
        return search.finalize(state, num_hypotheses=5), state.flags

    (want, want_flags), (got, got_flags) = run(list(range(batch))), run(order)
    assert torch.equal(got_flags, want_flags[order])
    for name, field in vars(got).items():
        if field is None:  # for rules that sample
            assert getattr(want, name) is None
            continue
        wanted = getattr(want, name)[order]
        if field.dim() == 3:  # padded to the longest of its own batch
            longest = field.shape[2]
            assert (wanted[:, :, longest:] == (-1 if name == "slots" else 0)).all()
            wanted = wanted[:, :, :longest]
        assert torch.equal(field, wanted), name
