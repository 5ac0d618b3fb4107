"""The lattice of a search: against a search that records everything, and pictures that hold what they should."""

import json
import xml.etree.ElementTree as ET

import numpy as np
import pytest
import torch

import flashbeam as fb
from flashbeam.hf.choosing import stop_in_place
from flashbeam.lattice import Status
from flashbeam.lattice.labels import columns, cut, visible
from flashbeam.lattice.layout import lay_out
from oracles import TableLM
from recorder import record
from test_statistics import SEARCHES, run, search_of

EOS = (2,)
HOSTILE = ["<script>", "</title>&b;", "\n", "", "\u200b\u202e", " ", "\x00\x1b[31m", "]]>", "\ud800", "\"'"]
HOSTILE += ["字", "\u0301"]
SHOWN = {"<script>", "</title>&b;", "↵", "⟨3⟩", "\\u200b\\u202e", "·", "␀␛[31m", "]]>", "\\ud800", "字", "◌\u0301"}


def decode(tokens):
    return "".join(HOSTILE[token] for token in tokens)


def prefixes(tree):
    """The tokens on the way to every node."""
    found = [()]
    for parent, token in zip(tree.parent[1:].tolist(), tree.token[1:].tolist(), strict=True):
        found.append((*found[parent], token))
    return found


def leaf_status(tree):
    return {prefixes(tree)[leaf]: Status(tree.status[leaf]) for leaf in tree.leaves}


def check_tree(tree):
    """What holds of every tree."""
    n = len(tree)
    assert tree.parent[0] == -1 and (tree.parent[1:] < np.arange(1, n)).all()
    assert (tree.step[1:] == tree.step[tree.parent[1:]] + 1).all()
    assert tree.edges.shape == (n - 1, 2)
    sums = np.zeros(n, np.float32)
    best, rank = [[] for _ in range(n)], np.where(tree.rank > 0, tree.rank, 10**6)
    for node in range(1, n):
        sums[node] = sums[tree.parent[node]] + tree.token_log_prob[node]
        best[tree.parent[node]].append(tree.status[node])
    for node in range(n - 1, 0, -1):
        rank[tree.parent[node]] = min(rank[tree.parent[node]], rank[node])
    for node, children in enumerate(tree.children()):
        assert sorted(children) == np.flatnonzero(tree.parent == node).tolist()
        order = [(-tree.status[child], rank[child]) for child in children]
        assert order == sorted(order)  # those that lead to the best first
    assert (tree.log_prob == sums).all()  # float32, in the order of the steps: the search's own bits
    assert all(tree.status[node] == max(below) for node, below in enumerate(best) if below)
    leaves = tree.leaves.tolist()
    assert leaves == [node for node in range(1, n) if not best[node]]
    ends = np.flatnonzero(tree.rank)
    assert set(ends) <= set(leaves) and sorted(tree.rank[ends]) == list(range(1, len(ends) + 1))
    assert all(tree.status[node] == Status.BEST for node in ends)
    assert all((tree.status[leaf] == Status.BEST) == (tree.rank[leaf] > 0) for leaf in leaves)
    assert all(node in leaves for node in np.flatnonzero(tree.finished))
    found = list(tree.paths())
    assert [path.nodes[-1] for path in found if path.rank] == [path.nodes[-1] for path in found[: len(ends)]]
    assert [path.rank for path in found[: len(ends)]] == list(range(1, len(ends) + 1))
    assert sum(len(list(tree.paths(status))) for status in Status) == len(found) == len(leaves)


class Narrow:
    """A constraint of one's own that runs into dead ends: every token leads up, and nothing is above the last."""

    def init(self, batch_size, beam_size, vocab_size, device):
        above = torch.arange(vocab_size) > torch.arange(-1, vocab_size)[:, None]
        self.table = above & (torch.arange(vocab_size) % 3 != 0)
        return torch.full((batch_size * beam_size,), -1)

    def bitmask(self, state):
        from flashbeam.kernels import pack_bitmask

        return pack_bitmask(self.table[state + 1])

    def advance(self, state, tokens):
        return tokens


