"""A catalogue made up for ``retrieval.py``: items in clusters of clusters, noisy views of them, and their semantic ids.

An item is a point that nobody sees; a query is a view of it: distorted and noisy. The id of an item is what a
residual quantiser makes of its point, one code per level, each the centroid nearest to what the levels before left
over (Rajput et al. 2023). Items that are alike share a beginning. Numpy's generators give
the same catalogue on every machine.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

ITEMS = 100_000
DIM = 32  # of an item
VIEW = 48  # of a query
LEVELS, CODES = 4, 256
VOCAB_SIZE = LEVELS * CODES  # the tokens of level l are l * CODES and up
TOPICS, SUBTOPICS = 64, 32
NOISE = 0.3  # standard deviation in a query


def make_items() -> Tensor:
    """The items, float32 ``[ITEMS, DIM]``."""
    generator = np.random.default_rng(0)
    topics = generator.standard_normal((TOPICS, 1, DIM))
    subtopics = topics + 0.6 * generator.standard_normal((TOPICS, SUBTOPICS, DIM))
    places = generator.random((ITEMS, 2)) ** 2  # popular topics come first
    topic, subtopic = (places * (TOPICS, SUBTOPICS)).astype(int).T
    return torch.from_numpy(subtopics[topic, subtopic] + 0.4 * generator.standard_normal((ITEMS, DIM))).float()


def make_views(items: Tensor, seed: int) -> Tensor:
    """A query float32 ``[n, VIEW]`` for each item ``[n, DIM]``; another seed draws other noise."""
    distortion = np.random.default_rng(0).standard_normal((DIM, VIEW)) / DIM**0.5
    noise = np.random.default_rng(seed).standard_normal((len(items), VIEW))
    return (items @ torch.from_numpy(distortion).float()).tanh() + NOISE * torch.from_numpy(noise).float()


def nearest(points: Tensor, centroids: Tensor) -> Tensor:
    """The centroid nearest to each point, int64 ``[n]``."""
    return (centroids.square().sum(1) - 2 * points @ centroids.T).argmin(1)


def fit_centroids(items: Tensor, rounds: int = 20) -> Tensor:
    """Residual k-means: centroids float32 ``[LEVELS, CODES, DIM]``."""
    levels = []
    rest = items
    for _ in range(LEVELS):
        centroids = rest[:CODES].clone()
        for _ in range(rounds):
            code = nearest(rest, centroids)
            sums = torch.zeros_like(centroids).index_add_(0, code, rest)
            centroids = sums / code.bincount(minlength=CODES).clamp(min=1)[:, None]
        levels.append(centroids)
        rest = rest - centroids[nearest(rest, centroids)]
    return torch.stack(levels)


def make_ids(items: Tensor, centroids: Tensor) -> Tensor:
    """Distinct ids, int64 ``[N, LEVELS]`` tokens: where two items would share one, the later takes the nearest free."""
    codes, rest = [], items
    for level in centroids[:-1]:
        codes.append(nearest(rest, level))
        rest = rest - level[codes[-1]]
    prefixes = torch.stack(codes, 1)
    ranked = torch.cdist(rest, centroids[-1]).argsort(dim=1, stable=True).numpy()
    taken: set[tuple[int, ...]] = set()
    last = []
    for prefix, order in zip(prefixes.tolist(), ranked, strict=True):
        code = next(code for code in order if (*prefix, code) not in taken)
        taken.add((*prefix, code))
        last.append(code)
    codes = torch.cat([prefixes, torch.tensor(last)[:, None]], 1)
    return codes + CODES * torch.arange(LEVELS)
