"""Caches of any shape follow their beams."""

from __future__ import annotations

import copy
import dataclasses
import enum
import numbers
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

from flashbeam.kernels import check_all_apart, check_reorder
from flashbeam.kernels import reorder as reorder_rows

Nest = TypeVar("Nest")
_PLAIN = (type(None), str, bytes, numbers.Number, enum.Enum, torch.dtype, torch.device)


def _children(node: Any, path: str) -> list[tuple[str, Any]] | None:
    """``(path, child)`` of a container in order, or ``None`` for a tensor or a plain value."""
    if isinstance(node, (Tensor, *_PLAIN)):
        return None
    # before dict: the outputs of some libraries are both
    if dataclasses.is_dataclass(node) and not isinstance(node, type):
        return [(f"{path}.{field.name}", getattr(node, field.name)) for field in dataclasses.fields(node)]
    if isinstance(node, dict):
        return [(f"{path}[{key!r}]", child) for key, child in node.items()]
    if isinstance(node, tuple) and hasattr(node, "_fields"):
        return [(f"{path}.{name}", child) for name, child in zip(node._fields, node, strict=True)]
    if isinstance(node, (tuple, list)):
        return [(f"{path}[{i}]", child) for i, child in enumerate(node)]
    raise TypeError(
        f"{path}: expected a tensor, tuple, list, dict, NamedTuple, dataclass or plain value, got {type(node).__name__}"
    )


def leaves_of(node: Any, path: str) -> Iterator[tuple[str, Any]]:
    children = _children(node, path)
    if children is None:
        yield path, node
    else:
        for child_path, child in children:
            yield from leaves_of(child, child_path)


def rebuild(node: Any, leaves: Iterator[Any]) -> Any:
    """``node`` with its leaves, in the order of :func:`leaves_of`, replaced."""
    children = _children(node, "")
    if children is None:
        return next(leaves)
    values = [rebuild(child, leaves) for _, child in children]
    if dataclasses.is_dataclass(node) and not isinstance(node, type):
        fields = dict(zip(dataclasses.fields(node), values, strict=True))
        instance = dataclasses.replace(node, **{field.name: value for field, value in fields.items() if field.init})
        for field, value in fields.items():
            if not field.init:
                object.__setattr__(instance, field.name, value)  # frozen instances too
        return instance
    if isinstance(node, dict):
        # a subclass keeps its attributes; torch.compile cannot trace the copy of a plain dict
        mapping: dict[Any, Any] = {} if type(node) is dict else copy.copy(node)
        mapping.update(zip(node, values, strict=True))
        return mapping
    if isinstance(node, tuple) and hasattr(node, "_fields"):
        return type(node)(*values)
    return type(node)(values)


def _paired(node: Any, out: Any, path: str) -> Iterator[tuple[str, Any]]:
    """``(path, leaf of out)`` in the order of ``node``'s leaves, having checked that the structures agree."""
    children = _children(node, path)
    tensors = isinstance(node, Tensor), isinstance(out, Tensor)
    if tensors[0] != tensors[1] or (children is not None and type(out) is not type(node)):
        wanted = "a tensor" if tensors[0] else type(node).__name__
        raise ValueError(f"{path}: expected {wanted} as in cache, got {type(out).__name__}")
    if children is None:
        yield path, out
        return
    entries = dict(_children(out, path) or ())
    if len(entries) != len(children):
        raise ValueError(f"{path}: expected {len(children)} entries as in cache, got {len(entries)}")
    for child_path, child in children:
        if child_path not in entries:
            raise ValueError(f"{child_path}: expected an entry as in cache, got none")
        yield from _paired(child, entries[child_path], child_path)


def _check_ownership(leaves: list[tuple[str, Any]], buffers: list[tuple[str, Any]]) -> None:
    """No buffer is the result of two tensors, or a tensor of the cache at another place."""
    owner = {leaf: leaf for _, leaf in leaves if isinstance(leaf, Tensor)}  # a tensor is equal to itself alone
    for (_, leaf), (path, buffer) in zip(leaves, buffers, strict=True):
        if isinstance(leaf, Tensor) and owner.setdefault(buffer, leaf) is not leaf:
            raise ValueError(f"{path}: expected a buffer of its own, got one that belongs to another tensor")


def reorder(
    cache: Nest, source_rows: Tensor, *, dim: int = 0, out: Nest | None = None, group_size: int | None = None
) -> Nest:
    """Gather the rows of every tensor of a nest, so that a cache follows its beams.

    Equivalent, for every tensor ``x`` of the nest, to::

        x.index_select(dim, source_rows)

    Args:
        cache: a tensor, or any nest of tuples, lists, dicts, NamedTuples and dataclasses of tensors; plain values
            (``None``, numbers, strings, enums, dtypes, devices) are passed through. Every tensor has rows at ``dim``
            and may have any real dtype and any strides. A tensor that appears twice is reordered once. Not modified,
            unless it is ``out``.
        source_rows: ``[R_out]`` int64 or int32, on the tensors' device, such as ``step.source_rows``. Not modified.
        dim: where the rows are, counted from the end if negative.
        out: a nest of ``cache``'s structure, types included, whose tensors are the buffers to write, each of its
            result's shape and dtype; they share no memory with ``cache``. Or ``cache`` itself, or any of its tensors
            at their own places, which are then reordered in place.
        group_size: a promise about ``source_rows``, used in place: no row leaves its group of ``group_size``
            consecutive rows, as the K beams of a request do not after the first step. It halves the traffic and needs
            no temporary.

    Returns:
        A nest of ``cache``'s structure and types that holds the results, which are the tensors of ``out`` if given.

    Raises:
        ValueError: shapes, devices, strides or structures differ from the above. Nothing has been written then.
        TypeError: a dtype or type differs from the above. Nothing has been written then.
    """
    return gather_rows(cache, source_rows, dim, out, group_size, "out")


def gather_rows(
    cache: Nest, source_rows: Tensor, dim: int, out: Nest | None, group_size: int | None, out_name: str
) -> Nest:
    """:func:`reorder`, which calls ``out`` by the name given."""
    leaves = list(leaves_of(cache, "cache"))
    buffers: list[tuple[str, Any]] = [("", None)] * len(leaves)
    if out is not None:
        buffers = list(_paired(cache, out, out_name))
        _check_ownership(leaves, buffers)
    for (path, leaf), (out_path, buffer) in zip(leaves, buffers, strict=True):
        if isinstance(leaf, Tensor):
            check_reorder(leaf, source_rows, dim, buffer, group_size, path, out_path)
    if out is not None:
        outs = {buffer: path for path, buffer in buffers if isinstance(buffer, Tensor)}
        check_all_apart(outs, {leaf for _, leaf in leaves if isinstance(leaf, Tensor)}, "all others of cache and out")

    done: dict[tuple[Tensor, Tensor | None], Tensor] = {}  # by tensor: a compiled step would be bound to their ids
    results: list[Any] = []
    for (_, leaf), (_, buffer) in zip(leaves, buffers, strict=True):
        result = leaf
        if isinstance(leaf, Tensor):
            key = leaf, buffer
            if key not in done:
                done[key] = reorder_rows(leaf, source_rows, dim=dim, out=buffer, group_size=group_size)
            result = done[key]
        results.append(result)
    rebuilt: Nest = rebuild(cache, iter(results))
    return rebuilt
