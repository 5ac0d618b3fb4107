"""Coverage: what a hypothesis pays for parts of the source that its attention has left out, or dwelt on."""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..arguments import PerRequest, nonnegative_number
from .protocol import Seen
from .rates import on_rows

_LEAST = torch.finfo(torch.float32).tiny  # coverage of a position that was never attended to
_PER_UNIT = 2.0**32  # what is summed over the source is a multiple of its inverse


class Covered(NamedTuple):
    """What runs along, float32."""

    attention: Tensor  # [R, 1, S], the sum so far; of any S at first
    beta: Tensor  # [R, 1]


@dataclass(frozen=True)
class Coverage:
    """The term ``beta * sum over i of log(min(c_i, 1))``, or ``-beta * sum over i of max(c_i - 1, 0)``.

    ``c_i`` is the attention that the tokens so far, EOS included, have paid to position i of the source. ``"gnmt"``,
    the first, is the coverage penalty of Wu et al. 2016, section 7, equation 14; ``"summary"``, the second, is that of
    OpenNMT for summaries, against repetition.

    ``step(..., attention=...)`` is to be given the attention of the step: 0 at padding, wherever that is, as a softmax
    under a mask leaves it; averaged over heads as the user sees fit. Padding does not count. Without
    ``init(source_lengths=...)`` positions to which nothing has been paid yet are taken for padding; with it, those
    that the source really has count as ``c_i = 1.2e-38``.

    Args:
        beta: 0 or more [B].
        kind: ``"gnmt"`` or ``"summary"``.

    Raises:
        ValueError, TypeError: ``<argument>: expected X, got Y``.
    """

    beta: Any
    kind: str = "gnmt"
    monotone = True  # the same for all tokens
    reads_attention = True

    def __post_init__(self) -> None:
        _ = self.per_request
        if self.kind not in ("gnmt", "summary"):
            raise ValueError(f"kind: expected 'gnmt' or 'summary', got {self.kind!r}")

    @property
    def per_request(self) -> tuple[PerRequest[float]]:
        """What may differ by request."""
        return (PerRequest("beta", self.beta, nonnegative_number),)

    def init(self, rows: int, device: torch.device) -> Covered:
        """See :class:`flashbeam.scoring.Term`."""
        nothing = torch.zeros(rows, 1, 1, dtype=torch.float32, device=device)
        return Covered(nothing, on_rows(*self.per_request, rows, device))

    def extend(self, stats: Covered, seen: Seen) -> tuple[Tensor, Covered]:
        """See :class:`flashbeam.scoring.Term`."""
        assert seen.attention is not None
        coverage, beta = stats.attention + seen.attention, stats.beta
        if self.kind == "summary":
            total = -_sum((coverage - 1.0).clamp(min=0.0))
        else:
            attended = coverage > 0.0
            # in float64: a logarithm's last bit may depend on its place in memory
            total = _sum(torch.where(attended, coverage.clamp(_LEAST, 1.0).double().log(), 0.0))
            if seen.source_lengths is not None:
                missed = (seen.source_lengths - attended.sum(2)).clamp(min=0.0)
                total = total + missed * math.log(_LEAST)
        return total * beta, Covered(coverage, beta)

    def upper(self, value: Tensor, stats: Covered, seen: Seen) -> Tensor:
        """All may yet be covered; what was dwelt on stays so."""
        return value if self.kind == "summary" else torch.zeros_like(value)


def _sum(values: Tensor) -> Tensor:
    """Over the source, of ``values [R, 1, S]`` as multiples of 2^-32.

    Float64 sums of whole numbers below 2^53 are exact: neither padding nor the order changes a bit, which on a GPU may
    depend on the number of rows.
    """
    return ((values.double() * _PER_UNIT).round().sum(2) / _PER_UNIT).float()
