"""Stochastic beam search: a sample without replacement of whole sequences."""

from dataclasses import dataclass

import torch

from flashbeam.kernels import Choice, Stream, draw_children, gumbel, random_bits, token_log_prob

from ..arguments import seed_number
from .choosing import frozen, summarize_allowed, take
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
        allowed = summarize_allowed(expansion)
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
            allowed.tiles.tile_ref,
            allowed.tiles.tile_sum,
            allowed.lse,
            k,
            expansion.seed,
            bitmask=expansion.bitmask,
            temperature=expansion.temperature,
            vocab_size=expansion.vocab_size,
        )
        none = drawn.perturbed == -torch.inf
        increment, sampling_increment = (
            token_log_prob(drawn.adjusted, lse.view(-1, parents).gather(1, drawn.parents)).masked_fill(none, -torch.inf)
            for lse in (allowed.model_lse, allowed.lse)
        )
        children = Choice(
            tokens=drawn.tokens,
            parents=drawn.parents,
            token_log_probs=increment,
            log_probs=slots.log_probs.gather(1, drawn.parents) + increment,
            scores=drawn.perturbed,
            sampling_log_probs=draws.sampling_log_probs.gather(1, drawn.parents) + sampling_increment,
            log_inclusion=torch.zeros_like(increment),
            codes=torch.zeros_like(drawn.tokens),
        )
        rivals = (frozen(expansion), children)
        scores = torch.cat([rival.scores for rival in rivals], 1)
        order = scores.sort(dim=1, descending=True, stable=True).indices[:, :k]
        return Decided(take(rivals, order), allowed.flags)
