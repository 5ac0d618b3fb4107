"""p-exact search against the enumeration of the pruned tree, in float64, and literally in float32."""

from __future__ import annotations

import gc
import math
import sys
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from flashbeam import pruned_tree
from flashbeam.cache import reorder
from flashbeam.kernels import topk_log_probs
from flashbeam.p_exact import PExact, p_exact
from oracles import TableLM, TinyAttention, log_softmax64

NOISE = 1e-5  # float32 and float64 may disagree about gaps below it
PS = [1e-9, 0.3, 0.6, 0.9, 1.0]
EOS = 1
MODULE = sys.modules["flashbeam.p_exact"]  # the package may export the function under this name
Logits = Callable[[tuple[int, ...]], np.ndarray]


class Found(NamedTuple):
    """A hypothesis, in the order of the search: the least is the best."""

    cost: float
    length: int
    tokens: tuple[int, ...]


def nucleus(log_probs: np.ndarray, p: float) -> tuple[list[int], float]:
    """The tokens kept, best first, and how close a rounding error was to another nucleus."""
    order = [int(i) for i in np.lexsort((np.arange(len(log_probs)), -log_probs)) if log_probs[i] > -np.inf]
    if p == 1:
        return order, math.inf
    mass, kept, margin = 0.0, [], math.inf
    for token in order:
        if mass >= p:
            break
        kept.append(token)
        mass += math.exp(log_probs[token])
        margin = min(margin, abs(mass - p))
    gaps = np.diff(-log_probs[order[: len(kept) + 1]])
    return kept, min(margin, *(gap for gap in gaps if gap > 0), math.inf)


def enumerated(logits: Logits, bos: int, p: float, length: int, eos: list[int], temperature: float = 1.0) -> tuple:
    """Every hypothesis of the pruned tree, best first, in float64, and how sure it is about each decision."""
    found, margin = [], math.inf

    def visit(prefix: tuple[int, ...], cost: float) -> None:
        nonlocal margin
        log_probs = log_softmax64(logits((bos, *prefix)) / np.float32(temperature))
        kept, sure = nucleus(log_probs, p)
        margin = min(margin, sure)
        for token in kept:
            child = (*prefix, token)
            if token in eos or len(child) == length:
                found.append(Found(cost - log_probs[token], len(child), child))
            else:
                visit(child, cost - log_probs[token])

    visit((), 0.0)
    found.sort()
    return found, margin


def literal(logits: Logits, bos: int, p: float, length: int, eos: list[int]) -> list[Found]:
    """The same in float32 with the package's own log-probabilities of a row: exact, ties included."""
    found = []

    def visit(prefix: tuple[int, ...], log_prob: np.float32) -> None:
        row = torch.from_numpy(logits((bos, *prefix)).copy())[None]
        best = topk_log_probs(row, row.shape[1])
        mass = 0.0
        for token, step in zip(best.tokens[0].tolist(), best.log_probs[0].numpy(), strict=True):
            if step == -np.inf or (mass >= p and p < 1):
                break
            mass += np.exp(np.float64(step))
            child = (*prefix, token)
            if token in eos or len(child) == length:
                found.append(Found(float(-(log_prob + step)), len(child), child))
            else:
                visit(child, log_prob + step)

    visit((), np.float32(0))
    return sorted(found)


def tokens_of(result: PExact, i: int) -> tuple[int, ...]:
    return tuple(result.tokens[i, : result.lengths[i]].tolist())


def consistent(result: PExact, eos: list[int], length: int, pad: int = 0) -> None:
    for i in range(len(result.lengths)):
        n = int(result.lengths[i])
        assert result.valid[i] == (n > 0) == (result.log_probs[i] > -torch.inf)
        assert (result.tokens[i, n:] == pad).all() and (result.token_log_probs[i, n:] == 0).all()
        assert result.finished[i] == (n > 0 and int(result.tokens[i, n - 1]) in eos)
        assert not set(result.tokens[i, : max(n - 1, 0)].tolist()) & set(eos)
        assert result.finished[i] or n in (0, length)
        total = np.float32(0)
        for step in result.token_log_probs[i, :n].numpy():
            total += step
        assert n == 0 or total == result.log_probs[i].numpy()


