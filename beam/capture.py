"""Work on tensors that stay where they are, as a CUDA graph."""

from collections.abc import Callable
from contextvars import ContextVar
from typing import Generic, TypeVar

import torch

from .arguments import whole_number

Result = TypeVar("Result")
_STAYS: ContextVar[bool] = ContextVar("what runs now is replayed later", default=False)


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
        ValueError, TypeError: ``<argument>: expected X, got Y``. A step in ``function`` raises it too where a state of
            a constraint, or statistics of a term, would not stay: if a plain value in them changes, or a shape.
    """

    def __init__(self, function: Callable[[], Result], device: torch.device | str, *, warmup: int = 2):
        if not callable(function):
            raise TypeError(f"function: expected a function without arguments, got {type(function).__name__}")
        self.device = torch.device(device)
        self._function = function  # holds the tensors that a replay reads
        self._to_warm_up = whole_number(0)("warmup", warmup)
        self._replay: Callable[[], None] | None = None

    def __call__(self) -> Result:
        """What ``function`` returns. Once captured, the same tensors at every call, which the next one overwrites."""
        if self._replay is None:
            if self._to_warm_up > 0 or not _records(self.device):
                self._to_warm_up -= 1
                return self._run()
            self._replay, self._result = _record(self._run, self.device)
        self._replay()
        return self._result

    def _run(self) -> Result:
        token = _STAYS.set(True)
        try:
            return self._function()
        finally:
            _STAYS.reset(token)


def is_replayed() -> bool:
    """Whether what runs now is to be replayed, so that only tensors in their places may change."""
    return _STAYS.get()


def _records(device: torch.device) -> bool:
    return device.type == "cuda"


def _record(function: Callable[[], Result], device: torch.device) -> tuple[Callable[[], None], Result]:
    """What replays ``function``, and what it returned: nothing has been computed yet."""
    graph = torch.cuda.CUDAGraph()
    # a stream of its own: torch keeps one for all captures, on whichever device came first
    with torch.cuda.device(device), torch.cuda.graph(graph, stream=torch.cuda.Stream(device)):
        result = function()
    return graph.replay, result