def narrow(tokens):
    last = tokens[-1] if tokens else -1
    return (np.arange(12) > last) & (np.arange(12) % 3 != 0)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize(("stopping", "patience"), [(fb.Exhausted(), None), (fb.FirstFinished(), 1.0)])
@pytest.mark.parametrize("statistics", [False, True])
def test_holds_what_a_search_that_records_everything_has_tried(in_place, stopping, patience, statistics):
    seen = {"finished": 0, "live": 0, "pruned": 0, "dead end": 0, "n-best": 0, "dropped": 0}
    for seed in range(9):
        K, T = (1, 3, 5)[seed % 3], 6
        constrained = seed >= 6
        model = TableLM(12, seed, eos=EOS, eos_bias=0.0 if constrained else 1.5)
        constraint, allowed = (Narrow(), narrow) if constrained else (None, None)
        search = fb.BeamSearch(
            K,
            T,
            EOS[0],
            stopping=stopping,
            finished="in_place" if in_place else "pool",
            constraint=constraint,
            statistics=statistics,
        )
        state, _ = run(search, model)
        lattice = fb.lattice(state)
        assert len(lattice) == 3
        for b, (bos, tree) in enumerate(zip((5, 7, 9), lattice, strict=True)):
            check_tree(tree)
            options = {"eos": EOS, "patience": None if in_place else patience, "in_place": in_place, "allowed": allowed}
            want = record(model.logits, bos, beam_size=K, max_length=T, **options)
            if want.closest < 1e-5:
                continue
            found = dict(zip(prefixes(tree), tree.log_prob.tolist(), strict=True))
            assert len(found) == len(tree)  # no path twice
            dropped = set(want.log_probs) - set(found)  # finished, and found no place in the pool
            assert dropped <= want.finished - set(want.n_best) and not (statistics and dropped)
            assert set(found) - {()} == set(want.log_probs) - dropped
            assert all(found[path] == pytest.approx(want.log_probs[path], abs=1e-4) for path in found if path)
            np.testing.assert_allclose(tree.score[1:], tree.log_prob[1:] / tree.lengths[1:], rtol=1e-6)
            assert (tree.request, tree.steps, tree.beam_size, tree.done) == (b, len(want.steps), K, True)
            statuses = leaf_status(tree)
            seen["dropped"] += len(dropped)
            for path, status in statuses.items():
                seen[status.label] += 1
                if path in want.n_best:
                    assert status == Status.BEST
                elif path in want.finished:
                    assert status == Status.FINISHED
                elif path in want.live:
                    assert status == Status.LIVE
                else:
                    assert path in want.dead_ends if status == Status.DEAD_END else status == Status.PRUNED
            if constrained and patience is None and not in_place:  # told where the next step left places empty
                certain = {
                    path
                    for path in want.dead_ends & set(statuses)
                    if want.steps[len(path)].width + want.steps[len(path)].finished < K
                }
                assert {path for path, status in statuses.items() if status == Status.DEAD_END} == certain
    assert seen["n-best"] and seen["finished"] and seen["pruned"] and seen["dead end"], seen
    assert bool(seen["dropped"]) == (not in_place and not statistics)


@pytest.mark.parametrize("name", SEARCHES)
def test_every_hypothesis_is_in_it_with_the_same_numbers(name):
    model = TableLM(12, 1, eos=EOS, eos_bias=1.0)
    state, hyps = run(search_of(name, False), model)
    complete, _ = run(search_of(name, True), model)
    for b, (tree, more) in enumerate(zip(fb.lattice(state), fb.lattice(complete), strict=True)):
        check_tree(tree)
        check_tree(more)
        fewer = fb.lattice(state, 1, requests=[b])[0]
        assert (fewer.score == tree.score).all() and fewer.rank.max() == 1  # also of what is not in the n-best
        made, tried = more.statistics, np.bincount(more.step[1:], minlength=more.steps)
        if state.groups == 1:  # where a rule ends a search, or a group's, no beam is left
            assert (tried == made.width + made.finished)[:-1].all()
        assert len(tree) - tree.finished.sum() == len(more) - more.finished.sum()
        for n in range(int(hyps.valid[b].sum())):
            node = int(np.flatnonzero(tree.rank == n + 1)[0])
            path, length = tree.path(node), int(hyps.lengths[b, n])
            assert path.tokens == hyps.tokens[b, n, :length].tolist()
            assert path.token_log_probs == hyps.token_log_probs[b, n, :length].tolist()
            assert path.log_prob == hyps.log_probs[b, n] and path.score == hyps.scores[b, n]
            assert path.finished == hyps.finished[b, n] and path.rank == n + 1
            assert [tree.slot[tree.parent[i]] for i in path.nodes[1:]] == hyps.slots[b, n, 1:length].tolist()
        assert tree.rank.max() == hyps.valid[b].sum()


