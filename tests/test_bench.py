"""The benchmarks run, and what they compare is the same answer: a speed of wrong results is not reported."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from flashbeam.kernels import select_beams

ROOT = Path(__file__).parents[1]
BENCH = ROOT / "bench"


def run(*args: str) -> subprocess.CompletedProcess[str]:
    # a worker of pytest-xdist says so here, and pytest-benchmark then measures nothing
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, cwd=ROOT, env=environment)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    """The modules of the benchmarks by name."""
    monkeypatch.syspath_prepend(BENCH)
    return {name: __import__(name) for name in ("baselines", "harness", "run_cpu", "steps", "workload")}


def untied(batch: int, beams: int, vocab: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Logits whose 64 greatest of a row are distinct in any dtype, and log-probabilities that keep rows apart."""
    logits = torch.randn(batch, beams, vocab).clamp_(max=3.0)
    order = torch.rand(batch, beams, vocab).argsort(-1)[..., :64]
    logits.scatter_(2, order, (4 + 0.0625 * torch.arange(64.0)).expand_as(order))  # 4 to 8: 64 values of bfloat16
    return logits.to(dtype), -torch.rand(batch, beams) * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("baseline", ["log_softmax_topk", "logsumexp_topk"])
def test_baseline_finds_what_select_beams_finds(baseline: str, dtype: torch.dtype, bench: dict[str, Any]) -> None:
    logits, log_probs = untied(3, 4, 5003, dtype)
    ours = select_beams(logits, log_probs, 8)
    values, parents, tokens = getattr(bench["baselines"], baseline)(logits, log_probs, 16)
    assert values.shape == (3, 16)
    assert torch.equal(ours.parents, parents[:, :8])
    assert torch.equal(ours.tokens, tokens[:, :8])
    torch.testing.assert_close(ours.log_probs, values[:, :8], rtol=0, atol=2e-5)
    assert bench["baselines"].disagreement(logits, log_probs, ours[:3], (values, parents, tokens)) is None


