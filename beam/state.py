"""Where a search stands: everything the device knows, and nothing the host must ask it for."""

import copy
import functools
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashbeam.kernels import FLAG_DEAD_END, Draws, History, Limits, Pool, Requests, Rule, Slots

from .cache import leaves_of
from .constraint import Bound
from .dialect import Dialect
from .hypotheses import Hypotheses, collect
from .polling import rounds
from .selection import Selection
from .statistics import Statistics


class EosBitmasks(NamedTuple):
    """int32 ``[ceil(V / 32)]`` each, where there is use for it: known from the first logits on."""

    without: Tensor | None = None  # every token but EOS
    only: Tensor | None = None  # EOS and no other token


NO_BITMASKS = EosBitmasks()


@dataclass
class State:
    """A batch of searches under way, made by ``BeamSearch.init`` and changed in place by ``BeamSearch.step``.

    B requests, K slots, T steps at most. All tensors are allocated once. Besides the fields, ``done`` and ``flags`` are
    what a caller's loop looks at. Where a rule divides a beam into G groups, the tensors below hold each group as a
    request of its own: B * G of them, with K / G slots.
    """

    slots: Slots
    draws: Draws
    requests: Requests
    history: History
    pool: Pool
    limits: Limits
    bound: Tensor  # float32 [B], the most that a hypothesis which is not in the pool can still score
    live_norm: Tensor  # float32 [B, T + 1], as limits.length_norm, of hypotheses that have not ended
    temperature: Tensor | None  # float32 [B, K]; None where every request has 1
    eos: Tensor | None  # int64 [n]
    request_ids: Tensor  # int64 [B], key the randomness
    seed: Tensor  # int64 [1], the key of the randomness; a captured graph reads it anew
    selection: Selection
    in_place: bool  # finished hypotheses stay in their slots
    pad_id: int
    dialect: Dialect
    rule: Rule  # what the pool keeps and when a request ends
    min_lengths: tuple[int, ...]  # as in limits, on the host
    max_lengths: tuple[int, ...]
    tokens_left: Tensor | None = None  # int64 [B], of the budget
    deadline: float | None = None  # of the budget, by time.monotonic()
    constraint: Bound | None = None  # bound to this batch at the first step
    constraint_state: Any = None  # a nest of tensors, rows first
    term_stats: tuple[Any, ...] = ()  # of the score's terms, nests of tensors, rows first
    source_lengths: Tensor | None = None  # float32 [B]
    source_size: int | None = None  # S, known from the first attention on
    models: Any = None  # what a combination of models keeps on the device
    on_host: bool = False  # the constraint, or a part of it, waits for the device in each step
    vocab_size: int | None = None  # known from the first logits on
    eos_bitmasks: EosBitmasks = NO_BITMASKS
    stops: Tensor | None = None  # bool [T, B, K]: what a step put into a slot ended there, without EOS
    record: Statistics | None = None  # of each group of a beam; None where they were not asked for

    @property
    def batch_size(self) -> int:
        """B."""
        return self.slots.log_probs.shape[0] // self.groups

    @property
    def beam_size(self) -> int:
        """K, the widest request's."""
        return self.slots.log_probs.shape[1] * self.groups

    @property
    def groups(self) -> int:
        """G, parts of a beam that rank, finish and stop on their own."""
        return self.selection.groups

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.slots.log_probs.device

    @property
    def done(self) -> Tensor:
        """bool ``[B]``: the request needs no more steps. On the device; reading it does not synchronise."""
        if self.groups == 1:
            return self.requests.done
        return self.requests.done.view(-1, self.groups).all(1)

    @property
    def flags(self) -> Tensor:
        """int32 ``[B]``: the sum of ``FLAG_NAN``, ``FLAG_INF``, ``FLAG_DEAD_END``, ``FLAG_INEXACT`` that occurred."""
        if self.groups == 1:
            return self.requests.flags
        groups = self.requests.flags.view(-1, self.groups).unbind(1)
        strands = functools.reduce(torch.bitwise_and, groups) & FLAG_DEAD_END  # a group may, while another goes on
        return functools.reduce(torch.bitwise_or, groups) & ~FLAG_DEAD_END | strands

    @property
    def statistics(self) -> Statistics | None:
        """A copy of what is recorded of the steps so far, if the search was made with ``statistics=True``."""
        return None if self.record is None else self.record.of_requests(self.groups)

    @property
    def log_probs(self) -> Tensor:
        """float32 ``[B, K]``: cumulative log-probability of what is in each slot; ``-inf`` in an empty one."""
        return self.slots.log_probs.view(self.batch_size, self.beam_size)

    def out_of_time(self) -> bool:
        """Whether the seconds of the search's budget are spent. Does not synchronise."""
        return self.deadline is not None and time.monotonic() >= self.deadline

    def all_done(self) -> bool:
        """Whether every request is done, or the time is up. Waits for the device: the loop's only synchronisation."""
        return self.out_of_time() or bool(self.requests.done.all())

    def until_done(self) -> Iterator[None]:
        """Rounds of a loop, each of which makes one step; ``for _ in state.until_done():`` ends when all are done.

        Like ``while not state.all_done():``, but a GPU is not waited for: the host looks at an answer one round old, so
        there may be one round more, which changes nothing, and none beyond ``max_length``. A loop that goes on with
        a search under way waits once, at its beginning. Nor is there one more with a constraint that runs on the host,
        as its ``on_host`` says: what it does where nothing is live is its own.
        """
        return rounds(self, late=self.device.type == "cuda" and not self.on_host)

    def best(self) -> Hypotheses:
        """The best hypothesis of each request so far, finished or not (``N = 1``), for streaming."""
        return collect(self, 1)

    @torch.inference_mode(False)  # as in BeamSearch.init
    def clone(self) -> "State":
        """A snapshot to go back to: it shares no memory that a step changes."""
        return replace(self, **{field.name: _cloned(getattr(self, field.name)) for field in fields(self)})

    def copy_(self, other: "State") -> None:
        """Take over what ``other`` holds, into this state's own memory: a captured step then goes on from there.

        ``other`` is a state of the same search and batch size; both have made a step. If there is a constraint, their
        requests have the same length limits too.

        Raises:
            ValueError, TypeError: ``other`` is no such state. Nothing has changed then.
        """
        if not isinstance(other, State):
            raise TypeError(f"other: expected a flashbeam.State, got {type(other).__name__}")
        mine, theirs = (
            {path: (leaf, leaf.shape, leaf.dtype, leaf.device) for path, leaf in _tensors(state)}
            for state in (self, other)
        )
        alike = mine.keys() == theirs.keys() and all(mine[path][1:] == theirs[path][1:] for path in mine)
        if self.constraint is not None:  # which has them in tensors of its own
            alike &= (self.min_lengths, self.max_lengths) == (other.min_lengths, other.max_lengths)
        if not alike or self.vocab_size is None or self.vocab_size != other.vocab_size:
            raise ValueError("other: expected a state of the same search and batch size after a step, got another")
        for path, (leaf, *_) in mine.items():
            leaf.copy_(theirs[path][0])
        self.deadline = other.deadline


def _tensors(state: State) -> Iterator[tuple[str, Tensor]]:
    for field in fields(state):
        value = getattr(state, field.name)
        if not isinstance(value, (Selection, Bound)):
            yield from ((path, leaf) for path, leaf in leaves_of(value, field.name) if isinstance(leaf, Tensor))


def _cloned(value: Any) -> Any:
    """A nest with every tensor in it cloned."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, (Selection, Bound, Dialect)):  # settings
        return value
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(_cloned, value))
    return copy.deepcopy(value)  # tensors clone under deepcopy too
