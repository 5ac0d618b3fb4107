"""A step from the second on is the same operations on the same memory, which is what a CUDA graph replays."""

import pytest
import torch
from torch.utils import _pytree as pytree

import flashbeam as fb
from fake_graph import addresses, assert_equal, record, tensors_of
from flashbeam import capture
from step_cases import CASES, V, given_to, search_of

STEPS = 7
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="captures a CUDA graph")


@pytest.fixture
def recorded(monkeypatch):
    """Captured on a CPU."""
    monkeypatch.setattr(capture, "_records", lambda device: True)
    monkeypatch.setattr(capture, "_record", record)


@pytest.mark.parametrize("name", CASES)
def test_a_replayed_step_goes_on_as_an_eager_one(name):
    search = search_of(name)
    eager, replayed = search.init(2), search.init(2)
    first, (logits, rest) = given_to(name, 2), given_to(name, 8)
    for state in (eager, replayed):
        search.step(state, first[0], **first[1])
    places = addresses(replayed)
    replay, step = record(lambda: search.step(replayed, logits, **rest))
    for _ in range(STEPS):  # the last where all are done
        replay()
        assert_equal((step, replayed), (search.step(eager, logits, **rest), eager))
        for place, fresh in zip(tensors_of((logits, rest)), tensors_of(given_to(name, 8)), strict=True):
            place.copy_(fresh)
    assert addresses(replayed) == places
    assert bool(replayed.done.all())


class Static:
    """A model whose cache stays in place: what it says depends on all tokens so far and on their number."""

    def __init__(self, batch_size, way="in place"):
        self.table, self.calls, self.way = torch.randn(V, 8), 0, way
        self.out = torch.randn(8, V)
        self.cache = {"sums": torch.zeros(batch_size, 8), "position": torch.zeros(batch_size, dtype=torch.int64)}

    def __call__(self, tokens, cache):
        self.calls += 1
        sums, position = cache["sums"], cache["position"]
        seen = self.table[tokens] * (position[:, None] + 1)
        if self.way == "new":
            cache = {"sums": sums + seen, "position": position + 1}
        elif self.way == "grows":
            cache = {"sums": torch.cat([sums, seen], 1), "position": position + 1}
        elif self.way == "entry":
            cache = {"sums": sums.add_(seen), "position": position.add_(1)}
            if self.calls > 1:
                cache["more"] = sums
        elif self.way == "number":
            cache = {"sums": sums.add_(seen), "position": position.add_(1), "step": self.calls}
        else:
            sums.add_(seen)
            position.add_(1)
        return (cache["sums"][:, -8:, None] * self.out).sum(1), cache


@pytest.mark.parametrize("way", ["in place", "new"])
@pytest.mark.parametrize(
    "name", ["topk, pool", "topk, in_place, many", "trie, pool", "sample, in_place", "groups, pool"]
)
def test_a_captured_decode_finds_the_same(name, way, recorded):
    model = Static(2, way)
    table, start = model.table.clone(), torch.tensor([5, 9])
    cache = {key: field.clone() for key, field in model.cache.items()}
    want = fb.decode(search_of(name), model, start, model.cache)
    model.calls = 0
    got = fb.decode(search_of(name), model, start, cache, capture=True)
    assert_equal(got, want)
    assert model.calls == 3  # for the prompt, with the static cache, and to be recorded
    assert torch.equal(model.table, table)


SHARES = {  # a cache of two rows, and what a model that has made ``new [R, V]`` of it returns
    "tokens": lambda tokens, cache, new: (new, tokens),
    "view of tokens": lambda tokens, cache, new: (new, tokens.view(-1, 1).view(-1)),
    "shift register": lambda tokens, cache, new: (new, cache[0]),
    "shift register by view": lambda tokens, cache, new: (new, cache[0].view(new.shape)),
    "one tensor twice": lambda tokens, cache, new: (new, new),
    "in place and shifted": lambda tokens, cache, new: (cache[0].copy_(new), cache[0].view(new.shape)),
    "views": lambda tokens, cache, new: (cache[0].copy_(new).view(new.shape), cache[1][:]),
}


