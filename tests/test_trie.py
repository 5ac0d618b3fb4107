"""Tries: what they hold, that searches return items and nothing else, and how they are stored."""

import json
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

import flashbeam as fb
from flashbeam.constraint import Context, walk
from flashbeam.constraint.trie import Trie
from flashbeam.kernels import follow, place, unpack_bitmask
from oracles import TableLM, enumerate_leaves

EOS, V = 2, 12
Item = tuple[int, ...]


def random_items(count: int, seed: int = 0, vocab: int = V, longest: int = 5, empty: bool = False) -> list[list[int]]:
    """With duplicates, and with items that begin others."""
    rng = np.random.default_rng(seed)
    tokens = [token for token in range(vocab) if token != EOS]
    items = [list(rng.choice(tokens, rng.integers(1, longest + 1))) for _ in range(count)]
    items += [item[: rng.integers(1, len(item) + 1)] for item in items[::3]] + items[:2] + ([[]] if empty else [])
    return [list(map(int, item)) for item in items]


def prefixes(items: list[list[int]]) -> dict[Item, set[int]]:
    """The dict trie: what may follow each prefix; EOS where an item ends."""
    children: dict[Item, set[int]] = {(): set()}
    for item in items:
        for n, token in enumerate(item):
            children[tuple(item[:n])].add(token)
            children.setdefault(tuple(item[: n + 1]), set())
        children[tuple(item)].add(EOS)
    return children


def context(batch: int = 1, beams: int = 3, min_lengths: object = 0, max_lengths: object = 9, **other) -> Context:
    def each(value: object) -> tuple[int, ...]:
        return tuple(value) if isinstance(value, list) else (value,) * batch  # type: ignore[return-value]

    facts = {"vocab_size": V, "device": torch.device("cpu"), "eos": (EOS,)} | other
    return Context(batch, beams, min_lengths=each(min_lengths), max_lengths=each(max_lengths), **facts)


