"""``hf.beam_search``: every hypothesis is worth what the model says without a cache; what is shown on the way."""

import functools
import io
import itertools
import subprocess
import sys

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    DynamicCache,
    LogitsProcessorList,
    NoRepeatNGramLogitsProcessor,
    PreTrainedTokenizerFast,
    TextStreamer,
    cache_utils,
)

import flashbeam as fb
from flashbeam import hf
from hf_models import EOS, PAD, VOCAB, check_scores, inputs, model
from peers import CACHE

SEARCH = fb.BeamSearch(4, 8, EOS, pad_id=PAD)
STATIC, WITHOUT = {"cache_implementation": "static"}, {"use_cache": False}
QUANTIZED = {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}}
# a kind of cache each
CACHES = [
    ("gpt2", {}),
    ("llama", STATIC),
    ("llama", WITHOUT),
    ("mistral", {}),
    ("mistral", STATIC),
    ("bamba", {}),
    ("mamba", {}),
    ("t5", STATIC),
    ("bart", {}),
    ("whisper", {}),
    ("rwkv", WITHOUT),
]


@functools.cache
def shared(name: str):
    return model(name)


@pytest.mark.parametrize("name,options", CACHES, ids=lambda value: value if isinstance(value, str) else "-".join(value))
def test_states_follow_their_beams(name: str, options) -> None:
    lm, given = shared(name), inputs(name)
    if name in ("mamba", "bamba", "rwkv"):  # states run over padding
        given = {field: value[:1] for field, value in given.items()}
    hyps = hf.beam_search(lm, given, SEARCH, **options)
    moved = hyps.slots[:, :, 1:].diff(dim=2)
    assert ((moved != 0) & (hyps.slots[:, :, 2:] >= 0)).any()  # else nothing had to follow
    check_scores(lm, given, hyps)


REFUSED = {
    "recurrent_gemma": "model: expected one whose states are in its cache, got RecurrentGemmaForCausalLM, which keeps",
    "rwkv": "cache: expected one that can be trusted, got that of RwkvForCausalLM: passes over several rows",
    "minimax": r"cache.linear_cache\[0\]: expected a state that follows the beams in MiniMaxForCausalLM, got one that",
}


@pytest.mark.parametrize("name,message", REFUSED.items(), ids=REFUSED)
def test_states_that_do_not_follow_are_refused(name: str, message: str) -> None:
    given = inputs("gpt2")
    with pytest.raises(TypeError, match=f"{message}.*; pass use_cache=False"):
        hf.beam_search(shared(name), given, SEARCH)
    one = fb.BeamSearch(1, 4, EOS, pad_id=PAD)
    hf.beam_search(shared(name), given, one)  # nothing to follow


def test_part_of_a_cache_stays_behind() -> None:
    class Kept(DynamicCache):
        state = None

        def update(self, keys, values, *args, **kwargs):
            self.state = keys
            return super().update(keys, values, *args, **kwargs)

    lm = shared("llama")
    with pytest.raises(TypeError, match=r"cache.state: expected a state that follows the beams in LlamaForCausalLM"):
        hf.beam_search(lm, inputs("llama"), SEARCH, **{CACHE: Kept(config=lm.config)})


def test_quantized_caches() -> None:
    # what is quantized is not what one pass says: compare with transformers, whose caches are quantized alike
    lm, given = shared("llama"), inputs("llama")
    if not hasattr(cache_utils, "Fp8QuantizedLayer"):
        pytest.skip("quantized in 8 bits from transformers 5.21 on")
    options = {"num_beams": 4, "max_new_tokens": 8, "num_return_sequences": 4, "do_sample": False, **QUANTIZED}
    theirs = lm.generate(**given, **options)
    assert torch.equal(theirs, lm.generate(**given, **options, custom_generate=hf.generate))


def test_prompts_continue_a_cache() -> None:
    lm, given = shared("llama"), {"input_ids": torch.tensor([[7, 8, 9, 10], [4, 4, 5, 6]])}
    ids = given["input_ids"]
    options = {"num_beams": 4, "max_new_tokens": 8, "num_return_sequences": 4, "do_sample": False}
    expected = lm.generate(ids, **options)
    search = fb.BeamSearch(4, 8, EOS, pad_id=PAD, stopping=fb.BestLive())
    for rows in (1, 4):
        cache = DynamicCache(config=lm.config)
        with torch.no_grad():
            lm(ids[:, :2].repeat_interleave(rows, 0), **{CACHE: cache})
        if rows == 1:
            hyps = hf.beam_search(lm, given, search, **{CACHE: cache})
            assert torch.equal(hyps.tokens.flatten(0, 1)[:, : expected.shape[1] - 4], expected[:, 4:])
        else:  # transformers asks for rows of the beams
            found = lm.generate(ids, **options, **{CACHE: cache}, custom_generate=hf.generate)
            assert torch.equal(found, expected)


