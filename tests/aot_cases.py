"""Representative launches of every kernel, on meta tensors: shapes and strides without memory."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from flashbeam.kernels import Rule

# sizes as users have them: divisible by 16 where theirs are
BATCH, BEAMS, VOCAB, LENGTH = 8, 8, 128256, 512
ROWS = BATCH * BEAMS
ARCHS = (80, 90, 100)

_bf16, _f32, _i32, _i64 = torch.bfloat16, torch.float32, torch.int32, torch.int64


class Case(NamedTuple):
    """One launch to compile."""

    module: str  # of flashbeam.kernels.triton
    launcher: str
    config: str  # what the table calls it
    args: Callable[[], tuple[object, ...]]
    archs: tuple[int, ...] = ARCHS  # one for configurations that tell little more: compiling takes seconds


def _new(*shape: int, dtype: torch.dtype = _f32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _bits(rows: int = ROWS) -> Tensor:
    return _new(rows, VOCAB // 32, dtype=_i32)


def _summarize(
    dtype: torch.dtype,
    bitmask: bool = False,
    temperature: bool = False,
    active: bool = False,
    exclude: bool = False,
    renormalize: bool = False,
    mass: bool = False,
    stride: int = VOCAB,
) -> tuple[object, ...]:
    return (
        _new(ROWS, stride, dtype=dtype)[:, : min(VOCAB, stride)],
        min(VOCAB, stride),
        _bits() if bitmask else None,
        _new(ROWS) if temperature else None,
        _new(ROWS, dtype=torch.bool) if active else None,
        _new(2, dtype=_i64) if exclude else None,
        renormalize,
        mass,
    )


def _select(dtype: torch.dtype, k: int, options: bool = False) -> tuple[object, ...]:
    tiles = -(-VOCAB // 2048)
    return (
        _new(ROWS, VOCAB, dtype=dtype),
        _new(BATCH, BEAMS),
        _new(ROWS, tiles, 64, dtype=dtype),
        _new(ROWS, tiles, dtype=dtype),
        _new(ROWS),
        VOCAB,
        k,
        _bits() if options else None,
        _new(ROWS) if options else None,
        _new(2, dtype=_i64) if options else None,
        _new(BATCH) if options else None,
    )


def _lse(dtype: torch.dtype, temperature: bool) -> tuple[object, ...]:
    tiles = -(-VOCAB // 2048)
    return _new(ROWS, tiles, dtype=dtype), _new(ROWS, tiles), _new(ROWS) if temperature else None


def _entropy(dtype: torch.dtype, options: bool = False) -> tuple[object, ...]:
    masks = (_bits(), _new(ROWS), _new(ROWS, dtype=torch.bool)) if options else (None, None, None)
    return _new(ROWS, VOCAB, dtype=dtype), VOCAB, _new(ROWS), *masks


def _cache() -> Tensor:
    return _new(ROWS, 8, LENGTH, 128, dtype=_bf16)


def _sources() -> Tensor:
    return _new(ROWS, dtype=_i64)


def _ancestry(beams: int = BEAMS) -> tuple[Tensor, ...]:
    return _new(BATCH, beams, LENGTH, dtype=_i32), _new(BATCH, beams, dtype=_i64), _new(1, dtype=_i64)[0]


def _advance(
    beams: int, n_eos: int = 2, options: bool = False, penalty: bool = False, scores: bool = False
) -> tuple[object, ...]:
    """The arguments in place, fields in the order of ``kernels/beamstate.py``."""
    rows, slots, requests, table = BATCH * beams, (BATCH, beams), (BATCH,), (BATCH, LENGTH + 1)
    return (
        _new(rows, VOCAB, dtype=_bf16),
        _bits(rows) if options else None,
        _new(rows) if options else None,
        _new(n_eos, dtype=_i64) if n_eos else None,
        [
            _new(*slots),
            _new(*slots, dtype=_i64),
            _new(*slots, dtype=_i64),
            _new(*slots),
            _new(rows),
            _new(rows, dtype=_i32),
            _new(*slots),
        ],
        [_new(*slots), *(_new(*slots, dtype=dtype) for dtype in (_i32, _i32, torch.bool, torch.bool)), _new(*slots)],
        [_new(*requests, dtype=dtype) for dtype in (torch.bool, _i32, _i32)],
        [_new(LENGTH, *slots, dtype=dtype) for dtype in (_i32, _i32, _f32)],
        [*(_new(*requests, dtype=_i32) for _ in range(4)), _new(*table), _new(*table)],
        _new(BATCH, beams * n_eos) if penalty else None,
        _new(BATCH, beams * n_eos) if scores else None,
        0,
    )


def _advance_pool(beams: int, rule: Rule, decided: bool = False, options: bool = False) -> tuple[object, ...]:
    *common, limits, penalty, scores, pad_id = _advance(beams, options=options, penalty=decided, scores=options)
    pool = [_new(BATCH, beams) for _ in range(3)] + [_new(BATCH, beams, dtype=_i32) for _ in range(4)]
    best_possible = _new(BATCH) if options else None
    return (*common, pool, limits, _new(BATCH), penalty, scores, best_possible, pad_id, decided, *rule)


def _draw(dtype: torch.dtype, k: int, options: bool = False) -> tuple[object, ...]:
    tiles, parents = -(-VOCAB // 2048), (BATCH, BEAMS)
    return (
        _new(ROWS, VOCAB, dtype=dtype),
        _new(*parents),
        _new(*parents),
        _new(*parents, dtype=_i64),
        _new(ROWS, tiles, dtype=dtype),
        _new(ROWS, tiles),
        _new(ROWS),
        VOCAB,
        k,
        _bits() if options else None,
        _new(ROWS) if options else None,
        _new(1, dtype=_i64),
    )


def _advance_chosen(beams: int, n_eos: int = 2) -> tuple[object, ...]:
    _, _, _, eos, _, slots, requests, history, limits, *_ = _advance(beams, n_eos)
    slot = (BATCH, beams)
    ids, floats = partial(_new, *slot, dtype=_i64), partial(_new, *slot)
    return (
        [ids(), ids(), *(floats() for _ in range(5)), ids()],
        _new(BATCH * beams, dtype=_i32),
        eos,
        slots,
        [ids(), floats(), floats(), ids()],
        requests,
        history,
        limits,
        0,
    )


def _random_bits(count: int, stream: int) -> tuple[object, ...]:
    return _new(1, dtype=_i64), _new(ROWS, dtype=_i64), _new(ROWS, dtype=_i64), count, stream


def _invert_cdf(dtype: torch.dtype, options: bool = False, vocab: int = VOCAB) -> tuple[object, ...]:
    tiles = -(-vocab // 2048)
    return (
        _new(ROWS, vocab, dtype=dtype),
        _new(ROWS, tiles, dtype=dtype),
        _new(ROWS, tiles),
        _new(ROWS, dtype=_i64),
        _new(ROWS, dtype=_i64),
        vocab,
        _new(ROWS, vocab // 32, dtype=_i32) if options else None,
        _new(ROWS) if options else None,
    )


def _filter_bitmask(dtype: torch.dtype, options: bool, *filters: float) -> tuple[object, ...]:
    bits, temperature = (_bits(), _new(ROWS)) if options else (None, None)
    return _new(ROWS, VOCAB, dtype=dtype), VOCAB, bits, temperature, *filters


def _mixture(models: int, loglinear: bool = False, options: bool = False) -> tuple[object, ...]:
    return (
        [_new(ROWS, VOCAB, dtype=(_bf16, _f32)[i % 2]) for i in range(models)],
        _new(ROWS, models),
        _new(ROWS, models) if options or not loglinear else None,
        _new(ROWS, models) if options else None,
        _new(ROWS, models, dtype=_i64) if options else None,
        _new(ROWS, dtype=torch.bool) if options else None,
        VOCAB,
        loglinear,
    )


def _contrast(weight: float | None, options: bool = False) -> tuple[object, ...]:
    return (
        _new(ROWS, VOCAB, dtype=_bf16),
        [_new(ROWS, VOCAB, dtype=_f32 if options else _bf16)] * 2,
        _new(ROWS),
        _new(ROWS, 2),
        _new(ROWS),
        _new(ROWS) if options else None,
        _new(ROWS) if options else None,
        _new(ROWS, dtype=_i64) if options else None,
        _new(ROWS, dtype=torch.bool) if options else None,
        _bits() if options else None,
        VOCAB,
        weight,
        -2.3,
    )


def _divergence(dola: bool, options: bool = False) -> tuple[object, ...]:
    return (
        _new(ROWS, VOCAB, dtype=_bf16),
        _new(ROWS, VOCAB, dtype=_f32 if options else _bf16),
        _new(ROWS),
        _new(ROWS),
        _new(ROWS) if options else None,
        _new(ROWS) if options else None,
        _new(ROWS, dtype=torch.bool) if options else None,
        VOCAB,
        dola,
    )


def _edges(targets: bool, lengths: int = 1) -> tuple[object, ...]:
    """The fields of ``kernels/automaton.py``'s Edges: a trie of a million items, or an automaton."""
    states = 4_000_001
    return (
        _new(states + 1, dtype=_i32),
        _new(states - 1, dtype=_i32),
        _new(states - 1, dtype=_i32) if targets else None,
        _new(states, lengths, dtype=_i32),
    )


