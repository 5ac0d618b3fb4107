"""Published effects of choosing rules at small scale, on the demo's language model: the numbers of effects.md.

    .venv/bin/python docs/examples/effects.py [--runs N]

Three studies: the error of an estimated entropy by rule and number of samples; diversity against quality; width that
follows the entropy against fixed width. ``effects_figure.py`` draws what this writes.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import time
from pathlib import Path
from typing import Any

import torch

import flashbeam as fb
from code_corpus import PROMPTS
from codelm import load
from effects_statistics import RESAMPLES
from effects_studies import SEED, Studies
from effects_tables import write_tables

OUT = Path(__file__).parents[1] / "algorithms"


def machine() -> str:
    """The processor's name, or what Python knows of it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--runs", type=int, default=40, help="of every prompt of the entropy; default %(default)s")
    parser.add_argument("--prompts", type=int, default=100, help="of the held-out ones; default %(default)s")
    parser.add_argument(
        "--reference", type=int, default=4096, help="samples of a prompt, 1024 or more; default %(default)s"
    )
    parser.add_argument("--out", type=Path, default=OUT, help="folder of effects.json and, if there, effects.md")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = load()
    prompts = [tokenizer.encode(prompt) for prompt in json.loads(PROMPTS.read_text())[: args.prompts]]
    began, cpu = time.time(), time.process_time()
    studies = Studies(model, prompts, args.runs, args.reference)
    try:
        results: dict[str, Any] = {
            study.__name__: study()
            for study in (studies.entropy, studies.weights, studies.diversity, studies.width, studies.tails)
        }
    finally:
        studies.progress.close()
    results["about"] = {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "machine": f"{machine()}, 1 thread",
        "versions": {"flashbeam": fb.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "seeds": [SEED + 1, studies.seed],
        "resamples": RESAMPLES,
        "seconds": round(time.time() - began),
        "processor_seconds": round(time.process_time() - cpu),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "effects.json").write_text(json.dumps(rounded(results), indent=1) + "\n")
    for text in write_tables(args.out / "effects.md", rounded(results)):
        print(text, end="\n\n")


def rounded(value: Any) -> Any:
    """Numbers with 5 significant digits: more would be noise."""
    if isinstance(value, dict):
        return {key: rounded(one) for key, one in value.items()}
    if isinstance(value, list):
        return [rounded(one) for one in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


if __name__ == "__main__":
    main()
