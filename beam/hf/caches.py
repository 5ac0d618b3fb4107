"""Every state that a model carries from token to token follows its beam, or the search is refused.

A cache whose state silently stays behind gives wrong log-probabilities and no error, so nothing is taken on trust: when
the rows of the prompt fan out into beams, whatever still has the prompt's rows did not follow.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from flashbeam.kernels import reorder as reorder_rows

from ..cache import reorder

NAMES = ("cache", "past_key_values", "cache_params", "state", "mems", "past_buckets_states")
_ADVICE = "pass use_cache=False"
_DEPTH = 6  # of containers inside a cache: encoder-decoder, layers, layer, states by number, pairs
_WRONG = {"RwkvForCausalLM": "passes over several rows with a state differ from those without, by its own code"}
_ALIKE = {"rope_deltas"}  # kept in modules, the same for all beams of a request; repeated by the model


def cache_name(model_kwargs: dict[str, Any]) -> str | None:
    """Under which name the model takes its cache, if there is one."""
    return next((name for name in NAMES if model_kwargs.get(name) is not None), None)


def _layers(cache: Any) -> list[Any]:
    parts = [getattr(cache, name, None) for name in ("self_attention_cache", "cross_attention_cache")]
    return [layer for part in (cache, *parts) for layer in getattr(part, "layers", ())]


def rows_held(cache: Any) -> int | None:
    """Rows of a cache that a prompt is to continue; ``None`` if it holds no token."""
    for layer in _layers(cache):
        keys = getattr(layer, "keys", None)
        if isinstance(keys, Tensor) and keys.dim() > 1 and int(layer.get_seq_length()) > 0:
            return keys.shape[0]
    return None


def make_room(cache: Any, rows: int) -> None:
    """Let the layers of a cache without tokens begin anew, if they were made for other than ``rows``."""
    for layer in _layers(cache):
        keys = getattr(layer, "keys", None)
        if isinstance(keys, Tensor) and keys.dim() > 1 and keys.shape[0] != rows:
            layer.keys = layer.values = None
            layer.is_initialized = False


def check_cache(model: Any, cache: Any) -> None:
    """Refuse a cache that is known not to follow its beams.

    Raises:
        TypeError: it cannot be reordered.
    """
    name = type(model).__name__
    for layer in getattr(cache, "layers", ()):
        if hasattr(layer, "nbits") and not hasattr(layer, "_pending_beam_idx"):  # transformers < 5.21
            raise TypeError(
                f"cache: expected one that can be reordered, got {type(layer).__name__}: this version of transformers "
                "reorders what is not yet quantized and nothing else"
            )
    if name in _WRONG:
        raise TypeError(f"cache: expected one that can be trusted, got that of {name}: {_WRONG[name]}; {_ADVICE}")
    known = hasattr(model, "_reorder_cache") or hasattr(cache, "reorder_cache")
    if not known and not isinstance(cache, (tuple, list, dict)):
        raise TypeError(
            f"cache: expected one that can be reordered, got {type(cache).__name__} of {name}, which has no "
            f"reorder_cache; {_ADVICE}"
        )


def states_of_modules(model: Any, rows: int) -> dict[tuple[int, str], tuple[Tensor, str]]:
    """Tensors that modules keep as attributes, with ``rows`` rows: where, and which with a name for messages."""
    return {
        (id(module), name): (value, f"{type(module).__name__}.{name}")
        for module in model.modules()
        for name, value in vars(module).items()
        if isinstance(value, Tensor) and value.dim() > 1 and value.shape[0] == rows and name not in _ALIKE
    }


def check_modules(model: Any, before: dict[tuple[int, str], tuple[Tensor, str]], rows: int) -> None:
    """Refuse a model that has kept something of the prompt's ``rows`` in its modules, where it cannot follow.

    Raises:
        TypeError: it has.
    """
    for place, (tensor, name) in states_of_modules(model, rows).items():
        if before.get(place, (None, ""))[0] is not tensor:
            raise TypeError(
                f"model: expected one whose states are in its cache, got {type(model).__name__}, which keeps {name}; "
                f"{_ADVICE}"
            )


def fan_out(model: Any, cache: Any, rows: Tensor, before: int) -> Any:
    """The cache of ``rows [B * K]`` of the prompt's ``before`` rows.

    Returns the cache, the same object where the library's caches are: they are changed in place.

    Raises:
        TypeError: part of it did not follow.
    """
    cache = _gather(model, cache, rows, cross=True)
    if hasattr(model, "_reorder_cache"):  # in a layout of its own
        return cache
    for path, tensor in _tensors(cache, "cache", _DEPTH):
        if tensor.dim() > 1 and tensor.shape[0] == before != rows.shape[0]:
            raise TypeError(
                f"{path}: expected a state that follows the beams in {type(model).__name__}, got one that "
                f"{type(cache).__name__} leaves at {before} rows of {rows.shape[0]}; {_ADVICE}"
            )
    return cache


def follow(model: Any, cache: Any, rows: Tensor, beams: int) -> Any:
    """The cache of the beams, ``beams`` to a request, that continue ``rows [B * K]``; what they share stays."""
    return _gather(model, cache, rows, cross=False, beams=beams)


def _gather(model: Any, cache: Any, rows: Tensor, cross: bool, beams: int | None = None) -> Any:
    if hasattr(model, "_reorder_cache"):  # as transformers does: it knows the model's own layout
        return model._reorder_cache(cache, rows)
    if hasattr(cache, "self_attention_cache"):
        _gather(model, cache.self_attention_cache, rows, cross, beams)
        if cross:  # keys and values of the encoder's states are the same for all beams of a request
            _gather(model, cache.cross_attention_cache, rows, cross)
    elif hasattr(cache, "layers"):
        for layer in cache.layers:
            _gather_layer(layer, rows, beams)
    elif hasattr(cache, "reorder_cache"):
        cache.reorder_cache(rows)
    else:
        return reorder(cache, rows)
    return cache


def _gather_layer(layer: Any, rows: Tensor, beams: int | None) -> None:
    if (
        beams is not None
        and type(layer).__name__ in ("StaticLayer", "StaticSlidingWindowLayer")  # keys and values are all it holds
        and layer.is_initialized
        and layer.keys.device == rows.device
    ):
        for tensor in (layer.keys, layer.values):  # where it is: its address may be known to a captured graph
            reorder_rows(tensor, rows, out=tensor, group_size=beams)
        return
    layer.reorder_cache(rows)
    if beams is None:  # fanned out
        for name in ("batch_size", "max_batch_size"):
            if isinstance(vars(layer).get(name), int):
                setattr(layer, name, rows.shape[0])


def _tensors(node: Any, path: str, depth: int) -> Iterator[tuple[str, Tensor]]:
    """``(path, tensor)`` of all tensors of a cache; not of those whose reordering is still to come."""
    if isinstance(node, Tensor):
        yield path, node
    elif depth == 0 or isinstance(node, (str, bytes)) or getattr(node, "_pending_beam_idx", None) is not None:
        return
    elif isinstance(node, dict):
        for key, child in node.items():
            yield from _tensors(child, f"{path}[{key!r}]", depth - 1)
    elif isinstance(node, (list, tuple)):
        for i, child in enumerate(node):
            yield from _tensors(child, f"{path}[{i}]", depth - 1)
    elif type(node).__module__.partition(".")[0] not in ("builtins", "torch") and hasattr(node, "__dict__"):
        for name, child in vars(node).items():
            yield from _tensors(child, f"{path}.{name}", depth - 1)