def force(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    monkeypatch.setattr(walk, "LIST_SHARE", {"lists": 0, "bitmask": 10**9}[way])


def search(constraint: object, **options) -> fb.BeamSearch:
    settings = {"beam_size": 8, "max_length": 6, "eos_id": EOS, "length_penalty": 0, "stopping": fb.Exhausted()}
    return fb.BeamSearch(**(settings | options), constraint=constraint)


def found(hyps: fb.Hypotheses, request: int = 0) -> dict[Item, float]:
    """Hypotheses and their log-probabilities; duplicates would be a defect."""
    valid = hyps.valid[request]
    rows = [tuple(t[:n]) for t, n in zip(hyps.tokens[request].tolist(), hyps.lengths[request].tolist(), strict=True)]
    kept = [row for row, is_valid in zip(rows, valid.tolist(), strict=True) if is_valid]
    assert len(set(kept)) == len(kept)
    return dict(zip(kept, hyps.log_probs[request][valid].tolist(), strict=True))


def run(beams: fb.BeamSearch, model: TableLM, start: torch.Tensor, repeat: bool) -> fb.Hypotheses:
    """``repeat``: as many rows of logits at the first step as at later ones."""
    state = beams.init(len(start))
    logits, cache = model(start.repeat_interleave(state.beam_size) if repeat else start, None)
    while not state.all_done():
        step = beams.step(state, logits)
        logits, cache = model(step.tokens.flatten(), fb.reorder(cache, step.source_rows))
    return beams.finalize(state)


def legal(items: list[list[int]], eos: bool = True):
    """A mask for the oracles; without EOS, what leads to an item of the full length."""
    children = prefixes(items)

    def mask(prefix: Item) -> np.ndarray:
        allowed = np.zeros(V, bool)
        allowed[list(children.get(tuple(prefix[1:]), ()))] = True
        allowed[EOS] &= eos
        return allowed

    return mask


def equal(a: fb.Hypotheses, b: fb.Hypotheses, request: int | None = None) -> bool:
    """Bitwise; ``request`` picks one of ``a``, and ``b`` is a search of it alone."""
    for name in ("tokens", "lengths", "scores", "log_probs", "token_log_probs", "valid", "finished"):
        x, y = getattr(a, name), getattr(b, name)
        x = x if request is None else x[request : request + 1]
        x, y = (z.view(torch.int32) if z.dtype == torch.float32 else z for z in (x, y))
        if not torch.equal(x, y):
            return False
    return True


# ---------------------------------------------------------------------------------------------------------------------
# the tree


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("way", ["lists", "bitmask"])
def test_every_prefix_allows_what_the_dict_trie_does(seed: int, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    force(monkeypatch, way)
    items = random_items(60, seed, empty=seed == 1)
    children = prefixes(items)
    paths = list(children)
    bound = Trie.bind([Trie(items)] * len(paths), context(len(paths), 1))
    state = bound.init()
    for n in range(5):  # all walk at once; who has arrived falls off and is put back
        before = state
        tokens = torch.tensor([path[n] if n < len(path) else 0 for path in paths])
        state = bound.advance(state, tokens)
        stays = torch.tensor([n >= len(path) for path in paths])
        state = type(state)(*(torch.where(stays, old, new) for old, new in zip(before, state, strict=True)))
    allowed = unpack_bitmask(bound.bitmask(state), V)
    assert [set(row.nonzero().flatten().tolist()) for row in allowed] == list(children.values())
    listed, mask = bound.listed(state)
    assert (listed is None) == (way == "bitmask") == (mask is not None)


def test_who_has_left_the_tree_may_do_nothing() -> None:
    trie = Trie([[], [1, 3]])  # the root is accepting
    bound = Trie.bind([trie], context(1, 2))
    state = bound.advance(bound.init(), torch.tensor([1, 4]))
    assert state.states.tolist() == [1, -1]
    state = bound.advance(state, torch.tensor([3, 1]))
    assert [row.nonzero().flatten().tolist() for row in unpack_bitmask(bound.bitmask(state), V)] == [[EOS], []]
    assert bound.listed(state)[0].may_end.tolist() == [True, False]


def test_nodes_are_in_breadth_first_order_with_children_by_place() -> None:
    rng = np.random.default_rng(0)
    trie = Trie(rng.integers(0, 5000, (400, 3)) * rng.integers(0, 2, (400, 3)))  # many zeros: shared beginnings
    places = place(torch.from_numpy(trie.tokens)).numpy()
    for first, last in zip(trie.indptr[:-1], trie.indptr[1:], strict=True):
        assert (np.diff(places[first:last]) > 0).all()
    parents = np.repeat(np.arange(len(trie.indptr) - 1), np.diff(trie.indptr))
    assert (np.diff(parents) >= 0).all() and (parents <= np.arange(len(parents))).all()
    assert trie.targets is None and len(trie.tokens) == len(trie.indptr) - 2


def test_every_input_form_builds_the_same_tree() -> None:
    items = random_items(40)
    padded = np.full((len(items), 7), -1)
    for row, item in zip(padded, items, strict=True):
        row[: len(item)] = item
    lengths = [len(item) for item in items]
    junk = np.where(padded < 0, 10**6, padded)
    wanted = Trie(items)
    for other in [
        Trie([tuple(item) for item in items]),
        Trie([np.array(item) for item in items]),
        Trie([torch.tensor(item) for item in items[:-1]] + [items[-1]]),
        Trie(items[::-1] + items),
        Trie(padded, pad=-1),
        Trie(torch.from_numpy(padded), pad=-1),
        Trie(padded.astype(np.int16), pad=-1),
        Trie(np.asfortranarray(padded), pad=-1),
        Trie(junk, lengths=lengths),
        Trie(junk[:, ::1], lengths=torch.tensor(lengths)),
    ]:
        assert np.array_equal(other.indptr, wanted.indptr)
        assert np.array_equal(other.tokens, wanted.tokens)
        assert np.array_equal(other.reach(1), wanted.reach(1))


def test_reach_is_the_lengths_of_what_remains() -> None:
    items = [[], [1], [1, 3], list(range(3, 12)) * 8, [3] * 31, [3] * 32, [3] * 33]
    trie = Trie(items)
    table = trie.reach(1)
    assert table.shape == (len(trie.indptr) - 1, 3) and (trie.shortest, trie.longest) == (0, 72)

    def lengths(node: int) -> list[int]:
        return np.flatnonzero(np.unpackbits(table[node].view(np.uint8), bitorder="little")).tolist()

    edges = trie.edges(torch.device("cpu"), trie.words(1))
    for prefix in [[], [1], [1, 3], [3], [3] * 2, [3] * 30, [3] * 31, [3] * 33, list(range(3, 12)) * 7]:
        node = torch.zeros(1, dtype=torch.int32)
        for token in prefix:
            node = follow(edges, node, torch.tensor([token]))
        rest = {len(item) - len(prefix) for item in items if item[: len(prefix)] == prefix}
        assert lengths(int(node)) == sorted(rest)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([],), ValueError, "sequences: expected at least one item, got none"),
        ((np.zeros((0, 3), int),), ValueError, "sequences: expected at least one item, got none"),
        ((np.zeros(3, int),), ValueError, r"sequences: expected shape \[N, n\], got \[3\]"),
        ((np.zeros((2, 3)),), TypeError, "sequences: expected token ids, got float64"),
        (([[1], [0.5]],), TypeError, "sequences: expected token ids, got float64"),
        (([[1], 3],), TypeError, "sequences: expected lists of token ids"),
        (([[1], [[3]]],), TypeError, "sequences: expected lists of token ids"),
        ((["ab"],), TypeError, "sequences: expected token ids, got <U1"),
        (("ab",), TypeError, "sequences: expected a list, an array or a tensor, got str"),
        (([[1, -1]],), ValueError, "sequences: expected ids from 0 to .*, got -1"),
        (([[2**40]],), ValueError, "sequences: expected ids from 0 to .*, got 1099511627776"),
        (([[1]], -1), ValueError, "pad: expected an array of sequences with it, got list"),
        (([[1]], None, [1]), ValueError, "lengths: expected an array of sequences with it, got list"),
        ((np.array([[1, -1, 1]]), -1), ValueError, "sequences: expected pad only after the last token"),
        ((np.array([[1, -1]]), -1, [1]), ValueError, "lengths: expected either pad or lengths, got both"),
        ((np.array([[1, -1]]), "x"), TypeError, "pad: expected an int, got str"),
        ((np.array([[1, 1]]), None, [3]), ValueError, "lengths: expected lengths from 0 to 2, got 3"),
        ((np.array([[1, 1]]), None, [1, 1]), ValueError, r"lengths: expected shape \[1\], got \[2\]"),
        ((np.array([[1, 1]]), None, [0.5]), TypeError, "lengths: expected ints, got float64"),
        ((torch.zeros(1, 1, dtype=torch.int64, device="meta"),), ValueError, "sequences: expected .* CPU tensor"),
    ],
)
def test_rejects_bad_sequences(arguments: tuple, error: type[Exception], message: str) -> None:
    names = ("sequences", "pad", "lengths")
    with pytest.raises(error, match=message):
        Trie(**dict(zip(names, arguments, strict=False)))


