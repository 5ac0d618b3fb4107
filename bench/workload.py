"""The shapes that are timed, named after real models, and inputs for them."""

from typing import NamedTuple

import torch
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Shape(NamedTuple):
    """A decode step: ``batch * beams`` rows of logits."""

    batch: int
    beams: int
    vocab: int

    @property
    def logits(self) -> int:
        return self.batch * self.beams * self.vocab

    def tiny(self) -> "Shape":
        """As much of it as shows that the code runs: a whole tile and part of another."""
        return Shape(min(self.batch, 2), min(self.beams, 5), 3001)


SHAPES = {
    "llama3-b8k8": Shape(8, 8, 128_256),
    "gpt2-b8k8": Shape(8, 8, 50_257),
    "qwen3-b1k8": Shape(1, 8, 151_936),
    "whisper-b16k5": Shape(16, 5, 51_866),
    "wide-b8k256": Shape(8, 256, 32_000),
}


class Inputs(NamedTuple):
    """What a step consumes."""

    logits: Tensor  # [B, K, V]
    log_probs: Tensor  # float32 [B, K]


def make_inputs(shape: Shape, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> Inputs:
    """Logits as spread as a language model's, and log-probabilities of beams some steps into a search."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.empty(shape, dtype=dtype)
    for request in logits:  # float32 for one request at a time
        request.copy_(torch.randn(request.shape, generator=generator).mul_(3.0))
    log_probs = torch.randn(shape.batch, shape.beams, generator=generator).sub_(5.0).sort(1, descending=True).values
    return Inputs(logits.to(device), log_probs.to(device))
