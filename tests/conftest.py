"""What every test runs under: the interpreter where there is no GPU, poisoned memory, fixed seeds."""

import importlib.util
import os
import random
import sys
from pathlib import Path

import torch

# before the first `import triton`: kernels decorated earlier, and triton's own library, stay compiled
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import hypothesis
import numpy as np
import pytest

# `python -m pytest` puts the root there, where transformers would take the folder kernels/ for the package `kernels`
sys.path[:] = [path for path in sys.path if Path(path).resolve() != Path(__file__).parents[1]]

torch.use_deterministic_algorithms(True, warn_only=True)
torch.utils.deterministic.fill_uninitialized_memory = True  # torch.empty -> nan, or the largest integer
# small tensors: a second thread costs more than it brings, and on a busy machine very much more
torch.set_num_threads(1)

# the same examples everywhere; no deadline: the interpreter is slow, and slower the first time
hypothesis.settings.register_profile("flashbeam", deadline=None, derandomize=True)
hypothesis.settings.load_profile("flashbeam")


def mend_interpreter() -> None:
    """Give Triton's interpreter before 3.9 what it lacked: an fma that rounds once, and bfloat16 constants."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    if hasattr(InterpreterBuilder, "get_bf16"):
        return

    def create_fma(self, x, y, z):
        with np.errstate(all="ignore"):
            total = x.data.astype(np.longdouble) * y.data + z.data
            return TensorHandle(total.astype(z.data.dtype), z.dtype.scalar)

    InterpreterBuilder.create_fma = create_fma
    InterpreterBuilder.get_bf16 = lambda self, value: self.create_fp_trunc(self.get_fp32(value), tl.bfloat16)


if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
    mend_interpreter()


@pytest.fixture
def device() -> str:
    """Where kernels are compiled, if anywhere; else where they are interpreted."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def _seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
