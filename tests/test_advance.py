"""The bookkeeping of a step: kernels against their torch definitions over whole searches, every tensor of the state."""

from __future__ import annotations

import random
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch.utils import _pytree as pytree

import flashbeam as fb
from flashbeam.kernels import advance_in_place, advance_pool, pack_bitmask, select, unpack_bitmask
from flashbeam.kernels.beamstate import total_order
from flashbeam.kernels.keys import adjust, token_log_prob
from flashbeam.kernels.triton.advance_in_place import launch_advance_in_place_
from flashbeam.kernels.triton.advance_pool import launch_advance_pool_
from flashbeam.kernels.triton.lse import launch_row_lse
from flashbeam.kernels.triton.select import launch_select
from flashbeam.kernels.triton.summary import launch_summarize
from oracles import F32, TableLM
from test_summary import far_apart

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
# infinities are meant; numpy, which the interpreter computes with, warns of log(0)
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

INF, NAN = float("inf"), float("nan")
DEFINITIONS = {"pool": advance_pool._op, "in_place": advance_in_place._op}
LAUNCHERS = {"pool": launch_advance_pool_, "in_place": launch_advance_in_place_}
MODULES = {"pool": advance_pool, "in_place": advance_in_place}
REGIMES = ["pool", "in_place"]
RULES = [
    fb.FirstFinished(),
    fb.Exact(),
    fb.Exhausted(),
    fb.Patience(0.5),
    fb.Patience(2.0),
    fb.Patience(0.5, "never"),
    fb.Patience(0.5, "step"),
    fb.Filled(),
    fb.BestLive(),
    fb.Shrinking(),
    fb.BestFinished(2),
]
# in place, no rule reaches the kernel; four seeds go through four sets of EOS
SETTINGS = [*(("pool", rule, 4) for rule in RULES), ("in_place", fb.FirstFinished(), 8)]


