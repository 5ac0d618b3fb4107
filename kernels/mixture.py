"""The rows of several models as one: a mixture of their distributions, or of their log-probabilities.

    a_i[j] = x_i[j] / temperature_i                    the adjusted logits of model i, of M
    probability:  y[j] = log sum over i of w_i exp(a_i[j] - lse_i)
    log:          y[j] = sum over i of w_i a_i[j]              without lse
                  y[j] = sum over i of w_i min(a_i[j] - lse_i, 0)

A model with weight 0 in a row is not read there. Where one model alone has a weight, its probability mixture is
itself: ``y = a_i``, so that a search of it has the bits of a search of that model alone. ``y`` is not normalised: what
reads it next does that. A NaN makes ``y`` NaN at its token, and +inf, or an infinite lse of a probability mixture,
makes it +inf: ``summarize`` then reports the fault as of any row. A model may be one-hot: all its mass at one token,
without reading it.

One program owns a block of one row and reads each tensor once, four of them at a time. Traffic per row:
``sum of V * sizeof(x_i) + 4 V`` bytes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .checks import check_candidates, check_dtype, check_rows, check_same_device, check_shape, check_tensor, contiguous
from .exponential import exp, log
from .registration import register
from .row_blocks import adjusted_rows, row_blocks, row_log_probs


class _Rows:
    """The models' rows, some at a time."""

    def __init__(
        self,
        logits: list[Tensor],
        lse: Tensor | None,
        temperature: Tensor | None,
        onehot: Tensor | None,
        vocab_size: int,
    ):
        self.logits, self.lse, self.temperature, self.onehot = logits, lse, temperature, onehot
        self.vocab_size = vocab_size

    def adjusted(self, i: int, rows: Tensor | slice) -> Tensor:
        """float32 ``[n, V]``, not to be changed."""
        temperature = None if self.temperature is None else self.temperature[:, i]
        a = adjusted_rows(self.logits[i], rows, self.vocab_size, temperature)
        if self.onehot is None:
            return a
        at = self.onehot[rows, i, None]
        tokens = torch.arange(self.vocab_size, device=a.device)
        return torch.where(at < 0, a, torch.where(tokens == at, 0.0, -torch.inf))

    def lse_of(self, i: int, rows: Tensor | slice) -> Tensor:
        """float32 ``[n, 1]``."""
        assert self.lse is not None
        lse = self.lse[rows, i, None]
        return lse if self.onehot is None else lse.masked_fill(self.onehot[rows, i, None] >= 0, 0.0)


def _log_of_sum(rows: _Rows, some: Tensor | slice, weights: Tensor) -> Tensor:
    """The probability mixture of rows ``some [n]``, of which each has a positive one among its ``weights [n, M]``."""
    terms = []
    for i, weight in enumerate(weights[:, :, None].unbind(1)):
        if bool((weight > 0).any()):
            lse = rows.lse_of(i, some)
            l = rows.adjusted(i, some) - lse.masked_fill(lse == -torch.inf, 0.0)  # a row of -inf stays one
            if not bool(lse.isfinite().all()):
                l.masked_fill_(lse == torch.inf, torch.inf)
            if bool((weight == 0).any()):
                l.masked_fill_(weight == 0, -torch.inf)
            terms.append((l, weight))
    top = terms[0][0]
    for l, _ in terms[1:]:
        top = torch.maximum(top, l)
    if not bool(top.sum().isfinite()):
        top = top.masked_fill(top.abs() == torch.inf, 0.0)  # -inf - -inf would be NaN
    sums = [exp(l - top).mul_(weight) for l, weight in terms]
    total = sums[0]
    for more in sums[1:]:
        total += more
    return log(total).add_(top)


def _sum_of_logs(rows: _Rows, some: Tensor | slice, weights: Tensor) -> Tensor:
    """The log mixture of rows ``some [n]`` by ``weights [n, M]``."""
    total = None
    for i, weight in enumerate(weights[:, :, None].unbind(1)):
        a = rows.adjusted(i, some)
        if rows.lse is not None:
            a = row_log_probs(a, rows.lse_of(i, some))
        a = a * weight
        if bool((weight == 0).any()):
            a.masked_fill_(weight == 0, 0.0)  # 0 * -inf would be NaN
        total = a if total is None else total.add_(a)
    assert total is not None
    return total


