"""The best candidates: beam search as everyone knows it."""

from dataclasses import dataclass

from flashbeam.kernels import top_candidates

from .protocol import Expansion, Ranked


@dataclass(frozen=True)
class TopK:
    """Keep the candidates with the best scores, in the total order (docs/concepts.md)."""

    regimes = ("pool", "in_place")
    seed = None
    reports = ()
    weighs = False
    groups = 1

    def select(self, expansion: Expansion, k: int) -> Ranked:
        """See :class:`flashbeam.selection.Selection`."""
        best = top_candidates(
            expansion.logits,
            expansion.slots.log_probs[:, : expansion.parents],
            k,
            bitmask=expansion.bitmask,
            temperature=expansion.temperature,
            active=expansion.active,
            exclude=expansion.eos,
            divisor=expansion.divisor,
            normalize=expansion.normalize,
            vocab_size=expansion.vocab_size,
        )
        return Ranked(best)
