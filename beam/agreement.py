"""What the arguments of a search ask of each other, checked when it is made and, of sources, when it starts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .arguments import PerRequest
from .dialect import Dialect
from .models.combining import check_models
from .scoring import LengthPower, Scoring
from .scoring.length import check_norm_of_nothing, check_norms
from .stopping import FirstFinished

if TYPE_CHECKING:
    from .search import BeamSearch


def check_agreement(search: BeamSearch) -> None:
    """Raise ``<argument>: expected X, got Y`` where arguments do not go together."""
    _check_selection(search)
    _check_regime(search)
    _check_terms(search)
    check_models(search)
    batch_sizes = {argument.name: len(argument.values) for argument in search.per_request() if not argument.shared}
    if len(set(batch_sizes.values())) > 1:
        name, size = next(iter(batch_sizes.items()))
        other = next(other for other, n in batch_sizes.items() if n != size)
        raise ValueError(f"{other}: expected as many values as {name}, {size}, got {batch_sizes[other]}")
    check_lengths(search, *_broadcast(search.min_length, search.max_length, search.length_penalty))


def check_lengths(search: BeamSearch, lows: list[Any], highs: list[Any], scorings: list[Scoring]) -> None:
    """Length limits and norms per request that go together; limits may still be functions of the source."""
    for low, high in zip(lows, highs, strict=True):
        if not callable(low) and not callable(high) and low > high:
            raise ValueError(f"min_length: expected at most max_length, {high}, got {low}")
    check_norms("length_penalty", scorings, [1 if callable(high) else high for high in highs])
    if not search.dialect.counts_eos:
        check_norm_of_nothing("length_penalty", scorings)


def _broadcast(*arguments: PerRequest[Any]) -> tuple[list[Any], ...]:
    size = max(len(argument.values) for argument in arguments)
    return tuple(argument.of_batch(size) for argument in arguments)


def _check_regime(search: BeamSearch) -> None:
    """How hypotheses end, and where finished ones stay."""
    dialect, rule = search.dialect, search.stopping.rule
    if dialect.at_max_length == "end" and not search.eos_ids:
        raise ValueError("eos_id: expected a token to end with, for at_max_length='end', got None")
    if search.finished == "pool":
        return
    waits = all(search.stopping.quota(width) in (None, width) for width in search.beam_size.values)
    if not waits or rule.best_live or rule.shrinks or rule.awaits_best:
        raise ValueError(
            f"stopping: expected a rule that lets every slot end, for finished='in_place', got {search.stopping!r}"
        )
    if dialect != Dialect():
        raise ValueError(f"dialect: expected the default for finished='in_place', got {dialect}")


def _check_terms(search: BeamSearch) -> None:
    """What terms of the score ask for."""
    if not search.terms:
        return
    first, dialect = search.terms[0], search.dialect
    if "terms" not in getattr(search.selection, "uses", ()):
        name = type(search.selection).__name__
        raise ValueError(f"terms: expected none with fb.{name}, which does not rank by them, got {first}")
    if dialect.finishes != "beam" or dialect.at_max_length == "spare" or not dialect.counts_eos:
        raise ValueError(f"terms: expected none with {dialect}, got {first}")
    for i, term in enumerate(search.terms):
        if search.stopping.rule.exact and not hasattr(term, "upper"):
            raise ValueError(f"terms[{i}]: expected a term with a bound for fb.Exact(), got {term}")


def _check_selection(search: BeamSearch) -> None:
    """What the selection asks for."""
    selection, name = search.selection, type(search.selection).__name__
    for width in search.beam_size.values:
        if width % selection.groups:
            raise ValueError(
                f"beam_size: expected a multiple of the {selection.groups} groups of fb.{name}, got {width}"
            )
    if search.dialect.finishes != "beam" and "finishes" not in getattr(selection, "uses", ()):
        raise ValueError(f"dialect: expected finishes='beam' with fb.{name}, got {search.dialect.finishes!r}")
    if selection.seed is None:
        return
    for scoring in search.length_penalty.values:
        if scoring not in (LengthPower(0.0), LengthPower(1.0)):
            raise ValueError(
                f"length_penalty: expected 0, or the default, with fb.{name}, which ranks no lengths, got {scoring}"
            )
    if not isinstance(search.stopping, FirstFinished):
        raise ValueError(
            f"stopping: expected the default with fb.{name}, which lets every slot end, got {search.stopping}"
        )
