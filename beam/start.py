"""The tensors of a search, allocated once when it starts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from flashbeam.kernels import Draws, History, Limits, Pool, Requests, Slots, root_nodes

from .agreement import check_lengths
from .arguments import PerRequest, of_source, whole_number
from .checks import as_request_ids, as_source_lengths
from .constraint import runs_on_host
from .scoring import LengthPower, norm_tables
from .scoring.running import check_sources
from .state import State
from .statistics import no_statistics

if TYPE_CHECKING:
    from .search import BeamSearch


_NO_QUOTA = torch.iinfo(torch.int32).max


def start(
    search: BeamSearch,
    batch_size: int,
    device: torch.device,
    request_ids: Tensor | Sequence[int] | None,
    source_lengths: Tensor | Sequence[int] | None = None,
) -> State:
    """See ``BeamSearch.init``. A group of a beam is kept as a request of its own."""
    whole_number(1)("batch_size", batch_size)
    groups, seed = search.selection.groups, search.selection.seed
    sources = as_source_lengths(source_lengths, batch_size)
    min_lengths, max_lengths = (
        of_source(limit, batch_size, sources) for limit in (search.min_length, search.max_length)
    )
    limits: tuple[PerRequest[Any], ...] = (search.beam_size, search.temperature, search.length_penalty)
    widths, temperatures, scorings = (argument.of_batch(batch_size) for argument in limits)
    check_lengths(search, min_lengths, max_lengths, scorings)
    check_sources(search.terms, sources)
    for argument in search.per_request():
        argument.of_batch(batch_size)
    budget = search.budget
    tokens = None if budget is None or budget.tokens is None else budget.tokens.of_batch(batch_size)
    if seed is not None:  # what is sampled is not ranked by length
        scorings = [LengthPower(0.0)] * batch_size
    lows, highs = tuple(min_lengths), tuple(max_lengths)
    widths, temperatures, scorings, min_lengths, max_lengths = (
        [value for value in values for _ in range(groups)]
        for values in (widths, temperatures, scorings, min_lengths, max_lengths)
    )
    widths = [width // groups for width in widths]
    ids = as_request_ids(request_ids, batch_size, device)
    count, beams, steps = len(widths), max(widths), max(max_lengths)
    in_place, quotas = search.finished == "in_place", list(map(search.stopping.quota, widths))
    # no more than this can ever finish
    bounded = [_NO_QUOTA if quota is None else min(quota, beams * steps) for quota in quotas]
    places = 1 if in_place else max(bounded) + beams if search.stopping.rule.by_arrival else beams
    spare = search.dialect.at_max_length == "spare"
    norms = norm_tables(scorings, min_lengths, max_lengths, search.dialect.counts_eos)

    def on_device(values: Any, dtype: type) -> Tensor:
        return torch.from_numpy(np.asarray(values, dtype)).to(device, non_blocking=True)

    def new(shape: tuple[int, ...], value: float, dtype: torch.dtype) -> Tensor:
        return torch.full(shape, value, dtype=dtype, device=device)

    per_slot, per_place, per_step = (count, beams), (count, places), (steps, count, beams)
    slots = Slots(
        log_probs=new(per_slot, -torch.inf, torch.float32),
        lengths=new(per_slot, 0, torch.int32),
        ranks=new(per_slot, 0, torch.int32),
        ended=new(per_slot, False, torch.bool),
        active=new(per_slot, False, torch.bool),
        scores=new(per_slot, -torch.inf, torch.float32),
    )
    draws = Draws(
        nodes=root_nodes(ids.repeat_interleave(groups))[:, None].repeat(1, beams),
        sampling_log_probs=new(per_slot, -torch.inf, torch.float32),
        inclusion=new(per_slot, 0.0, torch.float32),
        codes=new(per_slot, 0, torch.int64),
    )
    for field in (slots.log_probs, slots.scores, draws.sampling_log_probs):
        field[:, 0].zero_()
    slots.active[:, 0].fill_(True)
    flat = all(temperature == 1.0 for temperature in temperatures)
    return State(
        slots=slots,
        draws=draws,
        requests=Requests(
            done=new((count,), False, torch.bool),
            flags=new((count,), 0, torch.int32),
            steps=new((count,), 0, torch.int32),
        ),
        history=History(
            tokens=new(per_step, 0, torch.int32),
            parents=new(per_step, 0, torch.int32),
            token_log_probs=new(per_step, 0.0, torch.float32),
        ),
        pool=Pool(
            *(new(per_place, -torch.inf, torch.float32) for _ in range(3)),
            *(new(per_place, 0, torch.int32) for _ in range(4)),
        ),
        limits=Limits(
            *(on_device(values, np.int32) for values in (widths, min_lengths, max_lengths, bounded)),
            *(on_device(table, np.float32) for table in (norms.ended, norms.bound)),
        ),
        bound=new((count,), torch.inf, torch.float32),
        live_norm=on_device(np.ones_like(norms.live) if spare else norms.live, np.float32),
        temperature=None if flat else on_device(np.repeat(temperatures, beams), np.float32).view(per_slot),
        eos=on_device(search.eos_ids, np.int64) if search.eos_ids else None,
        request_ids=ids,
        seed=new((1,), 0 if seed is None else seed, torch.int64),
        selection=search.selection,
        in_place=in_place,
        pad_id=search.pad_id,
        dialect=search.dialect,
        rule=search.stopping.rule,
        min_lengths=lows,
        max_lengths=highs,
        tokens_left=None if tokens is None else on_device(tokens, np.int64),
        deadline=None if budget is None else budget.deadline(),
        on_host=any(map(runs_on_host, search.constraint.values)),
        models=None if search.models is None else search.models.begin(batch_size, device),
        source_lengths=None if sources is None else on_device(sources, np.float32),
        record=no_statistics(count, beams, steps, len(search.eos_ids), device) if search.statistics else None,
    )
