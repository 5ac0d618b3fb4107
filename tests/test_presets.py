"""The presets beside their peers: n-best sequences and scores, over seeds, shapes and grids of settings.

transformers and CTranslate2 run live, on the same random networks; fairseq's own generator too where its sources are;
fairseq, vLLM and T5X as restated in ``peer_oracles``.
"""

from functools import cache
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

import flashbeam as fb
import peer_oracles
from peer_models import (
    EOS,
    PAD,
    PROMPTS,
    SEEDS,
    SHAPES,
    START,
    UNK,
    Lookup,
    LookupModel,
    Shape,
    by_ctranslate2,
    translators,
)
from peer_oracles import Found

REQUESTS = SEEDS * PROMPTS
ENDS = [2, 5]
of_every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)

lookup_of = cache(Lookup)


def decoded(search: fb.BeamSearch, lookup: Lookup, count: int | None = None) -> list[list[Found]]:
    hyps = fb.decode(search, lookup, torch.arange(REQUESTS), num_hypotheses=count)
    return [
        [
            Found(tuple(tokens[:length]), score, log_prob)
            for tokens, length, score, log_prob, valid in zip(*of_request, strict=True)
            if valid
        ]
        for of_request in zip(
            *(x.tolist() for x in (hyps.tokens, hyps.lengths, hyps.scores, hyps.log_probs, hyps.valid)), strict=True
        )
    ]


def differing(ours: list[list[Found]], theirs: list[list[tuple]], tolerance: float = 1e-4) -> list[tuple]:
    """Requests whose hypotheses are not the same in the same order, to the tolerance in what the peer reports: their
    score and perhaps their log-probability."""

    def equal(one: tuple, other: tuple) -> bool:
        near = (a == b or abs(a - b) <= tolerance for a, b in zip(one[1:], other[1:], strict=False))
        return one[0] == other[0] and all(near)

    pairs = list(zip(ours, theirs, strict=True))
    return [(a, b) for a, b in pairs if len(a) != len(b) or not all(map(equal, a, b))]


# ---------------------------------------------------------------------------------------------------------------------
# transformers

HUGGINGFACE = [
    {"early_stopping": stop, "length_penalty": alpha, **sizes}
    for stop, alpha, sizes in product(
        (True, False, "never"),
        (0.0, 1.0, 2.0, -0.7),
        (
            {"num_beams": 3, "max_new_tokens": 7, "eos_token_id": EOS, "min_new_tokens": 0},
            {"num_beams": 2, "max_new_tokens": 5, "eos_token_id": ENDS, "min_new_tokens": 2},
            {"num_beams": 1, "max_new_tokens": 7, "eos_token_id": EOS, "min_new_tokens": 0},
        ),
    )
]


@of_every_shape
def test_huggingface_is_transformers_live(shape: Shape) -> None:
    lookup = lookup_of(shape)
    model = LookupModel(lookup).eval()
    for setting in HUGGINGFACE:
        theirs = model.n_best(pad_token_id=PAD, **setting)
        ours = decoded(fb.presets.huggingface(pad_token_id=PAD, **setting), lookup)
        assert differing(ours, theirs) == [], setting


def test_huggingface_that_may_not_end_at_all() -> None:
    """transformers allows ``min_new_tokens == max_new_tokens``: EOS is then barred at every step."""
    lookup = lookup_of(SHAPES[0])
    setting = {"num_beams": 3, "max_new_tokens": 4, "min_new_tokens": 4, "eos_token_id": EOS, "pad_token_id": PAD}
    for renormalize in (False, True):
        theirs = LookupModel(lookup).eval().n_best(renormalize_logits=renormalize, **setting)
        assert (
            differing(decoded(fb.presets.huggingface(renormalize_logits=renormalize, **setting), lookup), theirs) == []
        )


