"""Reads a listing of ``cuobjdump -sass``: instructions, basic blocks, and what a warp executes of a streaming kernel.

The count follows one documented path through the control flow, that of a program whose tiles are all full:

1. The hot block is the one with the most global loads under one guard, or none: a full tile's, as every load of a
   masked tile has its own. An iteration runs from the header of the loop around it, through it, and back to the header;
   the prologue and the epilogue are the way there and on to ``EXIT``.
2. Among the ways of an iteration, those with the fewest exponentials, predicated loads and calls: the second pass over
   a tile with a NaN, the masked tail and the slow paths of division are cold. ``BRA.DIV``, taken by a warp that has
   not reconverged, is not taken.
3. Among these the longest, so where lanes diverge (one lane stores a scalar) both sides count: the result is an upper
   bound. A predicated-off instruction still takes its issue slot and counts.
"""

from __future__ import annotations

import re
from collections import Counter
from functools import cache
from typing import NamedTuple

_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P(?:\d+|T))\s+)?([A-Z][\w.]*)\s*([^;]*);", re.MULTILINE)
_TARGET = re.compile(r"0x[0-9a-f]+$")
_WIDTHS = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
# 64 lanes a clock and SM on sm_90, where additions, products and fused ones of float32 have 128
_HALF_RATE = {
    *("FMNMX", "FSETP", "FSEL", "HMNMX2", "IABS", "IADD3", "IMNMX", "ISETP", "LEA", "LOP3", "MOV", "P2R", "PLOP3"),
    *("PRMT", "R2P", "SEL", "SHF", "VIADD", "VIADDMNMX", "VIMNMX"),
}


class Instruction(NamedTuple):
    """One machine instruction."""

    address: int
    guard: str  # "@P0", or "" if it is always executed
    opcode: str  # with its modifiers: "LDG.E.128"
    operands: str

    @property
    def name(self) -> str:
        return self.opcode.partition(".")[0]

    @property
    def load_bytes(self) -> int:
        """Bytes a lane loads from global memory."""
        if self.name != "LDG":
            return 0
        return next((_WIDTHS[part] for part in self.opcode.split(".") if part in _WIDTHS), 4)


class Path(NamedTuple):
    """What one warp executes."""

    once: Counter[str]  # opcodes of prologue and epilogue
    tile: Counter[str]  # opcodes of an iteration
    tile_load_bytes: int  # of a lane, in an iteration

    def executed(self, tiles: int) -> int:
        """Warp instructions of a program of ``tiles`` full tiles."""
        return self.once.total() + tiles * self.tile.total()


def parse(listing: str) -> list[Instruction]:
    """The instructions of a listing with one function."""
    functions = re.findall(r"Function : (\S+)", listing)
    if len(functions) != 1:
        raise ValueError(f"listing: expected one function, got {functions}")
    return [
        Instruction(int(address, 16), guard, opcode, operands.strip())
        for address, guard, opcode, operands in _LINE.findall(listing)
    ]


def half_rate(path: Counter[str]) -> int:
    """How many of the opcodes run at half the rate of float32 arithmetic."""
    return sum(count for opcode, count in path.items() if opcode.partition(".")[0] in _HALF_RATE)


def _successors(code: list[Instruction], i: int) -> list[int]:
    """Addresses that may follow instruction ``i``."""
    at, following = code[i], [code[i + 1].address] if i + 1 < len(code) else []
    if at.name in ("EXIT", "RET"):
        return following if at.guard else []
    if at.name == "CALL":  # sm_80 leaves the loop by a call that does not return
        return [*following, int(_TARGET.search(at.operands).group(), 16)]
    if at.name in ("BRX", "JMP", "JMX"):
        raise ValueError(f"listing: cannot follow {at.opcode} at {at.address:#x}")
    if at.name != "BRA" or ".DIV" in at.opcode:
        return following
    target = _TARGET.search(at.operands)
    if target is None:
        raise ValueError(f"listing: no target in {at.opcode} {at.operands} at {at.address:#x}")
    conditional = at.guard or "," in at.operands  # guarded, or with a predicate among the operands
    return [*(following if conditional else []), int(target.group(), 16)]