def _mixture(
    logits: list[Tensor],
    weights: Tensor,
    lse: Tensor | None,
    temperature: Tensor | None,
    onehot: Tensor | None,
    active: Tensor | None,
    vocab_size: int,
    loglinear: bool,
) -> Tensor:
    """The torch definition."""
    out: Tensor = _fake(logits, weights, lse, temperature, onehot, active, vocab_size, loglinear)
    rows = _Rows(logits, lse, temperature, onehot, vocab_size)
    weights = torch.where(weights > 0, weights, 0.0)
    positive = weights > 0
    read = torch.ones_like(positive[:, 0]) if active is None else active
    out[read & ~positive.any(1)] = -torch.inf
    alone = torch.zeros_like(read) if loglinear else positive.sum(1) == 1
    for i in range(len(logits)):
        for some in row_blocks(read & alone & positive[:, i], vocab_size):
            out[some] = rows.adjusted(i, some)
    combine = _sum_of_logs if loglinear else _log_of_sum
    for some in row_blocks(read & ~alone & positive.any(1), vocab_size):
        out[some] = combine(rows, some, weights[some])
    return out


def _fake(
    logits: list[Tensor],
    weights: Tensor,
    lse: Tensor | None,
    temperature: Tensor | None,
    onehot: Tensor | None,
    active: Tensor | None,
    vocab_size: int,
    loglinear: bool,
) -> Tensor:
    return weights.new_empty((weights.shape[0], vocab_size))


mixture_op = register(
    "mixture(Tensor[] logits, Tensor weights, Tensor? lse, Tensor? temperature, Tensor? onehot, Tensor? active, "
    "SymInt vocab_size, bool loglinear) -> Tensor",
    _mixture,
    _fake,
    "mixture",
)


def mixture(
    logits: Sequence[Tensor],
    weights: Tensor,
    *,
    kind: str = "probability",
    lse: Tensor | None = None,
    temperature: Tensor | None = None,
    onehot: Tensor | None = None,
    active: Tensor | None = None,
    vocab_size: int | None = None,
) -> Tensor:
    """Make one row of logits of the rows of several models.

    Equivalent to, for ``"probability"`` and for ``"log"``::

        a = torch.stack([x.float() for x in logits]) / temperature.T[:, :, None]
        (a.log_softmax(-1) + weights.T.log()[:, :, None]).logsumexp(0)
        (a * weights.T[:, :, None]).sum(0)

    except that a model is not read where its weight is 0, that a row in which one model alone has a weight is that
    model's own (``"probability"``), and that data faults come through.

    Args:
        logits: M tensors ``[R, V]`` float32, float16 or bfloat16, each its own; unit stride over ``V``. Not modified.
        weights: ``[R, M]`` float32; what is not above 0 counts as 0. Taken relative to their sum (``"probability"``).
        kind: ``"probability"`` or ``"log"``.
        lse: ``[R, M]`` float32, each model's log-sum-exp after temperature, as ``summarize`` gives it; needed for
            ``"probability"``, where several models have a weight. With ``"log"`` it makes the sum one of
            log-probabilities.
        temperature: ``[R, M]`` float32 above 0; divides the models' logits.
        onehot: ``[R, M]`` int64; a token that holds all of the model's mass, or -1 where its logits say.
        active: ``[R]`` bool; rows that are not are not read, and hold anything.
        vocab_size: columns from here on are padding and never read.

    Returns:
        ``[R, vocab_size]`` float32, not normalised. A row without weights is ``-inf``.

    Numerics: ``"log"`` adds products up in order of the models, rounding each; ``"probability"`` errs by a few ulps.
        A row's bits depend on that row only.

    Raises:
        ValueError: shapes, strides, devices or ranges differ from the above.
        TypeError: a dtype differs from the above.
    """
    if not logits:
        raise ValueError("logits: expected one tensor or more, got none")
    for i, x in enumerate(logits):
        check_tensor(f"logits[{i}]", x)
        if i:
            check_shape(f"logits[{i}]", x, "[R, V]", *logits[0].shape)
        vocab_size = check_rows(x, vocab_size, None, None, f"logits[{i}]")
    rows, models = logits[0].shape[0], len(logits)
    check_candidates(logits[0], active, None)
    per_model = {"weights": weights, "lse": lse, "temperature": temperature}
    for name, tensor in per_model.items():
        if tensor is not None:
            check_dtype(name, tensor, torch.float32)
            check_shape(name, tensor, "[R, M]", rows, models)
    if onehot is not None:
        check_dtype("onehot", onehot, torch.int64)
        check_shape("onehot", onehot, "[R, M]", rows, models)
    if kind not in ("probability", "log"):
        raise ValueError(f"kind: expected 'probability' or 'log', got {kind!r}")
    if kind == "probability" and lse is None:
        raise ValueError("lse: expected a tensor for kind='probability', got None")
    tensors = {f"logits[{i}]": x for i, x in enumerate(logits)}
    check_same_device(**tensors, **per_model, onehot=onehot)
    small = (contiguous(field) for field in (weights, lse, temperature, onehot, active))
    return mixture_op([x.detach() for x in logits], *small, vocab_size, kind == "log")
