"""One independent draw a row: temperature, bitmask, top-k, top-p and min-p, then the inverse of the distribution.

    q[j]  = exp(x[j] / temperature) over the kept tokens, divided by its sum
    code  = random_codes(seed, child(root(row_id), offset), DRAW)
    token = the token whose interval of q holds the code
    log_prob = min(x[token] / temperature - lse, 0), lse over the whole vocabulary

The numbers drawn follow from the seed, the row's id and the offset alone. A plain draw reads the logits once, and one
tile again, and so does top-k up to 256, which draws from the list of the best. Otherwise a bitmask adds a pass, since
log-probabilities count all tokens and the draw does not, and filters add those of kernels/filters.py.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .checks import (
    check_dims,
    check_dtype,
    check_fraction,
    check_range,
    check_rows,
    check_same_device,
    check_shape,
    contiguous,
)
from .filters import filter_bitmask_op, keep_of_best
from .invert import descend, invert_cdf_op, masses
from .keys import adjust, token_log_prob
from .lse import row_lse_op
from .random import Stream, child_nodes, random_codes, root_nodes
from .select import top_candidates
from .summary import summarize_op
from .topk import row_temperature

_LISTED = 256  # up to here a list of the best is quicker than a bitmask


class Sampled(NamedTuple):
    """What :func:`sample` returns, in the shape of the logits without their last dimension."""

    tokens: Tensor  # int64; 0 where there is nothing to draw
    log_probs: Tensor  # float32, of the tempered model over the whole vocabulary; -inf where there is nothing to draw
    flags: Tensor  # int32, FLAG_NAN and FLAG_INF


def _device_number(name: str, value: Tensor | int, device: torch.device) -> Tensor:
    """int64 ``[1]`` on the device, of an int or of such a tensor."""
    if isinstance(value, Tensor):
        check_dtype(name, value, torch.int64)
        check_shape(name, value, "[1]", 1)
        return value
    check_range(name, value, -(2**63), 2**63 - 1)
    return torch.full((1,), value, dtype=torch.int64, device=device)


def _from_best(
    rows: Tensor,
    codes: Tensor,
    top_k: int,
    top_p: float,
    min_p: float,
    temperature: Tensor | None,
    bitmask: Tensor | None,
    vocab_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, log-probabilities and flags ``[R]``, drawn from the list of the ``top_k`` best: one pass."""
    start = torch.zeros(rows.shape[0], 1, dtype=torch.float32, device=rows.device)
    best = top_candidates(
        rows, start, min(top_k, vocab_size), bitmask=bitmask, temperature=temperature, vocab_size=vocab_size
    )
    keep = keep_of_best(best.adjusted, top_p, min_p)
    mass = masses(best.adjusted, best.adjusted[:, :1], None).masked_fill_(~keep, 0.0)
    place = descend(mass, codes)[0][:, None]
    return best.tokens.gather(1, place)[:, 0], best.log_probs.gather(1, place)[:, 0], best.flags


