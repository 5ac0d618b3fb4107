"""The machine code of every kernel, compiled for three architectures without a GPU. ``pytest -s`` prints the table."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

import flashbeam.kernels
from aot import STREAMING, Report, Result, run, table
from aot_cases import ARCHS, CASES
from flashbeam.kernels.tiles import TILE
from sass import parse, streaming_path

TRITON = Path(flashbeam.kernels.__file__).parent / "triton"
BUDGET = {"bf16": 11.0, "fp32": 10.0}  # machine instructions a logit on sm_90
ITEMSIZE = {"bf16": 2, "fp16": 2, "fp32": 4}


@pytest.fixture(scope="module")
def result() -> Result:
    pytest.importorskip("triton")
    if not sys.platform.startswith("linux"):
        pytest.skip("triton's compiler is for Linux")
    result = run()
    sys.stdout.write(f"\n{table(result.reports)}\n")
    return result


def plain(result: Result, arch: int) -> dict[str, Report]:
    """The streaming kernel without options, by dtype."""
    return {r.config: r for r in result.reports if r.kernel == STREAMING and r.arch == arch and r.config in ITEMSIZE}


def functions(prefix: str = "", suffix: str = "") -> set[str]:
    """Names of the functions of ``kernels/triton`` that start and end so."""
    trees = (ast.parse(path.read_text()) for path in TRITON.glob("*.py"))
    names = {node.name for tree in trees for node in tree.body if isinstance(node, ast.FunctionDef)}
    return {name for name in names if name.startswith(prefix) and name.endswith(suffix)}


def test_every_launcher_has_a_case():
    assert {case.launcher for case in CASES} == functions(prefix="launch_")


def test_every_case_compiles(result):
    assert result.failures == []


def test_every_kernel_is_compiled_for_every_architecture(result):
    compiled = {(r.kernel, r.arch) for r in result.reports}
    assert compiled == {(kernel, arch) for kernel in functions(suffix="_kernel") for arch in ARCHS}


def test_no_kernel_spills(result):
    spilling = [(r.kernel, r.config, r.arch, r.spills) for r in result.reports if r.spills]
    assert spilling == []


@pytest.mark.parametrize("arch", ARCHS)
def test_streaming_kernel_loads_logits_in_128_bits(result, arch):
    for config, report in plain(result, arch).items():
        assert report.streaming.loads == ["LDG.E.128"]
        # a tile is read once, all of it
        assert report.streaming.tile_load_bytes * 32 == TILE * ITEMSIZE[config]


def test_streaming_kernel_keeps_within_its_instruction_budget(result):
    per_logit = {config: plain(result, 90)[config].streaming.per_logit for config in BUDGET}
    assert all(per_logit[config] <= BUDGET[config] for config in BUDGET), per_logit
    # an exponential a logit, and one for the rounding of its reference
    assert {r.streaming.tile_exponentials for r in plain(result, 90).values()} == {TILE // 32 + 1}


LISTING = """
		Function : _example_kernel
        /*0000*/                   S2R R0, SR_TID.X ;
        /*0010*/               @P0 EXIT ;
        /*0020*/              @!P1 BRA 0x60 ;
        /*0030*/              @!P2 LDG.E.128 R4, desc[UR8][R2.64] ;
        /*0040*/              @!P3 LDG.E.128 R8, desc[UR8][R2.64+0x200] ;
        /*0050*/                   BRA 0x80 ;
        /*0060*/                   LDG.E.128 R4, desc[UR8][R2.64] ;
        /*0070*/                   LDG.E.128 R8, desc[UR8][R2.64+0x200] ;
        /*0080*/                   MUFU.EX2 R4, R4 ;
        /*0090*/                   BRA.DIV UR11, 0x130 ;
        /*00a0*/              @!P3 BRA 0xc0 ;
        /*00b0*/                   MUFU.EX2 R5, R5 ;
        /*00c0*/               @P4 BRA 0xe0 ;
        /*00d0*/                   STG.E desc[UR8][R6.64], R4 ;
        /*00e0*/              @!P5 BRA 0x20 ;
        /*00f0*/                   NOP ;
        /*0100*/                   NOP ;
        /*0110*/                   EXIT ;
        /*0120*/                   BRA 0x120;
        /*0130*/                   BRA 0xa0 ;
"""


def test_path_takes_the_full_tile_and_leaves_out_the_cold_blocks():
    path = streaming_path(parse(LISTING))
    assert path.tile == {"BRA": 4, "BRA.DIV": 1, "LDG.E.128": 2, "MUFU.EX2": 1, "STG.E": 1}
    assert path.once == {"S2R": 1, "EXIT": 2, "NOP": 2}
    assert path.tile_load_bytes == 32
    assert path.executed(tiles=4) == 5 + 4 * 9


def test_path_takes_the_full_tile_where_its_loads_share_a_guard():
    path = streaming_path(parse(LISTING.replace("           LDG.E.128", "      @!P1 LDG.E.128")))
    assert path.tile["LDG.E.128"] == 2
    assert path.tile_load_bytes == 32


def test_path_refuses_what_it_cannot_follow():
    with pytest.raises(ValueError, match="cannot follow BRX"):
        streaming_path(parse(LISTING.replace("BRA 0x80", "BRX R4 -0x80")))
    with pytest.raises(ValueError, match="expected one function, got"):
        parse(LISTING * 2)
    with pytest.raises(ValueError, match="expected one loop around the loads, got 0"):
        streaming_path(parse(LISTING.replace("@!P5 BRA 0x20", "@!P5 BRA 0xf0")))
