"""The only timing code of the benchmarks.

CPU: callables take turns, A B C A B C ..., so that a change in the machine's mood meets all of them; what is reported
is medians and quartiles, and ratios of medians with a bootstrap interval over rounds. GPU: one round is one replay of a
CUDA graph of 20 calls over enough argument sets to find the L2 cache cold, timed with events.
"""

import json
import os
import platform
import random
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).parents[1]
CALLS_PER_GRAPH = 20

Case = Callable[[], Any]


class Timing(NamedTuple):
    """Microseconds of one call."""

    median_us: float
    first_quartile_us: float
    third_quartile_us: float
    best_us: float
    rounds: int


class Ratio(NamedTuple):
    """How many times longer one callable takes than another."""

    value: float
    low: float  # of the 95 % interval
    high: float


def interleave(
    cases: Mapping[str, Case], rounds: int, warmup: int = 2, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of each call of each case, by name: ``rounds`` rounds of one call each, after ``warmup`` untimed ones.

    The order is shuffled each round, so that no case always meets the caches and the heap that the same one left.
    """
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    shuffle = random.Random(0).shuffle
    order = list(cases.items())
    for number in range(-warmup, rounds):
        shuffle(order)
        for name, case in order:
            start = clock()
            case()
            if number >= 0:
                seconds[name].append(clock() - start)
    return seconds


def timing(seconds: Sequence[float]) -> Timing:
    """Medians and quartiles of one case's rounds."""
    first, median, third = (
        statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else [*seconds] * 3
    )
    return Timing(median * 1e6, first * 1e6, third * 1e6, min(seconds) * 1e6, len(seconds))


def ratio(slow: Sequence[float], fast: Sequence[float], resamples: int = 2000) -> Ratio:
    """Median of ``slow`` over median of ``fast``; the interval resamples whole rounds, which the two have in common."""
    generator, size = random.Random(0), len(slow)
    found = []
    for _ in range(resamples):
        rounds = generator.choices(range(size), k=size)
        found.append(statistics.median(slow[i] for i in rounds) / statistics.median(fast[i] for i in rounds))
    found.sort()
    edge = int(0.025 * resamples)
    return Ratio(statistics.median(slow) / statistics.median(fast), found[edge], found[-1 - edge])


def cpu_model() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git(*args: str) -> str | None:
    result = subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True)
    return result.stdout.strip() if result.returncode == 0 else None


def provenance(device: str = "cpu") -> dict[str, Any]:
    """What a number needs beside it to be believed."""
    commit = _git("rev-parse", "HEAD")
    found = {
        "device": cpu_model() if device == "cpu" else torch.cuda.get_device_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "simd": torch.backends.cpu.get_cpu_capability(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "flashbeam": _version("flashbeam"),
        "commit": commit,
        "modified": bool(_git("status", "--porcelain", "--", "beam", "kernels", "bench")) if commit else None,
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "load_average": [round(load, 2) for load in os.getloadavg()] if hasattr(os, "getloadavg") else None,
    }
    if device != "cpu":
        properties = torch.cuda.get_device_properties()
        found |= {
            "cuda": torch.version.cuda,
            "capability": f"{properties.major}.{properties.minor}",
            "l2_bytes": properties.L2_cache_size,
        }
    return found


def save(path: Path, document: Mapping[str, Any]) -> None:
    """Write a JSON document."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")


class _Graph:
    """A CUDA graph of 20 calls; each replay appends the microseconds of one call."""

    def __init__(self, make: Callable[[], Case], bytes_moved: int):
        size = torch.cuda.get_device_properties().L2_cache_size
        # two caches' worth between one use of an argument set and the next
        cases = [make() for _ in range(min(CALLS_PER_GRAPH, 1 + -(-2 * size // max(1, bytes_moved))))]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # compiles before the capture
            for case in cases:
                case()
        torch.cuda.current_stream().wait_stream(side)
        self.cases = cases  # the graph reads their arguments
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            for call in range(CALLS_PER_GRAPH):
                cases[call % len(cases)]()
        self.us_per_call: list[float] = []

    def __call__(self) -> None:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        self.graph.replay()
        end.record()
        end.synchronize()
        self.us_per_call.append(start.elapsed_time(end) * 1e3 / CALLS_PER_GRAPH)


def measure(benchmark: Any, make: Callable[[], Case], bytes_moved: int, device: str, rounds: int = 30) -> None:
    """Time what ``make`` returns under pytest-benchmark; ``make`` is called once for each set of arguments needed."""
    graph = _Graph(make, bytes_moved) if device == "cuda" else None
    benchmark.pedantic(graph or make(), rounds=rounds, warmup_rounds=2)
    if benchmark.stats is None:  # --benchmark-disable: it ran once
        return
    # the warm-up rounds replay too
    us = benchmark.stats.stats.median * 1e6 if graph is None else statistics.median(graph.us_per_call[-rounds:])
    benchmark.extra_info |= provenance(device)
    benchmark.extra_info |= {"bytes_moved": bytes_moved, "us_per_call": us, "gb_per_s": bytes_moved / us / 1e3}