BOS = torch.tensor([10, 11, 12, 13])


@pytest.mark.parametrize("p", PS)
@pytest.mark.parametrize(
    ("vocab", "length", "scale", "temperature"),
    [(3, 5, 1.0, 1.0), (4, 4, 2.0, 0.7), (5, 4, 0.3, 1.0), (6, 3, 2.0, 3.0)],
)
def test_finds_the_best_of_the_pruned_tree(p: float, vocab: int, length: int, scale: float, temperature: float) -> None:
    checked = 0
    for seed in range(3):
        model = TableLM(vocab, seed, scale=scale)
        for batch_rows in (1, 3, 64):
            result = p_exact(
                model, BOS, p=p, max_length=length, eos_id=EOS, temperature=temperature, batch_rows=batch_rows
            )
            consistent(result, [EOS], length)
            assert result.valid.all() and result.exact.all()
            for i, bos in enumerate(BOS.tolist()):
                found, margin = enumerated(model.logits, bos, p, length, [EOS], temperature)
                if margin < NOISE:
                    continue
                assert abs(found[0].cost + float(result.log_probs[i])) < NOISE
                if len(found) == 1 or found[1].cost - found[0].cost > NOISE:
                    assert tokens_of(result, i) == found[0].tokens
                    checked += 1
    assert checked >= 30


@pytest.mark.parametrize("p", PS)
@pytest.mark.parametrize("coarse", [1.0, 60.0])
def test_ties_go_to_the_shorter_then_to_the_lower_tokens(p: float, coarse: float) -> None:
    """Logits in steps of 60 make tokens of probability 1 and equal ones: paths tie exactly, prefixes with leaves."""
    tied = lengths = 0
    for seed in range(6):
        model = TableLM(4, seed, scale=coarse * 0.7, coarse=coarse)
        results = [p_exact(model, BOS, p=p, max_length=4, eos_id=[EOS, 3], batch_rows=rows) for rows in (1, 5)]
        for i, bos in enumerate(BOS.tolist()):
            found = literal(model.logits, bos, p, 4, [EOS, 3])
            for result in results:
                assert Found(-float(result.log_probs[i]), int(result.lengths[i]), tokens_of(result, i)) == found[0]
            best = [other for other in found if other.cost == found[0].cost]
            tied += len(best) > 1
            lengths += len({other.length for other in best}) > 1
    if p > 0.5:
        assert tied > 5
        assert lengths > 0 or coarse < 60


def chain(rows: dict[tuple[int, ...], list[float]], default: list[float]) -> TableLM:
    """A table given by hand; the prefix includes the first token, 9."""
    model = TableLM(len(default))
    model.logits = lambda prefix: np.array(rows.get(prefix[1:], default), np.float32)
    return model


def test_ties_by_hand() -> None:
    sure, out = 0.0, -1000.0
    # greedy finds (2, 2, 2, EOS); (3, EOS) is as probable, was pending, and is shorter
    rows = {(): [out, out, sure, sure], (2,): [out, out, sure, out], (2, 2): [out, out, sure, out]}
    model = chain(rows, [out, sure, out, out])
    result = p_exact(model, torch.tensor([9]), p=1.0, max_length=5, eos_id=EOS)
    assert tokens_of(result, 0) == (3, EOS)
    # the lower of two of one length is found later: its first step is less probable, its second one more
    half = math.log(0.5)
    rows = {(): [out, out, half * 2, half], (3,): [half, out, half * 2, half * 2], (2,): [out, sure, out, out]}
    model = chain(rows, [out, sure, out, out])
    result = p_exact(model, torch.tensor([9]), p=1.0, max_length=2, eos_id=EOS, batch_rows=1)
    assert len([f for f in literal(model.logits, 9, 1.0, 2, [EOS]) if f.cost == -float(result.log_probs[0])]) > 1
    assert tokens_of(result, 0) == (2, EOS)


