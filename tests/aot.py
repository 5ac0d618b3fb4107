"""Compiles every kernel ahead of time, without a GPU, and reads its machine code.

    python tests/aot.py            # the tables of docs/performance.md
    python tests/aot.py --json     # the reports, for test_aot.py

A launcher of ``flashbeam.kernels.triton`` is called with meta tensors under a stand-in for the CUDA driver. Triton's
own launch code then chooses types, constants and divisibility as on a GPU, and compiles; the launch itself is left
out. A launcher that reads a value fails here. This needs a process without ``TRITON_INTERPRET``: :func:`run` starts it.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from aot_cases import CASES, Case
from sass import Instruction, half_rate, parse, streaming_path
from static_model import model_table

STREAMING = "_summarize_kernel"


class Streaming(NamedTuple):
    """What a warp of the streaming kernel executes; ``sass.py`` says what counts."""

    tiles: int  # a program
    once: int  # warp instructions of a program outside its tiles
    tile: int  # warp instructions a tile
    tile_half_rate: int  # of them at half the rate of float32 arithmetic
    tile_exponentials: int
    tile_load_bytes: int  # of a lane, from global memory
    loads: list[str]  # opcodes of the global loads in the listing
    per_logit: float  # executed warp instructions * 32 / logits, of a program of full tiles


class Report(NamedTuple):
    """One compiled kernel."""

    kernel: str
    launcher: str
    config: str
    arch: int
    warps: int
    registers: int
    spills: int  # loads and stores of the stack in the listing
    shared_bytes: int  # of a program
    streaming: Streaming | None


class Result(NamedTuple):
    """What compiling every case gave."""

    reports: list[Report]
    failures: list[str]


class _Driver:
    """Stands in for the CUDA driver; every architecture is a device of its own, which keeps their caches apart."""

    arch = 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0


def _cuobjdump(*args: str | Path) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return subprocess.run([tool, *args], capture_output=True, text=True, check=True).stdout


def _streaming(code: list[Instruction], tiles: int) -> Streaming:
    from flashbeam.kernels.tiles import TILE

    path = streaming_path(code)
    return Streaming(
        tiles,
        path.once.total(),
        path.tile.total(),
        half_rate(path.tile),
        path.tile["MUFU.EX2"],
        path.tile_load_bytes,
        sorted({at.opcode for at in code if at.load_bytes}),
        path.executed(tiles) * 32 / (tiles * TILE),
    )


def _read(case: Case, compiled: Any, meta: dict[str, Any], folder: Path) -> Report:
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", _cuobjdump("--dump-resource-usage", cubin)))
    is_streaming = compiled.metadata.name == STREAMING
    code: list[Instruction] = []
    if is_streaming or int(usage["STACK"]) or int(usage["LOCAL"]):  # not always: the disassembler takes its time
        code = parse(_cuobjdump("-sass", cubin))
    return Report(
        kernel=compiled.metadata.name,
        launcher=case.launcher,
        config=case.config,
        arch=compiled.metadata.target.arch,
        warps=compiled.metadata.num_warps,
        registers=int(usage["REG"]),
        spills=sum(at.name in ("LDL", "STL") for at in code),
        shared_bytes=compiled.metadata.shared,
        streaming=_streaming(code, meta["TILES"]) if is_streaming else None,
    )


def compile_all() -> Result:
    """Compile every case for its architectures. From then on this process has no kernels to launch."""
    import triton
    from triton.runtime.jit import KernelInterface

    driver = _Driver()
    triton.runtime.driver.set_active(driver)
    launched: list[tuple[Any, dict[str, Any]]] = []

    def compile_instead(self: Any, grid: object) -> Any:
        def launch(*args: Any, **kwargs: Any) -> None:
            launched.append((self.run(*args, grid=grid, warmup=True, **kwargs), kwargs))

        return launch

    KernelInterface.__getitem__ = compile_instead
    result = Result([], [])
    with tempfile.TemporaryDirectory() as folder:
        for case in CASES:
            for driver.arch in case.archs:
                launched.clear()
                try:
                    launch = getattr(importlib.import_module(f"flashbeam.kernels.triton.{case.module}"), case.launcher)
                    launch(*case.args())
                    result.reports.extend(_read(case, *compiled, Path(folder)) for compiled in launched)
                except Exception as error:  # of any kind: the other cases are worth knowing
                    result.failures.append(f"{case.launcher} ({case.config}), sm_{driver.arch}: {error!r}")
    return result


def run() -> Result:
    """:func:`compile_all` in a process of its own."""
    script = subprocess.run([sys.executable, __file__, "--json"], capture_output=True, text=True)
    if script.returncode:
        raise RuntimeError(script.stderr)
    reports, failures = json.loads(script.stdout)
    streaming = Report._fields.index("streaming")
    return Result([Report(*r[:streaming], r[streaming] and Streaming(*r[streaming])) for r in reports], failures)


def table(reports: list[Report]) -> str:
    """Markdown: resources of every kernel, and instructions per logit of the streaming one."""
    lines = [
        "| kernel | configuration | sm | warps | registers | spills | shared, bytes | instructions per logit |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for r in reports:
        per_logit = f"{r.streaming.per_logit:.2f}" if r.streaming else ""
        numbers = f"{r.arch} | {r.warps} | {r.registers} | {r.spills} | {r.shared_bytes} | {per_logit}"
        lines.append(f"| `{r.kernel}` | {r.config} | {numbers} |")
    return "\n".join(lines)


def main() -> None:
    os.environ.pop("TRITON_INTERPRET", None)
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        result = compile_all()
    if "--json" in sys.argv:
        sys.stdout.write(json.dumps(result))
        return
    sys.stdout.write(f"{table(result.reports)}\n\n{model_table(result.reports)}\n")
    sys.exit("\n".join(result.failures))


if __name__ == "__main__":
    main()
