"""Draw ``docs/algorithms/effects.svg`` from ``effects.json``; needs ``pip install matplotlib``.

.venv/bin/python docs/examples/effects_figure.py [--out FILE.svg or .png]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

ALGORITHMS = Path(__file__).parents[1] / "algorithms"
# Okabe, Ito: told apart by most people who see colours differently; markers differ, too
BLACK, ORANGE, BLUE, GREEN, VERMILION, PURPLE = "#000000", "#e69f00", "#0072b2", "#009e73", "#d55e00", "#cc79a7"
SAMPLERS = (
    ("Sample", "mean", "Monte Carlo", BLACK, "o", "-"),
    ("Arithmetic", "mean", "Arithmetic", GREEN, "^", "-"),
    ("Stochastic", "normalized", "Stochastic, normalized", BLUE, "s", "-"),
    ("Stochastic", "unbiased", "Stochastic, unbiased", BLUE, "s", ":"),
    ("ConditionalPoisson", "normalized", "Cond. Poisson, normalized", VERMILION, "D", "-"),
    ("ConditionalPoisson", "unbiased", "Cond. Poisson, unbiased", VERMILION, "D", ":"),
)
CHOOSERS = (
    ("TopK", "TopK", BLACK, "*"),
    ("DiverseGroups", "DiverseGroups, by strength", ORANGE, "^"),
    ("DiverseSiblings", "DiverseSiblings, by rate", PURPLE, "D"),
    ("Stochastic", "Stochastic, by temperature", BLUE, "s"),
    ("Sample", "Sample, by temperature", GREEN, "o"),
)


def bars(intervals: Sequence[Sequence[float]]) -> tuple[np.ndarray, np.ndarray]:
    """Values, and how far their intervals reach below and above: ``[n]``, ``[2, n]``."""
    value, low, high = np.array(intervals).T
    return value, np.stack([value - low, high - value]).clip(min=0.0)


def draw_entropy(axes: Axes, results: dict[str, Any], temperature: float) -> None:
    rows = [row for row in results["entropy"]["rows"] if row["temperature"] == temperature]
    for place, (rule, estimator, label, color, marker, line) in enumerate(SAMPLERS):
        mine = [row for row in rows if (row["rule"], row["estimator"]) == (rule, estimator)]
        value, reach = bars([row["rmse"] for row in mine])
        sizes = np.array([row["samples"] for row in mine]) * 1.03 ** (place - 2.5)  # bars side by side
        style = {"color": color, "marker": marker, "linestyle": line, "markersize": 4.5, "linewidth": 1.3}
        axes.errorbar(sizes, value, reach, label=label, capsize=2, elinewidth=0.9, **style)
    sizes = sorted({row["samples"] for row in rows})
    axes.set(xscale="log", yscale="log", xlabel="samples K", ylabel="RMSE of the entropy, nats")
    axes.set_xticks(sizes, sizes)
    axes.minorticks_off()
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.set_title(f"Entropy estimate, temperature {temperature:g}")


def draw_diversity(axes: Axes, results: dict[str, Any]) -> None:
    for rule, label, color, marker in CHOOSERS:
        rows = [row for row in results["diversity"]["rows"] if row["rule"] == rule]
        x, across = bars([row["distinct"] for row in rows])
        y, along = bars([row["mean"] for row in rows])
        style = {"color": color, "marker": marker, "markersize": 9 if marker == "*" else 4.5, "linewidth": 1.3}
        axes.errorbar(x, y, along, across, label=label, elinewidth=0.8, **style)
    axes.set(xlabel="distinct n-grams of 8 hypotheses, n = 2..4", ylabel="mean log-prob per token, nats")
    axes.set_title("Diversity against quality")


def draw_width(axes: Axes, results: dict[str, Any]) -> None:
    shown = (
        ("TopK", "TopK in place, K =", BLACK, "*"),
        ("TopK, pool", "TopK, pool, Exact, K =", ORANGE, "o"),
        ("DynamicWidth", "DynamicWidth, p =", BLUE, "s"),
    )
    for rule, label, color, marker in shown:
        rows = [row for row in results["width"]["rows"] if row["rule"] == rule]
        label += " " + ", ".join(f"{row['setting']:g}" for row in rows)
        x, across = bars([row["rows"] for row in rows])
        y, along = bars([row["gain"] for row in rows])
        style = {"color": color, "marker": marker, "markersize": 8 if marker == "*" else 4.5, "linewidth": 1.3}
        axes.errorbar(x, y, along, across, label=label, elinewidth=0.8, **style)
    axes.set(xscale="log", xlabel="rows of the model per prompt", ylabel="log-prob of the best, gain over K = 1, nats")
    axes.xaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.set_title("Dynamic against fixed width")


def draw(results: dict[str, Any]) -> plt.Figure:
    plt.rcParams.update({"font.size": 10, "axes.titlesize": 11, "svg.hashsalt": "effects", "legend.fontsize": 9})
    figure, axes = plt.subplots(2, 2, figsize=(10, 10.2), layout="constrained")
    temperatures = [one["temperature"] for one in results["entropy"]["references"]]
    draw_entropy(axes[0, 0], results, 0.2 if 0.2 in temperatures else temperatures[0])
    draw_entropy(axes[0, 1], results, temperatures[-1])
    draw_diversity(axes[1, 0], results)
    draw_width(axes[1, 1], results)
    for one in axes.flat:
        one.grid(alpha=0.3, linewidth=0.6)
        columns = 2 if one in axes[0] else 1
        one.legend(
            loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=columns, frameon=False
        )  # below: covers nothing
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--results", type=Path, default=ALGORITHMS / "effects.json", help="default %(default)s")
    parser.add_argument("--out", type=Path, default=ALGORITHMS / "effects.svg", help="default %(default)s")
    args = parser.parse_args()
    metadata = {"Date": None} if args.out.suffix == ".svg" else None  # the same numbers give the same file
    draw(json.loads(args.results.read_text())).savefig(args.out, metadata=metadata, dpi=100)


if __name__ == "__main__":
    main()
