"""Nests of tensors follow their beams: what is rebuilt, what is reused, what is refused before anything is written."""

from __future__ import annotations

import dataclasses
import enum
from collections import OrderedDict, defaultdict
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch

from flashbeam.cache import reorder

ROWS = torch.tensor([2, 0, 0, 3])


class Pair(NamedTuple):
    key: Any
    value: Any


class Mode(enum.Enum):
    DENSE = 1


@dataclasses.dataclass
class Layer:
    key: Any
    more: Any = None
    length: int = 3


@dataclasses.dataclass(frozen=True)
class Frozen:
    key: Any
    derived: Any = dataclasses.field(init=False)

    def __post_init__(self):
        object.__setattr__(self, "derived", None)


class Names(list):
    pass


def rows_of(*shape):
    return torch.randn(4, *shape)


def test_single_tensor():
    x = rows_of(3)
    assert torch.equal(reorder(x, ROWS), x[ROWS])


def test_containers_keep_their_types_and_order():
    x, y, z = rows_of(2), rows_of(3, 2).bfloat16(), rows_of().bool()
    counts = defaultdict(list, {"n": [x]})
    cache = {
        "b": (x, [y, Pair(z, Layer(x, {"deep": y}))]),
        "a": OrderedDict([("z", y), ("a", z)]),
        "names": Names([x]),
        "counts": counts,
        7: (),
    }
    got = reorder(cache, ROWS)
    assert list(got) == list(cache) and type(got["b"]) is tuple and got[7] == ()
    assert torch.equal(got["b"][0], x[ROWS]) and torch.equal(got["b"][1][0], y[ROWS])
    pair = got["b"][1][1]
    assert type(pair) is Pair and torch.equal(pair.key, z[ROWS])
    assert type(pair.value) is Layer and torch.equal(pair.value.key, x[ROWS]) and pair.value.length == 3
    assert torch.equal(pair.value.more["deep"], y[ROWS])
    assert type(got["a"]) is OrderedDict and list(got["a"]) == ["z", "a"] and torch.equal(got["a"]["a"], z[ROWS])
    assert type(got["names"]) is Names and torch.equal(got["names"][0], x[ROWS])
    assert type(got["counts"]) is defaultdict and got["counts"].default_factory is list
    assert torch.equal(got["counts"]["n"][0], x[ROWS]) and got["counts"] is not counts and counts["n"][0] is x


def test_plain_values_pass_through():
    plain = [None, 3, 2.5, True, "text", b"bytes", torch.float16, torch.device("cpu"), torch.Size([1, 2]), Mode.DENSE]
    x = rows_of(2)
    got = reorder([*plain, x], ROWS)
    assert got[:-1] == plain and torch.equal(got[-1], x[ROWS])


def test_dataclass_fields_outside_init_are_reordered_too():
    x, y = rows_of(2), rows_of(3)
    frozen = Frozen(x)
    object.__setattr__(frozen, "derived", y)
    got = reorder(frozen, ROWS)
    assert type(got) is Frozen and torch.equal(got.key, x[ROWS]) and torch.equal(got.derived, y[ROWS])
    assert frozen.key is x and frozen.derived is y


def test_input_not_modified():
    x = rows_of(2)
    cache, before = {"a": [x, None]}, x.clone()
    reorder(cache, ROWS)
    reorder(cache, ROWS, out={"a": [torch.empty(4, 2), None]})
    assert cache["a"][0] is x and torch.equal(x, before)


def test_rows_at_another_dimension():
    x, y = torch.randn(3, 4), torch.randn(2, 4, 5)
    got = reorder((x, y), ROWS, dim=1)
    assert torch.equal(got[0], x[:, ROWS]) and torch.equal(got[1], y[:, ROWS])
    assert torch.equal(reorder([x.t()], ROWS, dim=-2)[0], x.t()[ROWS])


def test_more_and_fewer_rows():
    x = rows_of(3)
    for rows in ([0, 0, 1, 1, 3, 3], [2], []):
        rows = torch.tensor(rows, dtype=torch.int32)
        assert torch.equal(reorder([x], rows)[0], x[rows])


def test_tensor_that_appears_twice_is_reordered_once():
    x = rows_of(3)
    got = reorder({"tied": x, "again": [x]}, ROWS)
    assert got["tied"] is got["again"][0]
    want, cache = x[ROWS], [x, (x,)]
    assert reorder(cache, ROWS, out=cache)[1][0] is x
    assert torch.equal(x, want)


def test_out_is_reused():
    x, y = rows_of(3), rows_of(2, 5).half()
    out = {"b": [torch.empty_like(y), 7], "a": Layer(torch.empty_like(x))}
    got = reorder({"a": Layer(x), "b": [y, 8]}, ROWS, out=out)
    assert got["a"].key is out["a"].key and got["b"][0] is out["b"][0]
    assert torch.equal(got["a"].key, x[ROWS]) and torch.equal(got["b"][0], y[ROWS])
    assert got["b"][1] == 8 and list(got) == ["a", "b"]


@pytest.mark.parametrize("group_size", [None, 2])
def test_out_may_be_the_cache(group_size):
    cache = {"k": rows_of(3), "v": [rows_of(2)]}
    tensors, rows = (cache["k"], cache["v"][0]), torch.tensor([1, 0, 2, 2])
    want = [x[rows] for x in tensors]
    got = reorder(cache, rows, out=cache, group_size=group_size)
    assert got["k"] is tensors[0] and got["v"][0] is tensors[1]
    assert all(torch.equal(x, y) for x, y in zip(tensors, want, strict=True))