def test_of_a_search_under_way_and_of_some_of_its_requests():
    model = TableLM(12, 3, eos=EOS, eos_bias=1.0)
    search = fb.BeamSearch(3, 8, EOS[0])
    state = search.init(2)
    assert [len(tree) for tree in fb.lattice(state)] == [1, 1]
    assert "0 steps, 0 nodes so far" in fb.lattice(state).text()
    ET.fromstring(fb.lattice(state).svg())
    state, _ = run(search, model, steps=3)
    before = state.clone()
    lattice = fb.lattice(state, 2, requests=[2, 0])
    assert [tree.request for tree in lattice] == [2, 0] and [tree.rank.max() for tree in lattice] == [2, 2]
    assert not lattice[0].done and lattice[0].steps == 3 and (lattice[0].status == Status.LIVE).any()
    for part in ("slots", "requests", "history", "pool"):
        assert all(torch.equal(a, b) for a, b in zip(getattr(state, part), getattr(before, part), strict=True))


class Even:
    """A constraint of one's own: the last token at max_length is even."""

    def init(self, batch_size, beam_size, vocab_size, device):
        return torch.zeros(batch_size * beam_size, dtype=torch.int64)

    def bitmask(self, state):
        return torch.full((len(state), 1), -1, dtype=torch.int32)

    def advance(self, state, tokens):
        return tokens

    def accepts(self, state):
        return state % 2 == 0


@pytest.mark.parametrize("statistics", [False, True])
def test_a_step_that_leaves_nothing_is_a_column_without_nodes(statistics):
    state, _ = run(fb.BeamSearch(5, 6, 0, constraint=Narrow(), statistics=statistics), TableLM(12, 7), bos=(5,))
    lattice = fb.lattice(state)
    [tree] = lattice
    check_tree(tree)
    assert tree.steps == tree.step.max() + 2 and (tree.status == Status.DEAD_END).any()
    assert lay_out(tree).columns == tree.steps + 1
    for page in (lattice.svg(), lattice.html().removeprefix("<!DOCTYPE html>\n")):
        assert f">{tree.steps}</text>" in page and "✕" in "".join(ET.fromstring(page).itertext())


@pytest.mark.parametrize("regime", ["pool", "in_place"])
def test_what_a_constraint_refuses_at_the_end_is_a_dead_end(regime):
    search = fb.BeamSearch(6, 3, constraint=Even(), finished=regime)
    state, _ = run(search, TableLM(12, 0))
    for tree in fb.lattice(state):
        check_tree(tree)
        last = tree.leaves[tree.step[tree.leaves] == 2]
        assert len(last) == 6
        assert (tree.status[last] == np.where(tree.token[last] % 2 == 0, Status.BEST, Status.DEAD_END)).all()
        assert "✕" in fb.lattice(state).text()


@pytest.mark.parametrize("selection", [fb.TopK(), fb.Sample(1)])
def test_what_a_criterion_stops_in_its_slot_has_nothing_behind_it(selection):
    search = fb.BeamSearch(4, 8, 2, pad_id=3, finished="in_place", selection=selection)
    state = search.init(2)
    for _ in state.until_done():
        step = search.step(state, torch.randn(8 if state.vocab_size else 2, 12))
        stop_in_place(state, step.tokens % 3 == 0)
    hyps = search.finalize(state)
    assert bool(hyps.finished.any())
    for request, tree in enumerate(fb.lattice(state)):
        paths = [path for path in tree.paths() if path.rank]
        assert [path.tokens for path in paths] == [
            tokens[:length].tolist() for tokens, length in zip(hyps.tokens[request], hyps.lengths[request], strict=True)
        ]
        assert [path.finished for path in paths] == hyps.finished[request].tolist()
        ends = (tree.token == 2) | ((tree.token % 3 == 0) & (tree.step < 7))  # at max_length all ends
        assert (tree.finished == ends).all()
        assert not ends[tree.parent[1:]].any()


