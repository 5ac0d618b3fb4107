"""Rewards for tokens and for words."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..arguments import PerRequest, finite_number, positive_number, token_ids
from .protocol import Seen
from .rates import on_rows


class Reward(NamedTuple):
    """What runs along with a token reward, float32 ``[R, 1]``."""

    reward: Tensor
    up_to: Tensor | None


class TokenReward:
    """The term ``reward * length``, the length counting EOS (He, He, Wu, Wang 2016, "Improved neural machine
    translation with SMT features"); bounded, ``reward * min(length, bound)`` (Huang, Zhao, Ma 2017, "When to finish?
    Optimal beam search for neural text generation").

    Args:
        reward: of either sign [B].
        up_to: the bound, above 0 [B]; ``None``: there is none.
        per_source_token: the bound is this times the length of the source, which ``init(source_lengths=...)`` is to be
            given; not with ``up_to``.

    Raises:
        ValueError, TypeError: ``<argument>: expected X, got Y``.
    """

    monotone = True  # the same for all tokens
    reads_attention = False

    def __init__(self, reward: Any, up_to: Any = None, *, per_source_token: float | None = None):
        self.reward = PerRequest("reward", reward, finite_number)
        self.up_to = None if up_to is None else PerRequest("up_to", up_to, positive_number)
        ratio = per_source_token
        self.per_source_token = None if ratio is None else positive_number("per_source_token", ratio)
        if up_to is not None and ratio is not None:
            raise ValueError(f"per_source_token: expected None with up_to, got {ratio}")
        self._said = f"TokenReward({reward}"
        self._said += f", up_to={up_to})" if ratio is None else f", per_source_token={ratio})"

    @property
    def per_request(self) -> tuple[PerRequest[float], ...]:
        """What may differ by request."""
        return (self.reward,) if self.up_to is None else (self.reward, self.up_to)

    @property
    def reads_source_lengths(self) -> bool:
        """Whether ``init`` is to be given ``source_lengths``."""
        return self.per_source_token is not None

    def __repr__(self) -> str:
        return self._said

    def init(self, rows: int, device: torch.device) -> Reward:
        """See :class:`flashbeam.scoring.Term`."""
        up_to = None if self.up_to is None else on_rows(self.up_to, rows, device)
        return Reward(on_rows(self.reward, rows, device), up_to)

    def extend(self, stats: Reward, seen: Seen) -> tuple[Tensor, Reward]:
        """See :class:`flashbeam.scoring.Term`."""
        return self._of(seen.lengths, stats, seen), stats

    def upper(self, value: Tensor, stats: Reward, seen: Seen) -> Tensor:
        """What the longest hypothesis gets, or the shortest if that is a penalty."""
        return torch.maximum(self._of(seen.longest, stats, seen), self._of(seen.shortest, stats, seen))

    def _of(self, lengths: Tensor, stats: Reward, seen: Seen) -> Tensor:
        if stats.up_to is not None:
            lengths = torch.minimum(lengths, stats.up_to)
        if self.per_source_token is not None:
            assert seen.source_lengths is not None
            lengths = torch.minimum(lengths, seen.source_lengths * self.per_source_token)
        return lengths * stats.reward


class Words(NamedTuple):
    """What runs along with a word reward, float32."""

    words: Tensor  # [R, M], so far
    reward: Tensor  # [R, 1]


class WordReward:
    """The term ``reward * words``: tokens so far that begin a word.

    Args:
        reward: of either sign [B].
        starts: bool ``[V]`` on the CPU, or a list of ids: the tokens that begin a word.

    Raises:
        ValueError, TypeError: ``<argument>: expected X, got Y``.
    """

    monotone = False
    reads_attention = False

    def __init__(self, reward: Any, starts: Tensor | Sequence[int]):
        self.reward = PerRequest("reward", reward, finite_number)
        if not isinstance(starts, Tensor):
            if isinstance(starts, str) or not isinstance(starts, Sequence):
                raise TypeError(f"starts: expected a bool tensor or a list of ids, got {type(starts).__name__}")
            ids = token_ids("starts", starts)
            starts = torch.zeros(max(ids, default=0) + 1, dtype=torch.bool)
            starts[ids] = True
        if starts.dtype != torch.bool:
            raise TypeError(f"starts: expected bool, got {str(starts.dtype).removeprefix('torch.')}")
        if starts.dim() != 1 or starts.numel() == 0 or starts.device.type != "cpu":
            raise ValueError(f"starts: expected shape [V] on cpu, got {list(starts.shape)} on {starts.device}")
        self.starts = starts.clone()
        self._on: dict[torch.device, Tensor] = {}  # made where a search starts: a step copies nothing from the host
        self._said = f"WordReward({reward}, starts=<{self.starts.numel()} tokens>)"

    @property
    def per_request(self) -> tuple[PerRequest[float]]:
        """What may differ by request."""
        return (self.reward,)

    def __repr__(self) -> str:
        return self._said

    def init(self, rows: int, device: torch.device) -> Words:
        """See :class:`flashbeam.scoring.Term`."""
        if device not in self._on:
            self._on[device] = self.starts.to(device, non_blocking=True)
        return Words(torch.zeros(rows, 1, dtype=torch.float32, device=device), on_rows(self.reward, rows, device))

    def extend(self, stats: Words, seen: Seen) -> tuple[Tensor, Words]:
        """See :class:`flashbeam.scoring.Term`."""
        starts = self._on[seen.tokens.device]
        begins = starts[seen.tokens.clamp(max=starts.numel() - 1)] & (seen.tokens < starts.numel())
        words = stats.words + begins
        return words * stats.reward, Words(words, stats.reward)

    def upper(self, value: Tensor, stats: Words, seen: Seen) -> Tensor:
        """Every token to come may begin a word, or none."""
        return value + (seen.longest - seen.lengths) * stats.reward.clamp(min=0.0)
