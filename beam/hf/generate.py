"""flashbeam in the place of ``generate``'s own beam search: one argument."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..search import BeamSearch
from ..state import State
from .outputs import generated
from .session import Call, check_calls, decode
from .settings import filler_of, limits_of, pad_of, search_of, stop_string_criteria


def generate(
    model: Any,
    input_ids: Tensor,
    *,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    search: BeamSearch | None = None,
    selection: Any = None,
    constraint: Any = None,
    stopping: Any = None,
    normalize: str | None = None,
    request_ids: Any = None,
    progress: Callable[[int, State], Any] | None = None,
    stop_strings: Any = None,
    tokenizer: Any = None,
    streamer: Any = None,
    **model_kwargs: Any,
) -> Any:
    """The decoding loop of ``model.generate(..., custom_generate=flashbeam.hf.generate)``.

    ``generate`` prepares everything and calls this; its generation config, logits processors and stopping criteria are
    heeded as its own beam search heeds them, and what it returns is returned, sequences and scores the same. The prompt
    is run once for each request. docs/huggingface.md says where results differ.

    Args:
        model, input_ids, logits_processor, stopping_criteria, generation_config, model_kwargs: from ``generate``.
        search: a search to run in place of the config's. Of the config there remain then the processors and criteria,
            apart from lengths and EOS, and ``num_return_sequences``.
        selection, constraint, stopping, normalize: arguments of ``fb.BeamSearch``, instead of the config's.
        request_ids: int64 ``[B]``, name the requests for the randomness.
        progress: ``progress(steps, state)`` is called after each step; if it returns true, the best so far is returned.
        stop_strings: as ``generate`` takes them; with ``tokenizer``.
        tokenizer, streamer: ``generate`` keeps these to itself: give them by
            ``custom_generate=functools.partial(flashbeam.hf.generate, tokenizer=..., streamer=...)``. A streamer with
            a method ``best``, such as ``flashbeam.hf.BestStreamer``, is shown the best hypothesis after each step; any
            other is given tokens as soon as nothing can change them.

    Returns:
        LongTensor ``[B * num_return_sequences, L + T]``, or an output class of ``generate``.

    Raises:
        ValueError, TypeError: ``<argument>: expected X, got Y``.
    """
    config, own = generation_config, search is None
    check_calls(progress=progress)
    if not own and not isinstance(search, BeamSearch):
        raise TypeError(f"search: expected an fb.BeamSearch, got {type(search).__name__}")
    criteria = [*stopping_criteria, *stop_string_criteria(stop_strings, tokenizer)]
    limits = limits_of(list(logits_processor), criteria, input_ids.shape[1])
    options = {"selection": selection, "constraint": constraint, "stopping": stopping, "normalize": normalize}
    if search is None:
        pad_id = pad_of(config, model.config.get_text_config(decoder=True).vocab_size, limits.eos_ids)
        search = search_of(config, limits, pad_id, options)
    else:
        both = [name for name, value in options.items() if value is not None]
        if both:
            raise ValueError(f"{both[0]}: expected None beside search, which has its own, got {options[both[0]]!r}")
        limits = limits._replace(processors=list(logits_processor))
    call = Call(model, input_ids, model_kwargs, config, max(config.num_beams, config.num_return_sequences))
    found = decode(
        call,
        search,
        limits,
        num_hypotheses=config.num_return_sequences,
        request_ids=request_ids,
        source_lengths=None,
        progress=progress,
        streamer=streamer,
        own=own,
    )
    filler = filler_of(config, limits.eos_ids)
    return generated(model, config, found.hyps, found.prompts, found.recorder, found.model_kwargs, filler)
