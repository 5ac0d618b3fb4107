"""The best candidates by a score of one's own: exact whatever it says, from the score of every token of every row.

The score of a candidate need not follow the model's log-probability, so the logits' summary cannot tell which tokens
are enough. Of every row, the k best by score are found, and the k best by adjusted logit of those that tie with the
last of them; the total order of all these begins with the k best of the request.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from flashbeam.kernels import Candidates, Endings, adjust, summarize, token_log_prob, top_candidates, total_order

from .choosing import endings_of
from .protocol import Expansion, Ranked


class Rows(NamedTuple):
    """The rows of a step as the model has them, token by token."""

    adjusted: Tensor  # float32 [R, V], logits after temperature
    lse: Tensor  # float32 [R]
    flags: Tensor  # int32 [R]
    best: Tensor  # float32 [R], the greatest adjusted logit that may follow and is not EOS

    def token_log_probs(self) -> Tensor:
        """float32 ``[R, V]``, natural log; also of tokens that are barred."""
        return token_log_prob(self.adjusted, self.lse[:, None])


def rescored(expansion: Expansion, increments: Tensor, k: int) -> Ranked:
    """The ``k`` best candidates by ``slots.scores[parent] + increments[row, token]``, in the total order.

    Args:
        expansion: what is to be expanded; its ``listed``, ``banks`` and ``veto`` are not looked at.
        increments: float32 ``[R, vocab_size]`` of either sign; ``-inf`` or NaN bars a token. Rows that are not active
            are not looked at. Those of EOS give the EOS candidates their scores.
        k: candidates per request.

    Returns:
        Candidates whose ``log_probs``, ``adjusted`` and ``lse`` are the model's; nothing bounds what they can become.
    """
    before = expansion.slots.scores[:, : expansion.parents].reshape(-1, 1)
    found = ranked_by(expansion, rows_of(expansion), before + increments, k)
    return found._replace(bound=torch.full_like(found.candidates.scores[:, 0], torch.inf))


def rows_of(expansion: Expansion) -> Rows:
    """Every token's adjusted logit, and what one pass says of the rows."""
    found = summarize(
        expansion.logits,
        bitmask=expansion.bitmask,
        temperature=expansion.temperature,
        active=expansion.active,
        exclude=expansion.eos,
        normalize=expansion.normalize,
        vocab_size=expansion.vocab_size,
    )
    temperature = None if expansion.temperature is None else expansion.temperature[:, None]
    adjusted = adjust(expansion.logits[:, : expansion.vocab_size], temperature)
    best = adjust(found.tiles.tile_max.amax(1), expansion.temperature)
    return Rows(adjusted, found.lse, found.flags, best)


def ranked_by(expansion: Expansion, rows: Rows, scores: Tensor, k: int) -> Ranked:
    """The ``k`` best candidates by ``scores [R, V]``, float32, before a length norm; as :func:`rescored`."""
    batch, parents = expansion.slots.scores.shape[0], expansion.parents
    absent = (rows.adjusted == -torch.inf) | ~rows.lse.isfinite()[:, None]
    ranks = scores if expansion.divisor is None else scores / expansion.divisor.repeat_interleave(parents)[:, None]
    ranks = ranks.masked_fill(absent, -torch.inf)
    best, tokens = _top_of_rows(expansion, ranks, k)
    last = best[:, -1:]  # -inf where there are fewer
    tied = (ranks == last) & (last > -torch.inf)
    tied_adjusted, tied_tokens = _top_of_rows(expansion, rows.adjusted.masked_fill(~tied, -torch.inf), k)

    above = best.masked_fill(best == last, -torch.inf)
    tokens = torch.cat([tokens, tied_tokens], 1)
    ranks = torch.cat([above, last.masked_fill(tied_adjusted == -torch.inf, -torch.inf)], 1)
    parent = torch.arange(parents, device=tokens.device).repeat_interleave(2 * k).expand(batch, -1)
    of_rows = (ranks, rows.adjusted.gather(1, tokens), tokens, scores.gather(1, tokens))
    ranks, adjusted, tokens, kept = (field.reshape(batch, -1) for field in of_rows)
    order = total_order((ranks, parent, adjusted, tokens))[:, :k]
    ranks, parent, adjusted, tokens, kept = (x.gather(1, order) for x in (ranks, parent, adjusted, tokens, kept))

    none = ranks == -torch.inf
    adjusted, kept = adjusted.masked_fill(none, -torch.inf), kept.masked_fill(none, -torch.inf)
    parent, tokens = parent.masked_fill(none, 0), tokens.masked_fill(none, 0)
    increments = token_log_prob(adjusted, rows.lse.view(batch, parents).gather(1, parent))
    log_probs = (expansion.slots.log_probs.gather(1, parent) + increments).masked_fill(none, -torch.inf)
    found = Candidates(log_probs, parent, tokens, adjusted, rows.lse, rows.flags, kept)
    if expansion.eos is None:
        return Ranked(found)
    ends = endings_of(expansion, rows.lse)
    assert ends is not None
    return Ranked(found, penalty_of_ends(ends, scores[:, expansion.eos].view(batch, -1)))


def penalty_of_ends(ends: Endings, scores: Tensor) -> Tensor:
    """What is to be taken from the EOS candidates, float32 ``[B, P * n_eos]``, to leave them with ``scores``."""
    there = (ends.log_probs > -torch.inf) & (scores > -torch.inf)
    return (ends.scores - scores).masked_fill(~there, torch.inf)


def _top_of_rows(expansion: Expansion, values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ``k`` best ``values [R, V]`` of each row and their tokens, ties by token; EOS and what is barred left out."""
    best = top_candidates(
        values,
        torch.zeros_like(values[:, :1]),
        k,
        bitmask=expansion.bitmask,
        active=expansion.active,
        exclude=expansion.eos,
        vocab_size=expansion.vocab_size,
    )
    return best.adjusted, best.tokens
