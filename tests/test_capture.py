"""A step from the second on is the same operations on the same memory, which is what a CUDA graph replays."""

import pytest
import torch

from fake_graph import addresses, assert_equal, record
from flashbeam import capture
from step_cases import CASES, search_of

V, STEPS = 60, 7
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="captures a CUDA graph")


@pytest.fixture
def recorded(monkeypatch):
    """Captured on a CPU."""
    monkeypatch.setattr(capture, "_records", lambda device: True)
    monkeypatch.setattr(capture, "_record", record)


@pytest.mark.parametrize("name", CASES)
def test_a_replayed_step_goes_on_as_an_eager_one(name):
    search = search_of(name)
    eager, replayed = search.init(2), search.init(2)
    first, logits = torch.randn(2, V), torch.randn(8, V)
    search.step(eager, first)
    search.step(replayed, first)
    places = addresses(replayed)
    replay, step = record(lambda: search.step(replayed, logits))
    for _ in range(STEPS):  # the last where all are done
        replay()
        assert_equal((step, replayed), (search.step(eager, logits), eager))
        logits.copy_(torch.randn(8, V))
    assert addresses(replayed) == places
    assert bool(replayed.done.all())
