"""Texts of a grammar, by xgrammar and by llguidance. Python's ``re`` and ``json`` say what is legal."""

import itertools
import json
import re
import subprocess
import sys

import pytest
import torch

import flashbeam as fb
from flashbeam.constraint import Context, bind, grammar, matchers
from flashbeam.kernels import unpack_bitmask
from oracles import TableLM, enumerate_leaves

PAD, EOS, STOP = 0, 1, 6
WORDS = [b"<pad>", b"<eos>", b"a", b"b", b"ab", b"c", b"<stop>"]
TEXTS = ["", "", "a", "b", "ab", "c", ""]
V = len(WORDS)
PATTERN = "(ab|ba|c){1,2}a?"
JSON_WORDS = ["{", "}", '"', '"n"', '"ok"', ":", ",", "1", "27", "0", "true", "false", "tr", "ue", "n", "ok", "{}"]
SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 99}, "ok": {"type": "boolean"}},
    "required": ["n", "ok"],
    "additionalProperties": False,
}


class GreedyTokenizer:
    """What llguidance wraps: the longest word first."""

    bos_token_id = None

    def __init__(self, words, eos):
        self.tokens, self.eos_token_id, self.special_token_ids = words, eos, [PAD, EOS]
        self.by_length = sorted(filter(words.__getitem__, range(2, len(words))), key=lambda token: -len(words[token]))

    def __call__(self, text):
        text, tokens = text if isinstance(text, bytes) else text.encode(), []
        while text:
            token = next((token for token in self.by_length if text.startswith(self.tokens[token])), None)
            if token is None:
                break
            tokens.append(token)
            text = text[len(self.tokens[token]) :]
        return tokens


class XGrammar:
    def tokenizer(self, words, stops=(EOS,), size=None):
        xgrammar = pytest.importorskip("xgrammar", reason="needs xgrammar: the extra `grammar`")
        return xgrammar.TokenizerInfo(words, vocab_size=size, stop_token_ids=list(stops))

    def regex(self, pattern, tokenizer):
        return fb.Grammar.regex(pattern, tokenizer)


class LLGuidance:
    def tokenizer(self, words, stops=(EOS,), size=None):
        llguidance = pytest.importorskip("llguidance", reason="needs llguidance: the extra `grammar`")
        words = words + [b""] * ((size or 0) - len(words))
        wrapper = llguidance.TokenizerWrapper(GreedyTokenizer(words, stops[0]))
        return llguidance.LLTokenizer(wrapper, eos_token=list(stops))

    def regex(self, pattern, tokenizer):
        # every way to spell what is forced
        return fb.Grammar(f'%llguidance {{"no_forcing": true}}\nstart: /{pattern}/', tokenizer)


LIBRARIES = [XGrammar(), LLGuidance()]


@pytest.fixture(params=LIBRARIES, ids=["xgrammar", "llguidance"])
def library(request):
    return request.param


@pytest.fixture
def legal(library):
    return library.regex(PATTERN, library.tokenizer(WORDS, (EOS, STOP)))


def text_of(tokens, texts=TEXTS):
    return "".join(texts[token] for token in tokens)


def run(constraint, seed=0, batch=1, eos=EOS, vocab=V, requests=None, **options):
    options = {"beam_size": 300, "max_length": 6, "length_penalty": 0, "stopping": fb.Exhausted(), **options}
    search = fb.BeamSearch(eos_id=eos, constraint=constraint, **options)
    return fb.decode(search, TableLM(vocab, seed), torch.arange(batch) if requests is None else requests)


def found(hyps, request=0):
    fields = (hyps.tokens, hyps.lengths, hyps.log_probs, hyps.valid)
    rows = zip(*(field[request].tolist() for field in fields), strict=True)
    return {tuple(tokens[:length]): log_prob for tokens, length, log_prob, valid in rows if valid}


LANGUAGE = {
    "".join(letters)
    for length in range(7)
    for letters in itertools.product("abc", repeat=length)
    if re.fullmatch(PATTERN, "".join(letters))
}


