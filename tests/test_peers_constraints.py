"""Side by side with Hugging Face's beam search on the same model: equal where it is right, and where it is not.

What is pinned here of Hugging Face was seen in transformers 5.24.0. If another version does better, so much the better:
say so in docs/peers.md.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import flashbeam as fb

pytest.importorskip("transformers", reason="needs transformers: the extra `hf`")
from peers import by_flashbeam, by_generate, model, random_items, trie_as_dict

V = 50
BOS, EOS, PAD = V - 3, V - 2, V - 1


def trimmed(tokens):
    """Up to EOS; padding has no other place."""
    return tuple(tokens[: tokens.index(EOS) + 1]) if EOS in tokens else tuple(tokens)


def theirs(out, beams, request=0):
    rows = out.sequences.view(-1, beams, out.sequences.shape[1])[request, :, 1:].tolist()
    return [trimmed(row) for row in rows], out.sequences_scores.view(-1, beams)[request]


def ours(hyps, request=0):
    valid = hyps.valid[request]
    return [trimmed(row) for row in hyps.tokens[request, valid].tolist()], hyps.log_probs[request, valid]


@pytest.mark.parametrize("lengths", [(3, 3), (1, 5)], ids=["of one length", "of several"])
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("beams", [4, 16])
@pytest.mark.parametrize("seed", range(3))
def test_the_same_items_where_there_are_more_than_beams(seed, beams, renormalize, lengths):
    lm, items = model(V, seed), random_items(200, V, *lengths, seed=seed)
    options = {"stopping": fb.Exact(), "normalize": "allowed" if renormalize else "vocab"}
    hyps = by_flashbeam(lm, fb.Trie(items), beams, max(lengths) + 1, batch=2, **options)
    out = by_generate(
        lm, trie_as_dict(items, EOS), beams, max(lengths) + 1, 2, early_stopping="never", renormalize_logits=renormalize
    )
    for request in range(2):
        found, log_probs = ours(hyps, request)
        expected, scores = theirs(out, beams, request)
        assert found == expected
        torch.testing.assert_close(log_probs, scores, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("early_stopping", [True, False, "never"])
def test_fewer_items_than_beams(early_stopping):
    lm, items = model(V), random_items(2, V)
    expected, scores = theirs(by_generate(lm, trie_as_dict(items, EOS), 5, 4, early_stopping=early_stopping), 5)
    hyps = by_flashbeam(lm, fb.Trie(items), 5, 4, stopping=fb.Exhausted())
    found, log_probs = ours(hyps)
    # ours: both items, and three places marked as empty
    assert {*found} == {(*item, EOS) for item in items} and hyps.valid[0].sum() == 2
    # theirs: both items, then a duplicate and padding that is no item, at a score of -1e9
    assert expected[:2] == found
    torch.testing.assert_close(scores[:2], log_probs, rtol=1e-5, atol=1e-5)
    assert {*expected[2:]} - {*found} == {(PAD,) * 4}
    assert {*expected[2:]} & {*found}
    assert (scores[2:] == -1e9).all()


def test_filler_ends_a_search_early():
    lm, items = model(V, 2), random_items(200, V, 1, 5, seed=2)
    allowed = trie_as_dict(items, EOS)
    expected, scores = theirs(by_generate(lm, allowed, 4, 6, early_stopping=True), 4)
    found, log_probs = ours(by_flashbeam(lm, fb.Trie(items), 4, 6, stopping=fb.FirstFinished()))
    # theirs: a duplicate at -1e9 is the fourth to finish, and a better item is still under way
    assert expected == [found[0], found[2], found[3], found[0]] and scores[3] == -1e9
    assert len({*found}) == 4 and found == theirs(by_generate(lm, allowed, 4, 6, early_stopping=False), 4)[0]
    assert (log_probs > -100).all()


def test_a_dead_end():
    lm, items = model(V), random_items(20, V)
    # theirs: an error for the whole batch
    with pytest.raises(ValueError, match="prefix_allowed_tokens_fn"):
        by_generate(lm, lambda request, tokens: [] if request else [1], 4, 4, batch=2)
    # ours: a request without hypotheses, and a flag
    hyps = by_flashbeam(lm, [fb.Trie(items), fb.Trie([(1, 2, 3)])], 4, 4, batch=2, min_length=[0, 4])
    assert hyps.valid.sum(1).tolist() == [4, 1]
    dead = by_flashbeam(lm, [fb.Trie(items), fb.Trie([(1, 2, 3, 4, 5)])], 4, 4, batch=2)
    assert dead.valid.sum(1).tolist() == [4, 0]
    assert ours(dead)[0] == ours(hyps)[0]


def test_a_grammar():
    xgrammar = pytest.importorskip("xgrammar", reason="needs xgrammar: the extra `grammar`")
    from xgrammar.contrib.hf import LogitsProcessor

    words = [chr(ord("a") + token).encode() if token < 26 else f"<{token}>".encode() for token in range(V)]
    info = xgrammar.TokenizerInfo(words, stop_token_ids=[EOS])
    compiled = xgrammar.GrammarCompiler(info, max_threads=1).compile_regex("(ab|ba|cd|dc){1,2}")
    lm = model(V)
    # theirs: xgrammar's processor follows rows, not beams
    with pytest.raises((RuntimeError, AssertionError)):
        by_generate(lm, None, 4, 4, logits_processor=[LogitsProcessor(compiled)])
    found, _ = ours(by_flashbeam(lm, fb.Grammar(compiled), 30, 5, stopping=fb.Exhausted()))
    pairs = [(0, 1), (1, 0), (2, 3), (3, 2)]
    assert {*found} == {(*pair, EOS) for pair in pairs} | {(*one, *two, EOS) for one in pairs for two in pairs}


def test_the_benchmark_runs(tmp_path):
    root, output = Path(__file__).parents[1], tmp_path / "peers.json"
    command = [sys.executable, root / "bench/run_peers.py", "--tiny", "--rounds", "2", "--output", output]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    (found,) = json.loads(output.read_text())["results"]
    assert found["timings"].keys() == {"transformers", "flashbeam", "the model alone"}
