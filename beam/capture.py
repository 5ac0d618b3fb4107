"""Work on tensors that stay where they are, as a CUDA graph."""

from collections.abc import Callable
from typing import Generic, TypeVar

import torch

from .arguments import whole_number

Result = TypeVar("Result")


class Captured(Generic[Result]):
    """A function that a GPU repeats without the host: one launch for all that it does.

    The first calls run ``function`` as it is, so that kernels are compiled and loaded. The next one records it in a
    CUDA graph, and it and all later ones replay that: the same operations on the same memory, with none of the
    function's Python. On other devices every call runs ``function``.

    So everything that ``function`` reads and writes must stay in its memory, and what differs from call to call must
    be in tensors. A :class:`flashbeam.State` is so from its first step on, whatever the search; only ``fb.Grammar``,
    whose matchers run on the host, cannot be captured. docs/capture.md has examples.

    Args:
        function: without arguments. It must not wait for the device.
        device: where it works.
        warmup: calls that run ``function`` as it is, each of which counts: nothing is undone.

    Raises:
        ValueError: ``warmup`` is negative.
    """

    def __init__(self, function: Callable[[], Result], device: torch.device | str, *, warmup: int = 2):
        self.device = torch.device(device)
        self._function = function  # holds the tensors that a replay reads
        self._to_warm_up = whole_number(0)("warmup", warmup)
        self._replay: Callable[[], None] | None = None

    def __call__(self) -> Result:
        """What ``function`` returns. Once captured, the same tensors at every call, which the next one overwrites."""
        if self._replay is None:
            if self._to_warm_up > 0 or not _records(self.device):
                self._to_warm_up -= 1
                return self._function()
            self._replay, self._result = _record(self._function, self.device)
        self._replay()
        return self._result


def _records(device: torch.device) -> bool:
    return device.type == "cuda"


def _record(function: Callable[[], Result], device: torch.device) -> tuple[Callable[[], None], Result]:
    """What replays ``function``, and what it returned: nothing has been computed yet."""
    graph = torch.cuda.CUDAGraph()
    # a stream of its own: torch keeps one for all captures, on whichever device came first
    with torch.cuda.device(device), torch.cuda.graph(graph, stream=torch.cuda.Stream(device)):
        result = function()
    return graph.replay, result
