"""T5X: ``decoding.beam_search``, which Tensor2Tensor's became."""

from typing import Any

from ..arguments import nonnegative_number
from ..dialect import Dialect
from ..scoring import GNMT
from ..search import BeamSearch
from ..stopping import Exact
from .arguments import Elsewhere, refuse

_ELSEWHERE = {
    "decode_rng": Elsewhere((None,), "T5X does not read it either"),
    "cache_offset": Elsewhere((0,), "fb.reorder(cache, source_rows, dim=1)"),
}


def t5x(
    num_decodes: Any = 4,
    alpha: float = 0.6,
    max_decode_len: Any = 128,
    eos_id: int = 1,
    *,
    pad_id: int = 0,
    constraint: Any = None,
    vocab_size: int | None = None,
    **elsewhere: Any,
) -> BeamSearch:
    """Beam search as T5X runs it on an empty decoder prompt.

    An EOS candidate finishes if it is among the 2 K best of the step. The pool keeps the K best by
    ``log_prob / ((5 + length) / 6) ** alpha``, EOS counted; the request ends once no live beam can enter it. Live
    beams are returned only where nothing has finished, and then score their log-probability as it is. T5X returns
    hypotheses worst first, flashbeam best first.

    Args:
        num_decodes: K [B].
        alpha: 0 or above. Below, T5X stops by what is no bound, and the whole batch at once.
        max_decode_len: most tokens, EOS included [B]; T5X takes the length of its inputs.
        eos_id: T5's is 1.
        pad_id, constraint, vocab_size: of :class:`flashbeam.BeamSearch`.
        elsewhere: further arguments of ``beam_search``, at the values that switch them off.

    Returns:
        The search.

    Raises:
        ValueError, TypeError: ``<argument>: expected X, got Y``, with what to use instead.
    """
    refuse("T5X", elsewhere, _ELSEWHERE)
    return BeamSearch(
        num_decodes,
        max_decode_len,
        eos_id,
        pad_id=pad_id,
        length_penalty=GNMT(nonnegative_number("alpha", alpha)),
        stopping=Exact(),
        constraint=constraint,
        vocab_size=vocab_size,
        dialect=Dialect(finishes="double", at_max_length="spare"),
    )
