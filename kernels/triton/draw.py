"""Sampling without replacement, top-down: rows to tiles to groups to tokens.

Every narrowing is one kernel and one ``torch.topk``: the kernel writes perturbed log-probabilities as int64 keys that
hold the positions of their candidates too, so no two are equal and the order is determined. One program owns a row, a
chosen tile or a chosen group; where it came from is read from the key it was chosen by. A place without a candidate has
a key of -inf, and no logit is read for it.
"""

import triton
import triton.language as tl
from torch import Tensor

from ..random import Stream
from ..tiles import GROUP_SIZE, GROUPS, TILE
from .keys import key_index, key_value, pack_key, token_log_prob
from .random import gumbel, philox

_R = tl.constexpr(GROUP_SIZE)
_C = tl.constexpr(GROUPS)
_TILE = tl.constexpr(TILE)
_TILES = tl.constexpr(int(Stream.TILE))
_GROUPS = tl.constexpr(int(Stream.GROUP))
_TOKENS = tl.constexpr(int(Stream.TOKEN))


@triton.jit
def _perturb(phi, greatest, noise):
    """Perturbed log-probabilities of children ``phi [m]`` whose greatest is ``greatest``."""
    free = phi + noise
    top = tl.max(free, 0)
    gap = free - tl.where(top == -float("inf"), 0.0, top)  # at most 0
    # log(1 - exp(gap)); near 0 by expm1(gap) = (exp(gap) - 1) * gap / log(exp(gap)), where rounding errors cancel
    weight = tl.exp(gap)
    tiny = weight == 1.0
    near = (gap > -0.693) & (weight < 1.0)
    scale = tl.where(near, tl.div_rn(gap, tl.log(tl.where(near, weight, 0.5))), 1.0)
    rest = tl.log(tl.where(tiny, -gap, 1.0 - weight) * scale)
    v = greatest - free + rest
    perturbed = greatest - tl.maximum(v, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(v)))
    perturbed = tl.where(gap == 0.0, greatest, perturbed)
    return tl.where(free == -float("inf"), -float("inf"), perturbed)  # without a greatest, all are -inf by arithmetic


@triton.jit
def _noise(seed_ptr, node, part, place, calls, STREAM: tl.constexpr):
    """Standard Gumbels of the words ``place [m]`` of a part of a node; ``calls`` of Philox belong to a part."""
    c2 = part * calls + place // 4
    node += tl.zeros_like(c2).to(tl.int64)
    stream = tl.zeros_like(c2) + STREAM
    w0, w1, w2, w3 = philox(
        tl.load(seed_ptr), node.to(tl.uint32), (node >> 32).to(tl.uint32), c2.to(tl.uint32), stream.to(tl.uint32)
    )
    word = place % 4
    return gumbel(tl.where(word == 0, w0, tl.where(word == 1, w1, tl.where(word == 2, w2, w3))))


