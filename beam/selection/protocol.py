"""What a selection rule is given and must return."""

from typing import NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from flashbeam.kernels import Candidates


class Expansion(NamedTuple):
    """The rows to be expanded at a step: P parents of each of B requests, ``R = B * P``."""

    logits: Tensor  # [R, V] float32, float16 or bfloat16
    log_probs: Tensor  # float32 [B, P], cumulative
    active: Tensor  # bool [R], rows that are read
    bitmask: Tensor | None  # int32 [R, ceil(V / 32)], set bits are allowed
    temperature: Tensor | None  # float32 [R]
    exclude: Tensor | None  # int64 [n], EOS ids: normalised over, but decided elsewhere
    divisor: Tensor | None  # float32 [B], scores are log_prob / divisor
    normalize: str
    vocab_size: int


@runtime_checkable
class Selection(Protocol):
    """A rule that picks ``k`` candidates per request."""

    regimes: tuple[str, ...]  # regimes for finished hypotheses it is correct in; the first is the default

    def select(self, expansion: Expansion, k: int) -> Candidates:
        """The ``k`` candidates of each request that are to live on, best first; no host synchronisation."""
        ...
