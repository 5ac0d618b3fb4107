"""The exact best ``k``: of all continuations of a request's beams, and of the tokens of a row."""

from typing import NamedTuple

import torch
from torch import Tensor

from .checks import check_dtype, check_same_device, check_shape
from .select import flatten_rows, top_candidates


class Selected(NamedTuple):
    """What :func:`select_beams` returns."""

    log_probs: Tensor  # float32 [B, k]
    parents: Tensor  # int64 [B, k]
    tokens: Tensor  # int64 [B, k]
    valid: Tensor  # bool [B, k]


class TopK(NamedTuple):
    """What :func:`topk_log_probs` returns."""

    log_probs: Tensor  # float32 [R, k]
    tokens: Tensor  # int64 [R, k]
    lse: Tensor  # float32 [R]


def select_beams(
    logits: Tensor,
    log_probs: Tensor,
    k: int,
    *,
    bitmask: Tensor | None = None,
    temperature: Tensor | float | None = None,
    width: Tensor | None = None,
    exclude: Tensor | None = None,
    normalize: str = "vocab",
    vocab_size: int | None = None,
) -> Selected:
    """Select the exact best ``k`` continuations of each request over all its beams, reading the logits once.

    Equivalent to::

        scores = log_probs[:, :, None] + (logits.float() / temperature).log_softmax(-1).view(B, P, V)
        log_probs, index = scores.flatten(1).topk(k)
        parents, tokens = index // V, index % V

    except that equal scores are in the total order (parent ascending, adjusted logit descending, token ascending), that
    NaN counts as ``-inf``, that a row with +inf has no candidates, and that ``k`` may exceed the candidates.

    Args:
        logits: ``[B, P, V]`` or ``[B * P, V]`` float32, float16 or bfloat16; unit stride over ``V``. Not modified.
        log_probs: ``[B, P]`` float32, cumulative log-probabilities of the parents, natural log; ``-inf`` for an invalid
            one, which is not read.
        k: candidates per request, 1 or more.
        bitmask: ``[B * P, ceil(V / 32)]`` int32, or ``[B, P, ...]``; a set bit allows its token. Words behind
            are ignored. ``None`` allows all.
        temperature: number above 0, or float32 ``[B]`` or ``[B * P]``; divides the logits.
        width: ``[B]`` int64; a request's candidates beyond its width are invalid. ``None`` means ``k``.
        exclude: ``[n]`` int64 tokens that are normalised over but are no candidates (for example EOS ids).
        normalize: ``"vocab"``: masked tokens keep their share of the probability; ``"allowed"``: renormalise.
        vocab_size: columns from here on are padding and never read.

    Returns:
        :class:`Selected`: log_probs ``[B, k]`` float32 best first, ``-inf`` where invalid; parents and tokens
        ``[B, k]`` int64, 0 where invalid; valid ``[B, k]`` bool.

    Numerics: a request's result is bitwise the same in any batch; see docs/numerics.md.

    Raises:
        ValueError: shapes, strides, devices or ranges differ from the above.
        TypeError: a dtype differs from the above.
    """
    check_dtype("log_probs", log_probs, torch.float32)
    check_shape("log_probs", log_probs, "[B, P]", None, None)
    batch, parents = log_probs.shape
    if isinstance(temperature, Tensor) and temperature.dim() == 1 and temperature.shape[0] == batch:
        temperature = temperature.repeat_interleave(parents)
    if bitmask is not None and bitmask.dim() == 3:
        bitmask = bitmask.flatten(0, 1)
    log_probs = log_probs.detach()
    best = top_candidates(
        logits,
        log_probs,
        k,
        bitmask=bitmask,
        temperature=row_temperature(temperature, log_probs.numel(), log_probs.device),
        active=(log_probs > -torch.inf).flatten(),
        exclude=exclude,
        normalize=normalize,
        vocab_size=vocab_size,
    )
    valid = best.log_probs > -torch.inf
    if width is not None:
        check_dtype("width", width, torch.int64)
        check_shape("width", width, "[B]", batch)
        check_same_device(log_probs=log_probs, width=width)
        valid &= torch.arange(k, device=width.device) < width[:, None]
    return Selected(
        best.log_probs.masked_fill(~valid, -torch.inf),
        best.parents.masked_fill(~valid, 0),
        best.tokens.masked_fill(~valid, 0),
        valid,
    )


def row_temperature(temperature: Tensor | float | None, rows: int, device: torch.device) -> Tensor | None:
    """A temperature per row, float32 ``[R]``, of a number or a tensor of one per row."""
    if temperature is None or isinstance(temperature, Tensor):
        return temperature
    if not isinstance(temperature, (int, float)) or isinstance(temperature, bool):
        raise TypeError(f"temperature: expected a number or a tensor, got {type(temperature).__name__}")
    if not temperature > 0:
        raise ValueError(f"temperature: expected a number above 0, got {temperature}")
    return torch.full((rows,), float(temperature), dtype=torch.float32, device=device)


def topk_log_probs(
    logits: Tensor,
    k: int,
    bitmask: Tensor | None = None,
    temperature: Tensor | float | None = None,
    *,
    normalize: str = "vocab",
    vocab_size: int | None = None,
) -> TopK:
    """Find each row's ``k`` most probable tokens and their log-probabilities, reading the logits once.

    Equivalent to::

        x = logits.float() / temperature
        log_probs, tokens = x.log_softmax(-1).topk(k)
        lse = x.logsumexp(-1)

    except that equal log-probabilities are in order (adjusted logit descending, token ascending), that NaN counts as
    ``-inf``, and that ``k`` may exceed V.

    Args:
        logits: ``[R, V]`` float32, float16 or bfloat16; unit stride over ``V``. Not modified.
        k: tokens per row, 1 or more.
        bitmask: ``[R, ceil(V / 32)]`` int32; a set bit allows its token. Words behind
            are ignored. ``None`` allows all.
        temperature: number above 0, or float32 ``[R]``; divides the logits.
        normalize: ``"vocab"``: masked tokens keep their share of the probability; ``"allowed"``: renormalise.
        vocab_size: columns from here on are padding and never read.

    Returns:
        :class:`TopK`: log_probs ``[R, k]`` float32, natural log, best first, ``-inf`` where there is no token; tokens
        ``[R, k]`` int64, 0 where there is none; lse ``[R]`` float32, of the logits after temperature, ``+inf`` for an
        invalid row (one with a +inf logit), ``-inf`` for an empty one.

    Numerics: a row's result is bitwise the same in any batch; see docs/numerics.md.

    Raises:
        ValueError: shapes, strides, devices or ranges differ from the above.
        TypeError: a dtype differs from the above.
    """
    rows = flatten_rows(logits)
    best = top_candidates(
        rows,
        torch.zeros(rows.shape[0], 1, dtype=torch.float32, device=rows.device),
        k,
        bitmask=bitmask,
        temperature=row_temperature(temperature, rows.shape[0], rows.device),
        normalize=normalize,
        vocab_size=vocab_size,
    )
    return TopK(best.log_probs, best.tokens, best.lse)
