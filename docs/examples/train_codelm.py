"""Train the language model of ``codelm.py`` on the standard library of the running interpreter, on one CPU thread.

``python train_codelm.py`` makes ``codelm.npz`` and ``codelm_training.log`` beside this file. The same Python, torch and
processor give the same weights; others give a model of the same quality.
"""

from __future__ import annotations

import argparse
import math
import platform
import time
from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from code_corpus import read_corpus
from codelm import EOS_ID, PIECE, WEIGHTS, CodeLM, Config, Tokenizer, load, save

CONFIG = Config(vocab_size=2048, width=160, layers=4, heads=4, hidden=432)
CONTEXT = 256  # tokens
BATCH = 8  # windows
STEPS = 3800
PEAK_RATE = 4e-3
WARMUP = 100  # steps
WEIGHT_DECAY = 0.1
SEED = 0
LOG_INTERVAL = 50  # steps


def learn_merges(texts: list[str], count: int) -> list[tuple[int, int]]:
    """Return the ``count`` byte-pair merges of the texts, most frequent first; ties go to the larger pair of ids."""
    counts = Counter(piece for text in texts for piece in PIECE.findall(text))
    words = [list(piece.encode()) for piece in counts]
    weights = list(counts.values())
    total: Counter[tuple[int, int]] = Counter()
    places: defaultdict[tuple[int, int], set[int]] = defaultdict(set)  # words that hold, or once held, the pair
    for index, word in enumerate(words):
        for pair in pairwise(word):
            total[pair] += weights[index]
            places[pair].add(index)
    merges: list[tuple[int, int]] = []
    while len(merges) < count:
        best = max(total, key=lambda pair: (total[pair], pair))
        new = EOS_ID + 1 + len(merges)
        merges.append(best)
        for index in places.pop(best):
            word = words[index]
            for pair in pairwise(word):
                total[pair] -= weights[index]
            i = 0
            while i < len(word) - 1:
                if (word[i], word[i + 1]) == best:
                    word[i : i + 2] = [new]
                i += 1
            for pair in pairwise(word):
                total[pair] += weights[index]
                places[pair].add(index)
    return merges


def encode_files(tokenizer: Tokenizer, texts: list[str]) -> Tensor:
    """Return int64 ``[tokens]``: every file preceded by EOS, as every paragraph is."""
    return torch.tensor([i for text in texts for i in (EOS_ID, *tokenizer.encode(text))] + [EOS_ID])


def loss_of(model: CodeLM, windows: Tensor) -> Tensor:
    """Return the mean cross-entropy, in nats per token, of int64 ``[rows, n + 1]`` windows."""
    states, _ = model.states(windows[:, :-1], None)
    logits = F.linear(states, model.embedding.weight)
    return F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


@torch.no_grad()
def bits_per_byte(model: CodeLM, tokenizer: Tokenizer, texts: list[str]) -> float:
    """Measure held-out loss: windows of ``CONTEXT`` tokens one after another, nothing remembered between them."""
    stream = encode_files(tokenizer, texts)
    nats = sum(
        loss_of(model, stream[None, i : i + CONTEXT + 1]).item() * (min(len(stream) - 1, i + CONTEXT) - i)
        for i in range(0, len(stream) - 1, CONTEXT)
    )
    return nats / math.log(2) / sum(len(tokenizer.pieces[i]) for i in stream[1:].tolist())


def init_weights(model: CodeLM) -> None:
    for name, weight in model.named_parameters():
        if weight.dim() == 2:
            depth = (2 * model.config.layers) ** 0.5 if name.endswith(("out.weight", "down.weight")) else 1.0
            torch.nn.init.normal_(weight, std=0.5 / model.config.width**0.5 / depth)


def learning_rate(step: int, progress: float) -> float:
    """Linear warm-up, then half a cosine down to a fiftieth of the peak; ``progress`` runs from 0 to 1."""
    return PEAK_RATE * min((step + 1) / WARMUP, 0.51 + 0.49 * math.cos(math.pi * progress))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seconds", type=float, default=math.inf, help="end the schedule by then (not reproducible)")
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    log_lines: list[str] = []

    def log(line: str) -> None:
        log_lines.append(line)
        print(line, flush=True)

    began = time.perf_counter()
    train, held_out = read_corpus()
    tokenizer = Tokenizer(learn_merges(train, CONFIG.vocab_size - EOS_ID - 1))
    stream = encode_files(tokenizer, train)
    model = CodeLM(CONFIG)
    init_weights(model)
    log(f"python {platform.python_version()}, torch {torch.__version__}, numpy {np.__version__}, {platform.machine()}")
    log(f"{CONFIG}, {sum(weight.numel() for weight in model.parameters())} parameters")
    log(f"context {CONTEXT}, batch {BATCH}, steps {args.steps}, seconds {args.seconds}, seed {SEED}")
    log(f"AdamW: peak rate {PEAK_RATE}, warm-up {WARMUP} steps, weight decay {WEIGHT_DECAY}; products in bfloat16")
    log(f"{len(train)} training files: {sum(map(len, train))} characters, {len(stream)} tokens")
    log(f"{len(held_out)} held-out files: {sum(map(len, held_out))} characters")

    matrices = [weight for weight in model.parameters() if weight.dim() == 2]
    gains = [weight for weight in model.parameters() if weight.dim() == 1]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": gains, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_RATE, betas=(0.9, 0.95))
    # a window begins where a paragraph does, as a prompt does
    starts = (stream[: -CONTEXT - 1] == EOS_ID).nonzero().squeeze(1)
    offsets = torch.arange(CONTEXT + 1)
    order = starts[:0]
    started = time.perf_counter()
    losses: list[float] = []
    for step in range(args.steps):
        progress = max(step / args.steps, (time.perf_counter() - started) / args.seconds)
        if progress >= 1:
            break
        if len(order) < BATCH:
            order = starts[torch.randperm(len(starts))]
        windows, order = stream[order[:BATCH, None] + offsets], order[BATCH:]
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, progress)
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, windows)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if (step + 1) % LOG_INTERVAL == 0:
            mean = sum(losses[-LOG_INTERVAL:]) / LOG_INTERVAL
            log(f"step {step + 1}: {mean:.4f} nats per token, {time.perf_counter() - started:.0f} s")

    save(args.out, model, tokenizer)
    model, tokenizer = load(args.out)
    log(f"held out, float16 weights: {bits_per_byte(model, tokenizer, held_out):.4f} bits per byte")
    log(f"{args.out.name}: {args.out.stat().st_size} bytes; {time.perf_counter() - began:.0f} s in all")
    args.out.with_name(args.out.stem + "_training.log").write_text("\n".join(log_lines) + "\n")


if __name__ == "__main__":
    main()
