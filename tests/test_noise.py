"""Noise against the same words shuffled, deleted and blanked one row at a time in Python, and against its laws."""

from __future__ import annotations

import itertools
import math
import sys

import pytest
import torch
from torch import Tensor

from flashbeam.kernels import Stream, child_nodes, random_bits, root_nodes
from flashbeam.noise import Noised, noise

PAD, EOS, BLANK, VOCAB = 0, 1, 2, 40
OFF = {"delete": 0.0, "blank": 0.0, "shuffle": 0}


def continuing(seed: int = 0) -> Tensor:
    return torch.rand(VOCAB, generator=torch.Generator().manual_seed(seed)) < 0.4


def batch(rows: int, width: int, seed: int = 0, eos: bool = True) -> tuple[Tensor, list[list[int]]]:
    """Rows of 0 to ``width`` tokens, some with EOS at the end, some with EOS inside, as a tensor and as lists."""
    generator = torch.Generator().manual_seed(seed)
    tokens, lists = torch.full((rows, width), PAD), []
    for row in tokens:
        length = int(torch.randint(width + 1, (), generator=generator))
        row[:length] = torch.randint(1 if eos else 3, VOCAB, (length,), generator=generator)
        if eos and length and torch.rand((), generator=generator) < 0.7:
            row[length - 1] = EOS
        lists.append(row[:length].tolist())
    return tokens, lists


def numbers(seed: int, request: int, sequence: int, word: int) -> list[int]:
    """The four random words of one word of one sequence: shift, deletion, blanking, survival."""
    node = child_nodes(root_nodes(torch.tensor([request])), torch.tensor([sequence]))
    return random_bits(torch.tensor([seed]), node, 4, Stream.NOISE, torch.tensor([word]))[0].tolist()


def naive(
    tokens: list[int], draws: list[list[int]], delete: float, blank: float, shuffle: int, continues: list[bool] | None
) -> list[int]:
    """One row, word by word."""
    end = tokens[-1:] if tokens[-1:] == [EOS] else []
    body = tokens[: len(tokens) - len(end)]
    words: list[list[int]] = []
    for i, token in enumerate(body):
        if i and continues is not None and token < len(continues) and continues[token]:
            words[-1].append(token)
        else:
            words.append([token])
    order = sorted(range(len(words)), key=lambda w: (w * 2**32 + draws[w][0] * (shuffle + 1), w))
    kept = [w for w in order if draws[w][1] / 2**32 >= delete]
    if words and not kept:
        kept = [max(order, key=lambda w: (draws[w][3], -w))]
    out = [[BLANK] if draws[w][2] / 2**32 < blank else words[w] for w in kept]
    return [*itertools.chain(*out), *end]


def as_lists(result: Noised) -> list[list[int]]:
    rows = zip(result.tokens.flatten(0, -2), result.lengths.flatten(), strict=True)
    lists = []
    for row, length in rows:
        assert (row[length:] == PAD).all()
        lists.append(row[:length].tolist())
    return lists


