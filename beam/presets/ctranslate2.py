"""CTranslate2: ``Generator.generate_batch`` and ``Translator.translate_batch``."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..arguments import PerRequest, finite_number, length_limit, positive_number, token_ids, whole_number
from ..search import BeamSearch
from ..stopping import BestFinished, Patience, Stopping
from .arguments import Elsewhere, ending_after, refuse

_SAMPLING = "BeamSearch(selection=fb.Sample(seed, top_k, top_p)), or fb.Stochastic(seed)"
_ELSEWHERE = {
    "max_decoding_length": Elsewhere((), "max_length, as Generator calls it"),
    "min_decoding_length": Elsewhere((), "min_length, as Generator calls it; Translator's default is 1"),
    "coverage_penalty": Elsewhere((0, 0.0), "BeamSearch(terms=[fb.Coverage(...)]), which ranks candidates by it too"),
    "repetition_penalty": Elsewhere((1, 1.0), "constraint=fb.RepetitionPenalty(penalty)"),
    "no_repeat_ngram_size": Elsewhere((0,), "constraint=fb.NoRepeatNgram(n)"),
    "disable_unk": Elsewhere((False,), "constraint=fb.ForbiddenPhrases([[unk]])"),
    "suppress_sequences": Elsewhere((None,), "constraint=fb.ForbiddenPhrases(sequences)"),
    "target_prefix": Elsewhere((None,), "constraint=fb.Prefix(tokens), which counts their log-probabilities"),
    "prefix_bias_beta": Elsewhere((0, 0.0), "constraint=fb.Prefix(tokens), which is hard"),
    "static_prompt": Elsewhere((None,), "the prompt is run by your model"),
    "include_prompt_in_result": Elsewhere((False,), "the prompt is run by your model, not generated"),
    "return_alternatives": Elsewhere((False,), "search one prefix at a time"),
    "sampling_topk": Elsewhere((1,), _SAMPLING),
    "sampling_topp": Elsewhere((1, 1.0), _SAMPLING),
    "sampling_temperature": Elsewhere((1, 1.0), _SAMPLING),
    "return_end_token": Elsewhere((False, True), "hyps.tokens hold EOS"),
    "callback": Elsewhere((None,), "the loop is yours"),
}


@dataclass(frozen=True)
class _Rounded(Patience):
    """``beam_size * patience`` in float32, rounded half up; a beam of one is greedy search and has no patience."""

    def quota(self, beam_size: int) -> int:
        """At least 1."""
        return 1 if beam_size == 1 else max(1, math.floor(float(np.float32(beam_size) * np.float32(self.p)) + 0.5))


def ctranslate2(
    beam_size: Any = 1,
    patience: float = 1.0,
    length_penalty: float = 1.0,
    max_length: Any = 512,
    min_length: Any = 0,
    end_token: int | Sequence[int] | None = None,
    *,
    num_hypotheses: int = 1,
    pad_id: int = 0,
    constraint: Any = None,
    vocab_size: int | None = None,
    **elsewhere: Any,
) -> BeamSearch:
    """Beam search as CTranslate2 4.8 runs it; names and defaults are ``Generator``'s.

    An EOS candidate finishes if it is among the K best of the step. All that finish are kept, and
    ``round(beam_size * patience)`` of them end the request, together with what else finished in that step; at
    ``max_length`` the K best candidates join them. They are ranked by ``log_prob / length ** length_penalty``, EOS
    counted whether it is returned or not. What is barred, EOS before ``min_length`` too, is no part of the
    distribution. With ``length_penalty=0`` patience plays no role: ``num_hypotheses`` of them end the request, once one
    that finished was the best candidate of its step.

    Args:
        beam_size: K [B]; 1 is greedy search.
        patience: above 0.
        length_penalty: the exponent.
        max_length: most tokens, EOS included [B].
        min_length: fewest tokens before EOS [B].
        end_token: its number, or those of several. With several, CTranslate2 may run out of candidates and carry on
            with a beam that has ended; flashbeam does not.
        num_hypotheses: how many you will ask ``finalize`` for.
        pad_id, constraint, vocab_size: of :class:`flashbeam.BeamSearch`.
        elsewhere: further arguments of ``generate_batch``, at the values that switch them off. Its prompts are those
            of ``include_prompt_in_result=False``, all of one length: CTranslate2 generates the rest of longer ones.

    Returns:
        The search; its scores are ``result.scores``.

    Raises:
        ValueError, TypeError: ``<argument>: expected X, got Y``, with what to use instead.
    """
    refuse("CTranslate2", elsewhere, _ELSEWHERE)
    count, alpha = whole_number(1)("num_hypotheses", num_hypotheses), finite_number("length_penalty", length_penalty)
    rule = _Rounded(positive_number("patience", patience), overflow="step")
    stopping: Stopping = rule if alpha else BestFinished(count)
    low, high = (
        PerRequest("min_length", min_length, whole_number(0)),
        PerRequest("max_length", max_length, length_limit(1)),
    )
    least, constraint = ending_after(low, high, token_ids("end_token", end_token), constraint)
    search = BeamSearch(
        beam_size,
        max_length,
        end_token,
        pad_id=pad_id,
        min_length=least,
        length_penalty=alpha,
        stopping=stopping,
        constraint=constraint,
        normalize="allowed",
        vocab_size=vocab_size,
    )
    most = min(rule.quota(width) if alpha else width for width in search.beam_size.values)
    if count > most:
        limit = "beam_size * patience" if alpha else "beam_size, for length_penalty=0"
        raise ValueError(f"num_hypotheses: expected at most {limit}, {most}, got {count}")
    return search