@pytest.mark.parametrize("name", SHARES)
def test_a_cache_may_share_memory(name, recorded):
    table = torch.randn(V, V)

    def model(tokens, cache):
        second = cache[1] if cache[1].dim() == 2 else table[cache[1]]
        new = torch.tanh(table[tokens] + cache[0] - second)
        return 3.0 * new + table[tokens], SHARES[name](tokens, cache, new)

    start, cache = torch.tensor([5, 9]), (torch.zeros(2, V), torch.ones(2, V))
    if "tokens" in name:
        cache = cache[0], torch.tensor([3, 4])
    want = fb.decode(search_of("topk, pool"), model, start, [field.clone() for field in cache])
    assert_equal(fb.decode(search_of("topk, pool"), model, start, cache, capture=True), want)


def test_on_a_cpu_nothing_is_captured():
    model, start = Static(2), torch.tensor([5, 9])
    cache = {key: field.clone() for key, field in model.cache.items()}
    want = fb.decode(search_of("topk, pool"), model, start, model.cache)
    calls = model.calls
    assert_equal(fb.decode(search_of("topk, pool"), model, start, cache, capture=True), want)
    assert model.calls == 2 * calls > 6


@pytest.mark.parametrize(
    ("way", "message"),
    [
        ("grows", r"cache\['sums'\]: expected it to stay \[8, 16\], for capture=True, got \[8, 24\]"),
        ("entry", r"cache: expected it to keep \[.*\], for capture=True, got \[.*'more'.*\]"),
        ("number", r"cache\['step'\]: expected it to stay 1, for capture=True, got 2"),
    ],
)
def test_a_cache_that_does_not_stay_is_told(way, message):
    model = Static(2, way)
    with pytest.raises(ValueError, match=f"^{message}$"):
        fb.decode(search_of("topk, pool"), model, torch.tensor([5, 9]), model.cache, capture=True)


class Counts:
    """A constraint and a term of one's own whose states do not stay: a number, or what has been seen so far."""

    monotone, reads_attention = True, False

    def __init__(self, grows):
        self.grows = grows

    def init(self, rows, *others):
        rows *= others[0] if len(others) > 1 else 1
        return torch.zeros(rows, 1, 1) if self.grows else (torch.zeros(rows, 1), 0)

    def advance(self, state, tokens):
        return torch.cat([state, state[:, :, -1:]], 2) if self.grows else (state[0], state[1] + 1)

    def bitmask(self, state): ...

    def extend(self, stats, seen):
        return torch.zeros_like(seen.token_log_probs), self.advance(stats, None)


@pytest.mark.parametrize("grows", [False, True])
@pytest.mark.parametrize("name", ["constraint", "terms"])
def test_what_does_not_stay_is_told(name, grows):
    search = fb.BeamSearch(4, 7, **{name: Counts(grows)})
    start, cache = torch.tensor([5, 9]), [Static(2).cache for _ in range(3)]
    fb.decode(search, Static(2), start, cache[0])
    got = r"\(\[8, 1, 2\], torch.float32\), got \(\[8, 1, 3\], torch.float32\)" if grows else "1, got 2"
    message = f"^{name}: expected plain values and shapes of its state to stay as they are, for capture: {got}$"
    with pytest.raises(ValueError, match=message):
        fb.decode(search, Static(2), start, cache[1], capture=True)
    fb.decode(search, Static(2), start, cache[2])


def test_what_runs_on_the_host_is_not_captured():
    class OnHost:
        on_host = True

        def init(self, batch_size, beam_size, vocab_size, device): ...

        def advance(self, state, tokens): ...

        def bitmask(self, state): ...

    search = fb.BeamSearch(2, 4, constraint=[None, fb.AllOf(fb.NoRepeatNgram(2), OnHost())])
    with pytest.raises(ValueError, match=r"^capture: expected False with a constraint on the host"):
        fb.decode(search, Static(2), torch.tensor([5, 9]), capture=True)
    assert fb.Grammar.on_host
    with pytest.raises(TypeError, match=r"^capture: expected a bool, got int"):
        fb.decode(search, Static(2), torch.tensor([5, 9]), capture=1)


