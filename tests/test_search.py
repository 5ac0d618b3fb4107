"""What a search does with mistakes, odd settings and odd surroundings, beyond the contract's own tests."""

import pytest
import torch

import flashbeam as fb
from flashbeam.kernels import select_beams, summarize


def finished(search, batch_size=2, vocab_size=20):
    """The hypotheses of a search over random logits."""
    state = search.init(batch_size)
    torch.manual_seed(0)
    logits = torch.randn(batch_size, vocab_size)
    while not state.all_done():
        search.step(state, logits)
        logits = torch.randn(batch_size * state.beam_size, vocab_size)
    return search.finalize(state)


@pytest.mark.parametrize("bad", ["mask", "constraint"])
def test_a_failed_first_step_changes_nothing(bad):
    class Wrong:
        def init(self, batch_size, beam_size, vocab_size, device):
            return torch.zeros(batch_size * beam_size)

        def bitmask(self, state):
            return torch.zeros(state.shape[0], 1, dtype=torch.int32)  # too few words

        def advance(self, state, tokens):
            return state

    search = fb.BeamSearch(3, 4, 2, constraint=Wrong() if bad == "constraint" else None)
    state = search.init(2)
    mask = torch.full((4, 2), -1, dtype=torch.int32).t() if bad == "mask" else None  # [2, 4] with strides (1, 2)
    with pytest.raises(ValueError, match=r"bitmask: expected"):
        search.step(state, torch.randn(2, 100), bitmask=mask)
    assert state.vocab_size is None
    fb.BeamSearch(3, 4, 2).step(state, torch.randn(2, 100))  # [B, V] is still welcome


def test_a_state_made_under_inference_mode_goes_on_outside_it():
    search = fb.BeamSearch(3, 4, 2)
    with torch.inference_mode():
        state = search.init(2)
        search.step(state, torch.randn(2, 20))
    search.step(state, torch.randn(6, 20))
    assert state.requests.steps.tolist() == [2, 2]


def test_boundless_patience_takes_no_more_memory_than_can_be_used():
    search = fb.BeamSearch(3, 5, 2, stopping=fb.Patience(1e9))
    assert search.init(2).pool.scores.shape[1] <= 3 * 5 + 3
    exhausted = fb.BeamSearch(3, 5, 2, stopping=fb.Exhausted())
    assert torch.equal(finished(search).scores[:, 0], finished(exhausted).scores[:, 0])


@pytest.mark.parametrize("token", [-1, 20, 2**40])
def test_excluded_ids_outside_the_vocabulary_are_ignored(token):
    logits, exclude = torch.randn(2, 20), torch.tensor([token])
    ours, plain = summarize(logits, exclude=exclude), summarize(logits)
    assert torch.equal(ours.tiles.group_max, plain.tiles.group_max)
    assert torch.equal(ours.tiles.tile_max, plain.tiles.tile_max)
    best = select_beams(logits, torch.zeros(2, 1), 3, exclude=exclude)
    assert torch.equal(best.tokens, select_beams(logits, torch.zeros(2, 1), 3).tokens)


def test_finished_neighbours_change_nothing_where_scores_tie():
    # a finished request has nothing but equal scores, of -inf
    logits = torch.randn(3, 4, 5000).round()
    log_probs = torch.zeros(3, 4)
    log_probs[1] = -torch.inf
    best = select_beams(logits, log_probs, 4)
    alone = select_beams(logits[2:], log_probs[2:], 4)
    assert not best.valid[1].any()
    assert torch.equal(best.tokens[2:], alone.tokens)
    assert torch.equal(best.log_probs[2:], alone.log_probs)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"length_penalty": -30.0}, ValueError, r"length_penalty: expected a norm between .* for length 18, got"),
        (
            {"length_penalty": 400},
            ValueError,
            r"length_penalty: expected a norm between .* for length 2, got 2.58225e\+120",
        ),
        ({"length_penalty": fb.GNMT}, TypeError, r"length_penalty: expected a number or fb.GNMT\(alpha\), got type"),
        ({"temperature": 1e-39}, ValueError, r"temperature: expected a number between 1e-37 and 1e37, got 1e-39"),
        ({"selection": fb.TopK}, TypeError, r"selection: expected a selection such as fb.TopK\(\), got <class"),
        ({"finished": "in_place", "stopping": fb.Patience(2)}, ValueError, r"stopping: expected a rule that lets"),
    ],
)
def test_rejects_settings_that_cannot_work(settings, error, message):
    with pytest.raises(error, match=message):
        fb.BeamSearch(4, 64, 2, **settings)


@pytest.mark.parametrize(
    ("search", "model", "message"),
    [
        ("x", max, "search: expected an fb.BeamSearch, got str"),
        (fb.BeamSearch(2, 3), "m", "model: expected a function of tokens and a cache, got str"),
    ],
)
def test_decode_rejects_what_is_no_search_and_no_model(search, model, message):
    with pytest.raises(TypeError, match=f"^{message}$"):
        fb.decode(search, model, torch.tensor([5]))
