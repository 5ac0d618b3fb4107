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
    """

    seed: int
    regimes = ("in_place",)
    reports = ("sampling_log_probs", "log_inclusion", "perturbed")
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
        order = torch.cat([old.scores, new.scores], 1).sort(dim=1, descending=True, stable=True).indices[:, :k]
        return Decided(take((old, new), order), drawable.flags)