def _from_all(
    rows: Tensor,
    codes: Tensor,
    top_k: int,
    top_p: float,
    min_p: float,
    temperature: Tensor | None,
    bitmask: Tensor | None,
    vocab_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same, drawn from all that is kept."""

    def tiles(bitmask: Tensor | None) -> tuple[Tensor, Tensor]:
        _, _, ref, total, _ = summarize_op(rows, vocab_size, bitmask, temperature, None, None, True, False)
        return ref, total

    tile_ref, tile_sum = tiles(None)
    lse, flags = row_lse_op(tile_ref, tile_sum, temperature)
    drawable = lse.isfinite()
    if top_k > 0 or top_p < 1 or min_p > 0:
        bitmask = filter_bitmask_op(rows, vocab_size, bitmask, temperature, top_k, top_p, min_p)
    if bitmask is not None:
        tile_ref, tile_sum = tiles(bitmask)
        drawable &= row_lse_op(tile_ref, tile_sum, temperature)[0].isfinite()
    here = torch.arange(rows.shape[0], device=rows.device)
    tokens, _ = invert_cdf_op(rows, tile_ref, tile_sum, here, codes, vocab_size, bitmask, temperature)
    log_probs = token_log_prob(adjust(rows[here, tokens], temperature), lse)
    return tokens, log_probs.masked_fill(~drawable, -torch.inf), flags


def sample(
    logits: Tensor,
    seed: Tensor | int,
    *,
    offset: Tensor | int | None = None,
    row_ids: Tensor | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    temperature: Tensor | float | None = None,
    bitmask: Tensor | None = None,
    vocab_size: int | None = None,
) -> Sampled:
    """Draw one token for each row, independently.

    Equivalent to::

        x = (logits.float() / temperature).masked_fill(~allowed, -inf)
        tokens = keep(x, top_k, top_p, min_p).softmax(-1).multinomial(1)
        log_probs = (logits.float() / temperature).log_softmax(-1).gather(-1, tokens)

    except that a row's draw is a function of its logits, ``seed``, ``offset`` and its id, whatever its batch.

    Args:
        logits: ``[R, V]`` or ``[..., V]`` float32, float16 or bfloat16; unit stride over ``V``. Not modified.
        seed: int, or int64 ``[1]`` on the logits' device; 64 bits of key.
        offset: int, or int64 ``[1]`` on the device; another offset gives other numbers, so count it up between calls.
            ``None`` is 0.
        row_ids: int64, one per row; they name the rows for the randomness. ``None`` is ``0 .. R - 1``. Rows of one id
            draw with the same number.
        top_k: keep the best tokens, 1 or more; of equal ones the lower.
        top_p: of those, keep the shortest prefix, best first, that has this share of their mass, in (0, 1].
        min_p: of those, keep what has this share of the largest probability, in [0, 1].
        temperature: number above 0, or float32, one per row; divides the logits, before the filters.
        bitmask: ``[R, ceil(V / 32)]`` or ``[..., ceil(V / 32)]`` int32; a set bit allows its token. Words behind are
            ignored. ``None`` allows all.
        vocab_size: columns from here on are padding and never read.

    Returns:
        :class:`Sampled`. A row with nothing to draw, or with a +inf logit, gives token 0 at ``-inf``. NaN counts as
        ``-inf``.

    Numerics: probabilities are float32 exponentials, rounded to 2^-32 of the largest, and inverted in exact integers;
    kept tokens of a probability below that may be drawn a little more often. What is not kept is never drawn.

    Raises:
        ValueError: shapes, strides, devices or ranges differ from the above.
        TypeError: a dtype differs from the above.
    """
    check_dtype("logits", logits, torch.float32, torch.float16, torch.bfloat16)
    check_dims("logits", logits, 2)
    lead = logits.shape[:-1]
    rows = logits.detach().flatten(0, -2)
    count, device = rows.shape[0], rows.device
    if bitmask is not None and bitmask.dim() > 2:
        bitmask = bitmask.flatten(0, -2)
    if isinstance(temperature, Tensor) and temperature.dim() > 1:
        temperature = temperature.flatten()
    temperature = contiguous(row_temperature(temperature, count, device))
    vocab_size = check_rows(rows, vocab_size, bitmask, temperature)
    if top_k is not None:
        check_range("top_k", top_k, 1)
    top_p = 1.0 if top_p is None else check_fraction("top_p", top_p, above_zero=True)
    min_p = 0.0 if min_p is None else check_fraction("min_p", min_p, above_zero=False)
    if row_ids is None:
        row_ids = torch.arange(count, device=device)
    check_dtype("row_ids", row_ids, torch.int64)
    if row_ids.numel() != count:
        raise ValueError(f"row_ids: expected one per row of logits, {count}, got {list(row_ids.shape)}")
    seed = _device_number("seed", seed, device)
    offset = _device_number("offset", 0 if offset is None else offset, device)
    check_same_device(logits=rows, seed=seed, offset=offset, row_ids=row_ids)

    codes = random_codes(seed, child_nodes(root_nodes(row_ids.flatten()), offset), Stream.DRAW)
    if top_k is not None and top_k <= _LISTED:
        tokens, log_probs, flags = _from_best(rows, codes, top_k, top_p, min_p, temperature, bitmask, vocab_size)
    else:
        top_k = min(top_k or 0, vocab_size)
        tokens, log_probs, flags = _from_all(rows, codes, top_k, top_p, min_p, temperature, bitmask, vocab_size)
    tokens = tokens.masked_fill(log_probs == -torch.inf, 0)
    return Sampled(tokens.view(lead), log_probs.view(lead), flags.view(lead))
