"""Random constraints beside their oracles, and the loop that searches with them."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

import flashbeam as fb
from constraint_oracles import (
    Anything,
    Begins,
    Contains,
    ContainsNone,
    Copied,
    Items,
    Matches,
    NoLongSpan,
    NoNgramTwice,
    Penalised,
    Rule,
    Setting,
    Together,
    Words,
    enumerate_legal,
)
from oracles import TableLM

FIELDS = ["tokens", "lengths", "scores", "log_probs", "token_log_probs", "valid", "finished"]
LETTERS = "abcdefgh"


# ---------------------------------------------------------------------------------------------------------------------
# random constraints: (oracle, constraint)


def some_tokens(rng, setting: Setting, least: int, most: int, letters: int | None = None) -> list[int]:
    """A list of tokens that are not EOS; few ``letters`` make overlaps common."""
    others = [t for t in range(setting.vocab) if t not in setting.eos][:letters]
    return [others[i] for i in rng.integers(len(others), size=rng.integers(least, most + 1))]


def trie(rng, setting):
    items = [some_tokens(rng, setting, 0, setting.max_length + 1) for _ in range(rng.integers(1, 12))]
    items += [item[: rng.integers(len(item) + 1)] for item in items[::3]]  # beginnings of others, and the empty one
    return Items(items), fb.Trie(items)


def csr(edges: dict[tuple[int, int], int], states: int, rng=None):
    """indptr, tokens, targets; the edges of a state in any order."""
    by_state = [[(t, to) for (s, t), to in sorted(edges.items()) if s == state] for state in range(states)]
    if rng is not None:
        by_state = [[row[i] for i in rng.permutation(len(row))] for row in by_state]
    indptr = np.cumsum([0, *map(len, by_state)]).tolist()
    return indptr, [t for row in by_state for t, _ in row], [to for row in by_state for _, to in row]


def automaton(rng, setting):
    states = int(rng.integers(1, 7))
    others = [t for t in range(setting.vocab) if t not in setting.eos]
    dense = rng.choice([0.4, 0.8])
    edges = {(s, t): int(rng.integers(states)) for s in range(states) for t in others if rng.random() < dense}
    accepting, start = rng.random(states) < 0.4, int(rng.integers(states))
    rule = Words(edges, frozenset(np.flatnonzero(accepting).tolist()), start)
    return rule, fb.Automaton(*csr(edges, states, rng), accepting.tolist(), start=start)


PATTERNS = [
    "[ab]+",
    "a*b?",
    "(a|bb)+c?",
    "(ab|ba)*",
    ".{2,3}",
    "a(b|c)*a",
    "(?:a|ab)(?:c|bcd)?",
    "[^a]+|a",
    "b{2}|c{0,4}",
]


def regex(rng, setting):
    vocabulary = [
        None if t in setting.eos else "".join(rng.choice(list("abc"), size=rng.integers(1, 3)))
        for t in range(setting.vocab)
    ]
    for pattern in rng.permutation(PATTERNS).tolist():  # one that the vocabulary can match at all
        rule = Matches(pattern, vocabulary)
        wide = Setting(setting.vocab, 5, setting.eos)
        if any(rule.legal(leaf, leaf[-1] in setting.eos, wide) for leaf in wide.leaves()):
            break
    return rule, fb.Automaton.from_regex(pattern, vocabulary)


def phrases(rng, setting):
    letters = int(rng.integers(1, 4))

    def word():
        return some_tokens(rng, setting, 1, 3, letters)

    given = [
        [word() for _ in range(rng.integers(1, 4))] if rng.random() < 0.3 else word() for _ in range(rng.integers(1, 4))
    ]
    ordered = bool(rng.random() < 0.4)
    return Contains(given, ordered), fb.Phrases(given, ordered=ordered)


def forbidden(rng, setting):
    given = [some_tokens(rng, setting, 1 + (rng.random() < 0.7), 3) for _ in range(rng.integers(1, 6))]
    return ContainsNone(given), fb.ForbiddenPhrases(given)


def ngram(rng, setting):
    n = int(rng.integers(1, 4))
    return NoNgramTwice(n), fb.NoRepeatNgram(n)


def prefix(rng, setting):
    given = some_tokens(rng, setting, 0, setting.max_length + 1)
    return Begins(given), fb.Prefix(given)


def suffix_veto(rng, setting):
    documents, longest = [some_tokens(rng, setting, 1, 12) for _ in range(rng.integers(1, 5))], int(rng.integers(1, 4))
    corpus = documents if len(documents) > 1 else documents[0]
    return NoLongSpan(documents, longest), fb.SuffixVeto(corpus, longest)


def copied(rng, setting):
    source, monotone, least = some_tokens(rng, setting, 2, 9), bool(rng.random() < 0.5), int(rng.integers(1, 4))
    return Copied(source, monotone, least), fb.Copy(source, monotone=monotone, min_span=least)


def penalty(rng, setting):
    given = float(rng.choice([0.7, 1.3, 3.0]))
    return Penalised(given), fb.RepetitionPenalty(given)


def nothing(rng, setting):
    return Anything(), None


KINDS = {
    "trie": trie,
    "automaton": automaton,
    "regex": regex,
    "phrases": phrases,
    "forbidden": forbidden,
    "ngram": ngram,
    "prefix": prefix,
    "suffix_veto": suffix_veto,
    "copy": copied,
    "penalty": penalty,
}


def all_of(kinds, rng, setting):
    parts = [KINDS[kind](rng, setting) for kind in kinds]
    return Together([rule for rule, _ in parts]), fb.AllOf(*[constraint for _, constraint in parts])


# ---------------------------------------------------------------------------------------------------------------------
# searching


def search_with(model, constraint, setting: Setting, prompts=(0,), ids=None, num=None, **options):
    """The loop of the contract; returns ``(hyps, state)``."""
    eos = list(setting.eos) if len(setting.eos) != 1 else setting.eos[0]
    search = fb.BeamSearch(
        max_length=setting.max_length,
        min_length=setting.min_length,
        eos_id=eos if setting.eos else None,
        constraint=constraint,
        **{"length_penalty": 0, **options},
    )
    state = search.init(len(prompts), request_ids=ids)
    tokens, cache = torch.tensor(prompts), None
    while not state.all_done():
        logits, cache = model(tokens, cache)
        before = logits.clone()
        step = search.step(state, logits)
        assert torch.equal(before, logits), "the user's logits were modified"
        tokens, cache = step.tokens.flatten(), fb.reorder(cache, step.source_rows)
    return search.finalize(state, num), state


def listed(hyps, request=0):
    """The valid hypotheses, best first: ``[(tokens, finished)]``."""
    n = int(hyps.valid[request].sum())
    assert hyps.valid[request, :n].all(), "valid hypotheses come first"
    lengths, finished = hyps.lengths[request].tolist(), hyps.finished[request].tolist()
    return [(tuple(t[: lengths[i]]), finished[i]) for i, t in enumerate(hyps.tokens[request, :n].tolist())]


def assert_legal(hyps, request, rule: Rule, setting: Setting):
    """Every hypothesis is whole and legal; returns how many there are."""
    found = listed(hyps, request)
    for tokens, finished in found:
        assert finished == (tokens[-1] in setting.eos)
        assert finished or len(tokens) == setting.max_length
        assert not any(token in setting.eos for token in tokens[:-1])
        assert len(tokens) >= setting.min_length or not finished
        assert rule.legal(tokens, finished, setting), tokens
    return len(found)


def assert_exactly(hyps, state, request, want, setting: Setting):
    """The hypotheses are those of ``want`` and no others, with the same log-probabilities, best first."""
    found = listed(hyps, request)
    assert Counter(tokens for tokens, _ in found) == Counter(want.log_probs.keys())
    for i, (tokens, finished) in enumerate(found):
        assert finished == (tokens[-1] in setting.eos)
        assert float(hyps.log_probs[request, i]) == pytest.approx(want.log_probs[tokens], abs=1e-5)
        steps = hyps.token_log_probs[request, i, : len(tokens)].tolist()
        assert steps == pytest.approx(want.token_log_probs[tokens], abs=1e-5)
        assert (hyps.tokens[request, i, len(tokens) :] == 0).all()
    scores = hyps.scores[request, : len(found)]
    assert torch.equal(scores, hyps.log_probs[request, : len(found)]) and (scores.diff() <= 0).all()
    assert not hyps.valid[request, len(found) :].any()
    assert (hyps.scores[request, len(found) :] == -torch.inf).all()
    assert bool(state.flags[request] & fb.FLAG_DEAD_END) == (not found)
    assert not state.flags[request] & ~fb.FLAG_DEAD_END


def assert_enumerates(cases, setting: Setting, seed: int, *, normalize="vocab", temperature=1.0, spare=0, **options):
    """One search of all requests, each with beams for everything it may say, against enumeration of each."""
    model = TableLM(setting.vocab, seed)
    wants = [
        enumerate_legal(model.logits, bos, rule, setting, normalize=normalize, temperature=temperature)
        for bos, (rule, _) in enumerate(cases)
    ]
    hyps, state = search_with(
        model,
        [constraint for _, constraint in cases],
        setting,
        range(len(cases)),
        beam_size=[want.widest + spare for want in wants],
        stopping=fb.Exhausted(),
        normalize=normalize,
        temperature=temperature,
        **options,
    )
    for request, want in enumerate(wants):
        assert_exactly(hyps, state, request, want, setting)
    return wants


def assert_same_bits(one, other, request, there, num=None, length=None):
    """Request ``request`` of one result is bitwise request ``there`` of the other."""
    for name in FIELDS:
        a, b = getattr(one, name)[request], getattr(other, name)[there]
        n = min(a.shape[0], b.shape[0])
        assert torch.equal(torch.nan_to_num(a[:n], nan=123.0), torch.nan_to_num(b[:n], nan=123.0)), name
