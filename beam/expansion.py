"""From logits, masks and the constraint to what a selection rule is given: the rows to expand and what may follow."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from flashbeam.kernels import next_length, pack_bitmask

from . import constrained
from .checks import as_attention, as_bitmask, as_bools
from .constraint import Bound, Context, Proposed, bind
from .models.combining import combine, of_groups, rows_given
from .models.protocol import Combined, Given
from .scoring import running
from .selection import Expansion, Veto
from .state import NO_BITMASKS, EosBitmasks

if TYPE_CHECKING:
    from .search import BeamSearch
    from .state import State


class Expanded(NamedTuple):
    """What a step has found out before it changes anything."""

    expansion: Expansion
    columns: int  # of the logits
    constraint: Bound | None
    constraint_state: Any  # of the B * K slots
    eos_bitmasks: EosBitmasks
    given: int | None  # rows per request that were repeated for the groups of a beam; None at later steps
    term_stats: tuple[Any, ...]  # of the B * K slots, before the step
    flags: Tensor | None  # int32 [R], faults of models that the rows do not show


def expand(
    search: BeamSearch,
    state: State,
    logits: Any,
    bitmask: Tensor | None,
    attention: Tensor | None,
    per_row: dict[str, Tensor | None],
) -> Expanded:
    """Check what a step is given and say what may follow. Changes nothing."""
    sources, vocab_size, of_rows = rows_given(search, state, logits, per_row)
    rows = sources[0]
    mask = None if bitmask is None else as_bitmask(state, bitmask, rows.shape[0], vocab_size)
    first, given = state.vocab_size is None, rows.shape[0] // state.batch_size
    constraint, slots_state, eos_bitmasks = _begun(search, state, vocab_size)
    if slots_state is constrained.FAILED:
        raise ValueError(f"state: expected one whose steps have succeeded, got one in which {constrained.FAILED}")
    if state.term_stats is running.FAILED:
        raise ValueError(f"state: expected one whose steps have succeeded, got one in which {running.FAILED[0]}")
    if first and state.groups > 1:  # every group starts from the request's one row
        sources, of_rows = of_groups(state.groups, given, sources, of_rows)
        rows = sources[0]
        mask = None if mask is None else mask[::given].repeat_interleave(state.groups, 0)

    rescores, weighs = (search.models is not None and getattr(search.models, of) for of in ("rescores", "weighs"))
    listed, banks, veto = None, None, None
    if constraint is not None:
        now = slots_state
        per_request = rows.shape[0] // state.batch_size
        if per_request != state.beam_size:  # before the first token: all slots are alike
            index = torch.arange(0, rows.shape[0] * state.beam_size, state.beam_size, device=state.device)
            now = constraint.take(slots_state, index // per_request)
        uses, record = getattr(search.selection, "uses", ()), state.record is not None  # entropies ask for masks
        if "banks" in uses:
            banks = constraint.banks(now)
        if banks is not None and (search.terms or rescores):
            kind = "terms" if search.terms else str(search.models)
            raise ValueError(f"constraint: expected one without banks for a search with {kind}, got fb.Phrases")
        masks = search.terms or rescores or weighs or search.dialect.finishes == "row" or record
        if "lists" in uses and banks is None and not masks:
            listed, ours = constraint.listed(now)
        else:
            ours = constraint.bitmask(now)
        if ours is not None:
            ours = as_bitmask(state, ours, rows.shape[0], vocab_size, "constraint's bitmask")
            mask = ours if mask is None else ours & mask
        if constraint.considers is not None:
            veto = Veto(partial(_ask, state, constraint, now), constraint.considers)
        if search.dialect.finishes != "beam" and not (banks is None and veto is None):
            kind = "a veto" if banks is None else "phrases"
            raise ValueError(f"dialect: expected finishes='beam' with {kind}, got {search.dialect.finishes!r}")

    renormalizes = _renormalizes(search)
    if eos_bitmasks.only is not None:
        last = state.requests.steps + 1 == state.limits.max_length
        mask = _masked_where(last, eos_bitmasks.only, mask, rows.shape[0])
    allowed = mask
    if eos_bitmasks.without is not None and listed is None:  # for those who renormalise or weigh the rest
        banned = state.requests.steps + 1 < state.limits.min_length
        allowed = _masked_where(banned, eos_bitmasks.without, mask, rows.shape[0])
    parents = rows.shape[0] // state.requests.done.shape[0]
    active = state.slots.active[:, :parents].flatten()
    temperature = None if state.temperature is None else state.temperature[:, :parents].flatten()
    adjust = None if constraint is None else partial(constraint.adjust, now)
    combined = Combined(rows if adjust is None else adjust(rows))
    if search.models is not None:
        rest = (active, allowed, temperature, search.normalize, vocab_size, of_rows)
        combined = combine(search.models, state.models, Given(sources, *rest), adjust)
        if combined.bitmask is not None:
            mask, allowed = (combined.bitmask if bits is None else combined.bitmask & bits for bits in (mask, allowed))
    rows = combined.logits
    term_stats = running.begin_terms(search.terms, state) if first else state.term_stats
    attention = _attention(search, state, attention, rows.shape[0])
    terms = running.terms_of_rows(search.terms, term_stats, state, rows.shape[0], attention) if search.terms else None
    expansion = Expansion(
        logits=rows,
        active=active,
        bitmask=allowed if renormalizes else mask,
        allowed=allowed,
        temperature=temperature,
        eos=state.eos,
        divisor=_next_norm(state) if state.in_place and search.selection.seed is None else None,
        normalize=search.normalize,
        vocab_size=vocab_size,
        pad_id=search.pad_id,
        slots=state.slots,
        draws=state.draws,
        requests=state.requests,
        limits=state.limits,
        request_ids=state.request_ids,
        seed=state.seed,
        first=first,
        listed=listed,
        banks=banks,
        veto=veto,
        finishes=search.dialect.finishes,
        terms=terms,
        increments=combined.increments,
        falls=search.models is None or search.models.falls,
    )
    given_first = given if first else None
    columns = sources[0].shape[1]
    return Expanded(expansion, columns, constraint, slots_state, eos_bitmasks, given_first, term_stats, combined.flags)


def _attention(search: BeamSearch, state: State, attention: Tensor | None, rows: int) -> Tensor | None:
    """``[R, S]``, for the terms that read it."""
    reader = next((term for term in search.terms if term.reads_attention), None)
    if reader is None and attention is not None:
        raise ValueError("attention: expected None without a term that reads it, such as fb.Coverage, got a tensor")
    if reader is not None and attention is None:
        raise ValueError(f"attention: expected a tensor for {reader}, got None")
    return None if attention is None else as_attention(state, attention, rows)


def _ask(state: State, constraint: Bound, now: Any, proposed: Proposed) -> Tensor:
    """The constraint's veto, checked."""
    requests, count = proposed.tokens.shape
    return as_bools(state, constraint.veto(now, proposed), requests, "constraint's veto", count)


