"""Diverse siblings: a parent's later children pay for coming after the earlier ones."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..arguments import nonnegative_number
from .protocol import Expansion, Ranked
from .siblings import Children, best_children, rank_again


@dataclass(frozen=True)
class DiverseSiblings:
    """Take ``rate`` times its rank among its siblings, from 1, from the score of every child.

    Li, Monroe, Jurafsky 2016, "A simple, fast diverse decoding algorithm for neural generation", section 3. EOS is a
    child like any other. The first step, with one parent, is free; what is taken stays taken, in ``scores`` and in
    later steps, and ``log_probs`` are the model's. Finished hypotheses pay no more.
    """

    rate: float
    regimes = ("pool", "in_place")
    seed = None
    reports = ()
    weighs = False
    groups = 1

    def __post_init__(self) -> None:
        nonnegative_number("rate", self.rate)

    def select(self, expansion: Expansion, k: int) -> Ranked:
        """See :class:`flashbeam.selection.Selection`."""
        found = best_children(expansion, k)
        if expansion.first:
            return Ranked(rank_again(found, found.scores, k, expansion.divisor))
        ranks, end_ranks = _sibling_ranks(found)
        scores = found.scores - self.rate * ranks
        penalty = None if end_ranks is None else self.rate * end_ranks.flatten(1)
        return Ranked(rank_again(found, scores, k, expansion.divisor), penalty)


def _sibling_ranks(found: Children) -> tuple[Tensor, Tensor | None]:
    """float32 ``[B, P, L]`` of the children that are not EOS, and ``[B, P, n_eos]`` of those that are."""
    batch, parents, count = found.tokens.shape
    place = torch.arange(1.0, count + 1, device=found.tokens.device).expand(batch, parents, count)
    if found.ends is None:
        return place, None
    ends = tuple(
        field.view(batch, parents, -1) for field in (found.ends.log_probs, found.ends.adjusted, found.ends.tokens)
    )
    ahead = _before(ends, (found.log_probs, found.adjusted, found.tokens))  # [B, P, n_eos, L]
    behind = (~ahead & (found.log_probs > -torch.inf)[:, :, None]).sum(3)
    return place + ahead.sum(2), 1.0 + behind + _before(ends, ends).sum(2)


def _before(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> Tensor:
    """bool ``[B, P, m, n]``: children ``one [B, P, m]`` exist and are better than siblings ``other [B, P, n]``."""
    (a, x, i), (b, y, j) = (field[:, :, :, None] for field in one), (field[:, :, None, :] for field in other)
    return (a > -torch.inf) & ((a > b) | ((a == b) & ((x > y) | ((x == y) & (i < j)))))
