"""Noise for back-translation: words are shuffled locally, deleted and blanked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flashbeam.kernels import Stream, child_nodes, random_bits, root_nodes

from .arguments import finite_number, seed_number, token_ids, whole_number
from .checks import as_request_ids

_ONE = 1 << 32  # random words are below it
_FARTHEST = 1 << 30  # sort keys stay inside int64
_END, _GONE = (1 << 63) - 2, (1 << 63) - 1  # sort keys of EOS, and of what is not in the result


@dataclass(frozen=True)
class Noised:
    """What :func:`noise` returns; ``[B]`` is ``[B, N]`` where the tokens were ``[B, N, T]``."""

    tokens: Tensor  # int64 [B, T], then pad_id
    lengths: Tensor  # int64 [B], tokens, EOS included


def _threshold(name: str, given: float) -> int:
    """A random word is below it with the probability given, to the nearest 2^-32."""
    probability = finite_number(name, given)
    if not 0 <= probability <= 1:
        raise ValueError(f"{name}: expected a probability in [0, 1], got {given}")
    return round(probability * _ONE)


def _below(name: str, given: int, high: int) -> int:
    number = whole_number(0)(name, given)
    if number >= high:
        raise ValueError(f"{name}: expected an int below {high}, got {given}")
    return number


def _check_tensor(name: str, given: Tensor, dtype: torch.dtype, device: torch.device | None = None) -> None:
    if not isinstance(given, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(given).__name__}")
    if given.dtype != dtype:
        raise TypeError(f"{name}: expected {str(dtype)[6:]}, got {str(given.dtype)[6:]}")
    if device is not None and given.device != device:
        raise ValueError(f"{name}: expected a tensor on {device}, as tokens, got one on {given.device}")


def _check_shape(name: str, given: Tensor, shape: Sequence[int]) -> None:
    if given.shape != torch.Size(shape):
        raise ValueError(f"{name}: expected shape {list(shape)}, got {list(given.shape)}")


def noise(
    tokens: Tensor,
    seed: int | Tensor,
    *,
    delete: float = 0.1,
    blank: float = 0.1,
    shuffle: int = 3,
    blank_id: int | None = None,
    pad_id: int = 0,
    eos_id: int | Sequence[int] | None = None,
    continues: Tensor | None = None,
    lengths: Tensor | None = None,
    request_ids: Tensor | Sequence[int] | None = None,
) -> Noised:
    """Noise sequences word by word, as beam search output is for back-translation.

    For the words 0 .. n - 1 of a sequence, with U, D, E uniform in [0, 1) and drawn for each word::

        order = stable argsort of w + U[w] * (shuffle + 1)
        words = [w for w in order if D[w] >= delete] or [one word, all equally likely]
        words = [blank_id if E[w] < blank else word w for w in words]

    No word overtakes, or is overtaken by, one that is more than ``shuffle`` words away: w' > w comes before w only if
    w' - w < (U[w] - U[w']) * (shuffle + 1) < shuffle + 1. So at most ``shuffle`` words overtake w, at most that many
    are overtaken by it, and no word is displaced by more than ``shuffle``, counted before words are deleted.

    A word is a token, or with ``continues`` a token and those after it that continue it, which stay together in order;
    a blanked word becomes one ``blank_id``. An EOS at the very end is no word: it stays the last token. Anywhere else,
    EOS and every other special token (a BOS too) is a word like others. A sequence without words is returned as it is.

    Args:
        tokens: ``[B, T]`` int64, or ``[B, N, T]`` as ``hyps.tokens``, where each of a request's N sequences draws its
            own numbers and the first draws those of ``[B, T]``. Padded on the right. Not modified.
        seed: int of 64 bits, or int64 ``[1]`` on the tokens' device.
        delete: probability of a word to be deleted; rounded to a multiple of 2^-32, as ``blank`` is.
        blank: probability of a word that is not deleted to be blanked.
        shuffle: how many places a word may move, in [0, 2^30); 0 keeps the order.
        blank_id: what a blanked word becomes; needed where ``blank > 0``.
        pad_id: fills what is behind the end.
        eos_id: a token, or a list of tokens, that stays at the end; ``None``: there is none.
        continues: ``[V]`` bool on the tokens' device: which tokens continue the word of the token before them. The
            first token of a sequence starts a word in any case, as do ids outside the table. ``None``: none continues.
        lengths: ``[B]`` (``[B, N]``) int64 on the tokens' device, EOS included; clamped to [0, T]. ``None``: what
            precedes the trailing ``pad_id``; then an EOS that equals ``pad_id`` counts as padding.
        request_ids: ``[B]`` int64, name the requests for the randomness; default 0 .. B - 1.

    Returns:
        :class:`Noised`, of the tokens' shape. A request's numbers are a function of the seed, its id, the number of the
        sequence in it and the number of the word: its result is the same alone, in any batch and under any padding, on
        any device. Nothing waits for the host.

    Raises:
        ValueError, TypeError: ``<argument>: expected X, got Y``, before any work.

    Sources: Edunov, Ott, Auli, Grangier 2018, "Understanding Back-Translation at Scale", section 3 ("beam+noise", whose
    numbers are the defaults); Lample, Conneau, Denoyer, Ranzato 2018, "Unsupervised Machine Translation Using
    Monolingual Corpora Only", section 2.3, for the shuffle.
    """
    _check_tensor("tokens", tokens, torch.int64)
    device = tokens.device
    if tokens.dim() not in (2, 3):
        raise ValueError(f"tokens: expected shape [B, T] or [B, N, T], got {list(tokens.shape)}")
    if isinstance(seed, Tensor):
        _check_tensor("seed", seed, torch.int64, device)
        _check_shape("seed", seed, [1])
    else:
        seed = torch.full((1,), seed_number("seed", seed), device=device)
    delete_below, blank_below = _threshold("delete", delete), _threshold("blank", blank)
    places = _below("shuffle", shuffle, _FARTHEST)
    if blank_id is not None:
        whole_number(0)("blank_id", blank_id)
    elif blank_below:
        raise ValueError(f"blank_id: expected a token id, as blank is {blank}, got None")
    whole_number(0)("pad_id", pad_id)
    eos_ids = token_ids("eos_id", eos_id)
    if continues is not None:
        _check_tensor("continues", continues, torch.bool, device)
        if continues.dim() != 1 or continues.shape[0] == 0:
            raise ValueError(f"continues: expected shape [V], got {list(continues.shape)}")
    if lengths is not None:
        _check_tensor("lengths", lengths, torch.int64, device)
        _check_shape("lengths", lengths, tokens.shape[:-1])
    ids = as_request_ids(request_ids, tokens.shape[0], device)
    if tokens.numel() == 0:
        return Noised(tokens.clone(), tokens.new_zeros(tokens.shape[:-1]))

    place = torch.arange(tokens.shape[-1], device=device)
    if lengths is None:
        lengths = ((tokens != pad_id) * (place + 1)).amax(-1)
    inside = place < lengths[..., None]
    is_eos = torch.zeros_like(inside)
    for eos in eos_ids:
        is_eos |= tokens == eos
    is_end = is_eos & (place == lengths.clamp(max=tokens.shape[-1])[..., None] - 1)
    in_word = inside & ~is_end
    starts = in_word.clone()
    if continues is not None:
        known = (tokens >= 0) & (tokens < continues.shape[0])
        starts &= ~(known & continues[tokens.clamp(0, continues.shape[0] - 1)]) | (place == 0)
    word = starts.cumsum(-1).sub_(1).clamp_(min=0)  # [..., T] of each token; anything where there is no word
    is_word = place < starts.sum(-1, keepdim=True)  # [..., T] over words

    # one Philox call per word; the number of a sequence is in the node, as a part's number would depend on T
    sequence = torch.arange(tokens.shape[1] if tokens.dim() == 3 else 1, device=device)
    nodes = child_nodes(root_nodes(ids)[:, None], sequence)[..., None].expand(-1, -1, place.shape[0])
    words = random_bits(seed, nodes, 4, Stream.NOISE, place.expand_as(nodes)).view(*tokens.shape, 4)
    shift, deletion, blanking, survival = words.unbind(-1)
    keys = (place << 32) + shift * (places + 1)  # in 2^-32 of a word
    kept = is_word & (deletion >= delete_below)
    # distinct, so that every device finds the same maximum
    survivor = ((survival << 31) - place).masked_fill(~is_word, -_ONE).argmax(-1, keepdim=True)
    kept |= ~kept.any(-1, keepdim=True) & is_word & (place == survivor)

    blanked = (blanking < blank_below).gather(-1, word)
    stays = in_word & kept.gather(-1, word) & (~blanked | starts)
    if blank_id is not None:
        tokens = tokens.masked_fill(blanked & starts, blank_id)
    # tokens of a word have one key and a stable sort keeps them together, also if another word has the same
    order = keys.gather(-1, word).masked_fill(~stays, _GONE).masked_fill(is_end, _END).sort(dim=-1, stable=True).indices
    count = (stays | is_end).sum(-1)
    return Noised(tokens.gather(-1, order).masked_fill(place >= count[..., None], pad_id), count)
