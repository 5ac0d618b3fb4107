"""p-exact search: the most probable hypothesis of the tree whose distributions are cut down to their nuclei.

A search whose size depends on what it finds: it runs on the host and batches what it asks of the model. Each request
takes turns in its own tree, whatever the others do:

    1. take its deepest pending nodes, the most probable ones: one while on the way to its first hypothesis, which is
       greedy search's or better, then up to ``batch_rows``
    2. read their rows of logits: children that end are hypotheses, of which the best is kept; the others are pending
    3. drop every pending node that can no longer win

Turns of different requests at one depth share a call of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flashbeam.kernels import topk_log_probs

from .arguments import finite_number, positive_number, token_ids, whole_number
from .pruned_tree import Caches, Floats, Ints, Nodes, Request, gathered, next_turns

_FIRST_LOOK = 64  # tokens per row; only rows whose nucleus is larger, and matters, are looked at again


@dataclass(frozen=True)
class PExact:
    """What :func:`p_exact` returns. Where ``valid`` is not set the rest is filler."""

    tokens: Tensor  # int64 [B, T], EOS kept, then pad_id; T = max_length
    lengths: Tensor  # int64 [B], tokens, EOS included; 0 where not valid
    log_probs: Tensor  # float32 [B], natural log; -inf where not valid
    token_log_probs: Tensor  # float32 [B, T], 0 behind the end
    finished: Tensor  # bool [B], ended with EOS
    valid: Tensor  # bool [B], something complete was found
    exact: Tensor  # bool [B], the whole pruned tree was searched: there is nothing better
    nodes: Tensor  # int64 [B], rows of logits read, the first included


def _nuclei(
    logits: Tensor, p: float, temperature: float, vocab_size: int, log_probs: Floats, best: Floats, k: int
) -> list[tuple[Ints, Floats]]:
    """Tokens and log-probabilities of each row's nucleus, best first.

    ``k`` tokens of a row are looked at, then all, if the nucleus goes on and the next of it, after the row's cumulative
    ``log_probs [R]``, may still reach the request's ``best [R]``.
    """
    k = min(k, vocab_size)
    found = topk_log_probs(logits, k, temperature=temperature, vocab_size=vocab_size)
    tokens, steps = found.tokens.cpu().numpy(), found.log_probs.cpu().numpy()
    # sums one after the other, on the host: a row's nucleus depends on nothing but the row
    mass = np.exp(steps, dtype=np.float64).cumsum(1)
    threshold = np.inf if p == 1 else p  # where everything is in the nucleus, rounding must not end it
    before = np.pad(mass[:, :-1], ((0, 0), (1, 0)))
    sizes = ((before < threshold) & (steps > -np.inf)).sum(1)
    nuclei = [(tokens[i, :size], steps[i, :size]) for i, size in enumerate(sizes)]
    more = np.flatnonzero((sizes == k) & (mass[:, -1] < threshold) & (log_probs + steps[:, -1] >= best))
    if k < vocab_size and len(more):
        rows = logits[torch.from_numpy(more).to(logits.device)]
        wider = _nuclei(rows, p, temperature, vocab_size, log_probs[more], best[more], vocab_size)
        for i, nucleus in zip(more, wider, strict=True):
            nuclei[i] = nucleus
    return nuclei


def _results(requests: list[Request], max_length: int, eos_ids: list[int], pad_id: int, device: torch.device) -> PExact:
    shape = len(requests), max_length
    tokens, token_log_probs = np.full(shape, pad_id), np.zeros(shape, np.float32)
    for i, request in enumerate(requests):
        tokens[i, : len(request.tokens)] = request.tokens
        token_log_probs[i, : len(request.tokens)] = request.token_log_probs

    def per_request(values: list[Any], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    return PExact(
        tokens=torch.from_numpy(tokens).to(device),
        lengths=per_request([len(request.tokens) for request in requests], torch.int64),
        log_probs=per_request([float(request.log_prob) for request in requests], torch.float32),
        token_log_probs=torch.from_numpy(token_log_probs).to(device),
        finished=per_request([bool({*request.tokens[-1:]} & {*eos_ids}) for request in requests], torch.bool),
        valid=per_request([bool(request.tokens) for request in requests], torch.bool),
        exact=per_request([request.exact for request in requests], torch.bool),
        nodes=per_request([request.nodes for request in requests], torch.int64),
    )


def p_exact(
    model: Callable[[Tensor, Any], tuple[Tensor, Any]],
    tokens: Tensor,
    cache: Any = None,
    *,
    p: float,
    max_length: int,
    eos_id: int | Sequence[int] | None,
    pad_id: int = 0,
    node_budget: int = 10_000,
    batch_rows: int = 64,
    temperature: float = 1.0,
    vocab_size: int | None = None,
) -> PExact:
    """Find the most probable hypothesis of each request among those made of nucleus tokens only.

    The nucleus of a prefix is the smallest set of next tokens, the most probable first and the lower of equals first,
    whose mass is at least ``p``; the token that crosses ``p`` is in it. Other tokens have probability 0, and those
    inside keep theirs: nothing is renormalised. Hypotheses end with EOS, or at ``max_length`` without one, in the order

        (log-probability descending, length ascending, tokens lexicographically ascending)

    ``p = 1`` is exact maximum a posteriori search; a ``p`` not above any row's highest probability is greedy search. A
    token's log-probability is ``min(logit / temperature - lse, 0)``, in float32 and summed in float32: that of a prefix
    bounds what it can lead to, so pruning loses nothing. Masses are float64 sums of their exponentials, so
    that rounding decides where a mass is within some 1e-7 of ``p`` < 1.

    This is a search on the host: it synchronises after every call of the model.

    Args:
        model: ``model(tokens, cache) -> (logits, cache)`` as for :func:`flashbeam.decode`: logits ``[B, V]`` on the
            first call, for ``tokens`` as given here, then ``[R, V]`` for int64 tokens ``[R]`` at one depth, with R
            between 1 and ``batch_rows``, other in each call, as is the depth. It may write into the caches it is given,
            which are copies after the first call, but not into any that it returned earlier.
        tokens: ``[B, ...]``, what the model is run on first. Not modified.
        cache: any nest of tensors with rows first, see :func:`flashbeam.reorder`.
        p: in (0, 1].
        max_length: most tokens a hypothesis may have, EOS included; at least 1.
        eos_id: the token that ends a hypothesis, a list of such tokens, or ``None`` if none does.
        pad_id: fills what is behind the end; inside the vocabulary.
        node_budget: most rows of logits read for a request, the first included; at least 1. A request that would need
            more stops with ``exact`` False and the best found so far, which after ``max_length`` rows is at least as
            good as greedy search's, if the rows met have any finite logits.
        batch_rows: most rows of a call after the first, and of a turn of one request; at least 1.
        temperature: divides the logits, above 0.
        vocab_size: columns of the logits from here on are padding; ``None``: there are none.

    Returns:
        :class:`PExact`, on the tokens' device; a request's part of it is bitwise the same in any batch. It depends on
        ``batch_rows`` only where ``exact`` is not set, apart from ``nodes``.

    NaN logits count as ``-inf`` and a row with a +inf logit has no continuations. ``valid`` is not set where nothing
    complete was found; if ``exact`` is set there, nothing exists.

    Memory: of each call's caches the rows whose children wait are kept, once per parent, and fewer than as many others.
    All that waits in a request at one depth comes from one turn, so that is fewer than ``2 * batch_rows`` rows per
    request and depth. Children wait on the host, 24 bytes each, unless they are already worse than the best.

    Raises:
        ValueError, TypeError: ``<argument>: expected X, got Y``; arguments are checked before the model is called,
            against its logits after the first call.

    Sources: Shaham, Levy 2022, "What Do You Get When You Cross Beam Search with Nucleus Sampling?" (p-exact search);
    Stahlberg, Byrne 2019, "On NMT Search Errors and Model Errors: Cat Got Your Tongue?" (depth first with a bound).
    """
    if not isinstance(tokens, Tensor) or tokens.dim() == 0:
        raise TypeError(f"tokens: expected a tensor with requests first, got {type(tokens).__name__}")
    p = finite_number("p", p)
    if not 0 < p <= 1:
        raise ValueError(f"p: expected a number in (0, 1], got {p}")
    for name, value in (("max_length", max_length), ("node_budget", node_budget), ("batch_rows", batch_rows)):
        whole_number(1)(name, value)
    eos_ids = token_ids("eos_id", eos_id)
    whole_number(0)("pad_id", pad_id)
    temperature = positive_number("temperature", temperature)
    if vocab_size is not None:
        whole_number(1)("vocab_size", vocab_size)

    device = tokens.device
    requests = [Request() for _ in range(tokens.shape[0])]
    turns = [request.root() for request in requests]
    columns = 0
    while turns:
        logits, cache = model(tokens, cache)
        first_rows = np.cumsum([0, *(len(turn.rows) for turn in turns)])
        if not isinstance(logits, Tensor):
            raise TypeError(f"logits: expected a tensor, got {type(logits).__name__}")
        if logits.dim() != 2 or tuple(logits.shape) != (first_rows[-1], columns or max(1, logits.shape[1])):
            raise ValueError(f"logits: expected shape [{first_rows[-1]}, {columns or 'V'}], got {list(logits.shape)}")
        if not columns:
            columns = logits.shape[1]
            vocab_size = columns if vocab_size is None else vocab_size
            for name, token in [("pad_id", pad_id), *(("eos_id", token) for token in eos_ids)]:
                if token >= vocab_size:
                    raise ValueError(f"{name}: expected an id inside the vocabulary of {vocab_size}, got {token}")
        assert vocab_size is not None
        log_probs = np.concatenate([turn.log_probs for turn in turns])
        best = np.repeat([turn.request.log_prob for turn in turns], np.diff(first_rows))
        nuclei = _nuclei(logits.detach(), p, temperature, vocab_size, log_probs, best, _FIRST_LOOK)
        caches = Caches(cache, len(log_probs))
        touched = {caches, *(nodes.caches for turn in turns for nodes in turn.request.pending)}
        for turn, start, stop in zip(turns, first_rows, first_rows[1:], strict=False):
            parents = np.repeat(np.arange(stop - start), [len(found) for found, _ in nuclei[start:stop]])
            children, steps = (np.concatenate(part) for part in zip(*nuclei[start:stop], strict=True))
            new = Nodes(turn, caches, np.arange(start, stop), parents, children, steps, turn.log_probs[parents] + steps)
            caches.waiting.append(new)
            turn.request.receive(new, eos_ids, max_length, node_budget)
        turns = next_turns(requests, batch_rows, node_budget)
        if turns:
            tokens = torch.from_numpy(np.concatenate([turn.prefixes[:, -1] for turn in turns])).to(device)
            cache = gathered(turns, device)
            touched |= {turn.caches for turn in turns if turn.caches is not None}
        for held in touched:
            held.compact(device)
    return _results(requests, max_length, eos_ids, pad_id, device)
