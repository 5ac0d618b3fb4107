"""The command line of the benchmarks beside transformers, and the document that they write."""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from harness import ROOT, provenance, save


class Beside(NamedTuple):
    """One run beside transformers: its arguments, its clock, and the document it fills."""

    args: argparse.Namespace
    clock: Callable[[], float]
    document: dict[str, Any]

    @classmethod
    def begin(cls, description: str | None, argv: list[str] | None) -> "Beside":
        """Read the command line; sets the number of threads."""
        parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--threads", type=int, default=2)
        parser.add_argument("--rounds", type=int, default=11)
        parser.add_argument("--cpu-clock", action="store_true", help="processor time of one thread: for a busy machine")
        parser.add_argument("--tiny", action="store_true", help="a small shape: shows that it runs")
        parser.add_argument("--output", type=Path, help="JSON file; default in bench/results")
        args = parser.parse_args(argv)
        torch.set_num_threads(1 if args.cpu_clock else args.threads)
        clock = time.process_time if args.cpu_clock else time.perf_counter
        import transformers

        document: dict[str, Any] = {"provenance": provenance(), "transformers": transformers.__version__}
        document |= {"rounds": args.rounds, "tiny": args.tiny, "clock": clock.__name__}
        return cls(args, clock, document)

    def end(self, machine: str, name: str) -> None:
        """Save the document."""
        path = self.args.output or ROOT / "bench/results" / f"{machine}-{name}-{time.strftime('%Y-%m-%d')}.json"
        save(path, self.document)
        print(f"Written to {path}.")