def test_the_crossing_token_is_kept_and_equals_go_lower_first() -> None:
    # four equal tokens; scores are not renormalised
    model = chain({(): [0.0, -1000.0, 0.0, 0.0, 0.0]}, [0.0, 1000.0, 0.0, 0.0, 0.0])
    for p, leads in [(0.2, [0]), (0.49, [0, 2]), (0.51, [0, 2, 3]), (0.76, [0, 2, 3, 4])]:
        assert nucleus(log_softmax64(model.logits((9,))), p)[0] == leads
        rows: list[int] = []

        def watched(tokens: Tensor, cache: Any, rows: list[int] = rows) -> tuple[Tensor, Any]:
            rows += tokens.tolist()
            row = [0.0, -1000.0, 0.0, 0.0, 0.0] if cache is None else [1.0, 0.0, 0.0, 0.0, 0.0]
            return torch.tensor([row] * len(tokens)), torch.zeros(len(tokens))

        result = p_exact(watched, torch.tensor([9]), p=p, max_length=2, eos_id=EOS)
        assert rows == [9, *leads] and int(result.nodes) == len(rows)
        assert abs(float(result.token_log_probs[0, 0]) - math.log(0.25)) < 1e-6


@pytest.mark.parametrize("seed", range(3))
def test_tiny_p_is_greedy(seed: int) -> None:
    model = TableLM(6, seed, eos=[EOS], eos_bias=1.0)
    result = p_exact(model, BOS, p=1e-12, max_length=8, eos_id=EOS)
    for i, bos in enumerate(BOS.tolist()):
        prefix: tuple[int, ...] = ()
        while len(prefix) < 8 and prefix[-1:] != (EOS,):
            prefix = (*prefix, int(model.logits((bos, *prefix)).argmax()))
        assert tokens_of(result, i) == prefix
    assert torch.equal(result.nodes, result.lengths)


def test_caches_follow_their_nodes() -> None:
    """A cache that grows with depth, whose rows would give other logits anywhere else; compaction included."""
    for seed in range(3):
        model = TinyAttention(6, seed)
        starts = torch.tensor([0, 2, 3, 4, 5])
        result = p_exact(model, starts, p=0.9, max_length=6, eos_id=EOS, batch_rows=4, temperature=1.3)
        consistent(result, [EOS], 6)
        assert result.exact.all() and len(set(result.nodes.tolist())) > 1
        for i, bos in enumerate(starts.tolist()):
            tokens = list(tokens_of(result, i))
            expected = torch.tensor(model.rescore(bos, tokens, 1.3)).float()
            assert (result.token_log_probs[i, : len(tokens)] - expected).abs().max() < NOISE


@pytest.mark.parametrize(("budget", "look"), [(10_000, 2), (7, 2), (3, 64)])
def test_a_request_does_not_depend_on_the_others(budget: int, look: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MODULE, "_FIRST_LOOK", look)
    models = [TableLM(5, 0, scale=scale, eos=[EOS], eos_bias=-3.0) for scale in (0.1, 3.0)]  # a hard and an easy one
    attention = TinyAttention(5, 4)

    def both(tokens: Tensor, cache: Any) -> tuple[Tensor, Any]:
        _, second = attention(tokens % 5, None if cache is None else cache["attention"])
        table = None if cache is None else cache["table"]
        rows = [model(tokens, table)[0] for model in models]
        prefix = models[0](tokens, table)[1]
        return torch.where(prefix["prefix"][:, :1] % 2 == 0, *rows), {"table": prefix, "attention": second}

    settings: dict[str, Any] = {"p": 0.95, "max_length": 4, "eos_id": EOS, "node_budget": budget, "batch_rows": 6}
    starts = torch.arange(20, 28)
    together = p_exact(both, starts, **settings)
    consistent(together, [EOS], 4)
    order = torch.tensor([5, 0, 7, 3, 1, 2, 6, 4])
    shuffled = p_exact(both, starts[order], **settings)
    for name, value in vars(together).items():
        assert torch.equal(vars(shuffled)[name], value[order]), name
    for i in range(len(starts)):
        alone = p_exact(both, starts[i : i + 1], **settings)
        for name, value in vars(together).items():
            assert torch.equal(vars(alone)[name][0], value[i]), name
    assert together.nodes.max() <= budget
    if budget == 10_000:
        assert together.exact.all() and together.nodes[::2].min() > 4 * together.nodes[1::2].max()


