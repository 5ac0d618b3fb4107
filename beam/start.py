"""The tensors of a search, allocated once when it starts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from flashbeam.kernels import Draws, History, Limits, Pool, Requests, Slots, root_nodes

from .arguments import whole_number
from .checks import as_request_ids
from .scoring import LengthPower, norm_tables
from .state import State

if TYPE_CHECKING:
    from .search import BeamSearch


def start(
    search: BeamSearch, batch_size: int, device: torch.device, request_ids: Tensor | Sequence[int] | None
) -> State:
    """See ``BeamSearch.init``. A group of a beam is kept as a request of its own."""
    whole_number(1)("batch_size", batch_size)
    groups, seed = search.selection.groups, search.selection.seed
    widths, max_lengths, min_lengths, temperatures, scorings, _ = (
        [value for value in argument.of_batch(batch_size) for _ in range(groups)] for argument in search.per_request()
    )
    if seed is not None:  # what is sampled is not ranked by length
        scorings = [LengthPower(0.0)] * len(scorings)
    widths = [width // groups for width in widths]
    ids = as_request_ids(request_ids, batch_size, device)
    count, beams, steps = len(widths), max(widths), max(max_lengths)
    # no more than this can ever finish
    quotas = [min(search.stopping.quota(width), beams * steps) for width in widths]
    in_place = search.finished == "in_place"
    places = 1 if in_place else max(quotas) + beams if search.stopping.by_arrival else beams

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
            *(on_device(values, np.int32) for values in (widths, min_lengths, max_lengths, quotas)),
            *(on_device(table, np.float32) for table in norm_tables(scorings, min_lengths, max_lengths)),
        ),
        temperature=None if flat else on_device(np.repeat(temperatures, beams), np.float32).view(per_slot),
        eos=on_device(search.eos_ids, np.int64) if search.eos_ids else None,
        request_ids=ids,
        seed=new((1,), 0 if seed is None else seed, torch.int64),
        selection=search.selection,
        in_place=in_place,
        pad_id=search.pad_id,
    )
