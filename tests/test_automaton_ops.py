"""A step along an automaton's edges, and a state's edges as bits: definitions and kernels against plain Python."""

from __future__ import annotations

import pytest
import torch

from automata import allowed_tokens, edges_of, random_edges
from flashbeam.kernels import Edges, follow, listed_bitmask, pack_bitmask, place
from flashbeam.kernels.automaton import _follow_op as follow_op
from flashbeam.kernels.automaton import _listed_bitmask_op as listed_bitmask_op
from flashbeam.kernels.triton.automaton import launch_follow, launch_listed_bitmask

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")


def moved(edges, device):
    return Edges(*(None if field is None else field.to(device) for field in edges))


def check_follow(edges, states, tokens, device):
    want = [edges_of(edges, s).get(t, -1) for s, t in zip(states.tolist(), tokens.tolist(), strict=True)]
    want = torch.tensor(want, dtype=torch.int32)
    assert torch.equal(follow_op(*edges[:3], states, tokens), want)
    got = launch_follow(*moved(edges, device)[:3], states.to(device), tokens.to(device)).cpu()
    assert got.dtype == torch.int32 and torch.equal(got, want)


def check_bitmask(edges, states, window, vocab_size, device):
    allowed = torch.zeros(len(states), vocab_size, dtype=torch.bool)
    for row, state in enumerate(states.tolist()):
        allowed[row, allowed_tokens(edges, state, None if window is None else window[row])] = True
    want = pack_bitmask(allowed)
    assert torch.equal(listed_bitmask_op(*edges, states, window, vocab_size), want)
    here = None if window is None else window.to(device)
    got = launch_listed_bitmask(*moved(edges, device), states.to(device), here, vocab_size).cpu()
    assert got.dtype == torch.int32 and torch.equal(got, want)
    return allowed


