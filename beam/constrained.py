"""A constraint's state follows the beams that were chosen, and has the last word at ``max_length``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flashbeam.kernels import FLAG_DEAD_END

from .cache import leaves_of, rebuild
from .constraint import Bound
from .state import State

if TYPE_CHECKING:
    from .search import Step


def follow_beams(state: State, constraint: Bound, before: Any, step: Step) -> Step:
    """Move the constraint's state, ``before`` of all slots, to the new beams; ``step`` less what it does not accept."""
    first_slot = torch.arange(0, state.batch_size * state.beam_size, state.beam_size, device=state.device)
    rows = (step.parents + first_slot[:, None]).flatten()
    live = step.valid & ~state.slots.ended.view(step.valid.shape)
    moved = constraint.move(before, rows, step.tokens.flatten(), live.flatten())
    accepted = constraint.accepts(moved)
    if state.constraint is None:
        with torch.inference_mode(False):  # as in BeamSearch.init
            state.constraint, state.constraint_state = constraint, _written((), moved)
    else:
        state.constraint_state = _written(before, moved)
    return step if accepted is None else step._replace(valid=step.valid & ~_reject_unaccepted(state, accepted))


def _written(old: Any, new: Any) -> Any:
    """``new`` in the memory of ``old``, where a captured step looks for it, as far as the two are alike."""
    try:
        leaves = [leaf for _, leaf in leaves_of(new, "state")]
        places = [leaf for _, leaf in leaves_of(old, "state")]
    except TypeError:  # no nest of tensors: matchers on the host
        return new
    places += [None] * (len(leaves) - len(places))
    return rebuild(new, iter([_put(leaf, place) for leaf, place in zip(leaves, places, strict=False)]))


def _put(leaf: Any, place: Any) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    if isinstance(place, Tensor) and (place.shape, place.dtype) == (leaf.shape, leaf.dtype):
        return place.copy_(leaf)
    return leaf.clone()


def _reject_unaccepted(state: State, accepted: Tensor) -> Tensor:
    """What ends at ``max_length`` without EOS, and is not ``accepted [B * K]``, is no hypothesis.

    Returns bool ``[B, K]``: the slots that were emptied. A request left with nothing is a dead end.
    """
    slots, requests = state.slots, state.requests
    at_end = (requests.steps == state.limits.max_length)[:, None]
    held = slots.log_probs > -torch.inf
    rejected = at_end & held & ~slots.ended & ~accepted.view(held.shape)
    for field in (slots.log_probs, slots.scores, state.draws.sampling_log_probs):
        field.masked_fill_(rejected, -torch.inf)
    nothing = ~(held & ~rejected).any(1) & ~(state.pool.log_probs > -torch.inf).any(1)
    requests.flags.bitwise_or_((rejected.any(1) & nothing).int() * FLAG_DEAD_END)
    return rejected.view(state.batch_size, state.beam_size)