def test_huggingface_renormalizes_what_it_bars() -> None:
    lookup = lookup_of(SHAPES[2])
    setting = {"num_beams": 3, "max_new_tokens": 6, "min_new_tokens": 3, "eos_token_id": EOS, "pad_token_id": PAD}
    setting["renormalize_logits"] = True
    theirs = LookupModel(lookup).eval().n_best(**setting)
    assert differing(decoded(fb.presets.huggingface(**setting), lookup), theirs) == []


# ---------------------------------------------------------------------------------------------------------------------
# CTranslate2

CTRANSLATE2 = [
    {"length_penalty": alpha, "max_length": 6, **widths, **ends}
    for alpha, widths, ends in product(
        (0.0, 1.0, 0.6),
        (
            {"beam_size": 3, "patience": 1.0, "num_hypotheses": 3},
            {"beam_size": 3, "patience": 1.1, "num_hypotheses": 2},  # 3.3 is 3
            {"beam_size": 2, "patience": 1.25, "num_hypotheses": 2},  # 2.5 is 3
            {"beam_size": 4, "patience": 0.5, "num_hypotheses": 1},
            {"beam_size": 1, "patience": 3.0, "num_hypotheses": 1},  # greedy search has none
        ),
        ({"return_end_token": False, "min_length": 0}, {"return_end_token": True, "min_length": 2}),
    )
]


@of_every_shape
def test_ctranslate2_is_live(shape: Shape, tmp_path: Path) -> None:
    pytest.importorskip("ctranslate2", reason="CTranslate2 has no wheel for this platform")
    lookup = lookup_of(shape)
    nets = translators(lookup, tmp_path)
    for setting in CTRANSLATE2:
        theirs = by_ctranslate2(lookup, nets, **setting)
        ours = decoded(fb.presets.ctranslate2(end_token=EOS, **setting), lookup, setting["num_hypotheses"])
        if not setting["return_end_token"]:  # EOS counts in the length all the same
            theirs = [[((*y, EOS) if len(y) < 6 else y, score) for y, score in request] for request in theirs]
        assert differing(ours, theirs) == [], setting


def test_ctranslate2_that_may_not_end_at_all(tmp_path: Path) -> None:
    pytest.importorskip("ctranslate2", reason="CTranslate2 has no wheel for this platform")
    lookup, setting = lookup_of(SHAPES[1]), {"beam_size": 3, "max_length": 4, "min_length": 4, "num_hypotheses": 3}
    theirs = by_ctranslate2(lookup, translators(lookup, tmp_path), **setting)
    assert differing(decoded(fb.presets.ctranslate2(end_token=EOS, **setting), lookup), theirs) == []


# ---------------------------------------------------------------------------------------------------------------------
# fairseq

FAIRSEQ = [
    {**scores, **sizes}
    for scores, sizes in product(
        (
            {"lenpen": 1.0},
            {"lenpen": 1.7, "unkpen": 0.8},
            {"lenpen": -0.5},
            {"lenpen": 0.3, "unkpen": -1.5},
            {"unnormalized": True},
            {"unnormalized": True, "unkpen": 0.4},
        ),
        (
            {"beam": 3, "max_len_b": 5, "min_len": 1},
            {"beam": 2, "max_len_b": 7, "min_len": 0},
            {"beam": 4, "max_len_b": 2, "min_len": 2},
            {"beam": 1, "max_len_b": 6, "min_len": 3},
        ),
    )
]


def fairseq_options(setting: dict) -> dict:
    """As the restatement calls them."""
    return {**{name: value for name, value in setting.items() if name != "max_len_b"}, "max_len": setting["max_len_b"]}


@of_every_shape
def test_fairseq_as_restated(shape: Shape) -> None:
    lookup, tokens = lookup_of(shape), {"eos": EOS, "pad": PAD, "unk": UNK}
    for setting in FAIRSEQ:
        theirs = [
            peer_oracles.fairseq(lambda y, b=b: lookup.log_probs(b, y), **tokens, **fairseq_options(setting))
            for b in range(REQUESTS)
        ]
        theirs = [[found[:2] for found in request] for request in theirs]  # its log-probabilities hold the penalty
        assert differing(decoded(fb.presets.fairseq(**setting), lookup), theirs) == [], setting


