"""The model as a search sees it: tokens and the rows they continue in, logits out."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from .caches import cache_name, check_cache, check_modules, fan_out, follow, states_of_modules
from .rows import repeated
from .stepping import advance, can_advance


class Decoder:
    """A transformers model in the middle of decoding K beams of each of B requests.

    Its prompt is run once for each request. Then the cache fans out to ``B * K`` rows and follows the beams; masks,
    encoder outputs and the keys and values of cross attention, which the beams of a request share, are repeated then
    and never reordered.

    Args:
        model: a model of transformers with ``generate``.
        input_ids: ``[B, L]``, or ``[B * K, L]`` if the prompts are ``repeated``.
        model_kwargs: as ``generate`` hands them to its decoding method.
        generation_config: the same.
        beams: K.
        whole: whether ``prepare_inputs_for_generation`` is given whole sequences and not the last tokens.
    """

    def __init__(
        self,
        model: Any,
        input_ids: Tensor,
        model_kwargs: dict[str, Any],
        generation_config: Any,
        beams: int,
        repeated: bool,
    ):
        from transformers import GenerationMixin

        self.model, self.model_kwargs, self.generation_config = model, model_kwargs, generation_config
        self.input_ids, self.beams = input_ids, beams
        self.encoder_decoder = bool(model.config.is_encoder_decoder)
        self.fanned_out = repeated or beams == 1
        prepare = GenerationMixin.prepare_inputs_for_generation
        self.cached = model_kwargs.get("use_cache") is not False
        self.options: dict[str, Any] = {}
        self.inputs: dict[str, Any] | None = None  # of the last step, if the next ones follow from them
        if self.cached and "next_sequence_length" in inspect.signature(prepare).parameters:
            self.options["next_sequence_length"] = 1
        # a model's own method may look at the tokens that are in the cache
        self.whole = not self.cached or type(model).prepare_inputs_for_generation is not prepare

    def prompt(self) -> tuple[Tensor, Any]:
        """Run the model on the prompts: logits ``[B, V]``, or ``[B * K, V]`` if they are repeated, and its outputs."""
        model, kwargs = self.model, self.model_kwargs
        rows, stays = self.input_ids.shape[0], self.beams > 1 and self.cached
        before = states_of_modules(model, rows) if stays else {}
        if hasattr(model, "_prefill"):  # transformers 5
            outputs = model._prefill(self.input_ids, self.generation_config, kwargs)
        else:
            kwargs = model._get_initial_cache_position(self.input_ids.shape[1], self.input_ids.device, kwargs)
            outputs = model(**model.prepare_inputs_for_generation(self.input_ids, **kwargs), return_dict=True)
        found = self._consumed(outputs, kwargs)
        if stays:
            check_modules(model, before, rows)
        name = cache_name(self.model_kwargs)
        if self.beams > 1 and name is not None:
            check_cache(model, self.model_kwargs[name])
        return found

    def step(self, tokens: Tensor, source_rows: Tensor) -> tuple[Tensor, Any]:
        """Run it on ``tokens [B * K, 1]``, or whole sequences, that continue its last ``source_rows [B * K]``."""
        if self.beams > 1:
            name = cache_name(self.model_kwargs)
            cache = None if name is None else self.model_kwargs[name]
            if not self.fanned_out:
                self.model_kwargs = repeated(self.model, self.model_kwargs, self.beams)
            if name is not None and self.fanned_out:
                self.model_kwargs[name] = follow(self.model, cache, source_rows, self.beams)
            elif name is not None:
                self.model_kwargs[name] = fan_out(self.model, cache, source_rows, self.input_ids.shape[0])
            self.fanned_out = True
        if self.inputs is not None:
            advance(self.model, self.inputs, tokens)
            outputs = self.model(**self.inputs, return_dict=True)
            logits: Tensor = outputs.logits[:, -1]
            return logits, outputs
        inputs = self.model.prepare_inputs_for_generation(tokens, **self.options, **self.model_kwargs)
        if not self.whole and can_advance(self.model, inputs):
            self.inputs = inputs
        return self._consumed(self.model(**inputs, return_dict=True), self.model_kwargs)

    def _consumed(self, outputs: Any, model_kwargs: dict[str, Any]) -> tuple[Tensor, Any]:
        self.model_kwargs = self.model._update_model_kwargs_for_generation(
            outputs, model_kwargs, is_encoder_decoder=self.encoder_decoder
        )
        logits: Tensor = outputs.logits[:, -1]
        return logits, outputs


class Sequences:
    """Prompt and tokens of every beam, for those who ask for them: int64 ``[B * K, L + t]`` after t steps."""

    def __init__(self, input_ids: Tensor, beams: int, steps: int):
        rows, self.length = input_ids.shape
        self.beams = beams
        self.all = input_ids.new_zeros(rows * beams, self.length + steps)
        self.all[:, : self.length] = input_ids.repeat_interleave(beams, 0)
        self.first_row = torch.arange(0, rows * beams, beams, device=input_ids.device)[:, None]

    @property
    def now(self) -> Tensor:
        """``[B * K, L + t]``, a view."""
        return self.all[:, : self.length]

    def rows_of(self, parents: Tensor) -> Tensor:
        """Rows of ``parents [B, M]``, slots of each request."""
        return parents + self.first_row

    def advance(self, parents: Tensor, tokens: Tensor) -> None:
        """Follow ``parents [B, K]`` and append ``tokens [B, K]``."""
        if self.beams > 1:
            self.all[:, : self.length] = self.now.index_select(0, self.rows_of(parents).flatten())
        self.all[:, self.length] = tokens.flatten()
        self.length += 1