def test_text_of_a_search_worked_by_hand():
    logits = torch.tensor([[0.0, 0.0, 4.0, 3.0], [0.0, 5.0, 3.0, -9.0], [2.0, 3.0, 4.0, -9.0]])
    search = fb.BeamSearch(2, 2, eos_id=1, length_penalty=0.0)
    state = search.init(1)
    search.step(state, logits[:1])  # 2, then 3
    search.step(state, logits[1:])  # 2 ends; 3 goes on to 2
    names = ["zero", "end", "two", "three"]
    text = fb.lattice(state).text(lambda tokens: " ".join(names[token] for token in tokens))
    assert text == (
        "request 0: 2 beams, 2 steps, 4 nodes: 2 n-best\n"
        "  rank    score  log-prob\n"
        "                           ●\n"
        "     1    -0.47     -0.47  ├─ two end ■\n"
        "     2    -1.75     -1.75  └─ three two …\n"
    )


def test_text_keeps_within_its_width():
    state, _ = run(fb.BeamSearch(5, 8, EOS[0]), TableLM(12, 2, eos=EOS))
    for width in (50, 80):
        text = fb.lattice(state).text(lambda tokens: "word " * len(tokens), width=width)
        assert max(map(columns, text.split("\n"))) <= width


def test_pictures_are_xml_that_holds_every_node_and_nothing_of_others():
    state, hyps = run(fb.BeamSearch(4, 7, EOS[0], statistics=True), TableLM(12, 3, eos=EOS, eos_bias=1.0))
    lattice = fb.lattice(state)
    nodes, ends = sum(len(tree) - 1 for tree in lattice), int(hyps.valid.sum())
    for page in (lattice.svg(decode), lattice.html(decode, title="<b>&\x00"), lattice.svg(), lattice.html()):
        root = ET.fromstring(page.removeprefix("<!DOCTYPE html>\n"))
        tags = [(each.tag.rpartition("}")[2], each.attrib) for each in root.iter()]
        assert sum(tag == "g" and "data-i" in has for tag, has in tags) == nodes
        assert sum(tag == "path" for tag, _ in tags) == nodes
        said = "".join(root.itertext())
        assert said.count(", rank ") == ends
        for one in root.iter():
            kind = one.get("class", "").split()
            if "data-i" in one.attrib and "n" in kind:
                assert sum(status in kind for status in ("best", "live", "finished", "pruned", "dead")) == 1
        # nothing is fetched: names of formats are the only addresses
        assert set(word for word in page.split('"') if "://" in word) <= {
            "http://www.w3.org/2000/svg",
            "http://www.w3.org/1999/xhtml",
        }
        assert not {"src", "href"} & {name.rpartition("}")[2] for _, has in tags for name in has}
        assert sum(tag == "script" for tag, _ in tags) == page.startswith("<!DOCTYPE")
        assert page.count("<script>") == page.startswith("<!DOCTYPE")
    labels = {each.text for each in ET.fromstring(lattice.svg(decode)).iter() if each.get("class") == "label"}
    assert labels >= SHOWN
    assert lattice._repr_svg_() == lattice.svg() and repr(lattice).count("Tree(") == 3


def test_json_is_json_and_holds_the_arrays():
    state, _ = run(fb.BeamSearch(3, 5, EOS[0], statistics=True), TableLM(12, 3, eos=EOS))
    lattice = fb.lattice(state, requests=[1])
    [found] = json.loads(lattice.to_json(decode), parse_constant=pytest.fail)["requests"]
    [tree] = lattice
    assert found["request"] == 1 and found["nodes"]["parent"] == tree.parent.tolist()
    assert np.array(found["nodes"]["log_prob"], np.float32).tolist() == tree.log_prob.tolist()
    assert found["nodes"]["text"][1:] == [decode([token]) for token in tree.token[1:]]
    assert found["statistics"]["width"] == tree.statistics.width.tolist()
    assert {"n-best", "pruned"} <= set(found["nodes"]["status"])


