"""Conditional Poisson stochastic beams: at every step a set, drawn in proportion to the product of its odds."""

from dataclasses import dataclass

import torch
from torch import Tensor

from flashbeam.kernels import (
    FLAG_INEXACT,
    Choice,
    PoissonSample,
    Stream,
    child_nodes,
    conditional_poisson,
    random_bits,
    root_nodes,
)

from ..arguments import seed_number
from .choosing import children, frozen, summarize_drawable
from .poisson_tail import DRAWS, Rivals, split_all, split_by_tiles
from .protocol import Decided, Expansion

_DENSE = 8192  # V up to which all candidates are looked at; of more, tiles are
_WORDS = 2 + 2 * DRAWS  # random words of a place
_ERROR = 1e-4  # of an inclusion probability, above which the request is flagged


@dataclass(frozen=True)
class ConditionalPoisson:
    """Sample K sequences without replacement, deciding at every step for a set of K prefixes at once.

    Meister, Amini, Vieira, Cotterell 2021, "Conditional Poisson stochastic beams". With p the probability of a prefix,
    a set has probability in proportion to the product of p / (1 - p). ``hyps.log_inclusion`` sums, over the steps, the
    logarithms of the inclusion probabilities along a hypothesis' own path, which makes the estimator of
    :func:`flashbeam.estimate` unbiased from one run.

    The best candidates of a request, 256 of them or 1024 where V is above 8192, are treated one by one, and the others
    together by their total and their squares (kernels/poisson_tail.py): no mass is dropped. The error that makes in an
    inclusion probability is bounded at every step, and a request where the bound exceeds 1e-4 has ``FLAG_INEXACT`` in
    ``state.flags``.
    """

    seed: int
    regimes = ("in_place",)
    reports = ("sampling_log_probs", "log_inclusion")
    weighs = True
    groups = 1

    def __post_init__(self) -> None:
        seed_number("seed", self.seed)

    def select(self, expansion: Expansion, k: int) -> Decided:
        """See :class:`flashbeam.selection.Selection`."""
        drawable = summarize_drawable(expansion)
        old = frozen(expansion)
        # a place's words are its own, however many places there are
        nodes = child_nodes(root_nodes(expansion.request_ids), expansion.requests.steps.long())
        words = random_bits(expansion.seed, nodes, k * _WORDS, Stream.POISSON).view(-1, k, _WORDS)
        words, tail_words = (part.flatten(1) for part in words.split([2, 2 * DRAWS], 2))
        split = split_all if expansion.vocab_size <= _DENSE else split_by_tiles
        rivals, tail = split(expansion, drawable, k, tail_words)
        listed = torch.cat([old.sampling_log_probs, rivals.log_probs], 1)
        sizes = expansion.limits.width.long()
        if tail is None:
            sample = conditional_poisson(listed, sizes, k, words)
        else:
            sample = conditional_poisson(
                listed,
                sizes,
                k,
                words,
                tail=tail.log_odds,
                tail_log_probs=tail.drawn.log_probs,
                tail_squares=tail.log_squares,
                tail_max=tail.log_max,
                tail_error=tail.error,
                tail_more=tail.more,
            )
            rivals = Rivals(*(torch.cat(pair, 1) for pair in zip(rivals, tail.drawn, strict=True)))
        # what was chosen, of the frozen hypotheses and of the others
        place = sample.chosen.clamp(min=0)
        k_old = old.tokens.shape[1]
        mine = Rivals(*(field.gather(1, (place - k_old).clamp(min=0)) for field in rivals))
        new = children(expansion, drawable, mine.tokens, mine.parents, mine.adjusted, None)
        was_frozen, slot = place < k_old, place.clamp(max=k_old - 1)
        choice = Choice(
            *(torch.where(was_frozen, one.gather(1, slot), other) for one, other in zip(old, new, strict=True))
        )
        none = sample.chosen < 0
        choice = choice._replace(
            log_probs=choice.log_probs.masked_fill(none, -torch.inf),
            inclusion=choice.inclusion + sample.log_inclusion,
        )
        return Decided(choice, drawable.flags | _inexact(sample, expansion))


def _inexact(sample: PoissonSample, expansion: Expansion) -> Tensor:
    """int32 ``[R]``: FLAG_INEXACT in the rows of requests whose inclusion probabilities may be off."""
    off = (sample.bound > _ERROR) & ~expansion.requests.done
    return (off.int() * FLAG_INEXACT).repeat_interleave(expansion.parents)