def _rows_in(options: bool, rows: int = ROWS) -> tuple[Tensor, Tensor | None]:
    """States and windows."""
    return _new(rows, dtype=_i32), _new(rows, 1, dtype=_i32) if options else None


def _summarize_listed(dtype: torch.dtype, options: bool = False) -> tuple[object, ...]:
    return (
        *_edges(options),
        *_rows_in(options),
        _new(ROWS, VOCAB, dtype=dtype),
        VOCAB,
        _bits() if options else None,
        _new(ROWS) if options else None,
        _new(ROWS, dtype=torch.bool) if options else None,
        _new(2, dtype=_i64) if options else None,
        _new(ROWS, dtype=torch.bool) if options else None,
    )


def _select_listed(dtype: torch.dtype, k: int, options: bool = False) -> tuple[object, ...]:
    return (
        *_edges(options),
        *_rows_in(options),
        _new(ROWS, VOCAB, dtype=dtype),
        _new(BATCH, BEAMS),
        _new(ROWS),
        VOCAB,
        k,
        _bits() if options else None,
        _new(ROWS) if options else None,
        _new(BATCH) if options else None,
    )


def _top_listed(dtype: torch.dtype, k: int) -> tuple[object, ...]:
    logits, log_probs = _new(ROWS, VOCAB, dtype=dtype), _new(BATCH, BEAMS)
    return (*_edges(False), *_rows_in(False), logits, log_probs, VOCAB, k, *[None] * 6)


