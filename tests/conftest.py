"""What every test runs under: the interpreter where there is no GPU, poisoned memory, fixed seeds."""

import os
import random

import torch

# before the first `import triton`: kernels decorated earlier, and triton's own library, stay compiled
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import hypothesis
import numpy as np
import pytest

torch.use_deterministic_algorithms(True, warn_only=True)
torch.utils.deterministic.fill_uninitialized_memory = True  # torch.empty -> nan, or the largest integer

# the same examples everywhere; no deadline: the interpreter is slow, and slower the first time
hypothesis.settings.register_profile("flashbeam", deadline=None, derandomize=True)
hypothesis.settings.load_profile("flashbeam")


@pytest.fixture
def device() -> str:
    """Where kernels are compiled, if anywhere; else where they are interpreted."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def _seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
