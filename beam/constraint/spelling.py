"""From an automaton over characters to one over tokens, each a string of a vocabulary."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from flashbeam.kernels import Edges, follow

from .reach import Bools, edges_of, leads_to
from .regex import Dfa, compile_pattern
from .trie import grow

_AT_ONCE = 1 << 22  # pairs of a state and a node of the vocabulary's tree that are looked at together


def _are_bytes(vocabulary: Any) -> bool:
    """Whether the strings are ``bytes``."""
    if not isinstance(vocabulary, Sequence) or isinstance(vocabulary, (str, bytes)):
        raise TypeError(f"vocabulary: expected a list of strings, got {type(vocabulary).__name__}")
    kinds = {type(string) for string in vocabulary} - {type(None)}
    if len(kinds) > 1 or not kinds <= {str, bytes}:
        names = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise TypeError(f"vocabulary: expected strings, all str or all bytes, or None, got {names}")
    if not kinds:
        raise ValueError("vocabulary: expected at least one string, got none")
    return kinds == {bytes}


class _Spelled:
    """The tree of the vocabulary's strings over kinds of characters, and the tokens that end in each node."""

    def __init__(self, dfa: Dfa, vocabulary: Sequence[str | bytes | None]):
        ids = np.array([token for token, string in enumerate(vocabulary) if string], np.int64)
        strings = [string for string in vocabulary if string]
        lengths = np.fromiter(map(len, strings), np.int64, len(strings))
        begins = np.cumsum(lengths) - lengths
        kinds = dfa.kinds[np.searchsorted(dfa.bounds, _symbols(strings), side="right") - 1]
        tree = grow(kinds, begins, lengths)
        self.indptr, self.kinds, self.nodes = tree.indptr, tree.tokens, len(tree.accepting)
        indptr, labels = torch.from_numpy(tree.indptr), torch.from_numpy(tree.tokens)
        edges = Edges(indptr, labels, None, torch.zeros(self.nodes, 1, dtype=torch.int32))
        node = torch.zeros(len(ids), dtype=torch.int32)
        for n in range(int(lengths.max(initial=0))):
            within = np.flatnonzero(lengths > n)
            node[within] = follow(edges, node[within], torch.from_numpy(kinds[begins[within] + n]))
        ends = node.numpy()
        self.tokens = ids[np.argsort(ends, kind="stable")]
        self.ends = np.concatenate(([0], np.cumsum(np.bincount(ends, minlength=self.nodes))))  # CSR, tokens of a node

    def from_states(self, dfa: Dfa, states: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """The edges ``(state, token, target)`` of ``states``, int64 ``[3, n]`` each."""
        found = []
        node, origin, state = np.zeros(len(states), np.int64), states, states
        while len(node):
            edges, parent = edges_of(self.indptr, node), np.repeat(np.arange(len(node)), np.diff(self.indptr)[node])
            state = dfa.table[state[parent], self.kinds[edges]].astype(np.int64)
            alive = state >= 0
            node, origin, state = edges[alive] + 1, origin[parent[alive]], state[alive]
            which = np.repeat(np.arange(len(node)), np.diff(self.ends)[node])
            found.append(np.stack([origin[which], self.tokens[edges_of(self.ends, node)], state[which]]))
        return found


def _symbols(strings: list[Any]) -> NDArray[Any]:
    if strings and isinstance(strings[0], str):
        return np.frombuffer("".join(strings).encode("utf-32-le", "surrogatepass"), np.uint32)
    return np.frombuffer(b"".join(strings), np.uint8)


def spell(pattern: Any, vocabulary: Any) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any], Bools]:
    """The arguments of an automaton over tokens that starts in state 0; see ``Automaton.from_regex``."""
    of_bytes, source = _are_bytes(vocabulary), pattern.pattern if isinstance(pattern, re.Pattern) else pattern
    if not isinstance(source, (str, bytes)):
        raise TypeError(f"pattern: expected str, bytes or a compiled pattern, got {type(pattern).__name__}")
    if isinstance(source, bytes) and not of_bytes:
        raise TypeError("pattern: expected str, as the vocabulary is, got bytes")
    dfa = compile_pattern(pattern, of_bytes)
    spelled = _Spelled(dfa, vocabulary)
    at_once = max(1, _AT_ONCE // spelled.nodes)
    seen = np.zeros(len(dfa.accepting), np.bool_)
    seen[0] = True
    todo, found = np.array([0]), [np.zeros((3, 0), np.int64)]
    while len(todo):
        new = spelled.from_states(dfa, todo[:at_once])
        reached = np.unique(np.concatenate([edges[2] for edges in new]))
        reached = reached[~seen[reached]]
        seen[reached] = True
        found += new
        todo = np.concatenate([todo[at_once:], reached])
    source, token, target = np.concatenate(found, 1)
    useful = leads_to(source, target, dfa.accepting) & seen
    if not useful[0]:
        raise ValueError("pattern: expected one that some sequence of tokens matches, got one that none does")
    kept = useful[target]
    source, token, target = source[kept], token[kept], target[kept]
    number = np.cumsum(useful) - 1
    order = np.argsort(source, kind="stable")
    indptr = np.concatenate(([0], np.cumsum(np.bincount(number[source], minlength=int(useful.sum())))))
    return indptr, token[order], number[target[order]], dfa.accepting[useful]