def _cases() -> list[Case]:
    summary = partial(Case, "summary", "launch_summarize")
    every_option = dict.fromkeys(("bitmask", "temperature", "active", "exclude", "mass"), True)
    select = partial(Case, "select", "launch_select")
    lse = partial(Case, "lse", "launch_row_lse")
    entropy = partial(Case, "entropy", "launch_row_entropy")
    reorder = partial(Case, "reorder")
    history = partial(Case, "history")
    bitmask = partial(Case, "bitmask")
    pool = partial(Case, "advance_pool", "launch_advance_pool_")
    in_place = partial(Case, "advance_in_place", "launch_advance_in_place_")
    draw = partial(Case, "draw", "launch_draw")
    chosen = partial(Case, "advance_chosen", "launch_advance_chosen_")
    invert = partial(Case, "invert", "launch_invert_cdf")
    filters = partial(Case, "filters", "launch_filter_bitmask")
    automaton = partial(Case, "automaton")
    mixture = partial(Case, "mixture", "launch_mixture")
    contrast = partial(Case, "contrast", "launch_contrast")
    divergence = partial(Case, "divergence", "launch_divergence")
    listed_sums = partial(Case, "listed_summary", "launch_summarize_listed")
    listed_best = partial(Case, "listed_select", "launch_select_listed")
    return [
        summary("bf16", lambda: _summarize(_bf16)),
        summary("fp16", lambda: _summarize(torch.float16), (90,)),
        summary("fp32", lambda: _summarize(_f32)),
        summary("bf16, temperature, active", lambda: _summarize(_bf16, temperature=True, active=True), (90,)),
        summary("bf16, exclude 2", lambda: _summarize(_bf16, exclude=True), (90,)),
        summary("bf16, bitmask", lambda: _summarize(_bf16, bitmask=True), (90,)),
        summary("bf16, bitmask, renormalize", lambda: _summarize(_bf16, bitmask=True, renormalize=True), (90,)),
        summary("bf16, mass", lambda: _summarize(_bf16, mass=True), (90,)),
        summary("bf16, every option", lambda: _summarize(_bf16, **every_option)),
        summary("fp32, every option", lambda: _summarize(_f32, **every_option), (90,)),
        summary("bf16, odd row stride", lambda: _summarize(_bf16, stride=50257), (90,)),
        lse("bf16", lambda: _lse(_bf16, False)),
        lse("fp32, temperature", lambda: _lse(_f32, True)),
        entropy("bf16", lambda: _entropy(_bf16), (90,)),
        entropy("fp32, every option", lambda: _entropy(_f32, True)),
        select("bf16, k = 8", lambda: _select(_bf16, 8), (90,)),
        select("fp32, k = 8, every option", lambda: _select(_f32, 8, True)),
        select("bf16, k = 256, every option", lambda: _select(_bf16, 256, True), (80, 90)),
        reorder("launch_reorder", "cache bf16", lambda: (_cache(), _sources(), 0)),
        reorder(
            "launch_reorder_out",
            "column int64",
            lambda: (_new(ROWS, 1, dtype=_i64), _sources(), 0, _new(ROWS, 1, dtype=_i64)),
        ),
        reorder("launch_reorder_", "in place, groups of 8", lambda: (_cache(), _sources(), 0, BEAMS)),
        reorder("launch_reorder_", "in place, any rows", lambda: (_cache(), _sources(), 0, None)),
        history(
            "launch_trace_slots",
            "int64",
            lambda: (_new(LENGTH, BATCH, BEAMS, dtype=_i64), _new(BATCH, 4, dtype=_i64), _new(BATCH, 4, dtype=_i64)),
        ),
        history("launch_update_ancestry", "in place", _ancestry),
        history("launch_update_ancestry", "in place, 1024 beams", lambda: _ancestry(1024), (90,)),
        history("launch_update_ancestry_out", "out", lambda: (*_ancestry(), _ancestry()[0])),
        bitmask("launch_pack_bitmask", "", lambda: (_new(ROWS, VOCAB, dtype=torch.bool),)),
        bitmask("launch_unpack_bitmask", "", lambda: (_bits(), VOCAB)),
        bitmask(
            "launch_mark_bits",
            "",
            lambda: (
                _new(ROWS, LENGTH, dtype=_i64),
                _new(ROWS, LENGTH, dtype=_i64),
                _new(ROWS, LENGTH, dtype=torch.bool),
                ROWS,
                VOCAB,
            ),
        ),
        bitmask("launch_apply_bitmask_", "bf16", lambda: (_new(ROWS, VOCAB, dtype=_bf16), _bits())),
        pool("8 beams, exact", lambda: _advance_pool(8, Rule(exact=True))),
        pool("8 beams, by arrival", lambda: _advance_pool(8, Rule(by_arrival=True)), (90,)),
        pool("8 beams, by arrival, never more", lambda: _advance_pool(8, Rule(True, "never")), (90,)),
        pool("8 beams, best live", lambda: _advance_pool(8, Rule(best_live=True)), (90,)),
        pool("8 beams, shrinks", lambda: _advance_pool(8, Rule(shrinks=True, awaits_best=True)), (90,)),
        pool("8 beams, decided", lambda: _advance_pool(8, Rule(exact=True), decided=True), (90,)),
        pool("8 beams, by arrival, decided", lambda: _advance_pool(8, Rule(by_arrival=True), decided=True), (90,)),
        pool(
            "256 beams, every option", lambda: _advance_pool(256, Rule(exact=True), options=True, decided=True), (90,)
        ),
        pool("1024 beams", lambda: _advance_pool(1024, Rule(exact=True)), (90,)),
        in_place("8 beams", lambda: _advance(8)),
        in_place("8 beams, no EOS", lambda: _advance(8, n_eos=0), (90,)),
        in_place("8 beams, end penalty", lambda: _advance(8, penalty=True), (90,)),
        in_place("1024 beams, every option", lambda: _advance(1024, options=True, penalty=True, scores=True), (90,)),
        draw("bf16, k = 8", lambda: _draw(_bf16, 8)),
        draw("fp32, k = 8, every option", lambda: _draw(_f32, 8, True), (90,)),
        draw("bf16, k = 256, every option", lambda: _draw(_bf16, 256, True), (90,)),
        chosen("8 beams", lambda: _advance_chosen(8)),
        chosen("8 beams, no EOS", lambda: _advance_chosen(8, n_eos=0), (90,)),
        chosen("1024 beams", lambda: _advance_chosen(1024), (90,)),
        Case("random", "launch_random_bits", "1 word", lambda: _random_bits(1, 1)),
        Case("random", "launch_random_bits", "64 words", lambda: _random_bits(64, 7), (90,)),
        invert("bf16", lambda: _invert_cdf(_bf16)),
        invert("fp32, every option", lambda: _invert_cdf(_f32, True)),
        invert("fp16, every option, 2^24 + 64 tokens", lambda: _invert_cdf(torch.float16, True, 2**24 + 64), (90,)),
        filters("bf16, top-k", lambda: _filter_bitmask(_bf16, False, 50, 1.0, 0.0), (90,)),
        filters("fp16, min-p", lambda: _filter_bitmask(torch.float16, False, 0, 1.0, 0.1), (90,)),
        filters("bf16, top-p", lambda: _filter_bitmask(_bf16, False, 0, 0.9, 0.0)),
        filters("fp32, every option", lambda: _filter_bitmask(_f32, True, 50, 0.9, 0.1)),
        mixture("bf16 and fp32", lambda: _mixture(2)),
        mixture("6 models, every option", lambda: _mixture(6, options=True), (90,)),
        mixture("log", lambda: _mixture(2, loglinear=True), (90,)),
        mixture("log, every option", lambda: _mixture(2, loglinear=True, options=True), (90,)),
        contrast("difference", lambda: _contrast(None)),
        contrast("weighted, every option", lambda: _contrast(0.5, True), (90,)),
        contrast("weight 0", lambda: _contrast(0.0), (90,)),
        divergence("jsd", lambda: _divergence(False)),
        divergence("dola, every option", lambda: _divergence(True, True), (90,)),
        automaton("launch_follow", "tree", lambda: (*_edges(False)[:3], _rows_in(False)[0], _sources())),
        automaton("launch_follow", "targets", lambda: (*_edges(True)[:3], _rows_in(False)[0], _sources()), (90,)),
        automaton("launch_listed_bitmask", "tree", lambda: (*_edges(False), *_rows_in(False), VOCAB), (90,)),
        automaton("launch_listed_bitmask", "targets, window", lambda: (*_edges(True), *_rows_in(True), VOCAB)),
        listed_sums("bf16, tree", lambda: _summarize_listed(_bf16), (90,)),
        listed_sums("fp32, every option", lambda: _summarize_listed(_f32, True)),
        listed_best("bf16, k = 8, tree", lambda: _select_listed(_bf16, 8), (90,)),
        Case("listed_top", "launch_top_listed", "bf16, k = 8, tree", lambda: _top_listed(_bf16, 8), (90,)),
        listed_best("fp32, k = 8, every option", lambda: _select_listed(_f32, 8, True)),
        listed_best("bf16, k = 256, every option", lambda: _select_listed(_bf16, 256, True), (90,)),
    ]


CASES = _cases()