def test_calls_hold_rows_of_one_depth_up_to_the_limit() -> None:
    model, calls = TableLM(5, 1, scale=0.2, eos=[EOS], eos_bias=-3.0), []

    def watched(tokens: Tensor, cache: Any) -> tuple[Tensor, Any]:
        logits, cache = model(tokens, cache)
        calls.append(len(tokens))
        return logits, cache

    result = p_exact(watched, BOS, p=0.99, max_length=5, eos_id=EOS, batch_rows=7)
    assert calls[:2] == [4, 4]  # the first steps of all requests go together
    assert max(calls[1:]) == 7 and sum(calls) == int(result.nodes.sum())
    assert len(calls) < sum(calls) / 4  # calls are well filled


def test_budget() -> None:
    model = TableLM(5, 2, scale=0.2, eos=[EOS], eos_bias=-3.0)
    whole = p_exact(model, BOS, p=1.0, max_length=5, eos_id=EOS, batch_rows=4)
    greedy = p_exact(model, BOS, p=1e-12, max_length=5, eos_id=EOS)
    assert whole.exact.all()
    for budget in (1, 2, 5, 9, 30):
        result = p_exact(model, BOS, p=1.0, max_length=5, eos_id=EOS, batch_rows=4, node_budget=budget)
        consistent(result, [EOS], 5)
        assert (result.nodes <= budget).all() and not result.exact.any()
        if budget >= 5:  # the first dive is done
            assert (result.log_probs >= greedy.log_probs).all()
    # EOS has been seen in the first row, so there always is something
    assert p_exact(model, BOS, p=1.0, max_length=5, eos_id=EOS, node_budget=1).lengths.tolist() == [1] * 4
    assert not p_exact(model, BOS, p=1.0, max_length=5, eos_id=None, node_budget=4).valid.any()
    assert p_exact(model, BOS, p=1.0, max_length=5, eos_id=None, node_budget=5, batch_rows=9).valid.all()
    # exactly enough is enough
    for i in range(4):
        for spare in (0, -1):
            enough = int(whole.nodes[i]) + spare
            result = p_exact(model, BOS[i : i + 1], p=1.0, max_length=5, eos_id=EOS, batch_rows=4, node_budget=enough)
            assert bool(result.exact) == (spare == 0)


@pytest.mark.parametrize("p", [0.7, 0.995, 1.0])
def test_nuclei_wider_than_the_first_look(p: float) -> None:
    model = TableLM(150, 3, scale=0.4)
    bos = torch.tensor([5, 6])
    result = p_exact(model, bos, p=p, max_length=2, eos_id=list(range(140)))
    assert result.exact.all()
    for i in range(2):
        found = literal(model.logits, int(bos[i]), p, 2, list(range(140)))
        assert tokens_of(result, i) == found[0].tokens

    # all but the last of equal first tokens lead nowhere: what matters lies far behind the first look
    def late(tokens: Tensor, cache: Any) -> tuple[Tensor, Any]:
        if cache is None:
            return torch.zeros(1, 150), tokens
        return torch.where(tokens[:, None] == 149, 50.0, 0.0) * (torch.arange(150) == 7), tokens

    result = p_exact(late, torch.tensor([0]), p=p, max_length=2, eos_id=None)
    assert tokens_of(result, 0) == ((149, 7) if p > 0.99 else (0, 0))


