"""What users write today, as plain functions that allocate as users' code does, and the least that torch can do.

``BYTES_PER_LOGIT`` counts the tensors that an implementation's operators read and write, for logits of ``n`` bytes;
what an operator keeps to itself (on CPU ``topk`` copies its row into pairs of 16 bytes) is not counted.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

BLOCKS = (1 << 15, 1 << 16, 1 << 17, 1 << 18, 1 << 19)  # elements

BYTES_PER_LOGIT: dict[str, Callable[[int], float]] = {
    # logits once, group and tile maxima written and read
    "flashbeam": lambda n: n * (1 + 2 / 32),
    # [to float: n + 4;] log_softmax 4 + 4, add 4 + 4, topk 4
    "log_softmax_topk": lambda n: (0 if n == 4 else n + 4) + 20,
    # [to float: n + 4;] amax 4, subtract 4 + 4, exp 4 + 4, sum 4; topk n
    "logsumexp_topk": lambda n: (0 if n == 4 else n + 4) + 24 + n,
    # amax n, exponentials n; their blocks stay in cache
    "floor": lambda n: 2 * n,
}


def log_softmax_topk(logits: Tensor, log_probs: Tensor, k2: int) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities ``[B, k2]``, parents and tokens of the best candidates: log_softmax, add, topk of all K * V."""
    vocab = logits.shape[-1]
    scores = log_probs[:, :, None] + logits.float().log_softmax(-1)
    values, index = scores.flatten(1).topk(k2)
    return values, index // vocab, index % vocab


def logsumexp_topk(logits: Tensor, log_probs: Tensor, k2: int) -> tuple[Tensor, Tensor, Tensor]:
    """The same by log-sum-exp and a topk of each row, merged by another: SGLang's form."""
    normalizer = logits.float().logsumexp(-1)
    values, tokens = logits.topk(min(k2, logits.shape[-1]))
    scores = values.float() - normalizer[:, :, None] + log_probs[:, :, None]
    best, index = scores.flatten(1).topk(k2)
    return best, index // values.shape[-1], tokens.flatten(1).gather(1, index)


def masked_topk(logits: Tensor, log_probs: Tensor, barred: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """A constrained step as it is usually written: masked_fill, log_softmax, topk of all K * V.

    ``barred`` is bool ``[B, K, V]``; what it takes to make it is not counted. Log-probabilities are those of
    ``normalize="allowed"``; for those of the whole vocabulary the mask would follow the log_softmax, at the same cost.
    """
    vocab = logits.shape[-1]
    scores = log_probs[:, :, None] + logits.float().masked_fill(barred, -math.inf).log_softmax(-1)
    values, index = scores.flatten(1).topk(k)
    return values, index // vocab, index % vocab


def gumbel_topk(logits: Tensor, log_probs: Tensor, perturbed: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """A step of stochastic beam search with noise for every logit: perturbed values ``[B, k]``, parents and tokens.

    That is how the authors of the method and those who copied them write it (Kool, van Hoof, Welling 2019): Gumbel
    noise, the transform that conditions the children on their parent's value, and a topk, each of all K * V candidates.
    """
    vocab = logits.shape[-1]
    phi = log_probs[:, :, None] + logits.float().log_softmax(-1)
    free = phi - torch.empty_like(phi).exponential_().log()
    gap = free - free.amax(-1, keepdim=True)
    v = perturbed[:, :, None] - free + torch.log1p(-gap.exp())
    found = perturbed[:, :, None] - v.clamp(min=0) - torch.log1p((-v.abs()).exp())
    values, index = found.flatten(1).topk(k)
    return values, index // vocab, index % vocab


def floor(logits: Tensor, block: int = 1 << 17, base2: bool = True) -> tuple[Tensor, float]:
    """One ``amax`` and one sum of exponentials in blocks of ``block`` logits: nothing exact can do less.

    ``base2``: multiply by log2(e) and take ``exp2``, which is vectorised everywhere, instead of ``exp``, which is MKL's
    where torch has it, and three times slower on AMD. Which form and block are faster depends on the machine: time them
    all (``floors``). Not for use: logits are not shifted by their maximum.
    """
    maxima = logits.amax(-1)
    if logits.device.type != "cpu":  # no cache to block for, and a GPU is bound by the one read
        return maxima, 0.0
    flat = logits.view(-1)
    work = torch.empty(min(block, flat.numel()), dtype=torch.float32)
    partial_sums = []
    for part in flat.split(block):
        out = work[: part.numel()]
        if not base2 and part.dtype == torch.float32:
            torch.exp(part, out=out)
        elif not base2:
            out.copy_(part).exp_()
        elif part.dtype == torch.float32:
            torch.mul(part, math.log2(math.e), out=out).exp2_()
        else:
            out.copy_(part).mul_(math.log2(math.e)).exp2_()
        partial_sums.append(out.sum())
    return maxima, float(torch.stack(partial_sums).sum())


def floors(logits: Tensor) -> dict[str, Callable[[], object]]:
    """Every form of :func:`floor`, by name; the fastest of them is the floor."""
    return {
        f"{'exp2' if base2 else 'exp'}-{block >> 10}k": partial(floor, logits, block, base2)
        for base2 in (True, False)
        for block in BLOCKS
    }


def disagreement(
    logits: Tensor,
    log_probs: Tensor,
    ours: tuple[Tensor, Tensor, Tensor],
    theirs: tuple[Tensor, Tensor, Tensor],
    tolerance: float = 1e-4,
) -> str | None:
    """Why two results (log_probs, parents, tokens), best first, are not the same answer, or ``None`` if they are.

    Where neighbouring scores are closer than ``tolerance``, implementations may order them differently: there, what was
    chosen has to have the score it claims.
    """
    k = ours[0].shape[1]
    values, parents, tokens = (field[:, : k + 1] for field in theirs)
    error = float((ours[0] - values[:, :k]).abs().max())
    if not error <= tolerance:
        return f"log-probabilities differ by {error:.2g}"
    gap = (values[:, :-1] - values[:, 1:]) > 2 * tolerance
    edge = gap.new_ones(gap.shape[0], 1)
    alone = (torch.cat([edge, gap], 1) & torch.cat([gap, edge], 1))[:, :k]
    differs = (ours[1] != parents[:, :k]) | (ours[2] != tokens[:, :k])
    if bool((alone & differs).any()):
        return f"{int((alone & differs).sum())} candidates differ"
    request = torch.arange(logits.shape[0], device=logits.device)[:, None]
    if any(len(set(zip(*pair, strict=True))) < k for pair in zip(ours[1].tolist(), ours[2].tolist(), strict=True)):
        return "a candidate occurs twice"
    normalizer = torch.stack([row.double().logsumexp(-1) for row in logits])  # float64 for one request at a time
    chosen = logits[request, ours[1], ours[2]].double() - normalizer.gather(1, ours[1]) + log_probs.gather(1, ours[1])
    error = float((chosen - ours[0]).abs().max())
    return None if error <= tolerance else f"log-probabilities claimed are off by {error:.2g}"