def test_files_are_written_by_their_names(tmp_path):
    state, _ = run(fb.BeamSearch(3, 5, EOS[0]), TableLM(12, 3, eos=EOS))
    lattice = fb.lattice(state)
    ways = {"a.txt": lattice.text, "a.SVG": lattice.svg, "a.html": lattice.html, "a.json": lattice.to_json}
    for name, want in ways.items():
        lattice.save(tmp_path / name, decode)
        assert (tmp_path / name).read_text("utf-8") == want(decode)
    with pytest.raises(ValueError, match=r"path: expected a name that ends in one of .*, got 'a.png'"):
        lattice.save(tmp_path / "a.png")
    assert not (tmp_path / "a.png").exists()


def test_nodes_do_not_meet_and_a_picture_is_about_as_high_as_the_beam_is_wide():
    state, _ = run(fb.BeamSearch(8, 40, stopping=fb.Exhausted()), TableLM(30, 3), bos=(5,))
    [tree] = fb.lattice(state)
    layout = lay_out(tree)
    places = list(zip(layout.row, tree.lengths.tolist(), strict=True))
    assert len(set(places)) == len(tree) == len(layout.row)
    for node in range(1, len(tree)):
        above = tree.parent[node]
        assert layout.row[node] >= layout.row[above]
        # the line to a node in another row has room there
        assert layout.row[node] == layout.row[above] or (layout.row[node], tree.lengths[above]) not in places
    assert layout.rows == max(layout.row) + 1 <= 3 * 8 and layout.columns == 41
    for children in tree.children():  # one goes straight on, the best
        assert [layout.row[child] == layout.row[tree.parent[child]] for child in children] == [
            i == 0 for i in range(len(children))
        ]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a b\n\tc", "a b↵⇥c"),
        ("\x00\x1f\x7f\r", "␀␟␡␍"),
        ("\u200b\u202e\ufeff", "\\u200b\\u202e\\ufeff"),
        ("\ud800\ufffe\U000e0001", "\\ud800\\ufffe\\U000e0001"),
        ("\u0301a\u0301", "◌\u0301a\u0301"),
        ("<&>字", "<&>字"),
        ("\u2028\u00a0", "\\u2028\\u00a0"),
    ],
)
def test_what_cannot_be_seen_is_written_out(text, shown):
    assert visible(text) == shown
    assert visible(" x ", "·") == "·x·"


def test_labels_are_cut_by_columns():
    assert columns("字a\u0301") == 3
    assert cut("abcdef", 4) == "abc…" and cut("abcd", 4) == "abcd"
    assert cut("字字字", 5) == "字字…" and columns(cut("字字字", 4)) <= 4


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (lambda state: (1,), TypeError, r"state: expected a flashbeam.State, got int"),
        (lambda state: (state, 0), ValueError, r"num_hypotheses: expected an int >= 1, got 0"),
    ],
)
def test_rejects_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        fb.lattice(*arguments(fb.BeamSearch(2, 3).init(1)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda found: found.text(width="a"), "width: expected an int >= 1, got str"),
        (lambda found: found.text("a"), "decode: expected a function of token ids, got str"),
        (lambda found: found.svg(3), "decode: expected a function of token ids, got int"),
        (lambda found: found.html(3), "decode: expected a function of token ids, got int"),
        (lambda found: found.to_json(3), "decode: expected a function of token ids, got int"),
        (lambda found: found.save(3), "path: expected a file's name, got int"),
    ],
)
def test_pictures_reject_bad_arguments(call, message):
    with pytest.raises(TypeError, match=f"^{message}$"):
        call(fb.lattice(fb.BeamSearch(2, 3).init(1)))


def test_rejects_requests_that_are_not_there():
    state = fb.BeamSearch(2, 3).init(2)
    with pytest.raises(ValueError, match=r"requests: expected numbers below 2, got 2"):
        fb.lattice(state, requests=[0, 2])
    with pytest.raises(ValueError, match=r"requests: expected an int >= 0, got -1"):
        fb.lattice(state, requests=[-1])
    with pytest.raises(TypeError, match=r"^requests: expected a list of ints, got int"):
        fb.lattice(state, requests=3)
