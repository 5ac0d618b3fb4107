"""Automata for tests of lists: random ones as tensors, and what they say in plain Python."""

from __future__ import annotations

import random

import torch

from flashbeam.kernels import Edges, place


def random_edges(
    states: int, vocab_size: int, most: int, *, tree: bool = False, lengths: int = 2, ends: tuple[int, ...] = ()
) -> Edges:
    """A random automaton of ``states`` states with up to ``most`` edges each; the first has as many as there can be."""
    free = [token for token in range(vocab_size) if token not in ends]
    tokens: list[int] = []
    indptr = [0]
    for state in range(states):
        count = min(len(free), most if state == 0 else random.randrange(most + 1))
        if tree:  # a state for every edge, and no more
            count = min(count, states - 1 - len(tokens))
        chosen = torch.tensor(random.sample(free, count), dtype=torch.int64)
        tokens += chosen[place(chosen).argsort()].tolist()
        indptr.append(len(tokens))
    targets = None if tree else torch.randint(states, (len(tokens),), dtype=torch.int32)
    if tree:
        states = max(states, len(tokens) + 1)
        indptr += [len(tokens)] * (states + 1 - len(indptr))
    reach = torch.randint(-(2**31), 2**31, (states, lengths)).int() & torch.randint(-(2**31), 2**31, (states, 1)).int()
    return Edges(torch.tensor(indptr).int(), torch.tensor(tokens).int(), targets, reach)


def edges_of(edges: Edges, state: int) -> dict[int, int]:
    """Token -> target of a state's edges."""
    if state < 0:
        return {}
    numbers = range(int(edges.indptr[state]), int(edges.indptr[state + 1]))
    return {int(edges.tokens[e]): e + 1 if edges.targets is None else int(edges.targets[e]) for e in numbers}


def allowed_tokens(edges: Edges, state: int, window: torch.Tensor | None) -> list[int]:
    """The tokens of the edges that ``window [L]`` leaves."""
    return [
        token
        for token, target in edges_of(edges, state).items()
        if window is None or any(a & b for a, b in zip(edges.reach[target].tolist(), window.tolist(), strict=True))
    ]
