"""Triton: gather rows, also in place."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

_GATHER_BYTES = 8192  # a program's block: 4 loads of 16 bytes a thread
_GROUP_BYTES = 16384  # in place: the block holds whole groups
_MAX_GROUP = 256  # above, a row's share of the block is no longer worth a memory transaction: use a temporary
_MAX_BLOCK_ROWS = 256  # their indices take registers
_OUTER_DIMS = 3  # dimensions beside the rows and the contiguous run, after merging


@triton.jit
def _reorder_kernel(
    x_ptr,  # *u8
    rows_ptr,  # *i64 or *i32 [R_out]
    out_ptr,  # *u8
    # sizes; the dimension of the rows counts groups
    n_items,  # size0 * size1 * size2 * size3
    size1,
    size2,
    size3,
    run,  # length of the contiguous run, in accesses
    n_rows,  # of x
    # strides, in accesses; 0 at the dimension of the rows
    stride_x0,
    stride_x1,
    stride_x2,
    stride_x3,
    stride_x_row,
    stride_out0,
    stride_out1,
    stride_out2,
    stride_out3,
    stride_out_row,
    stride_rows,
    # meta-parameters
    ROW_DIM: tl.constexpr,
    UNIT: tl.constexpr,  # integer type that is loaded
    VEC: tl.constexpr,  # units an access
    GROUP: tl.constexpr,  # rows a group
    GROUP_BLOCK: tl.constexpr,  # GROUP rounded up to a power of two
    BLOCK_GROUPS: tl.constexpr,
    BLOCK_RUN: tl.constexpr,  # units
    IN_PLACE: tl.constexpr,  # out_ptr == x_ptr, and no row leaves its group
    SKIP: tl.constexpr,  # leave out the rows whose source is themselves
    COPY_BACK: tl.constexpr,  # x holds the rows already in their new places
):
    n_blocks = tl.cdiv(run * VEC, BLOCK_RUN)
    # int64: a cache exceeds 2**31 bytes
    pid = tl.program_id(0).to(tl.int64)
    cols = (pid % n_blocks) * BLOCK_RUN + tl.arange(0, BLOCK_RUN)

    lane = tl.arange(0, BLOCK_GROUPS * GROUP_BLOCK)
    item = (pid // n_blocks) * BLOCK_GROUPS + lane // GROUP_BLOCK
    member = lane % GROUP_BLOCK
    live = (item < n_items) & (member < GROUP)
    i3 = item % size3
    i2 = item // size3 % size2
    i1 = item // size3 // size2 % size1
    i0 = item // size3 // size2 // size1
    row = i0
    if ROW_DIM == 1:
        row = i1
    if ROW_DIM == 2:
        row = i2
    if ROW_DIM == 3:
        row = i3
    row = row * GROUP + member

    source = tl.load(rows_ptr + row * stride_rows, mask=live, other=0).to(tl.int64)
    source = tl.minimum(tl.maximum(source, 0), n_rows - 1)
    if SKIP:
        live = live & (source != row)
    if COPY_BACK:
        source = row
    offset_x = i0 * stride_x0 + i1 * stride_x1 + i2 * stride_x2 + i3 * stride_x3 + source * stride_x_row
    offset_out = i0 * stride_out0 + i1 * stride_out1 + i2 * stride_out2 + i3 * stride_out3 + row * stride_out_row
    # the factor VEC tells the compiler that whole accesses are aligned and masked as one
    offset_x, offset_out = offset_x * VEC, offset_out * VEC
    mask = live[:, None] & (cols < run * VEC)[None, :]

    x_ptr = x_ptr.to(tl.pointer_type(UNIT), bitcast=True)
    out_ptr = out_ptr.to(tl.pointer_type(UNIT), bitcast=True)
    block = tl.load(x_ptr + offset_x[:, None] + cols[None, :], mask=mask)
    if IN_PLACE:
        tl.debug_barrier()  # every load of this program before any of its stores
    tl.store(out_ptr + offset_out[:, None] + cols[None, :], block, mask=mask)


def _bytes(x: Tensor) -> Tensor:
    """The memory of ``x`` from its first element on, as bytes: Triton does not know every dtype."""
    offset = x.storage_offset() * x.element_size()
    return torch.empty(0, dtype=torch.uint8, device=x.device).set_(x.untyped_storage(), offset, (1,), (1,))


def _merged(x: Tensor, out: Tensor, dim: int) -> list[tuple[int, int, int]]:
    """``(size, bytes between neighbours in x, in out)`` of the dimensions but ``dim``: slowest first, merged."""
    unit = x.element_size()
    dims = [
        (size, stride_x * unit, stride_out * unit)
        for d, (size, stride_x, stride_out) in enumerate(zip(x.shape, x.stride(), out.stride(), strict=True))
        if d != dim and size > 1
    ]
    dims.sort(key=lambda entry: (-entry[2], -entry[1]))
    merged: list[tuple[int, int, int]] = []
    for size, stride_x, stride_out in dims:
        if merged and merged[-1][1:] == (size * stride_x, size * stride_out):
            size *= merged.pop()[0]
        merged.append((size, stride_x, stride_out))
    return merged


def _launch(
    x: Tensor,
    source_rows: Tensor,
    dim: int,
    out: Tensor,
    group: int = 1,
    in_place: bool = False,
    skip: bool = False,
    copy_back: bool = False,
) -> None:
    if out.numel() == 0:
        return
    dims = _merged(x, out, dim)
    run = x.element_size()
    if dims and dims[-1][1:] == (run, run):
        run *= dims.pop()[0]
    if len(dims) > _OUTER_DIMS:
        # stranger layouts lose one dimension at a time
        _, split = min((size, d) for d, size in enumerate(x.shape) if d != dim and size > 1)
        for part, out_part in zip(x.unbind(split), out.unbind(split), strict=True):
            _launch(part, source_rows, dim - (split < dim), out_part, group, in_place, skip, copy_back)
        return

    row_strides = x.stride(dim) * x.element_size(), out.stride(dim) * out.element_size()
    strides = [stride for entry in dims for stride in entry[1:]]
    access = math.gcd(16, run, *strides, *row_strides, x.data_ptr(), out.data_ptr())
    unit = min(access, 8)

    # the rows stand among the other dimensions by their stride in the output, so that neighbours write neighbours
    row_dim = sum(stride_out >= row_strides[1] for _, _, stride_out in dims)
    dims.insert(row_dim, (out.shape[dim] // group, 0, 0))
    padding = _OUTER_DIMS + 1 - len(dims)
    sizes, strides_x, strides_out = zip(*[(1, 0, 0)] * padding, *dims, strict=True)

    group_block = triton.next_power_of_2(group)
    block_units = (
        _GROUP_BYTES if in_place else _GATHER_BYTES
    ) // 8  # a thread moves the same number of units of any width
    block_run = min(triton.next_power_of_2(run // unit), max(1, block_units // group_block))
    block_groups = max(1, min(block_units // block_run, _MAX_BLOCK_ROWS) // group_block)
    items = math.prod(sizes)
    grid = (triton.cdiv(items, block_groups) * triton.cdiv(run // unit, block_run),)
    _reorder_kernel[grid](
        _bytes(x),
        source_rows,
        _bytes(out),
        items,
        *sizes[1:],
        run // access,
        x.shape[dim],
        *(stride // access for stride in strides_x),
        row_strides[0] // access,
        *(stride // access for stride in strides_out),
        row_strides[1] // access,
        source_rows.stride(0),
        ROW_DIM=row_dim + padding,
        UNIT={1: tl.int8, 2: tl.int16, 4: tl.int32, 8: tl.int64}[unit],
        VEC=access // unit,
        GROUP=group,
        GROUP_BLOCK=group_block,
        BLOCK_GROUPS=block_groups,
        BLOCK_RUN=block_run,
        IN_PLACE=in_place,
        SKIP=skip,
        COPY_BACK=copy_back,
    )


def launch_reorder(x: Tensor, source_rows: Tensor, dim: int) -> Tensor:
    shape = (*x.shape[:dim], source_rows.shape[0], *x.shape[dim + 1 :])
    out = torch.empty(shape, dtype=x.dtype, device=x.device)
    _launch(x, source_rows, dim, out)
    return out


def launch_reorder_out(x: Tensor, source_rows: Tensor, dim: int, out: Tensor) -> None:
    _launch(x, source_rows, dim, out)


def launch_reorder_(x: Tensor, source_rows: Tensor, dim: int, group_size: int | None) -> None:
    if group_size is not None and group_size <= _MAX_GROUP:
        _launch(x, source_rows, dim, x, group_size, in_place=True, skip=True)
        return
    moved = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(x, source_rows, dim, moved, skip=True)
    _launch(moved, source_rows, dim, x, skip=True, copy_back=True)