@pytest.fixture(autouse=True)
def _threads():
    """Tiny tensors: threads cost more than they give."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def plain(arguments):
    """Arguments as the schema has them: lists, not named tuples, and copies of every tensor."""
    return [
        [t.clone() for t in a] if isinstance(a, (tuple, list)) else a.clone() if isinstance(a, torch.Tensor) else a
        for a in arguments
    ]


class Compared:
    """Stands in for an operation: runs definition and kernel on the same tensors, and compares all of them after."""

    def __init__(self, regime, device):
        self.regime, self.device, self.steps = regime, device, 0

    def __call__(self, *arguments):
        copies = pytree.tree_map_only(torch.Tensor, lambda t: t.to(self.device), plain(arguments))
        want = DEFINITIONS[self.regime](*arguments)
        got = LAUNCHERS[self.regime](*copies)
        for field, wanted, name in zip(got, want, ("tokens", "parents", "source_rows", "valid"), strict=True):
            assert field.dtype == wanted.dtype and torch.equal(field.cpu(), wanted), name
        for i, (given, copy) in enumerate(zip(arguments, copies, strict=True)):
            tensors = list(given) if isinstance(given, (tuple, list)) else [given]
            for j, (t, u) in enumerate(zip(tensors, copy if isinstance(copy, list) else [copy], strict=True)):
                same = torch.equal(t.nan_to_num(nan=0.5), u.cpu().nan_to_num(nan=0.5)) if torch.is_tensor(t) else t == u
                names = getattr(given, "_fields", None)
                assert same, (i, names[j] if names else j)
        self.steps += 1
        return want


@pytest.fixture
def compared(monkeypatch, device):
    """Every step taken on the CPU is taken by both, wherever the kernel runs."""
    checkers = {regime: Compared(regime, device) for regime in REGIMES}
    for regime, module in MODULES.items():
        monkeypatch.setattr(module, "_op", checkers[regime])
    return checkers


def random_logits(rng, rows, vocab_size):
    """Faults and ties as often as plain rows."""
    logits = torch.randn(rows, vocab_size) * 2
    if rng.random() < 0.5:
        logits = logits.round()
    for fault in (NAN, -INF, INF):
        if rng.random() < 0.2:
            logits[rng.randrange(rows), rng.randrange(vocab_size)] = fault
    if rng.random() < 0.2:
        logits[rng.randrange(rows)] = -INF
    return logits.to(rng.choice([torch.float32, torch.bfloat16]))


def run_random_search(seed, regime, rule):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    vocab_size, lengths = rng.randint(4, 40), [rng.randint(1, 6), rng.randint(2, 6)]
    search = fb.BeamSearch(
        beam_size=[rng.randint(1, 5), rng.randint(1, 5)],
        max_length=lengths,
        min_length=[0, rng.randint(0, lengths[1])],
        eos_id=[2, [1, 3], None, [3, 0, 2]][seed % 4],
        stopping=rule,
        finished=regime,
        length_penalty=rng.choice([[0.0, 1.3], [fb.GNMT(0.6), -0.5], 1.0]),
        temperature=rng.choice([1.0, [1.0, 0.7]]),
        normalize=rng.choice(["vocab", "allowed"]),
        pad_id=rng.randint(0, 3),
    )
    state, steps = search.init(2), 0
    while True:
        first_rows = steps == 0 and rng.random() < 0.6
        logits = random_logits(rng, 2 if first_rows else 2 * state.beam_size, vocab_size)
        mask = None
        if rng.random() < 0.5:
            mask = pack_bitmask(torch.rand(len(logits), vocab_size) < 0.7)
        search.step(state, logits, mask)
        steps += 1
        if state.all_done():
            break
    search.step(state, random_logits(rng, 2 * state.beam_size, vocab_size))  # nothing changes once all is done
    return steps + 1


@pytest.mark.parametrize(("regime", "rule", "searches"), SETTINGS, ids=repr)
def test_matches_reference(regime, rule, searches, compared):
    """Random searches: widths, lengths, EOS counts, penalties, masks, temperatures, faults, one or K first rows."""
    first = len(repr(rule)) * 4  # other searches for other rules
    steps = sum(run_random_search(first + i, regime, rule) for i in range(searches))
    assert compared[regime].steps == steps


@pytest.mark.parametrize("regime", REGIMES)
def test_wide_beam(regime, compared):
    """Eight warps; blocks of 64 and of 128 slots, of which 70 are used; candidates in several blocks."""
    search = fb.BeamSearch(70, 3, [1, 5], finished=regime, stopping=fb.Exhausted())
    state = search.init(1)
    for _ in range(3):
        search.step(state, torch.randn(70, 40).round())
    assert compared[regime].steps == 3 and state.all_done()


@pytest.mark.parametrize("regime", REGIMES)
def test_equal_candidates_keep_the_total_order(regime, compared):
    """All logits equal: every EOS ties with every token, and every parent with every parent."""
    for eos in (0, 9, [9, 4, 0]):
        search = fb.BeamSearch([5, 3], 4, eos, finished=regime, stopping=fb.Exhausted(), length_penalty=0.0)
        state = search.init(2)
        while not state.all_done():
            search.step(state, torch.zeros(10, 10))


def test_pool_takes_equal_scores_behind_what_it_holds(compared):
    """Half for EOS and half to go on: the mean log-probability is the same at every length."""
    logits = torch.full((4, 8), -INF)
    logits[:, [0, 3]] = 0.0
    search = fb.BeamSearch(4, 6, 0, stopping=fb.Exhausted(), length_penalty=1.0)
    state = search.init(1)
    for _ in range(2):
        search.step(state, logits)
    assert state.pool.scores[0, 0] == state.pool.scores[0, 1] and state.pool.steps[0, :2].tolist() == [0, 1]
    while not state.all_done():
        search.step(state, logits)


def test_exact_bounds_a_live_beam_by_the_lengths_it_can_still_end_at(compared):
    """With score = log_prob * length, a beam of two tokens ends at three or more: 3 * log(.24) is out of reach."""
    search = fb.BeamSearch(2, 6, 0, stopping=fb.Exact(), length_penalty=-1.0)
    state = search.init(1)
    search.step(state, torch.tensor([[0.5, 0.4, 0.1, 0.0]]).log())
    assert not state.done
    search.step(state, torch.tensor([[0.4, 0.6, 0.0, 0.0], [0.25, 0.25, 0.25, 0.25]]).log())
    best_live, worst = 2 * torch.tensor(0.24).log(), state.pool.scores[0, 1]
    assert state.done and best_live > worst > best_live * 1.5


@pytest.mark.parametrize(("patience", "held"), [(0.25, 1), (0.5, 2), (0.75, 3), (1.0, 3)])
def test_no_more_finish_at_once_than_the_quota(patience, held, compared):
    """Three EOS among the four best of one step; what is beyond the quota is dropped, the best by rank come first."""
    logits = torch.zeros(1, 9)
    logits[:, [5, 2, 7]] = torch.tensor([6.0, 5.0, 4.0])
    search = fb.BeamSearch(4, 5, [7, 5, 2], stopping=fb.Patience(patience))
    state = search.init(1)
    search.step(state, logits)
    assert (state.pool.log_probs > -INF).sum() == held and state.done.item() == (held < 3 or patience == 0.75)
    assert state.pool.tokens[0, :held].tolist() == [5, 2, 7][:held]


@pytest.mark.parametrize("regime", REGIMES)
def test_request_that_is_done_is_not_touched(regime, compared):
    search = fb.BeamSearch(2, [1, 4], 3, finished=regime)
    state = search.init(2)
    search.step(state, torch.randn(2, 9))
    before = state.clone()
    moves = search.step(state, torch.randn(4, 9))
    assert before.done.tolist() == [True, False]
    for part in ("slots", "requests", "pool"):
        for name, field in getattr(state, part)._asdict().items():
            assert torch.equal(field[0], getattr(getattr(before, part), name)[0]), name
    assert moves.tokens[0].tolist() == [0, 0] and moves.source_rows[:2].tolist() == [0, 1]
    assert not moves.valid[0].any()


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("fault", [NAN, INF, -INF])
def test_faults_are_flagged_in_their_own_request(fault, regime, compared):
    search = fb.BeamSearch(2, 3, 3, finished=regime)
    state = search.init(3)
    logits = torch.randn(3, 9)
    logits[1] = fault
    search.step(state, logits)
    flag = {"nan": fb.kernels.FLAG_NAN, "inf": fb.kernels.FLAG_INF, "-inf": 0}[str(fault)]
    assert state.flags.tolist() == [0, flag | fb.kernels.FLAG_DEAD_END, 0]
    assert state.done.tolist() == [False, True, False]


@pytest.mark.parametrize("regime", REGIMES)
def test_batch_invariant_bitwise(regime, compared):
    """A request alone and as one of three; both ways of running are compared at each step."""
    settings = {
        "max_length": 4,
        "eos_id": [1, 2],
        "finished": regime,
        "stopping": fb.Exhausted(),
        "length_penalty": 0.7,
    }
    many, one = (fb.BeamSearch(3, **settings) for _ in range(2))
    state, alone = many.init(3), one.init(1)
    for _ in range(4):
        logits = torch.randn(3, 3, 12)
        moves, own = many.step(state, logits), one.step(alone, logits[1])
        assert torch.equal(moves.tokens[1], own.tokens[0]) and torch.equal(moves.parents[1], own.parents[0])
    for part in ("slots", "requests", "pool"):
        for name, field in getattr(state, part)._asdict().items():
            assert torch.equal(field[1], getattr(getattr(alone, part), name)[0]), name


@pytest.mark.parametrize("regime", REGIMES)
def test_strided_rows(regime, compared, monkeypatch):
    """Only EOS columns are read, at the stride of the rows; the bitmask has its own."""
    wide, bits = torch.full((8, 90), NAN), torch.zeros(8, 9, dtype=torch.int32)
    logits, mask = wide[::2, 10:50], bits[1::2, 4:6]
    search = fb.BeamSearch(4, 3, [3, 39], finished=regime)
    state, dense = search.init(1), search.init(1)
    plainly = DEFINITIONS[regime]
    for _ in range(3):
        logits.copy_(torch.randn(4, 40))
        mask.copy_(pack_bitmask(torch.rand(4, 40) < 0.7))
        moves = search.step(state, logits, mask)
        with monkeypatch.context() as patch:
            patch.setattr(MODULES[regime], "_op", plainly)
            want = search.step(dense, logits.contiguous(), mask.contiguous())
        for field, wanted in zip(moves, want, strict=True):
            assert torch.equal(field, wanted)
    assert (mask.stride(0), logits.stride(0)) == (18, 180)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the trick is a CPU's; on a GPU the memory would be real")
@pytest.mark.parametrize("regime", REGIMES)
def test_rows_beyond_2_31_elements(regime, monkeypatch):
    """The stride itself fits int32, so only the casts of row and parent keep the products from wrapping."""
    logits, bits = far_apart(6, 40, 2**29 + 8), far_apart(6, 2, 2**29 + 8, torch.int32)
    near, allowed = torch.randn(6, 40).bfloat16() * 0.1, torch.ones(6, 40, dtype=torch.bool)
    near[4:, 3] += 6.0  # likely to end where offsets exceed 2**31, so that the EOS columns read there decide
    near[4:, 39] += 7.0
    allowed[4:, 39] = False
    mask = pack_bitmask(allowed)
    logits.copy_(near)
    bits.copy_(mask)
    seen = []
    # a copy to compare with would be dense, so the kernel steps one state and the definition another
    for op, x, words in ((LAUNCHERS[regime], logits, bits), (DEFINITIONS[regime], near, mask)):
        monkeypatch.setattr(MODULES[regime], "_op", op)
        for batch in (1, 3):
            search = fb.BeamSearch(6 // batch, 3, [3, 39], finished=regime)
            state = search.init(batch)
            for _ in range(2):
                search.step(state, x, words)
            seen.append([*state.slots, *state.pool])
    for fields, want in zip(seen[:2], seen[2:], strict=True):
        for field, wanted in zip(fields, want, strict=True):
            assert torch.equal(field, wanted)


@pytest.mark.parametrize("regime", REGIMES)
def test_input_not_modified(regime, compared):
    search = fb.BeamSearch(3, 4, [1, 2], finished=regime, temperature=0.7)
    state = search.init(2)
    limits = [field.clone() for field in state.limits]
    for _ in range(4):
        logits, mask = torch.randn(6, 40), pack_bitmask(torch.rand(6, 40) < 0.7)
        before = logits.clone(), mask.clone()
        search.step(state, logits, mask)
        assert torch.equal(logits, before[0]) and torch.equal(mask, before[1])
    for field, then in zip(state.limits, limits, strict=True):
        assert torch.equal(field, then)


# ---------------------------------------------------------------------------------------------------------------------
# scores that are not log-probabilities


class Ranked(NamedTuple):
    """What ranks by an accumulated score less a penalty for each parent and token."""

    best: select.Candidates
    increments: torch.Tensor  # float32 [B, P, V]
    adjusted: torch.Tensor  # float32 [B, P, V]
    end_penalty: torch.Tensor | None
    end_scores: torch.Tensor | None


def rank_penalised(state, logits, penalty, bitmask=None, eos_is_penalised=True, eos_is_scored=False):
    """Candidates of rows ``logits [B * P, V]`` under ``penalty [B, P, V]``: everything is sorted.

    With ``eos_is_scored`` what EOS score less their penalty is told as it is, barring those of infinite penalty.
    """
    slots, (rows, vocab_size), k = state.slots, logits.shape, state.beam_size
    parents = rows // state.batch_size
    options = {
        "bitmask": bitmask,
        "temperature": None if state.temperature is None else state.temperature[:, :parents].flatten(),
        "active": slots.active[:, :parents].flatten(),
    }
    plainly = select.top_candidates(logits, slots.scores[:, :parents].contiguous(), k, **options)
    adjusted = adjust(logits, None if options["temperature"] is None else options["temperature"][:, None])
    if bitmask is not None:
        adjusted = adjusted.masked_fill(~unpack_bitmask(bitmask, vocab_size), -INF)
    increments, adjusted = (
        x.view(state.batch_size, parents, vocab_size)
        for x in (token_log_prob(adjusted, plainly.lse[:, None]), adjusted)
    )
    open_slots = slots.active[:, :parents, None]
    log_probs, scores = (
        torch.where(open_slots, x[:, :parents, None] + increments, -INF) for x in (slots.log_probs, slots.scores)
    )
    scores, end_scores = scores - penalty, None
    if state.eos is not None:
        end_scores = scores[:, :, state.eos].flatten(1) if eos_is_scored else None
        scores[:, :, state.eos] = -INF
    parent, token = torch.cartesian_prod(torch.arange(parents), torch.arange(vocab_size)).T
    fields = [x.flatten(1) for x in (scores, log_probs, adjusted)]
    fields += [x.expand(state.batch_size, -1) for x in (parent, token)]
    order = total_order((fields[0], fields[3], fields[2], fields[4]))[:, :k]
    scores, log_probs, own, parent, token = (
        torch.nn.functional.pad(x.gather(1, order), (0, k - order.shape[1]), value=empty)
        for x, empty in zip(fields, (-INF, -INF, -INF, 0, 0), strict=True)
    )
    none = scores == -INF
    log_probs, own = log_probs.masked_fill(none, -INF), own.masked_fill(none, -INF)
    parent, token = parent.masked_fill(none, 0), token.masked_fill(none, 0)
    best = select.Candidates(log_probs, parent, token, own, plainly.lse, plainly.flags, scores)
    eos_is_penalised &= state.eos is not None
    end_penalty = penalty[:, :, state.eos].flatten(1) if eos_is_penalised else None
    return Ranked(best, increments, adjusted, end_penalty, end_scores)


def some_finish(state, parents, share=0.5):
    """A choice bool ``[B, P * n]`` of EOS candidates, no more of a request's than it has beams."""
    chance = torch.rand(state.batch_size, parents * len(state.eos))
    place = chance.sort(1).indices.sort(1).indices
    return (chance < share) & (place < state.limits.width[:, None])


