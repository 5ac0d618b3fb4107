"""Automata: what is refused, looking ahead, searches against enumeration, and how they are stored."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import flashbeam as fb
from flashbeam.constraint import walk
from flashbeam.constraint.automaton import Automaton
from flashbeam.constraint.trie import Trie
from flashbeam.kernels import listed_bitmask, place
from oracles import TableLM, enumerate_leaves

EOS, V = 2, 7
OTHERS = [token for token in range(V) if token != EOS]


def random_automaton(seed: int, states: int = 6, share: float = 0.4) -> Automaton:
    """Any graph: cycles, states that lead nowhere, states that nothing leads to."""
    rng = np.random.default_rng(seed)
    lists = [[token for token in rng.permutation(OTHERS).tolist() if rng.random() < share] for _ in range(states)]
    tokens = [token for each in lists for token in each]
    indptr = np.cumsum([0, *map(len, lists)])
    return Automaton(indptr, tokens, rng.integers(0, states, len(tokens)), rng.random(states) < 0.3, seed % states)


def targets_of(automaton: Automaton) -> list[dict[int, int]]:
    bounds = zip(automaton.indptr[:-1].tolist(), automaton.indptr[1:].tolist(), strict=True)
    return [dict(zip(automaton.tokens[a:b].tolist(), automaton.targets[a:b].tolist(), strict=True)) for a, b in bounds]


def legal(automaton: Automaton, max_length: int, min_length: int, eos: bool):
    """The oracle's mask: a token may follow if some continuation is accepted in time, found by trying all."""
    edges, accepting = targets_of(automaton), automaton._accepting.tolist()

    def accepts_within(state: int, length: int) -> bool:
        if length == max_length:
            return accepting[state]
        if eos and accepting[state] and length + 1 >= min_length:
            return True
        return any(accepts_within(target, length + 1) for target in edges[state].values())

    def mask(prefix: tuple[int, ...]) -> np.ndarray:
        state, said = automaton.start, prefix[1:]
        for token in said:
            state = edges[state][token]
        allowed = np.zeros(V, bool)
        allowed[[token for token, target in edges[state].items() if accepts_within(target, len(said) + 1)]] = True
        allowed[EOS] = eos and accepting[state] and len(said) + 1 >= min_length
        return allowed

    return mask


def found(hyps: fb.Hypotheses, request: int = 0) -> dict[tuple[int, ...], float]:
    valid = hyps.valid[request].tolist()
    rows = zip(hyps.tokens[request].tolist(), hyps.lengths[request].tolist(), valid, strict=True)
    kept = [tuple(tokens[:n]) for tokens, n, is_valid in rows if is_valid]
    assert len(set(kept)) == len(kept)
    return dict(zip(kept, hyps.log_probs[request][hyps.valid[request]].tolist(), strict=True))


def same_bits(a: fb.Hypotheses, b: fb.Hypotheses, request: slice = slice(None)) -> bool:
    names = ("tokens", "lengths", "scores", "log_probs", "token_log_probs", "valid", "finished")
    pairs = ((getattr(a, name)[request], getattr(b, name)) for name in names)
    return all(torch.equal(x, y) for x, y in pairs)


# ---------------------------------------------------------------------------------------------------------------------
# what is given


def test_edges_are_put_in_order_of_place() -> None:
    rng = np.random.default_rng(0)
    tokens = [rng.permutation(9000)[:50] for _ in range(3)]
    targets = np.arange(150) % 3
    automaton = Automaton([0, 50, 100, 150], np.concatenate(tokens), targets, [True] * 3)
    edges = targets_of(automaton)
    for state in range(3):
        wanted = dict(zip(tokens[state].tolist(), targets[50 * state :].tolist(), strict=False))
        assert edges[state] == wanted
        places = place(torch.from_numpy(automaton.tokens[50 * state : 50 * state + 50]))
        assert (places.diff() > 0).all()


def as_int32(values: list) -> np.ndarray:
    return np.array(values, np.bool_ if values[-1] is True else np.int32)


