"""Regular expressions as automata over characters: Python's parse tree, then Thompson's automaton, then subsets.

An anchor is a jump under a condition. Behind ``\\Z`` nothing more may come, and behind ``$`` nothing but one newline: a
state of the automaton is paired with a phase that says so.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .characters import Intervals, characters, ops, parser, utf8
from .reach import Bools, Ints, leads_to

MOST_STATES = 100_000  # of either automaton
_MOST_WORK = 300_000_000  # entries of tables looked at to find states that are alike
_CHARACTERS = {ops.LITERAL, ops.NOT_LITERAL, ops.ANY, ops.IN}
_REPEATS = {ops.MAX_REPEAT, ops.MIN_REPEAT}
_TYPE_FLAGS = re.ASCII | re.LOCALE | re.UNICODE
_ALWAYS, _AT_START, _AT_END, _AT_LAST = range(4)  # conditions of a jump
_ANCHORS = {
    ops.AT_BEGINNING: _AT_START,
    ops.AT_BEGINNING_STRING: _AT_START,
    ops.AT_END: _AT_END,
    ops.AT_END_STRING: _AT_LAST,
}
_ANYTHING, _NOTHING, _NEWLINE = range(3)  # phases: what may come


class Dfa(NamedTuple):
    """A deterministic automaton over kinds of characters, which starts in state 0."""

    table: Ints  # [S, C], the next state, -1 if none that can accept
    accepting: Bools  # [S]
    bounds: NDArray[np.int64]  # [n], ascending from 0: a character c is of the kind of the last that is at most c
    kinds: NDArray[np.int64]  # [n]


def compile_pattern(pattern: str | bytes | re.Pattern[Any], of_bytes: bool) -> Dfa:
    """The automaton of the strings that ``re.fullmatch`` accepts; ``of_bytes``: of their UTF-8, if they are ``str``."""
    source, flags = (pattern.pattern, pattern.flags) if isinstance(pattern, re.Pattern) else (pattern, 0)
    try:
        tree = parser.parse(source, flags & ~re.DEBUG)
    except re.error as error:
        raise ValueError(f"pattern: expected a regular expression, got {source!r}: {error}") from None
    nfa = _Nfa(isinstance(source, bytes), of_bytes)
    end = nfa.sequence(tree, 0, tree.state.flags)
    return _deterministic(nfa, end)


class _Nfa:
    """States with arcs for sets of characters, and jumps."""

    def __init__(self, pattern_of_bytes: bool, of_bytes: bool):
        self.pattern_of_bytes, self.encodes = pattern_of_bytes, of_bytes and not pattern_of_bytes
        self.sets: dict[Intervals, int] = {((10, 10),): 0}  # "$" tells newlines from others
        self.known: dict[tuple[Any, str, int], Intervals] = {}
        self.arcs: list[list[tuple[int, int]]] = [[]]  # of each state: (set, target)
        self.jumps: list[list[tuple[int, int]]] = [[]]  # of each state: (condition, target)

    def new(self) -> int:
        if len(self.arcs) >= MOST_STATES:
            raise ValueError(f"pattern: expected one of at most {MOST_STATES} states, got more")
        self.arcs.append([])
        self.jumps.append([])
        return len(self.arcs) - 1

    def arc(self, state: int, intervals: Intervals, target: int) -> None:
        self.arcs[state].append((self.sets.setdefault(intervals, len(self.sets)), target))

    def sequence(self, tree: Iterable[tuple[Any, Any]], state: int, flags: int) -> int:
        """Add what ``tree`` matches, from ``state`` on; returns the state behind it."""
        for operation, argument in tree:
            state = self.element(operation, argument, state, flags)
        return state

    def element(self, operation: Any, argument: Any, state: int, flags: int) -> int:
        if flags & re.LOCALE:
            raise ValueError("pattern: expected one that depends on no locale, got the flag LOCALE")
        if operation in _CHARACTERS:
            key = operation, repr(argument), flags
            if key not in self.known:
                self.known[key] = characters(operation, argument, flags, self.pattern_of_bytes)
            return self.one_of(self.known[key], state)
        if operation is ops.SUBPATTERN:
            _, added, removed, inner = argument
            kept = flags & ~_TYPE_FLAGS if added & _TYPE_FLAGS else flags
            return self.sequence(inner, state, (kept | added) & ~removed)
        if operation is ops.BRANCH:
            end = self.new()
            for branch in argument[1]:
                self.jumps[self.sequence(branch, state, flags)].append((_ALWAYS, end))
            return end
        if operation in _REPEATS:
            fewest, most, inner = argument
            return self.repeat(fewest, most, inner, state, flags)
        if operation is ops.AT and argument in _ANCHORS and not flags & re.MULTILINE:
            end = self.new()
            self.jumps[state].append((_ANCHORS[argument], end))
            return end
        found = argument if operation is ops.AT else operation
        raise ValueError(f"pattern: expected a regular one with anchors at its ends only, got {str(found).lower()}")

    def one_of(self, intervals: Intervals, state: int) -> int:
        end = self.new()
        if not self.encodes:
            self.arc(state, intervals, end)
            return end
        before: dict[Intervals, int] = {(): end}  # states by the bytes that are still to come
        for sequence in utf8(intervals):
            for n in range(len(sequence) - 1, 0, -1):
                if sequence[n:] not in before:
                    before[sequence[n:]] = self.new()
                    self.arc(before[sequence[n:]], sequence[n : n + 1], before[sequence[n + 1 :]])
            self.arc(state, sequence[:1], before[sequence[1:]])
        return end

    def repeat(self, fewest: int, most: Any, tree: Any, state: int, flags: int) -> int:
        for _ in range(fewest):
            before, state = state, self.sequence(tree, state, flags)
            if state == before:  # it matches nothing but the empty string
                return state
        end = self.new()
        self.jumps[state].append((_ALWAYS, end))
        if most is ops.MAXREPEAT:
            self.jumps[self.sequence(tree, end, flags)].append((_ALWAYS, end))
            return end
        for _ in range(most - fewest):
            before, state = state, self.sequence(tree, state, flags)
            if state == before:
                break
            self.jumps[state].append((_ALWAYS, end))
        return end

    def closure(self, pairs: Iterable[tuple[int, int]], at_start: bool) -> frozenset[tuple[int, int]]:
        """All ``(state, phase)`` that jumps lead to."""
        found, todo = set(pairs), list(pairs)
        while todo:
            state, phase = todo.pop()
            for condition, target in self.jumps[state]:
                if condition == _AT_START and not at_start:
                    continue
                behind = phase
                if condition == _AT_LAST or (condition == _AT_END and phase == _NOTHING):
                    behind = _NOTHING
                elif condition == _AT_END:
                    behind = _NEWLINE
                if (target, behind) not in found:
                    found.add((target, behind))
                    todo.append((target, behind))
        return frozenset(found)


def _kinds(sets: list[Intervals]) -> tuple[NDArray[np.int64], NDArray[np.int64], list[list[int]]]:
    """Characters that no set tells apart are of one kind: ``bounds`` and ``kinds`` of a Dfa; the kinds in each set."""
    edges = {0} | {edge for intervals in sets for first, last in intervals for edge in (first, last + 1)}
    bounds = np.array(sorted(edges), np.int64)
    member = np.zeros((len(bounds), len(sets)), np.bool_)
    for i, intervals in enumerate(sets):
        for first, last in intervals:
            member[np.searchsorted(bounds, first) : np.searchsorted(bounds, last + 1), i] = True
    distinct, kinds = np.unique(member, axis=0, return_inverse=True)
    return bounds, kinds.reshape(-1), [list(map(int, np.flatnonzero(column))) for column in distinct.T]


def _deterministic(nfa: _Nfa, end: int) -> Dfa:
    """Subsets of the states of ``nfa``."""
    bounds, kinds, kinds_of = _kinds(list(nfa.sets))
    (newline,) = kinds_of[0]
    start = nfa.closure([(0, _ANYTHING)], at_start=True)
    numbers, todo, moves = {start: 0}, deque([start]), []
    accepting = []
    closed: dict[frozenset[tuple[int, int]], frozenset[tuple[int, int]]] = {}
    while todo:
        subset = todo.popleft()
        accepting.append(any(state == end for state, _ in subset))
        following: dict[int, set[tuple[int, int]]] = {}
        for state, phase in subset:
            for characters_of, target in nfa.arcs[state] if phase != _NOTHING else ():
                if phase == _ANYTHING:
                    for kind in kinds_of[characters_of]:
                        following.setdefault(kind, set()).add((target, _ANYTHING))
                elif newline in kinds_of[characters_of]:
                    following.setdefault(newline, set()).add((target, _NOTHING))
        for kind, pairs in following.items():
            key = frozenset(pairs)
            if key not in closed:
                closed[key] = nfa.closure(pairs, at_start=False)
            if closed[key] not in numbers:
                if len(numbers) >= MOST_STATES:
                    raise ValueError(f"pattern: expected one of at most {MOST_STATES} states, got more")
                numbers[closed[key]] = len(numbers)
                todo.append(closed[key])
            moves.append((len(accepting) - 1, kind, numbers[closed[key]]))
    table = np.full((len(numbers), int(kinds.max()) + 1), -1, np.int32)
    sources, labels, targets = np.array(moves, np.int64).reshape(-1, 3).T
    accepts = np.array(accepting, np.bool_)
    alive = leads_to(sources, targets, accepts)[targets]
    table[sources[alive], labels[alive]] = targets[alive]
    return Dfa(*_fewer(table, accepts), bounds, kinds)


def _fewer(table: Ints, accepting: Bools) -> tuple[Ints, Bools]:
    """One state for all that accept the same (Moore), unless to find them would take long: a matter of size only."""
    weights = np.random.default_rng(0).integers(2**63, size=table.shape[1] + 1, dtype=np.uint64)
    block = accepting.astype(np.int64)
    for _ in range(1 + _MOST_WORK // table.size):
        following = np.column_stack([block, np.where(table < 0, -1, block[table])])
        rows = np.unique(following.astype(np.uint64) @ weights, return_index=True, return_inverse=True)
        first, same_as = rows[1], rows[2].reshape(-1)
        if (following != following[first[same_as]]).any():  # sums that collide
            return table, accepting
        if len(first) == len(np.unique(block)):
            order = np.argsort(first)  # which leaves the start in front
            rank = np.argsort(order)[same_as].astype(np.int32)
            chosen = table[first[order]]
            return np.where(chosen < 0, np.int32(-1), rank[chosen]), accepting[first[order]]
        block = same_as
    return table, accepting
