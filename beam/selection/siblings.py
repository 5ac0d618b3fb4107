"""The children of each parent, best first: what the diverse rules rank anew."""

from typing import NamedTuple

import torch
from torch import Tensor

from flashbeam.kernels import Candidates, Endings, token_log_prob, top_candidates

from .choosing import endings_of
from .protocol import Expansion


class Children(NamedTuple):
    """The best children of every parent that are not EOS, and the EOS ones."""

    log_probs: Tensor  # float32 [B, P, L], cumulative, the model's; -inf where there is none
    scores: Tensor  # float32 [B, P, L], accumulated, this step not penalised
    tokens: Tensor  # int64 [B, P, L]
    adjusted: Tensor  # float32 [B, P, L]
    lse: Tensor  # float32 [R]
    flags: Tensor  # int32 [R]
    ends: Endings | None  # [B, P * n_eos]


def best_children(expansion: Expansion, count: int) -> Children:
    """The ``count`` best children of each parent, from one pass over the logits."""
    parents = expansion.parents
    slots, rows = expansion.slots, expansion.logits.shape[0]
    best = top_candidates(
        expansion.logits,
        slots.log_probs[:, :parents].reshape(rows, 1),
        count,
        bitmask=expansion.bitmask,
        temperature=expansion.temperature,
        active=expansion.active,
        exclude=expansion.eos,
        normalize=expansion.normalize,
        vocab_size=expansion.vocab_size,
    )
    log_probs, tokens, adjusted = (
        field.view(-1, parents, count) for field in (best.log_probs, best.tokens, best.adjusted)
    )
    increments = token_log_prob(adjusted, best.lse.view(-1, parents, 1))
    scores = (slots.scores[:, :parents, None] + increments).masked_fill(log_probs == -torch.inf, -torch.inf)
    ends = endings_of(expansion, best.lse)
    return Children(log_probs, scores, tokens, adjusted, best.lse, best.flags, ends)


def rank_again(found: Children, scores: Tensor, k: int, divisor: Tensor | None = None) -> Candidates:
    """The ``k`` best of all children of each request by ``scores [B, P, L]``.

    Siblings come in order of adjusted logit and token, and parents in theirs: a stable sort is the total order.
    """
    rank = scores if divisor is None else scores / divisor[:, None, None]
    order = rank.flatten(1).sort(dim=1, descending=True, stable=True).indices[:, :k]
    log_probs, scores, tokens, adjusted = (
        field.flatten(1).gather(1, order) for field in (found.log_probs, scores, found.tokens, found.adjusted)
    )
    return Candidates(log_probs, order // found.tokens.shape[2], tokens, adjusted, found.lse, found.flags, scores)
