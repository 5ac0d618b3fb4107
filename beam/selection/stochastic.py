"""Stochastic beam search: a sample without replacement of whole sequences."""

from dataclasses import dataclass

import torch

from flashbeam.kernels import Stream, draw_children, gumbel, random_bits

from ..arguments import seed_number
from .choosing import children, frozen, summarize_drawable, take
from .protocol import Decided, Expansion


@dataclass(frozen=True)
class Stochastic:
    """Sample K distinct sequences without replacement, each with its probability under the model.

    Kool, van Hoof, Welling 2019, "Stochastic beams and where to find them". The hypotheses are those of the K greatest
    perturbed log-probabilities, in that order (Plackett-Luce), and ``scores`` are these. ``hyps.log_inclusion`` is the
    log-probability that a sequence exceeds the K-th, for :func:`flashbeam.estimate`. With one seed the K-sample is the
    beginning of the K'-sample. Temperature and masks are part of the distribution that is sampled.

    Where masks leave a chosen prefix without a continuation, its place stays empty and fewer than K sequences may come
    back. The threshold is the greatest K-th value of any step, which keeps the estimates unbiased: what exceeds it was
    never passed over.
    """

    seed: int
    regimes = ("in_place",)
    reports = ("sampling_log_probs", "log_inclusion", "perturbed", "threshold")
    weighs = True
    groups = 1

    def __post_init__(self) -> None:
        seed_number("seed", self.seed)

    def select(self, expansion: Expansion, k: int) -> Decided:
        """See :class:`flashbeam.selection.Selection`."""
        drawable = summarize_drawable(expansion)
        slots, draws, parents = expansion.slots, expansion.draws, expansion.parents
        closed = ~slots.active[:, :parents]
        perturbed = slots.scores[:, :parents]
        if expansion.first:  # the root's own: fixed to 0 it would bias every estimate
            noise = gumbel(random_bits(expansion.seed, draws.nodes[:, :parents].contiguous(), 1, Stream.ROOT))
            perturbed = perturbed + noise[:, :, 0]
        drawn = draw_children(
            expansion.logits,
            draws.sampling_log_probs[:, :parents].masked_fill(closed, -torch.inf),
            perturbed.masked_fill(closed, -torch.inf),
            draws.nodes[:, :parents],
            drawable.tiles.tile_ref,
            drawable.tiles.tile_sum,
            drawable.lse,
            k,
            expansion.seed,
            bitmask=expansion.bitmask,
            temperature=expansion.temperature,
            vocab_size=expansion.vocab_size,
        )
        new = children(expansion, drawable, drawn.tokens, drawn.parents, drawn.adjusted, drawn.perturbed)
        old = frozen(expansion)
        rank = torch.cat([old.scores, new.scores], 1).sort(dim=1, descending=True, stable=True)
        choice = take((old, new), rank.indices[:, :k])
        # the K-th greatest so far: it grows from step to step but where a prefix that took a place has no continuation
        threshold = rank.values.gather(1, expansion.limits.width.long()[:, None] - 1)
        if not expansion.first:
            before = draws.inclusion.masked_fill(slots.log_probs == -torch.inf, -torch.inf).amax(1, keepdim=True)
            threshold = torch.maximum(threshold, before)
        return Decided(choice._replace(inclusion=threshold.expand_as(choice.scores)), drawable.flags)