def advance(regime, rule, state, logits, ranked, bitmask=None, finishing=None, best_possible=None):
    """One step of the regime's operation."""
    parents = len(logits) // state.batch_size
    options = {
        "eos": state.eos,
        "pad_id": state.pad_id,
        "bitmask": bitmask,
        "temperature": None if state.temperature is None else state.temperature[:, :parents].flatten(),
        "end_penalty": ranked.end_penalty,
        "end_scores": ranked.end_scores,
    }
    common = (logits, ranked.best, state.slots, state.requests, state.history)
    if regime == "in_place":
        return advance_in_place.advance_in_place_(*common, state.limits, **options)
    options |= {"rule": rule.rule, "finishing": finishing, "best_possible": best_possible}
    return advance_pool.advance_pool_(*common, state.pool, state.limits, state.bound, **options)


def random_penalty(rng, *shape):
    """Halves, of both signs, so that scores tie; and a few EOS that cannot rank at all."""
    penalty = torch.randint(-1, 4, shape) * 0.5
    if rng.random() < 0.2:
        penalty[torch.rand(shape) < 0.1] = INF
    return penalty


def run_penalised_search(seed, regime, rule):
    """Returns whether slots ended up with scores of their own, and whether the pool did."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    vocab_size, lengths = rng.randint(4, 12), [rng.randint(2, 5), rng.randint(2, 6)]
    search = fb.BeamSearch(
        beam_size=[rng.randint(2, 5), rng.randint(2, 5)],
        max_length=lengths,
        min_length=[0, rng.randint(0, 2)],
        eos_id=[2, [1, 3], None, [3, 0, 2]][seed % 4],
        stopping=rule,
        finished=regime,
        length_penalty=rng.choice([[0.0, 1.3], [fb.GNMT(0.6), -0.5], 1.0]),
        temperature=rng.choice([1.0, [1.0, 0.7]]),
        pad_id=rng.randint(0, 3),
    )
    state, first, slots_differ, pool_differs = search.init(2), True, False, False
    while not state.all_done():
        parents = 1 if first and rng.random() < 0.6 else state.beam_size
        first = False
        logits = random_logits(rng, 2 * parents, vocab_size)
        mask = pack_bitmask(torch.rand(2 * parents, vocab_size) < 0.8) if rng.random() < 0.3 else None
        penalty = random_penalty(rng, 2, parents, vocab_size)
        ranked = rank_penalised(state, logits, penalty, mask, rng.random() < 0.8, rng.random() < 0.3)
        decided = regime == "pool" and state.eos is not None and rng.random() < 0.4
        finishing = some_finish(state, parents) if decided else None
        possible = torch.randn(2) if rng.random() < 0.3 else None
        advance(regime, rule, state, logits, ranked, mask, finishing, possible)
        slots_differ |= not torch.equal(state.slots.scores, state.slots.log_probs)
        norm = state.limits.length_norm.gather(1, (state.pool.steps + 1).long())
        pool_differs |= not torch.equal(state.pool.scores, state.pool.log_probs / norm)
    return slots_differ, pool_differs


@pytest.mark.parametrize(("regime", "rule", "searches"), SETTINGS, ids=repr)
def test_penalised_matches_reference(regime, rule, searches, compared):
    """Scores accumulate apart from log-probabilities; some steps have no penalty of EOS, all have accumulated ones."""
    first = 1000 + len(repr(rule)) * 4
    differ = [run_penalised_search(first + i, regime, rule) for i in range(searches)]
    assert any(slots for slots, _ in differ) and any(pool for _, pool in differ) == (regime == "pool")
    assert compared[regime].steps > searches


@pytest.mark.parametrize(("regime", "decided"), [("pool", False), ("pool", True), ("in_place", False)])
def test_penalised_wide_beam(regime, decided, compared):
    """The penalty of an EOS is found where candidates fill several blocks."""
    search = fb.BeamSearch([70, 40], 3, [1, 5], finished=regime, stopping=fb.Exhausted())
    state = search.init(2)
    for parents in (1, 70, 70):
        logits = torch.randn(2 * parents, 40).round()
        penalty = torch.randint(-1, 4, (2, parents, 40)) * 0.5
        ranked = rank_penalised(state, logits, penalty, eos_is_scored=parents == 70)
        finishing = some_finish(state, parents) if regime == "pool" and parents == 70 and decided else None
        advance(regime, search.stopping, state, logits, ranked, finishing=finishing)
    assert state.all_done()


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("scored", [False, True])
def test_infinite_penalty_bars_an_eos(scored, regime, compared):
    """Not only ranked last: there are fewer candidates than beams, and it is none of them."""
    logits = torch.full((1, 9), -INF)
    logits[0, [2, 4, 5]] = torch.tensor([3.0, 1.0, 2.0])
    search = fb.BeamSearch(4, 5, [2, 5], finished=regime, stopping=fb.Exhausted())
    state = search.init(1)
    penalty = torch.zeros(1, 1, 9)
    penalty[0, 0, 2] = INF
    ranked = rank_penalised(state, logits, penalty, None, not scored, scored)
    moves = advance(regime, search.stopping, state, logits, ranked)
    kept = (
        state.slots.log_probs if regime == "in_place" else torch.cat([state.slots.log_probs, state.pool.log_probs], 1)
    )
    assert (kept > -INF).sum() == 2 and moves.tokens[0, moves.valid[0]].tolist() == [5, 4][regime == "pool" :]


class Beam(NamedTuple):
    """A live beam, or a finished hypothesis, whose score is then divided by its norm."""

    score: np.float32
    log_prob: np.float32
    tokens: tuple[int, ...]
    rank: int


class Oracle:
    """One request's beams and pool, in Python floats of 32 bits."""

    slots = 4  # the widest request's

    def __init__(self, width, max_length, quota, norms, bounds, eos, rule):
        self.width, self.max_length, self.quota, self.norms, self.bounds = width, max_length, quota, norms, bounds
        self.eos, self.rule, self.done, self.steps = eos, rule.rule, False, 0
        self.live, self.pool, self.bound = [Beam(F32(0), F32(0), (), 0)], [], INF

    def step(self, increments, adjusted, penalty, finishing=None):
        """Each is ``[P, V]``; ``finishing`` says which EOS finish, however they rank."""
        if self.done:
            return
        self.steps += 1
        last = self.steps == self.max_length
        ranked = sorted(
            (-(beam.score + increments[k, v] - penalty[k, v]), k, -adjusted[k, v], v)
            for k, beam in enumerate(self.live)
            for v in range(increments.shape[1])
            if increments[k, v] > -INF and penalty[k, v] < INF
            if v not in self.eos or finishing is None or finishing[k, v]
        )
        if finishing is not None:  # ranks are among what the step is given
            given = [item for item in ranked if item[3] not in self.eos][: self.slots]
            ranked = [item for item in ranked if item[3] in self.eos or item in given]
        beams = [
            Beam(-score, self.live[k].log_prob + increments[k, v], (*self.live[k].tokens, v), rank)
            for rank, (score, k, _, v) in enumerate(ranked)
        ]
        norm = self.norms[self.steps]
        room = self.width - len(self.pool) if self.rule.shrinks else self.width
        reach = room if finishing is None else len(beams)
        new = [b._replace(score=b.score / norm) for b in beams[:reach] if b.tokens[-1] in self.eos]
        others = [b for b in beams if b.tokens[-1] not in self.eos][: self.width]
        left_out = []
        if self.rule.by_arrival:
            if not (self.rule.overflow == "step" or (self.rule.overflow == "last" and last)):
                free = max(0, self.quota - len(self.pool))
                new, left_out = new[:free], new[free:]
            self.pool += new
        else:
            self.pool = sorted(self.pool + new, key=lambda b: -b.score)[: self.width]
        stop = len(self.pool) >= self.quota
        if self.rule.awaits_best:
            stop = stop and any(b.rank == 0 for b in [*self.pool, *new])
        possible = others[0].score / self.bounds[self.steps] if others else -INF
        if len(self.pool) == self.width and (self.rule.exact or self.rule.best_live):
            as_it_is = others[0].score / norm if others else -INF
            stop = self.pool[-1].score >= (possible if self.rule.exact else as_it_is)
        if self.rule.shrinks and finishing is not None:
            others = others[: self.width - len(self.pool)]
        elif self.rule.shrinks or last:
            others = [b for b in others if b.rank < reach]
        self.bound = max([possible if others and not last else -INF, *(b.score for b in left_out)])
        self.live = others if last or not stop else []
        self.done = stop or last or not self.live