# one vocabulary per path: one token, a ragged word, one tile, a ragged third tile; lists longer than a block of 32
@pytest.mark.parametrize(("vocab_size", "most"), [(1, 1), (40, 7), (2048, 100), (5000, 150)])
@pytest.mark.parametrize("tree", [False, True])
def test_matches_plain_python(vocab_size, most, tree, device):
    edges = random_edges(30, vocab_size, most, tree=tree)
    states = torch.randint(-1, len(edges.indptr) - 1, (200,), dtype=torch.int32)
    states[:20] = 0
    tokens = torch.randint(vocab_size, (200,))
    for row in range(0, 200, 2):  # half of the rows take an edge they have, the first and the last among them
        known = list(edges_of(edges, int(states[row])))
        if known:
            tokens[row] = known[[0, -1, row % len(known)][row // 2 % 3]]
    check_follow(edges, states, tokens, device)
    window = torch.randint(-(2**31), 2**31, (200, 2)).int() & torch.randint(2, (200, 2)).int().neg()
    listed = check_bitmask(edges, states[15:27], None, vocab_size, device)
    allowed = check_bitmask(edges, states[15:27], window[15:27], vocab_size, device)
    assert vocab_size < 2048 or 0 < allowed.sum() < listed.sum()


def test_dead_states_and_foreign_tokens_lead_nowhere(device):
    edges = random_edges(5, 100, 40)
    states = torch.tensor([-1, 0, 0, 0, 4], dtype=torch.int32)
    check_follow(edges, states, torch.tensor([int(edges.tokens[0]), -1, 100, 2**40, -(2**40)]), device)
    assert not check_bitmask(edges, torch.tensor([-1], dtype=torch.int32), None, 100, device).any()


def test_a_token_beyond_int32_is_not_taken_for_its_low_bits(device):
    edges = Edges(torch.tensor([0, 1]).int(), torch.tensor([7]).int(), torch.tensor([0]).int(), torch.ones(1, 1).int())
    check_follow(edges, torch.zeros(2).int(), torch.tensor([7, 7 + 2**32]), device)


def test_no_row_and_no_edge(device):
    edges = random_edges(3, 50, 0)
    none = torch.zeros(0, dtype=torch.int32)
    check_follow(edges, none, none.long(), device)
    check_bitmask(edges, none, None, 50, device)
    check_follow(edges, torch.tensor([0, 2, -1]).int(), torch.tensor([0, 1, 2]), device)
    check_bitmask(edges, torch.tensor([0, 2, -1]).int(), None, 50, device)


def test_bits_of_a_window_count_in_every_word(device):
    """Lengths 31 and 32 lie in different words, and bit 31 is the sign."""
    reach = torch.tensor([[0, 0], [-(2**31), 0], [0, 1], [1, 0]]).int()
    edges = Edges(torch.tensor([0, 3, 3, 3, 3]).int(), torch.tensor([0, 1, 2]).int(), None, reach)
    window = torch.tensor([[-(2**31), 0], [0, 1], [1, 1], [2**31 - 2, -2]]).int()
    allowed = check_bitmask(edges, torch.zeros(4).int(), window, 40, device)
    assert allowed[:, :3].tolist() == [[1, 0, 0], [0, 1, 0], [0, 1, 1], [0, 0, 0]]


def test_strided_and_unmodified(device):
    edges = moved(random_edges(9, 300, 40), device)
    states = torch.arange(18, dtype=torch.int32, device=device)[::2] // 2
    tokens = torch.stack([edges.tokens[edges.indptr[states].clamp(max=len(edges.tokens) - 1)].long()] * 2, 1)[:, 0]
    window = torch.full((2, 9), -1, dtype=torch.int32, device=device).t()
    before = [field.clone() for field in (*edges, states, tokens, window)]
    assert torch.equal(follow(edges, states, tokens), follow(edges, states.contiguous(), tokens.contiguous()))
    want = listed_bitmask(edges, states.contiguous(), window.contiguous(), 300)
    assert torch.equal(listed_bitmask(edges, states, window, 300), want)
    for field, kept in zip((*edges, states, tokens, window), before, strict=True):
        assert torch.equal(field, kept)


@pytest.mark.parametrize("tree", [False, True])
def test_opcheck(tree, device):
    edges = moved(random_edges(12, 100, 9, tree=tree), device)
    states = torch.arange(-1, 11, dtype=torch.int32, device=device)
    window = torch.full((12, 2), 5, dtype=torch.int32, device=device)
    torch.library.opcheck(torch.ops.flashbeam.follow, (*edges[:3], states, torch.arange(12, device=device)))
    torch.library.opcheck(torch.ops.flashbeam.listed_bitmask, (*edges, states, window if tree else None, 100))


def test_compiles_without_graph_break(device):
    edges = moved(random_edges(12, 100, 9), device)

    def step(states, tokens, window):
        following = follow(edges, states, tokens)
        return following, listed_bitmask(edges, following, window, 100)

    states = torch.arange(-1, 11, dtype=torch.int32, device=device)
    inputs = (states, torch.arange(12, device=device), torch.full((12, 2), 5, dtype=torch.int32, device=device))
    backend = "inductor" if device == "cuda" else "aot_eager"
    got = torch.compile(step, fullgraph=True, backend=backend)(*inputs)
    for field, want in zip(got, step(*inputs), strict=True):
        assert torch.equal(field, want)


@needs_gpu
def test_cuda_graph_replay_reads_new_inputs():
    edges = moved(random_edges(50, 3000, 90), "cuda")
    states = torch.arange(-1, 49, dtype=torch.int32, device="cuda")
    tokens = edges.tokens[:50].long()

    def step():
        return follow(edges, states, tokens), listed_bitmask(edges, states, None, 3000)

    step()  # compiled and loaded outside the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    states.copy_(states.flip(0))
    tokens.copy_(tokens.flip(0))
    graph.replay()
    for field, want in zip(got, step(), strict=True):
        assert torch.equal(field, want)


def ints(*shape):
    return torch.zeros(shape, dtype=torch.int32)


EDGES = Edges(ints(3), ints(4), ints(4), ints(2, 1))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: follow((), ints(1), ints(1).long()), TypeError, "edges: expected Edges, got tuple"),
        (
            lambda: follow(EDGES._replace(tokens=ints(4).long()), ints(1), ints(1).long()),
            TypeError,
            "edges.tokens: expected int32, got int64",
        ),
        (
            lambda: follow(EDGES._replace(targets=ints(3)), ints(1), ints(1).long()),
            ValueError,
            "edges.targets: expected shape [E] = [4], got [3]",
        ),
        (
            lambda: follow(EDGES._replace(reach=ints(3, 1)), ints(1), ints(1).long()),
            ValueError,
            "edges.reach: expected shape [S, L] = [2, 1], got [3, 1]",
        ),
        (
            lambda: follow(EDGES._replace(tokens=ints(4, 2)[:, 0]), ints(1), ints(1).long()),
            ValueError,
            "edges.tokens: expected a contiguous tensor, got strides (2,)",
        ),
        (lambda: follow(EDGES, ints(1).long(), ints(1).long()), TypeError, "states: expected int32, got int64"),
        (lambda: follow(EDGES, ints(2), ints(2)), TypeError, "tokens: expected int64, got int32"),
        (lambda: follow(EDGES, ints(2), ints(1).long()), ValueError, "tokens: expected shape [n] = [2], got [1]"),
        (
            lambda: follow(EDGES, ints(2).to("meta"), ints(2).long()),
            ValueError,
            "states: expected all tensors on one device, got edges.indptr on cpu, states on meta",
        ),
        (
            lambda: listed_bitmask(EDGES, ints(2), ints(2, 2), 5),
            ValueError,
            "window: expected shape [R, L] = [2, 1], got [2, 2]",
        ),
        (lambda: listed_bitmask(EDGES, ints(2), None, 0), ValueError, "vocab_size: expected an int >= 1, got 0"),
    ],
)
def test_rejects_bad_arguments(call, error, message):
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == message


def test_edges_are_in_order_of_place():
    """The helper of these tests keeps what the operations ask for."""
    edges = random_edges(20, 5000, 100)
    for state in range(20):
        places = place(torch.tensor(list(edges_of(edges, state)), dtype=torch.int64))
        assert (places[1:] > places[:-1]).all()
