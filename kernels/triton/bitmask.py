"""Triton: pack, unpack, mark and apply token bitmasks."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 2048  # tokens a program


@triton.jit
def _pack_kernel(
    mask_ptr,  # *u8 [R, V], 0 or 1
    bits_ptr,  # *i32 [R, W], contiguous
    V,
    W,
    stride_mask_r,
    stride_mask_v,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    words = tl.program_id(1) * (BLOCK // 32) + tl.arange(0, BLOCK // 32)
    bit = tl.arange(0, 32)
    tokens = words[:, None] * 32 + bit[None, :]
    allowed = tl.load(mask_ptr + row * stride_mask_r + tokens.to(tl.int64) * stride_mask_v, mask=tokens < V, other=0)
    # the bits are disjoint, so the sum is their union; bit 31 wraps into the sign
    word = tl.sum(allowed.to(tl.int32) << bit[None, :], 1)
    tl.store(bits_ptr + row * W + words, word, mask=words < W)


@triton.jit
def _unpack_kernel(
    bits_ptr,  # *i32 [R, W]
    mask_ptr,  # *u8 [R, V], contiguous
    V,
    stride_bits_r,
    stride_bits_w,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    tokens = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    word = tl.load(
        bits_ptr + row * stride_bits_r + (tokens // 32).to(tl.int64) * stride_bits_w, mask=tokens < V, other=0
    )
    tl.store(mask_ptr + row * V + tokens, ((word >> (tokens % 32)) & 1).to(tl.uint8), mask=tokens < V)


@triton.jit
def _mark_kernel(
    rows_ptr,  # *i64 [n]
    tokens_ptr,  # *i64 or *i32 [n]
    marked_ptr,  # *u8 [n], 0 or 1
    bits_ptr,  # *i32 [R, W], zero
    n,
    W,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    marked = tl.load(marked_ptr + at, mask=at < n, other=0) != 0
    row = tl.load(rows_ptr + at, mask=marked, other=0)
    token = tl.load(tokens_ptr + at, mask=marked, other=0)
    bit = tl.full([BLOCK], 1, tl.int32) << (token % 32).to(tl.int32)
    # a union has no order: the only atomics of this package, and on integers
    tl.atomic_or(bits_ptr + row * W + token // 32, bit, mask=marked, sem="relaxed")


@triton.jit
def _apply_kernel(
    logits_ptr,  # *T [B, K, V]
    bits_ptr,  # *i32 [B, K, W]
    K,
    V,
    stride_logits_b,
    stride_logits_k,
    stride_logits_v,
    stride_bits_b,
    stride_bits_k,
    stride_bits_w,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    b, k = row // K, row % K
    logits_ptr += b * stride_logits_b + k * stride_logits_k
    bits_ptr += b * stride_bits_b + k * stride_bits_k
    tokens = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = tokens < V
    word = tl.load(bits_ptr + (tokens // 32).to(tl.int64) * stride_bits_w, mask=inside, other=0)
    barred = ((word >> (tokens % 32)) & 1) == 0
    tl.store(logits_ptr + tokens.to(tl.int64) * stride_logits_v, float("-inf"), mask=inside & barred)


def launch_pack_bitmask(mask: Tensor) -> Tensor:
    vocab_size = mask.shape[-1]
    words = triton.cdiv(vocab_size, 32)
    out = torch.empty((*mask.shape[:-1], words), dtype=torch.int32, device=mask.device)
    if out.numel() > 0:
        rows = mask.view(torch.uint8).reshape(-1, vocab_size)
        grid = (rows.shape[0], triton.cdiv(vocab_size, _BLOCK))
        _pack_kernel[grid](rows, out, vocab_size, words, *rows.stride(), BLOCK=_BLOCK)
    return out


def launch_mark_bits(rows: Tensor, tokens: Tensor, marked: Tensor, size: int, vocab_size: int) -> Tensor:
    words = triton.cdiv(vocab_size, 32)
    out = torch.zeros((size, words), dtype=torch.int32, device=tokens.device)
    n = marked.numel()
    if n > 0 and out.numel() > 0:
        rows, tokens, marked = rows.contiguous(), tokens.contiguous(), marked.contiguous()
        grid = (triton.cdiv(n, _BLOCK // 8),)
        _mark_kernel[grid](rows, tokens, marked.view(torch.uint8), out, n, words, BLOCK=_BLOCK // 8)
    return out


def launch_unpack_bitmask(bitmask: Tensor, vocab_size: int) -> Tensor:
    out = torch.empty((*bitmask.shape[:-1], vocab_size), dtype=torch.bool, device=bitmask.device)
    if out.numel() > 0:
        rows = bitmask.reshape(-1, bitmask.shape[-1])
        grid = (rows.shape[0], triton.cdiv(vocab_size, _BLOCK))
        _unpack_kernel[grid](rows, out.view(torch.uint8), vocab_size, *rows.stride(), BLOCK=_BLOCK)
    return out


def launch_apply_bitmask_(logits: Tensor, bitmask: Tensor) -> None:
    if logits.numel() == 0:
        return
    missing = (None,) * (3 - logits.dim())
    logits, bitmask = logits[missing], bitmask[missing]  # [B, K, V], [B, K, W]
    batch, beams, vocab_size = logits.shape
    grid = (batch * beams, triton.cdiv(vocab_size, _BLOCK))
    _apply_kernel[grid](logits, bitmask, beams, vocab_size, *logits.stride(), *bitmask.stride(), BLOCK=_BLOCK)
