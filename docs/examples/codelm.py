"""A small causal language model of Python source, for the demonstration of beam search.

Subwords are byte-level BPE. A blank line is one token, ``EOS_ID``, so the text the model knows is

    EOS paragraph EOS paragraph EOS ...

and a completion ends where a paragraph of code ends. The network is a pre-norm transformer (RMSNorm, rotary positions,
SwiGLU, tied embeddings). Its cache is a plain nest of tensors with rows on dimension 0, so a beam search reorders it by
``index_select`` on every leaf. ``train_codelm.py`` makes the weights, ``codelm.npz``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

EOS_ID = 256  # ids 0..255 are bytes, 256 is the blank line, 257.. are merges
WEIGHTS = Path(__file__).with_name("codelm.npz")

# one or more blank lines; the last of them may be the end of a file without newline
_BLANK_LINES = re.compile(r"\n(?:[ \t]*\n)+")
# a merge never crosses these pieces: indentation, newline with indentation, word, punctuation, other white space
PIECE = re.compile(r"^ +|\n *| ?\w+| ?[^\w\s]+|\s")

# pad counts int64 [rows]; one (keys, values) per layer, each [rows, heads, T, head_dim]
Cache = tuple[Tensor, list[tuple[Tensor, Tensor]]]


class Tokenizer:
    """Byte-level BPE: every text can be encoded, and ``decode(encode(text)) == text`` up to runs of blank lines."""

    eos_id = EOS_ID

    def __init__(self, merges: Sequence[tuple[int, int]]) -> None:
        self.merges = list(merges)
        self.ids = {pair: EOS_ID + 1 + rank for rank, pair in enumerate(self.merges)}
        self.pieces = [bytes([i]) for i in range(256)] + [b"\n\n"]
        for left, right in self.merges:
            self.pieces.append(self.pieces[left] + self.pieces[right])
        self._known: dict[str, list[int]] = {}

    @property
    def vocab_size(self) -> int:
        return len(self.pieces)

    def encode(self, text: str) -> list[int]:
        """Turn text into ids; blank lines become ``eos_id``. No id is added at either end."""
        ids: list[int] = []
        for index, paragraph in enumerate(_BLANK_LINES.split(text)):
            if index:
                ids.append(EOS_ID)
            for piece in PIECE.findall(paragraph):
                ids.extend(self.encode_piece(piece))
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Turn ids into text; ``eos_id`` becomes an empty line, bytes that are not UTF-8 become U+FFFD."""
        return b"".join(self.pieces[i] for i in ids).decode("utf-8", errors="replace")

    def encode_piece(self, piece: str) -> list[int]:
        if piece not in self._known:
            ids = list(piece.encode())
            # the merge learned first goes first, at its leftmost place
            while found := [(self.ids[pair], i) for i, pair in enumerate(pairwise(ids)) if pair in self.ids]:
                merged, i = min(found)
                ids[i : i + 2] = [merged]
            self._known[piece] = ids
        return self._known[piece]


class Config(NamedTuple):
    vocab_size: int
    width: int
    layers: int
    heads: int
    hidden: int


