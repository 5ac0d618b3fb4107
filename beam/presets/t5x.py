"""T5X: ``decoding.beam_search``, which Tensor2Tensor's became."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..arguments import PerRequest, nonnegative_number, whole_number
from ..dialect import Dialect
from ..scoring import GNMT
from ..search import BeamSearch
from ..stopping import Exact
from .arguments import Elsewhere, count_of, in_terms_of_peer, refuse

_ELSEWHERE = {
    "decode_rng": Elsewhere((None,), "T5X does not read it either"),
    "cache_offset": Elsewhere((0,), "fb.reorder(cache, source_rows, dim=1)"),
}


def t5x(
    num_decodes: Any = 4,
    alpha: float = 0.6,
    max_decode_len: int = 128,
    eos_id: int = 1,
    *,
    prompt_lengths: int | Sequence[int] | Tensor = 0,
    pad_id: int = 0,
    constraint: Any = None,
    vocab_size: int | None = None,
    **elsewhere: Any,
) -> BeamSearch:
    """Beam search as T5X runs it.

    An EOS candidate finishes if it is among the 2 K best of the step. The pool keeps the K best by
    ``log_prob / ((5 + length) / 6) ** alpha``, EOS counted; the request ends once no live beam can enter it. Live
    beams are returned only where nothing has finished, and then score their log-probability as it is. T5X returns
    hypotheses worst first, flashbeam best first.

    Args:
        num_decodes: K [B].
        alpha: 0 or above. Below, T5X stops by what is no bound, and the whole batch at once.
        max_decode_len: most tokens, those of the prompt and EOS included; T5X takes the length of its inputs.
        eos_id: T5's is 1.
        prompt_lengths: tokens of the decoder's prompt, behind the dummy it starts with; they count in the length [B].
        pad_id, constraint, vocab_size: of :class:`flashbeam.BeamSearch`.
        elsewhere: further arguments of ``beam_search``, at the values that switch them off.

    Returns:
        The search.

    Raises:
        ValueError, TypeError: ``<argument>: expected X, got Y``, with what to use instead.
    """
    refuse("T5X", elsewhere, _ELSEWHERE)
    alpha, most = nonnegative_number("alpha", alpha), whole_number(1)("max_decode_len", max_decode_len)
    prompts = PerRequest("prompt_lengths", prompt_lengths, whole_number(0))
    if max(prompts.values) >= most:
        raise ValueError(f"prompt_lengths: expected below max_decode_len, {most}, got {max(prompts.values)}")
    norms, lengths = [GNMT(alpha, offset=n) for n in prompts.values], [most - n for n in prompts.values]
    count_of(PerRequest("num_decodes", num_decodes, whole_number(1)), prompts)
    with in_terms_of_peer(beam_size="num_decodes", max_length="max_decode_len", length_penalty="alpha"):
        return BeamSearch(
            num_decodes,
            lengths[0] if prompts.shared else lengths,
            eos_id,
            pad_id=pad_id,
            length_penalty=norms[0] if prompts.shared else norms,
            stopping=Exact(),
            constraint=constraint,
            vocab_size=vocab_size,
            dialect=Dialect(finishes="double", at_max_length="spare"),
        )
