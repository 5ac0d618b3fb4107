"""The best candidates that a veto lets pass: it is shown the best M and no others."""

from collections.abc import Callable

import torch

from flashbeam.kernels import FLAG_INEXACT, Candidates

from ..constraint import Proposed
from .choosing import endings_of
from .protocol import Expansion, Ranked, Veto

_PER_BEAM = 4  # candidates shown for each beam, unless the constraint says how many
_LEAST = 64


def vetoed(expansion: Expansion, veto: Veto, k: int, best: Callable[[Expansion, int], Ranked]) -> Ranked:
    """The ``k`` best of the M best candidates that are not vetoed, and the EOS candidates that are not.

    A request where fewer are left than it has beams, though more were not shown, is flagged ``FLAG_INEXACT``.
    """
    count = max(k, veto.considers or max(_PER_BEAM * k, _LEAST))
    ranked = best(expansion, count)
    found, end_penalty = ranked.candidates, ranked.end_penalty
    first_row = torch.arange(0, expansion.logits.shape[0], expansion.parents, device=found.tokens.device)[:, None]
    shown = [(found.parents, found.tokens, found.log_probs)]
    ends = endings_of(expansion, found.lse, end_penalty, ranked.end_scores)
    if ends is not None:
        shown.append((ends.parents, ends.tokens, ends.log_probs))
    parents, tokens, log_probs = (torch.cat(fields, 1) for fields in zip(*shown, strict=True))
    barred = veto.ask(Proposed(first_row + parents, tokens, log_probs))

    barred, end_barred = barred[:, :count], barred[:, count:]
    there = found.log_probs > -torch.inf
    passed = there & ~barred
    order = passed.sort(dim=1, descending=True, stable=True).indices[:, :k]
    none = ~passed.gather(1, order)
    log_probs, scores, adjusted = (
        field.gather(1, order).masked_fill(none, -torch.inf)
        for field in (found.log_probs, found.scores, found.adjusted)
    )
    parents, tokens = (field.gather(1, order).masked_fill(none, 0) for field in (found.parents, found.tokens))
    short = there[:, -1] & (passed.sum(1) < expansion.limits.width)
    flags = found.flags.view(-1, expansion.parents).clone()
    flags[:, 0] |= short.int() * FLAG_INEXACT
    chosen = Candidates(log_probs, parents, tokens, adjusted, found.lse, flags.flatten(), scores)
    if ends is None:
        return ranked._replace(candidates=chosen)
    penalty = torch.where(end_barred, torch.inf, 0.0)
    penalty = penalty if end_penalty is None else end_penalty + penalty
    return ranked._replace(candidates=chosen, end_penalty=penalty)
