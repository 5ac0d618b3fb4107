"""Top-k, top-p and min-p: one program owns a row and finds the last token kept by bisection on its ordered value.

A pass over the row, which stays in the L2 cache, tries three values, so the range shrinks to a quarter: at most 16
passes for top-k and 16 for top-p, and one that writes.
"""

import triton
import triton.language as tl
from torch import Tensor

from ..filters import P_BITS, _fake_filter_bitmask, least_exponent, parts_of
from .keys import key_value, ordered_int
from .summary import as_float, finite

_BLOCK = 2048  # of float16: 128 bits a load for 256 threads
_ONE = tl.constexpr(2.0**32)
_WORD = tl.constexpr(0xFFFFFFFF)
_P_BITS = tl.constexpr(P_BITS)
_ROUND_UP = tl.constexpr((1 << P_BITS) - 1)
_NOTHING = tl.constexpr(-2139095041)  # ordered_int(-inf)
_MOST = tl.constexpr(2**31 - 1)  # above every ordered_int


@triton.jit
def _load(x_ptr, bits_ptr, temperature, start, vocab_size, HAS_BITMASK: tl.constexpr, BLOCK: tl.constexpr):
    """Adjusted logits ``[BLOCK]`` from ``start``, -inf for what is no candidate."""
    token = start + tl.arange(0, BLOCK)
    inside = token < vocab_size
    x = tl.div_rn(as_float(tl.load(x_ptr + token, mask=inside, other=-float("inf"))), temperature)
    if HAS_BITMASK:
        bits = tl.load(bits_ptr + token // 32, mask=inside, other=0)
        x = tl.where(((bits >> (token % 32)) & 1) != 0, x, -float("inf"))
    return tl.where(x == x, x, -float("inf"))


@triton.jit
def _mass(x, top):
    return (tl.exp(tl.minimum(x - top, 0.0)) * _ONE + 0.5).to(tl.int64)


@triton.jit
def _weigh(
    first,
    second,
    third,
    x_ptr,
    bits_ptr,
    temperature,
    top,
    vocab_size,
    HAS_BITMASK: tl.constexpr,
    MASS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Number, or mass, of the candidates at or above each of three ordered values."""
    sum1 = tl.zeros([BLOCK], tl.int64 if MASS else tl.int32)
    sum2 = tl.zeros([BLOCK], tl.int64 if MASS else tl.int32)
    sum3 = tl.zeros([BLOCK], tl.int64 if MASS else tl.int32)
    for start in range(0, vocab_size, BLOCK):
        x = _load(x_ptr, bits_ptr, temperature, start, vocab_size, HAS_BITMASK, BLOCK)
        key = ordered_int(x)
        weight = _mass(x, top) if MASS else tl.full([BLOCK], 1, tl.int32)
        sum1 += tl.where(key >= first, weight, 0)
        sum2 += tl.where(key >= second, weight, 0)
        sum3 += tl.where(key >= third, weight, 0)
    return tl.sum(sum1, 0).to(tl.int64), tl.sum(sum2, 0).to(tl.int64), tl.sum(sum3, 0).to(tl.int64)


@triton.jit
def _search(
    low,
    high,
    target,
    x_ptr,
    bits_ptr,
    temperature,
    top,
    vocab_size,
    HAS_BITMASK: tl.constexpr,
    MASS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The greatest ordered value in ``[low, high]`` with ``target`` or more at or above it, and what is above it.

    At ``low`` there is as much, and above ``high`` nothing.
    """
    above = tl.full([], 0, tl.int64)
    while low < high:
        step = (high - low + 3) // 4
        first, second, third = low + step, tl.minimum(low + 2 * step, high + 1), tl.minimum(low + 3 * step, high + 1)
        sum1, sum2, sum3 = _weigh(
            first, second, third, x_ptr, bits_ptr, temperature, top, vocab_size, HAS_BITMASK, MASS, BLOCK
        )
        if sum3 >= target:
            low = third
        elif sum2 >= target:
            low = second
            high = third - 1
            above = sum3
        elif sum1 >= target:
            low = first
            high = second - 1
            above = sum2
        else:
            high = first - 1
            above = sum1
    return low, above


# numbers of the caller's choice are no reason to compile again
@triton.jit(do_not_specialize=["top_k", "parts"])
def _filter_bitmask_kernel(
    # inputs
    x_ptr,  # *T [R, V]
    bits_ptr,  # *i32 [R, W] or unused
    temperature_ptr,  # *f32 [R] or unused
    # outputs
    out_ptr,  # *i32 [R, ceil(V / 32)]
    # sizes and strides, in elements
    vocab_size,
    words,
    stride_x,
    stride_bits,
    # filters
    top_k,
    parts,  # of 2^30: top_p
    least,  # exponent: min_p
    # meta-parameters
    HAS_BITMASK: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    HAS_TOP_K: tl.constexpr,
    HAS_TOP_P: tl.constexpr,
    HAS_MIN_P: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * stride_x
    bits_ptr += row * stride_bits
    temperature = 1.0
    if HAS_TEMPERATURE:
        temperature = tl.load(temperature_ptr + row)

    best = tl.full([BLOCK], -float("inf"), tl.float32)
    candidates = tl.zeros([BLOCK], tl.int32)
    for start in range(0, vocab_size, BLOCK):
        x = _load(x_ptr, bits_ptr, temperature, start, vocab_size, HAS_BITMASK, BLOCK)
        best = tl.maximum(best, x)
        candidates += (x > -float("inf")).to(tl.int32)
    top = tl.max(best, 0)
    live = tl.abs(top) < float("inf")
    last = tl.full([], _NOTHING, tl.int64)  # ordered value of the last token kept
    need = tl.full([], 0, tl.int64)  # how many of those equal to it are kept
    highest = tl.where(live, ordered_int(top), last)
    top = finite(top)
    if HAS_TOP_K and tl.sum(candidates, 0) > top_k:
        last, above = _search(
            last, highest, top_k, x_ptr, bits_ptr, temperature, top, vocab_size, HAS_BITMASK, False, BLOCK
        )
        need = top_k - above
    if HAS_TOP_P:
        whole, _, _ = _weigh(
            last + 1, last + 1, last + 1, x_ptr, bits_ptr, temperature, top, vocab_size, HAS_BITMASK, True, BLOCK
        )
        whole += need * _mass(tl.where(need > 0, key_value(last << 32), -float("inf")), top)
        # the share of parts, rounded up
        target = (whole >> 32) * parts * 4 + (((whole & _WORD) * parts + _ROUND_UP) >> _P_BITS)
        target = tl.maximum(target, 1)
        last, above = _search(
            last, highest, target, x_ptr, bits_ptr, temperature, top, vocab_size, HAS_BITMASK, True, BLOCK
        )
        mass = tl.maximum(_mass(key_value(last << 32), top), 1)
        need = (target - above + mass - 1) // mass
    last = tl.where(live, last, _MOST)

    seen = tl.full([], 0, tl.int64)
    for start in range(0, vocab_size, BLOCK):
        x = _load(x_ptr, bits_ptr, temperature, start, vocab_size, HAS_BITMASK, BLOCK)
        key = ordered_int(x)
        tie = (key == last).to(tl.int32)
        rank = seen + tl.cumsum(tie, 0)
        kept = (key > last) | ((tie != 0) & (rank <= need))
        seen += tl.sum(tie, 0)
        if HAS_MIN_P:
            kept = kept & (x - top >= least)
        bits = tl.reshape(kept.to(tl.int32), [BLOCK // 32, 32]) << tl.arange(0, 32)[None, :]
        word = start // 32 + tl.arange(0, BLOCK // 32)
        tl.store(out_ptr + row * words + word, tl.sum(bits, 1), mask=word < words)


def launch_filter_bitmask(
    logits: Tensor,
    vocab_size: int,
    bitmask: Tensor | None,
    temperature: Tensor | None,
    top_k: int,
    top_p: float,
    min_p: float,
) -> Tensor:
    out: Tensor = _fake_filter_bitmask(logits, vocab_size, bitmask, temperature, top_k, top_p, min_p)
    rows, words = out.shape
    if rows:
        _filter_bitmask_kernel[(rows,)](
            logits,
            logits if bitmask is None else bitmask,
            logits if temperature is None else temperature,
            out,
            vocab_size,
            words,
            logits.stride(0),
            0 if bitmask is None else bitmask.stride(0),
            top_k,
            parts_of(top_p),
            least_exponent(min_p),
            HAS_BITMASK=bitmask is not None,
            HAS_TEMPERATURE=temperature is not None,
            HAS_TOP_K=top_k > 0,
            HAS_TOP_P=top_p < 1,
            HAS_MIN_P=min_p > 0,
            BLOCK=min(_BLOCK, max(32, triton.next_power_of_2(vocab_size))),
            num_warps=8,
            enable_fp_fusion=False,
        )
    return out
