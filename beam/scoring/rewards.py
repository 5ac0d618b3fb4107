"""Rewards for tokens and for words."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..arguments import finite_number, positive_number, token_ids, whole_number
from .protocol import Seen


class TokenReward:
    """The term ``reward * length``, the length counting EOS (He et al. 2016, "Improved neural machine translation with
    SMT features", section 3.3); bounded, ``reward * min(length, bound)`` (Huang, Zhao, Ma 2017, "When to finish?",
    section 4).

    Args:
        reward: of either sign.
        up_to: the bound, 1 or more; ``None``: there is none.
        per_source_token: the bound is this times the length of the source, which ``init(source_lengths=...)`` is to be
            given; not with ``up_to``.

    Raises:
        ValueError, TypeError: ``<argument>: expected X, got Y``.
    """

    monotone = True  # the same for all tokens
    reads_attention = False

    def __init__(self, reward: float, up_to: int | None = None, *, per_source_token: float | None = None):
        self.reward = finite_number("reward", reward)
        self.up_to = None if up_to is None else whole_number(1)("up_to", up_to)
        ratio = per_source_token
        self.per_source_token = None if ratio is None else positive_number("per_source_token", ratio)
        if up_to is not None and ratio is not None:
            raise ValueError(f"per_source_token: expected None with up_to, got {ratio}")

    @property
    def reads_source_lengths(self) -> bool:
        """Whether ``init`` is to be given ``source_lengths``."""
        return self.per_source_token is not None

    def __repr__(self) -> str:
        bound = f", up_to={self.up_to}" if self.up_to is not None else ""
        bound = f", per_source_token={self.per_source_token}" if self.per_source_token is not None else bound
        return f"TokenReward({self.reward}{bound})"

    def init(self, rows: int, device: torch.device) -> tuple[()]:
        """See :class:`flashbeam.scoring.Term`."""
        return ()

    def extend(self, stats: tuple[()], seen: Seen) -> tuple[Tensor, tuple[()]]:
        """See :class:`flashbeam.scoring.Term`."""
        return self._of(seen.lengths, seen), stats

    def upper(self, value: Tensor, stats: tuple[()], seen: Seen) -> Tensor:
        """What the longest hypothesis gets, or the shortest if that is a penalty."""
        return self._of(seen.longest if self.reward > 0 else seen.shortest, seen)

    def _of(self, lengths: Tensor, seen: Seen) -> Tensor:
        if self.up_to is not None:
            lengths = lengths.clamp(max=float(self.up_to))
        if self.per_source_token is not None:
            assert seen.source_lengths is not None
            lengths = torch.minimum(lengths, seen.source_lengths * self.per_source_token)
        return lengths * self.reward


class WordReward:
    """The term ``reward * words``: tokens so far that begin a word.

    Args:
        reward: of either sign.
        starts: bool ``[V]`` on the CPU, or a list of ids: the tokens that begin a word.

    Raises:
        ValueError, TypeError: ``<argument>: expected X, got Y``.
    """

    monotone = False
    reads_attention = False

    def __init__(self, reward: float, starts: Tensor | Sequence[int]):
        self.reward = finite_number("reward", reward)
        if not isinstance(starts, Tensor):
            if isinstance(starts, str) or not isinstance(starts, Sequence):
                raise TypeError(f"starts: expected a bool tensor or a list of ids, got {type(starts).__name__}")
            ids = token_ids("starts", starts)
            starts = torch.zeros(max(ids, default=0) + 1, dtype=torch.bool)
            starts[ids] = True
        if starts.dtype != torch.bool or starts.dim() != 1 or starts.numel() == 0 or starts.device.type != "cpu":
            kind = f"{str(starts.dtype).removeprefix('torch.')} {list(starts.shape)} on {starts.device}"
            raise ValueError(f"starts: expected bool [V] on cpu, got {kind}")
        self.starts = starts.clone()
        self._on: dict[Any, Tensor] = {}  # made where a search starts: a step copies nothing from the host

    def __repr__(self) -> str:
        return f"WordReward({self.reward}, starts=<{self.starts.numel()} tokens>)"

    def init(self, rows: int, device: torch.device) -> Tensor:
        """See :class:`flashbeam.scoring.Term`: the words so far, float32 ``[R, 1]``."""
        if device not in self._on:
            self._on[device] = self.starts.to(device, non_blocking=True)
        return torch.zeros(rows, 1, dtype=torch.float32, device=device)

    def extend(self, stats: Tensor, seen: Seen) -> tuple[Tensor, Tensor]:
        """See :class:`flashbeam.scoring.Term`."""
        starts = self._on[seen.tokens.device]
        begins = starts[seen.tokens.clamp(max=starts.numel() - 1)] & (seen.tokens < starts.numel())
        words = stats + begins
        return words * self.reward, words

    def upper(self, value: Tensor, stats: Tensor, seen: Seen) -> Tensor:
        """Every token to come may begin a word, or none."""
        return value + (seen.longest - seen.lengths) * self.reward if self.reward > 0 else value