def may_follow(prefix, eos=(EOS,)):
    """The oracle: bool ``[V]``, what may follow a prefix that begins with the request's first token."""
    text = text_of(prefix[1:])
    allowed = torch.tensor([bool(new) and any(legal.startswith(text + new) for legal in LANGUAGE) for new in TEXTS])
    for token in eos:
        allowed[token] = text in LANGUAGE
    return allowed.numpy()


def legal_leaves(bos=0, seed=0, eos=(EOS,), **options):
    options = {"max_length": 6, **options}
    lm = TableLM(V, seed)
    leaves = enumerate_leaves(lm.logits, bos, eos=eos, mask=lambda prefix: may_follow(prefix, eos), **options)
    return {leaf.tokens: leaf.log_prob for leaf in leaves if text_of(leaf.tokens) in LANGUAGE}


def same(got, expected):
    assert got.keys() == expected.keys()
    assert all(abs(got[tokens] - expected[tokens]) < 1e-5 for tokens in got)


@pytest.mark.parametrize("finished", ["pool", "in_place"])
@pytest.mark.parametrize("normalize", ["vocab", "allowed"])
@pytest.mark.parametrize("min_length", [0, 4])
def test_every_legal_text_and_nothing_else(legal, finished, normalize, min_length):
    options = {"normalize": normalize, "min_length": min_length}
    expected = legal_leaves(**options)
    assert len(expected) > 20 and len(legal_leaves()) > len(legal_leaves(min_length=4))
    same(found(run(legal, finished=finished, **options)), expected)


@pytest.mark.parametrize("max_length", [2, 3, 4])
def test_without_eos_what_is_complete_at_max_length(legal, max_length):
    expected = legal_leaves(eos=(), max_length=max_length)
    assert expected
    same(found(run(legal, eos=None, max_length=max_length)), expected)


def test_several_eos(legal):
    expected = legal_leaves(eos=(EOS, STOP))
    assert {tokens[-1] for tokens in expected} == {EOS, STOP}
    same(found(run(legal, eos=[EOS, STOP])), expected)


def test_a_stop_token_that_is_no_eos_never_follows(legal):
    state = bind([legal], context(beams=1)).init()
    bound = bind([legal], context(beams=1))
    mask = unpack_bitmask(bound.bitmask(bound.move(state, torch.tensor([0]), torch.tensor([4]))), V)
    assert mask[0].tolist() == [False, True, True, True, True, True, False]


def test_eos_that_the_tokenizer_takes_for_text(legal, library):
    # token 3 is "b" for the library; for the search it ends, and so it may follow a complete text only
    tokenizer = library.tokenizer(WORDS, (EOS, STOP))
    hyps = run(library.regex("(ab|c)+", tokenizer), eos=[EOS, 3], max_length=4)
    for tokens in found(hyps):
        assert re.fullmatch("(ab|c)+", text_of(token for token in tokens if token != 3))


def test_other_eos_than_the_tokenizers(legal):
    with pytest.raises(
        ValueError, match=r"constraint: expected a grammar for a tokenizer with EOS \[5\], got \[1, 6\]"
    ):
        run(legal, eos=5)


