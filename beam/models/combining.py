"""A step's part in combining models: what it is given, checked, and the rows that are searched."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..checks import as_per_row, as_rows
from .protocol import Combined, Given, Models

if TYPE_CHECKING:
    from ..search import BeamSearch
    from ..state import State

_DTYPES = {"weights": (torch.float32,), "gate": (torch.bool, torch.int64, torch.float32)}


def rows_given(
    search: BeamSearch, state: State, logits: Any, per_row: dict[str, Tensor | None]
) -> tuple[tuple[Tensor, ...], int, Tensor | None]:
    """Each model's rows ``[R, V]``, the vocabulary size in force, and what the models read beside them.

    ``per_row`` holds the arguments of ``step`` that some combination of models reads, by name.
    """
    models = search.models
    for name, tensor in per_row.items():
        if tensor is not None and (models is None or models.reads != name):
            reader = {"weights": "fb.Mixture", "gate": "fb.Switch"}[name]
            raise ValueError(f"{name}: expected None without models={reader}(...), got a tensor")
    if models is None:
        rows, vocab_size = as_rows(state, logits, search.vocab_size, search.eos_ids)
        return (rows,), vocab_size, None
    if not isinstance(logits, (tuple, list)):
        raise TypeError(f"logits: expected a tuple of tensors, one per model, got {type(logits).__name__}")
    if not logits:
        raise ValueError("logits: expected a tuple of tensors, one per model, got none")
    sources = []
    for i, each in enumerate(logits):
        rows, vocab_size = as_rows(state, each, search.vocab_size, search.eos_ids, f"logits[{i}]")
        sources.append(rows)
        if rows.shape != sources[0].shape:
            raise ValueError(
                f"logits[{i}]: expected as many rows and columns as logits[0], {list(sources[0].shape)}, "
                f"got {list(rows.shape)}"
            )
    read = models.reads
    given = None if read is None else per_row[read]
    if read is not None and given is not None:
        columns = len(sources) if read == "weights" else None
        given = as_per_row(state, given, sources[0].shape[0], read, _DTYPES[read], columns)
    models.check(len(sources), given)
    return tuple(sources), vocab_size, given


def of_groups(
    groups: int, given: int, sources: tuple[Tensor, ...], per_row: Tensor | None
) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """The first of a request's ``given`` rows, for each of its groups."""

    def repeated(x: Tensor) -> Tensor:
        return x[::given].repeat_interleave(groups, 0)

    return tuple(map(repeated, sources)), None if per_row is None else repeated(per_row)


def combine(models: Models, settings: Any, given: Given, adjust: Callable[[Tensor], Tensor] | None) -> Combined:
    """The rows that are searched. A constraint's ``adjust`` changes those that log-probabilities are of."""
    if adjust is None:
        return models.combine(settings, given)
    if models.rescores:
        return models.combine(settings, given._replace(logits=(adjust(given.logits[0]), *given.logits[1:])))
    combined = models.combine(settings, given)
    return combined._replace(logits=adjust(combined.logits))


def check_models(search: BeamSearch) -> None:
    """What the models of a search ask of its other arguments."""
    models = search.models
    if models is None:
        return
    if not isinstance(models, Models) or isinstance(models, type):
        raise TypeError(f"models: expected a combination such as fb.Mixture([0.5, 0.5]), got {models!r}")
    if not models.rescores:
        return
    name = type(search.selection).__name__
    if "terms" not in getattr(search.selection, "uses", ()):
        raise ValueError(f"models: expected a distribution for fb.{name}, which does not rank by scores, got {models}")
    if search.terms:
        raise ValueError(f"terms: expected none with {models}, which scores by itself, got {search.terms[0]}")
    if search.dialect.finishes != "beam":
        raise ValueError(f"dialect: expected finishes='beam' with {models}, got {search.dialect.finishes!r}")
    if search.stopping.rule.exact and not models.falls:
        raise ValueError(f"stopping: expected a rule without a bound for {models}, got {search.stopping}")
