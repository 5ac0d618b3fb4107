"""The candidates of a step for conditional Poisson sampling: the best one by one, the others as a tail."""

from typing import NamedTuple

import torch
from torch import Tensor

from flashbeam.kernels import (
    Stream,
    draw_children,
    draw_distinct,
    gumbel,
    mark_bits,
    random_bits,
    summarize,
    token_log_prob,
    top_candidates,
    uniforms,
    unpack_bitmask,
)

from .choosing import Drawable
from .protocol import Expansion

_LOG2E = 1.4426950408889634
DRAWS = 4  # from the tail, for each item that may be needed
_PART = 8
# how many are listed depends on V alone: a request is treated alike beside wider ones
_OF_ALL = 256  # where all are looked at
_OF_TILES = 1024  # where tiles are


class Rivals(NamedTuple):
    """Candidates ``[B, n]`` of a step."""

    parents: Tensor  # int64
    tokens: Tensor  # int64
    adjusted: Tensor  # float32, logit after temperature; -inf where there is none
    log_probs: Tensor  # float32, cumulative, of what is drawn from


class Tail(NamedTuple):
    """The candidates that are not listed."""

    log_odds: Tensor  # float32 [B], log of their total odds
    log_squares: Tensor  # float32 [B], log of the sum of their squared odds
    log_max: Tensor  # float32 [B], log of the greatest odds among them, or more
    error: Tensor  # float32 [B], bound on the relative error of the total
    more: Tensor  # bool [B], there are more than were drawn
    drawn: Rivals  # [B, k], some of them, drawn one after the other


def split_all(expansion: Expansion, drawable: Drawable, k: int, words: Tensor) -> tuple[Rivals, Tail | None]:
    """Every candidate is looked at; more than 256 of a request have a tail."""
    parents, size = expansion.parents, expansion.vocab_size
    logits = expansion.logits[:, :size]
    # log q = log q of the prefix + x - lse, in one operation; +inf where there is nothing to draw
    shift = drawable.lse - expansion.draws.sampling_log_probs[:, :parents].flatten()
    shift = shift.masked_fill(~(expansion.active & shift.isfinite()), torch.inf)[:, None]
    tempered = logits if expansion.temperature is None else logits / expansion.temperature[:, None]
    log_probs = tempered - shift
    log_probs = log_probs.nan_to_num_(-torch.inf, -torch.inf, -torch.inf)
    if expansion.bitmask is not None:
        log_probs = log_probs.masked_fill_(~unpack_bitmask(expansion.bitmask, size), -torch.inf)
    log_probs = log_probs.view(-1, parents * size)
    first_row = torch.arange(0, logits.shape[0], parents, device=logits.device)[:, None]

    def at(place: Tensor, none: Tensor | None = None) -> Rivals:
        """The candidates at ``place [B, n]``, as exact as they are reported."""
        parent, token = place // size, place % size
        log_prob = log_probs.gather(1, place)
        if none is not None:
            log_prob = log_prob.masked_fill(none, -torch.inf)
        adjusted = logits[first_row + parent, token].float()
        if expansion.temperature is not None:
            adjusted = adjusted / expansion.temperature[first_row + parent]
        return Rivals(parent, token, adjusted.masked_fill(log_prob == -torch.inf, -torch.inf), log_prob)

    if parents * size <= _OF_ALL:
        return at(torch.arange(parents * size, device=logits.device).expand_as(log_probs)), None
    place = _best(log_probs, max(_OF_ALL, k))
    best = at(place)
    odds = log_probs.scatter(1, place, -torch.inf).mul_(_LOG2E).exp2_()  # several times faster than exp on some CPUs
    odds.div_(1 - odds)  # what is left is at most 1/2
    drawn, total = draw_distinct(odds, uniforms(words), k, DRAWS * expansion.limits.width.long())
    rest = at(drawn.clamp(min=0), drawn < 0)
    more = (odds > 0).sum(1) > (drawn >= 0).sum(1)
    greatest, squares = odds.amax(1).log(), odds.square_().sum(1).log()
    return best, Tail(total.log().float(), squares, greatest, torch.zeros_like(squares), more, rest)


def _best(log_probs: Tensor, count: int) -> Tensor:
    """Places of the ``count`` best ``[B, n]``, in any order: they are in the ``count`` parts with the best maxima."""
    batch, size = log_probs.shape
    parts = size // _PART
    if parts <= 2 * count:
        return log_probs.topk(count, sorted=False).indices
    # part i is i, i + parts, i + 2 * parts, ..; what is left over at the end are parts of their own
    whole, over = log_probs[:, : parts * _PART], log_probs[:, parts * _PART :]
    top = torch.cat([whole.view(batch, _PART, parts).amax(1), over], 1).topk(count, sorted=False).indices
    members = top[:, None] + parts * torch.arange(_PART, device=top.device)[:, None]  # [B, 8, count]
    single = (top >= parts)[:, None]
    members = torch.where(single, (top + parts * (_PART - 1))[:, None], members).flatten(1)
    found = log_probs.gather(1, members).view(batch, _PART, count)
    found[:, 1:].masked_fill_(single, -torch.inf)  # once is enough
    return members.gather(1, found.flatten(1).topk(count, sorted=False).indices)


def split_by_tiles(expansion: Expansion, drawable: Drawable, k: int, words: Tensor) -> tuple[Rivals, Tail | None]:
    """The best candidates, and the tail of the others: what the pass sees with the best masked out.

    Four passes over the logits: two for the best, and two for the tail and its squares. ``words`` are not used: the
    tail is drawn by the prefixes' own numbers.
    """
    draws, slots, parents = expansion.draws, expansion.slots, expansion.parents
    base = draws.sampling_log_probs[:, :parents].masked_fill(~slots.active[:, :parents], -torch.inf)
    options = {"active": expansion.active, "vocab_size": expansion.vocab_size}
    best = top_candidates(
        expansion.logits,
        base,
        max(_OF_TILES, k),
        bitmask=expansion.bitmask,
        temperature=expansion.temperature,
        normalize="allowed",
        **options,
    )
    listed = Rivals(best.parents, best.tokens, best.adjusted, best.log_probs)
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
    # odds are p + p^2 + ..: what is left out, here and in drawing by p, is at most max p / (1 - max p) of it
    greatest = best.log_probs[:, -1].exp().clamp(max=0.5)
    total = torch.logaddexp(total, squares)
    error = greatest / (1 - greatest) * (1 + k * (squares - 2 * total).exp() + (squares - total).exp()).nan_to_num(0.0)
    log_max = greatest.log() - torch.log1p(-greatest)
    more = torch.ones_like(expansion.requests.done)  # of so many there may always be
    return listed, Tail(
        total, squares, log_max, error, more, Rivals(drawn.parents, drawn.tokens, drawn.adjusted, log_probs)
    )
