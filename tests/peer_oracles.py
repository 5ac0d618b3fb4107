"""Peers that do not install beside the tests, restated in plain Python over a function of the prefix, in float64.

Each follows its source statement by statement where the statement decides something: who may finish, what the length
counts, when to stop, what happens at the end, in which order hypotheses come out. Ties are not modelled: the peers'
top-k does not define them. Nothing here imports flashbeam.

``fairseq``  0.12.2, sequence_generator.py and search.py; itself run live where the sources are (``live_fairseq``)
``vllm``     main of 2026, entrypoints/generate/beam_search/offline.py
``t5x``      main of 2025, decoding.py
"""

import math
import os
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

Tokens = tuple[int, ...]
LogProbs = Callable[[Tokens], np.ndarray]  # generated tokens -> float64 [V]


class Found(NamedTuple):
    tokens: Tokens
    score: float
    log_prob: float


def _expand(live: list[tuple[float, Tokens]], log_probs: LogProbs) -> list[tuple[float, Tokens]]:
    """All candidates, best first."""
    rows = ((phi + float(lp), (*tokens, v)) for phi, tokens in live for v, lp in enumerate(log_probs(tokens)))
    return sorted((candidate for candidate in rows if candidate[0] > -math.inf), reverse=True)


def fairseq(
    log_probs: LogProbs,
    *,
    beam: int,
    max_len: int,
    eos: int,
    pad: int,
    unk: int,
    min_len: int = 1,
    lenpen: float = 1.0,
    unnormalized: bool = False,
    unkpen: float = 0.0,
) -> list[Found]:
    """``SequenceGenerator._generate``. ``max_len`` is ``max_len_a * source + max_len_b``."""
    assert min_len <= max_len
    live, finalized = [(0.0, ())], []
    for step in range(max_len + 1):

        def lprobs(tokens: Tokens, step: int = step) -> np.ndarray:
            row = log_probs(tokens).copy()
            row[pad] = -math.inf
            row[unk] -= unkpen
            if step >= max_len:
                row[np.arange(len(row)) != eos] = -math.inf
            if step < min_len:
                row[eos] = -math.inf
            return row

        candidates = _expand(live, lprobs)[: 2 * beam]
        for phi, tokens in candidates[:beam]:
            if tokens[-1] == eos and len(finalized) < beam:
                finalized.append(Found(tokens, phi if unnormalized else phi / (step + 1) ** lenpen, phi))
        if len(finalized) == beam:
            break
        live = [(phi, tokens) for phi, tokens in candidates if tokens[-1] != eos][:beam]
    return sorted(finalized, key=lambda found: -found.score)


def vllm(
    log_probs: LogProbs,
    *,
    beam_width: int,
    max_tokens: int,
    eos: int | None,
    prompt_length: int,
    length_penalty: float = 1.0,
    ignore_eos: bool = False,
) -> list[Found]:
    """``BeamSearchOfflineMixin.beam_search`` and ``_beam_search_step``, temperature 0."""

    def key(beam: tuple[float, Tokens]) -> float:
        phi, tokens = beam
        seq_len = prompt_length + len(tokens)
        if tokens[-1] == eos:
            seq_len -= 1
        return phi / seq_len**length_penalty

    beams: list[tuple[float, Tokens]] = [(0.0, ())]
    completed: list[tuple[float, Tokens]] = []
    for _ in range(max_tokens):
        new_beams = []
        for phi, tokens in beams:
            row = log_probs(tokens)
            for token in np.argsort(-row, kind="stable")[: 2 * beam_width].tolist():  # logprobs=2 * beam_width
                if row[token] == -math.inf:
                    continue
                new = phi + float(row[token]), (*tokens, token)
                (completed if token == eos and not ignore_eos else new_beams).append(new)
        beams = sorted(new_beams, key=key, reverse=True)[:beam_width]
        if not beams:
            break
    best = sorted(completed + beams, key=key, reverse=True)[:beam_width]
    return [Found(tokens, key((phi, tokens)), phi) for phi, tokens in best]


