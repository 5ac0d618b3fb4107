"""fairseq: ``SequenceGenerator``, by the names of ``fairseq-generate``."""

from dataclasses import dataclass
from typing import Any

import torch

from ..arguments import finite_number, whole_number
from ..dialect import Dialect
from ..search import BeamSearch
from ..selection import Expansion, Ranked
from ..selection.rescored import ranked_by, rows_of
from ..stopping import Patience
from .arguments import Elsewhere, barring, in_terms_of_peer, refuse

_SAMPLING = "BeamSearch(selection=fb.Sample(seed, top_k, top_p))"
_ELSEWHERE = {
    "nbest": Elsewhere((), "search.finalize(state, num_hypotheses=n)"),
    "max_len": Elsewhere((0,), "max_len_a and max_len_b"),
    "match_source_len": Elsewhere((False,), "max_len_a=1, max_len_b=0; what is longer scores -inf in fairseq"),
    "no_repeat_ngram_size": Elsewhere((0,), "constraint=fb.NoRepeatNgram(n)"),
    "sampling": Elsewhere((False,), _SAMPLING),
    "sampling_topk": Elsewhere((-1,), _SAMPLING),
    "sampling_topp": Elsewhere((-1.0,), _SAMPLING),
    "diverse_beam_groups": Elsewhere((-1, 1), "BeamSearch(selection=fb.DiverseGroups(groups, strength))"),
    "diverse_beam_strength": Elsewhere((0.5,), "BeamSearch(selection=fb.DiverseGroups(groups, strength))"),
    "diversity_rate": Elsewhere((-1.0, 0.0), "BeamSearch(selection=fb.DiverseSiblings(rate))"),
    "constraints": Elsewhere((None,), "constraint=fb.Phrases(phrases)"),
    "prefix_size": Elsewhere((0,), "constraint=fb.Prefix(tokens)"),
    "prefix_allowed_tokens_fn": Elsewhere((None,), "constraint=fb.Trie(sequences)"),
    "suppress_tokens": Elsewhere(((),), "constraint=fb.ForbiddenPhrases([[token], ...])"),
    "lm_path": Elsewhere((None,), "BeamSearch(models=fb.Mixture(...))"),
    "no_early_stop": Elsewhere((False,), "BeamSearch(stopping=fb.Exhausted())"),
}


@dataclass(frozen=True)
class _Penalised:
    """The best candidates, a token's log-probability reduced before it is added up."""

    token: int
    penalty: float

    regimes = ("pool",)
    seed = None
    reports = ()
    weighs = False
    groups = 1
    uses = ()

    def select(self, expansion: Expansion, k: int) -> Ranked:
        """See :class:`flashbeam.selection.Selection`."""
        if self.token >= expansion.vocab_size:
            vocab_size = expansion.vocab_size
            raise ValueError(f"unk: expected an id inside the vocabulary of {vocab_size}, got {self.token}")
        rows = rows_of(expansion)
        increments = rows.token_log_probs()
        increments[:, self.token] -= self.penalty
        before = expansion.slots.scores[:, : expansion.parents].reshape(-1, 1)
        found = ranked_by(expansion, rows, before + increments, k)
        if self.penalty > 0:
            return found
        return found._replace(bound=torch.full_like(found.candidates.scores[:, 0], torch.inf))  # scores may rise


@dataclass(frozen=True)
class _Limit:
    """``max_len_a * source + max_len_b`` tokens, and EOS."""

    a: float
    b: int

    def __call__(self, source_length: int) -> int:
        return int(self.a * source_length + self.b) + 1


def fairseq(
    beam: Any = 5,
    *,
    lenpen: float = 1.0,
    max_len_a: float = 0.0,
    max_len_b: int = 200,
    min_len: int = 1,
    unnormalized: bool = False,
    unkpen: float = 0.0,
    temperature: Any = 1.0,
    eos: int = 2,
    pad: int = 1,
    unk: int = 3,
    constraint: Any = None,
    vocab_size: int | None = None,
    **elsewhere: Any,
) -> BeamSearch:
    """Beam search as fairseq 0.12.2 runs it.

    An EOS candidate finishes if it is among the K best of the step. The first K that finish are returned, in whatever
    step that is; what a step finishes beyond K is dropped. Behind ``max_len_a * source + max_len_b`` tokens every live
    beam is ended by force, EOS at its log-probability. Padding never follows.

    Args:
        beam: K [B].
        lenpen: ``score = log_prob / length ** lenpen``, EOS counted.
        max_len_a, max_len_b: most tokens before EOS. With ``max_len_a`` other than 0, ``search.init`` needs
            ``source_lengths``: the tokens of each source, its EOS counted. fairseq takes the longest of the batch for
            all of them; so does ``source_lengths=[longest] * batch_size``.
        min_len: fewest tokens before EOS.
        unnormalized: rank by log-probability; ``lenpen`` is not read.
        unkpen: taken from the log-probability of ``unk`` whenever it is generated, in ``hyps.scores`` too; not in
            ``hyps.log_probs``. Below 0 it favours ``unk``.
        temperature: divides the logits [B].
        eos, pad, unk: fairseq's own numbers, a ``Dictionary``'s.
        constraint, vocab_size: of :class:`flashbeam.BeamSearch`; with ``unkpen`` only constraints that are masks.
        elsewhere: further arguments of ``fairseq-generate``, at the values that switch them off.

    Returns:
        The search; its scores are ``hypo["score"]``.

    Raises:
        ValueError, TypeError: ``<argument>: expected X, got Y``, with what to use instead.
    """
    refuse("fairseq", elsewhere, _ELSEWHERE)
    a, b = finite_number("max_len_a", max_len_a), whole_number(0)("max_len_b", max_len_b)
    if whole_number(0)("min_len", min_len) > b and a == 0:
        raise ValueError(f"min_len: expected at most max_len_b, {b}, got {min_len}")
    limit = _Limit(a, b)
    penalty = finite_number("unkpen", unkpen)
    with in_terms_of_peer(beam_size="beam", max_length="max_len_b", min_length="min_len", length_penalty="lenpen"):
        return BeamSearch(
            beam,
            limit if a != 0 else limit(0),
            whole_number(0)("eos", eos),
            pad_id=whole_number(0)("pad", pad),
            min_length=min_len + 1 if min_len > 0 else 0,
            length_penalty=0.0 if unnormalized else finite_number("lenpen", lenpen),
            stopping=Patience(1.0, overflow="never"),
            selection=None if penalty == 0 else _Penalised(whole_number(0)("unk", unk), penalty),
            constraint=barring(constraint, [pad]),
            temperature=temperature,
            vocab_size=vocab_size,
            dialect=Dialect(at_max_length="end"),
        )