def _begun(search: BeamSearch, state: State, vocab_size: int) -> tuple[Bound | None, Any, EosBitmasks]:
    """The constraint, its state and the bitmasks of EOS: made at the first step."""
    if state.vocab_size is not None:
        return state.constraint, state.constraint_state, state.eos_bitmasks
    batch = state.batch_size
    context = Context(
        batch_size=batch,
        beam_size=state.beam_size,
        vocab_size=vocab_size,
        device=state.device,
        eos=tuple(search.eos_ids),
        min_lengths=state.min_lengths,
        max_lengths=state.max_lengths,
        ends_forced=state.dialect.at_max_length == "end",
    )
    constraint = bind(search.constraint.of_batch(batch), context)
    vetoes = constraint is not None and constraint.considers is not None
    if vetoes and "veto" not in getattr(search.selection, "uses", ()):
        name = type(search.selection).__name__
        raise ValueError(f"constraint: expected one without a veto for fb.{name}, got one that vetoes")
    eos_bitmasks = _eos_bitmasks(search, state, vocab_size)
    if constraint is None:
        return None, None, eos_bitmasks
    slots_state = constraint.init()
    if (accepted := constraint.accepts(slots_state)) is not None:  # what it returns is known before anything changes
        as_bools(state, accepted, context.rows, "constraint's accepts")
    return constraint, slots_state, eos_bitmasks


def _renormalizes(search: BeamSearch) -> bool:
    """Whether what is banned is no part of the distribution."""
    return search.normalize == "allowed" or search.selection.seed is not None


def _eos_bitmasks(search: BeamSearch, state: State, vocab_size: int) -> EosBitmasks:
    weighs = search.selection.weighs or _renormalizes(search) or (search.models is not None and search.models.weighs)
    without = weighs and max(state.min_lengths) > 0
    only = state.dialect.at_max_length == "end"
    if state.eos is None or not (without or only):
        return NO_BITMASKS
    is_eos = (torch.arange(vocab_size, device=state.device)[:, None] == state.eos).any(1)
    return EosBitmasks(pack_bitmask(~is_eos) if without else None, pack_bitmask(is_eos) if only else None)


def _masked_where(there: Tensor, eos_bitmask: Tensor, mask: Tensor | None, rows: int) -> Tensor:
    """``mask [R, ...]``, in requests ``there [B]`` only what ``eos_bitmask`` allows as well."""
    there = there.repeat_interleave(rows // there.shape[0])
    allowed = torch.where(there[:, None], eos_bitmask, torch.full_like(eos_bitmask, -1))
    return allowed if mask is None else allowed & mask[:, : allowed.shape[1]]


def _next_norm(state: State) -> Tensor:
    length = next_length(state.requests, state.limits)
    return state.limits.length_norm.gather(1, length[:, None])[:, 0]
