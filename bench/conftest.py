"""Options of `pytest bench`: where to run, with how many threads, and whether only to show that everything runs."""

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("flashbeam")
    group.addoption("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    group.addoption("--threads", type=int, default=2, help="torch's threads on CPU")
    group.addoption("--tiny", action="store_true", help="tiny shapes: shows that the benchmarks run, times nothing")


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    torch.set_num_threads(request.config.getoption("threads"))
    return str(request.config.getoption("device"))


@pytest.fixture
def tiny(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("tiny"))
