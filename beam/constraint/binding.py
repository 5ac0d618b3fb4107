"""From what the user gave, shared or per request, to what is asked at each step."""

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from flashbeam.kernels import Listed

from .protocol import Banks, Bound, Constraint, Context, Proposed


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
    """A constraint of the public protocol, for the requests that have it."""

    def __init__(self, parts: list[Any], context: Context):
        self.own = next(part for part in parts if part is not None)
        self.context = context
        uses = [part is not None for part in parts]
        self.uses = None if all(uses) else torch.tensor(uses, device=context.device)
        if hasattr(self.own, "veto"):
            self.considers = getattr(self.own, "considers", 0)

    def init(self) -> Any:
        context = self.context
        return self.own.init(context.batch_size, context.beam_size, context.vocab_size, context.device)

    def advance(self, state: Any, tokens: Tensor) -> Any:
        return self.own.advance(state, tokens)

    def bitmask(self, state: Any) -> Tensor | None:
        if not hasattr(self.own, "bitmask"):
            return None
        bitmask: Tensor = self.own.bitmask(state)
        if self.uses is None:
            return bitmask
        return bitmask | ~self._used(bitmask.shape[0]).int().neg()[:, None]

    def accepts(self, state: Any) -> Tensor | None:
        if not hasattr(self.own, "accepts"):
            return None
        accepted: Tensor = self.own.accepts(state)
        return accepted if self.uses is None else accepted | ~self._used(accepted.shape[0])

    def veto(self, state: Any, proposed: Proposed) -> Tensor:
        vetoed: Tensor = self.own.veto(state, proposed)
        return vetoed if self.uses is None else vetoed & self.uses[:, None]

    def _used(self, rows: int) -> Tensor:
        assert self.uses is not None
        return self.context.of_rows(self.uses, rows)


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