@pytest.mark.skipif(not peer_oracles.FAIRSEQ.exists(), reason="no fairseq sources: make peers")
@of_every_shape
def test_fairseq_is_live(shape: Shape) -> None:
    lookup, names = lookup_of(shape), {"beam": "beam_size", "lenpen": "len_penalty", "unkpen": "unk_penalty"}
    for setting in FAIRSEQ:
        options = {names.get(name, name): value for name, value in setting.items() if name != "unnormalized"}
        theirs = peer_oracles.live_fairseq(
            lambda b, y: lookup.rows([b], [y])[0].numpy(),
            REQUESTS,
            shape.vocab,
            EOS,
            PAD,
            UNK,
            normalize_scores=not setting.get("unnormalized", False),
            **options,
        )
        theirs = [[found[:2] for found in request] for request in theirs]
        assert differing(decoded(fb.presets.fairseq(**setting), lookup), theirs) == [], setting


def test_fairseq_lengths_that_follow_the_source() -> None:
    """``max_len_a * source + max_len_b``, per request; fairseq itself takes the longest source of the batch."""
    lookup, sources = lookup_of(SHAPES[0]), [b % 4 + 1 for b in range(REQUESTS)]
    search = fb.presets.fairseq(3, max_len_a=1.5, max_len_b=1)
    hyps = fb.decode(search, lookup, torch.arange(REQUESTS), source_lengths=sources)
    for b, source in enumerate(sources):
        alone = fb.presets.fairseq(3, max_len_b=int(1.5 * source + 1))
        assert hyps.tokens[b, :, : int(1.5 * source + 2)].tolist() == [
            [*found.tokens] + [PAD] * (int(1.5 * source + 2) - len(found.tokens)) for found in decoded(alone, lookup)[b]
        ]


@pytest.mark.parametrize("unkpen", [-3.0, -0.7, 0.5])
def test_fairseq_that_favours_unknown_words_is_exact_where_it_says_so(unkpen: float) -> None:
    """Below 0 scores may rise, so that nothing bounds them."""
    rows = torch.randn(997, 12, generator=torch.Generator().manual_seed(0)) * 2
    rows[:, EOS] += 2

    def model(tokens, cache):
        cache = tokens if cache is None else (cache * 31 + tokens + 1) % 997
        return rows[cache], cache

    def run(stopping=None) -> fb.Hypotheses:
        search = fb.presets.fairseq(4, unkpen=unkpen, unk=UNK, eos=EOS, pad=PAD, max_len_b=10, min_len=0)
        search.stopping = stopping or search.stopping
        return fb.decode(search, model, torch.arange(300), num_hypotheses=1)

    early, whole = run(), run(fb.Exhausted())
    same = ((early.tokens == whole.tokens).all(2) & (early.scores == whole.scores))[:, 0]
    assert same[early.exact].all() and (unkpen < 0 or early.exact.any())


def test_an_unknown_word_is_one_of_the_vocabulary() -> None:
    search = fb.presets.fairseq(2, unkpen=0.5, unk=30, max_len_b=3)
    state = search.init(1)
    with pytest.raises(ValueError, match="unk: expected an id inside the vocabulary of 10, got 30"):
        search.step(state, torch.randn(1, 10))
    search.step(state, torch.randn(1, 31))  # nothing had changed


# ---------------------------------------------------------------------------------------------------------------------
# vLLM

VLLM = [
    {"length_penalty": alpha, "beam_width": width, "max_tokens": most}
    for alpha, width, most in product((0.0, 0.5, 1.0, 2.0), (1, 2, 4), (3, 6))
]


