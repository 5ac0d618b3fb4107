"""vLLM: ``LLM.beam_search(prompts, BeamSearchParams(...))``."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..arguments import PerRequest, finite_number, length_limit, whole_number
from ..dialect import Dialect
from ..scoring import LengthPower
from ..search import BeamSearch
from ..stopping import Exhausted
from .arguments import Elsewhere, count_of, in_terms_of_peer, refuse

_ELSEWHERE = {
    "temperature": Elsewhere(
        (0, 0.0),
        "vLLM ranks by raw log-probabilities: its temperature only adds a sampled token; BeamSearch(temperature=t)",
    ),
    "include_stop_str_in_output": Elsewhere((False, True), "hyps.tokens hold EOS"),
    "allowed_token_ids": Elsewhere((None,), "search.step(state, logits, bitmask), or a constraint"),
    "structured_outputs": Elsewhere((None,), "constraint=fb.Grammar(compiled)"),
    "stop": Elsewhere((None,), "eos_token_id; vLLM's beam search knows no other"),
    "n": Elsewhere((), "search.finalize(state, num_hypotheses=n)"),
}


def vllm(
    beam_width: Any,
    max_tokens: Any,
    eos_token_id: int | None,
    prompt_lengths: int | Sequence[int] | Tensor,
    *,
    length_penalty: float = 1.0,
    ignore_eos: bool = False,
    pad_id: int = 0,
    constraint: Any = None,
    vocab_size: int | None = None,
    **elsewhere: Any,
) -> BeamSearch:
    """Beam search as vLLM 0.33 runs it, offline and in its server.

    EOS finishes wherever it is among the 2 K best tokens of its row, and takes no beam's place. The search always runs
    for ``max_tokens`` steps; then what has finished and the live beams are ranked together, by
    ``log_prob / length ** length_penalty``, where the length counts the prompt and does not count EOS.

    Args:
        beam_width: K [B].
        max_tokens: most tokens, EOS included [B].
        eos_token_id: vLLM takes the tokenizer's.
        prompt_lengths: tokens of the prompt, 1 or more [B]; of an encoder-decoder, of its decoder's prompt.
        length_penalty: the exponent.
        ignore_eos: EOS is a token like any other. With a length penalty vLLM still leaves one that comes last out of
            the length, while it searches too: refused; ``eos_token_id=None`` counts it.
        pad_id, constraint, vocab_size: of :class:`flashbeam.BeamSearch`.
        elsewhere: further arguments of ``BeamSearchParams``, at the values that switch them off.

    Returns:
        The search. vLLM reports ``cumulative_logprob``: ``hyps.log_probs``.

    Raises:
        ValueError, TypeError: ``<argument>: expected X, got Y``, with what to use instead.
    """
    refuse("vLLM", elsewhere, _ELSEWHERE)
    alpha = finite_number("length_penalty", length_penalty)
    if ignore_eos and alpha != 0 and eos_token_id is not None:
        raise ValueError("ignore_eos: expected False where length_penalty is not 0, got True; eos_token_id=None")
    prompts = PerRequest("prompt_lengths", prompt_lengths, whole_number(1))
    norms = [LengthPower(alpha, offset=length) for length in prompts.values]
    widths = PerRequest("beam_width", beam_width, whole_number(1))
    count_of(widths, PerRequest("max_tokens", max_tokens, length_limit(1)), prompts)
    with in_terms_of_peer(beam_size="beam_width", max_length="max_tokens", eos_id="eos_token_id"):
        return BeamSearch(
            beam_width,
            max_tokens,
            None if ignore_eos else eos_token_id,
            pad_id=pad_id,
            length_penalty=norms[0] if prompts.shared else norms,
            stopping=Exhausted(),
            constraint=constraint,
            vocab_size=vocab_size,
            dialect=Dialect(finishes="row", counts_eos=False),
        )
