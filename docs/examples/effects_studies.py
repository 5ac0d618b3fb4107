"""The three studies of ``effects.py``, on the demo's language model."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

import flashbeam as fb
from codelm import EOS_ID, CodeLM
from effects_search import Found, log_probs, run, run_all
from effects_statistics import distinct_ngrams, estimates, interval, mean_and_interval, over_fixed, rmse
from terminal import Progress

SEED = 20_000  # of the first configuration; each has a seed of its own
TEMPERATURES = (0.1, 0.2, 0.5, 1.0)
SAMPLES = (4, 8, 16, 32)  # K
ENTROPY_PROMPTS, LONGEST_PROMPT, ENTROPY_LENGTH = 8, 16, 8  # prompts, tokens, tokens
REFERENCE_BEAM = 512  # samples of one request of the reference
LENGTHS = (1, 2, 3, 4, 6, 8)
SAMPLERS = (fb.Sample, fb.Arithmetic, fb.Stochastic, fb.ConditionalPoisson)


class Studies:
    """Runs the studies; each returns what goes into the JSON file."""

    def __init__(self, model: CodeLM, prompts: list[list[int]], runs: int, reference: int) -> None:
        self.model, self.prompts, self.runs, self.reference = model, prompts, runs, reference
        self.short = [prompt for prompt in prompts if len(prompt) <= LONGEST_PROMPT][:ENTROPY_PROMPTS]
        self.seed = SEED
        self.truths: dict[float, np.ndarray] = {}  # by temperature, entropy after each prompt
        costs = len(TEMPERATURES) * (reference // 25 + len(SAMPLERS) * sum(SAMPLES)) + 2 * len(LENGTHS) * 8 + 41 * 4
        self.progress = Progress(total=costs)

    def next_seed(self) -> int:
        self.seed += 1
        return self.seed

    def sample(self, rule: Any, size: int, length: int, temperature: float, runs: int) -> list[Found]:
        """Independent runs of every short prompt, all with other random numbers."""
        search = fb.BeamSearch(size, length, EOS_ID, selection=rule(self.next_seed()), temperature=temperature)
        return [run(self.model, [prompt], search, runs, i * runs) for i, prompt in enumerate(self.short)]

    def entropy(self) -> dict[str, Any]:
        """Root mean squared error of the estimated entropy of the first tokens of a completion."""
        references, rows = [], []
        for temperature in TEMPERATURES:
            self.progress.label = f"entropy, temperature {temperature}"
            truth, error, apart = self._reference(temperature)
            self.truths[temperature] = truth
            references.append(
                {
                    "temperature": temperature,
                    "entropy": truth.tolist(),
                    "standard_error": error.tolist(),
                    "apart": apart.tolist(),
                }
            )
            self.progress.advance(self.reference // 25)
            for size in SAMPLES:
                rows += self._entropy_rows(temperature, size, truth)
        return {
            "max_length": ENTROPY_LENGTH,
            "prompts": len(self.short),
            "runs": self.runs,
            "reference_samples": self.reference,
            "references": references,
            "rows": rows,
        }

    def _reference(self, temperature: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The entropy after each prompt, its standard error, and by how many of them two ways to find it differ.

        By Monte Carlo, and by the unbiased estimate from wide stochastic beams, which is by far the better one where a
        beam holds most of the probability: after each prompt the one with the smaller standard error.
        """
        requests = self.reference // REFERENCE_BEAM
        drawn = self.sample(fb.Sample, REFERENCE_BEAM, ENTROPY_LENGTH, temperature, requests)
        values = np.stack([-found.hypotheses.sampling_log_probs.double().numpy().ravel() for found in drawn])
        drawn = self.sample(fb.Stochastic, REFERENCE_BEAM, ENTROPY_LENGTH, temperature, requests)
        runs = np.stack([estimates(found, False) for found in drawn])
        means = np.stack([values.mean(1), runs.mean(1)])
        errors = np.stack([one.std(1, ddof=1) / one.shape[1] ** 0.5 for one in (values, runs)])
        drew_one = errors[0] == 0.0  # the same sequence every time, which tells nothing of the others
        best, place = np.where(drew_one, 1, errors.argmin(0)), np.arange(len(self.short))
        apart = np.divide(means[1] - means[0], np.hypot(*errors), out=np.zeros(len(place)), where=~drew_one)
        return means[best, place], errors[best, place], apart

    def _entropy_rows(self, temperature: float, size: int, truth: np.ndarray) -> list[dict[str, Any]]:
        rows, monte_carlo = [], np.zeros(0)
        for rule in SAMPLERS:
            drawn = self.sample(rule, size, ENTROPY_LENGTH, temperature, self.runs)
            self.progress.advance(size)
            weighted = rule in (fb.Stochastic, fb.ConditionalPoisson)
            for normalized in (True, False) if weighted else (True,):
                errors = np.stack([estimates(found, normalized) for found in drawn]) - truth[:, None]  # [prompts, runs]
                if rule is fb.Sample:
                    monte_carlo = errors
                ratio = interval(
                    np.stack([errors, monte_carlo]), lambda e: rmse(e[..., 0, :, :]) / rmse(e[..., 1, :, :])
                )
                rows.append(
                    {
                        "temperature": temperature,
                        "rule": rule.__name__,
                        "estimator": ("normalized" if normalized else "unbiased") if weighted else "mean",
                        "samples": size,
                        "rmse": interval(errors, rmse),
                        "of_monte_carlo": ratio,
                        "bias": interval(errors, lambda e: e.mean((-2, -1))),
                        "better_prompts": int((rmse(errors[:, None]) < rmse(monte_carlo[:, None])).sum()),
                        "inexact": sum(int((found.flags & fb.FLAG_INEXACT != 0).sum()) for found in drawn),
                        "requests": errors.size,
                    }
                )
        return rows

    def weights(self) -> dict[str, Any]:
        """The total weight of a run, whose expectation is 1, by length: how heavy the tails of the weights are."""
        rows, size, temperature = [], 8, 0.5
        self.progress.label = "weights"
        for length in LENGTHS:
            for rule in (fb.Stochastic, fb.ConditionalPoisson):
                drawn = self.sample(rule, size, length, temperature, 4 * self.runs)
                total = np.stack([fb.weights(found.hypotheses, False).sum(1).numpy() for found in drawn])
                rows.append(
                    {
                        "rule": rule.__name__,
                        "max_length": length,
                        "mean": interval(total, lambda t: t.mean((-2, -1))),
                        "median": float(np.median(total)),
                        "rmse": interval(total - 1.0, rmse),
                    }
                )
                self.progress.advance(size)
        return {"samples": size, "temperature": temperature, "runs": 4 * self.runs, "rows": rows}

    def tails(self) -> dict[str, Any]:
        """The entropy from few samples at low temperature with many more runs, as rare runs weigh the most."""
        rows, size, runs = [], SAMPLES[0], 25 * self.runs  # twice: memory
        self.progress.label = "tails"
        for temperature, truth in self.truths.items():
            if temperature > 0.2:
                continue
            for rule in (fb.Stochastic, fb.ConditionalPoisson):
                drawn = [self.sample(rule, size, ENTROPY_LENGTH, temperature, runs) for _ in range(2)]
                for normalized in (True, False):
                    both = [np.stack([estimates(found, normalized) for found in half]) for half in drawn]
                    errors = np.concatenate(both, 1) - truth[:, None]
                    row = {"temperature": temperature, "rule": rule.__name__, "greatest": float(np.abs(errors).max())}
                    row |= {"estimator": "normalized" if normalized else "unbiased", "rmse": interval(errors, rmse)}
                    rows.append(row)
                self.progress.advance(size)
        return {"samples": size, "runs": 2 * runs, "rows": rows}

    def diversity(self) -> dict[str, Any]:
        """Distinct n-grams of the n-best against their log-probability per token."""
        size, length = 8, 24

        def measure(found: Found, prompts: Sequence[Sequence[int]]) -> np.ndarray:
            """Distinct n-grams, mean and best log-probability per token: float64 ``[B, 3]``."""
            hyps = found.hypotheses
            assert bool(hyps.valid.all())
            quality = log_probs(self.model, prompts, hyps) / hyps.lengths.numpy()
            ends = hyps.lengths.tolist()
            sets = [
                [sequence[:end] for sequence, end in zip(*request, strict=True)]
                for request in zip(hyps.tokens.tolist(), ends, strict=True)
            ]
            return np.stack([[distinct_ngrams(one) for one in sets], quality.mean(1), quality.max(1)], 1)

        settings: list[tuple[str, float | None, Any, float]] = [("TopK", None, fb.TopK(), 1.0)]
        settings += [("DiverseGroups", s, fb.DiverseGroups(4, s), 1.0) for s in (0.2, 0.5, 1.0, 2.0, 4.0)]
        settings += [("DiverseSiblings", r, fb.DiverseSiblings(r), 1.0) for r in (0.2, 0.5, 1.0, 2.0, 4.0)]
        for rule in (fb.Stochastic, fb.Sample):
            settings += [(rule.__name__, t, rule(self.next_seed()), t) for t in (0.2, 0.4, 0.6, 0.8, 1.0)]
        rows = []
        for name, setting, selection, temperature in settings:
            self.progress.label = f"diversity, {name}"
            search = fb.BeamSearch(size, length, EOS_ID, selection=selection, temperature=temperature)
            found = run_all(self.model, self.prompts, search, measure)
            rows.append({"rule": name, "setting": setting})
            rows[-1] |= {n: mean_and_interval(found[:, i]) for i, n in enumerate(("distinct", "mean", "best"))}
            self.progress.advance(4)
        return {"beam_size": size, "max_length": length, "groups": 4, "prompts": len(self.prompts), "rows": rows}

    def width(self) -> dict[str, Any]:
        """Log-probability of the best against the rows that the model is run on."""
        length, widest = 48, 16

        def measure(found: Found, prompts: Sequence[Sequence[int]]) -> np.ndarray:
            """Rows a step and rows in all, the prompt's own included, and the best log-probability: ``[B, 3]``."""
            rows, steps = 1.0 + found.live.sum(0).numpy(), 1.0 + (found.live > 0).sum(0).numpy()
            return np.stack([rows / steps, rows, found.hypotheses.log_probs[:, 0].double().numpy()], 1)

        widths = (1, 2, 4, 8, widest)
        settings: list[tuple[str, float, Any, int]] = [("TopK", k, fb.TopK(), k) for k in widths]
        settings += [("TopK, pool", k, fb.TopK(), k) for k in widths]
        settings += [("DynamicWidth", p, fb.DynamicWidth(p), widest) for p in (0.3, 0.5, 0.7, 0.9, 0.95, 0.99)]
        measured = []
        for name, _, selection, size in settings:
            self.progress.label = f"width, {name}"
            options: dict[str, Any] = {"selection": selection, "length_penalty": 0.0, "finished": "in_place"}
            if name == "TopK, pool":
                options |= {"finished": "pool", "stopping": fb.Exact()}
            measured.append(run_all(self.model, self.prompts, fb.BeamSearch(size, length, EOS_ID, **options), measure))
            self.progress.advance(4)
        rows = []
        for (name, setting, _, _), found in zip(settings, measured, strict=True):
            rows.append({"rule": name, "setting": setting})
            rows[-1] |= {n: mean_and_interval(found[:, i]) for i, n in enumerate(("rows_per_step", "rows"))}
            rows[-1]["gain"] = mean_and_interval(found[:, 2] - measured[0][:, 2])
            if name == "DynamicWidth":
                for against, column, start in (("rows_per_step", 0, 0), ("rows", 1, 0), ("pool_rows", 1, len(widths))):
                    fixed = measured[start : start + len(widths)]
                    both = np.stack([one.T for one in (*fixed, found)])  # [widths + 1, 3, prompts]
                    rows[-1][f"over_{against}"] = interval(both, partial(over_fixed, column=column), paired=True)
        return {"max_length": length, "cap": widest, "prompts": len(self.prompts), "rows": rows}
