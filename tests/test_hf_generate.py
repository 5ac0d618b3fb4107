"""``generate`` with and without flashbeam: the same sequences and scores."""

import functools
import time
from pathlib import Path

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

import flashbeam as fb
from flashbeam import hf
from flashbeam.expansion import expand
from flashbeam.hf.quick import Quick
from flashbeam.selection.topk import best
from hf_models import EOS, PAD, inputs, model


@functools.cache
def shared(name: str, seed: int = 0):
    return model(name, seed)


def generate(lm, given, ours: bool, **options):
    settings = {
        "num_beams": 4,
        "num_return_sequences": 4,
        "max_new_tokens": 8,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_scores": True,
    }
    custom = {"custom_generate": hf.generate} if ours else {}
    return lm.generate(**given, **(settings | custom | options))


def both(lm, given, **options):
    return generate(lm, given, False, **options), generate(lm, given, True, **options)


def check_same(theirs, ours) -> None:
    """Sequences, scores and the paths of all hypotheses that transformers did not invent."""
    there = theirs.sequences_scores > -1e8
    length = min(theirs.sequences.shape[1], ours.sequences.shape[1])
    assert torch.equal(theirs.sequences[there, :length], ours.sequences[there, :length])
    torch.testing.assert_close(theirs.sequences_scores[there], ours.sequences_scores[there], rtol=1e-4, atol=1e-4)
    steps = min(theirs.beam_indices.shape[1], ours.beam_indices.shape[1])
    assert torch.equal(theirs.beam_indices[there, :steps], ours.beam_indices[there, :steps])
    assert (ours.sequences_scores[~there] == -torch.inf).all()


class EndsWith(StoppingCriteria):
    """Stops behind some tokens, or some pairs of them."""

    def __init__(self, tokens=(), pairs: int = 0):
        self.tokens, self.pairs = torch.tensor(tokens), pairs

    def __call__(self, input_ids, scores, **kwargs):
        if self.pairs:
            return (input_ids[:, -1] + input_ids[:, -2]) % self.pairs == 0
        return torch.isin(input_ids[:, -1], self.tokens)