@pytest.mark.parametrize("size", [None, 40, 70])
@pytest.mark.parametrize("columns", [5, V, 31, 32, 33, 64, 100])
def test_vocabularies_of_other_sizes(library, columns, size):
    constraint = library.regex("[abc]*", library.tokenizer(WORDS, size=size))
    bound = bind([constraint], context(beams=2, columns=columns))
    mask = bound.bitmask(bound.init())
    assert mask.shape == (2, -(-columns // 32))
    allowed = unpack_bitmask(mask, columns)
    assert allowed.nonzero()[:, 1].tolist() == [token for token in range(1, 6) if token < columns] * 2


@pytest.mark.parametrize("eos", [EOS, None])
def test_json_of_a_schema(library, eos):
    words = [b"<pad>", b"<eos>", *map(str.encode, JSON_WORDS)]
    constraint = fb.Grammar.json_schema(SCHEMA, library.tokenizer(words))
    options = {"beam_size": 8, "max_length": 14, "vocab": len(words), "batch": 4}
    hyps = run(constraint, eos=eos, **options)
    assert hyps.valid.any(1).all() or eos is None
    for request in range(4):
        for tokens in found(hyps, request):
            value = json.loads(text_of(tokens, ["", "", *JSON_WORDS]))
            assert value.keys() == {"n", "ok"} and 0 <= value["n"] <= 99 and isinstance(value["ok"], bool)
            assert eos is None or tokens[-1] == eos or len(tokens) == 14


def test_context_free_grammar(library):
    constraint = fb.Grammar.ebnf('root ::= "a" root "b" | "c"', library.tokenizer(WORDS))
    texts = {text_of(tokens) for tokens in found(run(constraint, max_length=8, beam_size=20))}
    assert texts >= {"c", "acb", "aacbb", "aaacbbb"}
    assert all(text == "a" * (len(text) // 2) + "c" + "b" * (len(text) // 2) for text in texts)


def test_llguidance_spells_forced_text_in_one_way():
    # documented: only the tokenizer's own tokens where the text is forced
    llguidance = LLGuidance()
    tokenizer = llguidance.tokenizer(WORDS)
    assert found(run(fb.Grammar.regex("abc", tokenizer))).keys() == {(4, 5, EOS)}
    assert found(run(llguidance.regex("abc", tokenizer))).keys() == {(4, 5, EOS), (2, 3, 5, EOS)}


# ---------------------------------------------------------------------------------------------------------------------
# work


def context(batch=1, beams=1, columns=V, eos=(EOS,), device="cpu"):
    return Context(batch, beams, columns, torch.device(device), eos, (0,) * batch, (9,) * batch)


@pytest.fixture
def calls(monkeypatch):
    """How often matchers were forked and advanced so far."""
    counts = {"fork": 0, "accept": 0}

    def counted(name, method):
        def call(self, *args):
            counts[name] += 1
            return method(self, *args)

        return call

    for kind in (matchers.XGrammar, matchers.LLGuidance):
        for name in counts:
            monkeypatch.setattr(kind, name, counted(name, getattr(kind, name)))
    return counts


def moved(bound, state, rows, tokens, live=None):
    live = None if live is None else torch.tensor(live)
    return bound.move(state, torch.tensor(rows), torch.tensor(tokens), live)


def test_a_parent_is_forked_for_all_children_but_one(legal, calls):
    bound = bind([legal], context(beams=4))
    state = bound.init()
    assert calls["fork"] == 1  # the grammar's own stays as it is
    state = moved(bound, state, [0, 0, 0, 0], [2, 3, 4, 5])
    assert calls == {"fork": 4, "accept": 4}
    state = moved(bound, state, [1, 0, 2, 3], [2, 3, 5, 5])  # one child each
    assert calls == {"fork": 4, "accept": 8}
    state = moved(bound, state, [2, 2, 1, 0], [1, 2, 2, 2], [False, True, True, False])
    assert calls == {"fork": 4, "accept": 10}
    assert [matcher is not None for matcher in state.rows] == [False, True, True, False]


def test_slots_that_are_alike_share_a_matcher(legal, calls):
    bound = bind([legal, legal, None], context(batch=3, beams=50))
    state = bound.init()
    mask = bound.bitmask(state)
    assert calls == {"fork": 1, "accept": 0}
    assert len(set(state.rows)) == 2
    assert torch.equal(mask[:100], mask[:1].expand(100, 1)) and (mask[100:] == -1).all()
    taken = bound.take(state, torch.tensor([0, 50, 100]))
    assert torch.equal(bound.bitmask(taken), mask[[0, 50, 100]])


@pytest.mark.parametrize("finished", ["pool", "in_place"])
def test_one_token_per_live_beam_and_step(legal, calls, finished):
    search = fb.BeamSearch(6, 6, EOS, constraint=[legal, None, legal], finished=finished)
    lm = TableLM(V, 1)
    state = search.init(3)
    logits, cache = lm(torch.arange(3), None)
    while not state.all_done():
        before = dict(calls)
        step = search.step(state, logits)
        live = (step.valid & ~state.slots.ended)[[0, 2]]
        parents = {
            (request, parent)
            for request, slot in live.nonzero().tolist()
            for parent in [step.parents[request * 2, slot].item()]
        }
        assert calls["accept"] - before["accept"] == live.sum()
        if state.requests.steps.max() == 1:  # both requests start from one matcher, a copy of the grammar's own
            parents = {(0, 0)}
            before["fork"] += 1
        assert calls["fork"] - before["fork"] == live.sum() - len(parents)
        logits, cache = lm(step.tokens.flatten(), fb.reorder(cache, step.source_rows))


def test_ended_and_empty_rows_have_no_matcher(legal):
    bound = bind([legal], context(beams=3))
    state = moved(bound, bound.init(), [0, 0, 0], [4, 4, 4], [True, False, True])
    mask = bound.bitmask(state)
    assert mask[1] == 0 and mask[0] == mask[2] != 0
    assert bound.accepts(state).tolist() == [True, False, True]


def test_a_token_that_is_refused_ends_its_beam(legal):
    bound = bind([legal], context(beams=2))
    state = moved(bound, bound.init(), [0, 0], [4, EOS])
    assert state.rows[1] is None
    assert bound.bitmask(state)[1] == 0


def test_eos_may_follow_exactly_where_the_text_is_accepted(legal):
    bound = bind([legal], context(beams=4))
    state = bound.init()
    for rows, tokens in ([[0, 0, 0, 0], [2, 3, 4, 5]], [[0, 1, 2, 3], [3, 2, 2, 4]], [[0, 1, 2, 2], [5, 2, 2, 3]]):
        state = moved(bound, state, rows, tokens)
        assert unpack_bitmask(bound.bitmask(state), V)[:, EOS].tolist() == bound.accepts(state).tolist()


# ---------------------------------------------------------------------------------------------------------------------
# in a search


def equal(one, other):
    for name in ("tokens", "lengths", "log_probs", "scores", "valid"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name


@pytest.mark.parametrize("beams", [1, 5])
def test_alone_as_in_a_batch(library, beams):
    tokenizer = library.tokenizer(WORDS)
    patterns = ["(ab|c)+", None, PATTERN, "(ab|c)+"]
    grammars = [pattern and library.regex(pattern, tokenizer) for pattern in patterns]
    together = run(grammars, batch=4, beam_size=beams)
    for request, constraint in enumerate(grammars):
        alone = run(constraint, beam_size=beams, requests=torch.tensor([request]))
        assert found(alone) == found(together, request)
        assert (patterns[request] is None) or all(
            re.fullmatch(patterns[request], text_of(tokens)) for tokens in found(together, request)
        )


def test_grammars_of_both_libraries_in_a_batch():
    grammars = [
        library.regex(PATTERN, library.tokenizer(WORDS, size=size))
        for library, size in zip(LIBRARIES, (V, 50), strict=True)
    ]
    hyps = run(grammars, requests=torch.tensor([0, 0]), batch=2)
    assert found(hyps, 0) == found(hyps, 1)
    same(found(hyps), legal_leaves())


@pytest.mark.parametrize("with_other", [False, True])
def test_a_clone_goes_its_own_way(legal, with_other):
    constraint = fb.AllOf(legal, Even()) if with_other else legal
    search = fb.BeamSearch(6, 6, EOS, constraint=constraint)
    lm, other = TableLM(V, 2), TableLM(V, 3)

    def go_on(state, logits, cache, lm):
        while not state.all_done():
            step = search.step(state, logits)
            logits, cache = lm(step.tokens.flatten(), fb.reorder(cache, step.source_rows))
        return search.finalize(state)

    def begin():
        state = search.init(2)
        logits, cache = lm(torch.arange(2), None)
        for _ in range(2):
            step = search.step(state, logits)
            logits, cache = lm(step.tokens.flatten(), fb.reorder(cache, step.source_rows))
        return state, logits, cache

    state, logits, cache = begin()
    clone, again = state.clone(), state.clone()
    first = go_on(state, logits, cache, lm)
    go_on(clone, -logits, cache, other)
    equal(first, go_on(again, logits, cache, lm))
    equal(first, go_on(*begin(), lm))


class Even:
    """A constraint of a user's own whose state is a tensor: an even number of tokens before EOS."""

    def init(self, batch_size, beam_size, vocab_size, device):
        return torch.zeros(batch_size * beam_size, dtype=torch.int64, device=device)

    def bitmask(self, state):
        return torch.where(state % 2 == 0, -1, ~(1 << EOS)).int()[:, None]

    def advance(self, state, tokens):
        return state + 1


def test_with_another_constraint(legal):
    expected = {tokens: p for tokens, p in legal_leaves(max_length=7).items() if tokens[-1] == EOS and len(tokens) % 2}
    same(found(run(fb.AllOf(legal, Even()), max_length=7)), expected)


@pytest.mark.skipif(not hasattr(fb, "NoRepeatNgram"), reason="no fb.NoRepeatNgram here")
def test_with_no_repeated_ngrams(legal):
    expected = {tokens: p for tokens, p in legal_leaves().items() if len(set(tokens)) == len(tokens)}
    assert 0 < len(expected) < len(legal_leaves())
    same(found(run(fb.AllOf(legal, fb.NoRepeatNgram(1)))), expected)


@pytest.mark.parametrize("rule", [fb.DiverseGroups(3, 0.5), fb.Stochastic(1), fb.Sample(1), fb.DiverseSiblings(0.5)])
def test_with_rules_that_choose_otherwise(legal, rule):
    search = fb.BeamSearch(6, 6, EOS, constraint=legal, selection=rule)
    hyps = fb.decode(search, TableLM(V, 0), torch.arange(3))
    assert hyps.valid.any()
    for request in range(3):
        assert all(text_of(tokens) in LANGUAGE for tokens in found(hyps, request))


@pytest.mark.parametrize("rows", ["[B, V]", "[B, K, V]"])
def test_first_logits_of_one_row_or_of_all(legal, rows):
    search = fb.BeamSearch(4, 3, EOS, constraint=legal)
    state = search.init(2)
    logits = torch.zeros(2, V) if rows == "[B, V]" else torch.zeros(2, 4, V)
    step = search.step(state, logits)
    assert step.valid.sum(1).tolist() == [4, 4]
    assert step.tokens.tolist() == [[2, 3, 4, 5]] * 2


def test_no_room_for_the_shortest_text_is_a_dead_end(library):
    constraint = library.regex("aaaa", library.tokenizer(WORDS))
    search = fb.BeamSearch(3, 2, EOS, constraint=constraint)
    state = search.init(1)
    while not state.all_done():
        search.step(state, torch.zeros(3, V))
    assert not search.finalize(state).valid.any()
    assert state.flags.tolist() == [fb.FLAG_DEAD_END]


# ---------------------------------------------------------------------------------------------------------------------
# arguments


def test_what_is_no_grammar():
    for given in (("a+",), (None,), (object(), object())):
        with pytest.raises(TypeError, match=r"compiled: expected an xgrammar.CompiledGrammar, or a grammar of llg"):
            fb.Grammar(*given)
    with pytest.raises(TypeError, match=r"tokenizer: expected an xgrammar.TokenizerInfo or llguidance.LLTokenizer"):
        fb.Grammar.regex("a+", "gpt2")


def test_a_grammar_that_llguidance_refuses():
    with pytest.raises(ValueError, match="compiled: expected a grammar of llguidance, got 'start: /\\(/': "):
        fb.Grammar("start: /(/", LLGuidance().tokenizer(WORDS))


def test_nothing_is_imported_before_it_is_used():
    code = "import sys, flashbeam; assert not {'xgrammar', 'llguidance', 'transformers'} & {*sys.modules}"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_repr(legal):
    assert repr(legal) in ("Grammar(XGrammar)", "Grammar(LLGuidance)")
    assert isinstance(legal, grammar.Grammar)
