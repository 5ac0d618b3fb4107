"""A beam as wide as the distribution asks for."""

from dataclasses import dataclass

import torch
from torch import Tensor

from flashbeam.kernels import Choice, Endings, endings, summarize, token_log_prob, top_candidates, total_order

from ..arguments import probability
from .choosing import frozen, take
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
        slots, parents, limits = expansion.slots, expansion.parents, expansion.limits
        best = top_candidates(
            expansion.logits,
            slots.log_probs[:, :parents],
            k,
            bitmask=expansion.bitmask,
            temperature=expansion.temperature,
            active=expansion.active,
            exclude=expansion.eos,
            divisor=expansion.divisor,
            normalize=expansion.normalize,
            vocab_size=expansion.vocab_size,
        )
        increments = token_log_prob(best.adjusted, best.lse.view(-1, parents).gather(1, best.parents))
        old = frozen(expansion)
        assert expansion.divisor is not None
        norm = expansion.divisor[:, None]
        old_norm = limits.length_norm.gather(1, slots.lengths.long())
        rivals = [_choice(best.tokens, best.parents, increments, best.log_probs), old]
        nothing = torch.zeros_like(old.tokens)
        keys = [
            (best.log_probs / norm, best.parents, best.adjusted, best.tokens),
            (old.log_probs / old_norm, old.parents, nothing.float(), nothing),
        ]
        ends = None
        if expansion.eos is not None:
            ends = self._endings(expansion, best.lse)
            rivals.append(_choice(ends.tokens, ends.parents, ends.token_log_probs, ends.log_probs))
            keys.append((ends.log_probs / norm, ends.parents, ends.adjusted, ends.tokens))
        choice = take(tuple(rivals), total_order(*keys)[:, :k])
        if self.p < 1.0:  # else rounding could leave out the last
            share = (choice.log_probs.double() - self._log_mass(expansion, best.lse, old)[:, None]).exp()
            cut = share.cumsum(1) - share >= self.p * _NEARLY
            cut[:, 0] = False
            choice = choice._replace(log_probs=choice.log_probs.masked_fill(cut, -torch.inf))
        return Decided(choice, best.flags)

    @staticmethod
    def _endings(expansion: Expansion, lse: Tensor) -> Endings:
        assert expansion.eos is not None
        may_end = expansion.limits.min_length <= expansion.requests.steps + 1
        rows = (expansion.logits, lse, expansion.bitmask, expansion.temperature)
        return endings(*rows, expansion.eos, expansion.slots, may_end, None)

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


def _choice(tokens: Tensor, parents: Tensor, increments: Tensor, log_probs: Tensor) -> Choice:
    """Candidates that nothing was sampled for."""
    zeros = torch.zeros_like(log_probs)
    return Choice(tokens, parents, increments, log_probs, log_probs, zeros, zeros, torch.zeros_like(tokens))
