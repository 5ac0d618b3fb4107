"""What a constraint is asked at each step: the protocol for a user's own, and the fuller one of the library's."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from flashbeam.kernels import Listed

from ..cache import reorder


class Proposed(NamedTuple):
    """The candidates that a veto sees, best first, M per request; ``log_probs`` of -inf where there is none."""

    rows: Tensor  # int64 [B, M], row of the constraint's state that each continues
    tokens: Tensor  # int64 [B, M]
    log_probs: Tensor  # float32 [B, M], cumulative


@runtime_checkable
class Constraint(Protocol):
    """What may follow. EOS is a token like any other.

    The constraint's own state is any nest of tensors whose rows are the beams, request by request; it is reordered
    for you. No method may synchronise with the host. Besides the two methods here a constraint has at least one of

    - ``bitmask(state) -> int32 [R, ceil(V / 32)]``: bit ``j % 32`` of word ``j // 32`` set where token ``j`` may
      follow;
    - ``veto(state, proposed) -> bool [B, M]``: set where a candidate (:class:`Proposed`) must not be taken. Only the
      best are shown, ``considers`` of them if the constraint has that attribute and at least one for each beam, and all
      EOS candidates. For ``fb.TopK``.

    and may have ``accepts(state) -> bool [R]``, asked at ``max_length``: whether what ends there is a hypothesis. See
    docs/constraints.md for an example.
    """

    def init(self, batch_size: int, beam_size: int, vocab_size: int, device: torch.device) -> Any:
        """The state before the first token, of ``batch_size * beam_size`` rows."""
        ...

    def advance(self, state: Any, tokens: Tensor) -> Any:
        """The state after ``tokens [R]`` int64, from a state already reordered to the new beams."""
        ...


@dataclass(frozen=True)
class Context:
    """What a constraint may know of the search that it is bound to."""

    batch_size: int
    beam_size: int
    vocab_size: int
    device: torch.device
    eos: tuple[int, ...]
    min_lengths: tuple[int, ...]  # per request, EOS included
    max_lengths: tuple[int, ...]  # per request
    ends_forced: bool = False  # the last token at max_length can only be EOS

    @property
    def open_lengths(self) -> tuple[int, ...]:
        """Per request, most tokens that are not EOS, 1 at least: what is to be complete looks ahead to that."""
        return tuple(max(1, n - 1) for n in self.max_lengths) if self.ends_forced else self.max_lengths

    @property
    def rows(self) -> int:
        """R, rows of a state before the first token."""
        return self.batch_size * self.beam_size

    def of_rows(self, per_request: Tensor, rows: int) -> Tensor:
        """What ``per_request [B, ...]`` says, for each of ``rows`` rows, request by request."""
        return per_request.repeat_interleave(rows // self.batch_size, 0)


class Banks(NamedTuple):
    """How far candidates have come, for rules that keep beams of every progress."""

    alphabet: Tensor  # int64 [R, A], the tokens that make a difference to progress, distinct; -1 for none
    progress: Callable[[Tensor, Tensor], Tensor]  # (rows [B, m], tokens [B, m]) -> int64 [B, m], of the candidate


class Bound:
    """A constraint at work in one batch: what ``bind`` of its class makes. Holds what does not change, on the device.

    The state is a nest of tensors whose rows are the rows to be expanded, request by request: ``B * K`` of them, or
    fewer at the first step. Every constraint of the library has a static method ``bind(requests, context)``; an entry
    of ``requests`` is the constraint of that request, or ``None`` where everything is allowed.
    """

    considers: int | None = None  # candidates that its veto sees; None: it has no veto

    def init(self) -> Any:
        """The state of ``context.rows`` rows before the first token."""
        raise NotImplementedError

    def advance(self, state: Any, tokens: Tensor) -> Any:
        """The state after ``tokens [R]``, from a state already reordered."""
        raise NotImplementedError

    def take(self, state: Any, rows: Tensor) -> Any:
        """The state of ``rows [R']`` of the state."""
        return reorder(state, rows)

    def move(self, state: Any, rows: Tensor, tokens: Tensor, live: Tensor | None = None) -> Any:
        """The state of beams that continue ``rows [R']`` with ``tokens [R']``; of those not ``live [R']``, any."""
        return self.advance(self.take(state, rows), tokens)

    def bitmask(self, state: Any) -> Tensor | None:
        """int32 ``[R, ceil(V / 32)]``, EOS included; ``None`` if nothing is barred."""
        return None

    def listed(self, state: Any) -> tuple[Listed | None, Tensor | None]:
        """The same as a list, where that is short enough (decided from what the host knows), and a bitmask of the rest.

        A token may follow if the list has it and the bitmask does not bar it.
        """
        return None, self.bitmask(state)

    def accepts(self, state: Any) -> Tensor | None:
        """bool ``[R]``: may be a hypothesis at ``max_length``; ``None`` if all may, or nothing else gets there."""
        return None

    def adjust(self, state: Any, logits: Tensor) -> Tensor:
        """Logits ``[R, V]`` with penalties; those given are not modified."""
        return logits

    def banks(self, state: Any) -> Banks | None:
        """How far candidates would get, if that matters."""
        return None

    def veto(self, state: Any, proposed: Proposed) -> Tensor:
        """bool ``[B, M]``: must not be taken."""
        raise NotImplementedError
