"""How ``generate`` chooses: by what its processors make of the log-probabilities; and criteria end hypotheses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flashbeam.kernels import FLAG_DEAD_END, Candidates, Pool, Rule, endings, total_order

from ..selection import Expansion, Ranked
from ..selection.rescored import rescored
from ..selection.topk import best
from ..state import State
from .decoder import Sequences
from .quick import Quick


class AsGenerate:
    """The best candidates by the scores that ``generate`` gives them; those that its criteria stop are hypotheses.

    A candidate's score is its parent's plus what the processors make of its log-probability: masks do not renormalise,
    penalties may raise it. A candidate that a criterion stops is taken out, as one with EOS is: if it is among the K
    best it is a hypothesis. As transformers' ``_beam_search``, which looks at ``max(2, 1 + n_eos) * K`` candidates.
    """

    regimes = ("pool", "in_place")
    seed = None
    reports = ()
    weighs = False
    groups = 1

    def __init__(self, criteria: Any | None):
        self.criteria = criteria
        self.quick = Quick()
        self.sequences: Sequences | None = None  # of the beams before the step, where there are criteria
        self.increments: Tensor | None = None  # float32 [R, V], of the step to come
        self.scores: tuple[Tensor, ...] | None = None  # what criteria are shown of the steps so far
        self.stopped: tuple[Pool, Tensor] | None = None  # candidates that ended without EOS, and which are hypotheses

    @property
    def uses(self) -> tuple[str, ...]:
        """Lists, where there are no scores of all tokens."""
        return ("lists",) if self.increments is None else ()

    def select(self, expansion: Expansion, k: int) -> Ranked:
        """See :class:`flashbeam.selection.Selection`."""
        if self.criteria is None:
            return self._best(expansion, k)
        ends = 0 if expansion.eos is None else expansion.eos.shape[0]
        return self._stop(expansion, self._best(expansion, max(2, 1 + ends) * k), k)

    def _best(self, expansion: Expansion, count: int) -> Ranked:
        if self.increments is not None:
            return rescored(expansion, self.increments, count)
        found = self.quick.find(expansion, count)
        return best(expansion, count) if found is None else Ranked(found)

    def _stop(self, expansion: Expansion, ranked: Ranked, k: int) -> Ranked:
        """Take out of what would live on what the criteria stop."""
        found, penalty = ranked.candidates, ranked.end_penalty
        requests, limits = expansion.requests, expansion.limits
        next_length = requests.steps + 1
        count = found.tokens.shape[1]
        place = torch.arange(count, device=found.tokens.device).expand_as(found.tokens)
        finishing = None
        if expansion.eos is not None:
            rows = (expansion.logits, found.lse, expansion.bitmask, expansion.temperature)
            may_end = limits.min_length <= next_length
            ends = endings(*rows, expansion.eos, expansion.slots, may_end, penalty, ranked.end_scores)
            order = total_order(
                (found.scores, found.parents, found.adjusted, found.tokens),
                (ends.scores, ends.parents, ends.adjusted, ends.tokens),
            )
            at = torch.arange(order.shape[1], device=order.device).expand_as(order)
            place, end_place = torch.empty_like(order).scatter_(1, order, at).split([count, ends.tokens.shape[1]], 1)
            finishing = (end_place < limits.width[:, None]) & (ends.log_probs > -torch.inf)

        assert self.sequences is not None and self.criteria is not None
        prefixes = self.sequences.now[self.sequences.rows_of(found.parents).flatten()]
        tokens = found.tokens.view(-1, 1).to(prefixes.device)
        stopped = self.criteria(torch.cat([prefixes, tokens], 1), self.scores).view_as(found.tokens)
        there, among_best = found.log_probs > -torch.inf, place < limits.width[:, None]
        stopped = stopped.to(there.device) & there & ~requests.done[:, None]
        length = next_length.clamp(max=limits.length_norm.shape[1] - 1).long()[:, None]
        token_log_probs = found.log_probs - expansion.slots.log_probs.gather(1, found.parents)
        steps = requests.steps.clone()[:, None].expand_as(place)  # the step changes it
        ids = (found.tokens, found.parents, steps, place)
        scores = found.scores / limits.length_norm.gather(1, length)
        self.stopped = (
            Pool(scores, found.log_probs, token_log_probs, *(each.int() for each in ids)),
            stopped & among_best,
        )

        last = (limits.max_length == next_length)[:, None]
        keep = there & ~stopped & (place < count) & (among_best | ~last)
        order = keep.sort(dim=1, descending=True, stable=True).indices[:, :k]
        none = ~keep.gather(1, order)
        chosen = found._replace(
            **{
                name: getattr(found, name).gather(1, order).masked_fill(none, empty)
                for name, empty in (
                    ("log_probs", -torch.inf),
                    ("scores", -torch.inf),
                    ("adjusted", -torch.inf),
                    ("parents", 0),
                    ("tokens", 0),
                )
            }
        )
        return Ranked(Candidates(*chosen), penalty, finishing, end_scores=ranked.end_scores)

    def settle(self, state: State, rule: Rule) -> None:
        """Put the hypotheses that ended without EOS into the pool, and stop by the ``rule``. In place."""
        if self.stopped is None:
            return
        new, finish = self.stopped
        self.stopped = None
        pool, slots, requests, limits = state.pool, state.slots, state.requests, state.limits
        places = pool.scores.shape[1]
        held = torch.cat([pool.log_probs > -torch.inf, finish], 1)
        if rule.by_arrival:
            key = held.float()
        else:
            key = torch.cat([pool.scores, new.scores.masked_fill(~finish, -torch.inf)], 1)
        order = key.sort(dim=1, descending=True, stable=True).indices[:, :places]
        held = held.gather(1, order)
        if not rule.by_arrival:
            held &= torch.arange(places, device=held.device) < limits.width[:, None]
        for field, fresh in zip(pool, new, strict=True):
            empty = -torch.inf if field.is_floating_point() else 0
            field.copy_(torch.cat([field, fresh], 1).gather(1, order).masked_fill(~held, empty))
        in_pool = held.sum(1)
        requests.flags.bitwise_and_(torch.where(finish.any(1), ~FLAG_DEAD_END, -1).int())

        length = requests.steps.long()[:, None]
        norm = (limits.bound_norm if rule.exact else limits.length_norm).gather(1, length)[:, 0]
        worst = pool.scores.gather(1, limits.width.long()[:, None] - 1)[:, 0]
        stop = in_pool >= limits.quota
        if rule.best_live or rule.exact:
            stop |= (in_pool >= limits.width) & (worst >= slots.scores.amax(1) / norm)
        stop &= finish.any(1) & (requests.steps < limits.max_length)
        for field in (slots.log_probs, slots.scores):
            field.masked_fill_(stop[:, None], -torch.inf)
        requests.done.logical_or_(stop)
        slots.active.logical_and_(~requests.done[:, None])


def stop_in_place(state: State, stopped: Tensor) -> None:
    """End what is in the slots that are ``stopped`` bool ``[B, K]``; they keep what they hold."""
    slots, requests = state.slots, state.requests
    now = stopped & slots.active
    if state.stops is None:
        state.stops = torch.zeros_like(state.history.tokens, dtype=torch.bool)
    last = (requests.steps.long() - 1).clamp(min=0)[None, :, None].expand(1, *now.shape)
    state.stops.scatter_(0, last, (state.stops.gather(0, last)[0] | now)[None])
    slots.ended.logical_or_(now)
    slots.active.logical_and_(~slots.ended)
    requests.done.logical_or_(~slots.active.any(1))
    slots.active.logical_and_(~requests.done[:, None])
