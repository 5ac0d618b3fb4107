"""A model of the streaming kernel's time on an H200, from its machine code and published rates. Not a measurement.

Every rate is a ceiling and all overlap perfectly, so the truth is slower; launch time is left out. The one figure that
is not published is the latency of memory, an assumption that matters only where the rows do not fill the machine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from aot import Report

SMS = 132
SCHEDULERS = 4  # an SM; each issues one warp instruction a clock
CLOCK = 1.98e9
BANDWIDTH = 4.1e12  # usable bytes a second, of 4.8e12
HALF_RATE_CLOCKS = 2  # a warp and scheduler: 64 lanes a clock and SM
EXPONENTIAL_CLOCKS = 8  # 16 lanes a clock and SM
LATENCY = 0.7e-6  # assumed
REGISTERS = 65536  # an SM
MAX_PROGRAMS = 32  # an SM

ROWS = (8, 64, 256, 1024)
VOCABS = (32000, 128256, 151936)
_TILE = 2048


class Prediction(NamedTuple):
    """Seconds that each resource needs."""

    bytes: float
    issue: float  # issue slots
    half_rate: float  # comparisons, integers, permutations
    exponentials: float
    serial: float  # programs a resident slot runs one after the other: each waits for memory, then computes

    @property
    def seconds(self) -> float:
        return max(self)

    @property
    def bound(self) -> str:
        return self._fields[self.index(max(self))].replace("_", " ")


def predict(report: Report, rows: int, vocab_size: int, itemsize: int) -> Prediction:
    """The model for the streaming kernel of ``report``."""
    s = report.streaming
    assert s is not None
    tiles = -(-vocab_size // _TILE)
    programs = rows * -(-tiles // s.tiles)
    slots = SMS * SCHEDULERS * CLOCK
    read = rows * vocab_size * itemsize
    written = rows * tiles * (66 * itemsize + 4)
    resident = SMS * min(MAX_PROGRAMS, REGISTERS // (32 * -(-report.registers // 8) * 8))
    tile_seconds = LATENCY + max(s.tile, EXPONENTIAL_CLOCKS * s.tile_exponentials) / CLOCK
    return Prediction(
        bytes=(read + written) / BANDWIDTH,
        issue=(programs * s.once + rows * tiles * s.tile) / slots,
        half_rate=rows * tiles * s.tile_half_rate * HALF_RATE_CLOCKS / slots,
        exponentials=rows * tiles * s.tile_exponentials * EXPONENTIAL_CLOCKS / slots,
        serial=-(-programs // resident) * min(s.tiles, tiles) * tile_seconds,
    )


def model_table(reports: list[Report]) -> str:
    """Markdown: predicted time against the byte floor for the plain configurations on sm_90."""
    lines = [
        "A model, not a measurement: H200, published rates; launch time left out.",
        "",
        "| dtype | rows | V | byte floor | issue | exp | serial | predicted, µs | bound by | floor / predicted |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- | ---: |",
    ]
    for config, itemsize in (("bf16", 2), ("fp32", 4)):
        report = next(r for r in reports if r.streaming and r.config == config and r.arch == 90)
        for rows in ROWS:
            for vocab_size in VOCABS:
                p = predict(report, rows, vocab_size, itemsize)
                times = (p.bytes, p.issue, p.exponentials, p.serial, p.seconds)
                cells = " | ".join(f"{t * 1e6:.1f}" for t in times)
                lines.append(f"| {config} | {rows} | {vocab_size} | {cells} | {p.bound} | {p.bytes / p.seconds:.0%} |")
    return "\n".join(lines)
