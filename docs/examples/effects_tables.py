"""The tables of ``docs/algorithms/effects.md``, made from the numbers in ``effects.json``."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

NAMES = {
    ("Sample", "mean"): "`Sample` (Monte Carlo)",
    ("Arithmetic", "mean"): "`Arithmetic`",
    ("Stochastic", "normalized"): "`Stochastic`, normalized",
    ("Stochastic", "unbiased"): "`Stochastic`, unbiased",
    ("ConditionalPoisson", "normalized"): "`ConditionalPoisson`, normalized",
    ("ConditionalPoisson", "unbiased"): "`ConditionalPoisson`, unbiased",
}
SETTINGS = {
    "TopK": "",
    "DiverseGroups": "strength ",
    "DiverseSiblings": "rate ",
    "Stochastic": "temperature ",
    "Sample": "temperature ",
}


def of_interval(numbers: Sequence[float], digits: int | None = 2) -> str:
    """A value and its interval; without ``digits`` as many as show three that count of the value."""
    value, low, high = numbers
    if digits is None:
        digits = max(0, 2 - math.floor(math.log10(value))) if value > 0.0 else 2
    return f"{value:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def entropy_table(results: dict[str, Any], temperature: float) -> str:
    rows = [row for row in results["entropy"]["rows"] if row["temperature"] == temperature]
    sizes = sorted({row["samples"] for row in rows})
    body = []
    for (rule, estimator), name in NAMES.items():
        of_rule = {row["samples"]: row for row in rows if (row["rule"], row["estimator"]) == (rule, estimator)}
        body.append([name, *(of_interval(of_rule[size]["rmse"], None) for size in sizes)])
    flagged = {row["samples"]: row for row in rows if row["rule"] == "ConditionalPoisson"}
    body.append(["inexact", *(f"{flagged[size]['inexact']} of {flagged[size]['requests']}" for size in sizes)])
    return table(["RMSE (95 % interval), nats", *(f"K = {size}" for size in sizes)], body)


def ratio_table(results: dict[str, Any], size: int) -> str:
    rows = [row for row in results["entropy"]["rows"] if row["samples"] == size]
    temperatures = sorted({row["temperature"] for row in rows})
    body = []
    for (rule, estimator), name in list(NAMES.items())[1:]:
        of_rule = {row["temperature"]: row for row in rows if (row["rule"], row["estimator"]) == (rule, estimator)}
        body.append([name, *(of_interval(of_rule[one]["of_monte_carlo"], None) for one in temperatures)])
    return table([f"RMSE / that of `Sample`, K = {size}", *(f"temperature {one}" for one in temperatures)], body)


def reference_table(results: dict[str, Any]) -> str:
    body = [
        [
            str(one["temperature"]),
            f"{sum(one['entropy']) / len(one['entropy']):.3f}",
            f"{min(one['entropy']):.3f} to {max(one['entropy']):.3f}",
            f"{max(one['standard_error']):.1g}",
            f"{max(map(abs, one['apart'])):.1f}",
        ]
        for one in results["entropy"]["references"]
    ]
    return table(
        [
            "temperature",
            "mean entropy, nats",
            "least to greatest",
            "greatest standard error",
            "two ways apart by at most",
        ],
        body,
    )


def tails_table(results: dict[str, Any]) -> str:
    tails = results["tails"]
    temperatures = sorted({row["temperature"] for row in tails["rows"]})
    body = []
    for (rule, estimator), name in list(NAMES.items())[2:]:
        mine = {
            row["temperature"]: row for row in tails["rows"] if (row["rule"], row["estimator"]) == (rule, estimator)
        }
        body.append([name])
        for one in temperatures:
            body[-1] += [of_interval(mine[one]["rmse"], None), f"{mine[one]['greatest']:.1f}"]
    head = [text for one in temperatures for text in (f"temperature {one}", "greatest error")]
    return table([f"RMSE (95 % interval), nats, K = {tails['samples']}, {tails['runs']} runs", *head], body)


def weights_table(results: dict[str, Any]) -> str:
    rows = results["weights"]["rows"]
    body = []
    for length in sorted({row["max_length"] for row in rows}):
        of_rule = {row["rule"]: row for row in rows if row["max_length"] == length}
        body.append([str(length)])
        for rule in ("Stochastic", "ConditionalPoisson"):
            body[-1] += [of_interval(of_rule[rule]["mean"]), f"{of_rule[rule]['median']:.2f}"]
    head = ["tokens", "`Stochastic`: mean (95 % interval)", "median", "`ConditionalPoisson`: mean (95 % interval)"]
    return table([*head, "median"], body)


def diversity_table(results: dict[str, Any]) -> str:
    body = []
    for row in results["diversity"]["rows"]:
        setting = "" if row["setting"] is None else f", {SETTINGS[row['rule']]}{row['setting']}"
        name = f"`{row['rule']}`{setting}"
        body.append([name, *(of_interval(row[column]) for column in ("distinct", "mean", "best"))])
    return table(["", "distinct n-grams", "mean log-prob per token", "best log-prob per token"], body)


def width_table(results: dict[str, Any]) -> str:
    names = {
        "TopK": "`TopK` in place, K =",
        "TopK, pool": "`TopK`, pool, `Exact`, K =",
        "DynamicWidth": "`DynamicWidth`, p =",
    }
    body = []
    for row in results["width"]["rows"]:
        over = [
            of_interval(row[key]) if key in row else "" for key in ("over_rows_per_step", "over_rows", "over_pool_rows")
        ]
        costs = [of_interval(row["rows_per_step"]), of_interval(row["rows"], 0)]
        body.append([f"{names[row['rule']]} {row['setting']}", *costs, of_interval(row["gain"]), *over])
    over = ["over in place at equal rows per step", "at equal rows", "over pool at equal rows"]
    return table(["", "rows per step", "rows", "gain over K = 1, nats", *over], body)


def tables(results: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Name and text of every table."""
    yield "reference", reference_table(results)
    for reference in results["entropy"]["references"]:
        yield f"entropy {reference['temperature']}", entropy_table(results, reference["temperature"])
    yield "ratio", ratio_table(results, max(row["samples"] for row in results["entropy"]["rows"]))
    yield "weights", weights_table(results)
    yield "tails", tails_table(results)
    yield "diversity", diversity_table(results)
    yield "width", width_table(results)


def write_tables(page: Path, results: dict[str, Any]) -> list[str]:
    """Put the tables between the marks of the page, if there is one, and return them."""
    text = page.read_text() if page.exists() else ""
    made = dict(tables(results))
    for name, new in made.items():
        mark = re.escape(f"<!-- table: {name} -->\n")
        text = re.sub(
            rf"({mark}).*?(<!-- end -->)", lambda at, new=new: f"{at[1]}{new}\n{at[2]}", text, flags=re.DOTALL
        )
    if page.exists():
        page.write_text(text)
    return list(made.values())