class Halve(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return scores / 2


SETTINGS = {
    "heuristic": {},
    "filled": {"early_stopping": True, "num_beams": 3, "num_return_sequences": 2},
    "never": {"early_stopping": "never", "length_penalty": 1.5},
    "raw": {"early_stopping": "never", "length_penalty": 0.0},
    "short": {"length_penalty": -1.0},
    "min": {"min_new_tokens": 4},
    "min, never": {"min_new_tokens": 8},
    "min length": {"min_length": 7, "early_stopping": True},
    "repetition": {"repetition_penalty": 1.7},
    "n-gram": {"no_repeat_ngram_size": 2, "min_new_tokens": 3},
    "words": {"bad_words_ids": [[4], [5, 6]]},
    "renormalised": {"renormalize_logits": True, "min_new_tokens": 3},
    "renormalised mask": {"renormalize_logits": True, "suppress_tokens": [4, 5, 6, 7]},
    "several ends": {"eos_token_id": [EOS, 7, 11, 20]},
    "bias": {"sequence_bias": {(9,): 4.0}},
    "forced end": {"forced_eos_token_id": EOS},
    "prefix": {"prefix_allowed_tokens_fn": lambda request, ids: [EOS, 4, 5, 6, 7 + request]},
    "own": {"logits_processor": LogitsProcessorList([Halve()])},
    "wide": {"num_beams": 16, "num_return_sequences": 5},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_same_as_transformers(name: str, settings) -> None:
    lm = shared(name)
    check_same(*both(lm, inputs(name), **settings))


@pytest.mark.parametrize("name", ["gpt2", "mistral", "mamba", "bart"])
@pytest.mark.parametrize("seed", [1, 2])
def test_same_for_other_models(name: str, seed: int) -> None:
    for settings in ({}, {"early_stopping": True, "no_repeat_ngram_size": 2}):
        check_same(*both(model(name, seed), inputs(name), **settings))


CRITERIA = {"tokens": EndsWith([4, 9, 20, 33]), "most": EndsWith(range(10, 30)), "pairs": EndsWith(pairs=5)}


@pytest.mark.parametrize("criterion", CRITERIA.values(), ids=CRITERIA.keys())
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_criteria_end_hypotheses(name: str, criterion) -> None:
    lm = shared(name)
    for settings in (
        {},
        {"early_stopping": True},
        {"early_stopping": "never", "length_penalty": 1.5},
        {"no_repeat_ngram_size": 2, "eos_token_id": [EOS, 7, 11]},
    ):
        check_same(*both(lm, inputs(name), stopping_criteria=StoppingCriteriaList([criterion]), **settings))


def test_time_is_up() -> None:
    lm, given = shared("llama"), inputs("llama")
    check_same(generate(lm, given, False, max_new_tokens=1), generate(lm, given, True, max_time=1e-9))


@pytest.mark.parametrize(
    "settings", [{}, {"no_repeat_ngram_size": 2}, {"repetition_penalty": 2.0, "min_new_tokens": 3}]
)
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_one_beam_is_greedy(name: str, settings) -> None:
    theirs, ours = both(shared(name), inputs(name), num_beams=1, num_return_sequences=1, **settings)
    assert torch.equal(theirs.sequences, ours.sequences)


@pytest.mark.parametrize("settings", [{}, {"min_new_tokens": 3}, {"no_repeat_ngram_size": 2}])
def test_greedy_scores_are_processed_logits(settings) -> None:
    theirs, ours = both(shared("gpt2"), inputs("gpt2"), num_beams=1, num_return_sequences=1, **settings)
    theirs, ours = theirs.scores[:3], ours.scores[:3]  # until a request is done
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_scores_tell_of_what_the_search_does_itself() -> None:
    lm = shared("gpt2", 1)
    settings = {"min_new_tokens": 3, "renormalize_logits": True, "num_beams": 2, "num_return_sequences": 2}
    theirs, ours = both(lm, inputs("gpt2"), **settings)
    check_same(theirs, ours)
    assert (ours.scores[0][:, EOS] == -torch.inf).all()
    pair = [lm.compute_transition_scores(each.sequences, each.scores, each.beam_indices) for each in (theirs, ours)]
    torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "settings",
    [
        {"length_penalty": 0.0, "no_repeat_ngram_size": 2},
        {"length_penalty": 0.7, "exponential_decay_length_penalty": (2, 1.5)},
    ],
)
def test_never_stops_where_transformers_does(settings) -> None:
    ends = [EOS, 5, 11, 12, 13, 14, 15, 16]
    options = {"early_stopping": "never", "max_new_tokens": 14, "eos_token_id": ends, **settings}
    theirs, ours = both(shared("mistral", 3), inputs("mistral"), **options)
    check_same(theirs, ours)
    assert len(theirs.scores) == len(ours.scores) < 14


@pytest.mark.parametrize("name", ["gpt2", "bart"])
def test_all_outputs(name: str) -> None:
    lm = shared(name)
    lm.set_attn_implementation("eager")
    wanted = {"output_attentions": True, "output_hidden_states": True, "output_logits": True}
    theirs, ours = both(lm, inputs(name), no_repeat_ngram_size=2, early_stopping=True, **wanted)
    assert type(theirs) is type(ours)
    assert set(theirs) == set(ours)
    for field in set(theirs) - {"cache", "past_key_values", "sequences", "sequences_scores", "beam_indices"}:
        pairs = zip(_leaves(theirs[field]), _leaves(ours[field]), strict=True)
        assert [x.shape for x, _ in pairs if x.shape != _.shape] == [], field
    transitions = [
        lm.compute_transition_scores(each.sequences, each.scores, each.beam_indices, normalize_logits=False)
        for each in (theirs, ours)
    ]
    torch.testing.assert_close(*transitions, rtol=1e-4, atol=1e-4)
    length = ours.sequences.shape[1]
    assert torch.equal(
        generate(lm, inputs(name), True, return_dict_in_generate=False), both(lm, inputs(name))[0].sequences
    )
    assert length == theirs.sequences.shape[1]


def _leaves(node):
    if isinstance(node, torch.Tensor):
        return [node]
    return [] if node is None else [leaf for child in node for leaf in _leaves(child)]


def test_prompts_run_once() -> None:
    lm, rows = shared("llama"), []
    hook = lm.register_forward_hook(
        lambda module, args, kwargs, out: rows.append(out.logits.shape[0]), with_kwargs=True
    )
    generate(lm, inputs("llama"), True)
    hook.remove()
    assert rows[0] == 2
    assert set(rows[1:]) == {8}


def test_other_searches() -> None:
    lm, given = shared("llama"), inputs("llama")
    groups = generate(lm, given, True, selection=fb.DiverseGroups(2, 50.0), early_stopping=True)
    first = groups.sequences.view(2, 4, -1)[:, :, 4]
    assert all(len(set(row)) > 1 for row in first.tolist())
    trie = fb.Trie([[7, 8], [7, 9, 10], [11]])
    found = generate(lm, given, True, constraint=trie)
    items = [[token for token in row[4:] if token != EOS and token != PAD] for row in found.sequences.tolist()]
    assert sorted(items[:4]) == sorted(items[4:]) == [[], [7, 8], [7, 9, 10], [11]]
    assert (found.sequences_scores == -torch.inf).sum() == 2
    sample = functools.partial(generate, lm, given, True, selection=fb.Stochastic(seed=5), request_ids=[3, 3])
    once, again = sample(), sample()
    assert torch.equal(once.sequences, again.sequences)
    assert len(set(map(tuple, once.sequences[:4].tolist()))) == 4
    warped = sample(do_sample=True, top_k=2)
    two = torch.stack([shared("llama")(given["input_ids"][:1]).logits[0, -1].topk(2).indices])
    assert torch.isin(warped.sequences[:4, 4], two).all()


def test_constraints_that_ask_more_of_the_rule() -> None:
    lm, given = shared("llama"), inputs("llama")
    phrases = fb.Phrases([[11, 12], [20], [31, 7]])  # found by beams of every progress
    found = generate(lm, given, True, constraint=phrases, stopping=fb.Exhausted())
    search = fb.BeamSearch(4, 8, EOS, pad_id=PAD, constraint=phrases, stopping=fb.Exhausted())
    hyps = hf.beam_search(lm, given, search)
    assert torch.equal(found.sequences[:, 4:], hyps.tokens.flatten(0, 1)[:, : found.sequences.shape[1] - 4])
    assert hyps.valid[:, 0].all()
    veto = fb.SuffixVeto([[4, 5, 6, 7]], 2)
    generate(lm, given, True, constraint=veto)


def test_own_search() -> None:
    lm, given = shared("llama"), inputs("llama")
    search = fb.BeamSearch(6, 8, EOS, pad_id=PAD, length_penalty=0.5, stopping=fb.Exhausted())
    found = generate(lm, given, True, search=search, num_return_sequences=2)
    hyps = hf.beam_search(lm, given, search, num_hypotheses=2)
    assert torch.equal(found.sequences[:, 4:], hyps.tokens.flatten(0, 1)[:, : found.sequences.shape[1] - 4])
    torch.testing.assert_close(found.sequences_scores, hyps.scores.flatten())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [33, 96, 1000])
