"""The best candidates by a score with terms: docs/scoring.md.

Where the score of a row's tokens follows their log-probability, the k best tokens of every row are enough; otherwise
every token is scored.
"""

import torch
from torch import Tensor

from flashbeam.kernels import Endings, next_length, token_log_prob

from ..scoring.terms import Terms
from .choosing import endings_of
from .protocol import Expansion, Ranked
from .rescored import ranked_by, rows_of
from .siblings import best_children, rank_again
from .vetoed import vetoed


def with_terms(expansion: Expansion, k: int) -> Ranked:
    """The ``k`` best candidates by score, EOS scored alike, and the bound of their scores to come."""
    found = _best(expansion, k) if expansion.veto is None else vetoed(expansion, expansion.veto, k, _best)
    if expansion.divisor is not None:  # in place no bound is asked for
        return found
    return found._replace(bound=_bound(expansion, found))


def _best(expansion: Expansion, k: int) -> Ranked:
    assert expansion.terms is not None
    return (_of_children if expansion.terms.monotone else _of_all)(expansion, expansion.terms, k)


def _of_children(expansion: Expansion, terms: Terms, k: int) -> Ranked:
    """From the ``k`` best tokens of every row."""
    batch, parents = expansion.slots.scores.shape[0], expansion.parents
    found = best_children(expansion, k)
    token_log_probs = token_log_prob(found.adjusted, found.lse.view(batch, parents, 1)).view(-1, k)
    best = _best_token(token_log_probs[:, :1], found.ends)
    seen = terms.seen(found.tokens.view(-1, k), token_log_probs, best)
    scores = terms.scores(found.log_probs.view(-1, k), seen).view_as(found.scores)
    candidates = rank_again(found, scores, k, expansion.divisor)
    if found.ends is None:
        return Ranked(candidates, best_tokens=best)
    fields = found.ends.tokens, found.ends.token_log_probs, found.ends.log_probs
    tokens, token_log_probs, log_probs = (field.reshape(best.shape[0], -1) for field in fields)
    end_scores = terms.scores(log_probs, terms.seen(tokens, token_log_probs, best)).view(batch, -1)
    return Ranked(candidates, best_tokens=best, end_scores=end_scores)


def _of_all(expansion: Expansion, terms: Terms, k: int) -> Ranked:
    """From every token."""
    rows = rows_of(expansion)
    best = _best_token(token_log_prob(rows.best, rows.lse)[:, None], endings_of(expansion, rows.lse))
    tokens = torch.arange(expansion.vocab_size, device=best.device)[None]
    before = expansion.slots.log_probs[:, : expansion.parents].reshape(-1, 1)

    def scores_of(part: slice) -> Tensor:
        token_log_probs, some = rows.token_log_probs(part), terms.part(part)
        return some.scores(before[part] + token_log_probs, some.seen(tokens, token_log_probs, best[part]))

    return ranked_by(expansion, rows, scores_of, k)._replace(best_tokens=best)


def _best_token(others: Tensor, ends: Endings | None) -> Tensor:
    """float32 ``[R, 1]``, the log-probability of the best token that may follow: EOS, or what ``others`` is of."""
    if ends is None:
        return others
    there = ends.token_log_probs.masked_fill(ends.log_probs == -torch.inf, -torch.inf)
    return torch.maximum(others, there.view(others.shape[0], -1).amax(1, keepdim=True))


def _bound(expansion: Expansion, found: Ranked) -> Tensor:
    """float32 ``[B]``: the most that a candidate which lives on can score in the end."""
    assert expansion.terms is not None and found.best_tokens is not None
    best, parents = found.candidates, expansion.parents
    batch, k = best.tokens.shape
    row = (torch.arange(0, batch * parents, parents, device=best.parents.device)[:, None] + best.parents).flatten()
    token_log_probs = token_log_prob(best.adjusted, best.lse.view(batch, parents).gather(1, best.parents))
    terms = expansion.terms.take(row)
    seen = terms.seen(best.tokens.view(-1, 1), token_log_probs.view(-1, 1), found.best_tokens.index_select(0, row))
    length = next_length(expansion.requests, expansion.limits)
    norm = expansion.limits.bound_norm.gather(1, length[:, None]).expand(batch, k).reshape(-1, 1)
    upper = terms.upper(best.log_probs.view(-1, 1), norm, seen).view(batch, k)
    inside = torch.arange(k, device=upper.device) < expansion.limits.width[:, None]
    return upper.masked_fill(~inside, -torch.inf).amax(1)
