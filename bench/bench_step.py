"""A whole decode step, and each operation it is made of."""

from collections.abc import Callable
from typing import Any

import pytest

from baselines import BYTES_PER_LOGIT
from harness import measure
from steps import operations, searching
from workload import DTYPES, SHAPES, make_inputs

# "ending": hypotheses finish at every step; the others are operations alone, on a step's own arguments
PARTS = ("step", "step-ending", "summarize", "row_lse", "select", "advance_pool_")


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SHAPES)
def test_step(benchmark: Any, name: str, dtype: str, part: str, device: str, tiny: bool) -> None:
    shape = SHAPES[name].tiny() if tiny else SHAPES[name]
    benchmark.group = f"step {name} {dtype}"

    def make() -> Callable[[], Any]:
        inputs = make_inputs(shape, DTYPES[dtype], device)
        search, state = searching(shape, inputs, ending=part == "step-ending")

        def step() -> Any:
            return search.step(state, inputs.logits)

        return step if part.startswith("step") else operations(step)[part]

    # the step's, whichever part of it is timed
    bytes_moved = round(shape.logits * BYTES_PER_LOGIT["flashbeam"](DTYPES[dtype].itemsize))
    measure(benchmark, make, bytes_moved, device, rounds=30 if device == "cuda" else 7)
