"""From what the user gave, shared or per request, to what is asked at each step."""

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flashbeam.kernels import Listed

from ..cache import leaves_of, reorder
from .protocol import Banks, Bound, Constraint, Context, Proposed
from .token_lists import on_device


class AllOf:
    """Everything that each of the constraints asks for.

    ``fb.AllOf(fb.Trie(items), fb.NoRepeatNgram(2))``. A token is allowed where all allow it. Each looks ahead on its
    own, so what only their conjunction rules out is found when it happens.

    Args:
        constraints: any number of them.

    Raises:
        TypeError: one is not a constraint.
    """

    def __init__(self, *constraints: Any):
        self.constraints = tuple(as_constraint(f"constraints[{i}]", given) for i, given in enumerate(constraints))
        if None in self.constraints:
            raise TypeError(f"constraints[{self.constraints.index(None)}]: expected a constraint, got None")

    def __repr__(self) -> str:
        return f"AllOf({', '.join(map(repr, self.constraints))})"


def as_constraint(name: str, given: Any) -> Any:
    """``given`` if it is a constraint or ``None``."""
    if given is None or (not isinstance(given, type) and _is_constraint(given)):
        return given
    raise TypeError(f"{name}: expected a constraint, got {given!r}")


def _is_constraint(given: Any) -> bool:
    if isinstance(given, AllOf) or callable(getattr(given, "bind", None)):
        return True
    return isinstance(given, Constraint) and any(callable(getattr(given, name, None)) for name in ("bitmask", "veto"))


def _parts(given: Any) -> list[Any]:
    """The constraints that ``given`` stands for."""
    if given is None:
        return []
    if isinstance(given, AllOf):
        return [part for each in given.constraints for part in _parts(each)]
    return [given]


def runs_on_host(given: Any) -> bool:
    """Whether a constraint, or a part of it, waits for the device in each step."""
    return any(getattr(part, "on_host", False) for part in _parts(given))


def bind(requests: Sequence[Any], context: Context) -> Bound | None:
    """Bind the constraint of each request: those of one class together, so that a step asks each class once."""
    columns: dict[Any, list[Any]] = {}
    for request, given in enumerate(requests):
        seen: dict[Any, int] = {}
        for part in _parts(given):
            key: Any = type(part) if hasattr(part, "bind") else id(part)
            seen[key] = seen.get(key, 0) + 1
            columns.setdefault((key, seen[key]), [None] * len(requests))[request] = part
    bound: list[Bound] = []
    for (key, _), parts in columns.items():
        own: Callable[[list[Any], Context], Bound] = getattr(key, "bind", _UsersOwn)
        bound.append(own(parts, context))
    return bound[0] if len(bound) == 1 else _Product(bound) if bound else None


