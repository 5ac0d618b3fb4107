"""Asking the device whether a search is over, without waiting for the answer.

The host looks at what was asked one round earlier. By then the device has a round in its queue, so it never waits for
the host; the search makes at most one round more than it needs, in which nothing changes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .state import State


class _Answer:
    """A number on its way from the device to the host."""

    def __init__(self, device: torch.device):
        on_cuda = device.type == "cuda"
        with torch.inference_mode(False):  # rounds may be made in and out of it
            self.number = torch.zeros((), dtype=torch.int32, pin_memory=on_cuda)
        self.arrived = torch.cuda.Event() if on_cuda else None

    def send(self, number: Tensor) -> None:
        """Put the journey of ``number`` into the device's queue."""
        self.number.copy_(number, non_blocking=True)
        if self.arrived is not None:
            self.arrived.record(torch.cuda.current_stream(number.device))

    def wait(self) -> int:
        """The number sent last."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return int(self.number)


def rounds(state: State, late: bool) -> Iterator[None]:
    """See ``State.until_done``; ``late``: the host looks at the answer of one round earlier."""
    if not late:
        while not state.all_done():
            yield
        return
    answer = _Answer(state.device)
    answer.send(_steps_left(state))
    # a search that has made no step needs one; of another the host does not know
    if state.vocab_size is not None and answer.wait() == 0:
        return
    while not state.out_of_time():
        yield
        before = answer.wait()  # as things were before the round
        if before <= 1:
            return
        answer.send(_steps_left(state))


def _steps_left(state: State) -> Tensor:
    """int32: the most steps that a request may still need."""
    return ((state.limits.max_length - state.requests.steps) * ~state.requests.done).amax()
