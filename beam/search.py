"""Beam search as three calls: ``init``, ``step`` for each row of logits the model gives, ``finalize``."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashbeam.kernels import Moves, advance_chosen_, advance_in_place_, advance_pool_

from .agreement import check_agreement
from .arguments import PerRequest, length_limit, positive_number, token_ids, whole_number
from .budget import Budget, spend
from .compiled import settle
from .constrained import begin, follow_beams
from .constraint import as_constraint
from .dialect import Dialect
from .expansion import expand
from .hypotheses import Hypotheses, collect
from .models import Models
from .scoring import Scoring, as_scoring
from .scoring.running import as_terms, follow_terms
from .selection import Decided, Expansion, Ranked, Selection, TopK
from .start import start
from .state import State
from .statistics import note, observe
from .stopping import FirstFinished, Stopping


class Step(NamedTuple):
    """What the model is to be run on next."""

    tokens: Tensor  # int64 [B, K]; pad_id in slots that do not go on
    parents: Tensor  # int64 [B, K], slot in the previous beam
    source_rows: Tensor  # int64 [B * K], row of the logits just consumed that each beam continues
    valid: Tensor  # bool [B, K]; in place also slots that hold a finished hypothesis, until their request is done


class BeamSearch:
    """A batched beam search: the settings, checked once. Holds no state; one object serves any number of searches.

    Arguments marked [B] may be one value, or a list or CPU tensor with one per request.

    Args:
        beam_size: beams per request, 1 or more [B].
        max_length: most tokens a hypothesis may have, EOS included; or a function of the source's length, see ``init``,
            that gives it [B].
        eos_id: the token that ends a hypothesis, a list of such tokens, or ``None`` if none does.
        pad_id: the token that fills what is not used; inside the vocabulary.
        min_length: fewest tokens a finished hypothesis may have, EOS included; or a function as above [B].
        length_penalty: ``score = log_prob / length ** length_penalty``; 0 ranks by log-probability; or
            ``fb.GNMT(alpha)`` [B].
        stopping: ``fb.FirstFinished()``, ``fb.Patience(p)``, ``fb.Exact()`` or ``fb.Exhausted()``; or ``fb.Filled()``,
            ``fb.BestLive()``, ``fb.BestFinished(n)``, ``fb.Shrinking()``. In place, a request ends when every slot has
            ended, whichever of the first five but another patience is given.
        finished: ``"pool"``: a finished hypothesis leaves the beam; ``"in_place"``: it stays in its slot and competes;
            ``None``: what the selection asks for.
        selection: how the next beams are chosen; ``fb.TopK()``.
        constraint: what may follow: ``fb.Trie(items)``, ``fb.Phrases(phrases)``, ..., ``fb.AllOf(a, b)`` or one of your
            own (:class:`flashbeam.constraint.Constraint`); ``None``: anything [B].
        normalize: ``"vocab"``: what is banned keeps its share of the probability; ``"allowed"``: renormalise.
        temperature: divides the logits, above 0 [B].
        vocab_size: columns of the logits from here on are padding; ``None``: there are none.
        dialect: who may finish, what becomes of live beams at ``max_length``, what the length counts:
            ``fb.Dialect(...)``; only where finished hypotheses go to a pool.
        budget: ``fb.Budget(tokens, seconds)``: stop when it is spent and return the best so far; ``None``: no limit.
        models: how the logits of several models become one row: ``fb.Mixture(weights)``, ``fb.Contrast()``,
            ``fb.Switch()``; every step is then given a tuple of logits. See docs/models.md.
        terms: what is added to the score: ``fb.UID(kind, strength)``, ``fb.TokenReward(r)``, ``fb.WordReward(r, ids)``,
            ``fb.Coverage(beta)`` or one's own (:class:`flashbeam.scoring.Term`); a list of them. See docs/scoring.md.
        statistics: record what each step was like, ``state.statistics`` (:class:`flashbeam.Statistics`). The results
            are the same; a step takes a pass over the logits and a selection more.

    Raises:
        ValueError, TypeError: ``<argument>: expected X, got Y``.
    """

    def __init__(
        self,
        beam_size: Any = 4,
        max_length: Any = 64,
        eos_id: int | Sequence[int] | None = None,
        *,
        pad_id: int = 0,
        min_length: Any = 0,
        length_penalty: Any = 1.0,
        stopping: Stopping | None = None,
        finished: str | None = None,
        selection: Selection | None = None,
        constraint: Any = None,
        normalize: str = "vocab",
        temperature: Any = 1.0,
        vocab_size: int | None = None,
        dialect: Dialect | None = None,
        budget: Budget | None = None,
        terms: Any = (),
        models: Models | None = None,
        statistics: bool = False,
    ):
        self.beam_size = PerRequest("beam_size", beam_size, whole_number(1))
        self.max_length = PerRequest("max_length", max_length, length_limit(1))
        self.min_length = PerRequest("min_length", min_length, length_limit(0))
        self.temperature = PerRequest("temperature", temperature, positive_number)
        self.length_penalty: PerRequest[Scoring] = PerRequest("length_penalty", length_penalty, as_scoring)
        self.eos_ids = token_ids("eos_id", eos_id)
        self.pad_id = whole_number(0)("pad_id", pad_id)
        self.vocab_size = None if vocab_size is None else whole_number(1)("vocab_size", vocab_size)
        self.selection: Selection = TopK() if selection is None else selection
        if not isinstance(self.selection, Selection) or isinstance(self.selection, type):
            raise TypeError(f"selection: expected a selection such as fb.TopK(), got {selection!r}")
        self.stopping = FirstFinished() if stopping is None else stopping
        if not isinstance(self.stopping, Stopping) or isinstance(self.stopping, type):
            raise TypeError(f"stopping: expected a rule such as fb.FirstFinished(), got {stopping!r}")
        self.constraint: PerRequest[Any] = PerRequest("constraint", constraint, as_constraint)
        if normalize not in ("vocab", "allowed"):
            raise ValueError(f"normalize: expected 'vocab' or 'allowed', got {normalize!r}")
        self.normalize = normalize
        if finished not in (None, *self.selection.regimes):
            raise ValueError(f"finished: expected one of {list(self.selection.regimes)} or None, got {finished!r}")
        self.finished = self.selection.regimes[0] if finished is None else finished
        self.dialect = Dialect() if dialect is None else dialect
        if not isinstance(self.dialect, Dialect):
            raise TypeError(f"dialect: expected fb.Dialect(...), got {type(dialect).__name__}")
        self.budget = budget
        if budget is not None and not isinstance(budget, Budget):
            raise TypeError(f"budget: expected fb.Budget(...) or None, got {type(budget).__name__}")
        self.terms = as_terms(terms)
        if not isinstance(statistics, bool):
            raise TypeError(f"statistics: expected a bool, got {type(statistics).__name__}")
        self.statistics = statistics
        self.models = models
        check_agreement(self)

    def per_request(self) -> tuple[PerRequest[Any], ...]:
        """The arguments that may differ by request."""
        numbers = self.beam_size, self.max_length, self.min_length, self.temperature, self.length_penalty
        extras = () if self.budget is None or self.budget.tokens is None else (self.budget.tokens,)
        rates = (rate for term in self.terms for rate in getattr(term, "per_request", ()))
        return (*numbers, self.constraint, *extras, *rates)

    @torch.inference_mode(False)  # a state made under inference mode could not be changed outside it
    def init(
        self,
        batch_size: int,
        device: torch.device | str = "cpu",
        request_ids: Tensor | Sequence[int] | None = None,
        source_lengths: Tensor | Sequence[int] | None = None,
    ) -> State:
        """Start a search of ``batch_size`` requests.

        Args:
            batch_size: B; the length of every per-request list.
            device: where the logits will be.
            request_ids: int64 ``[B]``, name the requests for the randomness; default ``0 .. B - 1``.
            source_lengths: per request, a list or CPU tensor ``[B]``: what ``max_length`` and ``min_length`` are
                functions of, where they are; and what terms read, ``fb.TokenReward(per_source_token=...)`` always and
                ``fb.Coverage`` if given.

        Returns:
            A :class:`State`: slot 0 of each request is live and empty.
        """
        return start(self, batch_size, torch.device(device), request_ids, source_lengths)

    def step(
        self,
        state: State,
        logits: Tensor | Sequence[Tensor],
        bitmask: Tensor | None = None,
        *,
        attention: Tensor | None = None,
        weights: Tensor | None = None,
        gate: Tensor | None = None,
    ) -> Step:
        """Consume the model's logits for the current beams and choose the next ones.

        Args:
            state: changed in place; unchanged if an error is raised. Only a constraint or a term of the user's own may
                raise one once beams have been chosen, in ``advance`` or ``accepts``, or in ``extend``: then the state
                is refused from there on.
            logits: ``[B * K, V]`` or ``[B, K, V]`` float32, float16 or bfloat16, unit stride over ``V``; on the first
                call also ``[B, V]``. Not modified. Rows of slots that are not valid are not read. With ``models`` a
                tuple of such tensors, one per model.
            bitmask: int32, one row of ``ceil(V / 32)`` words per row of logits or per request: bit ``j % 32`` of word
                ``j // 32`` is set where token ``j`` may follow. In addition to the constraint.
            attention: ``[R, S]`` or ``[B, R / B, S]`` float32, float16 or bfloat16 for R rows of logits, S the same at
                every step: what the rows paid to the positions of the source, 0 at padding; for ``fb.Coverage``.
            weights: ``[R, M]``, ``[B, R / B, M]`` or ``[B, M]`` float32, the models' weights at this step, for
                ``fb.Mixture``.
            gate: ``[R]``, ``[B, R / B]`` or ``[B]``, bool, int64 or float32, for ``fb.Switch``.

        Returns:
            A :class:`Step`.

        Raises:
            ValueError, TypeError: ``<argument>: expected X, got Y``.
        """
        found = expand(self, state, logits, bitmask, attention, {"weights": weights, "gate": gate})
        selected = self.selection.select(found.expansion, state.slots.log_probs.shape[1])
        if found.flags is not None:
            selected = selected.with_flags(found.flags)
        seen = None if state.record is None else observe(state, found.expansion, selected)
        terms, best = found.expansion.terms, selected.best_tokens if isinstance(selected, Ranked) else None
        # known before the step and used after it
        seen, best, terms = settle((seen, best, terms))
        # nothing can be refused from here on: what follows changes the state
        if state.constraint is None and found.constraint is not None:
            begin(state, found.constraint, found.constraint_state)
        state.vocab_size, state.eos_bitmasks = found.columns, found.eos_bitmasks
        state.source_size = None if attention is None else attention.shape[-1]
        moves = self._advance(state, found.expansion, selected)
        step = self._step_of_groups(state, moves, found.given)
        spend(state)
        if terms is not None:
            assert best is not None
            follow_terms(state, found.term_stats, terms, best, step)
        per_request = state.beam_size if found.given is None else found.given
        if state.constraint is not None:
            step = follow_beams(state, state.constraint, step, self.pad_id, per_request)
        if seen is not None:
            note(state, seen, moves)
        return step

    def _advance(self, state: State, expansion: Expansion, selected: Ranked | Decided) -> Moves:
        """Carry out what was selected."""
        if isinstance(selected, Decided):
            return advance_chosen_(
                selected.choice,
                selected.flags,
                state.slots,
                state.draws,
                state.requests,
                state.history,
                state.limits,
                eos=state.eos,
                pad_id=self.pad_id,
            )
        common = (expansion.logits, selected.candidates, state.slots, state.requests, state.history)
        if state.in_place:
            return advance_in_place_(
                *common,
                state.limits,
                eos=state.eos,
                pad_id=self.pad_id,
                bitmask=expansion.bitmask,
                temperature=expansion.temperature,
                end_penalty=selected.end_penalty,
                end_scores=selected.end_scores,
            )
        return advance_pool_(
            *common,
            state.pool,
            state.limits,
            state.bound,
            eos=state.eos,
            pad_id=self.pad_id,
            rule=self.stopping.rule,
            bitmask=expansion.bitmask,
            temperature=expansion.temperature,
            end_penalty=selected.end_penalty,
            end_scores=selected.end_scores,
            finishing=selected.finishing,
            best_possible=selected.bound,
        )

    @staticmethod
    def _step_of_groups(state: State, moves: Moves, given: int | None) -> Step:
        """The moves of all groups of a request side by side; ``given`` rows of each were repeated at its first step."""
        if state.groups == 1:
            return Step(*moves)
        slots = moves.parents.shape[1]
        shift = torch.arange(0, state.beam_size, slots, device=state.device).repeat(state.batch_size)[:, None]
        shape = (state.batch_size, state.beam_size)
        rows = moves.source_rows if given is None else moves.source_rows // state.groups * given
        parents = (moves.parents + shift).view(shape)
        return Step(moves.tokens.view(shape), parents, rows, moves.valid.view(shape))

    def finalize(self, state: State, num_hypotheses: int | None = None) -> Hypotheses:
        """The n-best of each request. May be called at any time; beams still live then compete as they are.

        Args:
            state: not modified.
            num_hypotheses: N; default each request's ``beam_size``, N the widest. More than exist gives rows that are
                not valid.

        Returns:
            :class:`Hypotheses`.
        """
        if num_hypotheses is not None:
            whole_number(1)("num_hypotheses", num_hypotheses)
        return replace(collect(state, num_hypotheses), statistics=state.statistics)
