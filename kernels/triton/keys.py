"""Order-preserving keys of candidates: the jit side of ``flashbeam.kernels.select``."""

import triton
import triton.language as tl


@triton.jit
def ordered_int(x):
    """float32 -> int64 with the same order; -0.0 equals +0.0."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)


@triton.jit
def pack_key(value, index):
    """An int64 that orders by (value descending, index ascending) when sorted descending."""
    return (ordered_int(value) << 32) | (0xFFFFFFFF - index.to(tl.int64))


@triton.jit
def key_value(key):
    """The float32 in a key."""
    bits = (key >> 32).to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def key_index(key):
    """The index in a key."""
    return 0xFFFFFFFF - (key & 0xFFFFFFFF)


@triton.jit
def token_log_prob(adjusted, lse):
    """min(adjusted - lse, 0), and -inf on rows without a finite log-sum-exp."""
    finite = tl.abs(lse) < float("inf")
    return tl.where(finite, tl.minimum(adjusted - tl.where(finite, lse, 0.0), 0.0), -float("inf"))
