"""Exact search by brute force, for ``retrieval.py``: the model scores every item of the catalogue."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from catalogue import VOCAB_SIZE
from retriever import Retriever

CHUNK = 1024  # rows of logits at a time: they stay in the cache


class Level(NamedTuple):
    """The prefixes of one length, in lexicographic order."""

    parents: Tensor  # int64 [n], which prefix of the level before
    tokens: Tensor  # int64 [n], the last of each


class EveryItem:
    """The prefixes of all ids int64 ``[N, L]``, which share what the model computes."""

    def __init__(self, ids: Tensor) -> None:
        self.levels = []
        of_item = torch.zeros(len(ids), dtype=torch.int64)  # prefix of each item
        for tokens in ids.T:
            keys, of_item = (of_item * VOCAB_SIZE + tokens).unique(return_inverse=True)
            self.levels.append(Level(keys // VOCAB_SIZE, keys % VOCAB_SIZE))
        self.items = of_item.argsort()  # of each whole id

    def best(self, model: Retriever, query: Tensor, k: int, normalize: str) -> Tensor:
        """The ``k`` likeliest items of a query ``[VIEW]``, best first: as the search defines ``normalize``."""
        log_probs = torch.zeros(1)
        state = model.read(query[None])
        for parents, tokens in self.levels:
            features = model.features(state)
            logits = (features[parents] * model.write.weight[tokens]).sum(1) + model.write.bias[tokens]
            if normalize == "vocab":
                total = torch.cat([model.write(chunk).logsumexp(1) for chunk in features.split(CHUNK)])
            else:
                shares = logits.double().exp()
                total = torch.zeros(len(features), dtype=torch.float64).index_add_(0, parents, shares).log()
            log_probs = log_probs[parents] + logits - total[parents]
            state = state[parents] - model.written(tokens)
        return self.items[log_probs.topk(k).indices]
