"""A beam as wide as the distribution asks for."""

from dataclasses import dataclass

import torch
from torch import Tensor

from flashbeam.kernels import Choice, summarize, top_candidates

from ..arguments import probability
from .choosing import endings_of, rivals, take
from .protocol import Decided, Expansion

_NEARLY = 1 - 1e-6  # shares are sums of rounded numbers


@dataclass(frozen=True)
class DynamicWidth:
    """Keep the fewest candidates whose share of the mass is at least ``p``, and at most ``beam_size`` of them.

    Shaham, Levy 2022, "What do you get when you cross beam search with nucleus sampling?", dynamic beam search. The
    share is of all allowed candidates of the step, finished hypotheses included; candidates go by rank, and the one
    that crosses ``p`` is kept, where shares within 1e-6 of ``p`` count as ``p``. Few beams are read where the model is
    sure; ``p = 1`` is ``TopK`` in place.
    """

    p: float
    regimes = ("in_place",)
    seed = None
    reports = ()
    weighs = True
    groups = 1

    def __post_init__(self) -> None:
        probability("p", self.p)

    def select(self, expansion: Expansion, k: int) -> Decided:
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
        found, order = rivals(expansion, best, endings_of(expansion, best.lse))
        choice = take(found, order[:, :k])
        if self.p < 1.0:  # else rounding could leave out the last
            share = (choice.log_probs.double() - self._log_mass(expansion, best.lse, found[-1])[:, None]).exp()
            cut = share.cumsum(1) - share >= self.p * _NEARLY
            cut[:, 0] = False
            choice = choice._replace(log_probs=choice.log_probs.masked_fill(cut, -torch.inf))
        return Decided(choice, best.flags)

    @staticmethod
    def _log_mass(expansion: Expansion, lse: Tensor, old: Choice) -> Tensor:
        """float64 ``[B]``: log of the mass of all allowed candidates."""
        parents = expansion.parents
        base = expansion.slots.log_probs[:, :parents].double()
        mass = base.masked_fill(~expansion.slots.active[:, :parents] | ~lse.view_as(base).isfinite(), -torch.inf)
        if expansion.allowed is not None and expansion.normalize == "vocab":
            allowed = summarize(
                expansion.logits,
                bitmask=expansion.allowed,
                temperature=expansion.temperature,
                active=expansion.active,
                normalize="allowed",
                vocab_size=expansion.vocab_size,
            )
            mass = torch.where(mass > -torch.inf, mass + (allowed.lse - lse).view_as(mass), mass)
        both = torch.cat([mass, old.log_probs.double()], 1)
        top = both.amax(1, keepdim=True).clamp(min=-1e30)
        return (both - top).exp().cumsum(1)[:, -1].log() + top[:, 0]  # term by term: empty slots change no bit
