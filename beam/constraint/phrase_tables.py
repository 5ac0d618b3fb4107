"""The automata of the phrases of a batch, on the device: one after the other, a state's number among all of them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .phrase_automaton import PhraseAutomaton

_BEYOND = torch.iinfo(torch.int64).max


class PhraseTables:
    """Automata of B requests. ``states`` are numbers among all of theirs, ``met`` sets of satisfied phrases, int64."""

    def __init__(self, automata: Sequence[PhraseAutomaton], of_request: Sequence[int], device: torch.device):
        """``of_request [B]`` names the automaton of each request."""
        columns = max(1, *(len(one.alphabet) for one in automata))
        phrases = max(len(one.lengths) for one in automata)
        alphabets = torch.full((len(automata), columns), _BEYOND)
        following, found, base, stride, distance, needed = [], [], [], [], [], []
        lengths = torch.zeros(len(automata), phrases, dtype=torch.int32)
        totals, roots, used = [], [], 0
        for number, one in enumerate(automata):
            first, size = sum(map(len, found)), len(one.found)
            alphabets[number, : len(one.alphabet)] = torch.from_numpy(one.alphabet)
            after = torch.from_numpy(one.following)
            other = after[:, -1:].expand(-1, columns + 1 - after.shape[1])
            following.append(torch.cat([after, other], 1) + first)
            found.append(torch.from_numpy(one.found))
            exact = one.distance is None
            sets = one.needed.shape[1] if exact else 0
            base.append(used + sets * torch.arange(size))
            stride.append(torch.full((size,), int(exact)))
            needed.append(torch.from_numpy(one.needed).flatten())
            used += one.needed.size
            far = torch.zeros(size, phrases, dtype=torch.int32)
            if one.distance is not None:
                far[:, : one.distance.shape[1]] = torch.from_numpy(one.distance)
                lengths[number, : len(one.lengths)] = torch.from_numpy(one.lengths)
            distance.append(far)
            totals.append(one.total)
            roots.append(first)
        index = torch.tensor(of_request)
        self.alphabet = alphabets[index].to(device)  # int64 [B, A], ascending; beyond every token where there is none
        self.roots = torch.tensor(roots)[index].to(device)  # int64 [B]
        self.totals = torch.tensor(totals)[index].to(device)  # int64 [B]
        self.lengths = lengths[index].to(device)  # int32 [B, n], of phrases in ``_distance``
        self.exact = phrases == 0
        self._following = torch.cat(following).int().to(device)  # [S, A + 1]
        self._found = torch.cat(found).to(device)  # int64 [S]
        self._needed = torch.cat(needed).to(device)  # int32, flat
        self._base, self._stride = torch.cat(base).to(device), torch.cat(stride).to(device)  # int64 [S], into it
        self._distance = torch.cat(distance).to(device)  # int32 [S, n]
        self._bits = torch.arange(phrases).to(device)

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
