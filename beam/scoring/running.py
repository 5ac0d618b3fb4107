"""The statistics of a search's terms: begun, shown to a step, and moved along with the beams."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flashbeam.kernels import next_length

from ..constrained import written
from .protocol import Term
from .terms import Terms, each_leaf

if TYPE_CHECKING:
    from ..search import Step
    from ..state import State

FAILED = ("a term raised an error when its statistics were to follow the beams",)


def as_terms(given: Any) -> tuple[Term, ...]:
    """The terms that a search is given: one, a list of them, or none."""
    if isinstance(given, Term) and not isinstance(given, type):
        return (given,)
    if isinstance(given, str) or not isinstance(given, Sequence):
        raise TypeError(f"terms: expected a list of terms such as fb.UID('square', 0.1), got {given!r}")
    for i, term in enumerate(given):
        if not isinstance(term, Term) or isinstance(term, type):
            raise TypeError(f"terms[{i}]: expected a term such as fb.UID('square', 0.1), got {term!r}")
    return tuple(given)


def check_sources(terms: tuple[Term, ...], source_lengths: Any) -> None:
    """``source_lengths`` are there where a term reads them."""
    reader = next((term for term in terms if getattr(term, "reads_source_lengths", False)), None)
    if reader is not None and source_lengths is None:
        raise ValueError(f"source_lengths: expected one length per request for {reader}, got None")


@torch.inference_mode(False)  # as in BeamSearch.init
def begin_terms(terms: tuple[Term, ...], state: State) -> tuple[Any, ...]:
    """The statistics of all slots before the first token."""
    return tuple(term.init(state.batch_size * state.beam_size, state.device) for term in terms)


def terms_of_rows(
    terms: tuple[Term, ...], stats: tuple[Any, ...], state: State, rows: int, attention: Tensor | None
) -> Terms:
    """What the ``rows`` of a step are scored by, ``stats`` being those of all slots; ``attention`` is ``[R, S]``."""
    batch, limits = state.batch_size, state.limits
    per_request = rows // batch
    if per_request != state.beam_size:  # before the first token: all slots are alike
        index = torch.arange(0, rows * state.beam_size, state.beam_size, device=state.device) // per_request
        stats = each_leaf(stats, lambda leaf: leaf.index_select(0, index))

    def of_rows(values: Tensor) -> Tensor:
        return values.float().repeat_interleave(per_request)[:, None]

    length = state.requests.steps + 1
    shortest = torch.minimum(torch.maximum(length + 1, limits.min_length), limits.max_length)
    return Terms(
        terms=terms,
        stats=stats,
        lengths=of_rows(length),
        shortest=of_rows(shortest),
        longest=of_rows(limits.max_length),
        attention=None if attention is None else attention.float()[:, None],
        source_lengths=None if state.source_lengths is None else of_rows(state.source_lengths),
        norm=of_rows(limits.length_norm.gather(1, next_length(state.requests, limits)[:, None])[:, 0]),
    )


@torch.inference_mode(False)  # as in BeamSearch.init
def follow_terms(state: State, before: tuple[Any, ...], terms: Terms, best: Tensor, step: Step) -> None:
    """Extend the statistics of the rows by what was chosen and give them to the slots, in the memory of ``before``.

    ``best [R, 1]`` is as in :class:`Seen`.
    """
    history, rows = state.history.token_log_probs, step.source_rows
    last = (state.requests.steps - 1).clamp(min=0).long()
    token_log_probs = history.gather(0, last[None, :, None].expand(1, -1, history.shape[2]))[0]
    token_log_probs = torch.where(step.valid, token_log_probs, 0.0).view(-1, 1)
    continued = terms.take(rows)
    seen = continued.seen(step.tokens.view(-1, 1), token_log_probs, best.index_select(0, rows))
    state.term_stats = FAILED  # if a term raises
    state.term_stats = written(before, continued.advanced(seen), "terms")
