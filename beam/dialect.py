"""What libraries disagree about: who may finish, what becomes of the others at the end, what the length counts."""

from dataclasses import dataclass

_FINISHES = ("beam", "double", "row")
_AT_MAX_LENGTH = ("compete", "end", "spare")


@dataclass(frozen=True)
class Dialect:
    """How hypotheses end, where finished ones go to a pool. The default is flashbeam's own; docs/dialects.md compares.

    Args:
        finishes: an EOS candidate finishes if it is among the K best candidates of its request (``"beam"``), among the
            2 K best (``"double"``), or if its token is among the 2 K best of its own row (``"row"``).
        at_max_length: of the candidates of the last step, the K best are hypotheses, ended or not (``"compete"``); or
            only EOS is left to choose, at its log-probability (``"end"``); or what has not ended is returned only by
            requests where nothing has finished, ranked by log-probability (``"spare"``).
        counts_eos: whether the length that a finished hypothesis is normalised by counts its EOS. Without, an EOS alone
            has length 0, for which the length norm must be above 0: ``fb.LengthPower(alpha, offset=prompt_length)``.

    Raises:
        ValueError, TypeError: ``<argument>: expected X, got Y``.
    """

    finishes: str = "beam"
    at_max_length: str = "compete"
    counts_eos: bool = True

    def __post_init__(self) -> None:
        for name, value, choices in (
            ("finishes", self.finishes, _FINISHES),
            ("at_max_length", self.at_max_length, _AT_MAX_LENGTH),
        ):
            if value not in choices:
                raise ValueError(f"{name}: expected one of {list(choices)}, got {value!r}")
        if not isinstance(self.counts_eos, bool):
            raise TypeError(f"counts_eos: expected a bool, got {type(self.counts_eos).__name__}")