SETTINGS = [
    {"delete": 0.1, "blank": 0.1, "shuffle": 3},
    {"delete": 0.5, "blank": 0.5, "shuffle": 1},
    {"delete": 0.9, "blank": 0.0, "shuffle": 0},
    {"delete": 1.0, "blank": 0.3, "shuffle": 100},
    {"delete": 0.0, "blank": 1.0, "shuffle": 2},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("pieces", [False, True], ids=["tokens", "words"])
def test_equals_one_row_at_a_time(settings: dict, pieces: bool) -> None:
    tokens, lists = batch(24, 9)
    before, ids = tokens.clone(), torch.arange(24) * 7 - 50
    table = continuing() if pieces else None
    result = noise(tokens, 5, **settings, blank_id=BLANK, eos_id=[EOS], continues=table, request_ids=ids, pad_id=PAD)
    assert torch.equal(tokens, before)
    assert result.tokens.shape == tokens.shape and result.tokens.dtype == result.lengths.dtype == torch.int64
    for row, request, got in zip(lists, ids.tolist(), as_lists(result), strict=True):
        draws = [numbers(5, request, 0, word) for word in range(len(row))]
        assert got == naive(row, draws, **settings, continues=None if table is None else table.tolist())


def test_sequences_of_a_request_draw_their_own_numbers() -> None:
    tokens = torch.arange(3, 13).expand(2, 3, 10).contiguous()
    result = noise(tokens, 1, blank_id=BLANK)
    assert result.lengths.shape == (2, 3)
    for i, got in enumerate(as_lists(result)):
        draws = [numbers(1, i // 3, i % 3, word) for word in range(10)]
        assert got == naive(list(range(3, 13)), draws, 0.1, 0.1, 3, None)
    assert len({tuple(got) for got in as_lists(result)}) == 6
    alone = noise(tokens[:, 0], 1, blank_id=BLANK)
    assert torch.equal(alone.tokens, result.tokens[:, 0]) and torch.equal(alone.lengths, result.lengths[:, 0])


@pytest.mark.parametrize("shuffle", [0, 1, 3, 7])
def test_no_word_moves_farther_than_shuffle(shuffle: int) -> None:
    farthest = torch.zeros((), dtype=torch.int64)
    rows = torch.arange(20).expand(500, 20) + 3
    for seed in range(4):
        order = noise(rows, seed, delete=0, blank=0, shuffle=shuffle).tokens - 3
        assert torch.equal(order.sort(-1).values, rows - 3)
        farthest = torch.maximum(farthest, (order - torch.arange(20)).abs().max())
    assert farthest == shuffle  # the bound is reached


def test_shuffle_has_the_law_of_sorted_uniforms() -> None:
    """Two words, U in [0, 2): they swap with probability P(1 + U1 < U0) = 1/8."""
    n = 20000
    swapped = noise(torch.tensor([[3, 4]]).expand(n, 2), 3, delete=0, blank=0, shuffle=1).tokens[:, 0] == 4
    assert_rate(swapped.sum(), n, 1 / 8)


def assert_rate(count: Tensor, n: int, probability: float) -> None:
    """A two-sided test of a binomial count at p = 1e-6 (4.9 standard deviations)."""
    assert abs(int(count) - n * probability) < 4.9 * math.sqrt(n * probability * (1 - probability))


def test_rates_are_binomial() -> None:
    tokens = torch.arange(3, 33).expand(2000, 30)
    n = tokens.numel()
    for probability in (0.1, 0.35):
        deleted = noise(tokens, 1, delete=probability, blank=0, shuffle=0)
        assert_rate(n - deleted.lengths.sum(), n, probability)
        # each word of its own: neighbours in a row and in the batch
        present = (deleted.tokens[:, :, None] == tokens[0]).any(1)
        assert_rate((~present[:, 1:] & ~present[:, :-1]).sum(), 2000 * 29, probability**2)
        assert_rate((~present[1:, 3] & ~present[:-1, 3]).sum(), 1999, probability**2)
        blanked = noise(tokens, 1, delete=0, blank=probability, shuffle=0, blank_id=BLANK).tokens == BLANK
        assert_rate(blanked.sum(), n, probability)
        # deletion and blanking do not share numbers
        assert_rate((blanked & ~present).sum(), n, probability**2)


@pytest.mark.parametrize("number", [0, 2**32 - 1])
def test_never_and_always_hold_for_every_number(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["flashbeam.noise"]  # the package may export the function under this name
    monkeypatch.setattr(module, "random_bits", lambda seed, nodes, count, *_: nodes.new_full((*nodes.shape, 4), number))
    tokens = torch.tensor([[3, 4, 5]])
    assert as_lists(noise(tokens, 0, delete=0, blank=0)) == [[3, 4, 5]]
    assert as_lists(noise(tokens, 0, delete=0, blank=1, blank_id=BLANK)) == [[BLANK] * 3]
    assert as_lists(noise(tokens, 0, delete=1, blank=0)) == [[3]]


def test_the_word_kept_is_any() -> None:
    n = 6000
    kept = noise(torch.tensor([[3, 4, 5, EOS]]).expand(n, 4), 9, delete=1, blank=0, eos_id=EOS)
    assert (kept.lengths == 2).all() and (kept.tokens[:, 1] == EOS).all() and (kept.tokens[:, 2:] == PAD).all()
    for token in (3, 4, 5):
        assert_rate((kept.tokens[:, 0] == token).sum(), n, 1 / 3)


def test_pieces_stay_together() -> None:
    table = torch.zeros(VOCAB, dtype=torch.bool)
    table[20:] = True
    row = [3, 21, 22, 4, 5, 23, 6, 24, 25, 26, EOS]
    moved = set()
    for seed in range(100):
        (got,) = as_lists(noise(torch.tensor([row]), seed, delete=0, blank=0, shuffle=3, continues=table, eos_id=EOS))
        at = {token: place for place, token in enumerate(got)}
        assert sorted(got) == sorted(row) and got[-1] == EOS
        for word in ([3, 21, 22], [5, 23], [6, 24, 25, 26]):
            assert got[at[word[0]] : at[word[0]] + len(word)] == word
        moved.add(tuple(got))
    assert len(moved) > 10
    blanked = as_lists(noise(torch.tensor([row]), 0, **OFF | {"blank": 1}, blank_id=BLANK, continues=table, eos_id=EOS))
    assert blanked == [[BLANK] * 4 + [EOS]]  # one per word
    # the first token starts a word whatever the table says, and so does an id outside the table
    outside = torch.tensor([[25, 21, 99, -3, 21]])
    assert as_lists(noise(outside, 0, **OFF | {"blank": 1}, blank_id=BLANK, continues=table)) == [[BLANK] * 3]


def test_eos_stays_at_the_end_only() -> None:
    tokens = torch.tensor([[3, EOS, 4, 9], [5, 6, EOS, PAD], [EOS, PAD, PAD, PAD], [PAD] * 4])
    every = {"delete": 1, "blank": 1, "blank_id": BLANK, "shuffle": 3}
    result = noise(tokens, 2, **every, eos_id=[EOS, 9])
    assert as_lists(result) == [[BLANK, 9], [BLANK, EOS], [EOS], []]
    result = noise(tokens, 2, **every)
    assert as_lists(result) == [[BLANK], [BLANK], [BLANK], []]


@pytest.mark.parametrize("pieces", [False, True], ids=["tokens", "words"])
def test_noise_switched_off_changes_nothing(pieces: bool) -> None:
    tokens, lists = batch(30, 8)
    result = noise(tokens, 4, **OFF, eos_id=EOS, continues=continuing() if pieces else None)
    assert torch.equal(result.tokens, tokens)
    assert result.lengths.tolist() == [len(row) for row in lists]


def test_alone_in_a_batch_and_padded() -> None:
    tokens, _ = batch(12, 10)
    settings = {"delete": 0.3, "blank": 0.3, "blank_id": BLANK, "eos_id": EOS, "continues": continuing()}
    together = noise(tokens, 8, **settings)
    order = torch.randperm(12)
    assert torch.equal(noise(tokens[order], 8, **settings, request_ids=order).tokens, together.tokens[order])
    wide = noise(torch.nn.functional.pad(tokens, (0, 13), value=PAD), 8, **settings)
    assert torch.equal(wide.tokens[:, :10], together.tokens) and torch.equal(wide.lengths, together.lengths)
    for i in range(12):
        alone = noise(tokens[i : i + 1], torch.tensor([8]), **settings, request_ids=[i])
        assert torch.equal(alone.tokens[0], together.tokens[i])
    assert not torch.equal(noise(tokens, 9, **settings).tokens, together.tokens)


def test_lengths_given() -> None:
    tokens = torch.tensor([[PAD, 3, PAD, 7], [3, 4, 5, 6], [3, 4, 5, 6], [3, 4, 5, 6]])
    lengths = torch.tensor([3, 0, 99, -1])
    result = noise(tokens, 0, **OFF, lengths=lengths)
    assert result.tokens.tolist() == [[PAD, 3, PAD, PAD], [PAD] * 4, [3, 4, 5, 6], [PAD] * 4]
    assert result.lengths.tolist() == [3, 0, 4, 0]
    # the end of what was cut off is an EOS of its own
    assert noise(tokens, 0, delete=1, blank=0, eos_id=6, lengths=lengths).lengths.tolist() == [1, 0, 2, 0]
    tied = torch.tensor([[3, 4, PAD, PAD]])  # EOS is the padding
    assert noise(tied, 0, **OFF, eos_id=PAD, lengths=torch.tensor([3])).lengths.tolist() == [3]
    assert noise(tied, 0, **OFF, eos_id=PAD).lengths.tolist() == [2]


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (2, 0, 5), (2, 3, 0)], ids=str)
def test_empty(shape: tuple[int, ...]) -> None:
    result = noise(torch.zeros(shape, dtype=torch.int64), 0, blank_id=BLANK)
    assert result.tokens.shape == shape and result.lengths.tolist() == torch.zeros(shape[:-1]).tolist()


ROW = torch.ones(2, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("name", "error", "given"),
    [
        ("tokens", TypeError, {"tokens": [[1]]}),
        ("tokens", TypeError, {"tokens": ROW.int()}),
        ("tokens", ValueError, {"tokens": ROW[0]}),
        ("seed", TypeError, {"seed": 1.5}),
        ("seed", ValueError, {"seed": 1 << 63}),
        ("seed", TypeError, {"seed": torch.zeros(1)}),
        ("seed", ValueError, {"seed": torch.zeros(2, dtype=torch.int64)}),
        ("seed", ValueError, {"seed": torch.zeros(1, dtype=torch.int64, device="meta")}),
        ("delete", ValueError, {"delete": -0.1}),
        ("delete", ValueError, {"delete": 1.1}),
        ("delete", TypeError, {"delete": "often"}),
        ("blank", ValueError, {"blank": float("nan")}),
        ("shuffle", TypeError, {"shuffle": 2.5}),
        ("shuffle", ValueError, {"shuffle": -1}),
        ("shuffle", ValueError, {"shuffle": 1 << 30}),
        ("blank_id", ValueError, {"blank_id": None}),
        ("blank_id", ValueError, {"blank_id": -1}),
        ("pad_id", ValueError, {"pad_id": -1}),
        ("eos_id", ValueError, {"eos_id": [1, 1]}),
        ("continues", TypeError, {"continues": ROW[0]}),
        ("continues", ValueError, {"continues": ROW.bool()}),
        ("continues", ValueError, {"continues": torch.zeros(0, dtype=torch.bool)}),
        ("lengths", TypeError, {"lengths": torch.ones(2)}),
        ("lengths", ValueError, {"lengths": ROW[0]}),
        ("request_ids", TypeError, {"request_ids": torch.ones(2)}),
        ("request_ids", ValueError, {"request_ids": [1]}),
    ],
    ids=lambda value: str(value)[:40],
)
def test_errors_name_the_argument(name: str, error: type[Exception], given: dict) -> None:
    arguments = {"tokens": ROW, "seed": 0, "blank_id": BLANK} | given
    with pytest.raises(error, match=rf"^{name}: expected .*, got "):
        noise(arguments.pop("tokens"), arguments.pop("seed"), **arguments)


def test_nothing_waits_for_the_host() -> None:
    """A meta tensor has no values to wait for."""
    tokens = torch.ones(2, 3, 4, dtype=torch.int64, device="meta")
    result = noise(tokens, 0, blank_id=BLANK, eos_id=[1, 2], continues=torch.ones(9, dtype=torch.bool, device="meta"))
    assert result.tokens.shape == (2, 3, 4) and result.lengths.shape == (2, 3)
