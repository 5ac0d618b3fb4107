"""What an expert says and an amateur does not, where the expert finds it plausible.

    e[j] = min(x[j] / temperature - lse, 0)                              the expert's log-probabilities
    a[j] = min(x'[j] / amateur_temperature - lse', 0)                    the amateur's
    y[j] = e[j] - a[j]                 without a weight  \\   where  x[j] / temperature - top >= log(alpha),
         = e[j] + weight (e[j] - a[j]) with one          /   the plausibility head; -inf elsewhere

What the bitmask bars is not in the head. ``top`` is the greatest adjusted logit of what may be chosen, so the head
holds that token at least. Of several amateurs ``choice`` names one for each row, and no other is read. A token of the
head that the amateur gives no probability has no finite contrast: it is barred, and its row flagged.

One program owns a block of one row. Traffic per row: ``V (sizeof(x) + sizeof(x') + 4)`` bytes, and a bit per token.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .bitmask import unpack_bitmask
from .checks import check_candidates, check_dtype, check_rows, check_same_device, check_shape, check_tensor, contiguous
from .filters import least_exponent
from .lse import FLAG_INF
from .registration import register
from .row_blocks import adjusted_rows, row_blocks, row_log_probs


def _contrast(
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
    """The torch definition."""
    out = _fake(
        *(expert, amateurs, lse, amateur_lse, top, temperature, amateur_temperature),
        *(choice, active, bitmask, vocab_size, weight, least),
    )
    y, flags = out
    flags.zero_()
    read = torch.ones_like(lse, dtype=torch.bool) if active is None else active
    for i, amateur in enumerate(amateurs):
        for rows in row_blocks(read if choice is None else read & (choice == i), vocab_size):
            adjusted = adjusted_rows(expert, rows, vocab_size, temperature)
            head = adjusted - top[rows, None] >= least  # which NaN is not
            if bitmask is not None:
                head &= unpack_bitmask(bitmask[rows], vocab_size)
            e = row_log_probs(adjusted, lse[rows, None])
            if weight != 0:
                a = adjusted_rows(amateur, rows, vocab_size, amateur_temperature)
                a = row_log_probs(a, amateur_lse[rows, i, None])
                unknown = ~(a > -torch.inf)
                lost = head & unknown
                if bool(lost.any()):
                    lost &= (e > -torch.inf) & ~a.isnan()
                    flags[rows] = lost.any(1).int() * FLAG_INF
                    head &= ~unknown
                e = e - a if weight is None else (e - a).mul_(weight).add_(e)
            y[rows] = e.masked_fill_(~head, -torch.inf)
        if choice is None:
            break
    return out


def _fake(
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
    rows = lse.shape[0]
    return lse.new_empty((rows, vocab_size)), lse.new_empty((rows,), dtype=torch.int32)


contrast_op = register(
    "contrast(Tensor expert, Tensor[] amateurs, Tensor lse, Tensor amateur_lse, Tensor top, Tensor? temperature, "
    "Tensor? amateur_temperature, Tensor? choice, Tensor? active, Tensor? bitmask, SymInt vocab_size, float? weight, "
    "float least) -> (Tensor, Tensor)",
    _contrast,
    _fake,
    "contrast",
)


def contrast(
    expert: Tensor,
    amateurs: Sequence[Tensor],
    lse: Tensor,
    amateur_lse: Tensor,
    top: Tensor,
    *,
    weight: float | None = None,
    alpha: float = 0.1,
    temperature: Tensor | None = None,
    amateur_temperature: Tensor | None = None,
    choice: Tensor | None = None,
    active: Tensor | None = None,
    bitmask: Tensor | None = None,
    vocab_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Contrast an expert's log-probabilities with an amateur's, in the expert's plausibility head.

    Args:
        expert: ``[R, V]`` float32, float16 or bfloat16; unit stride over ``V``. Not modified.
        amateurs: J tensors like it, of any of these dtypes each.
        lse: ``[R]`` float32, the expert's log-sum-exp after temperature.
        amateur_lse: ``[R, J]`` float32, the amateurs'.
        top: ``[R]`` float32, the greatest of the expert's logits after temperature that may be chosen.
        weight: of the difference that is added to the expert's log-probability, 0 or more; ``None``: that alone.
        alpha: above 0 and at most 1; the head holds the tokens at least that probable in terms of the best.
        temperature: ``[R]`` float32 above 0; divides the expert's logits.
        amateur_temperature: ``[R]`` float32 above 0; divides the amateurs'.
        choice: ``[R]`` int64, the amateur of each row; ``None``: the first. Rows with another number hold anything.
        active: ``[R]`` bool; rows that are not are not read, and hold anything.
        bitmask: int32 ``[R, ceil(V / 32)]``, what may be chosen; unit stride over words.
        vocab_size: columns from here on are padding and never read.

    Returns:
        ``[R, vocab_size]`` float32, ``-inf`` outside the head; and flags ``[R]`` int32, ``FLAG_INF`` where the amateur
        gives a token of the head no probability.

    Numerics: every operation is rounded once, in the order of the formula.

    Raises:
        ValueError: shapes, strides, devices or ranges differ from the above.
        TypeError: a dtype differs from the above.
    """
    check_tensor("expert", expert)
    vocab_size = check_rows(expert, vocab_size, bitmask, temperature, "expert")
    if not amateurs:
        raise ValueError("amateurs: expected one tensor or more, got none")
    for i, x in enumerate(amateurs):
        check_tensor(f"amateurs[{i}]", x)
        check_shape(f"amateurs[{i}]", x, "[R, V]", *expert.shape)
        check_rows(x, vocab_size, None, None, f"amateurs[{i}]")
    rows = expert.shape[0]
    check_candidates(expert, active, None)
    for name, tensor in (("lse", lse), ("top", top), ("amateur_temperature", amateur_temperature)):
        if tensor is not None:
            check_dtype(name, tensor, torch.float32)
            check_shape(name, tensor, "[R]", rows)
    check_dtype("amateur_lse", amateur_lse, torch.float32)
    check_shape("amateur_lse", amateur_lse, "[R, J]", rows, len(amateurs))
    if choice is not None:
        check_dtype("choice", choice, torch.int64)
        check_shape("choice", choice, "[R]", rows)
    if weight is not None and not 0 <= weight < math.inf:
        raise ValueError(f"weight: expected a number of 0 or more, or None, got {weight}")
    if not 0 < alpha <= 1:
        raise ValueError(f"alpha: expected a number in (0, 1], got {alpha}")
    others = {f"amateurs[{i}]": x for i, x in enumerate(amateurs)}
    check_same_device(expert=expert, **others, lse=lse, amateur_lse=amateur_lse, top=top, choice=choice)
    small = (contiguous(x) for x in (lse, amateur_lse, top, temperature, amateur_temperature, choice, active))
    found: tuple[Tensor, Tensor] = contrast_op(
        expert.detach(), [x.detach() for x in amateurs], *small, bitmask, vocab_size, weight, least_exponent(alpha)
    )
    return found