def padded(values, size, empty=-INF):
    return torch.tensor([*values, *[empty] * (size - len(values))])


@pytest.mark.parametrize("rule", RULES, ids=repr)
@pytest.mark.parametrize(("penalised", "decided"), [(True, False), (False, False), (False, True), (True, True)])
def test_penalised_pool_step_against_python(penalised, decided, rule, compared):
    """Without a penalty the scores are the log-probabilities, bit for bit. What is decided finishes, and only that."""
    ended = 0
    for seed in range(1 if decided else 3):
        torch.manual_seed(100 + seed)
        search = fb.BeamSearch([4, 2], [5, 6], [2, 5], stopping=rule, length_penalty=[0.8, 1.0])
        state = search.init(2)
        limits = state.limits
        tables = zip(*(field.tolist() for field in limits[:4]), limits.length_norm, limits.bound_norm, strict=True)
        oracles = [
            Oracle(width, max_length, quota, norms.numpy(), bounds.numpy(), {2, 5}, rule)
            for width, _, max_length, quota, norms, bounds in tables
        ]
        for parents in (1, *[4] * 5):
            logits = torch.randn(2 * parents, 9).round()
            logits[:, [2, 5]] += seed
            penalty = torch.randint(0, 4, (2, parents, 9)) * 0.5 if penalised else torch.zeros(2, parents, 9)
            if penalised:
                penalty[torch.rand(penalty.shape) < 0.1] = INF
            scored = penalised and seed == 1
            ranked = rank_penalised(state, logits, penalty, None, penalised and not scored, scored)
            finishing, chosen = None, [None, None]
            if decided:
                finishing = some_finish(state, parents, 0.8)
                chosen = torch.zeros(2, parents, 9, dtype=torch.bool)
                chosen[:, :, [2, 5]] = finishing.view(2, parents, 2)
            advance("pool", rule, state, logits, ranked, finishing=finishing)
            for b, oracle in enumerate(oracles):
                oracle.step(*(x[b].numpy() for x in (ranked.increments, ranked.adjusted, penalty)), chosen[b])
                slots, pool = (type(fields)(*(x[b] for x in fields)) for fields in (state.slots, state.pool))
                for fields, beams in ((slots, oracle.live), (pool, oracle.pool)):
                    places = len(fields.scores)
                    assert torch.equal(fields.scores, padded([float(b.score) for b in beams], places)), seed
                    assert torch.equal(fields.log_probs, padded([float(b.log_prob) for b in beams], places)), seed
                    assert torch.equal(fields.ranks, padded([b.rank for b in beams], places, 0)), seed
                assert torch.equal(pool.tokens, padded([b.tokens[-1] for b in oracle.pool], len(pool.tokens), 0))
                assert (state.done[b].item(), state.requests.steps[b].item()) == (oracle.done, oracle.steps)
                assert state.bound[b].item() == oracle.bound
                if not penalised:
                    assert torch.equal(slots.scores, slots.log_probs)
            ended += sum(oracle.done for oracle in oracles)
        assert state.all_done()
    assert ended


