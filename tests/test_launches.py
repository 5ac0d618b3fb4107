"""A beam step is four operations on the device, and none of them is asked for its result."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import flashbeam as fb

# no kernel is launched for these: they make views, or read metadata
VIEWS = {
    "aten::view",
    "aten::unsqueeze",
    "aten::slice",
    "aten::detach",
    "aten::alias",
    "aten::_unsafe_view",
    "aten::select",
}


class Recorder(TorchDispatchMode):
    """The names of the operations called, views left out."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().partition(".")[0]
        if name not in VIEWS:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def recorded(search, batch_size, logits):
    state = search.init(batch_size)
    for step in logits[:-1]:
        search.step(state, step)
    with Recorder() as recorder:
        search.step(state, logits[-1])
    return recorder.names


LOGITS = [torch.zeros(2, 50), torch.zeros(6, 50), torch.zeros(6, 50)]
STREAM = ["flashbeam::summarize", "flashbeam::row_lse", "flashbeam::select"]


@pytest.mark.parametrize("temperature", [1.0, [0.5, 2.0]])
@pytest.mark.parametrize("stopping", [fb.FirstFinished(), fb.Exact()])
def test_a_step_is_four_launches(temperature, stopping):
    search = fb.BeamSearch(3, 9, 2, temperature=temperature, stopping=stopping)
    assert recorded(search, 2, LOGITS) == [*STREAM, "flashbeam::advance_pool_"]


def test_a_step_in_place_also_looks_up_the_length_norm():
    names = recorded(fb.BeamSearch(3, 9, 2, finished="in_place"), 2, LOGITS)
    own = [name for name in names if name.startswith("flashbeam::")]
    assert own == [*STREAM, "flashbeam::advance_in_place_"]
    assert len(names) - len(own) <= 4, names


def test_the_number_of_launches_does_not_grow_with_the_step():
    search = fb.BeamSearch(3, 40, 2, stopping=fb.Exhausted())
    assert len(recorded(search, 2, LOGITS)) == len(recorded(search, 2, LOGITS + [LOGITS[-1]] * 30))
