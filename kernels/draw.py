"""Sampling without replacement, top-down: the children with the greatest perturbed log-probabilities.

A node S of a tree of candidates has a log-probability phi_S and a perturbed one G_S ~ Gumbel(phi_S), which is the
greatest of its children's. Given G_S, the children's are independent Gumbels conditioned on their greatest being G_S
(Kool, van Hoof, Welling 2019, "Stochastic beams and where to find them", section 4.1 and appendix B.3):

    H_c = phi_c + Gumbel,   Z = max_c H_c,   v = G_S - H_c + log1p(-exp(H_c - Z))
    G_c = G_S - max(0, v) - log1p(exp(-|v|)),   and the greatest child has G_S itself

That holds at every node, so the tiles of a row and the groups of a tile (kernels/summary.py) are nodes as good as the
prefixes are:

    row -> its tiles -> the k best tiles' groups -> the k best groups' tokens -> the k best tokens

A node's G is the greatest below it, so the k best tokens are in the k best groups, and those in the k best tiles.
Numbers are drawn for V / 2048 tiles of every row, and for 64 k groups and 32 k tokens of a request: not one per logit.
They are keyed by (prefix, tile), (prefix, group) and (prefix, token), and the cut depends on V alone, so neither k nor
the dtype nor the batch changes them, and the best k of a request are the first k of its best k'. Equal values keep the
order of the parts they come from. The jit side is kernels/triton/draw.py.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .bitmask import bits_at
from .checks import check_dtype, check_range, check_rows, check_same_device, check_shape, contiguous
from .keys import adjust, pack_key, token_log_prob
from .random import Stream, gumbel, random_bits
from .registration import register
from .tiles import GROUP_SIZE, GROUPS, TILE, tiles_of


class Drawn(NamedTuple):
    """The k best children of a request's parents, best first."""

    perturbed: Tensor  # float32 [B, k]; -inf where there is none
    parents: Tensor  # int64 [B, k]
    tokens: Tensor  # int64 [B, k]
    adjusted: Tensor  # float32 [B, k], logit after temperature


def perturb(phi: Tensor, greatest: Tensor, noise: Tensor) -> Tensor:
    """Perturbed log-probabilities of children ``phi [*, m]`` whose greatest is ``greatest [*]``."""
    free = phi + noise
    top = free.amax(-1, keepdim=True)
    none = torch.inf
    gap = free - top.masked_fill(top == -none, 0.0)  # at most 0
    # log(1 - exp(gap)), each form where it keeps its digits
    rest = torch.where(gap > -0.693, torch.log(-torch.expm1(gap)), torch.log1p(-torch.exp(gap)))
    parent = greatest[..., None]
    v = parent - free + rest
    perturbed = parent - v.clamp(min=0.0) - torch.log1p(torch.exp(-v.abs()))
    perturbed = torch.where(gap == 0.0, parent, perturbed)
    return perturbed.masked_fill((free == -none) | (parent == -none), -none)


def _noise(seed: Tensor, nodes: Tensor, parts: Tensor, count: int, stream: Stream) -> Tensor:
    return gumbel(random_bits(seed, nodes, count, stream, parts))


