"""A constraint's state follows the beams that were chosen, and has the last word at ``max_length``."""

from __future__ import annotations

from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flashbeam.kernels import FLAG_DEAD_END

from .cache import leaves_of, rebuild
from .capture import is_replayed
from .checks import as_bools
from .constraint import Bound
from .state import State

if TYPE_CHECKING:
    from .search import Step

FAILED = "the constraint raised an error when its state was to follow the beams"


@torch.inference_mode(False)  # as in BeamSearch.init
def begin(state: State, constraint: Bound, first: Any) -> None:
    """Take the constraint and its ``first`` state of all slots into the search's."""
    state.constraint, state.constraint_state = constraint, written((), first, "constraint")


def follow_beams(state: State, constraint: Bound, step: Step, pad_id: int, per_request: int) -> Step:
    """Move the constraint's state to the new beams; ``step`` less what it does not accept.

    ``per_request`` rows of each request were given.
    """
    first_slot = torch.arange(0, state.batch_size * state.beam_size, state.beam_size, device=state.device)
    rows = (step.parents + first_slot[:, None]).flatten()
    live = step.valid & ~state.slots.ended.view(step.valid.shape)
    before, state.constraint_state = state.constraint_state, FAILED  # if it raises
    moved = constraint.move(before, rows, step.tokens.flatten(), live.flatten())
    accepted = constraint.accepts(moved)
    state.constraint_state = written(before, moved, "constraint")
    if accepted is None:
        return step
    rejected = _reject_unaccepted(state, live, as_bools(state, accepted, live.numel(), "constraint's accepts"))
    slot = torch.arange(state.beam_size, device=state.device).expand_as(rejected)
    row = torch.arange(0, state.batch_size * per_request, per_request, device=state.device)[:, None]
    return step._replace(
        tokens=step.tokens.masked_fill(rejected, pad_id),
        parents=torch.where(rejected, slot, step.parents),
        source_rows=torch.where(
            rejected.flatten(), (row + slot.clamp(max=per_request - 1)).flatten(), step.source_rows
        ),
        valid=step.valid & ~rejected,
    )


def written(old: Any, new: Any, name: str) -> Any:
    """``new`` in the memory of ``old``, where a captured step looks for it, as far as the two are alike.

    Raises:
        ValueError: they are not, and the step is captured. The message begins with ``name``.
    """
    try:
        leaves = [leaf for _, leaf in leaves_of(new, "state")]
        places = [leaf for _, leaf in leaves_of(old, "state")]
    except TypeError:  # no nest of tensors: matchers on the host
        return new
    if not torch.compiler.is_compiling() and is_replayed():
        _check_stays(list(map(_fixed, places)), list(map(_fixed, leaves)), name)
    places += [None] * (len(leaves) - len(places))
    return rebuild(new, iter([_put(leaf, place) for leaf, place in zip(leaves, places, strict=False)]))


def _put(leaf: Any, place: Any) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    if isinstance(place, Tensor) and (place.shape, place.dtype) == (leaf.shape, leaf.dtype):
        return place.copy_(leaf)
    return leaf.clone()


def _fixed(leaf: Any) -> Any:
    """What a replay does not change of a leaf."""
    return (list(leaf.shape), leaf.dtype) if isinstance(leaf, Tensor) else leaf


def _check_stays(before: list[Any], after: list[Any], name: str) -> None:
    if before != after:
        pairs = zip_longest(before, after, fillvalue="nothing")
        wanted, found = next((one, other) for one, other in pairs if one is not other and one != other)
        wanted = f"plain values and shapes of its state to stay as they are, for capture: {wanted}"
        raise ValueError(f"{name}: expected {wanted}, got {found}")


def _reject_unaccepted(state: State, live: Tensor, accepted: Tensor) -> Tensor:
    """What ends at ``max_length`` without EOS, and is not ``accepted [B * K]``, is no hypothesis.

    Only what this step has made is judged: the slots that are ``live [B, K]``.

    Returns bool ``[B, K]``: the slots that were emptied. A request left with nothing is a dead end.
    """
    slots, requests = state.slots, state.requests
    at_end = (requests.steps == state.limits.max_length)[:, None]
    held = slots.log_probs > -torch.inf
    rejected = at_end & held & live.view(held.shape) & ~accepted.view(held.shape)
    for field in (slots.log_probs, slots.scores, state.draws.sampling_log_probs):
        field.masked_fill_(rejected, -torch.inf)
    nothing = ~(held & ~rejected).any(1) & ~(state.pool.log_probs > -torch.inf).any(1)
    requests.flags.bitwise_or_((rejected.any(1) & nothing).int() * FLAG_DEAD_END)
    return rejected.view(state.batch_size, state.beam_size)
