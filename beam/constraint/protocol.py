"""What a constraint is asked at each step."""

from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor


@runtime_checkable
class Constraint(Protocol):
    """Which tokens may follow, as a mask; EOS is a token like any other in it.

    The constraint's own state is any nest of tensors whose rows are the ``B * K`` beams, request by request. No method
    may synchronise with the host. See docs/api.md for an example.
    """

    def init(self, batch_size: int, beam_size: int, vocab_size: int, device: torch.device) -> Any:
        """The state before the first token, of every slot."""
        ...

    def bitmask(self, state: Any) -> Tensor:
        """int32 ``[B * K, ceil(V / 32)]``: bit ``j % 32`` of word ``j // 32`` set where token ``j`` may follow."""
        ...

    def advance(self, state: Any, tokens: Tensor) -> Any:
        """The state after ``tokens [B * K]``, from a state already reordered to the new beams."""
        ...
