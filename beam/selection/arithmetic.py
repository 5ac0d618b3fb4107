"""Arithmetic sampling: each row follows a code, and the codes of a request lie on a lattice."""

from dataclasses import dataclass

import torch
from torch import Tensor

from flashbeam.kernels import Stream, random_codes

from ..arguments import seed_number
from .choosing import summarize_drawable
from .independent import draw_rows, own_parents
from .protocol import Decided, Expansion


@dataclass(frozen=True)
class Arithmetic:
    """Draw K samples that spread over the distribution: each is exactly the model's, and together they cover it evenly.

    Vilnis et al. 2023, "Arithmetic sampling: parallel diverse decoding for large language models". The codes are
    ``i / K``, moved by one shift that the rows of a request share, as 64-bit integers. A row takes the token whose
    interval holds its code, and the code is then stretched to that interval. ``rotate`` moves the codes at every prefix
    by a number of its own, the same for all rows there, so that codes do not run out of bits. A first token of
    probability p is drawn floor or ceil of K * p times; so is every prefix without ``rotate``, as long as its codes
    have bits left.
    """

    seed: int
    rotate: bool = True
    regimes = ("in_place",)
    reports = ("sampling_log_probs",)
    weighs = True
    groups = 1

    def __post_init__(self) -> None:
        seed_number("seed", self.seed)
        if not isinstance(self.rotate, bool):
            raise TypeError(f"rotate: expected a bool, got {type(self.rotate).__name__}")

    def select(self, expansion: Expansion, k: int) -> Decided:
        """See :class:`flashbeam.selection.Selection`."""
        drawable = summarize_drawable(expansion)
        codes = _lattice(expansion.limits.width, k) if expansion.first else expansion.draws.codes
        if self.rotate or expansion.first:  # at the root it is the shift
            nodes = expansion.draws.nodes.gather(1, own_parents(expansion))
            codes = codes + random_codes(expansion.seed, nodes, Stream.ROTATION)
        return Decided(draw_rows(expansion, drawable, expansion.bitmask, codes), drawable.flags)


def _lattice(width: Tensor, k: int) -> Tensor:
    """``floor(i * 2^64 / width)`` as int64 ``[B, k]``, 16 bits at a time."""
    divisor = width.long()[:, None]
    rest = torch.arange(k, device=width.device) % divisor
    codes = torch.zeros_like(rest)
    for _ in range(4):
        rest = rest << 16
        codes = (codes << 16) | (rest // divisor)
        rest = rest % divisor
    return codes