def everything_by_kernels(monkeypatch):
    monkeypatch.setattr(select, "summarize_op", launch_summarize)
    monkeypatch.setattr(select, "row_lse_op", launch_row_lse)
    monkeypatch.setattr(select, "_select_op", launch_select)
    for regime, module in MODULES.items():
        monkeypatch.setattr(module, "_op", LAUNCHERS[regime])


@pytest.mark.parametrize("regime", REGIMES)
def test_search_through_all_kernels_equals_the_search_through_torch(regime, device, monkeypatch):
    """Log-sum-exps may differ by ulps, so the scores are close and the tokens equal."""
    model = TableLM(70, seed=5, eos=[4], eos_bias=3.0)
    search = fb.BeamSearch([3, 2], 5, 4, finished=regime, stopping=fb.Exact(), temperature=[1.0, 0.8], vocab_size=69)

    def on(target):
        def wrapped(tokens, cache):
            logits, cache = model(tokens.cpu(), pytree.tree_map_only(torch.Tensor, torch.Tensor.cpu, cache))
            return logits.to(target), pytree.tree_map(lambda t: t.to(target), cache)

        return fb.decode(search, wrapped, torch.tensor([7, 8], device=target))

    want = on("cpu")
    if device == "cpu":
        everything_by_kernels(monkeypatch)
    got = on(device)
    assert want.valid.any(1).all() and want.finished.any()
    for name in ("tokens", "lengths", "valid", "finished"):
        assert torch.equal(getattr(got, name).cpu(), getattr(want, name)), name
    for name in ("scores", "log_probs", "token_log_probs"):
        assert torch.allclose(getattr(got, name).cpu(), getattr(want, name), atol=1e-5), name