def test_caches_made_for_other_rows() -> None:
    lm, given = shared("llama"), inputs("llama")
    options = {"num_beams": 4, "max_new_tokens": 8, "num_return_sequences": 4, "do_sample": False, **STATIC}
    options["prefill_chunk_size"] = 2  # then caches are made before the prompt is run
    expected = lm.generate(**given, **options)
    assert torch.equal(lm.generate(**given, **options, custom_generate=hf.generate), expected)


@pytest.mark.parametrize("name", ["llama", "bart"])
def test_padding_changes_nothing(name: str) -> None:
    lm, given = shared(name), inputs(name)
    together = hf.beam_search(lm, given, SEARCH)
    ids = given["input_ids"]
    for request in range(2):
        kept = given["attention_mask"][request].bool()
        alone = hf.beam_search(lm, ids[request, kept][None], SEARCH)
        assert torch.equal(alone.tokens[0], together.tokens[request])
        torch.testing.assert_close(alone.scores[0], together.scores[request], rtol=1e-4, atol=1e-4)


def test_requests_that_differ() -> None:
    lm, given = shared("bart"), inputs("bart")
    search = fb.BeamSearch([3, 2], lambda n: n + 1, EOS, pad_id=PAD, length_penalty=[0.0, 1.0])
    hyps = hf.beam_search(lm, given, search)
    assert hyps.valid.tolist() == [[True] * 3, [True, True, False]]
    assert int(hyps.lengths[0].max()) <= 5
    assert int(hyps.lengths[1].max()) <= 3
    check_scores(lm, given, hyps)


def test_processors_and_constraints() -> None:
    lm, given = shared("llama"), inputs("llama")
    search = fb.BeamSearch(4, 8, EOS, pad_id=PAD, constraint=fb.NoRepeatNgram(1), min_length=5)
    processed = hf.beam_search(
        lm, given, search, logits_processor=LogitsProcessorList([NoRepeatNGramLogitsProcessor(2)])
    )
    check_scores(lm, given, processed)  # log-probabilities stay the model's
    for row in processed.tokens[processed.valid].tolist():
        assert len(set(row) - {PAD}) == len([token for token in row if token != PAD])


def test_processors_of_the_config() -> None:
    lm, given = shared("llama"), inputs("llama")
    options = {"repetition_penalty": 1.5, "prefix_allowed_tokens_fn": lambda request, ids: [EOS, 5, 6, 7, 8 + request]}
    search = fb.BeamSearch(4, 8, EOS, pad_id=PAD, stopping=fb.BestLive())
    hyps = hf.beam_search(lm, given, search, **options)
    options |= {"num_beams": 4, "num_return_sequences": 4, "max_new_tokens": 8, "do_sample": False}
    theirs = lm.generate(**given, **options)[:, 4:]
    assert torch.equal(hyps.tokens.flatten(0, 1)[:, : theirs.shape[1]], theirs)


def test_samples() -> None:
    lm, given = shared("gpt2"), inputs("gpt2")
    search = fb.BeamSearch(5, 6, EOS, pad_id=PAD, selection=fb.Stochastic(seed=1))
    check_scores(lm, given, hf.beam_search(lm, given, search))
    stop = [EndsOn(9), EndsOn(11)]
    hyps = hf.beam_search(lm, given, search, stopping_criteria=stop)
    stopped = torch.isin(hyps.tokens, torch.tensor([9, 11]))
    assert stopped.any()
    assert (stopped.nonzero()[:, 2] == hyps.lengths[tuple(stopped.nonzero()[:, :2].T)] - 1).all()
    assert hyps.finished[stopped.any(2)].all()


class EndsOn:
    def __init__(self, token: int):
        self.token = token

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids[:, -1] == self.token


class EndsOnAny(EndsOn):
    def __call__(self, input_ids, scores, **kwargs):
        return torch.isin(input_ids[:, -1], torch.tensor(self.token))


