"""The rows of several models as one: a program owns a block of one row and holds four models' tensors at a time.

Triton before 3.3 takes no tuples of pointers, so there are four by name; the next four models go on from what those
before left in the output.
"""

import triton
import triton.language as tl
from torch import Tensor

from ..mixture import _fake
from .summary import as_float, finite

_BLOCK = 2048  # of float16: 128 bits a load for 256 threads


@triton.jit
def _add(
    top,
    total,
    x_ptr,  # *T [V], the row of one model
    model,  # its number
    at,  # of the row in [R, M]
    weights_ptr,
    lse_ptr,
    temperature_ptr,
    onehot_ptr,
    token,
    vocab_size,
    alone,
    LOGLINEAR: tl.constexpr,
    HAS_LSE: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    HAS_ONEHOT: tl.constexpr,
):
    """A model more in the sum: in ``total``, or as ``top + log(total)``. A model that is alone is the ``total``."""
    weight = tl.load(weights_ptr + at + model)
    if weight > 0:
        pick = tl.full([], -1, tl.int64)
        if HAS_ONEHOT:
            pick = tl.load(onehot_ptr + at + model)
        a = as_float(tl.load(x_ptr + token, mask=token < vocab_size * (pick < 0), other=0.0))
        if HAS_TEMPERATURE:
            a = tl.div_rn(a, tl.load(temperature_ptr + at + model))
        if HAS_ONEHOT:
            a = tl.where(pick < 0, a, tl.where(token == pick, 0.0, -float("inf")))
        lse = tl.full([], 0.0, tl.float32)
        if HAS_LSE:
            lse = tl.where(pick < 0, tl.load(lse_ptr + at + model), 0.0)
        if LOGLINEAR:
            if HAS_LSE:
                known = tl.abs(lse) < float("inf")
                l = a - tl.where(known, lse, 0.0)
                l = tl.where(l > 0, 0.0, l)  # not the minimum, which of NaN would be 0
                a = tl.where(known, l, -float("inf"))
            total += a * weight
        else:
            l = a - tl.where(lse == -float("inf"), 0.0, lse)  # a row of -inf stays one
            l = tl.where(lse == float("inf"), lse, l)
            higher = tl.maximum(top, l)
            sum_ = total * tl.exp(top - finite(higher)) + weight * tl.exp(l - finite(higher))
            top = tl.where(alone, top, higher)
            total = tl.where(alone, a, sum_)
    return top, total


@triton.jit
def _mixture_kernel(
    # inputs
    x0_ptr,  # *T [R, V], of model START and those after it
    x1_ptr,
    x2_ptr,
    x3_ptr,
    weights_ptr,  # *f32 [R, M]
    lse_ptr,  # *f32 [R, M] or unused
    temperature_ptr,  # *f32 [R, M] or unused
    onehot_ptr,  # *i64 [R, M] or unused
    active_ptr,  # *i1 [R] or unused
    # outputs
    out_ptr,  # *f32 [R, V]; holds what the models before START make
    # sizes and strides, in elements
    vocab_size,
    stride0,
    stride1,
    stride2,
    stride3,
    # meta-parameters
    MODELS: tl.constexpr,
    START: tl.constexpr,
    LOGLINEAR: tl.constexpr,
    HAS_LSE: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    HAS_ONEHOT: tl.constexpr,
    HAS_ACTIVE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    live = True
    if HAS_ACTIVE:
        live = tl.load(active_ptr + row) != 0
    if live:
        token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        at = row * MODELS
        model = tl.arange(0, BLOCK_M)
        weights = tl.load(weights_ptr + at + model, mask=model < MODELS, other=0.0)
        alone = tl.sum((weights > 0).to(tl.int32), 0) == 1
        to = out_ptr + row * vocab_size + token

        top = tl.full([BLOCK], -float("inf"), tl.float32)
        total = tl.zeros([BLOCK], tl.float32)
        if START > 0:
            top = tl.load(to, mask=token < vocab_size, other=0.0)
            total = top if LOGLINEAR else tl.where(alone, top, 1.0)
        for i in tl.static_range(4):
            if START + i < MODELS:
                x_ptr = x0_ptr + row * stride0
                if i == 1:
                    x_ptr = x1_ptr + row * stride1
                if i == 2:
                    x_ptr = x2_ptr + row * stride2
                if i == 3:
                    x_ptr = x3_ptr + row * stride3
                top, total = _add(
                    top,
                    total,
                    x_ptr,
                    START + i,
                    at,
                    weights_ptr,
                    lse_ptr,
                    temperature_ptr,
                    onehot_ptr,
                    token,
                    vocab_size,
                    alone,
                    LOGLINEAR,
                    HAS_LSE,
                    HAS_TEMPERATURE,
                    HAS_ONEHOT,
                )
        if LOGLINEAR:
            y = tl.where(tl.sum((weights > 0).to(tl.int32), 0) == 0, -float("inf"), total)
        else:
            y = tl.where(alone, total, top + tl.log(total))
        tl.store(to, y, mask=token < vocab_size)


def launch_mixture(
    logits: list[Tensor],
    weights: Tensor,
    lse: Tensor | None,
    temperature: Tensor | None,
    onehot: Tensor | None,
    active: Tensor | None,
    vocab_size: int,
    loglinear: bool,
) -> Tensor:
    out: Tensor = _fake(logits, weights, lse, temperature, onehot, active, vocab_size, loglinear)
    rows, models = weights.shape
    block = min(_BLOCK, max(32, triton.next_power_of_2(vocab_size)))
    for start in range(0, models if rows else 0, 4):
        some = logits[start : start + 4]
        some += some[:1] * (4 - len(some))
        _mixture_kernel[(rows, triton.cdiv(vocab_size, block))](
            *some,
            weights,
            weights if lse is None else lse,
            weights if temperature is None else temperature,
            weights if onehot is None else onehot,
            weights if active is None else active,
            out,
            vocab_size,
            *(x.stride(0) for x in some),
            MODELS=models,
            START=start,
            LOGLINEAR=loglinear,
            HAS_LSE=lse is not None,
            HAS_TEMPERATURE=temperature is not None,
            HAS_ONEHOT=onehot is not None,
            HAS_ACTIVE=active is not None,
            BLOCK_M=triton.next_power_of_2(models),
            BLOCK=block,
            num_warps=8,
            enable_fp_fusion=False,
        )
    return out
