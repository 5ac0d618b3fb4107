"""The one source of randomness: Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").

Random words are a pure function of who asks, never of when or where in a batch:

    words[j] = philox(key = seed, counter = (node, part * ceil(count / 4) + j // 4, stream))[j % 4],   j < count

``node`` is the hash of a prefix: the root's is made from the request id, a child's extends its parent's by the token.
``part`` says which part of the node is drawn for (a tile, a group, a slot), ``stream`` for which purpose.

    root(request)       = mix(request * GOLDEN + 1)
    child(node, token)  = mix(node * ODD + token + 1)

with mix the finaliser of splitmix64 (Steele, Lea, Flood 2014). Integers are int64 holding 64 bits, or 32-bit words
in 0 .. 2^32 - 1. The jit side is kernels/triton/random.py; both sides are equal bit for bit.
"""

import enum

import torch
from torch import Tensor

from .checks import check_dtype, check_range, check_same_device, check_shape
from .registration import register

_WORD = 0xFFFFFFFF
_ROUNDS = 10
_MULTIPLY = 0xD2511F53, 0xCD9E8D57
_WEYL = 0x9E3779B9, 0xBB67AE85


def _signed(bits: int) -> int:
    """64 bits as an int64."""
    return bits - (1 << 64) if bits >> 63 else bits


ODD = _signed(0xD1342543DE82EF95)
GOLDEN = _signed(0x9E3779B97F4A7C15)
MIX_FIRST = _signed(0xBF58476D1CE4E5B9)
MIX_SECOND = _signed(0x94D049BB133111EB)


class Stream(enum.IntEnum):
    """What random words are for; no two purposes of a search share any."""

    ROOT = 0
    TILE = 1
    GROUP = 2
    TOKEN = 3
    SAMPLE = 4
    ROTATION = 5
    POISSON = 6
    NOISE = 7
    DRAW = 8


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical shift to the right."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * MIX_FIRST
    x = (x ^ _shift(x, 27)) * MIX_SECOND
    return x ^ _shift(x, 31)


def root_nodes(request_ids: Tensor) -> Tensor:
    """Nodes int64 of empty prefixes of requests int64, of any shape."""
    return _mix(request_ids * GOLDEN + 1)


def child_nodes(nodes: Tensor, tokens: Tensor) -> Tensor:
    """Nodes int64 of the prefixes ``nodes`` int64 continued by ``tokens`` int64."""
    return _mix(nodes * ODD + tokens + 1)


def philox(seed: Tensor, c0: Tensor, c1: Tensor, c2: Tensor, c3: int) -> Tensor:
    """Four words ``[4, *]`` of Philox4x32-10 for the counters of words ``c0 .. c3 [*]``; ``seed`` is int64 ``[1]``."""
    column = [-1] + [1] * c0.dim()
    turn, half = torch.arange(_ROUNDS, device=seed.device)[:, None], torch.arange(2, device=seed.device)
    weyl, multiply = ((second - first) * half + first for first, second in (_WEYL, _MULTIPLY[::-1]))
    keys = ((torch.cat([seed, seed >> 32]) + turn * weyl) & _WORD).view(_ROUNDS, *column)
    multiply = multiply.view(column)
    even, odd = torch.stack([c0, c2]), torch.stack([c1, torch.full_like(c1, c3)])
    for key in keys.unbind(0):
        product = even.flip(0).mul_(multiply)  # of c2, of c0
        # the upper halves of c1 and c3 are not cleared: nothing below looks at them
        even = (product >> 32).bitwise_xor_(odd).bitwise_xor_(key).bitwise_and_(_WORD)
        odd = product
    return torch.stack([even, odd & _WORD], 1).flatten(0, 1)  # c0, c1, c2, c3


def _random_bits(seed: Tensor, nodes: Tensor, parts: Tensor, count: int, stream: int) -> Tensor:
    """The torch definition."""
    calls = -(-count // 4)
    nodes, parts = nodes.flatten()[:, None], parts.flatten()[:, None]
    c2 = (parts * calls + torch.arange(calls, device=nodes.device)) & _WORD  # [M, calls]
    low, high = ((half & _WORD).expand_as(c2) for half in (nodes, nodes >> 32))
    words = philox(seed, low, high, c2, stream)  # [4, M, calls]
    return words.permute(1, 2, 0).flatten(1)[:, :count].contiguous()


def _fake_random_bits(seed: Tensor, nodes: Tensor, parts: Tensor, count: int, stream: int) -> Tensor:
    return nodes.new_empty(nodes.numel(), count)


_random_bits_op = register(
    "random_bits(Tensor seed, Tensor nodes, Tensor parts, SymInt count, int stream) -> Tensor",
    _random_bits,
    _fake_random_bits,
    "random",
)


def random_bits(seed: Tensor, nodes: Tensor, count: int, stream: Stream, parts: Tensor | None = None) -> Tensor:
    """``count`` random words for each node: see the formula at the top of this page.

    Args:
        seed: int64 ``[1]``, on the nodes' device; 64 bits of key.
        nodes: int64, of any shape.
        count: words per node.
        stream: what they are for.
        parts: int64 of the same shape, ``parts * ceil(count / 4)`` below 2^32; default 0.

    Returns:
        int64 ``[*nodes.shape, count]``, words in 0 .. 2^32 - 1.
    """
    check_dtype("seed", seed, torch.int64)
    check_shape("seed", seed, "[1]", 1)
    check_dtype("nodes", nodes, torch.int64)
    check_range("count", count, 1)
    if parts is None:
        parts = torch.zeros_like(nodes)
    check_dtype("parts", parts, torch.int64)
    if parts.shape != nodes.shape:
        raise ValueError(f"parts: expected shape {list(nodes.shape)}, got {list(parts.shape)}")
    check_same_device(seed=seed, nodes=nodes, parts=parts)
    words: Tensor = _random_bits_op(seed, nodes.contiguous(), parts.contiguous(), count, int(stream))
    return words.view(*nodes.shape, count)


def random_codes(seed: Tensor, nodes: Tensor, stream: Stream, parts: Tensor | None = None) -> Tensor:
    """One uniform 64-bit integer for each node, as int64 of the nodes' shape."""
    high, low = random_bits(seed, nodes, 2, stream, parts).unbind(-1)
    return (high << 32) | low


def uniforms(words: Tensor) -> Tensor:
    """float64 ``[B, n]`` in [0, 1) from random words ``[B, 2 n]``."""
    high, low = words.double().unflatten(-1, (-1, 2)).unbind(-1)
    return (high * 2.0**-32 + low * 2.0**-64).clamp(max=1 - 2.0**-53)


def gumbel(words: Tensor) -> Tensor:
    """Standard Gumbel float32 from random words: ``-log(E)`` with E exponential, fine where E is small.

    U = (word + 1/2) / 2^32 has all its bits near 0 and E = -log1p(-U) keeps them, so large values do not collide;
    above 1/2 it is 1 - U that is kept.
    """
    low = words < (1 << 31)
    u = (torch.where(low, words, _WORD - words).float() + 0.5) * 2.0**-32
    return -torch.log(-torch.where(low, torch.log1p(-u), torch.log(u)))