def t5x(
    log_probs: LogProbs, *, num_decodes: int, max_decode_len: int, eos: int, alpha: float = 0.6, prompt_length: int = 0
) -> list[Found]:
    """``beam_search`` from where its prompt ends; its output is worst first, this one best first."""

    def brevity_penalty(length: int) -> float:
        return ((5.0 + length) / 6.0) ** alpha

    live: list[tuple[float, Tokens]] = [(0.0, ())]
    finished: list[Found] = []
    for index in range(prompt_length, max_decode_len):
        if len(finished) == num_decodes:
            # one longer than anything can get: max_decode_len was raised by the dummy start token
            best_live = live[0][0] / brevity_penalty(max_decode_len + 1)
            if finished[-1].score > best_live:
                break
        topk = _expand(live, log_probs)[: 2 * num_decodes]
        new = [Found(y, phi / brevity_penalty(index + 1), phi) for phi, y in topk if y[-1] == eos]
        live = [(phi, y) for phi, y in topk if y[-1] != eos][:num_decodes]
        finished = sorted([*finished, *new], key=lambda found: -found.score)[:num_decodes]
    return finished or [Found(tokens, phi, phi) for phi, tokens in live]


# ---------------------------------------------------------------------------------------------------------------------
# fairseq itself

FAIRSEQ = Path(os.environ.get("FAIRSEQ", Path(__file__).parents[1] / ".venv" / "peers" / "fairseq-0.12.2"))


def live_fairseq(
    log_probs: Callable[[int, Tokens], np.ndarray],
    requests: int,
    vocab: int,
    eos: int,
    pad: int,
    unk: int,
    **options: Any,
) -> list[list[Found]]:
    """The unmodified ``SequenceGenerator`` of an unpacked sdist; packages around it that need a build are stubs."""

    class FairseqIncrementalDecoder(torch.nn.Module):
        pass

    class Dictionary:
        def __len__(self) -> int:
            return vocab

        pad = staticmethod(lambda: pad)
        unk = staticmethod(lambda: unk)
        eos = staticmethod(lambda: eos)

    class Encoder(torch.nn.Module):
        """Hands on which request a row belongs to."""

        def forward_torchscript(self, net_input: dict[str, torch.Tensor]) -> torch.Tensor:
            return net_input["src_tokens"][:, 0]

        def reorder_encoder_out(self, out: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
            return out[order]

    class Decoder(torch.nn.Module):
        def forward(self, tokens: torch.Tensor, encoder_out: torch.Tensor) -> tuple[torch.Tensor, None]:
            rows = zip(encoder_out.tolist(), tokens[:, 1:].tolist(), strict=True)
            logits = np.stack([log_probs(request, tuple(prefix)) for request, prefix in rows])
            return torch.from_numpy(logits).float()[:, None], None

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.decoder = Encoder(), Decoder()

        def max_decoder_positions(self) -> int:
            return 1024

        def get_normalized_probs(self, out: tuple[torch.Tensor, None], log_probs: bool, sample: None) -> torch.Tensor:
            return torch.log_softmax(out[0], -1)

    generator = _fairseq_modules(FairseqIncrementalDecoder)["fairseq.sequence_generator"].SequenceGenerator(
        [Model()], Dictionary(), **options
    )
    # a source of two tokens, EOS the last
    source = torch.stack([torch.arange(requests), torch.full((requests,), eos)], 1)
    found = generator.generate([], {"net_input": {"src_tokens": source}})
    return [
        [
            Found(tuple(hypo["tokens"].tolist()), float(hypo["score"]), float(hypo["positional_scores"].sum()))
            for hypo in hypos
        ]
        for hypos in found
    ]


def _fairseq_modules(decoder: type) -> dict[str, types.ModuleType]:
    if "fairseq.sequence_generator" not in sys.modules:
        for name in ("fairseq", "fairseq.utils", "fairseq.data", "fairseq.data.data_utils", "fairseq.models"):
            module = sys.modules[name] = types.ModuleType(name)
            module.__path__ = [str(FAIRSEQ / name.replace(".", "/"))]
            parent, _, child = name.rpartition(".")
            if parent:
                setattr(sys.modules[parent], child, module)
        sys.modules["fairseq.models"].FairseqIncrementalDecoder = decoder  # type: ignore[attr-defined]
        import fairseq.sequence_generator  # noqa: F401
    return sys.modules
