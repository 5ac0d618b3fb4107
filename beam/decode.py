"""The decode loop as one call."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from .cache import reorder
from .hypotheses import Hypotheses
from .search import BeamSearch


def decode(
    search: BeamSearch,
    model: Callable[[Tensor, Any], tuple[Tensor, Any]],
    tokens: Tensor,
    cache: Any = None,
    *,
    num_hypotheses: int | None = None,
    request_ids: Tensor | None = None,
    source_lengths: Tensor | Sequence[int] | None = None,
) -> Hypotheses:
    """Run ``search`` to its end.

    Equivalent to::

        state = search.init(batch_size, tokens.device, request_ids, source_lengths)
        while not state.all_done():
            logits, cache = model(tokens, cache)
            step = search.step(state, logits)
            tokens, cache = step.tokens.flatten(), fb.reorder(cache, step.source_rows)
        return search.finalize(state, num_hypotheses)

    Args:
        search: the settings.
        model: ``model(tokens, cache) -> (logits, cache)``; logits ``[B, V]`` on the first call, for ``tokens`` as
            given here, then ``[B * K, V]`` for int64 tokens ``[B * K]``. The cache it returns is reordered before
            the next call.
        tokens: ``[B, ...]``, what the model is run on first.
        cache: any nest of tensors with rows first.
        num_hypotheses: N; default ``beam_size``.
        request_ids: int64 ``[B]``, name the requests for the randomness.
        source_lengths: ``[B]``, what length limits are functions of, where they are.

    Returns:
        :class:`Hypotheses`.
    """
    if not isinstance(tokens, Tensor) or tokens.dim() == 0:
        raise TypeError(f"tokens: expected a tensor with requests first, got {type(tokens).__name__}")
    state = search.init(tokens.shape[0], tokens.device, request_ids, source_lengths)
    while True:
        logits, cache = model(tokens, cache)
        step = search.step(state, logits)
        if state.all_done():
            return search.finalize(state, num_hypotheses)
        tokens, cache = step.tokens.flatten(), reorder(cache, step.source_rows)
