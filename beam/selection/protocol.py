"""What a selection rule is given and must return."""

from collections.abc import Callable
from typing import NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from flashbeam.kernels import Candidates, Choice, Draws, Limits, Listed, Requests, Slots

from ..constraint import Banks, Proposed
from ..scoring import Terms


class Veto(NamedTuple):
    """Who is asked about the best candidates."""

    ask: Callable[[Proposed], Tensor]  # bool [B, M], set where a candidate must not be taken
    considers: int  # M, how many it sees; 0 if that is left to the rule


class Expansion(NamedTuple):
    """The rows to be expanded at a step: P parents of each of B requests, ``R = B * P``."""

    logits: Tensor  # [R, V] float32, float16 or bfloat16
    active: Tensor  # bool [R], rows that are read
    bitmask: Tensor | None  # int32 [R, ceil(V / 32)], set bits are allowed
    allowed: Tensor | None  # the same with EOS barred where min_length bars it; only for rules that weigh
    temperature: Tensor | None  # float32 [R]
    eos: Tensor | None  # int64 [n]
    divisor: Tensor | None  # float32 [B], candidates rank by scores / divisor
    normalize: str
    vocab_size: int
    pad_id: int
    # the search's own tensors, not to be changed
    slots: Slots
    draws: Draws
    requests: Requests
    limits: Limits
    request_ids: Tensor  # int64 [B]
    seed: Tensor  # int64 [1]
    first: bool  # the requests' first step: slot 0 is the only one to expand
    # of a constraint, for rules whose ``uses`` names them
    listed: Listed | None = None  # what may follow as a list; the bitmask bars more
    banks: Banks | None = None
    veto: Veto | None = None
    finishes: str = "beam"  # which EOS candidates finish: see fb.Dialect
    # of the score, for rules whose ``uses`` names "terms"
    terms: Terms | None = None
    increments: Tensor | None = None  # float32 [R, vocab_size], what candidates add to it, if not log-probabilities
    falls: bool = True  # whether increments are never above 0

    @property
    def parents(self) -> int:
        """P."""
        return self.logits.shape[0] // self.slots.log_probs.shape[0]


class Ranked(NamedTuple):
    """Candidates that are not EOS, still to be ranked with the EOS candidates and, in place, the frozen ones."""

    candidates: Candidates
    end_penalty: Tensor | None = None  # float32 [B, P * n_eos], taken from the scores of EOS candidates; +inf bars one
    finishing: Tensor | None = None  # bool [B, P * n_eos], EOS candidates that finish, if not those among the K best
    bound: Tensor | None = None  # float32 [B], the most that a beam which lives on can score, if norms do not say
    best_tokens: Tensor | None = None  # float32 [R, 1], log-probability of the best token that may follow, for terms
    end_scores: Tensor | None = None  # float32 [B, P * n_eos], what EOS candidates score; -inf bars one

    def with_flags(self, flags: Tensor) -> "Ranked":
        """With flags int32 ``[R]`` more."""
        return self._replace(candidates=self.candidates._replace(flags=self.candidates.flags | flags))


class Decided(NamedTuple):
    """What every slot is to hold, frozen hypotheses included."""

    choice: Choice
    flags: Tensor  # int32 [R], FLAG_NAN and FLAG_INF of the rows read

    def with_flags(self, flags: Tensor) -> "Decided":
        """With flags int32 ``[R]`` more."""
        return self._replace(flags=self.flags | flags)


@runtime_checkable
class Selection(Protocol):
    """A rule that picks ``k`` candidates per request. Plain class attributes will do for the properties.

    A rule may have ``uses``: what else of a constraint it can make use of, of ``("lists", "banks", "veto")``, and
    ``"terms"`` if it ranks by the score that ``Expansion.terms`` or ``increments`` give, ``"finishes"`` if it heeds
    that.
    """

    @property
    def regimes(self) -> tuple[str, ...]:
        """Regimes for finished hypotheses it is correct in; the first is the default."""
        ...

    @property
    def seed(self) -> int | None:
        """Of a rule that samples: it draws from what is allowed, and does not rank by length."""
        ...

    @property
    def reports(self) -> tuple[str, ...]:
        """Fields it adds to ``Hypotheses``, of those that are ``None`` by default."""
        ...

    @property
    def weighs(self) -> bool:
        """Whether it asks for the mass of what is allowed: ``Expansion.allowed``."""
        ...

    @property
    def groups(self) -> int:
        """Parts of a beam that rank, finish and stop on their own; each is a request to ``select``."""
        ...

    def select(self, expansion: Expansion, k: int) -> Ranked | Decided:
        """What is to live on, best first; no host synchronisation, and nothing given is changed."""
        ...
