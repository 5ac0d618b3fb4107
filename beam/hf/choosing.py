"""How ``generate`` chooses: by what its processors make of the log-probabilities; and criteria end hypotheses."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashbeam.kernels import FLAG_DEAD_END, Candidates, Pool, Rule, next_length, total_order

from ..selection import Expansion, Ranked
from ..selection.choosing import endings_of
from ..selection.rescored import rescored
from ..selection.topk import best
from ..state import State
from .decoder import Sequences
from .quick import Quick


class Stopped(NamedTuple):
    """What a step ends without EOS."""

    candidates: Pool  # [B, n]
    finish: Tensor  # bool [B, n], those that are hypotheses
    best_ended: Tensor  # bool [B], the best candidate of the step is a hypothesis, with EOS or without
    left_out: Tensor  # float32 [B], the best score that a quota has kept out
    bound: Tensor | None  # float32 [B], see Ranked


class AsGenerate:
    """The best candidates by the scores that ``generate`` gives them; those that its criteria stop are hypotheses.

    A candidate's score is its parent's plus what the processors make of its log-probability: masks do not renormalise,
    penalties may raise it. A candidate that a criterion stops is taken out, as one with EOS is: if it is among the K
    best it is a hypothesis. As transformers' ``_beam_search``, which looks at ``max(2, 1 + n_eos) * K`` candidates.

    Args:
        criteria: a ``StoppingCriteriaList``, or ``None``.
        rule: of the search's stopping.
        quick: log-probabilities may be as transformers' in their last bits.
        falls: what is live is bounded as if processors never raised a score; otherwise by nothing.
    """

    regimes = ("pool", "in_place")
    seed = None
    reports = ()
    weighs = False
    groups = 1

    def __init__(self, criteria: Any | None, rule: Rule, quick: bool, falls: bool):
        self.criteria, self.rule, self.falls = criteria, rule, falls
        self.quick = Quick() if quick else None
        self.state: State | None = None
        self.sequences: Sequences | None = None  # of the beams before the step, where there are criteria
        self.increments: Tensor | None = None  # float32 [R, V], of the step to come
        self.scores: tuple[Tensor, ...] | None = None  # what criteria are shown of the steps so far
        self.stopped: Stopped | None = None  # of the step under way

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
            found = rescored(expansion, self.increments, count)
            return found._replace(bound=None) if self.falls else found
        quick = None if self.quick is None else self.quick.find(expansion, count)
        return best(expansion, count) if quick is None else quick

    def _stop(self, expansion: Expansion, ranked: Ranked, k: int) -> Ranked:
        """Take out of what would live on what the criteria stop."""
        found, penalty = ranked.candidates, ranked.end_penalty
        requests, limits = expansion.requests, expansion.limits
        assert self.sequences is not None and self.criteria is not None and self.state is not None
        held = (self.state.pool.log_probs > -torch.inf).sum(1)
        width, live = limits.width[:, None], ~requests.done[:, None]
        room = width - held[:, None] if self.rule.shrinks else width
        last = (limits.max_length == requests.steps + 1)[:, None]
        length = next_length(requests, limits)[:, None]
        norm = limits.length_norm.gather(1, length)
        count = found.tokens.shape[1]
        place = torch.arange(count, device=found.tokens.device).expand_as(found.tokens)
        end_place, finishing, end_scores = place[:, :0], live[:, :0], found.scores[:, :0]
        ends = endings_of(expansion, found.lse, penalty, ranked.end_scores)
        if ends is not None:
            order = total_order(
                (found.scores, found.parents, found.adjusted, found.tokens),
                (ends.scores, ends.parents, ends.adjusted, ends.tokens),
            )
            at = torch.arange(order.shape[1], device=order.device).expand_as(order)
            place, end_place = torch.empty_like(order).scatter_(1, order, at).split([count, ends.tokens.shape[1]], 1)
            finishing, end_scores = (end_place < room) & (ends.log_probs > -torch.inf) & live, ends.scores

        prefixes = self.sequences.now[self.sequences.rows_of(found.parents).flatten()]
        tokens = found.tokens.view(-1, 1).to(prefixes.device)
        stopped = self.criteria(torch.cat([prefixes, tokens], 1), self.scores).view_as(found.tokens)
        there, among_best = found.log_probs > -torch.inf, place < room
        stopped = stopped.to(there.device) & there & live
        finish = torch.cat([finishing, stopped & among_best], 1)
        places = torch.cat([end_place, place], 1)
        over = self._over(finish, places, held, last)
        scores = torch.cat([end_scores, found.scores], 1) / norm
        left_out = scores.masked_fill(~over, -torch.inf).amax(1)
        finish &= ~over
        best_ended = (finish & (places == 0)).any(1)
        finishing, finish = finish.split([finishing.shape[1], count], 1)
        token_log_probs = found.log_probs - expansion.slots.log_probs.gather(1, found.parents)
        steps = requests.steps.clone()[:, None].expand_as(place)  # the step changes it
        ids = (found.tokens, found.parents, steps, place)
        new = Pool(scores[:, -count:], found.log_probs, token_log_probs, *(each.int() for each in ids))
        self.stopped = Stopped(new, finish, best_ended, left_out, ranked.bound)

        fixed = torch.ones_like(last) if self.rule.shrinks else last
        keep = there & ~stopped & (place < count) & (among_best | ~fixed)
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
        return ranked._replace(candidates=Candidates(*chosen), finishing=None if expansion.eos is None else finishing)

    def _over(self, finish: Tensor, places: Tensor, held: Tensor, last: Tensor) -> Tensor:
        """Which of those that ``finish``, ranked by ``places``, a pool that has ``held [B]`` has no room for."""
        if not self.rule.by_arrival or self.rule.overflow == "step":
            return torch.zeros_like(finish)
        assert self.state is not None
        before = (finish[:, None] & (places[:, None] < places[:, :, None])).sum(2)
        over = finish & (held[:, None] + before >= self.state.limits.quota[:, None])
        return over & ~last if self.rule.overflow == "last" else over

    def settle(self, state: State) -> None:
        """Put the hypotheses that ended without EOS into the pool, and stop by the rule. In place."""
        if self.stopped is None:
            return
        (new, finish, best_ended, left_out, bound), rule = self.stopped, self.rule
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

        torch.maximum(state.bound, left_out, out=state.bound)
        length = requests.steps.long()[:, None]
        norm = (limits.bound_norm if rule.exact else limits.length_norm).gather(1, length)[:, 0]
        worst = pool.scores.gather(1, limits.width.long()[:, None] - 1)[:, 0]
        possible = bound if rule.exact and bound is not None else slots.scores.amax(1) / norm
        stop = in_pool >= limits.quota
        if rule.awaits_best:
            stop &= best_ended | ((pool.ranks == 0) & (pool.log_probs > -torch.inf)).any(1)
        if rule.best_live or rule.exact:
            stop |= (in_pool >= limits.width) & (worst >= possible)
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
        with torch.inference_mode(False):  # as in BeamSearch.init
            state.stops = torch.zeros_like(state.history.tokens, dtype=torch.bool)
    last = (requests.steps.long() - 1).clamp(min=0)[None, :, None].expand(1, *now.shape)
    state.stops.scatter_(0, last, (state.stops.gather(0, last)[0] | now)[None])
    slots.ended.logical_or_(now)
    slots.active.logical_and_(~slots.ended)
    requests.done.logical_or_(~slots.active.any(1))
    slots.active.logical_and_(~requests.done[:, None])
