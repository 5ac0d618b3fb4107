"""Selecting the best continuations of every beam: ``select_beams`` beside what users write today."""

from collections.abc import Callable
from typing import Any

import pytest

from baselines import BYTES_PER_LOGIT, floor, log_softmax_topk, logsumexp_topk
from flashbeam.kernels import select_beams
from harness import measure
from workload import DTYPES, SHAPES, Inputs, make_inputs

# the baselines take 2K: EOS candidates are among theirs
IMPLS: dict[str, Callable[[Inputs, int], Any]] = {
    "flashbeam": lambda inputs, k: select_beams(*inputs, k),
    "log_softmax_topk": lambda inputs, k: log_softmax_topk(*inputs, 2 * k),
    "logsumexp_topk": lambda inputs, k: logsumexp_topk(*inputs, 2 * k),
    "floor": lambda inputs, k: floor(inputs.logits),
}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SHAPES)
def test_select(benchmark: Any, name: str, dtype: str, impl: str, device: str, tiny: bool) -> None:
    shape = SHAPES[name].tiny() if tiny else SHAPES[name]
    benchmark.group = f"select {name} {dtype}"

    def make() -> Callable[[], Any]:
        inputs = make_inputs(shape, DTYPES[dtype], device)
        return lambda: IMPLS[impl](inputs, shape.beams)

    bytes_moved = round(shape.logits * BYTES_PER_LOGIT[impl](DTYPES[dtype].itemsize))
    measure(benchmark, make, bytes_moved, device, rounds=30 if device == "cuda" else 7)