@pytest.mark.parametrize("convert", [list, np.array, torch.tensor, as_int32])
def test_lists_arrays_and_tensors_are_copied(convert) -> None:
    given = [convert(x) for x in ([0, 2, 2], [3, 1], [1, 0], [False, True])]
    automaton = Automaton(*given)
    for x in given:
        x[0] = 1
    assert automaton.indptr.tolist() == [0, 2, 2] and targets_of(automaton) == [{1: 0, 3: 1}, {}]
    assert automaton._accepting.tolist() == [False, True]


GOOD = {"indptr": [0, 2, 3], "tokens": [1, 3, 1], "targets": [0, 1, 1], "accepting": [False, True]}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"indptr": []}, ValueError, r"indptr: expected at least one state, S \+ 1 entries, got 0"),
        ({"indptr": [0]}, ValueError, r"indptr: expected at least one state, S \+ 1 entries, got 1"),
        ({"indptr": [1, 2, 3]}, ValueError, "indptr: expected entries that ascend from 0 to the number of tokens, 3"),
        ({"indptr": [0, 4, 3]}, ValueError, "indptr: expected entries that ascend"),
        ({"indptr": [0, 2, 2]}, ValueError, "indptr: expected entries that ascend"),
        ({"indptr": [[0, 2, 3]]}, ValueError, r"indptr: expected one dimension, got shape \[1, 3\]"),
        ({"indptr": [0, 2.0, 3]}, TypeError, "indptr: expected ints, got float64"),
        ({"tokens": [1, 1, 1]}, ValueError, "tokens: expected distinct ones in state 0, got 1 twice"),
        ({"tokens": [1, -1, 1]}, ValueError, "tokens: expected ints from 0 to .*, got -1 to 1"),
        ({"tokens": [1, 2**31 - 1, 1]}, ValueError, "tokens: expected ints from 0 to .*"),
        ({"tokens": [[1], [3, 1]]}, ValueError, "tokens: expected .*, got entries of different shapes"),
        ({"tokens": torch.zeros(3, dtype=torch.int64, device="meta")}, ValueError, "tokens: expected .* CPU tensor"),
        ({"targets": [0, 1]}, ValueError, "targets: expected one per token, 3, got 2"),
        ({"targets": [0, 1, 2]}, ValueError, "targets: expected states below 2, got 2"),
        ({"targets": None}, TypeError, "targets: expected ints, got object"),
        ({"accepting": [True]}, ValueError, "accepting: expected one per state, 2, got 1"),
        ({"accepting": [1, 0]}, TypeError, "accepting: expected bools, got int64"),
        ({"start": 2}, ValueError, "start: expected a state below 2, got 2"),
        ({"start": -1}, ValueError, "start: expected an int >= 0, got -1"),
        ({"start": True}, TypeError, "start: expected an int >= 0, got bool"),
    ],
)
def test_rejects(changes: dict, error: type[Exception], message: str) -> None:
    Automaton(**GOOD)
    with pytest.raises(error, match=message):
        Automaton(**(GOOD | changes))


@pytest.mark.parametrize(("token", "message"), [(EOS, "other than those of EOS, got 2"), (V, f"of {V}, got {V}")])
def test_tokens_are_checked_at_the_first_step(token: int, message: str) -> None:
    beams = fb.BeamSearch(2, 3, EOS, constraint=Automaton([0, 1], [token], [0], [True]))
    state = beams.init(1)
    with pytest.raises(ValueError, match=f"tokens: expected ids .*{message}"):
        beams.step(state, torch.zeros(1, V))


