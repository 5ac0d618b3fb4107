"""What ``generate`` was asked for, as a search: lengths, EOS and the masks it has itself; the rest stays theirs."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from ..search import BeamSearch
from ..stopping import BestLive, Exact, Filled, FirstFinished, Stopping

_LENGTHS = ("MinLengthLogitsProcessor", "MinNewTokensLengthLogitsProcessor")
_STOPPING: dict[Any, type[Stopping]] = {False: BestLive, True: Filled, "never": Exact}


class Limits(NamedTuple):
    """Lengths and ends, from processors and criteria that a search has no need to run."""

    max_length: int  # generated tokens
    min_length: int
    eos_ids: list[int]
    normalize: str
    processors: list[Any]  # those left
    known: list[Any]  # those that are not
    criteria: list[Any]  # those left
    deadline: float | None  # by time.time()


def limits_of(processors: list[Any], criteria: list[Any], prompt_length: int) -> Limits:
    """Take out of ``processors`` and ``criteria`` what a search does itself, with the same results."""
    max_lengths, eos_ids, deadlines, left = [], [], [], []
    for criterion in criteria:
        name = type(criterion).__name__
        if name == "MaxLengthCriteria":
            max_lengths.append(criterion.max_length - prompt_length)
        elif name == "EosTokenCriteria":
            eos_ids += criterion.eos_token_id.tolist()
        elif name == "MaxTimeCriteria":
            deadlines.append(criterion.initial_timestamp + criterion.max_time)
        else:
            left.append(criterion)
    if not max_lengths:
        raise ValueError("max_length: expected a limit in generation_config or stopping_criteria, got none")
    max_length, eos_ids = min(max_lengths), list(dict.fromkeys(eos_ids))
    lows = [_min_length(each, eos_ids, prompt_length) for each in processors]
    normalizes = [type(each).__name__ == "LogitNormalization" for each in processors]
    known = all(low is not None or last for low, last in zip(lows, normalizes, strict=True))
    low = max((low for low in lows if low is not None), default=0)
    if not known or low > max_length:  # a mask among others is applied in its turn
        return Limits(max_length, 0, eos_ids, "vocab", processors, [], left, min(deadlines, default=None))
    normalize = "allowed" if any(normalizes) else "vocab"
    return Limits(max_length, low, eos_ids, normalize, [], processors, left, min(deadlines, default=None))


def _min_length(processor: Any, eos_ids: list[int], prompt_length: int) -> int | None:
    """Fewest tokens, EOS included, if all that ``processor`` does is to bar EOS before them."""
    name = type(processor).__name__
    if name not in _LENGTHS or sorted(processor.eos_token_id.tolist()) != sorted(eos_ids):
        return None
    if name == "MinLengthLogitsProcessor":
        return max(0, int(processor.min_length) - prompt_length + 1)
    return int(processor.min_new_tokens) + 1 - prompt_length + int(processor.prompt_length_to_skip)


def search_of(config: Any, limits: Limits, pad_id: int, options: dict[str, Any]) -> BeamSearch:
    """The search that a generation config asks for; ``options`` of a ``BeamSearch`` that are not ``None`` go before."""
    given = {name: value for name, value in options.items() if value is not None}
    samples = getattr(given.get("selection"), "seed", None) is not None
    ranks: dict[str, Any] = {}
    if not samples:
        ranks = {"length_penalty": float(config.length_penalty), "stopping": _stopping(config)}
    ranks |= {"normalize": limits.normalize, "min_length": limits.min_length, "pad_id": pad_id}
    return BeamSearch(config.num_beams, limits.max_length, limits.eos_ids or None, **(ranks | given))


def _stopping(config: Any) -> Stopping:
    if config.num_beams == 1:  # greedy decoding ends with its first EOS
        return FirstFinished()
    return _STOPPING[config.early_stopping]()


def pad_of(config: Any, vocab_size: int, eos_ids: list[int]) -> int:
    """A token for places without any, inside the vocabulary."""
    pad = _number(config._pad_token_tensor)
    choices = [*([] if pad is None else [pad]), *eos_ids]
    return next((token for token in choices if 0 <= token < vocab_size), 0)


def filler_of(config: Any, eos_ids: list[int]) -> int:
    """What transformers fills sequences up with: with beams EOS, where padding is token 0 or missing."""
    pad = _number(config._pad_token_tensor)
    if config.num_beams == 1:
        return -1 if pad is None else pad
    return (pad or eos_ids[0]) if eos_ids else -1


def _number(token: Tensor | None) -> int | None:
    return None if token is None else int(token.flatten()[0])


def stop_string_criteria(stop_strings: Any, tokenizer: Any) -> list[Any]:
    """The criterion for ``stop_strings``, if there are any."""
    from transformers import StopStringCriteria

    if stop_strings is None:
        return []
    if tokenizer is None:
        raise ValueError(
            "tokenizer: expected one for stop_strings, got None; generate keeps its own to itself: pass "
            "custom_generate=functools.partial(flashbeam.hf.generate, tokenizer=tokenizer)"
        )
    return [StopStringCriteria(tokenizer, stop_strings)]
