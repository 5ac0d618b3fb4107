"""A small model that reads a query and writes the id of an item, code by code, for ``retrieval.py``.

``train_retriever.py`` makes the weights, ``retriever.npz``, which hold the catalogue's quantiser too.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from catalogue import VIEW, VOCAB_SIZE

WEIGHTS = Path(__file__).with_name("retriever.npz")
WIDTH = 128


class Retriever(nn.Module):
    """The state is what was read less what was written, as in the quantiser: a sum, and so a cache of one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.read = nn.Sequential(nn.Linear(VIEW, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))
        self.written = nn.Embedding(VOCAB_SIZE, WIDTH)
        self.think = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))
        self.write = nn.Linear(WIDTH, VOCAB_SIZE)

    def forward(self, given: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits ``[rows, V]`` of the next code, and the state ``[rows, WIDTH]``.

        Args:
            given: queries float32 ``[rows, VIEW]`` at first, then the code chosen for each row, int64 ``[rows]``.
            state: what the previous call returned. Not modified.
        """
        state = self.read(given) if state is None else state - self.written(given)
        return self.write(self.features(state)), state

    def features(self, state: Tensor) -> Tensor:
        return state + self.think(state)


def load(path: str | Path = WEIGHTS) -> tuple[Retriever, Tensor]:
    """The model (float32, evaluation mode, CPU) and the centroids of the quantiser."""
    with np.load(path, allow_pickle=False) as data:
        arrays = {name: torch.from_numpy(data[name]).float() for name in data.files}
    centroids = arrays.pop("centroids")
    model = Retriever()
    model.load_state_dict(arrays)
    return model.eval().requires_grad_(False), centroids


def save(path: str | Path, model: Retriever, centroids: Tensor) -> None:
    """Write what ``load`` reads: float16, no pickle."""
    arrays = {**model.state_dict(), "centroids": centroids}
    np.savez_compressed(path, **{name: array.half().numpy() for name, array in arrays.items()})
