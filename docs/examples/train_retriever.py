"""Fit the quantiser of ``catalogue.py``, and train the model of ``retriever.py`` to write the ids that it gives.

``python train_retriever.py`` makes ``retriever.npz`` beside this file, in a few minutes on one thread.
"""

from __future__ import annotations

import time

import torch
import torch.nn.functional as F
from torch import Tensor

from catalogue import ITEMS, LEVELS, fit_centroids, make_ids, make_items, make_views
from retriever import WEIGHTS, Retriever, save

BATCH = 512
STEPS = 3000
PEAK_RATE = 3e-3
LOG_INTERVAL = 250  # steps
SEED = 1_000_000  # of the first step's views; those of an evaluation have others


def loss_of(model: Retriever, queries: Tensor, ids: Tensor) -> Tensor:
    """Mean negative log-probability of whole ids, in nats."""
    logits, state = model(queries)
    loss = F.cross_entropy(logits, ids[:, 0])
    for level in range(1, LEVELS):
        logits, state = model(ids[:, level - 1], state)
        loss = loss + F.cross_entropy(logits, ids[:, level])
    return loss


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    began = time.perf_counter()
    items = make_items()
    centroids = fit_centroids(items).half().float()  # as they are kept
    ids = make_ids(items, centroids)
    print(f"catalogue: {time.perf_counter() - began:.0f} s", flush=True)
    model = Retriever()
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_RATE, STEPS, pct_start=0.05)
    total = 0.0
    for step in range(STEPS):
        chosen = torch.randint(ITEMS, (BATCH,))
        loss = loss_of(model, make_views(items[chosen], SEED + step), ids[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        total += loss.item()
        if (step + 1) % LOG_INTERVAL == 0:
            mean = total / LOG_INTERVAL
            print(f"step {step + 1}: {mean:.3f} nats per id, {time.perf_counter() - began:.0f} s", flush=True)
            total = 0.0
    save(WEIGHTS, model, centroids)
    print(f"{WEIGHTS.name}: {WEIGHTS.stat().st_size} bytes")


if __name__ == "__main__":
    main()
