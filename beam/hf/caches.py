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
_DEPTH = 6  # of containers inside a cache: encoder-decoder, layers, layer, states by number, pairs


def cache_name(model_kwargs: dict[str, Any]) -> str | None:
    """Under which name the model takes its cache, if there is one."""
    return next((name for name in NAMES if model_kwargs.get(name) is not None), None)


def fan_out(model: Any, cache: Any, rows: Tensor, before: int) -> Any:
    """The cache of ``rows [B * K]`` of the prompt's ``before`` rows.

    Returns the cache, the same object where the library's caches are: they are changed in place.

    Raises:
        TypeError: the cache cannot be reordered, or part of it did not follow.
    """
    _refuse_by_name(model, cache)
    cache = _gather(model, cache, rows, cross=True)
    after = rows.shape[0]
    if after != before:
        for path, tensor in _tensors(cache, "cache", _DEPTH):
            if tensor.dim() > 1 and tensor.shape[0] == before:
                raise TypeError(
                    f"{path}: expected a state that follows the beams in {type(model).__name__}, got one that "
                    f"{type(cache).__name__} leaves at {before} rows of {after}; pass use_cache=False"
                )
    return cache


def follow(model: Any, cache: Any, rows: Tensor, beams: int) -> Any:
    """The cache of the beams, ``beams`` to a request, that continue ``rows [B * K]``; what they share stays."""
    return _gather(model, cache, rows, cross=False, beams=beams)


def _refuse_by_name(model: Any, cache: Any) -> None:
    """What is known not to follow without a trace."""
    for layer in getattr(cache, "layers", ()):
        if hasattr(layer, "nbits") and not hasattr(layer, "_pending_beam_idx"):  # transformers < 5.21
            raise TypeError(
                f"cache: expected one that can be reordered, got {type(layer).__name__}: this version of transformers "
                "reorders what is not yet quantized and nothing else"
            )
    known = hasattr(model, "_reorder_cache") or hasattr(cache, "reorder_cache")
    if not known and not isinstance(cache, (tuple, list, dict)):
        raise TypeError(
            f"cache: expected one that can be reordered, got {type(cache).__name__} of {type(model).__name__}, which "
            "has no reorder_cache; pass use_cache=False"
        )


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
    keys = getattr(layer, "keys", None)
    static = getattr(layer, "max_cache_len", None) is not None and isinstance(keys, Tensor)
    if static and beams is not None and keys.device == rows.device and _plain(layer):
        for tensor in (layer.keys, layer.values):  # where it is: its address may be known to a captured graph
            reorder_rows(tensor, rows, out=tensor, group_size=beams)
        return
    layer.reorder_cache(rows)
    for name in ("batch_size", "max_batch_size"):
        if isinstance(vars(layer).get(name), int):
            setattr(layer, name, rows.shape[0])


def _plain(layer: Any) -> bool:
    """Whether keys and values are all that it holds."""
    return type(layer).__name__ in ("StaticLayer", "StaticSlidingWindowLayer")


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
