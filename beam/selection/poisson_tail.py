"""The candidates of a step for conditional Poisson sampling: the best one by one, the others as a tail."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashbeam.kernels import (
    Stream,
    draw_children,
    draw_distinct,
    exp,
    gumbel,
    mark_bits,
    pack_key,
    random_bits,
    summarize,
    token_log_prob,
    top_candidates,
    uniforms,
    unpack_bitmask,
)

from .choosing import Drawable
from .protocol import Expansion

DRAWS = 4  # from the tail, for each item that may be needed
_PART = 8
# how many are listed: as V says, and for each beam
_OF_ALL = 256
_OF_TILES = 1024
_OF_WIDTH = 32


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
    """Every candidate is looked at; those behind the best have a tail."""
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

    def at(place: Tensor, none: Tensor) -> Rivals:
        """The candidates at ``place [B, n]``, as exact as they are reported, but for ``none``."""
        parent, token = place // size, place % size
        log_prob = log_probs.gather(1, place).masked_fill_(none, -torch.inf)
        adjusted = logits[first_row + parent, token].float()
        if expansion.temperature is not None:
            adjusted = adjusted / expansion.temperature[first_row + parent]
        return Rivals(parent, token, adjusted.masked_fill(log_prob == -torch.inf, -torch.inf), log_prob)

    count = min(max(_OF_ALL, _OF_WIDTH * k), parents * size)
    place = _best(log_probs, count)
    beyond = _beyond(expansion, count, _OF_ALL)
    best = at(place, beyond)
    if parents * size <= _OF_ALL:
        return best, None
    rest = log_probs.scatter(1, place, log_probs.gather(1, place).masked_fill_(~beyond, -torch.inf))
    odds = exp(rest)
    odds.div_(1 - odds)  # what is left is at most 1/2
    drawn, total = draw_distinct(odds, uniforms(words), k, DRAWS * expansion.limits.width.long())
    more = (odds > 0).sum(1) > (drawn >= 0).sum(1)
    greatest, squares = odds.amax(1).log(), odds.square_().sum(1).log()
    tail = at(drawn.clamp(min=0), drawn < 0)
    return best, Tail(total.log().float(), squares, greatest, torch.zeros_like(squares), more, tail)


def _beyond(expansion: Expansion, count: int, least: int) -> Tensor:
    """bool ``[B, count]``: ranks behind those that a request lists: its own width decides, not its neighbours'."""
    width = expansion.limits.width.long()
    return torch.arange(count, device=width.device) >= (_OF_WIDTH * width).clamp(min=least)[:, None]


def _best(log_probs: Tensor, count: int) -> Tensor:
    """Places ``[B, count]`` of the best by (value, place): they are in the ``count`` parts with the best maxima."""
    size = log_probs.shape[1]
    place = torch.arange(size, device=log_probs.device)
    maxima = torch.nn.functional.max_pool1d(log_probs, _PART, ceil_mode=True)
    if maxima.shape[1] <= count:
        return pack_key(log_probs, place).topk(count).indices
    top = pack_key(maxima, place[: maxima.shape[1]]).topk(count, sorted=False).indices
    members = (top[:, :, None] * _PART + place[:_PART]).flatten(1)
    values = log_probs.gather(1, members.clamp(max=size - 1)).masked_fill_(members >= size, -torch.inf)
    return members.gather(1, pack_key(values, members).topk(count).indices)


def _log_sum(x: Tensor) -> Tensor:
    """float64 ``[B]``: log-sum-exp of ``[B, n]``, term by term: parents of -inf change no bit."""
    top = x.amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).min).double()
    return (x.double() - top).exp_().cumsum(1)[:, -1].log_() + top[:, 0]


def split_by_tiles(expansion: Expansion, drawable: Drawable, k: int, words: Tensor) -> tuple[Rivals, Tail | None]:
    """The best candidates, and the tail of the others: what the pass sees with the best masked out.

    Four passes over the logits: two for the best, and two for the tail and its squares. ``words`` are not used: the
    tail is drawn by the prefixes' own numbers.
    """
    draws, slots, parents = expansion.draws, expansion.slots, expansion.parents
    open_rows = slots.active[:, :parents] & drawable.lse.isfinite().view(-1, parents)
    base = draws.sampling_log_probs[:, :parents].masked_fill(~open_rows, -torch.inf)
    options: dict[str, Any] = {"active": expansion.active, "vocab_size": expansion.vocab_size}
    count = min(max(_OF_TILES, _OF_WIDTH * k), parents * expansion.vocab_size)
    best = top_candidates(
        expansion.logits,
        base,
        count,
        bitmask=expansion.bitmask,
        temperature=expansion.temperature,
        normalize="allowed",
        **options,
    )
    log_probs = best.log_probs.masked_fill(_beyond(expansion, count, _OF_TILES), -torch.inf)
    listed = Rivals(
        best.parents, best.tokens, best.adjusted.masked_fill(log_probs == -torch.inf, -torch.inf), log_probs
    )
    row = torch.arange(0, expansion.logits.shape[0], parents, device=base.device)[:, None] + best.parents
    taken = mark_bits(row, best.tokens, log_probs > -torch.inf, expansion.logits.shape[0], expansion.vocab_size)
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
    tail_log_probs = base.gather(1, drawn.parents) + increments
    tail = Rivals(
        drawn.parents,
        drawn.tokens,
        drawn.adjusted,
        tail_log_probs.masked_fill(drawn.perturbed == -torch.inf, -torch.inf),
    )

    # sum p^2: the same pass at half the temperature
    temperature = torch.ones_like(drawable.lse) if expansion.temperature is None else expansion.temperature
    doubled = summarize(expansion.logits, bitmask=rest, temperature=temperature / 2, normalize="allowed", **options).lse
    squares = _log_sum(2 * base + token_log_prob(doubled, 2 * drawable.lse).view_as(base))
    total = (_log_sum(mass).exp() + squares.exp()).log()
    # odds are p + p^2 + ..: what is left out, here and in drawing by p, is at most max p / (1 - max p) of it
    greatest = log_probs.masked_fill(log_probs == -torch.inf, 0.0).amin(1).double().exp().clamp(max=0.5)
    width = expansion.limits.width
    error = greatest / (1 - greatest) * (1 + width * (squares - 2 * total).exp() + (squares - total).exp())
    log_max = greatest.log() - torch.log1p(-greatest)
    more = torch.ones_like(expansion.requests.done)  # of so many there may always be
    error = error.nan_to_num(0.0)
    return listed, Tail(total.float(), squares.float(), log_max.float(), error.float(), more, tail)