def test_a_function_runs_then_is_recorded_then_replayed(recorded):
    x, calls = torch.zeros(3), []

    def twice():
        calls.append(None)
        return x.mul_(2), x + 1

    captured = fb.Captured(twice, "cpu", warmup=1)
    x.fill_(1.0)
    assert captured()[1].tolist() == [3.0] * 3
    first = captured()
    assert first[1].tolist() == [5.0] * 3
    assert captured() is first
    assert first[1].tolist() == [9.0] * 3
    assert len(calls) == 2
    with pytest.raises(ValueError, match=r"^warmup: expected an int >= 0, got -1"):
        fb.Captured(twice, "cpu", warmup=-1)
    with pytest.raises(TypeError, match=r"^function: expected a function without arguments, got int"):
        fb.Captured(3, "cpu")


@pytest.mark.parametrize(
    "name", ["topk, pool", "phrases, pool", "all of, stochastic", "budget", "statistics", "coverage"]
)
def test_one_recording_serves_the_next_batch(name, recorded):
    search = search_of(name)
    logits, rest = given_to(name, 8)
    inputs = tensors_of((logits, rest))
    state = search.init(2)
    go_on = fb.Captured(lambda: search.step(state, logits, **rest), "cpu", warmup=1)
    for batch in range(3):
        eager, start = search.init(2, request_ids=[batch, 7]), given_to(name, 2)
        search.step(eager, start[0], **start[1])
        if batch == 0:
            search.step(state, start[0], **start[1])
        state.copy_(eager)
        for _ in range(STEPS - 1):
            for place, fresh in zip(inputs, tensors_of(given_to(name, 8)), strict=True):
                place.copy_(fresh)
            assert_equal(go_on(), search.step(eager, logits, **rest))
        assert_equal(state, eager)


def test_a_state_takes_over_its_like_only():
    def after_a_step(batch_size=2, columns=V, **options):
        search = fb.BeamSearch(**{"beam_size": 4, "max_length": 7, "eos_id": 2, **options})
        state = search.init(batch_size)
        search.step(state, torch.randn(batch_size, columns))
        return state

    trie = {"constraint": fb.Trie([[3, 4, 5]])}
    fresh = fb.BeamSearch(4, 7, 2).init(2)
    others = [fresh, after_a_step(3), after_a_step(max_length=8), after_a_step(columns=V + 1), after_a_step(**trie)]
    state = after_a_step()
    before = state.clone()
    for mine, other in [*((state, other) for other in others), (fresh, state)]:
        with pytest.raises(ValueError, match=r"^other: expected a state of the same search"):
            mine.copy_(other)
    with pytest.raises(ValueError, match=r"^other: expected"):
        after_a_step(max_length=[7, 7], **trie).copy_(after_a_step(max_length=[7, 6], **trie))
    with pytest.raises(TypeError, match=r"^other: expected a flashbeam.State, got int"):
        state.copy_(3)
    assert_equal(state, before)


def on_gpu(node):
    return pytree.tree_map_only(torch.Tensor, lambda x: x.cuda(), node)


@needs_gpu
@pytest.mark.parametrize("name", CASES)
def test_a_gpu_replays_a_step(name):
    search = search_of(name)
    eager, captured = search.init(2, "cuda"), search.init(2, "cuda")
    first, (logits, rest) = on_gpu(given_to(name, 2)), on_gpu(given_to(name, 8))
    for state in (eager, captured):
        search.step(state, first[0], **first[1])
    go_on = fb.Captured(lambda: search.step(captured, logits, **rest), "cuda", warmup=1)
    for _ in range(STEPS):
        assert_equal(go_on(), search.step(eager, logits, **rest))
        for place, fresh in zip(tensors_of((logits, rest)), tensors_of(on_gpu(given_to(name, 8))), strict=True):
            place.copy_(fresh)
    assert_equal(captured, eager)


@needs_gpu
@pytest.mark.parametrize("way", ["in place", "new"])
def test_a_gpu_decodes_captured(way):
    model, start = Static(2, way), torch.tensor([5, 9], device="cuda")
    model.table, model.out, model.cache = on_gpu((model.table, model.out, model.cache))
    search, cache = fb.BeamSearch(4, 40, 2), on_gpu(Static(2).cache)
    want = fb.decode(search, model, start, cache)
    model.calls, cache = 0, on_gpu(Static(2).cache)
    assert_equal(fb.decode(search, model, start, cache, capture=True), want)
    assert model.calls == 3
