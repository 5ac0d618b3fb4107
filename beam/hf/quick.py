"""The best candidates on a CPU in few operations, for the calls of ``generate``.

The same candidates in the same order as ``top_candidates``, except that the log-sum-exp is that of torch's own
``log_softmax``, as in transformers: log-probabilities may differ in their last bits. It is the same whatever
else is in the batch: rows that are not finite have the other log-sum-exp, each for itself, and where more than a few
candidates tie, ``ranked_by`` tells them apart with this one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flashbeam.kernels import Candidates, total_order

from ..selection import Expansion, Ranked
from ..selection.rescored import ranked_by, rows_of

_SIZE = 32  # logits of a group, of which one maximum is kept
_TIES = 32  # candidates and groups beyond those asked for, which may tie with the last of them
_BLOCK = 1 << 19  # logits that are read at a time: they and what is made of them stay in cache


class Quick:
    """Finds candidates of one search, step after step, where finished hypotheses go to a pool."""

    def __init__(self) -> None:
        self.buffer: Tensor | None = None  # for log-probabilities of some rows
        self.members: Tensor | None = None  # int64 [32], places of a group's members behind its first

    def find(self, expansion: Expansion, k: int) -> Ranked | None:
        """The ``k`` best candidates that are not EOS, or ``None`` where this is not the way to find them."""
        logits = expansion.logits
        plain = expansion.bitmask is None and expansion.temperature is None and expansion.divisor is None
        plain = plain and expansion.listed is None and expansion.vocab_size == logits.shape[1]
        if not plain or logits.device.type != "cpu" or logits.shape[1] < _SIZE:
            return None
        logits = logits.float()
        groups, lse = self._read(logits)
        found = self._tied(expansion, logits, groups, lse, k)
        return _slowly(expansion, lse, k) if found is None else Ranked(found)

    def _tied(self, expansion: Expansion, logits: Tensor, groups: Tensor, lse: Tensor, k: int) -> Candidates | None:
        """Those of finite rows with few ties; ``None`` if there is anything else."""
        if not bool(lse.isfinite().all()):
            return None
        # rows that are not active have log-probability -inf, or are of requests that are done
        before = expansion.slots.log_probs[:, : expansion.parents].reshape(-1)
        batch, parents = before.shape[0] // expansion.parents, expansion.parents
        scores = _continued(before[:, None], groups, lse[:, None]).view(batch, -1)
        ends = [] if expansion.eos is None else expansion.eos.tolist()
        # a group whose maximum is EOS may have no candidate
        count = min(k + _TIES + parents * len(ends), scores.shape[1])
        cut, place = scores.topk(count, sorted=False)  # [B, n]
        parent, column = place // groups.shape[1], place % groups.shape[1]
        row = parent if batch == 1 else parent + torch.arange(0, batch * parents, parents)[:, None]
        token, barred = self._tokens(column, logits.shape[1])
        for eos in ends:
            barred = token == eos if barred is None else barred | (token == eos)
        x = logits[row[:, :, None], token]  # [B, n, 32]
        found = _continued(before[row][:, :, None], x, lse[row][:, :, None])
        found = (found if barred is None else found.masked_fill_(barred, -torch.inf)).flatten(1)
        if found.shape[1] < k:
            return None
        best, place = found.topk(min(k + _TIES, found.shape[1]))
        least = best[:, k - 1 : k]
        none = least == -torch.inf  # then all that there are have been found
        whole = best.shape[1] == found.shape[1] or bool((none | (best[:, -1:] < least)).all())
        if not whole or not (count == scores.shape[1] or bool((none | (cut.amin(1, keepdim=True) < least)).all())):
            return None
        parent = parent.gather(1, place // _SIZE)
        token, adjusted = token.flatten(1).gather(1, place), x.flatten(1).gather(1, place)
        if bool((best[:, 1:] == best[:, :-1]).any()):
            order = total_order((best, parent, adjusted, token))
            best, parent, adjusted, token = (each.gather(1, order) for each in (best, parent, adjusted, token))
        best, parent, token, adjusted = (each[:, :k].contiguous() for each in (best, parent, token, adjusted))
        if bool(none.any()):
            empty = best == -torch.inf
            parent, token = parent.masked_fill(empty, 0), token.masked_fill(empty, 0)
            adjusted = adjusted.masked_fill(empty, -torch.inf)
        flags = torch.zeros(lse.shape, dtype=torch.int32)
        return Candidates(best, parent, token, adjusted, lse, flags, best)

    def _read(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Maxima of groups ``[R, G]`` and the log-sum-exp ``[R]`` of logits ``[R, V]``, some rows at a time."""
        vocab = logits.shape[1]
        width, count = vocab // _SIZE, max(1, _BLOCK // vocab)
        if self.buffer is None:
            self.buffer = logits.new_empty(count, vocab)
        groups = logits.new_empty(logits.shape[0], width + vocab % _SIZE)
        greatest = []
        for x, found in zip(logits.split(count), groups.split(count), strict=True):
            out = self.buffer[: x.shape[0]]
            greatest.append(torch.ops.aten._log_softmax.out(x, -1, False, out=out).amax(1))
            # group c: tokens c, c + width, ...; what is left over, as groups of one
            torch.amax(x[:, : width * _SIZE].unflatten(1, (_SIZE, width)), 1, out=found[:, :width])
            if vocab % _SIZE:
                found[:, width:] = x[:, width * _SIZE :]
        # the greatest of a row has the log-probability that tells its log-sum-exp
        return groups, groups.amax(1).sub_(greatest[0] if len(greatest) == 1 else torch.cat(greatest))

    def _tokens(self, column: Tensor, vocab: int) -> tuple[Tensor, Tensor | None]:
        """The tokens ``[B, n, 32]`` of groups ``column [B, n]``, and which of these are none."""
        width = vocab // _SIZE
        if self.members is None:
            self.members = torch.arange(0, width * _SIZE, width)
        token = column[:, :, None] + self.members
        if vocab % _SIZE == 0:
            return token, None
        single = (column >= width)[:, :, None]
        token = torch.where(single, (column + width * (_SIZE - 1))[:, :, None], token)
        return token, single & (self.members > 0)


def _continued(before: Tensor, logits: Tensor, lse: Tensor) -> Tensor:
    """Log-probabilities of candidates that continue ``before``."""
    return (logits - lse).clamp_(max=0.0).add_(before)


def _slowly(expansion: Expansion, lse: Tensor, k: int) -> Ranked:
    """The ``k`` best candidates by the log-sum-exp ``lse [R]`` where it is finite."""
    rows = rows_of(expansion)
    rows = rows._replace(lse=torch.where(lse.isfinite(), lse, rows.lse))
    before = expansion.slots.log_probs[:, : expansion.parents].reshape(-1, 1)
    found = ranked_by(expansion, rows, lambda part: before[part] + rows.token_log_probs(part), k)
    return Ranked(found.candidates)
