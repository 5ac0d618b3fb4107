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
from itertools import groupby
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flashbeam.kernels import topk_log_probs

from .arguments import finite_number, positive_number, token_ids, whole_number
from .cache import _leaves, _rebuilt, reorder

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]
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


class _Caches:
    """The caches of the rows of one call, for as long as nodes wait for them."""

    def __init__(self, nest: Any, size: int):
        self.nest, self.size = nest, size
        self.waiting: list[_Nodes] = []

    def take(self, rows: Ints, device: torch.device) -> Any:
        return reorder(self.nest, torch.from_numpy(rows).to(device))

    def compact(self, device: torch.device) -> None:
        """Forget the rows that no node waits for, once they are half of the rows or more."""
        self.waiting = [nodes for nodes in self.waiting if len(nodes.tokens)]
        if not self.waiting:
            self.nest = None
            return
        rows = np.unique(np.concatenate([nodes.rows[nodes.parents] for nodes in self.waiting]))
        if 2 * len(rows) <= self.size:
            self.nest, self.size = self.take(rows, device), len(rows)
            for nodes in self.waiting:
                nodes.rows = np.searchsorted(rows, nodes.rows)  # anything where the row is forgotten


@dataclass
class _Turn:
    """Nodes of a request at one depth d whose rows are read, r of them."""

    request: _Request
    prefixes: Ints  # [r, d]
    prefix_log_probs: Floats  # [r, d], of each token
    log_probs: Floats  # [r], cumulative
    caches: _Caches | None  # of the parents; None for the root, which has none
    rows: Ints  # [r] in the caches


@dataclass
class _Nodes:
    """The children of a turn's r rows that wait for theirs to be read, n of them, best first."""

    turn: _Turn
    caches: _Caches  # that the call of the turn returned
    rows: Ints  # [r] in the caches
    parents: Ints  # [n] in 0 .. r - 1
    tokens: Ints  # [n]
    token_log_probs: Floats  # [n]
    log_probs: Floats  # [n], cumulative

    @property
    def depth(self) -> int:
        return int(self.turn.prefixes.shape[1]) + 1

    def keep(self, which: Any) -> None:
        for name in ("parents", "tokens", "token_log_probs", "log_probs"):
            setattr(self, name, getattr(self, name)[which])

    def path(self, i: Any) -> tuple[int, ...]:
        return (*self.turn.prefixes[self.parents[i]].tolist(), int(self.tokens[i]))


class _Request:
    """What one request has found, and what it has yet to look at."""

    def __init__(self) -> None:
        self.log_prob = np.float32(-np.inf)
        self.tokens: tuple[int, ...] = ()
        self.token_log_probs: Floats = np.empty(0, np.float32)
        self.exact = True
        self.nodes = 0
        self.greedy = True  # on the way to the hypothesis of greedy search
        self.pending: list[_Nodes] = []  # deeper and deeper

    def root(self) -> _Turn:
        nothing = np.empty((1, 0))
        zero = np.zeros(1, np.int64)
        return _Turn(self, nothing.astype(np.int64), nothing.astype(np.float32), zero.astype(np.float32), None, zero)

    def due(self, batch_rows: int, node_budget: int) -> int:
        """Rows of the next turn."""
        one = self.greedy or not self.tokens
        return min(1 if one else batch_rows, len(self.pending[-1].tokens), node_budget - self.nodes)

    def take(self, count: int) -> _Turn:
        nodes = self.pending[-1]
        parents = nodes.parents[:count]
        turn = _Turn(
            self,
            np.column_stack([nodes.turn.prefixes[parents], nodes.tokens[:count]]),
            np.column_stack([nodes.turn.prefix_log_probs[parents], nodes.token_log_probs[:count]]),
            nodes.log_probs[:count],
            nodes.caches,
            nodes.rows[parents],
        )
        nodes.keep(slice(count, None))
        return turn

    def receive(self, new: _Nodes, eos_ids: list[int], max_length: int, node_budget: int) -> None:
        """Enter the children of a turn's rows: those of a row best first, the rows one after the other."""
        self.nodes += len(new.rows)
        ends = np.isin(new.tokens, eos_ids) | (new.depth == max_length)
        best = new.log_probs[ends].max(initial=-np.inf)
        for i in np.flatnonzero(ends & (new.log_probs == best)):
            path = new.path(i)
            if not self.tokens or (-best, len(path), path) < (-self.log_prob, len(self.tokens), self.tokens):
                self.log_prob, self.tokens = best, path
                steps = new.turn.prefix_log_probs[new.parents[i]]
                self.token_log_probs = np.append(steps, new.token_log_probs[i])
        new.keep(~ends)
        new.keep(np.argsort(-new.log_probs, kind="stable"))
        self.pending.append(new)
        for nodes in self.pending:
            nodes.keep(self._may_win(nodes))
        self.greedy = self.greedy and len(new.tokens) > 0 and not ends[0]
        self.pending = [nodes for nodes in self.pending if len(nodes.tokens)]
        if self.pending and self.nodes == node_budget:
            self.exact = False
            for nodes in self.pending:
                nodes.keep(slice(0))
            self.pending = []

    def _may_win(self, nodes: _Nodes) -> NDArray[np.bool_]:
        """Which nodes can lead to a better hypothesis, given that no increment is above 0."""
        if not self.tokens:
            return np.ones(len(nodes.tokens), bool)
        may_win: NDArray[np.bool_] = nodes.log_probs > self.log_prob
        for i in np.flatnonzero(nodes.log_probs == self.log_prob):
            may_win[i] = (nodes.depth + 1, nodes.path(i)) < (len(self.tokens), self.tokens)
        return may_win


