"""Beam search as three calls: ``init``, ``step`` for each row of logits the model gives, ``finalize``."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from flashbeam.kernels import History, Limits, Pool, Requests, Slots, advance_in_place_, advance_pool_, pack_bitmask

from .arguments import PerRequest, positive_number, token_ids, whole_number
from .cache import reorder
from .checks import as_bitmask, as_request_ids, as_rows
from .constraint import Constraint
from .hypotheses import Hypotheses, collect
from .scoring import Scoring, as_scoring, check_norms, norm_tables
from .selection import Expansion, Selection, TopK
from .state import State
from .stopping import FirstFinished, Stopping


class Step(NamedTuple):
    """What the model is to be run on next."""

    tokens: Tensor  # int64 [B, K]; pad_id in slots that do not go on
    parents: Tensor  # int64 [B, K], slot in the previous beam
    source_rows: Tensor  # int64 [B * K], row of the logits just consumed that each beam continues
    valid: Tensor  # bool [B, K]


class BeamSearch:
    """A batched beam search: the settings, checked once. Holds no state; one object serves any number of searches.

    Arguments marked [B] may be one value, or a list or CPU tensor with one per request.

    Args:
        beam_size: beams per request, 1 or more [B].
        max_length: most tokens a hypothesis may have, EOS included [B].
        eos_id: the token that ends a hypothesis, a list of such tokens, or ``None`` if none does.
        pad_id: the token that fills what is not used; inside the vocabulary.
        min_length: fewest tokens a finished hypothesis may have, EOS included [B].
        length_penalty: ``score = log_prob / length ** length_penalty``; 0 ranks by log-probability; or
            ``fb.GNMT(alpha)`` [B].
        stopping: ``fb.FirstFinished()``, ``fb.Patience(p)``, ``fb.Exact()`` or ``fb.Exhausted()``. In place, a request
            ends when every slot has ended, whichever of these but another patience is given.
        finished: ``"pool"``: a finished hypothesis leaves the beam; ``"in_place"``: it stays in its slot and competes;
            ``None``: what the selection asks for.
        selection: how the next beams are chosen; ``fb.TopK()``.
        constraint: what may follow, see :class:`flashbeam.constraint.Constraint`.
        normalize: ``"vocab"``: what is banned keeps its share of the probability; ``"allowed"``: renormalise.
        temperature: divides the logits, above 0 [B].
        vocab_size: columns of the logits from here on are padding; ``None``: there are none.

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
        constraint: Constraint | None = None,
        normalize: str = "vocab",
        temperature: Any = 1.0,
        vocab_size: int | None = None,
    ):
        self.beam_size = PerRequest("beam_size", beam_size, whole_number(1))
        self.max_length = PerRequest("max_length", max_length, whole_number(1))
        self.min_length = PerRequest("min_length", min_length, whole_number(0))
        self.temperature = PerRequest("temperature", temperature, positive_number)
        self.length_penalty: PerRequest[Scoring] = PerRequest("length_penalty", length_penalty, as_scoring)
        self.eos_ids = token_ids("eos_id", eos_id)
        self.pad_id = whole_number(0)("pad_id", pad_id)
        self.vocab_size = None if vocab_size is None else whole_number(1)("vocab_size", vocab_size)
        self.selection = TopK() if selection is None else selection
        if not isinstance(self.selection, Selection) or isinstance(self.selection, type):
            raise TypeError(f"selection: expected a selection such as fb.TopK(), got {selection!r}")
        self.stopping = FirstFinished() if stopping is None else stopping
        if not isinstance(self.stopping, Stopping) or isinstance(self.stopping, type):
            raise TypeError(f"stopping: expected a rule such as fb.FirstFinished(), got {stopping!r}")
        if constraint is not None and (not isinstance(constraint, Constraint) or isinstance(constraint, type)):
            raise TypeError(f"constraint: expected a constraint, got {constraint!r}")
        self.constraint = constraint
        if normalize not in ("vocab", "allowed"):
            raise ValueError(f"normalize: expected 'vocab' or 'allowed', got {normalize!r}")
        self.normalize = normalize
        if finished not in (None, *self.selection.regimes):
            raise ValueError(f"finished: expected one of {list(self.selection.regimes)} or None, got {finished!r}")
        self.finished = self.selection.regimes[0] if finished is None else finished
        waits = all(self.stopping.quota(width) == width for width in self.beam_size.values)
        if self.finished == "in_place" and self.stopping.by_arrival and not waits:
            raise ValueError(
                f"stopping: expected a rule that lets every slot end, for finished='in_place', got {self.stopping!r}"
            )
        batch_sizes = {argument.name: len(argument.values) for argument in self._per_request() if not argument.shared}
        if len(set(batch_sizes.values())) > 1:
            name, size = next(iter(batch_sizes.items()))
            other = next(other for other, n in batch_sizes.items() if n != size)
            raise ValueError(f"{other}: expected as many values as {name}, {size}, got {batch_sizes[other]}")
        for low, high in zip(*self._broadcast(self.min_length, self.max_length), strict=True):
            if low > high:
                raise ValueError(f"min_length: expected at most max_length, {high}, got {low}")
        for scoring, high in zip(*self._broadcast(self.length_penalty, self.max_length), strict=True):
            check_norms("length_penalty", scoring, high)

    def _per_request(self) -> tuple[PerRequest[Any], ...]:
        return self.beam_size, self.max_length, self.min_length, self.temperature, self.length_penalty

    @staticmethod
    def _broadcast(*arguments: PerRequest[Any]) -> tuple[list[Any], ...]:
        size = max(len(argument.values) for argument in arguments)
        return tuple(argument.of_batch(size) for argument in arguments)

    @torch.inference_mode(False)  # a state made under inference mode could not be changed outside it
    def init(
        self,
        batch_size: int,
        device: torch.device | str = "cpu",
        request_ids: Tensor | Sequence[int] | None = None,
    ) -> State:
        """Start a search of ``batch_size`` requests.

        Args:
            batch_size: B; the length of every per-request list.
            device: where the logits will be.
            request_ids: int64 ``[B]``, name the requests for the randomness; default ``0 .. B - 1``.

        Returns:
            A :class:`State`: slot 0 of each request is live and empty.
        """
        whole_number(1)("batch_size", batch_size)
        widths, max_lengths, min_lengths, temperatures, scorings = (
            argument.of_batch(batch_size) for argument in self._per_request()
        )
        device = torch.device(device)
        ids = as_request_ids(request_ids, batch_size, device)
        beams, steps = max(widths), max(max_lengths)
        # no more than this can ever finish
        quotas = [min(self.stopping.quota(width), beams * steps) for width in widths]
        in_place = self.finished == "in_place"
        places = 1 if in_place else max(quotas) + beams if self.stopping.by_arrival else beams

        def on_device(values: Any, dtype: type) -> Tensor:
            return torch.from_numpy(np.asarray(values, dtype)).to(device, non_blocking=True)

        def new(shape: tuple[int, ...], value: float, dtype: torch.dtype) -> Tensor:
            return torch.full(shape, value, dtype=dtype, device=device)

        slot_shape, pool_shape, history_shape = (batch_size, beams), (batch_size, places), (steps, batch_size, beams)
        slots = Slots(
            log_probs=new(slot_shape, -torch.inf, torch.float32),
            lengths=new(slot_shape, 0, torch.int32),
            ranks=new(slot_shape, 0, torch.int32),
            ended=new(slot_shape, False, torch.bool),
            active=new(slot_shape, False, torch.bool),
            scores=new(slot_shape, -torch.inf, torch.float32),
        )
        slots.log_probs[:, 0].zero_()
        slots.scores[:, 0].zero_()
        slots.active[:, 0].fill_(True)
        flat = all(temperature == 1.0 for temperature in temperatures)
        return State(
            slots=slots,
            requests=Requests(
                done=new((batch_size,), False, torch.bool),
                flags=new((batch_size,), 0, torch.int32),
                steps=new((batch_size,), 0, torch.int32),
            ),
            history=History(
                tokens=new(history_shape, 0, torch.int32),
                parents=new(history_shape, 0, torch.int32),
                token_log_probs=new(history_shape, 0.0, torch.float32),
            ),
            pool=Pool(
                *(new(pool_shape, -torch.inf, torch.float32) for _ in range(3)),
                *(new(pool_shape, 0, torch.int32) for _ in range(4)),
            ),
            limits=Limits(
                *(on_device(values, np.int32) for values in (widths, min_lengths, max_lengths, quotas)),
                *(on_device(table, np.float32) for table in norm_tables(scorings, min_lengths, max_lengths)),
            ),
            temperature=None if flat else on_device(np.repeat(temperatures, beams), np.float32).view(slot_shape),
            eos=on_device(self.eos_ids, np.int64) if self.eos_ids else None,
            request_ids=ids,
            in_place=in_place,
            pad_id=self.pad_id,
        )

    def step(self, state: State, logits: Tensor, bitmask: Tensor | None = None) -> Step:
        """Consume the model's logits for the current beams and choose the next ones.

        Args:
            state: changed in place; unchanged if an error is raised.
            logits: ``[B * K, V]`` or ``[B, K, V]`` float32, float16 or bfloat16, unit stride over ``V``; on the first
                call also ``[B, V]``. Not modified. Rows of slots that are not valid are not read.
            bitmask: int32, one row of ``ceil(V / 32)`` words per row of logits or per request: bit ``j % 32`` of word
                ``j // 32`` is set where token ``j`` may follow. In addition to the constraint.

        Returns:
            A :class:`Step`.

        Raises:
            ValueError, TypeError: ``<argument>: expected X, got Y``.
        """
        rows, vocab_size = as_rows(state, logits, self.vocab_size, self.eos_ids)
        mask = None if bitmask is None else as_bitmask(state, bitmask, rows.shape[0], vocab_size)
        parents = rows.shape[0] // state.batch_size
        constraint_state, without_eos = self._begun(state, vocab_size)
        if self.constraint is not None:
            allowed = self.constraint.bitmask(constraint_state)
            allowed = as_bitmask(state, allowed, state.batch_size * state.beam_size, vocab_size, "constraint's bitmask")
            if parents != state.beam_size:
                allowed = allowed.unflatten(0, (state.batch_size, -1))[:, 0]
            mask = allowed if mask is None else allowed & mask
        mask = self._without_banned_eos(state, without_eos, mask, rows.shape[0])
        temperature = None if state.temperature is None else state.temperature[:, :parents].flatten()
        best = self.selection.select(
            Expansion(
                logits=rows,
                log_probs=state.slots.log_probs[:, :parents],
                active=state.slots.active[:, :parents].flatten(),
                bitmask=mask,
                temperature=temperature,
                exclude=state.eos,
                divisor=self._next_norm(state) if state.in_place else None,
                normalize=self.normalize,
                vocab_size=vocab_size,
            ),
            state.beam_size,
        )
        # nothing can be refused from here on: what follows changes the state
        state.vocab_size, state.constraint_state, state.without_eos = logits.shape[-1], constraint_state, without_eos
        common = (rows, best, state.slots, state.requests, state.history)
        if state.in_place:
            moves = advance_in_place_(
                *common, state.limits, eos=state.eos, pad_id=self.pad_id, bitmask=mask, temperature=temperature
            )
        else:
            moves = advance_pool_(
                *common,
                state.pool,
                state.limits,
                eos=state.eos,
                pad_id=self.pad_id,
                by_arrival=self.stopping.by_arrival,
                exact=self.stopping.exact,
                bitmask=mask,
                temperature=temperature,
            )
        step = Step(*moves)
        if self.constraint is not None:
            first = torch.arange(0, state.batch_size * state.beam_size, state.beam_size, device=state.device)
            moved = reorder(state.constraint_state, (step.parents + first[:, None]).flatten())
            state.constraint_state = self.constraint.advance(moved, step.tokens.flatten())
        return step

    def _begun(self, state: State, vocab_size: int) -> tuple[Any, Tensor | None]:
        """The constraint's state and, where needed, the bitmask of every token but EOS: made at the first step."""
        if state.vocab_size is not None:
            return state.constraint_state, state.without_eos
        constraint_state, without_eos = None, None
        if self.constraint is not None:
            constraint_state = self.constraint.init(state.batch_size, state.beam_size, vocab_size, state.device)
        if self.normalize == "allowed" and state.eos is not None and max(self.min_length.values) > 0:
            tokens = torch.arange(vocab_size, device=state.device)
            without_eos = pack_bitmask((tokens[:, None] != state.eos).all(1))
        return constraint_state, without_eos

    def _without_banned_eos(
        self, state: State, without_eos: Tensor | None, mask: Tensor | None, rows: int
    ) -> Tensor | None:
        """The bitmask with EOS taken out where ``min_length`` bans it; needed only to renormalise over the rest."""
        if without_eos is None:
            return mask
        banned = (state.requests.steps + 1 < state.limits.min_length).repeat_interleave(rows // state.batch_size)
        allowed = torch.where(banned[:, None], without_eos, torch.full_like(without_eos, -1))
        return allowed if mask is None else allowed & mask[:, : allowed.shape[1]]

    def _next_norm(self, state: State) -> Tensor:
        length = (state.requests.steps + 1).clamp(max=state.limits.length_norm.shape[1] - 1).long()
        return state.limits.length_norm.gather(1, length[:, None])[:, 0]

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
        return collect(state, num_hypotheses)
