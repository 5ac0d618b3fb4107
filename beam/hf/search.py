"""A search of one's own on a model of transformers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from ..hypotheses import Hypotheses
from ..search import BeamSearch
from ..state import State
from .session import Call, check_calls, decode
from .settings import limits_of, stop_string_criteria


def beam_search(
    model: Any,
    inputs: Mapping[str, Any] | Tensor,
    search: BeamSearch,
    *,
    num_hypotheses: int | None = None,
    logits_processor: Any = None,
    stopping_criteria: Any = None,
    prefix_allowed_tokens_fn: Any = None,
    stop_strings: Any = None,
    tokenizer: Any = None,
    streamer: Any = None,
    progress: Callable[[int, State], Any] | None = None,
    request_ids: Any = None,
    **options: Any,
) -> Hypotheses:
    """Run ``search`` on a model with ``generate``, decoder-only or encoder-decoder; each prompt is run once.

    Beam size, lengths, EOS, penalties and stopping are those of ``search``. Masks, position ids, encoders and caches
    are made ready by ``model.generate``, and the processors that the model's generation config asks for are at work.

    Args:
        model: with ``generate`` and ``prepare_inputs_for_generation``.
        inputs: what the tokenizer or the processor returned, padded on the left for decoder-only models; or token ids
            ``[B, L]``.
        search: an ``fb.BeamSearch``; ``max_length`` counts generated tokens.
        num_hypotheses: N; default ``beam_size``.
        logits_processor, stopping_criteria, prefix_allowed_tokens_fn, stop_strings, tokenizer: as ``generate`` takes
            them.
        streamer: for one request. With a method ``best``, such as ``flashbeam.hf.BestStreamer``, it is shown the best
            hypothesis after each step; any other is given tokens as soon as nothing can change them.
        progress: ``progress(steps, state)`` is called after each step; if it returns true, the best so far is returned.
        request_ids: int64 ``[B]``, name the requests for the randomness.
        options: anything else that ``generate`` takes, such as ``cache_implementation`` or ``no_repeat_ngram_size``.

    Returns:
        :class:`flashbeam.Hypotheses`: tokens without the prompt.

    Raises:
        ValueError, TypeError: ``<argument>: expected X, got Y``.
    """
    if not isinstance(search, BeamSearch):
        raise TypeError(f"search: expected an fb.BeamSearch, got {type(search).__name__}")
    check_calls(progress=progress)
    fixed = {"num_beams": 1, "num_return_sequences": 1, "early_stopping": False, "length_penalty": 1.0}
    given = next((name for name in ("max_new_tokens", "max_length", *fixed) if name in options), None)
    if given is not None:
        raise ValueError(f"{given}: expected nothing beside search, which says that, got {options[given]!r}")
    from transformers import GenerationMixin

    lengths = _source_lengths(inputs)
    limits = [limit(n) if callable(limit) else limit for limit in search.max_length.values for n in lengths]
    found: list[Hypotheses] = []

    def decoding_method(
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **model_kwargs: Any,
    ) -> Tensor:
        criteria = [*stopping_criteria, *stop_string_criteria(stop_strings, tokenizer)]
        limits = limits_of([], criteria, input_ids.shape[1])._replace(processors=list(logits_processor))
        call = Call(model, input_ids, model_kwargs, generation_config, 1)
        result = decode(
            call,
            search,
            limits,
            num_hypotheses=num_hypotheses,
            request_ids=request_ids,
            source_lengths=lengths,
            progress=progress,
            streamer=streamer,
        )
        found.append(result.hyps)
        return input_ids

    samples = search.selection.seed is not None
    # Whisper's own cuts long audio into windows and glues what it finds; a search decodes one window
    method = GenerationMixin.generate if hasattr(model, "generate_with_fallback") else type(model).generate
    method(
        model,
        **(inputs if isinstance(inputs, Mapping) else {"inputs": inputs}),
        logits_processor=logits_processor,
        stopping_criteria=stopping_criteria,
        prefix_allowed_tokens_fn=prefix_allowed_tokens_fn,
        custom_generate=decoding_method,
        max_new_tokens=max(limits),
        **({"do_sample": False} if not samples else {}),
        **fixed,
        **options,
    )
    return found[0]


def _source_lengths(inputs: Any) -> list[int]:
    """Tokens, or frames, of each request."""
    mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
    if mask is not None:
        lengths: list[int] = mask.sum(1).tolist()
        return lengths
    first = next(iter(inputs.values())) if isinstance(inputs, Mapping) else inputs
    return [first.shape[1]] * first.shape[0]
