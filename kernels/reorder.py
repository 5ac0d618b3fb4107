"""Rows of a tensor in a new order: how a cache follows its beams.

    out[..., i, ...] = x[..., source_rows[i], ...]          the index stands at dimension ``dim``

Bytes are moved, 16 at a time where strides and addresses allow, so any dtype goes through one kernel. A program owns a
block of columns of some rows. In place it owns the same columns of every row of a *group*, inside which rows are
promised to stay: it loads the gathered block, waits for its threads, and stores it, so no other program can see a
half-moved row. Without such a promise the moved rows pass through a temporary.

Traffic: 2 bytes per byte of the result; in place, rows that stay where they are cost nothing, and moved rows cost
2 bytes per byte with a group size and 4 without.
"""

import torch
from torch import Tensor

from .checks import (
    check_apart,
    check_dims,
    check_dtype,
    check_range,
    check_same_device,
    check_shape,
    check_tensor,
    check_writable,
)
from .registration import register

_MAX_DIMS = 64  # of a tensor, in torch
_INT_OF_SIZE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _integers(x: Tensor) -> Tensor:
    """``x`` as integers of the same width: torch's own gathers do not know every dtype."""
    return x.view(_INT_OF_SIZE[x.element_size()])


def _source(x: Tensor, source_rows: Tensor, dim: int) -> Tensor:
    return source_rows.clamp(0, x.shape[dim] - 1)  # the kernels clamp too: nothing is read out of bounds


def _reorder(x: Tensor, source_rows: Tensor, dim: int) -> Tensor:
    """The torch definition."""
    return _integers(x).index_select(dim, _source(x, source_rows, dim)).view(x.dtype)


def _reorder_fake(x: Tensor, source_rows: Tensor, dim: int) -> Tensor:
    return x.new_empty((*x.shape[:dim], source_rows.shape[0], *x.shape[dim + 1 :]))


def _reorder_out(x: Tensor, source_rows: Tensor, dim: int, out: Tensor) -> None:
    """The torch definition."""
    torch.index_select(_integers(x), dim, _source(x, source_rows, dim), out=_integers(out))


def _reorder_out_fake(x: Tensor, source_rows: Tensor, dim: int, out: Tensor) -> None:
    return None


def _reorder_inplace(x: Tensor, source_rows: Tensor, dim: int, group_size: int | None) -> None:
    """The torch definition: rows that move, and only they, pass through a temporary."""
    source = _source(x, source_rows, dim)
    moved = (source != torch.arange(x.shape[dim], device=x.device)).nonzero().squeeze(1)
    x = _integers(x)
    x.index_copy_(dim, moved, x.index_select(dim, source[moved]))


def _reorder_inplace_fake(x: Tensor, source_rows: Tensor, dim: int, group_size: int | None) -> None:
    return None


_reorder_op = register("reorder(Tensor x, Tensor source_rows, int dim) -> Tensor", _reorder, _reorder_fake, "reorder")
_reorder_out_op = register(
    "reorder_out(Tensor x, Tensor source_rows, int dim, Tensor(a!) out) -> ()",
    _reorder_out,
    _reorder_out_fake,
    "reorder",
)
_reorder_inplace_op = register(
    "reorder_(Tensor(a!) x, Tensor source_rows, int dim, SymInt? group_size) -> ()",
    _reorder_inplace,
    _reorder_inplace_fake,
    "reorder",
)


def check_reorder(
    x: Tensor,
    source_rows: Tensor,
    dim: int,
    out: Tensor | None,
    group_size: int | None,
    name: str = "x",
    out_name: str = "out",
) -> None:
    """Check the arguments of :func:`reorder`, under the names given."""
    check_tensor(name, x)
    if x.is_complex():
        raise TypeError(f"{name}: expected a real dtype, got {str(x.dtype).removeprefix('torch.')}")
    check_range("dim", dim, -_MAX_DIMS, _MAX_DIMS - 1)
    check_dims(name, x, max(dim + 1, -dim))
    dim %= x.dim()
    rows = x.shape[dim]
    check_dtype("source_rows", source_rows, torch.int64, torch.int32)
    check_shape("source_rows", source_rows, "[R_out]", rows if out is x else None)
    check_same_device(**{name: x, "source_rows": source_rows})
    if rows == 0 and source_rows.shape[0] > 0:
        raise ValueError(f"{name}: expected at least 1 row at dimension {dim}, got 0")
    if group_size is not None:
        check_range("group_size", group_size, 1)
        if rows % group_size:
            raise ValueError(f"group_size: expected a divisor of {rows}, the rows of {name}, got {group_size}")
    if out is not None:
        check_dtype(out_name, out, x.dtype)
        shape = (*x.shape[:dim], source_rows.shape[0], *x.shape[dim + 1 :])
        check_shape(out_name, out, f"of {name} with R_out rows", *shape)
        check_writable(out_name, out)
        check_same_device(**{name: x, out_name: out})
        if out is not x:
            check_apart(out_name, out, name, x)


def reorder(
    x: Tensor, source_rows: Tensor, *, dim: int = 0, out: Tensor | None = None, group_size: int | None = None
) -> Tensor:
    """Gather rows along ``dim``.

    Equivalent to::

        x.index_select(dim, source_rows.clamp(0, x.shape[dim] - 1))

    except that ``out`` may be ``x`` itself.

    Args:
        x: ``[..., R, ...]`` of any real dtype, any strides; ``R`` rows at ``dim``. Not modified, unless it is ``out``.
        source_rows: ``[R_out]`` int64 or int32, any stride; may repeat and leave out rows. Values outside ``[0, R)``
            are clamped. Not modified.
        dim: where the rows are, counted from the end if negative.
        out: the buffer to write, of the result's shape and ``x``'s dtype, any strides without overlap. Either ``x``
            itself (then ``R_out = R``), or a tensor whose address range does not meet that of ``x``. Modified.
        group_size: a promise about ``source_rows``, used only in place: ``i`` and ``source_rows[i]`` lie in the same
            group of ``group_size`` consecutive rows, as the K beams of one request do. It halves the traffic and
            needs no temporary. If the promise is broken, the values of the rows concerned are undefined.

    Returns:
        ``out``, or a new contiguous tensor: ``x`` with ``R_out`` rows at ``dim``.

    Raises:
        ValueError: shapes, devices or strides differ from the above, ``out`` overlaps ``x``, or ``group_size`` does not
            divide ``R``.
        TypeError: a dtype or type differs from the above.
    """
    check_reorder(x, source_rows, dim, out, group_size)
    dim %= x.dim()
    if out is None:
        return _reorder_op(x.detach(), source_rows, dim)
    if out is x:
        _reorder_inplace_op(x.detach(), source_rows, dim, group_size)
    else:
        _reorder_out_op(x.detach(), source_rows, dim, out.detach())
    return out