@triton.jit
def _adjusted(
    x_ptr,
    bits_ptr,
    temperature_ptr,
    row,
    token,
    candidate,
    stride_x,
    stride_bits,
    HAS_BITMASK: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
):
    """Adjusted logits of tokens; -inf where they are no candidates, which are not read, or barred by the bitmask."""
    if HAS_BITMASK:
        word = tl.load(bits_ptr + row * stride_bits + token // 32, mask=candidate, other=0)
        candidate = candidate & (((word >> (token % 32)) & 1) != 0)
    x = tl.load(x_ptr + row * stride_x + token, mask=candidate, other=-float("inf")).to(tl.float32)
    if HAS_TEMPERATURE:
        x = tl.div_rn(x, tl.load(temperature_ptr + row))
    return tl.where(x == x, x, -float("inf"))  # NaN counts as -inf


@triton.jit
def _tiles_kernel(
    # inputs
    log_probs_ptr,  # *f32 [B, P]
    perturbed_ptr,  # *f32 [B, P]
    nodes_ptr,  # *i64 [B, P]
    tile_ref_ptr,  # *T [B * P, N]
    tile_sum_ptr,  # *f32 [B * P, N]
    lse_ptr,  # *f32 [B * P]
    temperature_ptr,  # *f32 [B * P] or unused
    seed_ptr,  # *i64 [1]
    # outputs
    keys_ptr,  # *i64 [B, P * N]
    # sizes
    parents,
    tiles,
    # meta-parameters
    HAS_TEMPERATURE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    tile = tl.arange(0, BLOCK_N)
    inside = tile < tiles
    mass = tl.load(tile_ref_ptr + row * tiles + tile, mask=inside, other=-float("inf")).to(tl.float32)
    if HAS_TEMPERATURE:
        mass = tl.div_rn(mass, tl.load(temperature_ptr + row))
    total = tl.load(tile_sum_ptr + row * tiles + tile, mask=inside, other=0.0)
    mass = tl.where(mass == -float("inf"), mass, mass + tl.log(tl.abs(total)))
    phi = tl.load(log_probs_ptr + row) + token_log_prob(mass, tl.load(lse_ptr + row))
    noise = _noise(seed_ptr, tl.load(nodes_ptr + row), 0, tile, 0, _TILES)
    perturbed = _perturb(phi, tl.load(perturbed_ptr + row), noise)
    key = pack_key(perturbed, (row % parents) * tiles + tile)
    tl.store(keys_ptr + row * tiles + tile, key, mask=inside)


@triton.jit
def _groups_kernel(
    # inputs
    x_ptr,  # *T [B * P, V]
    log_probs_ptr,  # *f32 [B, P]
    nodes_ptr,  # *i64 [B, P]
    lse_ptr,  # *f32 [B * P]
    bits_ptr,  # *i32 [B * P, W] or unused
    temperature_ptr,  # *f32 [B * P] or unused
    seed_ptr,  # *i64 [1]
    tile_keys_ptr,  # *i64 [B, M], of the tiles chosen
    # outputs
    keys_ptr,  # *i64 [B, M, 64]
    # sizes and strides, in elements
    parents,
    tiles,
    chosen_tiles,  # M
    vocab_size,
    stride_x,
    stride_bits,
    # meta-parameters
    HAS_BITMASK: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
):
    request, rank = tl.program_id(0).to(tl.int64), tl.program_id(1)
    tile_key = tl.load(tile_keys_ptr + request * chosen_tiles + rank)
    greatest = key_value(tile_key)
    place = key_index(tile_key).to(tl.int32)
    row = request * parents + place // tiles
    tile = place % tiles
    column = tl.arange(0, _C)
    token = tile * _TILE + tl.arange(0, _R)[:, None] * _C + column[None, :]  # [32, 64]
    # no token of a tile without perturbed value: its row may hold anything
    candidate = token < tl.where(greatest > -float("inf"), vocab_size, 0)
    x = _adjusted(
        x_ptr, bits_ptr, temperature_ptr, row, token, candidate, stride_x, stride_bits, HAS_BITMASK, HAS_TEMPERATURE
    )
    top = tl.max(x, 0)
    mass = top + tl.log(tl.sum(tl.exp(x - tl.where(top == -float("inf"), 0.0, top)[None, :]), 0))
    phi = tl.load(log_probs_ptr + row) + token_log_prob(mass, tl.load(lse_ptr + row))
    noise = _noise(seed_ptr, tl.load(nodes_ptr + row), tile, column, _C // 4, _GROUPS)
    key = pack_key(_perturb(phi, greatest, noise), rank * _C + column)
    tl.store(keys_ptr + (request * chosen_tiles + rank) * _C + column, key)


@triton.jit
def _tokens_kernel(
    # inputs
    x_ptr,  # *T [B * P, V]
    log_probs_ptr,  # *f32 [B, P]
    nodes_ptr,  # *i64 [B, P]
    lse_ptr,  # *f32 [B * P]
    bits_ptr,  # *i32 [B * P, W] or unused
    temperature_ptr,  # *f32 [B * P] or unused
    seed_ptr,  # *i64 [1]
    tile_keys_ptr,  # *i64 [B, M], of the tiles chosen
    group_keys_ptr,  # *i64 [B, G], of the groups chosen
    # outputs
    keys_ptr,  # *i64 [B, G, 32]
    # sizes and strides, in elements
    parents,
    tiles,
    chosen_tiles,  # M
    chosen_groups,  # G
    vocab_size,
    stride_x,
    stride_bits,
    # meta-parameters
    HAS_BITMASK: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
):
    request, rank = tl.program_id(0).to(tl.int64), tl.program_id(1)
    group_key = tl.load(group_keys_ptr + request * chosen_groups + rank)
    greatest = key_value(group_key)
    group = key_index(group_key).to(tl.int32)
    place = key_index(tl.load(tile_keys_ptr + request * chosen_tiles + group // _C)).to(tl.int32)
    row = request * parents + place // tiles
    tile, column = place % tiles, group % _C
    member = tl.arange(0, _R)
    token = tile * _TILE + member * _C + column
    candidate = token < tl.where(greatest > -float("inf"), vocab_size, 0)
    x = _adjusted(
        x_ptr, bits_ptr, temperature_ptr, row, token, candidate, stride_x, stride_bits, HAS_BITMASK, HAS_TEMPERATURE
    )
    phi = tl.load(log_probs_ptr + row) + token_log_prob(x, tl.load(lse_ptr + row))
    noise = _noise(seed_ptr, tl.load(nodes_ptr + row), tile * _C + column, member, _R // 4, _TOKENS)
    key = pack_key(_perturb(phi, greatest, noise), rank * _R + member)
    tl.store(keys_ptr + (request * chosen_groups + rank) * _R + member, key)


@triton.jit
def _children_kernel(
    # inputs
    x_ptr,  # *T [B * P, V]
    temperature_ptr,  # *f32 [B * P] or unused
    tile_keys_ptr,  # *i64 [B, M], of the tiles chosen
    group_keys_ptr,  # *i64 [B, G], of the groups chosen
    token_keys_ptr,  # *i64 [B, L], of the tokens chosen
    # outputs
    perturbed_ptr,  # *f32 [B, k]
    parents_ptr,  # *i64 [B, k]
    tokens_ptr,  # *i64 [B, k]
    adjusted_ptr,  # *f32 [B, k]
    # sizes and strides, in elements
    parents,
    tiles,
    chosen_tiles,  # M
    chosen_groups,  # G
    chosen_tokens,  # L
    k,
    stride_x,
    # meta-parameters
    HAS_TEMPERATURE: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    request = tl.program_id(0).to(tl.int64)
    rank = tl.arange(0, BLOCK_K)
    inside = rank < chosen_tokens
    key = tl.load(token_keys_ptr + request * chosen_tokens + rank, mask=inside, other=0)
    perturbed = tl.where(inside, key_value(key), -float("inf"))
    valid = perturbed > -float("inf")
    element = key_index(key).to(tl.int32)
    group = key_index(tl.load(group_keys_ptr + request * chosen_groups + element // _R, mask=valid, other=0))
    place = key_index(tl.load(tile_keys_ptr + request * chosen_tiles + group // _C, mask=valid, other=0))
    parent = tl.where(valid, place // tiles, 0)
    token = tl.where(valid, (place % tiles) * _TILE + (element % _R) * _C + group % _C, 0)
    row = request * parents + parent
    x = _adjusted(x_ptr, x_ptr, temperature_ptr, row, token, valid, stride_x, 0, False, HAS_TEMPERATURE)
    out = request * k + rank
    inside = rank < k
    tl.store(perturbed_ptr + out, perturbed, mask=inside)
    tl.store(parents_ptr + out, parent, mask=inside)
    tl.store(tokens_ptr + out, token, mask=inside)
    tl.store(adjusted_ptr + out, x, mask=inside)


def _greatest(keys: Tensor, k: int) -> Tensor:
    """The ``k`` greatest keys of each request, all of them where there are fewer, in descending order."""
    keys = keys.flatten(1)
    return keys.topk(min(k, keys.shape[1])).values


def launch_draw(
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
    batch, parents = log_probs.shape
    tiles = tile_ref.shape[1]
    out = (
        log_probs.new_empty(batch, k),
        nodes.new_empty(batch, k),
        nodes.new_empty(batch, k),
        log_probs.new_empty(batch, k),
    )
    if batch == 0:
        return out
    temperature_or_unused = lse if temperature is None else temperature
    tile_keys = nodes.new_empty(batch, parents * tiles)
    _tiles_kernel[(batch * parents,)](
        log_probs,
        perturbed,
        nodes,
        tile_ref,
        tile_sum,
        lse,
        temperature_or_unused,
        seed,
        tile_keys,
        parents,
        tiles,
        HAS_TEMPERATURE=temperature is not None,
        BLOCK_N=triton.next_power_of_2(tiles),
        num_warps=1,
        enable_fp_fusion=False,
    )
    tile_keys = _greatest(tile_keys, k)
    chosen_tiles = tile_keys.shape[1]
    inputs = (
        logits,
        log_probs,
        nodes,
        lse,
        logits if bitmask is None else bitmask,
        temperature_or_unused,
        seed,
        tile_keys,
    )
    strides = logits.stride(0), 0 if bitmask is None else bitmask.stride(0)
    options = {
        "HAS_BITMASK": bitmask is not None,
        "HAS_TEMPERATURE": temperature is not None,
        "enable_fp_fusion": False,
    }
    group_keys = nodes.new_empty(batch, chosen_tiles, GROUPS)
    _groups_kernel[(batch, chosen_tiles)](
        *inputs, group_keys, parents, tiles, chosen_tiles, vocab_size, *strides, num_warps=4, **options
    )
    group_keys = _greatest(group_keys, k)
    chosen_groups = group_keys.shape[1]
    token_keys = nodes.new_empty(batch, chosen_groups, GROUP_SIZE)
    _tokens_kernel[(batch, chosen_groups)](
        *inputs,
        group_keys,
        token_keys,
        parents,
        tiles,
        chosen_tiles,
        chosen_groups,
        vocab_size,
        *strides,
        num_warps=1,
        **options,
    )
    token_keys = _greatest(token_keys, k)
    _children_kernel[(batch,)](
        logits,
        temperature_or_unused,
        tile_keys,
        group_keys,
        token_keys,
        *out,
        parents,
        tiles,
        chosen_tiles,
        chosen_groups,
        token_keys.shape[1],
        k,
        logits.stride(0),
        HAS_TEMPERATURE=temperature is not None,
        BLOCK_K=triton.next_power_of_2(k),
        num_warps=1 if k <= 64 else 4,
        enable_fp_fusion=False,
    )
    return out