@of_every_shape
def test_vllm_as_restated(shape: Shape) -> None:
    lookup, prompts = lookup_of(shape), [1 + b % 3 for b in range(REQUESTS)]
    for setting in VLLM:
        theirs = [
            peer_oracles.vllm(lambda y, b=b: lookup.log_probs(b, y), eos=EOS, prompt_length=prompts[b], **setting)
            for b in range(REQUESTS)
        ]
        search = fb.presets.vllm(eos_token_id=EOS, prompt_lengths=prompts, **setting)
        assert differing(decoded(search, lookup), theirs) == [], setting


def test_vllm_ignoring_eos() -> None:
    lookup, setting = (
        lookup_of(SHAPES[2]),
        {"beam_width": 3, "max_tokens": 5, "length_penalty": 0.0, "ignore_eos": True},
    )
    theirs = [
        peer_oracles.vllm(lambda y, b=b: lookup.log_probs(b, y), eos=EOS, prompt_length=2, **setting)
        for b in range(REQUESTS)
    ]
    assert differing(decoded(fb.presets.vllm(eos_token_id=EOS, prompt_lengths=2, **setting), lookup), theirs) == []


# ---------------------------------------------------------------------------------------------------------------------
# T5X

T5X = [
    {"alpha": alpha, "num_decodes": width, "max_decode_len": most}
    for alpha, width, most in product((0.0, 0.6, 1.0, 2.5), (1, 2, 4), (3, 7))
]


@of_every_shape
def test_t5x_as_restated(shape: Shape) -> None:
    lookup, prompts = lookup_of(shape), [b % 4 for b in range(REQUESTS)]
    for setting in T5X:
        setting = {**setting, "max_decode_len": setting["max_decode_len"] + max(prompts)}
        theirs = [
            peer_oracles.t5x(lambda y, b=b: lookup.log_probs(b, y), eos=EOS, prompt_length=prompts[b], **setting)
            for b in range(REQUESTS)
        ]
        search = fb.presets.t5x(eos_id=EOS, prompt_lengths=prompts, **setting)
        assert differing(decoded(search, lookup), theirs) == [], setting


# ---------------------------------------------------------------------------------------------------------------------
# arguments

PRESETS = {
    "huggingface": lambda **given: fb.presets.huggingface(2, 4, EOS, **given),
    "fairseq": lambda **given: fb.presets.fairseq(2, **given),
    "ctranslate2": lambda **given: fb.presets.ctranslate2(2, end_token=EOS, **given),
    "vllm": lambda **given: fb.presets.vllm(2, 4, EOS, 3, **given),
    "t5x": lambda **given: fb.presets.t5x(2, **given),
}


@pytest.mark.parametrize("peer", PRESETS)
def test_an_unknown_argument_is_refused_by_name(peer: str) -> None:
    with pytest.raises(TypeError, match="lenght_penalty: expected an argument of"):
        PRESETS[peer](lenght_penalty=1.0)


