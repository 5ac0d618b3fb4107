"""A search in mid-flight whose step can be repeated, and the operations that a step is made of."""

from collections.abc import Callable, Mapping
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

import flashbeam as fb
from workload import Inputs, Shape

EOS = 2
STEPS = 4096  # far more than are timed: no request reaches its max_length


def searching(shape: Shape, inputs: Inputs, *, ending: bool = False) -> tuple[fb.BeamSearch, fb.State]:
    """A search and its state after two steps: every slot is live.

    ``ending``: hypotheses finish at each step and merge into the pool; otherwise none does. Modifies the EOS column of
    ``inputs``.
    """
    inputs.logits[..., EOS] = 12.0 if ending else -30.0
    search = fb.BeamSearch(shape.beams, max_length=STEPS, eos_id=EOS, stopping=fb.Exhausted())
    state = search.init(shape.batch, device=inputs.logits.device)
    search.step(state, inputs.logits[:, 0])
    search.step(state, inputs.logits)
    return search, state


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func.namespace == "flashbeam":
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


def operations(call: Callable[[], Any]) -> dict[str, Callable[[], Any]]:
    """The operations of flashbeam that ``call`` runs, by name, each to be run again on the same arguments."""
    with _Recorder() as recorder:
        call()
    return {
        func.__name__.partition(".")[0]: (lambda func=func, args=args: func(*args)) for func, args in recorder.calls
    }