def _concatenated(nests: list[Any]) -> Any:
    """The rows of nests of one structure in one; plain values are those of the first."""
    done: dict[tuple[int, ...], Tensor] = {}  # a tensor that appears twice stays one
    results: list[Any] = []
    for leaves in zip(*([leaf for _, leaf in _leaves(nest, "cache")] for nest in nests), strict=True):
        result = leaves[0]
        if isinstance(result, Tensor):
            key = tuple(map(id, leaves))
            if key not in done:
                done[key] = torch.cat(leaves)
            result = done[key]
        results.append(result)
    return _rebuilt(nests[0], iter(results))


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


def _next_turns(requests: list[_Request], batch_rows: int, node_budget: int) -> list[_Turn]:
    """Turns at the depth that fills a call best, the deepest such, with those on the same caches side by side."""
    takers: dict[int, list[tuple[_Request, int]]] = {}
    room: dict[int, int] = {}
    for request in requests:
        if request.pending:
            depth, due = request.pending[-1].depth, request.due(batch_rows, node_budget)
            if due <= room.setdefault(depth, batch_rows):
                room[depth] -= due
                takers.setdefault(depth, []).append((request, due))
    if not takers:
        return []
    depth = min(takers, key=lambda depth: (room[depth], -depth))
    by_caches: dict[_Caches | None, list[_Turn]] = {}
    for request, due in takers[depth]:
        turn = request.take(due)
        by_caches.setdefault(turn.caches, []).append(turn)
    return [turn for turns in by_caches.values() for turn in turns]


def _gathered(turns: list[_Turn], device: torch.device) -> Any:
    """The caches of the rows of ``turns``."""
    nests = []
    for caches, group in groupby(turns, lambda turn: turn.caches):
        assert caches is not None
        nests.append(caches.take(np.concatenate([turn.rows for turn in group]), device))
    return nests[0] if len(nests) == 1 else _concatenated(nests)


def _results(
    requests: list[_Request], max_length: int, eos_ids: list[int], pad_id: int, device: torch.device
) -> PExact:
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
    requests = [_Request() for _ in range(tokens.shape[0])]
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
        caches = _Caches(cache, len(log_probs))
        touched = {caches, *(nodes.caches for turn in turns for nodes in turn.request.pending)}
        for turn, start, stop in zip(turns, first_rows, first_rows[1:], strict=False):
            parents = np.repeat(np.arange(stop - start), [len(found) for found, _ in nuclei[start:stop]])
            children, steps = (np.concatenate(part) for part in zip(*nuclei[start:stop], strict=True))
            new = _Nodes(
                turn, caches, np.arange(start, stop), parents, children, steps, turn.log_probs[parents] + steps
            )
            caches.waiting.append(new)
            turn.request.receive(new, eos_ids, max_length, node_budget)
        turns = _next_turns(requests, batch_rows, node_budget)
        if turns:
            tokens = torch.from_numpy(np.concatenate([turn.prefixes[:, -1] for turn in turns])).to(device)
            cache = _gathered(turns, device)
            touched |= {turn.caches for turn in turns if turn.caches is not None}
        for held in touched:
            held.compact(device)
    return _results(requests, max_length, eos_ids, pad_id, device)