class _Graph:
    """Basic blocks, numbered from the entry, and the edges that close loops."""

    def __init__(self, code: list[Instruction]):
        follow = [_successors(code, i) for i in range(len(code))]
        leaders = {code[0].address}
        for at, after, targets in zip(code, [*code[1:], None], follow, strict=True):
            falls_through = after is not None and targets == [after.address]
            if not falls_through or at.name == "EXIT":
                leaders.update(targets if after is None else [*targets, after.address])
        starts = [i for i, at in enumerate(code) if at.address in leaders]
        number = {code[i].address: n for n, i in enumerate(starts)}
        self.blocks = [code[i:j] for i, j in zip(starts, [*starts[1:], len(code)], strict=True)]
        lasts = [end - 1 for end in [*starts[1:], len(code)]]
        self.next = [[number[target] for target in follow[last]] for last in lasts]
        self.back: set[tuple[int, int]] = set()
        self._find_loops()

    def _find_loops(self) -> None:
        """Depth first: an edge to a block that is still open closes a loop."""
        state = {0: "open"}
        stack = [(0, iter(self.next[0]))]
        while stack:
            block, rest = stack[-1]
            for target in rest:
                if target not in state:
                    state[target] = "open"
                    stack.append((target, iter(self.next[target])))
                    break
                if state[target] == "open":
                    self.back.add((block, target))
            else:
                state[block] = "closed"
                stack.pop()

    def best(self, start: int, ends: set[int]) -> list[int]:
        """The way from ``start`` to one of ``ends`` within one iteration; see the module's rules 2 and 3."""

        @cache
        def way(block: int) -> tuple[int, int, tuple[int, ...]] | None:
            code = self.blocks[block]
            cold = sum(
                at.opcode == "MUFU.EX2" or at.name == "CALL" or (at.name == "LDG" and at.guard != "") for at in code
            )
            tails = [(0, 0, ())] if block in ends else []
            tails += [w for n in self.next[block] if (block, n) not in self.back and (w := way(n)) is not None]
            if not tails:
                return None
            tail = min(tails, key=lambda w: w[:2])
            return cold + tail[0], tail[1] - len(code), (block, *tail[2])

        found = way(start)
        if found is None:
            raise ValueError(f"listing: no way from block {start} to {sorted(ends)}")
        return list(found[2])

    def reaches(self, start: int, end: int) -> bool:
        """Whether a way without closing a loop exists."""
        try:
            self.best(start, {end})
        except ValueError:
            return False
        return True


def streaming_path(code: list[Instruction]) -> Path:
    """What a warp of a kernel that loops over tiles executes; see the module's docstring."""
    graph = _Graph(code)
    loads = Counter((b, at.guard) for b, block in enumerate(graph.blocks) for at in block if at.load_bytes)
    ((hot, guard), _) = loads.most_common(1)[0]
    around = {(end, header) for end, header in graph.back if graph.reaches(header, hot) and graph.reaches(hot, end)}
    headers = {header for _, header in around}
    if len(headers) != 1:
        raise ValueError(f"listing: expected one loop around the loads, got {len(headers)}")
    (header,) = headers
    iteration = [*graph.best(header, {hot}), *graph.best(hot, {end for end, _ in around})[1:]]
    inner = {start for _, start in graph.back} & set(iteration) - headers
    if inner:
        raise ValueError(f"listing: expected no loop inside a tile, got {len(inner)}")
    exits = {b for b, block in enumerate(graph.blocks) if block[-1].name == "EXIT"}
    # the loop is left behind the last block of it that an exit can be reached from
    last = next(b for b in reversed(iteration) if any(graph.reaches(b, end) for end in exits))
    once = [*graph.best(0, {header})[:-1], *graph.best(last, exits)[1:]]

    def opcodes(blocks: list[int]) -> Counter[str]:
        return Counter(at.opcode for b in blocks for at in graph.blocks[b])

    load_bytes = sum(at.load_bytes for b in iteration for at in graph.blocks[b] if at.guard in ("", guard))
    return Path(opcodes(once), opcodes(iteration), load_bytes)
