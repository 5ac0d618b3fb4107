"""Hugging Face transformers: ``generate(num_beams=...)``."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from flashbeam.kernels import Rule

from ..arguments import PerRequest, length_limit, token_ids, whole_number
from ..search import BeamSearch
from ..stopping import BestLive, Exact, Filled, Stopping
from .arguments import Elsewhere, ending_after, in_terms_of_peer, refuse

_BEAMS_ARE_NOT_SAMPLED = "transformers reads it only where do_sample=True: fb.Sample, fb.Stochastic"
_ELSEWHERE = {
    "num_return_sequences": Elsewhere((), "search.finalize(state, num_hypotheses=n)"),
    "max_length": Elsewhere((), "max_new_tokens, without the prompt"),
    "min_length": Elsewhere((0,), "min_new_tokens, without the prompt"),
    "do_sample": Elsewhere((False,), "BeamSearch(selection=fb.Stochastic(seed)) draws beams without replacement"),
    "temperature": Elsewhere((None, 1.0), _BEAMS_ARE_NOT_SAMPLED),
    "top_k": Elsewhere((None, 50), _BEAMS_ARE_NOT_SAMPLED),
    "top_p": Elsewhere((None, 1.0), _BEAMS_ARE_NOT_SAMPLED),
    "num_beam_groups": Elsewhere((None, 1), "BeamSearch(selection=fb.DiverseGroups(groups, strength))"),
    "diversity_penalty": Elsewhere((None, 0.0), "BeamSearch(selection=fb.DiverseGroups(groups, strength))"),
    "constraints": Elsewhere((None,), "constraint=fb.Phrases(phrases)"),
    "force_words_ids": Elsewhere((None,), "constraint=fb.Phrases(phrases)"),
    "prefix_allowed_tokens_fn": Elsewhere((None,), "constraint=fb.Trie(sequences)"),
    "bad_words_ids": Elsewhere((None,), "constraint=fb.ForbiddenPhrases(phrases)"),
    "no_repeat_ngram_size": Elsewhere((None, 0), "constraint=fb.NoRepeatNgram(n, prompt)"),
    "repetition_penalty": Elsewhere(
        (None, 1.0), "constraint=fb.RepetitionPenalty(penalty, prompt), on logits and not on log-probabilities"
    ),
    "suppress_tokens": Elsewhere((None,), "constraint=fb.ForbiddenPhrases([[token], ...])"),
    "forced_bos_token_id": Elsewhere((None,), "constraint=fb.Prefix([token])"),
    "forced_eos_token_id": Elsewhere(
        (None,), "dialect=fb.Dialect(at_max_length='end') adds its log-probability, not 0"
    ),
    "custom_generate": Elsewhere((), "model.generate(..., custom_generate=flashbeam.hf.generate)"),
}


@dataclass(frozen=True)
class _OrGreedy:
    """A rule for beams; a beam of one is greedy search and done with its first EOS, whatever the rule."""

    beams: Stopping

    @property
    def rule(self) -> Rule:
        """That of beams."""
        return self.beams.rule

    def quota(self, beam_size: int) -> int | None:
        """1 for a beam of one."""
        return 1 if beam_size == 1 else self.beams.quota(beam_size)


def huggingface(
    num_beams: Any = 1,
    max_new_tokens: Any = 20,
    eos_token_id: int | Sequence[int] | None = None,
    *,
    length_penalty: Any = 1.0,
    early_stopping: bool | str = False,
    min_new_tokens: Any = 0,
    pad_token_id: int | None = None,
    renormalize_logits: bool = False,
    constraint: Any = None,
    vocab_size: int | None = None,
    **elsewhere: Any,
) -> BeamSearch:
    """Beam search as ``transformers`` runs it, from 4.57 to 5.24.

    An EOS candidate finishes if it is among the K best of the step. The pool keeps the K best by
    ``log_prob / length ** length_penalty``, EOS counted and the prompt not; at ``max_new_tokens`` live beams join it.

    Args:
        num_beams: K [B]; 1 is greedy search, done at its first EOS whatever ``early_stopping`` says.
        max_new_tokens: most tokens, EOS included [B].
        eos_token_id: one or several.
        length_penalty: the exponent [B].
        early_stopping: ``True``: a full pool ends the request, and the step that fills it may still replace
            hypotheses. ``False``: so does a best live beam that would not enter the pool as it is, a guess that loses
            hypotheses where ``length_penalty > 0``. ``"never"``: when no live beam can enter it any more.
        min_new_tokens: fewest tokens before EOS, which is not counted here [B].
        pad_token_id: default EOS, as transformers has it.
        renormalize_logits: whether what ``min_new_tokens`` and the constraint bar keeps its share of the probability.
        constraint, vocab_size: of :class:`flashbeam.BeamSearch`, for what transformers' logits processors do.
        elsewhere: further arguments of ``generate``, at the values that switch them off.

    Returns:
        The search; its scores are ``sequences_scores``.

    Raises:
        ValueError, TypeError: ``<argument>: expected X, got Y``, with what to use instead.
    """
    refuse("transformers", elsewhere, _ELSEWHERE)
    stopping: Stopping
    if early_stopping is True:
        stopping = Filled()
    elif early_stopping is False:
        stopping = BestLive()
    elif early_stopping == "never":
        stopping = Exact()
    else:
        raise ValueError(f"early_stopping: expected True, False or 'never', got {early_stopping!r}")
    if pad_token_id is None:
        first = eos_token_id[0] if isinstance(eos_token_id, Sequence) and eos_token_id else eos_token_id
        pad_token_id = first if isinstance(first, int) else 0
    with in_terms_of_peer(
        beam_size="num_beams",
        max_length="max_new_tokens",
        min_length="min_new_tokens",
        eos_id="eos_token_id",
        pad_id="pad_token_id",
    ):
        widths = PerRequest("num_beams", num_beams, whole_number(1))
        low = PerRequest("min_new_tokens", min_new_tokens, whole_number(0))
        high = PerRequest("max_new_tokens", max_new_tokens, length_limit(1))
        min_length, constraint = ending_after(low, high, token_ids("eos_token_id", eos_token_id), constraint)
        return BeamSearch(
            num_beams,
            max_new_tokens,
            eos_token_id,
            pad_id=pad_token_id,
            min_length=min_length,
            length_penalty=length_penalty,
            stopping=_OrGreedy(stopping) if 1 in widths.values else stopping,
            constraint=constraint,
            normalize="allowed" if renormalize_logits else "vocab",
            vocab_size=vocab_size,
        )