def test_tokens_outside_the_vocabulary_and_eos_are_refused_at_the_first_step() -> None:
    for items, message in [
        ([[1, V]], f"sequences: expected ids inside the vocabulary of {V}, got {V}"),
        ([[1, EOS]], f"sequences: expected ids other than those of EOS, got {EOS}"),
    ]:
        state = search(Trie(items)).init(1)
        with pytest.raises(ValueError, match=message):
            search(Trie(items)).step(state, torch.zeros(1, V))


# ---------------------------------------------------------------------------------------------------------------------
# searches


@pytest.mark.parametrize("finished", ["pool", "in_place"])
@pytest.mark.parametrize("normalize", ["vocab", "allowed"])
@pytest.mark.parametrize("min_length", [0, 4])
def test_wide_search_returns_every_item_and_nothing_else(finished: str, normalize: str, min_length: int) -> None:
    items = random_items(12, seed=4)
    model = TableLM(V, seed=1)
    options = {"max_length": 6, "min_length": min_length, "normalize": normalize}
    hyps = fb.decode(search(Trie(items), beam_size=30, finished=finished, **options), model, torch.tensor([5]))
    # the oracle's mask does not look ahead, so with renormalisation it is given the items that fit
    fit = [item for item in items if len(item) + 1 >= min_length]
    wanted = enumerate_leaves(model.logits, 5, eos=[EOS], mask=legal(fit), **options)
    got = found(hyps)
    assert got.keys() == {leaf.tokens for leaf in wanted} == {(*item, EOS) for item in fit}
    for leaf in wanted:
        assert abs(got[leaf.tokens] - leaf.log_prob) < 1e-5 * max(1, abs(leaf.log_prob))
    assert int(hyps.valid.sum()) == len(wanted)