def recorded(regime, monkeypatch, **options):
    """The arguments of the operation at the second step of a search."""
    seen = []
    definition = DEFINITIONS[regime]

    def record(*arguments):
        seen.append(plain(arguments))
        return definition(*arguments)

    monkeypatch.setattr(MODULES[regime], "_op", record)
    mask = options.pop("mask", None)
    dtype = options.pop("dtype")
    search = fb.BeamSearch(3, 5, finished=regime, **options)
    state = search.init(2)
    for _ in range(2):
        search.step(state, torch.randn(6, 40).to(dtype), mask)
    return seen[1]


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("full", [False, True])
def test_opcheck(full, dtype, regime, device, monkeypatch):
    """The mutated lists of tensors too: state is written, candidates and limits are not."""
    options = {"eos_id": [1, 2], "temperature": 0.7, "mask": pack_bitmask(torch.rand(6, 40) < 0.7)} if full else {}
    arguments = recorded(regime, monkeypatch, dtype=dtype, **options)
    arguments = pytree.tree_map_only(torch.Tensor, lambda t: t.to(device), arguments)
    declared = DEFINITIONS[regime]._schema.arguments
    if full:
        for name in ("end_penalty", "end_scores"):
            arguments[[a.name for a in declared].index(name)] = torch.ones(2, 6, device=device)
    if full and regime == "pool":
        arguments[[a.name for a in declared].index("decided")] = True
    torch.library.opcheck(DEFINITIONS[regime], tuple(arguments))
    mutable = {a.name for a in declared if a.alias_info is not None and a.alias_info.is_write}
    assert mutable == {"slots", "requests", "history"} | ({"pool", "bound"} if regime == "pool" else set())


