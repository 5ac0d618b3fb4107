"""What a term of the score is shown, and what it must tell.

``score = log_prob / norm(length) + sum of terms``. A term is a pure function of statistics that run along with every
beam: O(1) numbers a beam, or one per position of a source.
"""

from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor


class Seen(NamedTuple):
    """M continuations of each of R beams, by one token each."""

    tokens: Tensor  # int64 [R, M] or [1, M]
    token_log_probs: Tensor  # float32 [R, M], the model's, natural log, not above 0; -inf for what cannot follow
    best: Tensor  # float32 [R, 1], of the most probable token that may follow, EOS included
    lengths: Tensor  # float32 [R, 1], tokens with this one
    shortest: Tensor  # float32 [R, 1], fewest tokens that a longer hypothesis may end with
    longest: Tensor  # float32 [R, 1], max_length
    attention: Tensor | None  # float32 [R, 1, S], of this step, to the source; for terms that read it
    source_lengths: Tensor | None  # float32 [R, 1], as given to ``init``


@runtime_checkable
class Term(Protocol):
    """A term of the score; plain class attributes will do for the properties. No host synchronisation.

    Besides, a term may have

    - ``upper(value, stats, seen)``: what its value can at most become, float32 ``[R, M]`` or ``[R, 1]``, for
      continuations that go on, from what ``extend`` returned for them. ``fb.Exact()`` needs it.
    - ``reads_source_lengths``, a bool: ``BeamSearch.init`` refuses to start without ``source_lengths``. Where it is
      false or not there, ``Seen.source_lengths`` may be ``None``.
    - ``per_request``: its numbers that may differ by request, a tuple of objects like
      :class:`flashbeam.arguments.PerRequest`. The search refuses a batch of another size than they have values. A term
      lays them out by row itself, in ``init``: ``rows // B`` rows of each request in turn.

    What ``extend`` raises once the beams of a step are chosen leaves a state that is refused from there on.
    """

    @property
    def monotone(self) -> bool:
        """Within a row, the value is the same for all tokens or never falls as their log-probability rises."""
        ...

    @property
    def reads_attention(self) -> bool:
        """Whether ``step`` is to be given ``attention``."""
        ...

    def init(self, rows: int, device: torch.device) -> Any:
        """The statistics of beams without tokens: a nest of tensors ``[R, 1, ...]``."""
        ...

    def extend(self, stats: Any, seen: Seen) -> tuple[Tensor, Any]:
        """The value of the term for every continuation, float32 ``[R, M]`` or ``[R, 1]``, and their statistics.

        The statistics broadcast over M: ``[R, M, ...]``, or ``[R, 1, ...]`` where all of a row have the same.
        """
        ...
