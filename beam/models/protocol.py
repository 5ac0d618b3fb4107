"""What a combination of models is given at a step, and must return."""

from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor


class Given(NamedTuple):
    """The rows of a step, as every model has them: R of them."""

    logits: tuple[Tensor, ...]  # M times [R, V], float32, float16 or bfloat16 each
    active: Tensor  # bool [R], rows that are read
    allowed: Tensor | None  # int32 [R, ceil(V / 32)], what may follow
    temperature: Tensor | None  # float32 [R], the search's
    normalize: str  # the search's
    vocab_size: int
    per_row: Tensor | None  # [R] or [R, M], what the step was given for this combination

    @property
    def extent(self) -> dict[str, Any]:
        """What is read of the rows, as operations on them take it."""
        return {"active": self.active, "vocab_size": self.vocab_size}

    @property
    def barred(self) -> Tensor | None:
        """The bitmask that normalisers heed: none where what is banned keeps its share."""
        return self.allowed if self.normalize == "allowed" else None

    def tempered(self, temperatures: Tensor | None) -> Tensor | None:
        """float32 ``[R, M]``: ``temperatures [M]`` for every row."""
        return None if temperatures is None else temperatures.expand(self.active.shape[0], -1).contiguous()


class Combined(NamedTuple):
    """The rows that are searched."""

    logits: Tensor  # [R, V], what log-probabilities are of; the search's temperature divides it
    increments: Tensor | None = None  # float32 [R, vocab_size], what candidates add to their scores instead; -inf bars
    flags: Tensor | None = None  # int32 [R], faults that these rows do not show
    bitmask: Tensor | None = None  # int32 [R, ceil(V / 32)], bars more


@runtime_checkable
class Models(Protocol):
    """A combination of models. Plain class attributes will do for the properties."""

    @property
    def reads(self) -> str | None:
        """The argument of ``step`` that it reads: ``"weights"``, ``"gate"`` or none."""
        ...

    @property
    def rescores(self) -> bool:
        """Whether scores accumulate something else than the log-probabilities: ``Combined.increments``."""
        ...

    @property
    def falls(self) -> bool:
        """Whether scores never rise from step to step, so that they have a bound."""
        ...

    @property
    def weighs(self) -> bool:
        """Whether it asks for what may follow: ``Given.allowed``."""
        ...

    def begin(self, batch_size: int, device: torch.device) -> Any:
        """What it needs on the device: a nest of tensors."""
        ...

    def check(self, models: int, per_row: Tensor | None) -> None:
        """Raise an error where it cannot combine so many models, or with what the step was given."""
        ...

    def combine(self, settings: Any, given: Given) -> Combined:
        """The rows of a step; no host synchronisation, and nothing given is changed."""
        ...