@pytest.mark.parametrize("peer", PRESETS)
def test_what_is_elsewhere_is_taken_where_it_does_nothing_and_refused_with_advice(peer: str) -> None:
    elsewhere = __import__(f"flashbeam.presets.{peer}", fromlist=["_ELSEWHERE"])._ELSEWHERE
    assert elsewhere
    for name, (off, instead) in elsewhere.items():
        for value in off:
            PRESETS[peer](**{name: value})
            PRESETS[peer](**{name: int(value) if value == 1 else value})
        with pytest.raises(ValueError, match=f"^{name}: expected .*, got 'something'; ") as error:
            PRESETS[peer](**{name: "something"})
        assert str(error.value).endswith(instead)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fb.presets.huggingface(2, 4, EOS, early_stopping="always"), "early_stopping: expected True, False or"),
        (lambda: fb.presets.huggingface(2, 4, EOS, min_new_tokens=5), "min_new_tokens: expected at most 4, got 5"),
        (lambda: fb.presets.fairseq(min_len=5, max_len_b=4), "min_len: expected at most max_len_b, 4, got 5"),
        (
            lambda: fb.presets.ctranslate2(2, num_hypotheses=3),
            "num_hypotheses: expected at most beam_size \\* patience",
        ),
        (lambda: fb.presets.ctranslate2(2, patience=0.0), "patience: expected a number above 0, got 0.0"),
        (lambda: fb.presets.vllm(2, 4, EOS, 3, ignore_eos=True), "ignore_eos: expected False where length_penalty is"),
        (lambda: fb.presets.vllm(2, 4, EOS, 0), "prompt_lengths: expected an int >= 1, got 0"),
        (lambda: fb.presets.t5x(alpha=-0.1), "alpha: expected a number from 0"),
        (
            lambda: fb.presets.t5x(max_decode_len=4, prompt_lengths=4),
            "prompt_lengths: expected below max_decode_len, 4",
        ),
        (
            lambda: fb.presets.ctranslate2(2, 2.0, 0.0, num_hypotheses=3),
            "num_hypotheses: expected at most beam_size, for",
        ),
        (lambda: fb.presets.huggingface(2, [4, 6], EOS, min_new_tokens=5), "min_new_tokens: expected at most 4, got 5"),
        (
            lambda: fb.presets.huggingface(2, 4, EOS, min_new_tokens=[0, 5]),
            r"min_new_tokens\[1\]: expected at most 4, got 5",
        ),
        (
            lambda: fb.presets.huggingface(2, [4, 4], EOS, min_new_tokens=[0, 1, 2]),
            "max_new_tokens: expected as many values as min_new_tokens, 3, got 2",
        ),
        (
            lambda: fb.presets.huggingface([2, 2, 2], [4, 4], EOS),
            "max_new_tokens: expected as many values as num_beams, 3, got 2",
        ),
        (
            lambda: fb.presets.huggingface(2, [3, 4], EOS, min_new_tokens=3, constraint=[None] * 3),
            "constraint: expected one value per request, 2, got 3",
        ),
        (lambda: fb.presets.huggingface(0), "num_beams: expected an int >= 1, got 0"),
        (lambda: fb.presets.huggingface(2, 0), "max_new_tokens: expected an int >= 1, got 0"),
        (lambda: fb.presets.huggingface(2, [4, 0]), r"max_new_tokens\[1\]: expected an int >= 1, got 0"),
        (lambda: fb.presets.huggingface(2, 4, [1, -1]), r"eos_token_id\[1\]: expected an int >= 0, got -1"),
        (lambda: fb.presets.huggingface(2, 4, 1, pad_token_id=-1), "pad_token_id: expected an int >= 0, got -1"),
        (lambda: fb.presets.vllm(0, 4, 1, 3), "beam_width: expected an int >= 1, got 0"),
        (lambda: fb.presets.vllm(2, 0, 1, 3), "max_tokens: expected an int >= 1, got 0"),
        (lambda: fb.presets.vllm(2, 4, -1, 3), "eos_token_id: expected an int >= 0, got -1"),
        (
            lambda: fb.presets.vllm([2, 3], 4, 1, [3, 4, 5]),
            "prompt_lengths: expected as many values as beam_width, 2, got 3",
        ),
        (lambda: fb.presets.t5x(0), "num_decodes: expected an int >= 1, got 0"),
        (
            lambda: fb.presets.t5x([2, 3], prompt_lengths=[1, 1, 1]),
            "prompt_lengths: expected as many values as num_decodes, 2, got 3",
        ),
        (lambda: fb.presets.ctranslate2(2, end_token=-1), "end_token: expected an int >= 0, got -1"),
        (lambda: fb.presets.fairseq(0), "beam: expected an int >= 1, got 0"),
        (lambda: fb.presets.fairseq(2, pad=-1), "pad: expected an int >= 0, got -1"),
        (lambda: fb.presets.fairseq(2, max_len_a=1.0, min_len=-3), "min_len: expected an int >= 0, got -3"),
    ],
)
def test_bad_arguments_are_named(make, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        make()


def test_bad_types_are_named() -> None:
    for a in (0.0, 1.0):
        with pytest.raises(TypeError, match=r"^min_len: expected an int >= 0, got str$"):
            fb.presets.fairseq(max_len_a=a, min_len="x")
    with pytest.raises(TypeError, match=r"^eos_token_id: expected an int >= 0, got str$"):
        fb.presets.huggingface(2, 4, "beam_size")


@pytest.mark.parametrize("early_stopping", [True, False, "never"])
def test_requests_may_differ(early_stopping: bool | str) -> None:
    lookup, given = lookup_of(SHAPES[3]), {"eos_token_id": EOS, "early_stopping": early_stopping}
    sizes = [{"num_beams": 1 + b % 3, "max_new_tokens": 3 + b % 4, "min_new_tokens": b % 2} for b in range(REQUESTS)]
    sizes[1]["min_new_tokens"], sizes[3]["min_new_tokens"] = 4, 6  # EOS may not follow at all
    lists = {name: [size[name] for size in sizes] for name in sizes[0]}
    together = decoded(fb.presets.huggingface(**given, **lists), lookup)
    assert together == decoded(
        fb.presets.huggingface(**given, **{k: torch.tensor(v) for k, v in lists.items()}), lookup
    )
    for b, size in enumerate(sizes):
        assert together[b] == decoded(fb.presets.huggingface(**given, **size), lookup)[b]


@pytest.mark.parametrize(
    ("low", "high"), [([4, 2], 4), (2, torch.tensor([2, 4])), (torch.tensor([4, 0]), np.array([4, 4])), (3, [3, 3])]
)
@pytest.mark.parametrize("constraint", [None, fb.ForbiddenPhrases([[4]]), [None, fb.ForbiddenPhrases([[4]])]])
def test_a_request_alone_may_not_end(low, high, constraint) -> None:
    lookup = lookup_of(SHAPES[1])

    def n_best(preset, **given) -> list:
        hyps = fb.decode(preset(constraint=constraint, **given), lookup, torch.arange(2))
        return [hyps.tokens[b, :, : hyps.lengths[b].max()].tolist() for b in range(2)]

    def each(preset, names) -> list:
        lows, highs = (torch.as_tensor(x).expand(2).tolist() for x in (low, high))
        return [
            n_best(preset, **dict(zip(names, pair, strict=True)))[b]
            for b, pair in enumerate(zip(lows, highs, strict=True))
        ]

    for preset, names in (
        (hf_of_two, ("min_new_tokens", "max_new_tokens")),
        (ct2_of_two, ("min_length", "max_length")),
    ):
        assert n_best(preset, **dict(zip(names, (low, high), strict=True))) == each(preset, names)


def hf_of_two(**given) -> fb.BeamSearch:
    return fb.presets.huggingface(2, eos_token_id=EOS, **given)


def ct2_of_two(**given) -> fb.BeamSearch:
    return fb.presets.ctranslate2(2, end_token=EOS, **given)


def test_a_constraint_of_ones_own_joins_what_a_preset_bars() -> None:
    search = {"beam": 2, "max_len_b": 2, "eos": EOS, "pad": PAD}
    logits = torch.arange(6.0).flip(0)  # START is likeliest, then PAD

    def said(constraint) -> list[set[int]]:
        hyps = fb.decode(
            fb.presets.fairseq(constraint=constraint, **search),
            lambda tokens, cache: (logits.repeat(len(tokens), 1), cache),
            torch.zeros(2, dtype=torch.int64),
        )
        return [set(request[hyps.valid[b]].flatten().tolist()) for b, request in enumerate(hyps.tokens[:, :, :2])]

    barred = fb.ForbiddenPhrases([[START]])
    assert said(None) == [{START, EOS}] * 2
    assert said(barred) == [{EOS, UNK}] * 2
    assert said([barred, None]) == [{EOS, UNK}, {START, EOS}]
