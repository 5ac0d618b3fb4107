"""A search that must stop in time: it returns the best so far."""

import time
from typing import TYPE_CHECKING, Any

from .arguments import PerRequest, positive_number, whole_number

if TYPE_CHECKING:
    from .state import State


class Budget:
    """What a search may spend. What it has found by then is returned; ``hyps.exact`` says if more could be found.

    Args:
        tokens: rows that the model may be run on for a request, its prompt apart: each beam that lives on costs one.
            A request ends with the step whose beams it cannot pay for; they compete as they are [B].
        seconds: from ``init`` on, for the whole batch. Then ``state.all_done()`` says that it is done, and
            ``finalize`` returns what there is. Read from the host's clock: the steps themselves do not know of it.

    Raises:
        ValueError, TypeError: ``<argument>: expected X, got Y``.
    """

    def __init__(self, tokens: Any = None, seconds: float | None = None):
        if tokens is None and seconds is None:
            raise ValueError("tokens: expected a number of tokens or of seconds, got neither")
        self.tokens = None if tokens is None else PerRequest("tokens", tokens, whole_number(1))
        self.seconds = None if seconds is None else positive_number("seconds", seconds)

    def __repr__(self) -> str:
        tokens = None if self.tokens is None else self.tokens.values[0 if self.tokens.shared else slice(None)]
        return f"Budget(tokens={tokens}, seconds={self.seconds})"

    def deadline(self) -> float | None:
        """``time.monotonic()`` at the end, if the clock starts now."""
        return None if self.seconds is None else time.monotonic() + self.seconds


def spend(state: "State") -> None:
    """Take the beams that live on from what is left; requests that cannot pay for theirs are done."""
    if state.tokens_left is None:
        return
    state.tokens_left.sub_(state.slots.active.view(state.batch_size, -1).sum(1))
    spent = (state.tokens_left < 0).repeat_interleave(state.groups)
    state.requests.done.logical_or_(spent)
    state.slots.active.logical_and_(~spent[:, None])
