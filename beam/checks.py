"""What a step is given, checked from metadata only and brought into one shape."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from .arguments import PerRequest, whole_number

if TYPE_CHECKING:
    from .state import State


def as_rows(
    state: "State", logits: Tensor, vocab_size: int | None, eos_ids: list[int], name: str = "logits"
) -> tuple[Tensor, int]:
    """Logits as rows ``[R, V]`` without gradient, and the vocabulary size in force."""
    if not isinstance(logits, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(logits).__name__}")
    batch, beams = state.batch_size, state.beam_size
    first = state.vocab_size is None
    shapes = [(batch * beams,), (batch, beams)] + ([(batch,), (batch, 1)] if first else [])
    columns = logits.shape[-1] if logits.dim() else 0
    wanted = columns if first else state.vocab_size
    if tuple(logits.shape[:-1]) not in shapes or columns != wanted or columns == 0:
        v = "V" if first else str(state.vocab_size)
        choice = f"[{batch * beams}, {v}] or [{batch}, {beams}, {v}]" + (f" or [{batch}, {v}]" if first else "")
        raise ValueError(f"{name}: expected shape {choice}, got {list(logits.shape)}")
    if logits.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise TypeError(
            f"{name}: expected float32, float16 or bfloat16, got {str(logits.dtype).removeprefix('torch.')}"
        )
    if logits.device != state.device:
        raise ValueError(f"{name}: expected a tensor on {state.device}, got one on {logits.device}")
    if vocab_size is None:
        vocab_size = columns
    if vocab_size > columns:
        raise ValueError(f"vocab_size: expected at most the columns of {name}, {columns}, got {vocab_size}")
    if first:
        for argument, token in [("pad_id", state.pad_id), *(("eos_id", token) for token in eos_ids)]:
            if token >= vocab_size:
                raise ValueError(f"{argument}: expected an id inside the vocabulary of {vocab_size}, got {token}")
    if columns > 1 and logits.stride(-1) != 1:
        raise ValueError(f"{name}: expected unit stride in the last dimension, got strides {logits.stride()}")
    return logits.detach().flatten(0, -2), vocab_size


def as_bitmask(state: "State", bitmask: Tensor, rows: int, vocab_size: int, name: str = "bitmask") -> Tensor:
    """A bitmask with one row per row of logits."""
    if not isinstance(bitmask, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(bitmask).__name__}")
    if bitmask.dtype != torch.int32:
        raise TypeError(f"{name}: expected int32, got {str(bitmask.dtype).removeprefix('torch.')}")
    if bitmask.device != state.device:
        raise ValueError(f"{name}: expected a tensor on {state.device}, got one on {bitmask.device}")
    batch, words = state.batch_size, -(-vocab_size // 32)
    shapes = {(rows,), (batch, rows // batch), (batch,)}
    if tuple(bitmask.shape[:-1]) not in shapes or bitmask.shape[-1] < words:
        choice = " or ".join(str([*shape, words]) for shape in sorted(shapes, reverse=True))
        raise ValueError(f"{name}: expected shape {choice}, got {list(bitmask.shape)}")
    if words > 1 and bitmask.stride(-1) != 1:
        raise ValueError(f"{name}: expected unit stride in the last dimension, got strides {bitmask.stride()}")
    flat = bitmask.detach().flatten(0, -2)[:, :words]
    return flat if flat.shape[0] == rows else flat.repeat_interleave(rows // batch, 0)


def as_attention(state: "State", attention: Tensor, rows: int) -> Tensor:
    """Attention to the source with one row per row of logits, ``[R, S]``, without gradient."""
    if not isinstance(attention, Tensor):
        raise TypeError(f"attention: expected a tensor, got {type(attention).__name__}")
    batch, size = state.batch_size, state.source_size
    wanted = attention.shape[-1] if size is None and attention.dim() else size
    if tuple(attention.shape) not in {(rows, wanted), (batch, rows // batch, wanted)} or not wanted:
        s = "S" if size is None else str(size)
        choice = f"[{rows}, {s}] or [{batch}, {rows // batch}, {s}]"
        raise ValueError(f"attention: expected shape {choice}, got {list(attention.shape)}")
    if attention.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        kind = str(attention.dtype).removeprefix("torch.")
        raise TypeError(f"attention: expected float32, float16 or bfloat16, got {kind}")
    if attention.device != state.device:
        raise ValueError(f"attention: expected a tensor on {state.device}, got one on {attention.device}")
    return attention.detach().flatten(0, -2)


def as_per_row(
    state: "State", given: Tensor, rows: int, name: str, dtypes: tuple[torch.dtype, ...], columns: int | None = None
) -> Tensor:
    """``[rows]`` or ``[rows, columns]`` of what is given per row or per request."""
    if not isinstance(given, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(given).__name__}")
    if given.dtype not in dtypes:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name}: expected {wanted}, got {str(given.dtype).removeprefix('torch.')}")
    if given.device != state.device:
        raise ValueError(f"{name}: expected a tensor on {state.device}, got one on {given.device}")
    batch, tail = state.batch_size, () if columns is None else (columns,)
    leads = dict.fromkeys([(rows,), (batch, rows // batch), (batch,)])
    if tuple(given.shape) not in [(*lead, *tail) for lead in leads]:
        choice = " or ".join(str([*lead, *tail]) for lead in leads)
        raise ValueError(f"{name}: expected shape {choice}, got {list(given.shape)}")
    flat = given.detach().reshape(-1, *tail)
    return flat if flat.shape[0] == rows else flat.repeat_interleave(rows // batch, 0)


def as_bools(state: "State", given: Tensor, rows: int, name: str, columns: int | None = None) -> Tensor:
    """bool ``[rows]`` or ``[rows, columns]``, on the search's device."""
    shape = [rows] if columns is None else [rows, columns]
    if not isinstance(given, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(given).__name__}")
    if given.dtype != torch.bool:
        raise TypeError(f"{name}: expected bool, got {str(given.dtype).removeprefix('torch.')}")
    if list(given.shape) != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {list(given.shape)}")
    if given.device != state.device:
        raise ValueError(f"{name}: expected a tensor on {state.device}, got one on {given.device}")
    return given


def as_request_ids(given: Tensor | Sequence[int] | None, batch_size: int, device: torch.device) -> Tensor:
    """int64 ``[B]`` on the device."""
    if given is None:
        return torch.arange(batch_size, device=device)
    if isinstance(given, str) or not isinstance(given, (Tensor, Sequence, np.ndarray)):
        raise TypeError(f"request_ids: expected an int64 tensor or a list of ints, got {type(given).__name__}")
    if not isinstance(given, Tensor):
        given = torch.as_tensor(given)
    if given.dtype != torch.int64:
        raise TypeError(f"request_ids: expected int64, got {str(given.dtype).removeprefix('torch.')}")
    if tuple(given.shape) != (batch_size,):
        raise ValueError(f"request_ids: expected shape [{batch_size}], got {list(given.shape)}")
    return given.to(device, non_blocking=True).clone()


def as_source_lengths(given: Tensor | Sequence[int] | None, batch_size: int) -> list[int] | None:
    """Ints of at least 0, on the host."""
    if given is None:
        return None
    lengths = PerRequest("source_lengths", given, whole_number(0))
    if lengths.shared:
        raise TypeError(f"source_lengths: expected a list or a CPU tensor of ints, got {type(given).__name__}")
    return lengths.of_batch(batch_size)
