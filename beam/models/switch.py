"""A model for each row: critical tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from flashbeam.kernels import mark_bits, top_candidates

from .mixture import as_temperatures, check_temperatures, column, faults, mixed, on_device
from .protocol import Combined, Given

GREEDY = ("certain", "model")


class _Picked(NamedTuple):
    """The best token of each row, by the models that decide greedily."""

    onehot: Tensor  # int64 [R, M]; -1 where the model's logits say
    flags: Tensor  # int32 [R]


@dataclass(frozen=True)
class Switch:
    """A gate says for each row which model speaks, or in what proportion two of them do.

    Every step is given ``gate``, one value per row or per request::

        bool         model 1 where it is set, else model 0
        int64        the number of the model
        float32 g    log p = log((1 - g) p_0 + g p_1)

    Where a model speaks alone, the search is that model's, bit for bit. So model 0 may be aligned and model 1 its
    pretrained ancestor, which knows more, for the tokens that a classifier finds critical (Jin et al. 2024,
    "Collaborative decoding of critical tokens for boosting factuality of large language models").

    Args:
        greedy: ``None``, or how the models but the first decide: by their best token of those that may follow, which
            then is the one token of the row they speak in. ``"certain"``: it has probability 1, and adds 0 to the
            score. ``"model"``: it has its probability in that model, as if the others had been banned; the gate must
            be a bool or a number then.
        temperatures: of the models, above 0: divide their logits before they are combined; default 1. The search's own
            ``temperature`` divides ``log p``.

    Raises:
        ValueError, TypeError: ``<argument>: expected X, got Y``.
    """

    greedy: str | None = None
    temperatures: Sequence[float] | None = None
    reads = "gate"
    rescores = False
    falls = True

    def __post_init__(self) -> None:
        if self.greedy not in (None, *GREEDY):
            raise ValueError(f"greedy: expected one of {[None, *GREEDY]}, got {self.greedy!r}")
        object.__setattr__(self, "temperatures", as_temperatures(self.temperatures))

    @property
    def weighs(self) -> bool:
        """The best token is one that may follow."""
        return self.greedy is not None

    def begin(self, batch_size: int, device: torch.device) -> Tensor | None:
        """The temperatures, float32 ``[M]``."""
        return on_device(self.temperatures, device)

    def check(self, models: int, per_row: Tensor | None) -> None:
        """See :class:`flashbeam.models.Models`."""
        if models < 2:
            raise ValueError(f"logits: expected those of 2 models or more, got {models} tensor")
        check_temperatures(self.temperatures, models)
        if per_row is None:
            raise ValueError("gate: expected a tensor for fb.Switch, got None")
        if per_row.dtype != torch.int64 and models != 2:
            kind = str(per_row.dtype).removeprefix("torch.")
            raise TypeError(f"gate: expected int64, the number of one of {models} models, got {kind}")
        if per_row.dtype == torch.float32 and self.greedy == "model":
            raise TypeError("gate: expected bool or int64 for greedy='model', got float32")

    def combine(self, settings: Tensor | None, given: Given) -> Combined:
        """See :class:`flashbeam.models.Models`."""
        gate = given.per_row
        assert gate is not None
        models = torch.arange(len(given.logits), device=gate.device)
        if gate.dtype == torch.float32:
            weights = torch.stack([1 - gate, gate], 1)
        else:
            weights = (gate.long()[:, None] == models).float()
        temperature = given.tempered(settings)
        if self.greedy is None:
            return Combined(mixed(given, weights, temperature))
        picked = self._pick(given, weights, temperature)
        if self.greedy == "certain":
            return Combined(mixed(given, weights, temperature, picked.onehot), flags=picked.flags)
        decides = (weights[:, 1:] > 0).any(1)
        token = torch.where(weights > 0, picked.onehot, -1).amax(1)
        there = decides & (token >= 0) & (token < given.vocab_size)
        row = torch.arange(token.shape[0], device=token.device)
        bits = mark_bits(row, token, there, token.shape[0], given.vocab_size)
        bits = torch.where(decides[:, None], bits, torch.full_like(bits, -1))
        return Combined(mixed(given, weights, temperature), bitmask=bits)

    def _pick(self, given: Given, weights: Tensor, temperature: Tensor | None) -> _Picked:
        """The models' best tokens, ``vocab_size`` where none may follow."""
        onehot = [torch.full_like(given.active, -1, dtype=torch.int64)]
        flags = []
        for i, x in list(enumerate(given.logits))[1:]:
            best = top_candidates(
                x,
                weights.new_zeros(weights.shape[0], 1),
                1,
                bitmask=given.allowed,
                temperature=column(temperature, i),
                active=given.active & (weights[:, i] > 0),
                vocab_size=given.vocab_size,
            )
            none = best.log_probs[:, 0] == -torch.inf
            token = best.tokens[:, 0].masked_fill(none, given.vocab_size)
            onehot.append(token.masked_fill(best.lse == torch.inf, -1))  # an invalid row is read, and reported
            flags.append(best.flags)
        return _Picked(torch.stack(onehot, 1), faults(*flags))
