"""The only error texts about arguments: ``<argument>: expected X, got Y``.

All checks read metadata only (shape, dtype, stride, device): they never synchronise, and vanish when compiled.
"""

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

LOGITS_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _dtype_names(dtypes: Sequence[torch.dtype]) -> str:
    return " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def check_tensor(name: str, value: Any) -> None:
    """``value`` is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")


def check_dtype(name: str, tensor: Tensor, *dtypes: torch.dtype) -> None:
    """``tensor`` is a tensor of one of ``dtypes``."""
    check_tensor(name, tensor)
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name}: expected {_dtype_names(dtypes)}, got {str(tensor.dtype).removeprefix('torch.')}")


def check_shape(name: str, tensor: Tensor, symbols: str, *sizes: int | None) -> None:
    """``tensor`` has ``len(sizes)`` dimensions, equal to ``sizes`` where those are not ``None``.

    ``symbols`` is how the documentation writes the shape, for example ``"[B, K]"``.
    """
    shape = tuple(tensor.shape)
    fits = len(shape) == len(sizes) and all(want is None or want == got for want, got in zip(sizes, shape, strict=True))
    if not fits:
        wanted = symbols
        if all(size is not None for size in sizes):
            wanted = f"{symbols} = {list(sizes)}"
        raise ValueError(f"{name}: expected shape {wanted}, got {list(shape)}")


def check_unit_stride(name: str, tensor: Tensor) -> None:
    """``tensor`` is dense along its last dimension."""
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(f"{name}: expected unit stride in the last dimension, got strides {tuple(tensor.stride())}")


def check_same_device(**tensors: Tensor | None) -> None:
    """All tensors given live on one device."""
    present = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    first, reference = next(iter(present.items()))
    for name, tensor in present.items():
        if tensor.device != reference.device:
            raise ValueError(
                f"{name}: expected all tensors on one device, "
                f"got {first} on {reference.device}, {name} on {tensor.device}"
            )


def check_range(name: str, value: int, low: int, high: int | None = None) -> None:
    """``value`` is an int with ``low <= value <= high``; no upper limit if ``high`` is ``None``."""
    wanted = f"an int in [{low}, {high}]" if high is not None else f"an int >= {low}"
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}: expected {wanted}, got {type(value).__name__}")
    if value < low or (high is not None and value > high):
        raise ValueError(f"{name}: expected {wanted}, got {value}")


def check_dims(name: str, tensor: Tensor, least: int) -> None:
    """``tensor`` has at least ``least`` dimensions."""
    if tensor.dim() < least:
        raise ValueError(f"{name}: expected at least {least} dimension{'s'[: least > 1]}, got {tensor.dim()}")


def check_writable(name: str, tensor: Tensor) -> None:
    """No two elements of ``tensor`` share memory by expansion."""
    if any(size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)):
        raise ValueError(f"{name}: expected a tensor without expanded dimensions, got strides {tuple(tensor.stride())}")


def check_apart(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """The address ranges of two tensors do not meet."""
    # addresses do not exist while tracing
    if torch.compiler.is_compiling() or tensor.numel() == 0 or other.numel() == 0:
        return
    if tensor.data_ptr() <= _last_byte(other) and other.data_ptr() <= _last_byte(tensor):
        raise ValueError(f"{name}: expected memory apart from {other_name}, got a tensor that overlaps it")


def check_all_apart(outs: Mapping[Tensor, str], tensors: AbstractSet[Tensor], others: str) -> None:
    """The address ranges of ``outs`` meet none of ``tensors``, and no two of them start at the same place.

    One that is itself among the ``tensors`` starts where no other does: their ranges may be interleaved.
    """
    if torch.compiler.is_compiling():
        return
    spans = {tensor: (tensor.data_ptr(), _last_byte(tensor)) for tensor in (*tensors, *outs) if tensor.numel() > 0}
    starts = Counter(first for first, _ in spans.values())
    read = sorted(spans[tensor] for tensor in tensors & spans.keys())
    furthest = list(accumulate((last for _, last in read), max))
    for out, name in outs.items():
        if out not in spans:
            continue
        first, last = spans[out]
        before = bisect_right(read, (last, math.inf)) if out not in tensors else 0  # those that start before it ends
        if starts[first] > 1 or (before > 0 and furthest[before - 1] >= first):
            raise ValueError(f"{name}: expected memory apart from {others}, got a tensor that overlaps it")


def _last_byte(tensor: Tensor) -> int:
    steps = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr() + (steps + 1) * tensor.element_size() - 1


def check_rows(
    logits: Tensor,
    vocab_size: int | None,
    bitmask: Tensor | None,
    temperature: Tensor | None,
    name: str = "logits",
) -> int:
    """Check what every operation over logits ``[R, V]`` takes, and return the vocabulary size in force."""
    check_dtype(name, logits, *LOGITS_DTYPES)
    check_shape(name, logits, "[R, V]", None, None)
    check_unit_stride(name, logits)
    rows, columns = logits.shape
    if columns == 0:
        raise ValueError(f"{name}: expected at least one column, got shape {list(logits.shape)}")
    if vocab_size is None:
        vocab_size = columns
    check_range("vocab_size", vocab_size, 1, columns)
    if bitmask is not None:
        check_dtype("bitmask", bitmask, torch.int32)
        if bitmask.dim() != 2 or bitmask.shape[0] != rows or bitmask.shape[1] < -(-vocab_size // 32):
            words = -(-vocab_size // 32)
            raise ValueError(
                f"bitmask: expected shape [R, ceil(V / 32)] = [{rows}, {words}], got {list(bitmask.shape)}"
            )
        check_unit_stride("bitmask", bitmask)
    if temperature is not None:
        check_dtype("temperature", temperature, torch.float32)
        check_shape("temperature", temperature, "[R]", rows)
    check_same_device(**{name: logits}, bitmask=bitmask, temperature=temperature)
    return vocab_size


def check_normalize(normalize: str) -> bool:
    """Whether log-probabilities are renormalised over the allowed tokens."""
    if normalize not in ("vocab", "allowed"):
        raise ValueError(f"normalize: expected 'vocab' or 'allowed', got {normalize!r}")
    return normalize == "allowed"


def check_candidates(rows: Tensor, active: Tensor | None, exclude: Tensor | None) -> None:
    """Check what says which rows ``[R, V]`` are read and which tokens are no candidates."""
    if active is not None:
        check_dtype("active", active, torch.bool)
        check_shape("active", active, "[R]", rows.shape[0])
    if exclude is not None:
        check_dtype("exclude", exclude, torch.int64)
        check_shape("exclude", exclude, "[n]", None)
    check_same_device(logits=rows, active=active, exclude=exclude)


def contiguous(tensor: Tensor | None) -> Tensor | None:
    """Small arguments reach kernels without strides; a tensor that is dense already is not copied."""
    return None if tensor is None else tensor.detach().contiguous()


def check_fraction(name: str, value: float, above_zero: bool) -> float:
    """``value`` is a number in (0, 1], or in [0, 1]."""
    wanted = f"a number in {'(' if above_zero else '['}0, 1]"
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name}: expected {wanted}, got {type(value).__name__}")
    if not 0 <= value <= 1 or (above_zero and value == 0):
        raise ValueError(f"{name}: expected {wanted}, got {value}")
    return float(value)
