"""The best candidates: beam search as everyone knows it."""

from dataclasses import dataclass

from flashbeam.kernels import Candidates, top_candidates

from .protocol import Expansion


@dataclass(frozen=True)
class TopK:
    """Keep the candidates with the best scores, in the total order (docs/concepts.md)."""

    regimes = ("pool", "in_place")

    def select(self, expansion: Expansion, k: int) -> Candidates:
        """See :class:`flashbeam.selection.Selection`."""
        return top_candidates(
            expansion.logits,
            expansion.log_probs,
            k,
            bitmask=expansion.bitmask,
            temperature=expansion.temperature,
            active=expansion.active,
            exclude=expansion.exclude,
            divisor=expansion.divisor,
            normalize=expansion.normalize,
            vocab_size=expansion.vocab_size,
        )