RULES = [
    fb.FirstFinished(),
    *(fb.Patience(0.5, overflow) for overflow in ("never", "last", "step")),
    fb.Shrinking(),
    fb.BestFinished(2),
    fb.BestLive(),
    fb.Exact(),
]


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_criterion_ends_as_eos_does(rule) -> None:
    ends, never = [2, 7, 9, 23, 37, 13], [38, 39]
    for seed, length in ((0, 9), (0, 4), (3, 4)):
        lm, given = model("gpt2", seed), inputs("gpt2")
        search = functools.partial(fb.BeamSearch, 4, length, pad_id=PAD, stopping=rule)
        expected = hf.beam_search(lm, given, search([*ends, *never]))
        found = hf.beam_search(lm, given, search(never), stopping_criteria=[EndsOnAny(ends)])
        for field in ("tokens", "lengths", "valid", "finished", "exact"):
            assert torch.equal(getattr(found, field), getattr(expected, field)), field
        torch.testing.assert_close(found.scores, expected.scores, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("asked", [{"bad_words_ids": [[23]]}, {"sequence_bias": {(9,): 4.0}}], ids=list)
def test_bounds_beside_processors(asked) -> None:
    lm, given = model("gpt2", 1), inputs("gpt2")
    search = functools.partial(fb.BeamSearch, 4, 12, [2, 5, 7, 9, 21, 29, 37], pad_id=PAD, length_penalty=0.0)
    options = {"stopping_criteria": [EndsOn(13)], **asked}
    whole = hf.beam_search(lm, given, search(stopping=fb.Exhausted()), **options)
    steps: list[int] = []
    count = {"progress": lambda step, state: steps.append(step)}
    exact = hf.beam_search(lm, given, search(stopping=fb.Exact()), **options, **count)
    assert torch.equal(exact.tokens, whole.tokens)
    assert exact.exact.all()
    assert (steps[-1] < 12) == ("bad_words_ids" in asked)  # a bias may raise scores yet


@pytest.mark.parametrize("rule", [fb.DiverseGroups(1, 0.0), fb.DiverseSiblings(0.0)], ids=str)
def test_bans_do_not_renormalise(rule) -> None:
    lm, given, words = model("gpt2", 1), inputs("gpt2"), [[23], [37]]
    search = functools.partial(fb.BeamSearch, 4, 8, EOS, pad_id=PAD, selection=rule)
    banned = hf.beam_search(lm, given, search(), bad_words_ids=words)
    check_scores(lm, given, banned)
    expected = hf.beam_search(lm, given, search(constraint=fb.ForbiddenPhrases(words)))
    assert torch.equal(banned.tokens, expected.tokens)


def test_one_beam_has_the_models_log_probs() -> None:
    lm, given = model("gpt2", 1), inputs("gpt2")
    one = fb.BeamSearch(1, 8, EOS, pad_id=PAD)
    check_scores(lm, given, hf.beam_search(lm, given, one, repetition_penalty=1.5, no_repeat_ngram_size=2))


@pytest.mark.parametrize("finished", ["pool", "in_place"])
def test_what_is_cut_short_is_not_exact(finished: str) -> None:
    lm, given = shared("gpt2"), inputs("gpt2")
    search = functools.partial(fb.BeamSearch, 4, eos_id=EOS, pad_id=PAD, stopping=fb.Exhausted(), finished=finished)
    assert not hf.beam_search(lm, given, search(max_length=9), max_time=1e-9).exact.any()
    assert hf.beam_search(lm, given, search(max_length=1), max_time=1e-9).exact.all()


@functools.cache
def characters() -> PreTrainedTokenizerFast:
    letters = ["<pad>", "<bos>", "<eos>", "<none>", *"abcdefghijklmnopqrstuvwxyz0123456789"]
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    assert tokenizer.get_vocab_size() == VOCAB
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")


def test_stop_strings() -> None:
    lm, given, tokenizer = shared("llama"), inputs("llama"), characters()
    options = {"num_beams": 4, "num_return_sequences": 4, "max_new_tokens": 8, "do_sample": False}
    plain = lm.generate(**given, **options)
    texts = tokenizer.batch_decode(plain[:, 4:], skip_special_tokens=True)
    stops = [texts[0][1:3], texts[4][2:4]]
    theirs = lm.generate(**given, **options, stop_strings=stops, tokenizer=tokenizer)
    custom = functools.partial(hf.generate, tokenizer=tokenizer)
    ours = lm.generate(**given, **options, stop_strings=stops, custom_generate=custom)
    assert torch.equal(theirs, ours)
    assert not torch.equal(plain[:, : ours.shape[1]], ours)


class Seen(TextStreamer):
    def __init__(self):
        self.put_so_far, self.ended = [], False

    def put(self, value):
        self.put_so_far += value.flatten().tolist()

    def end(self):
        self.ended = True


def test_streamers_see_what_is_settled() -> None:
    lm, given = model("llama", 3), inputs("llama")
    given = {field: value[:1] for field, value in given.items()}
    seen, lengths = Seen(), []
    search = fb.BeamSearch(4, 12, EOS, pad_id=PAD)
    hyps = hf.beam_search(
        lm, given, search, streamer=seen, progress=lambda steps, state: lengths.append(len(seen.put_so_far))
    )
    assert seen.put_so_far == [*given["input_ids"][0].tolist(), *hyps.tokens[0, 0, : hyps.lengths[0, 0]].tolist()]
    assert seen.ended
    assert lengths[0] == 4 < lengths[-1]
    with pytest.raises(ValueError, match="streamer: expected one request, got 2"):
        hf.beam_search(lm, inputs("llama"), search, streamer=seen)


def test_spare_beams_are_not_settled() -> None:
    dialect = fb.Dialect(finishes="double", at_max_length="spare")
    search = fb.BeamSearch(4, 10, [2, 5, 6], pad_id=PAD, dialect=dialect, stopping=fb.Exact())
    for seed in range(6):
        lm, seen = model("gpt2", seed), Seen()
        given = {field: value[:1] for field, value in inputs("gpt2").items()}
        hyps = hf.beam_search(lm, given, search, streamer=seen)
        best = hyps.tokens[0, 0, : hyps.lengths[0, 0]].tolist()
        assert seen.put_so_far == [*given["input_ids"][0].tolist(), *best]


def test_the_best_is_rewritten() -> None:
    lm, file = model("llama", 3), io.StringIO()
    given = {field: value[:1] for field, value in inputs("llama").items()}
    streamer = hf.BestStreamer(characters(), file, skip_special_tokens=True)
    texts: list[str] = []
    hyps = hf.beam_search(
        lm, given, SEARCH, streamer=streamer, progress=lambda steps, state: texts.append(streamer.shown)
    )
    best = characters().decode(hyps.tokens[0, 0, : hyps.lengths[0, 0]], skip_special_tokens=True)
    assert texts[-1] == best
    assert any(not now.startswith(before) for before, now in itertools.pairwise(texts))
    assert "\r\x1b[J" in file.getvalue()


def test_progress_may_stop() -> None:
    lm, given, steps = shared("gpt2"), inputs("gpt2"), []
    hyps = hf.beam_search(lm, given, SEARCH, progress=lambda count, state: steps.append(count) or count == 3)
    assert steps == [1, 2, 3]
    assert int(hyps.lengths.max()) == 3


def test_refuses_what_is_no_search() -> None:
    with pytest.raises(TypeError, match=r"search: expected an fb.BeamSearch, got int"):
        hf.beam_search(shared("gpt2"), inputs("gpt2"), 4)
    with pytest.raises(ValueError, match="num_beams: expected nothing beside search, which says that, got 3"):
        hf.beam_search(shared("gpt2"), inputs("gpt2"), SEARCH, num_beams=3)
    with pytest.raises(TypeError, match="progress: expected a function or None, got int"):
        hf.beam_search(shared("gpt2"), inputs("gpt2"), SEARCH, progress=3)
    double = fb.BeamSearch(4, 8, EOS, pad_id=PAD, dialect=fb.Dialect(finishes="double"))
    with pytest.raises(ValueError, match="dialect: expected finishes='beam' beside logits processors and"):
        hf.beam_search(shared("gpt2"), inputs("gpt2"), double, no_repeat_ngram_size=2)
    terms = fb.BeamSearch(4, 8, EOS, pad_id=PAD, terms=fb.TokenReward(0.1))
    with pytest.raises(ValueError, match="terms: expected none beside logits processors and"):
        hf.beam_search(shared("gpt2"), inputs("gpt2"), terms, no_repeat_ngram_size=2)


def test_flashbeam_is_imported_without_transformers() -> None:
    code = "import sys, flashbeam; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
