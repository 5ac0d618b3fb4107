"""Conditional Poisson stochastic beams: at every step a set, drawn in proportion to the product of its odds."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from flashbeam.kernels import (
    FLAG_INEXACT,
    Choice,
    PoissonSample,
    Stream,
    conditional_poisson,
    draw_children,
    gumbel,
    mark_bits,
    random_bits,
    root_nodes,
    summarize,
    token_log_prob,
    top_candidates,
    unpack_bitmask,
    words_needed,
)

from ..arguments import seed_number
from .choosing import Drawable, children, frozen, summarize_drawable
from .protocol import Decided, Expansion

_ALL = 4096  # candidates of a request up to which all are listed
_LISTED = 1024  # else the best of them, and the others are a tail
_ERROR = 1e-4  # of an inclusion probability, above which the request is flagged


class _Candidates(NamedTuple):
    """Candidates ``[B, n]`` of a step."""

    parents: Tensor  # int64
    tokens: Tensor  # int64
    adjusted: Tensor  # float32, logit after temperature; -inf where there is none
    log_probs: Tensor  # float32, cumulative, of what is drawn from


@dataclass(frozen=True)
class ConditionalPoisson:
    """Sample K sequences without replacement, deciding at every step for a set of K prefixes at once.

    Meister, Amini, Vieira, Cotterell 2021, "Conditional Poisson stochastic beams". With p the probability of a prefix,
    a set has probability in proportion to the product of p / (1 - p). ``hyps.log_inclusion`` sums, over the steps, the
    logarithms of the inclusion probabilities along a hypothesis' own path, which makes the estimator of
    :func:`flashbeam.estimate` unbiased from one run.

    A request with up to 4096 candidates is treated exactly. Of more, the 1024 best are, and the others together are
    their Poisson limit (kernels/poisson.py): no mass is dropped. The error that makes in an inclusion probability is
    bounded at every step, and a request where the bound exceeds 1e-4 has ``FLAG_INEXACT`` in ``state.flags``.
    """

    seed: int
    regimes = ("in_place",)
    reports = ("sampling_log_probs", "log_inclusion")
    groups = 1

    def __post_init__(self) -> None:
        seed_number("seed", self.seed)

    def select(self, expansion: Expansion, k: int) -> Decided:
        """See :class:`flashbeam.selection.Selection`."""
        drawable = summarize_drawable(expansion)
        old = frozen(expansion)
        if expansion.parents * expansion.vocab_size <= _ALL:
            rivals, tail = _every_candidate(expansion, drawable), None
        else:
            rivals, tail = _split(expansion, drawable, k)
        listed = torch.cat([old.sampling_log_probs, rivals.log_probs], 1)
        words = random_bits(
            expansion.seed,
            root_nodes(expansion.request_ids),
            words_needed(k),
            Stream.POISSON,
            expansion.requests.steps.long(),
        )
        sizes = expansion.limits.width.long()
        if tail is None:
            sample = conditional_poisson(listed, sizes, k, words)
        else:
            sample = conditional_poisson(
                listed,
                sizes,
                k,
                words,
                tail=tail.log_odds,
                tail_log_probs=tail.drawn.log_probs,
                tail_squares=tail.log_squares,
                tail_error=tail.error,
            )
            rivals = _Candidates(*(torch.cat(pair, 1) for pair in zip(rivals, tail.drawn, strict=True)))
        # what was chosen, of the frozen hypotheses and of the others
        place = sample.chosen.clamp(min=0)
        k_old = old.tokens.shape[1]
        mine = _Candidates(*(field.gather(1, (place - k_old).clamp(min=0)) for field in rivals))
        new = children(expansion, drawable, mine.tokens, mine.parents, mine.adjusted, None)
        was_frozen, slot = place < k_old, place.clamp(max=k_old - 1)
        choice = Choice(
            *(torch.where(was_frozen, one.gather(1, slot), other) for one, other in zip(old, new, strict=True))
        )
        none = sample.chosen < 0
        choice = choice._replace(
            log_probs=choice.log_probs.masked_fill(none, -torch.inf),
            log_inclusion=choice.log_inclusion + sample.log_inclusion,
        )
        return Decided(choice, drawable.flags | _inexact(sample, expansion))


def _inexact(sample: PoissonSample, expansion: Expansion) -> Tensor:
    """int32 ``[R]``: FLAG_INEXACT in the rows of requests whose inclusion probabilities may be off."""
    off = (sample.bound > _ERROR) & ~expansion.requests.done
    return (off.int() * FLAG_INEXACT).repeat_interleave(expansion.parents)


def _every_candidate(expansion: Expansion, drawable: Drawable) -> _Candidates:
    """All P * V candidates of each request."""
    parents, size = expansion.parents, expansion.vocab_size
    barred = ~(expansion.active & drawable.lse.isfinite())[:, None]
    if expansion.bitmask is not None:
        barred = barred | ~unpack_bitmask(expansion.bitmask, size)
    adjusted = expansion.logits[:, :size].float()
    if expansion.temperature is not None:
        adjusted = adjusted / expansion.temperature[:, None]
    adjusted = adjusted.masked_fill(barred | adjusted.isnan(), -torch.inf)
    increments = token_log_prob(adjusted, drawable.lse[:, None])
    base = expansion.draws.sampling_log_probs[:, :parents, None]
    log_probs = base + increments.view(-1, parents, size)
    place = torch.arange(parents * size, device=adjusted.device).expand(log_probs.shape[0], -1)
    return _Candidates(place // size, place % size, adjusted.view_as(place), log_probs.view_as(place))


class _Tail(NamedTuple):
    """The candidates that are not listed."""

    log_odds: Tensor  # float32 [B], log of their total odds
    log_squares: Tensor  # float32 [B], log of the sum of their squared odds
    error: Tensor  # float32 [B], bound on the relative error of the total
    drawn: _Candidates  # [B, k], some of them, drawn one after the other


def _split(expansion: Expansion, drawable: Drawable, k: int) -> tuple[_Candidates, _Tail]:
    """The best candidates, and the tail of the others: what the pass sees with the best masked out."""
    draws, slots, parents = expansion.draws, expansion.slots, expansion.parents
    base = draws.sampling_log_probs[:, :parents].masked_fill(~slots.active[:, :parents], -torch.inf)
    options = {"active": expansion.active, "vocab_size": expansion.vocab_size}
    best = top_candidates(
        expansion.logits,
        base,
        max(_LISTED, 2 * k),
        bitmask=expansion.bitmask,
        temperature=expansion.temperature,
        normalize="allowed",
        **options,
    )
    listed = _Candidates(best.parents, best.tokens, best.adjusted, best.log_probs)
    row = torch.arange(0, expansion.logits.shape[0], parents, device=base.device)[:, None] + best.parents
    taken = mark_bits(row, best.tokens, best.log_probs > -torch.inf, expansion.logits.shape[0], expansion.vocab_size)
    rest = ~taken if expansion.bitmask is None else expansion.bitmask & ~taken
    summary = summarize(
        expansion.logits, bitmask=rest, temperature=expansion.temperature, normalize="allowed", **options
    )
    mass = base + token_log_prob(summary.lse, drawable.lse).view_as(base)  # [B, P], log of what is left of each row
    noise = gumbel(random_bits(expansion.seed, draws.nodes[:, :parents].contiguous(), 1, Stream.ROOT))[:, :, 0]
    drawn = draw_children(
        expansion.logits,
        base,
        mass + noise,
        draws.nodes[:, :parents],
        summary.tiles.tile_ref,
        summary.tiles.tile_sum,
        drawable.lse,
        k,
        expansion.seed,
        bitmask=rest,
        temperature=expansion.temperature,
        vocab_size=expansion.vocab_size,
    )
    increments = token_log_prob(drawn.adjusted, drawable.lse.view_as(base).gather(1, drawn.parents))
    log_probs = (base.gather(1, drawn.parents) + increments).masked_fill(drawn.perturbed == -torch.inf, -torch.inf)

    # sum p^2: the same pass at half the temperature
    temperature = torch.ones_like(drawable.lse) if expansion.temperature is None else expansion.temperature
    doubled = summarize(expansion.logits, bitmask=rest, temperature=temperature / 2, normalize="allowed", **options).lse
    squares = 2 * base + token_log_prob(doubled, 2 * drawable.lse).view_as(base)
    total, squares = mass.logsumexp(1), squares.logsumexp(1)
    # sum p / (1 - p) = sum p + sum p^2 + .., and what is left out is at most max p / (1 - max p) of sum p^2
    greatest = best.log_probs[:, -1].exp().clamp(max=0.5)
    total = torch.logaddexp(total, squares)
    error = greatest / (1 - greatest) * (squares - total).exp().nan_to_num(0.0)
    squares = squares - 2 * torch.log1p(-greatest)
    return listed, _Tail(total, squares, error, _Candidates(drawn.parents, drawn.tokens, drawn.adjusted, log_probs))