def test_quick_candidates_are_the_best(vocab: int, dtype: torch.dtype) -> None:
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        search = fb.BeamSearch(3, 9, [2, 5], stopping=fb.Exhausted())
        state, alone, quick = search.init(3), search.init(1), Quick()
        for number in range(4):
            rows = 3 if number == 0 else 9
            logits = torch.randn(rows, vocab, generator=generator).mul_(4).to(dtype)
            # of the last request: a row with NaN, one that ties, one with few candidates
            if seed % 4 == 0:
                logits[-1, seed % 3] = torch.nan
            elif seed % 4 == 1:
                logits[-1] = 1.0
            elif seed % 4 == 2:
                logits[-1, 4:] = -torch.inf
            else:  # groups whose maxima are EOS
                logits[:, [2, 5]] += 20
            expansion = expand(search, state, logits, None, None, {}).expansion
            ours, theirs = quick.find(expansion, 7).candidates, best(expansion, 7).candidates
            live = ~state.done
            for field in ("tokens", "parents", "adjusted"):
                assert torch.equal(getattr(ours, field)[live], getattr(theirs, field)[live])
            torch.testing.assert_close(ours.log_probs[live], theirs.log_probs[live], rtol=1e-6, atol=1e-5)
            assert torch.equal(ours.flags[expansion.active], theirs.flags[expansion.active])
            # bit for bit what the first request has alone
            given = logits[: rows // 3]
            one = Quick().find(expand(search, alone, given, None, None, {}).expansion, 7).candidates
            assert all(torch.equal(x[: len(y)], y) for x, y in zip(ours, one, strict=True))
            search.step(state, logits)
            search.step(alone, given)


REFUSED = {
    "do_sample: expected False, or a selection that samples": {"do_sample": True},
    "search: expected a max_length of at most the new tokens of generate, 8, got 9": {
        "search": fb.BeamSearch(4, 9, EOS)
    },
    "search: expected a max_length of at most the new tokens of generate, 8, got 24; pass max_new_tokens=24": {
        "search": fb.BeamSearch(4, lambda n: n + 20, EOS)
    },
    "search: expected an fb.BeamSearch, got str": {"search": "x"},
    "progress: expected a function or None, got int": {"progress": 3},
    "low_memory: expected None or False": {"low_memory": True},
    "selection: expected None beside search": {"search": fb.BeamSearch(4, 8, EOS), "selection": fb.TopK()},
    "tokenizer: expected one for stop_strings": {"stop_strings": ["x"]},
    "guidance_scale: expected processors that look at sequences": {"guidance_scale": 2.0},
    r"stopping_criteria: expected lengths, EOS and times with fb.DiverseGroups, got \['EndsWith'\]": {
        "selection": fb.DiverseGroups(2, 1.0),
        "stopping_criteria": StoppingCriteriaList([EndsWith([4])]),
    },
}


@pytest.mark.parametrize("message", REFUSED)
def test_refuses(message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        generate(shared("llama"), inputs("llama"), True, **REFUSED[message])


def test_bench_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "bench")
    import run_hf

    shape = next(iter(run_hf.TINY))
    result = run_hf.measure(shape, 2, time.process_time)
    assert result["steps"] <= shape.steps
    facts = {name: 1 for name in ("device", "cores", "threads", "torch", "date", "load_average", "modified")}
    document = {"provenance": {**facts, "commit": None}, "transformers": "", "rounds": 2, "clock": ""}
    run_hf.report({**document, "steps": [result], "targets": [None], "whole": [result]})
    assert "decode logic" in capsys.readouterr().out