def test_compiles_without_graph_break():
    def step(cache, rows, out):
        return reorder(cache, rows), reorder(cache, rows, out=out)

    x, y = rows_of(3), rows_of(2)
    cache = {"a": [x, (y, None)], "b": Pair(y, 3)}
    out = {"a": [torch.zeros(4, 3), (torch.zeros(4, 2), None)], "b": Pair(torch.zeros(4, 2), 3)}
    for got in torch.compile(step, fullgraph=True, backend="aot_eager")(cache, ROWS, out):
        assert torch.equal(got["a"][0], x[ROWS]) and torch.equal(got["a"][1][0], y[ROWS])
        assert type(got["b"]) is Pair and torch.equal(got["b"].key, y[ROWS]) and got["b"].value == 3


X, Y = torch.randn(4, 3), torch.randn(4, 2)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"source_rows": [0]}, TypeError, "source_rows: expected a tensor, got list"),
        ({"source_rows": ROWS.bool()}, TypeError, "source_rows: expected int64 or int32, got bool"),
        ({"source_rows": ROWS[:, None]}, ValueError, "source_rows: expected shape [R_out], got [4, 1]"),
        (
            {"cache": [Layer(torch.tensor(1.0))]},
            ValueError,
            "cache[0].key: expected at least 1 dimension, got 0",
        ),
        (
            {"cache": {"kv": (Pair(X, torch.zeros(4)),)}, "dim": 1},
            ValueError,
            "cache['kv'][0].value: expected at least 2 dimensions, got 1",
        ),
        ({"cache": (X, torch.zeros(0, 3))}, ValueError, "cache[1]: expected at least 1 row at dimension 0, got 0"),
        (
            {"cache": (X, SimpleNamespace(key=X))},
            TypeError,
            "cache[1]: expected a tensor, tuple, list, dict, NamedTuple, dataclass or plain value, got SimpleNamespace",
        ),
        (
            {"cache": [Layer]},
            TypeError,
            "cache[0]: expected a tensor, tuple, list, dict, NamedTuple, dataclass or plain value, got type",
        ),
        (
            {"cache": [X, X.to("meta")]},
            ValueError,
            "source_rows: expected all tensors on one device, got cache[1] on meta, source_rows on cpu",
        ),
        ({"group_size": 3}, ValueError, "group_size: expected a divisor of 4, the rows of cache['a'], got 3"),
    ],
)
def test_rejects_bad_arguments(arguments, error, message):
    with pytest.raises(error) as caught:
        reorder(**{"cache": {"a": X}, "source_rows": ROWS, **arguments})
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("last", "error", "message"),
    [
        ([X], ValueError, "out[1]: expected tuple as in cache, got list"),
        ((), ValueError, "out[1]: expected 2 entries as in cache, got 0"),
        ((None, {"y": Y}), ValueError, "out[1][0]: expected a tensor as in cache, got NoneType"),
        ((X.clone(), {"z": Y}), ValueError, "out[1][1]['y']: expected an entry as in cache, got none"),
        ((X.clone(), {"y": Pair(Y, Y)}), ValueError, "out[1][1]['y']: expected a tensor as in cache, got Pair"),
        ((X.clone(), {"y": Y.clone().half()}), TypeError, "out[1][1]['y']: expected float32, got float16"),
        (
            (X.clone(), {"y": X.clone()}),
            ValueError,
            "out[1][1]['y']: expected shape of cache[1][1]['y'] with R_out rows = [4, 2], got [4, 3]",
        ),
        (
            (X.clone(), {"y": Y.view(4, 2)}),
            ValueError,
            "out[1][1]['y']: expected memory apart from cache[1][1]['y'], got a tensor that overlaps it",
        ),
        ((Y, {"y": X}), ValueError, "out[1][0]: expected a buffer of its own, got one that belongs to another tensor"),
    ],
)
def test_rejects_another_structure_before_writing(last, error, message):
    first = torch.zeros(4, 3)
    with pytest.raises(error) as caught:
        reorder([X + 1, (X, {"y": Y})], ROWS, out=[first, last])
    assert str(caught.value) == message
    assert not first.any()


def test_one_buffer_for_two_tensors_is_refused():
    buffer = torch.zeros(4, 3)
    with pytest.raises(ValueError, match=r"^out\[1\]: expected a buffer of its own, got one that belongs to another"):
        reorder([X, X + 1], ROWS, out=[buffer, buffer])
    assert not buffer.any()


def test_a_tensor_in_the_place_of_a_plain_value_is_refused():
    with pytest.raises(ValueError, match=r"^out\[1\]: expected NoneType as in cache, got Tensor"):
        reorder([X, None], ROWS, out=[X.clone(), X.clone()])


def test_buffers_apart_from_every_tensor():
    x, other, memory = torch.arange(12.0).view(4, 3), torch.zeros(4, 3), torch.zeros(6, 3)
    message = "expected memory apart from all others of cache and out, got a tensor that overlaps it"
    for cache, out, path in [
        ((x, other), (torch.zeros(4, 3), x.view(4, 3)), "out[1]"),
        ((x, other), (x, x.view(4, 3)), "out[0]"),  # in place, and of another
        ((x, x.view(4, 3)), (x, torch.zeros(4, 3)), "out[0]"),
        ((x, x + 1), (other, other.view(4, 3)), "out[0]"),
        ((memory[:4], other), (torch.zeros(4, 3), memory[2:6]), "out[1]"),
    ]:
        with pytest.raises(ValueError) as caught:
            reorder(cache, ROWS, out=out)
        assert str(caught.value) == f"{path}: {message}"
    layers = torch.arange(24.0).view(4, 2, 3)  # layers in one tensor, rows first: their addresses are interleaved
    want = layers[ROWS].clone()
    cache = layers.unbind(1)
    reorder(cache, ROWS, out=cache)
    assert torch.equal(layers, want)
