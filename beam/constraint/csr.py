"""Edges in rows of a compressed sparse matrix, on the host: what is given is checked, and put in order."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flashbeam.kernels import place

from .reach import Bools, Ints

LARGEST = 2**31 - 2**12  # so that no place, and no edge + 1, leaves int32
_CHUNK = 1 << 20  # edges looked at together: more would only need more memory


def as_array(name: str, given: Any) -> NDArray[Any]:
    """A list, an array or a CPU tensor as an array, not copied if it is one."""
    if isinstance(given, Tensor):
        if given.device.type != "cpu":
            raise ValueError(f"{name}: expected a list, an array or a CPU tensor, got a tensor on {given.device}")
        return given.detach().numpy()
    try:
        return np.asarray(given)
    except ValueError:
        raise ValueError(
            f"{name}: expected a list, an array or a CPU tensor, got entries of different shapes"
        ) from None


def int_array(name: str, given: Any) -> Ints:
    """int32 ``[n]``, none negative."""
    array = as_array(name, given)
    if array.dtype.kind not in "iu" and array.size:
        raise TypeError(f"{name}: expected ints, got {array.dtype}")
    _check_vector(name, array)
    if array.size and not 0 <= array.min() <= array.max() <= LARGEST:
        raise ValueError(f"{name}: expected ints from 0 to {LARGEST}, got {array.min()} to {array.max()}")
    return array.astype(np.int32)


def bool_array(name: str, given: Any) -> Bools:
    """bool ``[n]``."""
    array = as_array(name, given)
    if array.dtype != np.bool_ and array.size:
        raise TypeError(f"{name}: expected bools, got {array.dtype}")
    _check_vector(name, array)
    return array.astype(np.bool_)


def sent(array: NDArray[Any], device: torch.device) -> Tensor:
    """An array on a device; the host does not wait."""
    return torch.from_numpy(array).to(device, non_blocking=True)


def _check_vector(name: str, array: NDArray[Any]) -> None:
    if array.ndim != 1:
        raise ValueError(f"{name}: expected one dimension, got shape {list(array.shape)}")


def check_edges(indptr: Ints, tokens: Ints, targets: Ints | None) -> None:
    """Check what is not of one array alone; every entry is known to be 0 or more."""
    states = len(indptr) - 1
    if states < 1:
        raise ValueError(f"indptr: expected at least one state, S + 1 entries, got {len(indptr)}")
    if indptr[0] != 0 or indptr[-1] != len(tokens) or (indptr[1:] < indptr[:-1]).any():
        raise ValueError(f"indptr: expected entries that ascend from 0 to the number of tokens, {len(tokens)}")
    if targets is None:
        if len(tokens) != states - 1:
            raise ValueError(f"tokens: expected one less than the {states} nodes of a tree, got {len(tokens)}")
    elif len(targets) != len(tokens):
        raise ValueError(f"targets: expected one per token, {len(tokens)}, got {len(targets)}")
    elif targets.max(initial=0) >= states:
        raise ValueError(f"targets: expected states below {states}, got {targets.max()}")


def order_by_place(indptr: Ints, tokens: Ints) -> NDArray[np.int64]:
    """The order of edges by state and place; a token twice in one state is refused."""
    places = place(torch.from_numpy(tokens)).numpy()
    states = np.repeat(np.arange(len(indptr) - 1), np.diff(indptr))
    keys = states * (int(places.max(initial=0)) + 1) + places
    order = np.argsort(keys)
    keys = keys[order]
    again = np.flatnonzero(keys[1:] == keys[:-1])
    if len(again):
        edge = order[again[0]]
        raise ValueError(f"tokens: expected distinct ones in state {states[edge]}, got {tokens[edge]} twice")
    return order


def restored_edges(*arrays: NDArray[Any] | None) -> tuple[Ints, Ints, Ints | None]:
    """``indptr``, ``tokens`` and ``targets`` as they were read, if they are in order. Not copied."""
    for array in arrays:
        if array is not None and (array.dtype != np.int32 or array.ndim != 1 or array.min(initial=0) < 0):
            raise ValueError("its edges are no int32 vectors of 0 or more")
    indptr, tokens, targets = arrays
    assert indptr is not None and tokens is not None
    check_edges(indptr, tokens, targets)
    if not _is_ordered(indptr, tokens):
        raise ValueError("its edges are not in order")
    return indptr, tokens, targets


def _is_ordered(indptr: Ints, tokens: Ints) -> bool:
    """Whether the tokens of each state strictly ascend by place."""
    begins = np.zeros(len(tokens) + 1, np.bool_)
    begins[indptr] = True
    for first in range(0, len(tokens), _CHUNK):
        chunk = tokens[max(first - 1, 0) : first + _CHUNK]
        if chunk.max() > LARGEST:
            return False
        places = place(torch.from_numpy(chunk)).numpy()
        falls = np.flatnonzero(places[1:] <= places[:-1]) + max(first - 1, 0) + 1
        if not begins[falls].all():
            return False
    return True