@pytest.mark.parametrize("way", ["lists", "bitmask"])
def test_items_beyond_max_length_are_barred_in_advance(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    force(monkeypatch, way)
    items = [[1], [3, 4, 5], [3, 4, 6, 7], [8, 9, 8, 9, 8]]
    hyps = fb.decode(search(Trie(items), max_length=3, beam_size=4), TableLM(V), torch.tensor([5]))
    # an item of just max_length ends without EOS
    assert found(hyps).keys() == {(1, EOS), (3, 4, 5)}
    exact = fb.decode(search(Trie(items), max_length=4, eos_id=None, beam_size=4), TableLM(V), torch.tensor([5]))
    assert found(exact).keys() == {(3, 4, 6, 7)}


def test_empty_item_is_eos_at_once() -> None:
    hyps = fb.decode(search(Trie([[], [1]]), beam_size=4), TableLM(V), torch.tensor([5]))
    assert found(hyps).keys() == {(EOS,), (1, EOS)}


@pytest.mark.parametrize("way", ["lists", "bitmask"])
def test_request_that_can_reach_nothing_is_a_dead_end(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    force(monkeypatch, way)
    constraint = [Trie([[1, 3, 4, 5]]), Trie([[1, 3]])]
    beams = search(constraint, max_length=[3, 3])
    state = beams.init(2)
    beams.step(state, torch.zeros(2, V))
    assert state.done.tolist() == [True, False]
    assert state.flags.tolist() == [fb.FLAG_DEAD_END, 0]
    assert not beams.finalize(state).valid[0].any()


@pytest.mark.parametrize("finished", ["pool", "in_place"])
@pytest.mark.parametrize("normalize", ["vocab", "allowed"])
@pytest.mark.parametrize("given", ["B", "B K"])
def test_both_ways_and_the_rule_between_give_the_same_bits(
    finished: str, normalize: str, given: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = random_items(200, seed=2, longest=6)
    constraint = [Trie(items), Trie(items[:7]), Trie(items)]
    beams = search(
        constraint,
        beam_size=6,
        max_length=[6, 3, 5],
        min_length=[0, 2, 5],
        temperature=[1.0, 0.7, 2.0],
        normalize=normalize,
        finished=finished,
        stopping=None,
        length_penalty=1.0,
    )
    model = TableLM(V, coarse=0.5)  # many ties
    start = torch.tensor([5, 6, 7])
    results = []
    for share in (0, 10**9, 2):
        monkeypatch.setattr(walk, "LIST_SHARE", share)
        results.append(run(beams, model, start, repeat=given == "B K"))
    assert equal(results[0], results[1]) and equal(results[0], results[2])
    assert results[0].valid.any(1).all()


@pytest.mark.parametrize("way", ["lists", "bitmask"])
def test_each_request_is_as_if_alone(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    force(monkeypatch, way)
    long = Trie([[3] * 40, [4, 5]])  # two words of reach beside one
    shared = Trie(random_items(50, seed=3))
    constraints = [shared, None, Trie(random_items(5, seed=4, empty=True)), long, shared]
    model, tokens = TableLM(V), torch.tensor([5, 6, 7, 8, 9])
    together = fb.decode(search(constraints, beam_size=4, length_penalty=1.0), model, tokens)
    for request, constraint in enumerate(constraints):
        alone = fb.decode(search(constraint, beam_size=4, length_penalty=1.0), model, tokens[request : request + 1])
        assert equal(together, alone, request), request


@pytest.mark.parametrize("selection", [fb.Stochastic(seed=1), fb.Sample(seed=1), fb.DiverseGroups(2, 0.5)])
def test_rules_that_take_no_lists_obey_too(selection: object) -> None:
    items = random_items(40, seed=5)
    hyps = fb.decode(
        fb.BeamSearch(4, 6, EOS, selection=selection, constraint=Trie(items)), TableLM(V), torch.tensor([5, 6])
    )
    wanted = {(*item, EOS) for item in items}
    for request in range(2):
        rows = zip(hyps.tokens[request].tolist(), hyps.lengths[request].tolist(), strict=True)
        assert {tuple(tokens[:n]) for tokens, n in rows if n} <= wanted
    assert hyps.valid.all()


def test_in_conjunction_both_tries_hold() -> None:
    a, b = random_items(60, seed=6, longest=3), random_items(60, seed=7, longest=3)
    hyps = fb.decode(search(fb.AllOf(Trie(a), Trie(b)), beam_size=60), TableLM(V), torch.tensor([5]))
    both = {(*item, EOS) for item in a} & {(*item, EOS) for item in b}
    assert found(hyps).keys() == both and both


# ---------------------------------------------------------------------------------------------------------------------
# the rule between the ways


def test_lists_are_taken_where_they_are_short() -> None:
    tokens = [token for token in range(V) if token != EOS]
    trie = Trie([[a, 3] for a in tokens] + [[1, 4], [1, 5]])
    assert trie.widest == (len(tokens), 3)
    bound = Trie.bind([trie], context())
    state = bound.init()
    assert bound.listed(state)[0] is None  # 11 of 12
    state = bound.advance(state, torch.tensor([1, 1, 1]))
    assert bound.listed(state)[0] is not None  # 3 of 12
    wide = Trie([[1, a] for a in tokens])
    for tries in ([trie, wide], [wide, trie]):
        both = Trie.bind(tries, context(2))
        assert both.listed(both.advance(both.init(), torch.tensor([1] * 6)))[0] is None
    with_free = Trie.bind([trie, None], context(2))
    assert with_free.listed(with_free.advance(with_free.init(), torch.tensor([1] * 6)))[0] is None


def test_window_is_left_out_where_every_item_fits() -> None:
    trie = Trie([[1, 3], [1, 4, 5]])
    for limits, needed in [
        ({}, False),
        ({"max_lengths": 3}, False),
        ({"max_lengths": 2}, True),
        ({"min_lengths": 3}, False),
        ({"min_lengths": 4}, True),
        ({"eos": (), "max_lengths": 3}, True),
    ]:
        bound = Trie.bind([trie], context(**limits))
        assert (bound.listed(bound.init())[0].window is not None) == needed, limits
    same = Trie([[1, 3], [4, 5]])
    bound = Trie.bind([same], context(eos=(), max_lengths=2))
    assert bound.listed(bound.init())[0].window is None


# ---------------------------------------------------------------------------------------------------------------------
# files


@pytest.mark.parametrize("mmap", [True, False])
def test_saved_and_loaded_is_the_same(mmap: bool, tmp_path: Path) -> None:
    trie = Trie(random_items(50))
    trie.save(tmp_path / "new" / "trie")
    loaded = Trie.load(tmp_path / "new" / "trie", mmap=mmap)
    assert isinstance(loaded.tokens, np.memmap) == mmap
    assert type(loaded) is Trie and (loaded.shortest, loaded.longest) == (trie.shortest, trie.longest)
    results = [fb.decode(search(each), TableLM(V), torch.tensor([5])) for each in (trie, loaded)]
    assert equal(*results) and results[0].valid.any()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["trie"]  # nothing unfinished lies about


def test_root_alone_can_be_saved(tmp_path: Path) -> None:
    Trie([[]]).save(tmp_path / "trie")
    assert len(Trie.load(tmp_path / "trie").tokens) == 0


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    Trie([[1]]).save(tmp_path / "trie")
    with pytest.raises(FileExistsError, match="path: expected a path where nothing is yet"):
        Trie([[3]]).save(tmp_path / "trie")
    assert Trie.load(tmp_path / "trie").tokens.tolist() == [1]


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="path: expected a folder written by fb"):
        Trie.load(tmp_path / "trie")


def rewrite(folder: Path, name: str, change, honest: bool) -> None:
    """Replace an array; ``honest``: with the facts that the description needs."""
    array = change(np.load(folder / f"{name}.npy"))
    np.save(folder / f"{name}.npy", array)
    if honest:
        description = json.loads((folder / "flashbeam.json").read_text())
        facts = {"dtype": array.dtype.str, "shape": list(array.shape), "crc32": zlib.crc32(array.tobytes())}
        description["arrays"][name] = facts
        (folder / "flashbeam.json").write_text(json.dumps(description))


def describe(folder: Path, **changes: object) -> None:
    description = json.loads((folder / "flashbeam.json").read_text())
    (folder / "flashbeam.json").write_text(json.dumps(description | changes))


DAMAGES = {
    "no description": lambda folder: (folder / "flashbeam.json").unlink(),
    "no json": lambda folder: (folder / "flashbeam.json").write_text("{"),
    "binary json": lambda folder: (folder / "flashbeam.json").write_bytes(b"\xff\xfe\x00"),
    "other json": lambda folder: (folder / "flashbeam.json").write_text("[1]"),
    "other format": lambda folder: describe(folder, format="flashbeam.Automaton"),
    "later version": lambda folder: describe(folder, version=2),
    "no arrays": lambda folder: describe(folder, arrays={}),
    "no start": lambda folder: describe(folder, numbers=None),
    "missing array": lambda folder: (folder / "reach.npy").unlink(),
    "truncated": lambda folder: (folder / "tokens.npy").write_bytes((folder / "tokens.npy").read_bytes()[:-4]),
    "truncated header": lambda folder: (folder / "tokens.npy").write_bytes(b"\x93NUMPY"),
    "emptied": lambda folder: (folder / "tokens.npy").write_bytes(b""),
    "pickled": lambda folder: np.save(folder / "tokens.npy", np.array([{}], object), allow_pickle=True),
    "one bit": lambda folder: rewrite(folder, "reach", lambda x: x ^ (np.arange(len(x)) == 3)[:, None], False),
    "other dtype": lambda folder: rewrite(folder, "tokens", lambda x: x.astype(np.int64), True),
    "negative": lambda folder: rewrite(folder, "tokens", lambda x: x - 100, True),
    "too large": lambda folder: rewrite(folder, "tokens", lambda x: x | 0x7FFFFF00, True),
    "out of order": lambda folder: rewrite(folder, "tokens", lambda x: x[::-1].copy(), True),
    "out of range": lambda folder: rewrite(folder, "indptr", lambda x: x * 2, True),
    "not from 0": lambda folder: rewrite(folder, "indptr", lambda x: np.maximum(x, 1), True),
    "falling": lambda folder: rewrite(folder, "indptr", lambda x: np.where(np.arange(len(x)) == 2, x[-1], x), True),
    "no tree": lambda folder: rewrite(folder, "indptr", lambda x: np.append(x, x[-1]).astype(np.int32), True),
    "wide reach": lambda folder: rewrite(folder, "reach", lambda x: x.astype(np.int64), True),
    "short reach": lambda folder: rewrite(folder, "reach", lambda x: x[:-1], True),
    "flat reach": lambda folder: rewrite(folder, "reach", lambda x: x[:, 0], True),
    "empty reach": lambda folder: rewrite(folder, "reach", lambda x: x * 0, True),
}


class Trap:
    """Unpickled, it leaves a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("mmap", [True, False])
def test_no_code_in_a_file_is_run(mmap: bool, tmp_path: Path) -> None:
    Trie([[1, 3]]).save(tmp_path / "trie")
    np.save(tmp_path / "trie" / "tokens.npy", np.array([Trap(tmp_path / "trap")], object), allow_pickle=True)
    with pytest.raises(ValueError, match="path: expected a folder"):
        Trie.load(tmp_path / "trie", mmap=mmap)
    assert not (tmp_path / "trap").exists()


def test_error_says_what_a_file_holds(tmp_path: Path) -> None:
    Trie([[1, 3]]).save(tmp_path / "trie")
    rewrite(tmp_path / "trie", "reach", lambda x: x.reshape(1, 3), False)
    with pytest.raises(ValueError, match=r"reach.npy holds int32 \[1, 3\], not <i4 \[3, 1\]"):
        Trie.load(tmp_path / "trie")


@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_folders_are_refused(damage: str, mmap: bool, tmp_path: Path) -> None:
    Trie(random_items(50)).save(tmp_path / "trie")
    shutil.copytree(tmp_path / "trie", tmp_path / "copy")
    DAMAGES[damage](tmp_path / "copy")
    with pytest.raises(ValueError, match=r"path: expected a folder written by fb.Trie.save, got .*copy: \w+: ."):
        Trie.load(tmp_path / "copy", mmap=mmap)