# ---------------------------------------------------------------------------------------------------------------------
# looking ahead


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("words", [1, 3])
def test_reach_is_found_by_walking(seed: int, words: int) -> None:
    automaton = random_automaton(seed, states=9, share=0.25)
    edges = targets_of(automaton)
    table = automaton.reach(words)
    assert table.shape == (9, words) and table.dtype == np.int32
    for state in range(9):
        front = {state}
        for n in range(32 * words):
            bit = table.view(np.uint32)[state, n // 32] >> (n % 32) & 1
            assert bit == any(automaton._accepting[each] for each in front), (state, n)
            front = {target for each in front for target in edges[each].values()}


def test_reach_of_a_long_cycle() -> None:
    n = 37
    automaton = Automaton(range(n + 1), [1] * n, [*range(1, n), 0], [True] + [False] * (n - 1))
    bits = np.unpackbits(automaton.reach(4)[0].view(np.uint8), bitorder="little")
    assert np.flatnonzero(bits).tolist() == [0, 37, 74, 111]


# ---------------------------------------------------------------------------------------------------------------------
# searches


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("finished", ["pool", "in_place"])
@pytest.mark.parametrize(
    ("eos", "min_length", "normalize"),
    [(True, 0, "vocab"), (True, 3, "allowed"), (True, 4, "vocab"), (False, 0, "vocab"), (False, 2, "allowed")],
)
def test_wide_search_is_enumeration(seed: int, finished: str, eos: bool, min_length: int, normalize: str) -> None:
    automaton, model = random_automaton(seed), TableLM(V, seed)
    common = {"max_length": 4, "min_length": min_length, "normalize": normalize}
    wanted = enumerate_leaves(
        model.logits, 5, eos=[EOS] if eos else [], mask=legal(automaton, 4, min_length, eos), **common
    )
    beams = fb.BeamSearch(
        max(len(wanted), 1) + 3,
        eos_id=EOS if eos else None,
        length_penalty=0,
        stopping=fb.Exhausted(),
        finished=finished,
        constraint=automaton,
        **common,
    )
    state = beams.init(1)
    logits, cache = model(torch.tensor([5]), None)
    while not state.all_done():
        step = beams.step(state, logits)
        logits, cache = model(step.tokens.flatten(), fb.reorder(cache, step.source_rows))
    got = found(beams.finalize(state))
    assert got.keys() == {leaf.tokens for leaf in wanted}
    for leaf in wanted:
        assert abs(got[leaf.tokens] - leaf.log_prob) < 1e-5 * max(1, abs(leaf.log_prob))
    assert (int(state.flags[0]) == fb.FLAG_DEAD_END) == (not wanted)


@pytest.mark.parametrize("normalize", ["vocab", "allowed"])
def test_both_ways_give_the_same_bits(normalize: str, monkeypatch: pytest.MonkeyPatch) -> None:
    constraint = [random_automaton(seed, states=30, share=0.5) for seed in (1, 2, 3)]
    beams = fb.BeamSearch(4, [6, 4, 5], EOS, min_length=[0, 3, 2], normalize=normalize, constraint=constraint)
    results = []
    for share in (0, 10**9, 2):
        monkeypatch.setattr(walk, "LIST_SHARE", share)
        results.append(fb.decode(beams, TableLM(V, coarse=1.0), torch.tensor([5, 6, 7])))
    assert same_bits(results[0], results[1]) and same_bits(results[0], results[2])
    assert results[0].valid.any(1).all()


@pytest.mark.parametrize("share", [0, 4, 10**9])
def test_each_request_is_as_if_alone(share: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(walk, "LIST_SHARE", share)
    shared = random_automaton(1)
    constraints = [shared, Trie([[3] * 40, [4], [5, 1]]), None, random_automaton(3), shared, fb.AllOf(shared, shared)]
    model, tokens = TableLM(V), torch.arange(6)
    together = fb.decode(fb.BeamSearch(3, 5, EOS, constraint=constraints), model, tokens)
    for request, constraint in enumerate(constraints):
        alone = fb.decode(fb.BeamSearch(3, 5, EOS, constraint=constraint), model, tokens[request : request + 1])
        assert same_bits(together, alone, slice(request, request + 1)), request


def test_several_eos_ids() -> None:
    automaton = Automaton([0, 1, 1], [3], [1], [False, True])
    hyps = fb.decode(
        fb.BeamSearch(6, 4, [EOS, 4], stopping=fb.Exhausted(), constraint=automaton), TableLM(V), torch.tensor([5])
    )
    assert found(hyps).keys() == {(3, EOS), (3, 4)}


def test_max_length_of_several_words() -> None:
    automaton = Automaton([0, 1, 2], [1, 3], [1, 0], [True, False])  # (1 3)*
    beams = fb.BeamSearch(2, 71, EOS, min_length=70, stopping=fb.Exhausted(), constraint=automaton)
    assert found(fb.decode(beams, TableLM(V), torch.tensor([5]))).keys() == {(*(1, 3) * 35, EOS)}


def test_start_that_is_met_again_counts_among_later_states() -> None:
    wide = list(OTHERS)
    back = Automaton([0, 6, 7], [*wide, 1], [1] * 6 + [0], [True, True])
    away = Automaton([0, 6, 7], [*wide, 1], [1] * 6 + [1], [True, True])
    assert back.widest == (6, 6) and away.widest == (6, 1)


# ---------------------------------------------------------------------------------------------------------------------
# files


@pytest.mark.parametrize("mmap", [True, False])
def test_saved_and_loaded_is_the_same(mmap: bool, tmp_path: Path) -> None:
    automaton = random_automaton(4)
    automaton.save(tmp_path / "automaton")
    loaded = Automaton.load(str(tmp_path / "automaton"), mmap=mmap)
    assert isinstance(loaded.tokens, np.memmap) == mmap and loaded.start == automaton.start
    assert targets_of(loaded) == targets_of(automaton)
    results = [
        fb.decode(fb.BeamSearch(4, 5, EOS, constraint=each), TableLM(V), torch.tensor([5]))
        for each in (automaton, loaded)
    ]
    assert same_bits(*results)


def test_a_trie_is_not_loaded_as_an_automaton_nor_the_other_way(tmp_path: Path) -> None:
    Trie([[1]]).save(tmp_path / "trie")
    random_automaton(0).save(tmp_path / "automaton")
    with pytest.raises(ValueError, match=r"path: expected a folder written by fb\.Automaton\.save.*flashbeam\.Trie"):
        Automaton.load(tmp_path / "trie")
    with pytest.raises(ValueError, match=r"path: expected a folder written by fb\.Trie\.save.*flashbeam\.Automaton"):
        Trie.load(tmp_path / "automaton")


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("targets", np.array([0, 9, 0, 0, 0, 0], np.int32)),
        ("targets", np.array([0, -1, 0, 0, 0, 0], np.int32)),
        ("targets", np.array([0], np.int32)),
        ("accepting", np.array([1, 0], np.int8)),
        ("accepting", np.array([True])),
        ("tokens", np.zeros(6, np.int32)),
    ],
)
def test_contents_are_checked(name: str, array: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    automaton = Automaton([0, 3, 6], [0, 1, 3, 0, 1, 3], [1] * 6, [False, True])
    arrays = automaton._arrays() | {name: array}
    monkeypatch.setattr(automaton, "_arrays", lambda: arrays)
    automaton.save(tmp_path / "automaton")  # checksums hold
    with pytest.raises(ValueError, match=r"path: expected a folder written by fb.Automaton.save, got .*Error: ."):
        Automaton.load(tmp_path / "automaton")
    shutil.rmtree(tmp_path / "automaton")


def test_wide_states_that_rows_share_are_taken_once():
    # more edges than are expanded row by row, by state and by window
    vocab = 9000
    loop = Automaton(
        [0, vocab - 1, 2 * vocab - 2], [*range(1, vocab)] * 2, [0] * (vocab - 1) + [1] * (vocab - 1), [True, False]
    )
    edges = loop.edges(torch.device("cpu"), 1)
    states = torch.tensor([0, 1, 0, -1, 1, 0, 0, 0, 1, 0], dtype=torch.int32)
    window = torch.tensor([[1], [1], [2], [1], [2], [0], [1], [1], [3], [2]], dtype=torch.int32)
    for given in (None, window):
        together = listed_bitmask(edges, states, given, vocab)
        for row in range(10):
            alone = listed_bitmask(edges, states[row : row + 1], None if given is None else given[row : row + 1], vocab)
            assert torch.equal(together[row], alone[0])
    assert loop.all_lead(0, 20, True) is False


def test_where_every_length_can_be_accepted_no_window_is_asked_for():
    loop = Automaton([0, 2], [3, 4], [0, 0], [True])
    assert loop.all_lead(0, 100, True) and not Automaton([0, 1, 1], [3], [1], [False, True]).all_lead(0, 100, True)