class Block(nn.Module):
    """Attention and SwiGLU, each behind an RMSNorm and added to its input."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.heads = config.heads
        self.norm1 = nn.RMSNorm(config.width, eps=1e-5)
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.out = nn.Linear(config.width, config.width, bias=False)
        self.norm2 = nn.RMSNorm(config.width, eps=1e-5)
        self.up = nn.Linear(config.width, 2 * config.hidden, bias=False)
        self.down = nn.Linear(config.hidden, config.width, bias=False)

    def forward(
        self, x: Tensor, past: tuple[Tensor, Tensor], rotary: tuple[Tensor, Tensor], mask: Tensor
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        rows, n, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(rows, n, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [rows, heads, n, head_dim]
        k = torch.cat((past[0], rotate(k, *rotary)), 2)  # [rows, heads, T, head_dim]
        v = torch.cat((past[1], v), 2)
        attended = F.scaled_dot_product_attention(rotate(q, *rotary), k, v, attn_mask=mask)
        x = x + self.out(attended.transpose(1, 2).reshape(rows, n, width))
        gate, value = self.up(self.norm2(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * value), (k, v)


class CodeLM(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width, eps=1e-5)

    def forward(self, tokens: Tensor, cache: Cache | None = None) -> tuple[Tensor, Cache]:
        """Append tokens to each row and return the logits of what follows.

        Args:
            tokens: int64 ``[rows]``, one new token per row, or ``[rows, n]``.
            cache: what the previous call returned; ``None`` starts every row afresh, without padding. Not modified.

        Returns:
            float32 logits ``[rows, V]`` after the last token, and the cache with the new tokens included.
        """
        states, cache = self.states(tokens.view(tokens.shape[0], -1), cache)
        return F.linear(states[:, -1], self.embedding.weight), cache

    def prefill(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Cache]:
        """Read a batch of prompts, each preceded by ``EOS_ID`` (a paragraph begins) and padded on the left.

        Returns:
            float32 logits ``[B, V]`` of the first completed token, and the cache of ``B`` rows.
        """
        longest = max(len(prompt) for prompt in prompts)
        pads = [longest - len(prompt) for prompt in prompts]
        tokens = [[EOS_ID] * (pad + 1) + list(prompt) for pad, prompt in zip(pads, prompts, strict=True)]
        device = self.embedding.weight.device
        return self.forward(torch.tensor(tokens, device=device), self.empty_cache(torch.tensor(pads, device=device)))

    def empty_cache(self, pad: Tensor) -> Cache:
        """Return a cache of no tokens for rows whose first ``pad`` (int64 ``[rows]``) tokens are to be ignored."""
        shape = (pad.shape[0], self.config.heads, 0, self.config.width // self.config.heads)
        empty = self.embedding.weight.new_empty(shape)
        return pad, [(empty, empty) for _ in range(self.config.layers)]

    def states(self, tokens: Tensor, cache: Cache | None) -> tuple[Tensor, Cache]:
        """Return normalized hidden states ``[rows, n, width]`` of int64 ``[rows, n]`` tokens, and the cache."""
        if cache is None:
            cache = self.empty_cache(torch.zeros_like(tokens[:, 0]))
        pad, layers = cache
        total = layers[0][0].shape[2] + tokens.shape[1]
        key = torch.arange(total, device=tokens.device)
        query = key[total - tokens.shape[1] :, None]
        # a padding token sees itself only: a softmax over nothing would be nan
        mask = (key <= query) & (key >= pad.view(-1, 1, 1, 1)) | (key == query)  # [rows, 1, n, T]
        rotary = self._rotary((query.view(-1) - pad[:, None]).clamp(min=0))
        x = self.embedding(tokens)
        new_layers = []
        for block, past in zip(self.blocks, layers, strict=True):
            x, kept = block(x, past, rotary, mask)
            new_layers.append(kept)
        return self.norm(x), (pad, new_layers)

    def _rotary(self, position: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosines and sines ``[rows, 1, n, head_dim / 2]`` of int64 ``[rows, n]`` positions."""
        half = self.config.width // self.config.heads // 2
        frequency = 10000.0 ** (-torch.arange(half, device=position.device) / half)
        angle = position[:, None, :, None] * frequency
        return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair ``(x[i], x[i + head_dim / 2])`` of ``[rows, heads, n, head_dim]`` by its position's angle."""
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), -1)


def load(path: str | Path = WEIGHTS) -> tuple[CodeLM, Tokenizer]:
    """Read the model (float32, evaluation mode, CPU) and its tokenizer from an ``.npz`` file."""
    with np.load(path, allow_pickle=False) as data:
        arrays = {name: data[name] for name in data.files}
    tokenizer = Tokenizer([(left, right) for left, right in arrays.pop("merges").tolist()])
    model = CodeLM(Config(*arrays.pop("config").tolist()))
    model.load_state_dict({name: torch.from_numpy(array).float() for name, array in arrays.items()})
    return model.eval().requires_grad_(False), tokenizer


def save(path: str | Path, model: CodeLM, tokenizer: Tokenizer) -> None:
    """Write what ``load`` reads: float16 weights, the configuration and the merges; no pickle."""
    arrays = {name: weight.detach().half().numpy() for name, weight in model.state_dict().items()}
    config, merges = np.array(model.config, np.int64), np.array(tokenizer.merges, np.uint16)
    np.savez_compressed(path, **arrays, config=config, merges=merges)
