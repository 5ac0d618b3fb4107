"""Forced beginnings."""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .csr import int_array
from .protocol import Bound, Context
from .token_lists import check_inside, on_device, padded


class Prefix:
    """Every hypothesis begins with ``tokens``.

    They count in the length, and each adds its log-probability under the model. EOS is barred until they are all said;
    it may itself be the last of them, which makes the prefix the only hypothesis. If ``max_length`` is shorter, the
    hypothesis is as much of the prefix as fits. A forced EOS before ``min_length`` is a dead end.

    Args:
        tokens: token ids; ``[]`` forces nothing. For prefixes that differ by request, give a list of constraints.

    Raises:
        ValueError, TypeError: ``<argument>: expected X, got Y``; ids outside the vocabulary, or an EOS that is not the
            last, at the first step.
    """

    def __init__(self, tokens: Any):
        self.tokens = int_array("tokens", tokens)

    def __repr__(self) -> str:
        return f"Prefix({self.tokens.tolist()})"

    @staticmethod
    def bind(requests: list["Prefix | None"], context: Context) -> Bound:
        """See :class:`Bound`."""
        return _Bound(requests, context)


class _State(NamedTuple):
    lengths: Tensor  # int64 [R], tokens so far


class _Bound(Bound):
    def __init__(self, requests: list[Prefix | None], context: Context):
        self.context = context
        prefixes = [np.zeros(0, np.int32) if request is None else request.tokens for request in requests]
        for prefix in prefixes:
            check_inside("tokens", prefix, context.vocab_size)
            if np.isin(prefix[:-1], np.asarray(context.eos, np.int32)).any():
                raise ValueError(f"tokens: expected EOS only as the last token, got {prefix.tolist()}")
        self.prefixes = on_device(padded(prefixes, max(map(len, prefixes)) + 1), np.int64, context)  # [B, P + 1]

    def init(self) -> _State:
        return _State(torch.zeros(self.context.rows, dtype=torch.int64, device=self.context.device))

    def advance(self, state: _State, tokens: Tensor) -> _State:
        return _State(state.lengths + 1)

    def bitmask(self, state: _State) -> Tensor:
        rows, longest = state.lengths.shape[0], self.prefixes.shape[1] - 1
        prefixes = self.context.of_rows(self.prefixes, rows)
        forced = prefixes.gather(1, state.lengths.clamp(max=longest)[:, None])  # [R, 1], -1: nothing is
        free = (forced < 0).int().neg()
        bitmask = free.repeat(1, -(-self.context.vocab_size // 32))
        token = forced.clamp(min=0)
        return bitmask.scatter(1, token >> 5, free | (1 << (token & 31)).int())
