"""Independent samples, from the model or from its head."""

from dataclasses import dataclass

import torch

from flashbeam.kernels import Stream, filter_bitmask, random_codes

from ..arguments import probability, seed_number, share, whole_number
from .choosing import summarize_drawable
from .independent import draw_rows, own_parents
from .protocol import Decided, Expansion


@dataclass(frozen=True)
class Sample:
    """Draw every row on its own, token by token; what is drawn twice is there twice.

    Filters apply after the temperature, in this order, each to what the former left: the ``top_k`` best tokens; the
    fewest tokens whose mass is at least ``top_p``, the one that crosses included (Holtzman et al. 2020); those at least
    ``min_p`` times as probable as the best (Nguyen et al. 2024). Ties go to the lower token. ``log_probs`` are the
    model's, before filters; ``sampling_log_probs`` are of what was drawn from.
    """

    seed: int
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    regimes = ("in_place",)
    reports = ("sampling_log_probs",)
    weighs = True
    groups = 1

    def __post_init__(self) -> None:
        seed_number("seed", self.seed)
        if self.top_k is not None:
            whole_number(1)("top_k", self.top_k)
        if self.top_p is not None:
            probability("top_p", self.top_p)
        if self.min_p is not None:
            share("min_p", self.min_p)

    def select(self, expansion: Expansion, k: int) -> Decided:
        """See :class:`flashbeam.selection.Selection`."""
        filtered = None
        if (self.top_k, self.top_p, self.min_p) != (None, None, None):
            filtered = filter_bitmask(
                expansion.logits,
                top_k=self.top_k,
                top_p=self.top_p,
                min_p=self.min_p,
                bitmask=expansion.bitmask,
                temperature=expansion.temperature,
                vocab_size=expansion.vocab_size,
            )
        drawable = summarize_drawable(expansion, filtered)
        parents = own_parents(expansion)
        slot = torch.arange(k, device=parents.device).expand_as(parents).contiguous()
        codes = random_codes(expansion.seed, expansion.draws.nodes.gather(1, parents), Stream.SAMPLE, slot)
        mask = expansion.bitmask if filtered is None else filtered
        return Decided(draw_rows(expansion, drawable, mask, codes), drawable.flags)
