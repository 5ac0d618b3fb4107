"""The best candidates: beam search as everyone knows it."""

from dataclasses import dataclass
from typing import Any

import torch

from flashbeam.kernels import top_candidates, top_listed

from .banked import banked
from .finishing import REACH, among_double, among_row
from .protocol import Decided, Expansion, Ranked
from .vetoed import vetoed
from .with_increments import with_increments
from .with_terms import with_terms


@dataclass(frozen=True)
class TopK:
    """Keep the candidates with the best scores, in the total order (docs/concepts.md).

    With ``fb.Phrases`` beams of every progress are kept, the best of each in turn; with a constraint that vetoes, the
    best that it lets pass.
    """

    regimes = ("pool", "in_place")
    seed = None
    reports = ()
    weighs = False
    groups = 1
    uses = ("lists", "banks", "veto", "finishes", "terms")

    def select(self, expansion: Expansion, k: int) -> Ranked | Decided:
        """See :class:`flashbeam.selection.Selection`."""
        if expansion.increments is not None:
            return with_increments(expansion, k)
        if expansion.terms is not None:
            return with_terms(expansion, k)
        if expansion.banks is not None:
            return banked(expansion, k)
        if expansion.veto is not None:
            return vetoed(expansion, expansion.veto, k, best)
        if expansion.finishes == "row":
            return among_row(expansion, k)
        if expansion.finishes == "double":
            return among_double(expansion, best(expansion, REACH * k), k)
        return best(expansion, k)


def best(expansion: Expansion, count: int) -> Ranked:
    """The ``count`` best candidates that are not EOS: of lists where there are some, else of whole rows."""
    options: dict[str, Any] = {
        "bitmask": expansion.bitmask,
        "temperature": expansion.temperature,
        "active": expansion.active,
        "divisor": expansion.divisor,
        "normalize": expansion.normalize,
        "vocab_size": expansion.vocab_size,
    }
    log_probs = expansion.slots.log_probs[:, : expansion.parents]
    listed = expansion.listed
    if listed is None:
        return Ranked(top_candidates(expansion.logits, log_probs, count, exclude=expansion.eos, **options))
    found = top_listed(expansion.logits, log_probs, count, listed, ends=expansion.eos, **options)
    if expansion.eos is None or listed.may_end is None:
        return Ranked(found)
    barred = torch.where(listed.may_end, 0.0, torch.inf).view_as(log_probs)
    return Ranked(found, barred.repeat_interleave(expansion.eos.shape[0], 1))
