"""The best candidates by a score of one's own: exact whatever it says, from the score of every token of every row.

The score of a candidate need not follow the model's log-probability, so the logits' summary cannot tell which tokens
are enough. Of every row, the k best by score are found, and the k best by adjusted logit of those that tie with the
last of them; the total order of all these begins with the k best of the request.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from flashbeam.kernels import Candidates, adjust, summarize, token_log_prob, top_candidates, total_order

from .protocol import Expansion, Ranked

# what a CPU scores at a time: memory that is new to it costs as much as arithmetic does, and a mask ten times as much
_PART = 1 << 17
_ALL = slice(None)


class Rows(NamedTuple):
    """The rows of a step as the model has them, token by token; of an invalid row, anything."""

    logits: Tensor  # [R, V]
    temperature: Tensor | None  # float32 [R, 1]
    lse: Tensor  # float32 [R]
    flags: Tensor  # int32 [R]
    best: Tensor  # float32 [R], the greatest adjusted logit that may follow and is not EOS

    def adjusted(self, part: slice = _ALL) -> Tensor:
        """float32 ``[n, V]``: logits after temperature, of part of the rows."""
        x = self.logits[part].float()
        return _no_nan(x if self.temperature is None else x / self.temperature[part])

    def token_log_probs(self, part: slice = _ALL) -> Tensor:
        """float32 ``[n, V]``, natural log; also of tokens that are barred."""
        lse = self.lse[part].masked_fill(~self.lse[part].isfinite(), torch.inf)
        return (self.adjusted(part) - lse[:, None]).clamp_(max=0.0)

    def parts(self) -> Iterator[slice]:
        """The rows, on a CPU a few at a time."""
        rows, vocab_size = self.logits.shape
        size = max(1, _PART // vocab_size if self.logits.device.type == "cpu" else rows)
        return (slice(start, start + size) for start in range(0, rows, size))


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
    found = ranked_by(expansion, rows_of(expansion), lambda part: before[part] + increments[part], k)
    return found._replace(bound=torch.full_like(found.candidates.scores[:, 0], torch.inf))


def rows_of(expansion: Expansion) -> Rows:
    """The rows, and what one pass says of them."""
    found = summarize(
        expansion.logits,
        bitmask=expansion.bitmask,
        temperature=expansion.temperature,
        active=expansion.active,
        exclude=expansion.eos,
        normalize=expansion.normalize,
        vocab_size=expansion.vocab_size,
    )
    best = adjust(found.tiles.tile_max.amax(1), expansion.temperature)
    temperature = None if expansion.temperature is None else expansion.temperature[:, None]
    return Rows(expansion.logits[:, : expansion.vocab_size], temperature, found.lse, found.flags, best)


def ranked_by(expansion: Expansion, rows: Rows, scores_of: Tensor | Callable[[slice], Tensor], k: int) -> Ranked:
    """The ``k`` best candidates by scores float32 ``[R, V]``, before a length norm; as :func:`rescored`.

    ``scores_of(part)`` gives those of part of the rows.
    """
    batch, parents = expansion.slots.scores.shape[0], expansion.parents
    active = expansion.active & rows.lse.isfinite()
    scores = torch.empty(rows.logits.shape, dtype=torch.float32, device=active.device)
    for part in rows.parts():
        given = scores_of[part] if isinstance(scores_of, Tensor) else scores_of(part)
        scores[part] = _no_nan(given + rows.adjusted(part) * 0.0)  # NaN where there is no logit
    ranks = scores if expansion.divisor is None else scores / expansion.divisor.repeat_interleave(parents)[:, None]
    best, tokens = _top_of_rows(expansion, active, ranks, k)
    last = best[:, -1:]  # -inf where there are fewer
    tied_adjusted, tied_tokens = _top_of_rows(expansion, active, _beside(rows, ranks, last), k)

    # of each row what is above the last, and what ties with it
    above = best.masked_fill(best == last, -torch.inf)
    at_last = last.masked_fill(tied_adjusted == -torch.inf, -torch.inf)
    tokens = torch.cat([tokens, tied_tokens], 1)
    parent = torch.arange(parents, device=active.device).repeat_interleave(2 * k).expand(batch, -1)
    adjusted = adjust(rows.logits.gather(1, tokens), rows.temperature)
    fields = torch.cat([above, at_last], 1), adjusted, tokens, scores.gather(1, tokens)
    ranks, adjusted, tokens, kept = (field.view(batch, -1) for field in fields)
    order = total_order((ranks, parent, adjusted, tokens))[:, :k]
    ranks, parent, adjusted, tokens, kept = (x.gather(1, order) for x in (ranks, parent, adjusted, tokens, kept))
    none = ranks == -torch.inf
    adjusted, kept = adjusted.masked_fill(none, -torch.inf), kept.masked_fill(none, -torch.inf)
    parent, tokens = parent.masked_fill(none, 0), tokens.masked_fill(none, 0)
    increments = token_log_prob(adjusted, rows.lse.view(batch, parents).gather(1, parent))
    log_probs = (expansion.slots.log_probs.gather(1, parent) + increments).masked_fill(none, -torch.inf)
    chosen = Candidates(log_probs, parent, tokens, adjusted, rows.lse, rows.flags, kept)
    if expansion.eos is None:
        return Ranked(chosen)
    return Ranked(chosen, end_scores=scores[:, expansion.eos].view(batch, -1))


def _beside(rows: Rows, ranks: Tensor, last: Tensor) -> Tensor:
    """float32 ``[R, V]``: the adjusted logits of tokens whose rank is ``last [R, 1]``, -inf elsewhere."""
    last = last.masked_fill(last == -torch.inf, torch.inf)
    found = torch.empty_like(ranks)
    for part in rows.parts():
        apart = (ranks[part] - last[part]).abs_().mul_(-torch.inf)  # NaN where there is no difference, else -inf
        found[part] = apart.nan_to_num_(nan=0.0, neginf=-torch.inf).add_(rows.adjusted(part))
    return found


def _no_nan(x: Tensor) -> Tensor:
    """``x`` with -inf for NaN."""
    return x.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)


def _top_of_rows(expansion: Expansion, active: Tensor, values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ``k`` best ``values [R, V]`` of each row and their tokens, ties by token; EOS and what is barred left out."""
    best = top_candidates(
        values,
        torch.zeros_like(values[:, :1]),
        k,
        bitmask=expansion.bitmask,
        active=active,
        exclude=expansion.eos,
        vocab_size=expansion.vocab_size,
    )
    return best.adjusted, best.tokens
