"""What ``torch.compile`` asks of a step."""

from typing import Any

import torch
from torch import Tensor

from flashbeam.kernels import settled


def settle(node: Any) -> Any:
    """A nest of tuples whose tensors a compiler computes here: see ``flashbeam.kernels.settled``."""
    if not torch.compiler.is_compiling():
        return node
    tensors: list[Tensor] = []
    _gather(node, tensors)
    return _put_back(node, iter(settled(tensors)))


def _gather(node: Any, into: list[Tensor]) -> None:
    if isinstance(node, Tensor):
        into.append(node)
    elif isinstance(node, tuple):
        for child in node:
            _gather(child, into)


def _put_back(node: Any, tensors: Any) -> Any:
    if isinstance(node, Tensor):
        return next(tensors)
    if not isinstance(node, tuple):
        return node
    children = [_put_back(child, tensors) for child in node]
    return type(node)(*children) if hasattr(node, "_fields") else tuple(children)
