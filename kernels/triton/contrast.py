"""Expert against amateur: one program owns a block of one row, and reads the amateur that the row names."""

import triton
import triton.language as tl
from torch import Tensor

from ..contrast import _fake
from ..lse import FLAG_INF
from .keys import token_log_prob
from .summary import as_float

_BLOCK = 2048  # of float16: 128 bits a load for 256 threads
_INF = tl.constexpr(FLAG_INF)


@triton.jit
def _load(x_ptr, temperature_ptr, row, token, vocab_size, HAS_TEMPERATURE: tl.constexpr):
    """Adjusted logits ``[BLOCK]``."""
    x = as_float(tl.load(x_ptr + token, mask=token < vocab_size, other=-float("inf")))
    if HAS_TEMPERATURE:
        x = tl.div_rn(x, tl.load(temperature_ptr + row))
    return x


@triton.jit(do_not_specialize=["weight", "first"])
def _contrast_kernel(
    # inputs
    x_ptr,  # *T [R, V]
    amateur_ptr,  # *T [R, V], amateur number first
    lse_ptr,  # *f32 [R]
    amateur_lse_ptr,  # *f32 [R, J]
    top_ptr,  # *f32 [R]
    temperature_ptr,  # *f32 [R] or unused
    amateur_temperature_ptr,  # *f32 [R] or unused
    choice_ptr,  # *i64 [R] or unused
    active_ptr,  # *i1 [R] or unused
    bits_ptr,  # *i32 [R, W] or unused
    # outputs
    out_ptr,  # *f32 [R, V]
    flags_ptr,  # *i32 [R], zero
    # sizes and strides, in elements
    vocab_size,
    amateurs,
    first,
    stride_x,
    stride_amateur,
    stride_bits,
    # formula
    weight,
    least,
    # meta-parameters
    HAS_WEIGHT: tl.constexpr,
    HAS_AMATEUR: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    HAS_AMATEUR_TEMPERATURE: tl.constexpr,
    HAS_CHOICE: tl.constexpr,
    HAS_ACTIVE: tl.constexpr,
    HAS_BITMASK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    live = True
    if HAS_ACTIVE:
        live = tl.load(active_ptr + row) != 0
    if HAS_CHOICE:
        live = live & (tl.load(choice_ptr + row) == first)
    if live:
        token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        x = _load(x_ptr + row * stride_x, temperature_ptr, row, token, vocab_size, HAS_TEMPERATURE)
        head = x - tl.load(top_ptr + row) >= least
        if HAS_BITMASK:
            bits = tl.load(bits_ptr + row * stride_bits + token // 32, mask=token < vocab_size, other=0)
            head = head & (((bits >> (token % 32)) & 1) != 0)
        x = tl.where(x == x, x, -float("inf"))
        score = token_log_prob(x, tl.load(lse_ptr + row))
        head = head & (score > -float("inf"))
        if HAS_AMATEUR:
            y_ptr = amateur_ptr + row * stride_amateur
            y = _load(y_ptr, amateur_temperature_ptr, row, token, vocab_size, HAS_AMATEUR_TEMPERATURE)
            known = y == y
            y = token_log_prob(tl.where(known, y, -float("inf")), tl.load(amateur_lse_ptr + row * amateurs + first))
            lost = head & known & (y == -float("inf"))
            if tl.max(lost.to(tl.int32), 0) != 0:
                # a union has no order, and it is of integers
                tl.atomic_or(flags_ptr + row, _INF, sem="relaxed")
            head = head & (y > -float("inf"))
            if HAS_WEIGHT:
                score += (score - y) * weight
            else:
                score -= y
        tl.store(out_ptr + row * vocab_size + token, tl.where(head, score, -float("inf")), mask=token < vocab_size)


def launch_contrast(
    expert: Tensor,
    amateurs: list[Tensor],
    lse: Tensor,
    amateur_lse: Tensor,
    top: Tensor,
    temperature: Tensor | None,
    amateur_temperature: Tensor | None,
    choice: Tensor | None,
    active: Tensor | None,
    bitmask: Tensor | None,
    vocab_size: int,
    weight: float | None,
    least: float,
) -> tuple[Tensor, Tensor]:
    out = _fake(
        *(expert, amateurs, lse, amateur_lse, top, temperature, amateur_temperature),
        *(choice, active, bitmask, vocab_size, weight, least),
    )
    out[1].zero_()
    rows = lse.shape[0]
    block = min(_BLOCK, max(32, triton.next_power_of_2(vocab_size)))
    used = amateurs[:1] if choice is None else amateurs
    for first, amateur in enumerate(used if rows else []):
        _contrast_kernel[(rows, triton.cdiv(vocab_size, block))](
            expert,
            amateur,
            lse,
            amateur_lse,
            top,
            lse if temperature is None else temperature,
            lse if amateur_temperature is None else amateur_temperature,
            lse if choice is None else choice,
            lse if active is None else active,
            lse if bitmask is None else bitmask,
            *out,
            vocab_size,
            len(amateurs),
            first,
            expert.stride(0),
            amateur.stride(0),
            0 if bitmask is None else bitmask.stride(0),
            0.0 if weight is None else weight,
            least,
            HAS_WEIGHT=weight is not None,
            HAS_AMATEUR=weight != 0,
            HAS_TEMPERATURE=temperature is not None,
            HAS_AMATEUR_TEMPERATURE=amateur_temperature is not None,
            HAS_CHOICE=choice is not None,
            HAS_ACTIVE=active is not None,
            HAS_BITMASK=bitmask is not None,
            BLOCK=block,
            num_warps=8,
            enable_fp_fusion=False,
        )
    return out
