"""The best candidates on a CPU in few operations, for the calls of ``generate``.

The same candidates in the same order as ``top_candidates``, except that the log-sum-exp is that of torch's own
``log_softmax``, as in transformers: log-probabilities may differ in their last bits. What needs more (ties, numbers
that are not finite) is left to ``top_candidates``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flashbeam.kernels import Candidates

from ..selection import Expansion

_SIZE = 32  # logits of a group, of which one maximum is kept
_BLOCK = 1 << 19  # logits that are read at a time: they and what is made of them stay in cache


class Quick:
    """Finds candidates of one search after the other; keeps a buffer."""

    def __init__(self) -> None:
        self.buffer: Tensor | None = None

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
            found[:, width:] = x[:, width * _SIZE :]
        # the greatest of a row has the log-probability that tells its log-sum-exp
        return groups, groups.amax(1) - torch.cat(greatest)

    def find(self, expansion: Expansion, k: int) -> Candidates | None:
        """The ``k`` best candidates that are not EOS, or ``None`` where this is not the way to find them."""
        logits = expansion.logits
        plain = expansion.bitmask is None and expansion.temperature is None and expansion.divisor is None
        plain = plain and expansion.listed is None and expansion.vocab_size == logits.shape[1]
        if not plain or logits.device.type != "cpu" or logits.shape[1] < _SIZE:
            return None
        logits = logits.float()
        rows, width, parents = logits.shape[0], logits.shape[1] // _SIZE, expansion.parents
        batch, active = rows // parents, expansion.active
        groups, lse = self._read(logits)
        if not bool((lse.isfinite() | ~active).all()):
            return None
        before = expansion.slots.log_probs[:, :parents].reshape(-1)
        scores = _plus(before[:, None], groups, lse[:, None]).masked_fill_(~active[:, None], -torch.inf)
        ends = 0 if expansion.eos is None else expansion.eos.shape[0]
        # a group whose maximum is EOS may have no candidate
        count = min(k + 1 + parents * ends, parents * groups.shape[1])
        place = scores.view(batch, -1).topk(count, sorted=False).indices  # [B, n]
        parent, column = place // groups.shape[1], place % groups.shape[1]
        row = parent + torch.arange(0, rows, parents)[:, None]

        whole = (column < width)[:, :, None]
        members = torch.arange(0, width * _SIZE, width)
        token = torch.where(whole, column[:, :, None] + members, (column + width * (_SIZE - 1))[:, :, None])
        single = ~whole & (members > 0)
        x = logits[row[:, :, None], token]  # [B, n, 32]
        if expansion.eos is not None:
            single = single | torch.isin(token, expansion.eos)
        start, norm = (
            field[row].masked_fill(~active[row], empty) for field, empty in ((before, -torch.inf), (lse, 0.0))
        )
        scores = _plus(start[:, :, None], x, norm[:, :, None]).masked_fill_(single, -torch.inf).flatten(1)
        best, place = scores.topk(min(k + 1, scores.shape[1]))
        if best.shape[1] <= k or bool((best[:, 1:] == best[:, :-1]).any()) or bool((best[:, -1] == -torch.inf).any()):
            return None
        place, found = place[:, :k], best[:, :k]
        parent = parent.gather(1, place // _SIZE)
        token, adjusted = token.flatten(1).gather(1, place), x.flatten(1).gather(1, place)
        return Candidates(found, parent, token, adjusted, lse, torch.zeros(rows, dtype=torch.int32), found)


def _plus(before: Tensor, logits: Tensor, lse: Tensor) -> Tensor:
    """Log-probabilities of candidates that continue ``before``."""
    return (logits - lse).clamp_(max=0.0).add_(before)
