"""Arguments that may be one value for all requests or one per request."""

from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import numpy as np
from torch import Tensor

Value = TypeVar("Value")


class PerRequest(Generic[Value]):
    """One value, or one per request, each checked when it is given."""

    def __init__(self, name: str, given: Any, check: Callable[[str, Any], Value]):
        """``check(name, value)`` returns the value, or raises if it is not one."""
        self.name = name
        self.shared = not isinstance(given, (Sequence, Tensor, np.ndarray)) or isinstance(given, str)
        if isinstance(given, Tensor):
            if given.device.type != "cpu":
                raise ValueError(f"{name}: expected a number, a list or a CPU tensor, got a tensor on {given.device}")
            given = given.detach().numpy()
        if isinstance(given, np.ndarray):
            if given.ndim > 1:
                raise ValueError(f"{name}: expected one value per request, got shape {list(given.shape)}")
            self.shared = given.ndim == 0
            given = given.tolist()
        values = [given] if self.shared else list(given)
        if not values:
            raise ValueError(f"{name}: expected one value per request, got none")
        self.values = [check(name if self.shared else f"{name}[{i}]", value) for i, value in enumerate(values)]

    def numbers(self) -> list[Value]:
        """The values that are not functions of the source."""
        return [value for value in self.values if not callable(value)]

    def of_batch(self, batch_size: int) -> list[Value]:
        """The values of ``batch_size`` requests."""
        if self.shared:
            return self.values * batch_size
        if len(self.values) != batch_size:
            raise ValueError(f"{self.name}: expected one value per request, {batch_size}, got {len(self.values)}")
        return self.values


def whole_number(low: int) -> Callable[[str, Any], int]:
    """A check for ints of at least ``low``."""

    def check(name: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
            raise TypeError(f"{name}: expected an int >= {low}, got {type(value).__name__}")
        if value < low:
            raise ValueError(f"{name}: expected an int >= {low}, got {value}")
        return int(value)

    return check


def length_limit(low: int) -> Callable[[str, Any], Any]:
    """A check for ints of at least ``low``, or functions of the source's length that give them."""
    check = whole_number(low)

    def check_limit(name: str, value: Any) -> Any:
        if callable(value):
            return lambda length: check(f"{name}({length})", value(length))
        try:
            return check(name, value)
        except TypeError:
            wanted = f"an int >= {low} or a function of the source's length"
            raise TypeError(f"{name}: expected {wanted}, got {type(value).__name__}") from None

    return check_limit


def of_source(limits: PerRequest[Any], batch_size: int, source_lengths: list[int] | None) -> list[int]:
    """Length limits of ``batch_size`` requests; those that are functions, of their sources."""
    values = limits.of_batch(batch_size)
    if not any(map(callable, values)):
        return values
    if source_lengths is None:
        raise ValueError(f"source_lengths: expected one length per request, which {limits.name} asks for, got None")
    return [value(n) if callable(value) else value for value, n in zip(values, source_lengths, strict=True)]


def finite_number(name: str, value: Any) -> float:
    """A check for finite numbers."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.number)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if not np.isfinite(value):
        raise ValueError(f"{name}: expected a finite number, got {value}")
    return float(value)


def positive_number(name: str, value: Any) -> float:
    """A check for finite numbers above 0 whose float32, and its inverse, are normal."""
    number = finite_number(name, value)
    if not number > 0:
        raise ValueError(f"{name}: expected a number above 0, got {value}")
    if not 1e-37 < number < 1e37:
        raise ValueError(f"{name}: expected a number between 1e-37 and 1e37, got {value}")
    return number


def token_ids(name: str, given: Any) -> list[int]:
    """A token id, a list of distinct ones, or ``None`` for none."""
    if given is None:
        return []
    check = whole_number(0)
    if isinstance(given, Sequence) and not isinstance(given, str):
        ids = [check(f"{name}[{i}]", value) for i, value in enumerate(given)]
        if len(set(ids)) != len(ids):
            raise ValueError(f"{name}: expected distinct ids, got {ids}")
        return ids
    return [check(name, given)]


def nonnegative_number(name: str, value: Any) -> float:
    """A check for finite numbers of at least 0."""
    number = finite_number(name, value)
    if not 0 <= number < 1e37:
        raise ValueError(f"{name}: expected a number from 0 to 1e37, got {value}")
    return number


def probability(name: str, value: Any) -> float:
    """A check for numbers above 0 and at most 1."""
    number = finite_number(name, value)
    if not 0 < number <= 1:
        raise ValueError(f"{name}: expected a number above 0 and at most 1, got {value}")
    return number


def share(name: str, value: Any) -> float:
    """A check for numbers of at least 0 and at most 1."""
    number = finite_number(name, value)
    if not 0 <= number <= 1:
        raise ValueError(f"{name}: expected a number from 0 to 1, got {value}")
    return number


def seed_number(name: str, value: Any) -> int:
    """A check for 64-bit seeds."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{name}: expected an int of 64 bits, got {value}")
    return int(value)
