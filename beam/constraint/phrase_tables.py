"""The automata of the phrases of a batch, on the device: one after the other, a state's number among all of them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .phrase_automaton import PhraseAutomaton

_BEYOND = np.iinfo(np.int64).max


class PhraseTables:
    """Automata of B requests. ``states`` are numbers among all of theirs, ``met`` sets of satisfied phrases, int64."""

    def __init__(self, automata: Sequence[PhraseAutomaton], number_of_request: Sequence[int], device: torch.device):
        """``number_of_request [B]`` says which of ``automata`` is whose."""
        columns = max(1, *(len(one.alphabet) for one in automata))
        phrases = max(len(one.lengths) for one in automata)
        states = np.cumsum([0, *(len(one.found) for one in automata)])
        used = np.cumsum([0, *(one.needed.size for one in automata)])
        alphabet = np.full((len(automata), columns), _BEYOND)
        lengths = np.zeros((len(automata), phrases), dtype=np.int32)
        following = np.zeros((states[-1], columns + 1), dtype=np.int32)
        distance = np.zeros((states[-1], phrases), dtype=np.int32)
        base, stride = np.zeros((2, states[-1]), dtype=np.int64)
        for number, one in enumerate(automata):
            own = slice(states[number], states[number + 1])
            tokens = len(one.alphabet)
            alphabet[number, :tokens] = one.alphabet
            following[own] = one.following[:, -1:] + own.start
            following[own, :tokens] = one.following[:, :-1] + own.start
            base[own] = used[number]
            if one.distance is None:
                sets = one.needed.shape[1]
                base[own] += sets * np.arange(len(one.found))
                stride[own] = 1
            else:
                distance[own, : len(one.lengths)] = one.distance
                lengths[number, : len(one.lengths)] = one.lengths

        def of_request(per_automaton: Any) -> Tensor:
            return on_device(np.asarray(per_automaton)[list(number_of_request)])

        def on_device(array: Any) -> Tensor:
            return torch.from_numpy(array).to(device, non_blocking=True)

        self.alphabet = of_request(alphabet)  # int64 [B, A], ascending; beyond every token where there is none
        self.roots = of_request(states[:-1])  # int64 [B]
        self.totals = of_request([one.total for one in automata])  # int64 [B]
        self.lengths = of_request(lengths)  # int32 [B, n], of phrases in ``_distance``
        self.exact = phrases == 0
        self._following = on_device(following)  # int32 [S, A + 1]
        self._found = on_device(np.concatenate([one.found for one in automata]))  # int64 [S]
        self._needed = on_device(np.concatenate([one.needed.ravel() for one in automata]))  # int32, flat
        self._base, self._stride = on_device(base), on_device(stride)  # int64 [S], of a state's entries in it
        self._distance = on_device(distance)  # int32 [S, n]
        self._bits = on_device(np.arange(phrases))

    def column(self, tokens: Tensor) -> Tensor:
        """Columns int64 ``[B, m]`` of ``tokens [B, m]``: A for those outside the alphabet."""
        at = torch.searchsorted(self.alphabet, tokens.contiguous())
        last = self.alphabet.shape[1]
        inside = self.alphabet.gather(1, at.clamp(max=last - 1)) == tokens
        return torch.where(inside, at, last)

    def step(self, states: Tensor, met: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
        """Where tokens lead: states and sets of the shape of ``column``, to which the others broadcast."""
        after = self._following[states, column].long()
        return after, met | self._found[after]

    def needed(self, states: Tensor, met: Tensor) -> Tensor:
        """The fewest tokens that satisfy everything, or fewer: int32, 0 where, and only where, all is satisfied."""
        exactly = self._needed[self._base[states] + met * self._stride[states]]
        if self.exact:
            return exactly
        far = self._distance[states].masked_fill(self._is_met(met), 0)
        return exactly + far.amax(-1)  # one of them is 0

    def missing(self, states: Tensor, met: Tensor) -> Tensor:
        """What progress is measured by, of requests ``[B, m]``: the fewest tokens that satisfy everything.

        Where that is not known exactly, without overlaps between what is still missing.
        """
        exactly = self._needed[self._base[states] + met * self._stride[states]]
        if self.exact:
            return exactly
        done = self._is_met(met)
        lengths = self.lengths[:, None]
        whole = lengths.masked_fill(done, 0).sum(-1)
        begun = (lengths - self._distance[states]).masked_fill(done, 0).amax(-1)
        return exactly + whole.int() - begun

    def _is_met(self, met: Tensor) -> Tensor:
        return (met[..., None] >> self._bits) & 1 != 0