class _UsersOwn(Bound):
    """A constraint of the public protocol. It knows of no requests but those that have it: N of them."""

    def __init__(self, parts: list[Any], context: Context):
        self.own = next(part for part in parts if part is not None)
        self.context = context
        requests = [request for request, part in enumerate(parts) if part is not None]
        self.count = len(requests)
        self.requests: Tensor | None = None  # int64 [N]; None: all
        if self.count < context.batch_size:
            self.requests = on_device(requests, np.int64, context)
            back = on_device(np.arange(self.count) - requests, np.int64, context)
            self.back = back[:, None]  # [N, 1], from the place of a request in the batch to that among its own
        if callable(getattr(self.own, "veto", None)):
            self.considers = getattr(self.own, "considers", 0) or 0

    def init(self) -> Any:
        context = self.context
        return self.own.init(self.count, context.beam_size, context.vocab_size, context.device)

    def advance(self, state: Any, tokens: Tensor) -> Any:
        return self.own.advance(state, self._of_own(tokens.view(self.context.batch_size, -1)).flatten())

    def take(self, state: Any, rows: Tensor) -> Any:
        own = self._of_own(rows.view(self.context.batch_size, -1))
        return reorder(state, self._among_own(own, self.context.beam_size).flatten())

    def move(self, state: Any, rows: Tensor, tokens: Tensor, live: Tensor | None = None) -> Any:
        return self.advance(self.take(state, rows), tokens)

    def bitmask(self, state: Any) -> Tensor | None:
        if not callable(getattr(self.own, "bitmask", None)):
            return None
        bitmask: Tensor = self._in_batch(self.own.bitmask(state), -1)
        return bitmask

    def accepts(self, state: Any) -> Tensor | None:
        if not callable(getattr(self.own, "accepts", None)):
            return None
        accepted: Tensor = self._in_batch(self.own.accepts(state), True)
        return accepted

    def veto(self, state: Any, proposed: Proposed) -> Tensor:
        if self.requests is None:
            vetoed: Tensor = self.own.veto(state, proposed)
            return vetoed
        own = Proposed(*map(self._of_own, proposed))
        per_request = next(leaf.shape[0] for _, leaf in leaves_of(state, "state") if isinstance(leaf, Tensor))
        own = own._replace(rows=self._among_own(own.rows, per_request // self.count))
        none = torch.zeros_like(proposed.tokens, dtype=torch.bool)
        return none.index_copy_(0, self.requests, self.own.veto(state, own))

    def _of_own(self, per_request: Tensor) -> Tensor:
        """The part of ``[B, ...]`` that is of its requests, ``[N, ...]``."""
        return per_request if self.requests is None else per_request.index_select(0, self.requests)

    def _among_own(self, rows: Tensor, per_request: int) -> Tensor:
        """Rows ``[N, m]`` of the batch as rows of its own requests."""
        return rows if self.requests is None else rows + self.back * per_request

    def _in_batch(self, own: Any, others: Any) -> Any:
        """What is said of its own rows, and ``others`` of those of other requests."""
        if self.requests is None or not isinstance(own, Tensor) or own.dim() == 0:
            return own
        own = own.unflatten(0, (self.count, -1)) if own.shape[0] % self.count == 0 else own[:, None]
        batch = own.new_full((self.context.batch_size, *own.shape[1:]), others)
        return batch.index_copy_(0, self.requests, own).flatten(0, 1)


class _Product(Bound):
    """Several at once; the state is a tuple of theirs."""

    def __init__(self, parts: list[Bound]):
        self.parts = parts
        considers = [part.considers for part in parts if part.considers is not None]
        self.considers = max(considers) if considers else None

    def init(self) -> Any:
        return tuple(part.init() for part in self.parts)

    def advance(self, state: Any, tokens: Tensor) -> Any:
        return tuple(part.advance(own, tokens) for part, own in zip(self.parts, state, strict=True))

    def take(self, state: Any, rows: Tensor) -> Any:
        return tuple(part.take(own, rows) for part, own in zip(self.parts, state, strict=True))

    def move(self, state: Any, rows: Tensor, tokens: Tensor, live: Tensor | None = None) -> Any:
        return tuple(part.move(own, rows, tokens, live) for part, own in zip(self.parts, state, strict=True))

    def bitmask(self, state: Any) -> Tensor | None:
        return _both(torch.bitwise_and, [part.bitmask(own) for part, own in zip(self.parts, state, strict=True)])

    def listed(self, state: Any) -> tuple[Listed | None, Tensor | None]:
        """The list of the first that has one; the others as a bitmask."""
        listed: Listed | None = None
        masks: list[Tensor | None] = []
        for part, own in zip(self.parts, state, strict=True):
            found, mask = part.listed(own) if listed is None else (None, part.bitmask(own))
            listed = found if listed is None else listed
            masks.append(mask)
        return listed, _both(torch.bitwise_and, masks)

    def accepts(self, state: Any) -> Tensor | None:
        return _both(torch.logical_and, [part.accepts(own) for part, own in zip(self.parts, state, strict=True)])

    def adjust(self, state: Any, logits: Tensor) -> Tensor:
        for part, own in zip(self.parts, state, strict=True):
            logits = part.adjust(own, logits)
        return logits

    def banks(self, state: Any) -> Banks | None:
        found = [part.banks(own) for part, own in zip(self.parts, state, strict=True)]
        banks = [each for each in found if each is not None]
        if len(banks) < 2:
            return banks[0] if banks else None
        alphabet = torch.cat([each.alphabet for each in banks], 1).sort(1, descending=True).values
        again = torch.nn.functional.pad(alphabet[:, 1:] == alphabet[:, :-1], (1, 0), value=False)

        def progress(rows: Tensor, tokens: Tensor) -> Tensor:
            return reduce(torch.add, (each.progress(rows, tokens) for each in banks))

        return Banks(alphabet.masked_fill(again, -1), progress)

    def veto(self, state: Any, proposed: Proposed) -> Tensor:
        pairs = zip(self.parts, state, strict=True)
        vetoes = [part.veto(own, proposed) for part, own in pairs if part.considers is not None]
        return reduce(torch.logical_or, vetoes)


def _both(join: Callable[[Tensor, Tensor], Tensor], parts: list[Tensor | None]) -> Tensor | None:
    """All ``parts`` that are there, joined."""
    there = [part for part in parts if part is not None]
    return reduce(join, there) if there else None
