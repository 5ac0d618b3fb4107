"""Who may finish, where that is not the EOS candidates among the K best: see ``fb.Dialect``."""

import torch
from torch import Tensor

from flashbeam.kernels import Candidates, Endings, total_order

from .choosing import endings_of
from .protocol import Expansion, Ranked
from .siblings import Children, best_children, rank_again

REACH = 2  # times K


def among_double(expansion: Expansion, found: Ranked, k: int) -> Ranked:
    """An EOS candidate finishes if it is among the 2 K best of its request, which ``found`` holds but for EOS."""
    best = found.candidates
    kept = Candidates(*(field[:, :k] if field.dim() == 2 else field for field in best))
    ends = endings_of(expansion, best.lse, found.end_penalty, found.end_scores)
    if ends is None:
        return found._replace(candidates=kept)
    order = total_order(
        (best.scores, best.parents, best.adjusted, best.tokens), (ends.scores, ends.parents, ends.adjusted, ends.tokens)
    )
    rank = torch.arange(order.shape[1], device=order.device).expand_as(order)
    end_ranks = torch.empty_like(order).scatter_(1, order, rank)[:, best.tokens.shape[1] :]
    reach = REACH * expansion.limits.width[:, None]
    return found._replace(candidates=kept, finishing=_best_of(ends, end_ranks < reach, expansion.limits.width))


def among_row(expansion: Expansion, k: int) -> Ranked:
    """An EOS candidate finishes if its token is among the 2 K best of its row."""
    found = best_children(expansion, min(REACH * k, expansion.vocab_size))
    best = rank_again(found, found.scores, k)
    if found.ends is None:
        return Ranked(best)
    reach = REACH * expansion.limits.width[:, None, None]
    among = (_row_ranks(found, found.ends) < reach).flatten(1)
    return Ranked(best, finishing=_best_of(found.ends, among, expansion.limits.width))


def _row_ranks(found: Children, ends: Endings) -> Tensor:
    """int64 ``[B, P, n_eos]``: how many tokens of its row go before each EOS."""
    adjusted, tokens = (field.unflatten(1, (found.tokens.shape[1], -1)) for field in (ends.adjusted, ends.tokens))
    ranks = torch.zeros_like(tokens)
    for x, token in ((found.adjusted, found.tokens), (adjusted, tokens)):
        x, token = x[:, :, None, :], token[:, :, None, :]
        better = (x > adjusted[..., None]) | ((x == adjusted[..., None]) & (token < tokens[..., None]))
        ranks = ranks + (better & (x > -torch.inf)).sum(3)
    return ranks


def _best_of(ends: Endings, among: Tensor, width: Tensor) -> Tensor:
    """bool ``[B, E]``: those ``among [B, E]``, the K best at most: a pool has no place for more."""
    order = total_order((ends.scores, ends.parents, ends.adjusted, ends.tokens))
    among = (among & (ends.log_probs > -torch.inf)).gather(1, order)
    among &= among.cumsum(1) <= width[:, None]
    return torch.empty_like(among).scatter_(1, order, among)
