"""The decode loop as one call."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from .cache import gather_rows, leaves_of, rebuild, reorder
from .capture import Captured
from .constraint import runs_on_host
from .hypotheses import Hypotheses
from .search import BeamSearch, Step
from .state import State

Model = Callable[[Tensor, Any], tuple[Tensor, Any] | tuple[Tensor, Any, Tensor]]


def decode(
    search: BeamSearch,
    model: Model,
    tokens: Tensor,
    cache: Any = None,
    *,
    num_hypotheses: int | None = None,
    request_ids: Tensor | None = None,
    source_lengths: Tensor | Sequence[int] | None = None,
    capture: bool = False,
) -> Hypotheses:
    """Run ``search`` to its end.

    Equivalent to::

        state = search.init(batch_size, tokens.device, request_ids, source_lengths)
        for _ in state.until_done():
            logits, cache = model(tokens, cache)
            step = search.step(state, logits)
            tokens, cache = step.tokens.flatten(), fb.reorder(cache, step.source_rows)
        return search.finalize(state, num_hypotheses)

    Args:
        search: the settings.
        model: ``model(tokens, cache) -> (logits, cache)``; logits ``[B, V]`` on the first call, for ``tokens`` as
            given here, then ``[B * K, V]`` for int64 tokens ``[B * K]``. The cache it returns is reordered before
            the next call. A third result is the ``attention`` of ``step``.
        tokens: ``[B, ...]``, what the model is run on first.
        cache: any nest of tensors with rows first.
        num_hypotheses: N; default ``beam_size``.
        request_ids: int64 ``[B]``, name the requests for the randomness.
        source_lengths: ``[B]``, what length limits are functions of, where they are.
        capture: replay the model and the step as one CUDA graph from the third call on. The second call is made with
            the ``tokens [B * K]`` and the reordered cache that all later ones read, so the cache that the model returns
            must have the same shapes and the same plain values at every call: what changes, such as a position, is a
            tensor. What it returns may be what it was given, changed in place, or other tensors, which are copied,
            ``tokens`` and parts of what it was given among them. Plain values and shapes of a constraint's state and of
            a term's statistics stay too. On a CPU nothing is captured, but the cache stays where it is as well.

    Returns:
        :class:`Hypotheses`.

    Raises:
        ValueError, TypeError: ``<argument>: expected X, got Y``.
    """
    if not isinstance(search, BeamSearch):
        raise TypeError(f"search: expected an fb.BeamSearch, got {type(search).__name__}")
    if not callable(model):
        raise TypeError(f"model: expected a function of tokens and a cache, got {type(model).__name__}")
    if not isinstance(capture, bool):
        raise TypeError(f"capture: expected a bool, got {type(capture).__name__}")
    if not isinstance(tokens, Tensor) or tokens.dim() == 0:
        raise TypeError(f"tokens: expected a tensor with requests first, got {type(tokens).__name__}")
    if capture and any(map(runs_on_host, search.constraint.values)):
        raise ValueError("capture: expected False with a constraint on the host, such as fb.Grammar, got True")
    state = search.init(tokens.shape[0], tokens.device, request_ids, source_lengths)
    if capture:
        _replay(search, state, model, tokens, cache)
        return search.finalize(state, num_hypotheses)
    step: Step | None = None
    for _ in state.until_done():
        if step is not None:
            tokens, cache = step.tokens.flatten(), reorder(cache, step.source_rows)
        logits, cache, *more = model(tokens, cache)
        step = search.step(state, logits, attention=more[0] if more else None)
    return search.finalize(state, num_hypotheses)


def _replay(search: BeamSearch, state: State, model: Model, tokens: Tensor, cache: Any) -> None:
    """The loop of :func:`decode`, captured."""
    again: Captured[None] | None = None
    for _ in state.until_done():
        if again is not None:
            again()
            continue
        logits, cache, *more = model(tokens, cache)
        step = search.step(state, logits, attention=more[0] if more else None)
        tokens, cache = step.tokens.flatten(), reorder(cache, step.source_rows)
        again = Captured(_in_place(search, state, model, tokens, cache), state.device, warmup=1)


def _in_place(search: BeamSearch, state: State, model: Model, tokens: Tensor, cache: Any) -> Callable[[], None]:
    """A round of the loop that finds and leaves its tokens and its cache in the same memory."""

    def go_on() -> None:
        logits, found, *more = model(tokens, cache)
        _check_static(cache, found)
        found = _apart(found, cache)
        step = search.step(state, logits, attention=more[0] if more else None)
        gather_rows(found, step.source_rows, 0, cache, state.beam_size, "cache")
        tokens.copy_(step.tokens.flatten())  # last: the cache may hold them

    return go_on


def _apart(found: Any, cache: Any) -> Any:
    """``found`` with copies of what it holds of the ``cache``'s memory, but where that is in its own place."""
    places = [leaf for _, leaf in leaves_of(cache, "cache")]
    memory = {leaf.untyped_storage().data_ptr() for leaf in places if isinstance(leaf, Tensor)}

    def apart(leaf: Any, place: Any) -> Any:
        if leaf is place or not isinstance(leaf, Tensor) or leaf.untyped_storage().data_ptr() not in memory:
            return leaf
        return place if isinstance(place, Tensor) and _same_memory(leaf, place) else leaf.clone()

    leaves = [leaf for _, leaf in leaves_of(found, "cache")]
    return rebuild(found, iter([apart(*pair) for pair in zip(leaves, places, strict=True)]))


def _same_memory(one: Tensor, other: Tensor) -> bool:
    layouts = ((x.data_ptr(), x.shape, x.stride(), x.dtype) for x in (one, other))
    return next(layouts) == next(layouts)


def _check_static(before: Any, after: Any) -> None:
    """A model's cache has the entries, shapes and plain values it was given."""
    given, found = ({path: _fixed(leaf) for path, leaf in leaves_of(nest, "cache")} for nest in (before, after))
    if given.keys() != found.keys():
        raise ValueError(f"cache: expected it to keep {list(given)}, for capture=True, got {list(found)}")
    for path in given:
        if given[path] != found[path]:
            raise ValueError(f"{path}: expected it to stay {given[path]}, for capture=True, got {found[path]}")


def _fixed(leaf: Any) -> Any:
    return list(leaf.shape) if isinstance(leaf, Tensor) else leaf