def spoil(field: int, value: float, result: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    spoiled = [tensor.clone() for tensor in result]
    spoiled[field][1, 2] += value
    return tuple(spoiled)


@pytest.mark.parametrize("field, value", [(0, 0.01), (0, float("nan")), (1, -1), (2, 1)])
def test_wrong_result_is_a_disagreement(field: int, value: float, bench: dict[str, Any]) -> None:
    logits, log_probs = untied(3, 4, 5003, torch.float32)
    log_probs[:, 0] = -20.0  # no candidate has parent 0, so that parent - 1 is one
    right = bench["baselines"].log_softmax_topk(logits, log_probs, 16)
    ours = tuple(tensor[:, :8] for tensor in right)
    assert bench["baselines"].disagreement(logits, log_probs, ours, right) is None
    assert bench["baselines"].disagreement(logits, log_probs, spoil(field, value, ours), right) is not None


def test_wrong_choice_among_near_ties_is_a_disagreement(bench: dict[str, Any]) -> None:
    logits, log_probs = torch.zeros(1, 1, 100), torch.zeros(1, 1)
    logits[..., 50:] = -1.0
    right = bench["baselines"].log_softmax_topk(logits, log_probs, 8)
    ours = tuple(tensor[:, :4] for tensor in right)
    other = ours[0], ours[1], torch.tensor([[40, 30, 20, 10]])  # as good
    assert bench["baselines"].disagreement(logits, log_probs, other, right) is None
    for tokens in ([40, 30, 20, 60], [40, 30, 20, 20]):  # a worse one, the same twice
        wrong = ours[0], ours[1], torch.tensor([tokens])
        assert bench["baselines"].disagreement(logits, log_probs, wrong, right) is not None


def test_every_floor_is_the_same_sum(bench: dict[str, Any]) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        logits = torch.randn(2, 3, 50_000).to(dtype)
        expected = float(logits.double().exp().sum())
        for name, floor in bench["baselines"].floors(logits).items():
            maxima, total = floor()
            assert torch.equal(maxima, logits.amax(-1)), name
            assert total == pytest.approx(expected, rel=1e-4), name


def test_ratio_and_its_interval(bench: dict[str, Any]) -> None:
    ratio = bench["harness"].ratio
    assert ratio([3.0] * 9, [2.0] * 9) == (1.5, 1.5, 1.5)
    value, low, high = ratio([3.0, 4.0, 5.0, 6.0, 30.0], [1.0, 1.0, 1.0, 2.0, 1.0])
    assert (value, low) == (5.0, 3.0) and 5.0 < high <= 30.0


def test_cases_take_turns(bench: dict[str, Any]) -> None:
    calls: list[str] = []
    cases = {name: (lambda name=name: calls.append(name)) for name in "AB"}
    seconds = bench["harness"].interleave(cases, rounds=20, warmup=1)
    rounds = ["".join(calls[i : i + 2]) for i in range(0, len(calls), 2)]
    assert set(rounds) == {"AB", "BA"}  # each once a round, neither always first
    assert {name: len(each) for name, each in seconds.items()} == {"A": 20, "B": 20}


def test_operations_of_a_step(bench: dict[str, Any]) -> None:
    shape = bench["workload"].SHAPES["llama3-b8k8"].tiny()
    for ending in (False, True):
        inputs = bench["workload"].make_inputs(shape, torch.float32)
        search, state = bench["steps"].searching(shape, inputs, ending=ending)
        found = bench["steps"].operations(lambda: search.step(state, inputs.logits))  # noqa: B023 - called at once
        assert list(found) == ["summarize", "row_lse", "select", "advance_pool_"]
        assert bool((state.pool.log_probs > -torch.inf).any()) == ending
        for operation in found.values():
            operation()
        assert not state.all_done()


def test_benchmarks_run() -> None:
    result = run("-m", "pytest", "bench", "--benchmark-disable", "--tiny", "-q", "-p", "no:cacheprovider")
    assert result.returncode == 0, result.stdout + result.stderr
    files = {path.name for path in BENCH.glob("bench_*.py")}
    listed = run("-m", "pytest", "bench", "--collect-only", "-q", "-p", "no:cacheprovider").stdout
    assert {Path(line.partition("::")[0]).name for line in listed.splitlines() if "::" in line} == files


def test_benchmark_records_where_it_ran(tmp_path: Path) -> None:
    output = tmp_path / "out.json"
    result = run(
        "-m",
        "pytest",
        "bench/bench_select.py",
        "--tiny",
        "-q",
        "-k",
        "gpt2 and fp32 and flashbeam",
        f"--benchmark-json={output}",
    )
    assert result.returncode == 0, result.stdout + result.stderr
    (found,) = json.loads(output.read_text())["benchmarks"]
    assert {"device", "threads", "torch", "commit", "bytes_moved", "us_per_call", "gb_per_s"} <= set(
        found["extra_info"]
    )


def test_cpu_table(tmp_path: Path) -> None:
    output = tmp_path / "out.json"
    result = run("bench/run_cpu.py", "--tiny", "--rounds", "2", "--breakdown", "--output", str(output))
    assert result.returncode == 0, result.stderr
    assert len(re.findall(r"^\| 2, 5, 3001 +\| (?:fp32|bf16)", result.stdout, re.MULTILINE)) == 8
    document = json.loads(output.read_text())
    assert document["provenance"]["threads"] == 2
    assert [(each["shape"], each["dtype"]) for each in document["results"]] == [
        (shape, dtype) for shape in ("llama3-b8k8", "wide-b8k256") for dtype in ("fp32", "bf16")
    ]


def test_nothing_is_timed_where_results_differ(bench: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    module = bench["run_cpu"]

    def wrong(*args: Any) -> Any:
        best = select_beams(*args)
        return best._replace(log_probs=best.log_probs + 0.01)

    monkeypatch.setattr(module, "select_beams", wrong)
    monkeypatch.setattr(module, "interleave", lambda *args, **kwargs: pytest.fail("timed"))
    with pytest.raises(SystemExit, match="do not agree"):
        module.measure_shape(bench["workload"].Shape(2, 3, 3001), torch.float32, 2, False)


def test_noise_for_every_logit_is_a_step_of_stochastic_beams(bench: dict[str, Any]) -> None:
    logits, log_probs = torch.randn(400, 2, 30), torch.tensor([[-0.5, -1.5]]).expand(400, 2)
    perturbed = torch.tensor([[0.7, 0.3]]).expand(400, 2)
    values, parents, tokens = bench["baselines"].gumbel_topk(logits, log_probs, perturbed, 60)
    for parent in (0, 1):  # the greatest child of each has its parent's value
        best = values.masked_fill(parents != parent, -torch.inf).amax(1)
        torch.testing.assert_close(best, perturbed[:, parent])
    assert all(len(set(zip(*pair, strict=True))) == 60 for pair in zip(parents.tolist(), tokens.tolist(), strict=True))
    # one parent's first child is an ancestral sample
    first = tokens[:, 0][parents[:, 0] == 0]
    many = bench["baselines"].gumbel_topk(
        logits[:1].expand(20000, 2, 30), log_probs[:1].expand(20000, 2), perturbed[:1].expand(20000, 2), 1
    )[2][:, 0]
    share = torch.bincount(many, minlength=30) / 20000
    assert len(first) == 400
    torch.testing.assert_close(share, logits[0, 0].softmax(0), rtol=0, atol=0.015)  # 4 standard errors


def test_choosing_table(tmp_path: Path, bench: dict[str, Any]) -> None:
    output = tmp_path / "out.json"
    result = run("bench/run_choosing.py", "--tiny", "--rounds", "2", "--output", str(output))
    assert result.returncode == 0, result.stderr
    found = json.loads(output.read_text())
    assert set(found["results"]) == {"random", "demo"}
    assert "Stochastic" in result.stdout and "noise for every logit" in result.stdout
    targets = {case for cases in __import__("run_choosing").TARGETS.values() for case in cases}
    assert targets <= {case for each in found["results"].values() for case in each["timings"]}


def test_constraints_table(tmp_path: Path, bench: dict[str, Any]) -> None:
    output = tmp_path / "out.json"
    result = run("bench/run_constraints.py", "--tiny", "--rounds", "2", "--build", "--output", str(output))
    assert result.returncode == 0, result.stderr
    found = json.loads(output.read_text())
    assert set(found["results"]) == {"tries", "others"} and found["build"]["seconds"] > 0
    cases = [case for each in found["results"].values() for case in each["ratios"]]
    targets = __import__("run_constraints").TARGETS
    assert targets.keys() - {"vocab", "allowed", "flat"} <= set(cases)
    assert all(any(key in case for case in cases) for key in ("vocab", "allowed", "/ 10000 items"))