def test_rows_without_continuations() -> None:
    nan, inf = math.nan, math.inf
    rows = {(): [nan, 1.0, 5.0, 3.0, nan], (2,): [nan] * 5, (3,): [0.0, -inf, 1.0, inf, 0.0]}
    model = chain(rows, [0.0] * 5)
    result = p_exact(model, torch.tensor([9]), p=1.0, max_length=3, eos_id=EOS)
    assert tokens_of(result, 0) == (EOS,) and result.exact.all()
    assert abs(float(result.log_probs) - float(torch.tensor([1.0, 5.0, 3.0]).log_softmax(0)[0])) < 1e-6
    result = p_exact(model, torch.tensor([9]), p=0.9, max_length=3, eos_id=EOS, pad_id=4)
    assert not result.valid.any() and result.exact.all() and result.nodes.tolist() == [3]
    consistent(result, [EOS], 3, pad=4)


def test_vocab_size_hides_padding() -> None:
    model = TableLM(8, 0)
    padded = lambda tokens, cache: (  # noqa: E731
        torch.nn.functional.pad((made := model(tokens, cache))[0], (0, 3), value=math.inf),
        made[1],
    )
    expected = p_exact(model, BOS, p=0.8, max_length=4, eos_id=EOS)
    result = p_exact(padded, BOS, p=0.8, max_length=4, eos_id=EOS, vocab_size=8)
    assert torch.equal(result.tokens, expected.tokens) and torch.equal(result.log_probs, expected.log_probs)


def test_what_lies_behind_the_first_look_may_still_win() -> None:
    """Request 0 is sure from the start. In 1, (2, *, 0) at -6.30 is found first, and (3, 149, 0) at -5.81 wins."""
    flat = np.zeros(150)

    def row(prefix: list[int]) -> np.ndarray:
        out = np.full(150, -1000.0)
        if prefix[0] == 0 or prefix[-2:] == [3, 149]:
            out[0] = 0.0
        elif len(prefix) == 1:
            out[2:4] = np.log([0.55, 0.45])
        elif len(prefix) == 3:
            out[[0, 1] if prefix[1] == 2 else slice(0, 9)] = 0.0
        else:
            out = flat
        return out

    def model(tokens: Tensor, cache: Tensor | None) -> tuple[Tensor, Tensor]:
        prefix = tokens[:, None] if cache is None else torch.cat([cache, tokens[:, None]], 1)
        return torch.tensor(np.stack([row(p) for p in prefix.tolist()]), dtype=torch.float32), prefix

    for batch_rows in (1, 64):
        result = p_exact(model, torch.tensor([0, 1]), p=1.0, max_length=3, eos_id=None, batch_rows=batch_rows)
        assert tokens_of(result, 0) == (0, 0, 0) and tokens_of(result, 1) == (3, 149, 0)


def test_p_one_keeps_what_rounding_would_cut() -> None:
    # the first token's log-probability rounds to 0, and it leads nowhere
    model = chain({(): [-1000.0, -1000.0, 0.0, -30.0], (2,): [math.nan] * 4}, [-1000.0, 0.0, -1000.0, -1000.0])
    assert tokens_of(p_exact(model, torch.tensor([9]), p=1.0, max_length=3, eos_id=EOS), 0) == (3, EOS)


