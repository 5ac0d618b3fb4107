"""Ensembles: the distributions of several models, or their log-probabilities, added up."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from flashbeam.kernels import mixture, summarize

from ..arguments import nonnegative_number, positive_number
from .protocol import Combined, Given

KINDS = ("probability", "log")


class Settings(NamedTuple):
    """On the device."""

    weights: Tensor | None  # float32 [B, M]
    temperatures: Tensor | None  # float32 [M]


@dataclass(frozen=True)
class Mixture:
    """An ensemble of models over one vocabulary; or one model, with a language model fused in.

    For the log-probabilities ``log p_i`` of model i, after its temperature::

        kind="probability":             log p = log sum_i w_i p_i
        kind="log":                     log p = sum_i w_i log p_i - log Z      the product of experts, renormalised
        kind="log", normalize=False:    score = sum_i w_i log p_i              shallow fusion

    The first two are distributions, and everything works with them as with one model's. Shallow fusion (Gulcehre et al.
    2015, section 4.1) accumulates a score that is no log-probability, and only falls: ``log_probs`` are the first
    model's, ``scores`` the fused ones; for a translation model and a language model, ``weights=(1, beta)``.

    A model is not read in rows where its weight is 0. Where one model alone has a weight, the search is that model's,
    bit for bit: for ``"probability"`` whatever the weight, for ``"log"`` if it is 1.

    Args:
        weights: of the M models, 0 or more, with a sum of 1 for ``"probability"``; a list of such lists has one per
            request; ``None``: every step is given ``weights``, as any step may be, ``[R, M]``, ``[B, R / B, M]`` or
            ``[B, M]`` float32, what is not above 0 counting as 0, and relative to their sum for ``"probability"``.
        kind: ``"probability"`` or ``"log"``.
        temperatures: of the models, above 0: divide their logits before they are combined; default 1. The search's own
            ``temperature`` divides ``log p`` then; in shallow fusion it is the first model's.
        normalize: ``False`` for shallow fusion; needs a selection that ranks by such scores, such as ``fb.TopK()``.

    Raises:
        ValueError, TypeError: ``<argument>: expected X, got Y``.
    """

    weights: Any = None
    kind: str = "probability"
    temperatures: Sequence[float] | None = None
    normalize: bool = True
    reads = "weights"
    falls = True
    weighs = False

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind: expected one of {list(KINDS)}, got {self.kind!r}")
        if not isinstance(self.normalize, bool):
            raise TypeError(f"normalize: expected a bool, got {type(self.normalize).__name__}")
        if self.kind == "probability" and not self.normalize:
            raise ValueError("normalize: expected True for kind='probability', which is a distribution, got False")
        if self.weights is not None:
            object.__setattr__(self, "weights", self._checked())
        object.__setattr__(self, "temperatures", as_temperatures(self.temperatures))
        if self.temperatures is not None:
            if self.count not in (None, len(self.temperatures)):
                raise ValueError(f"temperatures: expected one per weight, {self.count}, got {len(self.temperatures)}")
            if not self.normalize and self.temperatures[0] != 1:
                first = self.temperatures[0]
                raise ValueError(f"temperatures[0]: expected 1, as it is the search's own temperature, got {first}")

    def _checked(self) -> tuple[Any, ...]:
        """The weights as a tuple of numbers, or as a tuple of such tuples."""
        given = self.weights
        if isinstance(given, Tensor):
            if given.device.type != "cpu":
                raise ValueError(f"weights: expected a list or a CPU tensor, got a tensor on {given.device}")
            given = given.detach().numpy()
        if isinstance(given, np.ndarray):
            given = given.tolist()
        if isinstance(given, str) or not isinstance(given, Sequence) or not given:
            raise TypeError(f"weights: expected a list of numbers, or one such list per request, got {given!r}")
        if not isinstance(given[0], Sequence):
            return self._row("weights", given)
        rows = tuple(self._row(f"weights[{i}]", row) for i, row in enumerate(given))
        for i, row in enumerate(rows):
            if len(row) != len(rows[0]):
                raise ValueError(f"weights[{i}]: expected {len(rows[0])} numbers, as weights[0] has, got {len(row)}")
        return rows

    def _row(self, name: str, given: Any) -> tuple[float, ...]:
        if isinstance(given, str) or not isinstance(given, Sequence) or not given:
            raise TypeError(f"{name}: expected a list of numbers, got {given!r}")
        row = tuple(nonnegative_number(f"{name}[{i}]", weight) for i, weight in enumerate(given))
        if self.kind == "probability" and abs(math.fsum(row) - 1) > 1e-6:
            raise ValueError(f"{name}: expected numbers with a sum of 1, got {math.fsum(row):g}")
        if not any(row):
            raise ValueError(f"{name}: expected a weight above 0, got {list(row)}")
        return row

    @property
    def per_request(self) -> bool:
        """Whether each request has weights of its own."""
        return self.weights is not None and isinstance(self.weights[0], tuple)

    @property
    def count(self) -> int | None:
        """M, if the weights say."""
        if self.weights is None:
            return None
        return len(self.weights[0] if self.per_request else self.weights)

    @property
    def rescores(self) -> bool:
        """Shallow fusion does."""
        return not self.normalize

    def begin(self, batch_size: int, device: torch.device) -> Settings:
        """See :class:`flashbeam.models.Models`."""
        if self.per_request and len(self.weights) != batch_size:
            raise ValueError(f"weights: expected one list per request, {batch_size}, got {len(self.weights)}")
        weights = None
        if self.weights is not None:
            rows = self.weights if self.per_request else [self.weights] * batch_size
            weights = on_device(rows, device)
        return Settings(weights, on_device(self.temperatures, device))

    def check(self, models: int, per_row: Tensor | None) -> None:
        """See :class:`flashbeam.models.Models`."""
        if self.count not in (None, models):
            raise ValueError(f"logits: expected {self.count} tensors, one per weight, got {models}")
        check_temperatures(self.temperatures, models)
        if self.weights is None and per_row is None:
            raise ValueError("weights: expected a tensor, as fb.Mixture() has none, got None")

    def combine(self, settings: Settings, given: Given) -> Combined:
        """See :class:`flashbeam.models.Models`."""
        weights = given.per_row
        if weights is None:
            assert settings.weights is not None
            weights = settings.weights.repeat_interleave(given.active.shape[0] // settings.weights.shape[0], 0)
        temperature = given.tempered(settings.temperatures)
        if not self.normalize:
            return _fused(given, weights, temperature)
        if self.kind == "probability":
            return Combined(mixed(given, weights, temperature))
        return Combined(mixture(given.logits, weights, kind="log", temperature=temperature, **given.extent))


def as_temperatures(given: Any) -> tuple[float, ...] | None:
    """Temperatures, one per model; ``None`` if all are 1."""
    if given is None:
        return None
    if isinstance(given, str) or not isinstance(given, Sequence) or not given:
        raise TypeError(f"temperatures: expected a list of numbers, one per model, got {given!r}")
    return tuple(positive_number(f"temperatures[{i}]", value) for i, value in enumerate(given))


def check_temperatures(temperatures: Sequence[float] | None, models: int) -> None:
    """There is one per model."""
    if temperatures is not None and len(temperatures) != models:
        raise ValueError(f"logits: expected {len(temperatures)} tensors, one per temperature, got {models}")


def on_device(values: Any, device: torch.device) -> Tensor | None:
    """float32, without waiting for the device."""
    return None if values is None else torch.from_numpy(np.asarray(values, np.float32)).to(device, non_blocking=True)


def column(tensor: Tensor | None, i: int) -> Tensor | None:
    """Column ``i`` of ``[R, M]``, where there is one."""
    return None if tensor is None else tensor[:, i]


def mixed(given: Given, weights: Tensor, temperature: Tensor | None, onehot: Tensor | None = None) -> Tensor:
    """The probability mixture of rows, float32 ``[R, vocab_size]``, by ``weights [R, M]``, relative to their sum."""
    positive = weights > 0
    # one model alone needs no normaliser
    shared = given.active & (positive.sum(1) > 1)
    lse = []
    for i, x in enumerate(given.logits):
        read = shared & positive[:, i]
        if onehot is not None:
            read = read & (onehot[:, i] < 0)
        lse.append(summarize(x, temperature=column(temperature, i), active=read, vocab_size=given.vocab_size).lse)
    return mixture(
        given.logits,
        weights,
        lse=torch.stack(lse, 1),
        temperature=temperature,
        onehot=onehot,
        **given.extent,
    )


def _fused(given: Given, weights: Tensor, temperature: Tensor | None) -> Combined:
    """Shallow fusion: the search's temperature is the first model's."""
    rows, models = weights.shape
    if given.temperature is not None:
        others = weights.new_ones(rows, models) if temperature is None else temperature
        temperature = torch.cat([given.temperature[:, None], others[:, 1:]], 1)
    found = [
        summarize(
            x,
            bitmask=given.barred,
            temperature=column(temperature, i),
            active=given.active & (weights[:, i] > 0),
            normalize=given.normalize,
            vocab_size=given.vocab_size,
        )
        for i, x in enumerate(given.logits)
    ]
    increments = mixture(
        given.logits,
        weights,
        kind="log",
        lse=torch.stack([summary.lse for summary in found], 1),
        temperature=temperature,
        **given.extent,
    )
    return Combined(given.logits[0], increments, faults(*(summary.flags for summary in found)))


def faults(first: Tensor, *others: Tensor) -> Tensor:
    """The union of flags int32 ``[R]``."""
    for flags in others:
        first = first | flags
    return first