def _best(perturbed: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ``k`` greatest ``[B, k]`` of ``[B, M]`` and their positions; equal ones keep their order."""
    position = torch.arange(perturbed.shape[1], device=perturbed.device)
    order = pack_key(perturbed, position).topk(min(k, perturbed.shape[1])).indices
    return perturbed.gather(1, order), order


def _draw(
    logits: Tensor,
    log_probs: Tensor,
    perturbed: Tensor,
    nodes: Tensor,
    tile_ref: Tensor,
    tile_sum: Tensor,
    lse: Tensor,
    vocab_size: int,
    k: int,
    bitmask: Tensor | None,
    temperature: Tensor | None,
    seed: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The torch definition."""
    batch, parents = log_probs.shape
    tiles, device = tile_ref.shape[1], logits.device
    by_row = None if temperature is None else temperature[:, None]
    first_row = torch.arange(0, batch * parents, parents, device=device)[:, None]

    # rows to tiles
    mass = adjust(tile_ref, by_row) + tile_sum.abs().log()
    mass = mass.masked_fill(tile_ref == -torch.inf, -torch.inf)
    phi = (log_probs.view(-1, 1) + token_log_prob(mass, lse[:, None])).view(batch, parents, tiles)
    noise = _noise(seed, nodes, torch.zeros_like(nodes), tiles, Stream.TILE)
    greatest, place = _best(perturb(phi, perturbed, noise).flatten(1), k)
    parent, tile = place // tiles, place % tiles

    # tiles to groups
    token = (tile * TILE)[:, :, None] + torch.arange(min(TILE, -(-vocab_size // GROUPS) * GROUPS), device=device)
    row = (first_row + parent)[:, :, None]
    barred, token = token >= vocab_size, token.clamp(max=vocab_size - 1)
    if bitmask is not None:
        barred |= ~bits_at(bitmask, row, token)
    adjusted = adjust(logits[row, token], None if temperature is None else temperature[row])
    adjusted = adjusted.masked_fill_(barred, -torch.inf).unflatten(2, (-1, GROUPS))  # [B, k, 32, 64]
    node = nodes.gather(1, parent)
    base = log_probs.gather(1, parent)[:, :, None]
    shift = lse[row]
    top = adjusted.amax(2)  # [B, k, 64]
    mass = (adjusted - top.masked_fill(top == -torch.inf, 0.0)[:, :, None]).exp_().sum(2).log_().add_(top)
    phi = base + token_log_prob(mass, shift)
    noise = _noise(seed, node, tile, GROUPS, Stream.GROUP)
    greatest, place = _best(perturb(phi, greatest, noise).flatten(1), k)
    chosen, column = place // GROUPS, place % GROUPS
    parent, tile = parent.gather(1, chosen), tile.gather(1, chosen)

    # groups to tokens
    size = adjusted.shape[2]
    request = torch.arange(batch, device=device)[:, None]
    adjusted = adjusted[request, chosen, :, column]  # [B, k, 32]
    node, shift = nodes.gather(1, parent), lse[first_row + parent][:, :, None]
    phi = log_probs.gather(1, parent)[:, :, None] + token_log_prob(adjusted, shift)
    noise = _noise(seed, node, tile * GROUPS + column, GROUP_SIZE, Stream.TOKEN)[:, :, :size]
    greatest, place = _best(perturb(phi, greatest, noise).flatten(1), k)
    chosen, member = place // size, place % size
    tokens = tile.gather(1, chosen) * TILE + member * GROUPS + column.gather(1, chosen)
    parent, adjusted = parent.gather(1, chosen), adjusted.flatten(1).gather(1, place)

    # places without a candidate: ids in range, and equal to what the kernel writes
    none = greatest == -torch.inf
    missing = k - greatest.shape[1]
    pad = torch.nn.functional.pad
    return (
        pad(greatest, (0, missing), value=-torch.inf),
        pad(parent.masked_fill(none, 0), (0, missing)),
        pad(tokens.masked_fill(none, 0), (0, missing)),
        pad(adjusted.masked_fill(none, -torch.inf), (0, missing), value=-torch.inf),
    )


def _fake_draw(
    logits: Tensor,
    log_probs: Tensor,
    perturbed: Tensor,
    nodes: Tensor,
    tile_ref: Tensor,
    tile_sum: Tensor,
    lse: Tensor,
    vocab_size: int,
    k: int,
    bitmask: Tensor | None,
    temperature: Tensor | None,
    seed: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    floats = log_probs.new_empty(log_probs.shape[0], k)
    ids = floats.new_empty(floats.shape, dtype=torch.int64)
    return floats, ids, torch.empty_like(ids), torch.empty_like(floats)


_op = register(
    "draw(Tensor logits, Tensor log_probs, Tensor perturbed, Tensor nodes, Tensor tile_ref, Tensor tile_sum, "
    "Tensor lse, SymInt vocab_size, SymInt k, Tensor? bitmask, Tensor? temperature, Tensor seed) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _draw,
    _fake_draw,
    "draw",
)


def draw_children(
    logits: Tensor,
    log_probs: Tensor,
    perturbed: Tensor,
    nodes: Tensor,
    tile_ref: Tensor,
    tile_sum: Tensor,
    lse: Tensor,
    k: int,
    seed: Tensor,
    *,
    bitmask: Tensor | None = None,
    temperature: Tensor | None = None,
    vocab_size: int | None = None,
) -> Drawn:
    """The ``k`` children of each request's parents with the greatest perturbed log-probabilities.

    Args:
        logits: ``[B * P, V]``; only the chosen tiles are read.
        log_probs: float32 ``[B, P]``, of the prefixes under what is sampled from; ``-inf`` where none is expanded.
        perturbed: float32 ``[B, P]``, G of the prefixes; ``-inf`` where none is expanded.
        nodes: int64 ``[B, P]``, their hashes.
        tile_ref, tile_sum, lse: from ``summarize`` with ``normalize="allowed"``, the same bitmask and temperature.
        k: children per request, 1 or more.
        seed: int64 ``[1]`` on the same device.
        bitmask, temperature, vocab_size: as given to ``summarize``.

    Returns:
        :class:`Drawn`.

    Raises:
        ValueError, TypeError: ``<argument>: expected X, got Y``.
    """
    size = check_rows(logits, vocab_size, bitmask, temperature)
    check_range("k", k, 1)
    for name, field, dtype in (
        ("log_probs", log_probs, torch.float32),
        ("perturbed", perturbed, torch.float32),
        ("nodes", nodes, torch.int64),
    ):
        check_dtype(name, field, dtype)
        check_shape(name, field, "[B, P]", None, None)
        if field.shape != log_probs.shape or field.numel() != logits.shape[0]:
            raise ValueError(f"{name}: expected one per row of logits, {logits.shape[0]}, got {list(field.shape)}")
    check_dtype("tile_sum", tile_sum, torch.float32)
    check_shape("tile_sum", tile_sum, "[R, N]", logits.shape[0], tiles_of(size))
    check_shape("tile_ref", tile_ref, "[R, N]", logits.shape[0], tiles_of(size))
    check_dtype("lse", lse, torch.float32)
    check_shape("lse", lse, "[R]", logits.shape[0])
    check_dtype("seed", seed, torch.int64)
    check_shape("seed", seed, "[1]", 1)
    check_same_device(logits=logits, log_probs=log_probs, perturbed=perturbed, nodes=nodes, lse=lse, seed=seed)
    fields = (log_probs.contiguous(), perturbed.contiguous(), nodes.contiguous(), tile_ref, tile_sum, lse)
    return Drawn(*_op(logits.detach(), *fields, size, k, bitmask, contiguous(temperature), seed))