def test_caches_are_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """One hard request among 31 that end at once: what is kept of it alone counts, and nothing survives the search."""
    table = TableLM(6, 5, scale=0.1, eos=[EOS], eos_bias=-6.0)
    alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
    largest: list[int] = []

    def model(tokens: Tensor, cache: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Any]:
        prefix = tokens[:, None]
        if cache is not None:
            assert cache[0] is cache[1]
            largest.append(max((x.shape[0] for x in alive if x is not cache[0]), default=0))
            prefix = torch.cat([cache[0], prefix], 1)
        alive.add(prefix)
        logits = torch.from_numpy(np.stack([table.logits(tuple(row)) for row in prefix.tolist()]))
        logits[prefix[:, 0] > 40, EOS] = 1000.0
        return logits, (prefix, prefix)

    def watched_reorder(cache: Any, rows: Tensor) -> Any:
        out = reorder(cache, rows)
        alive.add(out[0])
        return out

    monkeypatch.setattr(pruned_tree, "reorder", watched_reorder)
    settings: dict[str, Any] = {"p": 1.0, "max_length": 4, "batch_rows": 3}
    gc.disable()
    try:
        result = p_exact(model, torch.arange(40, 72), eos_id=EOS, **settings)
        assert len(alive) == 0
        assert result.nodes.tolist() == [int(result.nodes[0])] + [1] * 31 and int(result.nodes[0]) > 20
        assert max(largest) == 3 and largest[-1] == 0  # the last turn takes all that waits
        # equals of several calls side by side
        p_exact(model, torch.arange(36, 40), eos_id=None, **settings)
        assert len(alive) == 0
    finally:
        gc.enable()


def test_no_requests() -> None:
    result = p_exact(TableLM(4), torch.zeros(0, dtype=torch.int64), p=0.5, max_length=3, eos_id=EOS)
    assert result.tokens.shape == result.token_log_probs.shape == (0, 3) and result.valid.shape == (0,)


@pytest.mark.parametrize(
    ("name", "error", "given"),
    [
        ("tokens", TypeError, {"tokens": [1]}),
        ("tokens", TypeError, {"tokens": torch.tensor(1)}),
        ("p", ValueError, {"p": 0.0}),
        ("p", ValueError, {"p": 1.01}),
        ("p", ValueError, {"p": math.nan}),
        ("p", TypeError, {"p": "most"}),
        ("max_length", ValueError, {"max_length": 0}),
        ("max_length", TypeError, {"max_length": 2.0}),
        ("eos_id", ValueError, {"eos_id": -1}),
        ("pad_id", ValueError, {"pad_id": -1}),
        ("node_budget", ValueError, {"node_budget": 0}),
        ("batch_rows", ValueError, {"batch_rows": 0}),
        ("temperature", ValueError, {"temperature": 0.0}),
        ("vocab_size", ValueError, {"vocab_size": 0}),
    ],
)
def test_errors_before_any_call(name: str, error: type[Exception], given: dict) -> None:
    def never(tokens: Tensor, cache: Any) -> tuple[Tensor, Any]:
        raise AssertionError("the model was called")

    arguments = {"tokens": BOS, "p": 0.5, "max_length": 3, "eos_id": EOS} | given
    with pytest.raises(error, match=rf"^{name}: expected .*, got "):
        p_exact(never, arguments.pop("tokens"), **arguments)


@pytest.mark.parametrize(
    ("name", "error", "given"),
    [
        ("eos_id", ValueError, {"eos_id": 4}),
        ("pad_id", ValueError, {"pad_id": 3, "vocab_size": 3}),
        ("vocab_size", ValueError, {"vocab_size": 5}),
    ],
)
def test_errors_of_the_vocabulary(name: str, error: type[Exception], given: dict) -> None:
    with pytest.raises(error, match=rf"^{name}: expected .*, got "):
        p_exact(TableLM(4), BOS, **{"p": 0.5, "max_length": 3, "eos_id": EOS} | given)


@pytest.mark.parametrize(
    ("error", "first", "later"),
    [
        (TypeError, [[0.0]], None),
        (ValueError, torch.zeros(3, 4), None),
        (ValueError, torch.zeros(4, 1, 4), None),
        (ValueError, torch.zeros(4, 0), None),
        (TypeError, torch.zeros(4, 4, dtype=torch.float64), None),
        (ValueError, torch.zeros(4, 4), torch.zeros(4, 5)),
        (ValueError, torch.zeros(4, 4), torch.zeros(5, 4)),
    ],
)
def test_errors_of_the_logits(error: type[Exception], first: Any, later: Any) -> None:
    with pytest.raises(error, match=r"^logits: expected .*, got "):
        p_exact(lambda _, cache: (first if cache is None else later, 1), BOS, p=0.5, max_length=3, eos_id=None)
