"""Random words as a pure function of who asks: the jit side of ``flashbeam.kernels.random``."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..random import MIX_FIRST, MIX_SECOND, ODD

_BITS = (1 << 64) - 1
_ODD = tl.constexpr(ODD & _BITS)
_MIX_FIRST = tl.constexpr(MIX_FIRST & _BITS)
_MIX_SECOND = tl.constexpr(MIX_SECOND & _BITS)
_BLOCK = 128


@triton.jit
def mix(x):
    """The finaliser of splitmix64, int64 -> int64."""
    x = x.to(tl.uint64)  # so that shifts to the right bring in zeros
    x = (x ^ (x >> 30)) * _MIX_FIRST
    x = (x ^ (x >> 27)) * _MIX_SECOND
    return (x ^ (x >> 31)).to(tl.int64)


@triton.jit
def child_node(node, token):
    """The node of a prefix, int64, continued by a token."""
    return mix(node.to(tl.uint64) * _ODD + token.to(tl.uint64) + 1)


@triton.jit
def philox(seed, c0, c1, c2, c3):
    """Four words uint32 of Philox4x32-10; ``seed`` is int64, the counter's words are uint32."""
    return tl.philox_impl(c0, c1, c2, c3, seed.to(tl.uint32), (seed >> 32).to(tl.uint32))


@triton.jit
def gumbel(word):
    """Standard Gumbel float32 from words uint32: see ``gumbel`` of the torch definition."""
    low = word < 0x80000000
    u = (tl.where(low, word, 0xFFFFFFFF - word).to(tl.float32) + 0.5) * (1.0 / 4294967296.0)
    # log1p(-u) = log(1 - u) * u / (1 - (1 - u)): the logarithm of what was rounded, and the rounding made good
    rest = tl.where(low, 1.0 - u, u)
    lost = tl.where(low, 1.0 - rest, 1.0)
    tiny = lost == 0.0
    scale = tl.where(low, tl.div_rn(u, tl.where(tiny, 1.0, lost)), 1.0)
    return -tl.log(tl.where(tiny, u, -tl.log(rest) * scale))


@triton.jit
def _random_bits_kernel(
    # inputs
    seed_ptr,  # *i64 [1]
    nodes_ptr,  # *i64 [M]
    parts_ptr,  # *i64 [M]
    # outputs
    words_ptr,  # *i64 [M, count]
    # sizes
    size,  # calls of Philox, M * calls
    calls,  # for each node
    count,
    stream,
    # meta-parameters
    BLOCK: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    index, call = place // calls, place % calls
    node = tl.load(nodes_ptr + index, mask=inside, other=0)
    part = tl.load(parts_ptr + index, mask=inside, other=0)
    c2 = (part * calls + call).to(tl.uint32)
    c3 = tl.full([BLOCK], stream, tl.uint32)
    w0, w1, w2, w3 = philox(tl.load(seed_ptr), node.to(tl.uint32), (node >> 32).to(tl.uint32), c2, c3)
    words_ptr += index * count
    first = call * 4
    tl.store(words_ptr + first, w0.to(tl.int64), mask=inside)
    tl.store(words_ptr + first + 1, w1.to(tl.int64), mask=inside & (first + 1 < count))
    tl.store(words_ptr + first + 2, w2.to(tl.int64), mask=inside & (first + 2 < count))
    tl.store(words_ptr + first + 3, w3.to(tl.int64), mask=inside & (first + 3 < count))


def launch_random_bits(seed: Tensor, nodes: Tensor, parts: Tensor, count: int, stream: int) -> Tensor:
    calls = triton.cdiv(count, 4)
    size = nodes.numel() * calls
    words = torch.empty(nodes.numel(), count, dtype=torch.int64, device=nodes.device)
    if size:
        _random_bits_kernel[(triton.cdiv(size, _BLOCK),)](
            seed, nodes, parts, words, size, calls, count, stream, BLOCK=_BLOCK, num_warps=4, enable_fp_fusion=False
        )
    return words
