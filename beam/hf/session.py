"""One call of ``generate`` as a session: its prepared inputs, a search to run on them, and what came out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from ..hypotheses import Hypotheses
from ..search import BeamSearch
from ..state import State
from .caches import cache_name, make_room, rows_held
from .decoder import Decoder
from .loop import Hooks, Loop
from .outputs import Recorder
from .processors import Processors
from .rows import unrepeated
from .settings import Limits
from .streaming import Stream


class Call(NamedTuple):
    """What ``generate`` has prepared."""

    model: Any
    input_ids: Tensor  # int64 [B * repeats, L]
    model_kwargs: dict[str, Any]
    config: Any
    repeats: int  # rows of a request


class Found(NamedTuple):
    """What came out."""

    hyps: Hypotheses
    prompts: Tensor  # int64 [B, L]
    recorder: Recorder
    model_kwargs: dict[str, Any]


def check_calls(**functions: Any) -> None:
    """What is to be called, or ``None``.

    Raises:
        TypeError: it cannot be.
    """
    for name, function in functions.items():
        if function is not None and not callable(function):
            raise TypeError(f"{name}: expected a function or None, got {type(function).__name__}")


def decode(
    call: Call,
    search: BeamSearch,
    limits: Limits,
    *,
    num_hypotheses: int | None,
    request_ids: Any,
    source_lengths: Any,
    progress: Callable[[int, State], Any] | None,
    streamer: Any,
    own: bool = False,
) -> Found:
    """Run the search on what ``generate`` has prepared; ``own``: the search is the one that its config asks for."""
    from transformers import StoppingCriteriaList

    model, input_ids, kwargs, config, repeats = call
    if config.do_sample and search.selection.seed is None:
        raise ValueError(
            "do_sample: expected False, or a selection that samples, such as fb.Stochastic(seed) or "
            "fb.Sample(seed), got True"
        )
    if getattr(config, "low_memory", None):
        raise ValueError("low_memory: expected None or False, as in beam searches of transformers, got True")
    beams, batch = max(search.beam_size.values), input_ids.shape[0] // repeats
    encoder_decoder = bool(model.config.is_encoder_decoder)
    recorder = Recorder(config, batch * beams, beams, encoder_decoder)
    prompts = input_ids[::repeats]
    hooks = Hooks(
        Processors(limits.processors, batch, repeats, beams),
        StoppingCriteriaList(limits.criteria) if limits.criteria else None,
        limits.deadline,
        recorder,
        None if streamer is None else Stream(streamer, prompts),
        progress,
        Processors(limits.known, batch, repeats, beams),
        own,
        own and config.num_beams == 1,
    )
    encoder = kwargs.get("encoder_outputs")
    if encoder is not None:
        kwargs["encoder_outputs"] = type(encoder)(**encoder)  # the user's own, perhaps
    name = cache_name(kwargs)
    held = None if name is None else rows_held(kwargs[name])
    repeated = repeats > 1 and (
        held == input_ids.shape[0] or not unrepeated(model, input_ids, kwargs, repeats)  # its own rows for the beams
    )
    if repeated and repeats != beams:
        raise ValueError(
            f"num_beams: expected the beam_size of the search, {beams}, for {type(model).__name__}, whose prompts "
            f"cannot be told from their copies, got {repeats}"
        )
    if source_lengths is None and any(callable(limit) for limit in search.max_length.values + search.min_length.values):
        mask = kwargs.get("attention_mask")
        rows = [prompts.shape[1]] * batch if mask is None else mask[:: mask.shape[0] // batch].sum(1).tolist()
        source_lengths = rows
    counts = source_lengths or [0]
    longest = max(limit(n) if callable(limit) else limit for limit in search.max_length.values for n in counts)
    if longest > limits.max_length:
        raise ValueError(
            f"search: expected a max_length of at most the new tokens of generate, {limits.max_length}, got "
            f"{longest}; pass max_new_tokens={longest}"
        )
    if name is not None and held is None:
        make_room(kwargs[name], input_ids.shape[0] if repeated else batch)
    decoder = Decoder(model, input_ids if repeated else prompts, kwargs, config, beams, repeated)
    loop = Loop(decoder, search, prompts, hooks)
    state = loop.run(request_ids, source_lengths)
    hyps = search.finalize(state, num_hypotheses)
    if hooks.stream is not None:
        hooks.stream.end(hyps)
    return Found(hyps, prompts, recorder, decoder.model_kwargs)
