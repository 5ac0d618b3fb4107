"""What ``generate`` returns, made of hypotheses."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from ..hypotheses import Hypotheses
from .caches import cache_name


class Recorder:
    """Keeps of each step what the generation config asks for, of all ``rows``, ``beams`` of each request."""

    def __init__(self, config: Any, rows: int, beams: int, encoder_decoder: bool):
        wanted = bool(config.return_dict_in_generate)
        self.rows, self.beams = rows, beams
        self.scores: tuple[Tensor, ...] | None = () if wanted and config.output_scores else None
        self.logits: tuple[Tensor, ...] | None = () if wanted and config.output_logits else None
        attentions, states = wanted and config.output_attentions, wanted and config.output_hidden_states
        names = {"decoder_attentions": attentions, "cross_attentions": attentions, "decoder_hidden_states": states}
        if not encoder_decoder:
            names = {"attentions": attentions, "hidden_states": states}
        self.outputs: dict[str, tuple[Any, ...]] = {name: () for name, asked in names.items() if asked}

    def model(self, outputs: Any, logits: Tensor) -> None:
        """The model's own of a step, ``logits [R, V]``; the first may have one row for each request."""
        repeats = self.rows // logits.shape[0]
        if self.logits is not None:
            self.logits += (_repeat(logits.float(), repeats).clone(),)
        for name in self.outputs:
            self.outputs[name] += (_repeat(getattr(outputs, name), repeats),)

    def step(self, scores: Tensor) -> None:
        """The scores ``[B * K, V]`` that processors have made of a step's."""
        if self.scores is not None:
            self.scores += (scores.clone(),)


def _repeat(node: Any, repeats: int) -> Any:
    if repeats == 1 or node is None:
        return node
    if isinstance(node, Tensor):
        return node.repeat_interleave(repeats, 0)
    return tuple(_repeat(child, repeats) for child in node)


def generated(
    model: Any,
    config: Any,
    hyps: Hypotheses,
    prompts: Tensor,
    recorder: Recorder,
    model_kwargs: dict[str, Any],
    filler: int,
) -> Any:
    """What ``generate`` returns for ``hyps`` of ``prompts [B, L]``: sequences, or one of its output classes.

    A hypothesis that is not there is a row of ``filler`` behind its prompt, with score ``-inf``.
    """
    batch, count, steps = hyps.tokens.shape
    lengths = hyps.lengths.to(prompts.device)
    longest = int(lengths.max())
    behind = torch.arange(steps, device=prompts.device) >= lengths[:, :, None]
    tokens = hyps.tokens.to(prompts.device).masked_fill(behind, filler)[:, :, :longest]
    sequences = torch.cat([prompts[:, None].expand(-1, count, -1), tokens], 2).flatten(0, 1)
    if not config.return_dict_in_generate:
        return sequences

    from transformers.generation import utils

    first_row = torch.arange(batch, device=hyps.slots.device)[:, None, None] * recorder.beams
    rows = torch.where(hyps.slots < 0, -1, hyps.slots + first_row)[:, :, :longest].flatten(0, 1)
    fields: dict[str, Any] = {
        "sequences": sequences,
        "sequences_scores": hyps.scores.flatten() if config.output_scores else None,
        "scores": recorder.scores,
        "logits": recorder.logits,
        "beam_indices": rows.int(),
        **recorder.outputs,
    }
    kind = utils.GenerateBeamDecoderOnlyOutput
    if model.config.is_encoder_decoder:
        kind = utils.GenerateBeamEncoderDecoderOutput
        encoder = model_kwargs["encoder_outputs"]
        fields["encoder_attentions"] = encoder.get("attentions") if config.output_attentions else None
        fields["encoder_hidden_states"] = encoder.get("hidden_states") if config.output_hidden_states else None
    name = cache_name(model_kwargs)
    names = {field.name for field in dataclasses.fields(kind)}
    fields["cache" if "cache" in names else "past_key_values"] = None if name is None else model_kwargs[name]
    return kind(**{name: value for name, value in fields.items() if name in names})
