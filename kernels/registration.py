"""How an operation of this package reaches the dispatcher: one definition, one rule.

The tensor's device chooses. CPU runs the torch definition; CUDA runs the Triton launcher of the same name in
``flashbeam.kernels.triton``; any other device, and CUDA without triton, runs the torch definition with one warning.
"""

import functools
import importlib
import importlib.util
import warnings
from collections.abc import Callable
from typing import Any

import torch

_library = torch.library.Library("flashbeam", "DEF")


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _warn_once(reason: str) -> None:
    warnings.warn(
        f"flashbeam: {reason}, so its operations run their torch definitions: same results, slower", stacklevel=3
    )


def register(schema: str, definition: Callable[..., Any], fake: Callable[..., Any], module: str) -> Callable[..., Any]:
    """Define ``flashbeam::<schema>`` and return its overload.

    Args:
        schema: the torch schema, without namespace. Its name is also the launcher's: ``launch_<name>``.
        definition: the torch definition, called for CPU tensors.
        fake: shapes, dtypes and strides of the outputs, for tracing.
        module: the module of ``flashbeam.kernels.triton`` that holds the launcher.
    """
    name = schema.partition("(")[0]

    @functools.cache
    def launcher() -> Callable[..., Any]:
        # imported at the first launch: triton takes a second to import and is not there on every machine
        function: Callable[..., Any] = getattr(
            importlib.import_module(f"{__package__}.triton.{module}"), f"launch_{name}"
        )
        return function

    def on_cuda(*args: Any) -> Any:
        if not _has_triton():
            _warn_once("triton is not installed")
            return definition(*args)
        tensor = next(arg for arg in args if isinstance(arg, torch.Tensor))
        with torch.cuda.device(tensor.device):  # the tensors' device need not be the current one
            return launcher()(*args)

    def elsewhere(*args: Any) -> Any:
        tensor = next(arg for arg in args if isinstance(arg, torch.Tensor))
        _warn_once(f"there are no kernels for device type {tensor.device.type!r}")
        return definition(*args)

    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, definition, "CPU")
    _library.impl(name, on_cuda, "CUDA")
    _library.impl(name, elsewhere, "CompositeExplicitAutograd")
    torch.library.register_fake(f"flashbeam::{name}", fake, lib=_library)
    overload: Callable[..., Any] = getattr(torch.ops.flashbeam, name).default
    return overload


def register_plain(schema: str, definition: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """Define ``flashbeam::<schema>``, which has no kernel: the torch definition runs on every device."""
    name = schema.partition("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, definition, "CompositeExplicitAutograd")
    torch.library.register_fake(f"flashbeam::{name}", fake, lib=_library)
    overload: Callable[..., Any] = getattr(torch.ops.flashbeam, name).default
    return overload