@pytest.mark.parametrize("regime", REGIMES)
def test_compiles_without_graph_break(regime, device):
    """A whole step, and no step but the first two is compiled anew."""
    torch._dynamo.reset()
    search = fb.BeamSearch(3, 6, [1, 2], finished=regime, temperature=0.7, stopping=fb.Exhausted())
    step = torch.compile(search.step, fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager")
    state, want = search.init(2, device), search.init(2, device)
    for t in range(6):
        logits, mask = torch.randn(6, 40, device=device), pack_bitmask(torch.rand(6, 40, device=device) < 0.9)
        with torch._dynamo.config.patch(error_on_recompile=t > 1):
            moves = step(state, logits, mask)
        for field, wanted in zip(moves, search.step(want, logits, mask), strict=True):
            assert torch.equal(field, wanted)
    for part in ("slots", "requests", "history", "pool"):
        for name, field in getattr(state, part)._asdict().items():
            assert torch.equal(field, getattr(getattr(want, part), name)), name


@needs_gpu
@pytest.mark.parametrize("regime", REGIMES)
def test_cuda_graph_replay_reads_new_inputs(regime):
    search = fb.BeamSearch(3, 6, [1, 2], finished=regime, stopping=fb.Exhausted())
    state, logits = search.init(2, "cuda"), torch.randn(6, 40, device="cuda")
    want = state.clone()
    search.step(state.clone(), logits)  # compiled and loaded outside the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        moves = search.step(state, logits)
    for _ in range(6):
        logits.normal_()
        graph.replay()
        for field, wanted in zip(moves, search.step(want, logits), strict=True):
            assert torch.equal(field, wanted)
    for part in ("slots", "requests", "history", "pool"):
        for name, field in getattr(state, part)._asdict().items():
            assert torch.equal(field, getattr(getattr(want, part), name)), name
