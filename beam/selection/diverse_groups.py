"""Diverse beam search: groups of beams that avoid each other's tokens."""

from dataclasses import dataclass

import torch
from torch import Tensor

from flashbeam.kernels import Candidates, total_order

from ..arguments import nonnegative_number, whole_number
from .protocol import Expansion, Ranked
from .siblings import Children, best_children, rank_again


@dataclass(frozen=True)
class DiverseGroups:
    """Divide the beam into ``groups`` that choose in turn; a token costs ``strength`` for each earlier choice of it.

    Vijayakumar et al. 2016, "Diverse beam search", algorithm 1 with Hamming diversity. Choices are those of the earlier
    groups at this step, EOS among them. Each group has its own pool and stops on its own. What is paid stays in
    ``scores``; ``log_probs`` are the model's. All groups are resolved from one pass over the logits: penalties only
    lower tokens, at most ``beam_size`` of them, so a group's best are among the ``beam_size`` best of its rows.
    """

    groups: int
    strength: float
    regimes = ("pool",)
    seed = None
    reports = ()
    weighs = False

    def __post_init__(self) -> None:
        whole_number(1)("groups", self.groups)
        nonnegative_number("strength", self.strength)

    def select(self, expansion: Expansion, k: int) -> Ranked:
        """See :class:`flashbeam.selection.Selection`."""
        found = best_children(expansion, k * self.groups)
        width = expansion.limits.width.view(-1, self.groups)
        last = (expansion.limits.max_length == expansion.requests.steps + 1).view(-1, self.groups)
        chosen = found.tokens.new_empty(width.shape[0], 0)
        groups = []
        for group in range(self.groups):
            mine = _of_group(found, group, self.groups)
            best = rank_again(mine, mine.scores - self.strength * _count(chosen, mine.tokens), k)
            penalty = None if mine.ends is None else self.strength * _count(chosen, mine.ends.tokens)
            groups.append((best, penalty))
            chosen = torch.cat([chosen, _choices(mine, best, penalty, width[:, group], last[:, group])], 1)
        best = Candidates(*(_interleave(fields) for fields in zip(*(best for best, _ in groups), strict=True)))
        best = best._replace(lse=found.lse, flags=found.flags)
        if found.ends is None:
            return Ranked(best)
        return Ranked(best, _interleave(tuple(penalty for _, penalty in groups if penalty is not None)))


def _interleave(fields: tuple[Tensor, ...]) -> Tensor:
    """Tensors ``[B, *]`` of the groups as one ``[B * G, *]``, a request's groups side by side."""
    return torch.stack(fields, 1).flatten(0, 1)


def _of_group(found: Children, group: int, groups: int) -> Children:
    ends = found.ends if found.ends is None else type(found.ends)(*(field[group::groups] for field in found.ends))
    return found._replace(
        log_probs=found.log_probs[group::groups],
        scores=found.scores[group::groups],
        tokens=found.tokens[group::groups],
        adjusted=found.adjusted[group::groups],
        ends=ends,
    )


def _count(chosen: Tensor, tokens: Tensor) -> Tensor:
    """How often ``tokens [B, *]`` are in ``chosen [B, m]``, float32."""
    if chosen.shape[1] == 0:
        return torch.zeros_like(tokens, dtype=torch.float32)
    ordered, flat = chosen.sort(1).values, tokens.flatten(1).contiguous()
    count = torch.searchsorted(ordered, flat, right=True) - torch.searchsorted(ordered, flat)
    return count.float().view(tokens.shape)


def _choices(found: Children, best: Candidates, penalty: Tensor | None, width: Tensor, last: Tensor) -> Tensor:
    """The tokens that a group chooses, -1 for none: those that live on, and the EOS among its ``width`` best.

    Its ``last`` step is its ``width`` best, and nothing lives on.
    """
    count = best.tokens.shape[1]
    place = torch.arange(count, device=best.tokens.device).expand_as(best.tokens)
    nothing, beyond = best.log_probs == -torch.inf, place >= width[:, None]
    ends = found.ends
    if ends is None or penalty is None:
        return best.tokens.masked_fill(nothing | beyond, -1)
    order = total_order(
        (best.scores, best.parents, best.adjusted, best.tokens),
        (ends.scores - penalty, ends.parents, ends.adjusted, ends.tokens),
    )
    place = torch.arange(order.shape[1], device=order.device).expand_as(order)
    behind = torch.empty_like(order).scatter_(1, order, place) >= width[:, None]
    live = best.tokens.masked_fill(nothing | beyond | (behind[:, :count] & last[:, None]), -1)
    return torch.cat([live, ends.tokens.masked_fill(behind[:, count:] | (ends.log_probs == -torch.inf), -1)], 1)
