"""No n-gram twice.

For every place j of what a row has said, ``alike[j]`` is kept: how many tokens before j equal, one by one, the last
that were said. No token may follow that stands where ``alike >= n - 1``. Saying x turns ``alike[j]`` into
``alike[j - 1] + 1`` where the token at j - 1 is x, else into 0: a step compares what was said with x, whatever n is.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from flashbeam.kernels import mark_bits

from ..arguments import whole_number
from .csr import int_array
from .protocol import Bound, Context
from .reach import Bools, Ints
from .said import Said
from .token_lists import check_inside, on_device, padded


class NoRepeatNgram:
    """No n-gram occurs twice in a hypothesis, the prompt included if one is given.

    EOS is never barred. A hypothesis all of whose continuations are barred is lost, as with any constraint.

    Args:
        n: tokens of an n-gram, 1 or more; 1 bars every token that was said.
        prompt: tokens that count as said before, as those of a decoder-only model's prompt do for Hugging Face. What it
            says twice itself is not held against it. For prompts that differ by request, give a list of constraints.

    Raises:
        ValueError, TypeError: ``<argument>: expected X, got Y``; ids outside the vocabulary at the first step.
    """

    def __init__(self, n: int, prompt: Any = None):
        self.n = whole_number(1)("n", n)
        self.prompt = int_array("prompt", [] if prompt is None else prompt)

    def __repr__(self) -> str:
        return f"NoRepeatNgram({self.n}" + (f", prompt={self.prompt.tolist()})" if len(self.prompt) else ")")

    @staticmethod
    def bind(requests: list["NoRepeatNgram | None"], context: Context) -> Bound:
        """See :class:`Bound`."""
        return _Bound(requests, context)


class _State(NamedTuple):
    said: Said
    alike: Tensor  # int32 [R, W], tokens before each place that equal the last said


class _Bound(Bound):
    def __init__(self, requests: list[NoRepeatNgram | None], context: Context):
        self.context = context
        nothing = np.zeros(0, np.int32)
        self.prompts = [nothing if request is None else request.prompt for request in requests]
        for prompt in self.prompts:
            check_inside("prompt", prompt, context.vocab_size)
        longest = max(map(len, self.prompts)) + max(context.max_lengths)
        sizes = [longest + 1 if request is None else min(request.n, longest + 1) for request in requests]
        self.needed = on_device(sizes, np.int32, context)[:, None] - 1  # [B, 1], tokens alike before one that is barred
        repeats = [_repeats(prompt, n, context.eos) for prompt, n in zip(self.prompts, sizes, strict=True)]
        self.fresh: Tensor | None = None  # bool [B, W], places whose token is barred where alike; None: all
        if any(map(np.any, repeats)):
            self.fresh = on_device(padded(repeats, longest), np.int32, context) != 1
        alike = [_alike(prompt, n) for prompt, n in zip(self.prompts, sizes, strict=True)]
        self.alike = on_device(padded(alike, longest), np.int32, context).clamp_(min=0)

    def init(self) -> _State:
        return _State(Said.begin(self.context, self.prompts), self.context.of_rows(self.alike, self.context.rows))

    def advance(self, state: _State, tokens: Tensor) -> _State:
        said, alike = state
        alike = (alike[:, :-1] + 1).mul_(said.tokens[:, :-1] == tokens[:, None].int())
        return _State(said.then(tokens), torch.nn.functional.pad(alike, (1, 0)))

    def bitmask(self, state: _State) -> Tensor:
        said, alike = state.said.tokens, state.alike
        rows = said.shape[0]
        barred = (alike >= self.context.of_rows(self.needed, rows)) & (said >= 0)
        if self.fresh is not None:
            barred &= self.context.of_rows(self.fresh, rows)
        # distinct: a token that follows the same n - 1 twice would be an n-gram said twice
        row = torch.arange(rows, device=said.device)[:, None].expand_as(said)
        return mark_bits(row, said, barred, rows, self.context.vocab_size).bitwise_not_()


def _alike(prompt: Ints, n: int) -> Ints:
    """int32 ``[len(prompt)]``: how many tokens before each place equal the last of the prompt, at most n - 1."""
    length = len(prompt)
    alike, still = np.zeros(length, np.int32), np.ones(length, bool)
    for back in range(1, min(n, length)):
        still[:back] = False
        still[back:] &= prompt[: length - back] == prompt[length - back]
        alike += still
    return alike


def _repeats(prompt: Ints, n: int, eos: tuple[int, ...]) -> Bools:
    """bool ``[len(prompt)]``: the n-gram that ends here ended before, or ends in EOS."""
    repeats = np.isin(prompt, np.array(eos, np.int32))
    if n <= len(prompt):
        grams = np.lib.stride_tricks.sliding_window_view(prompt, n)
        _, first = np.unique(grams, axis=0, return_index=True)
        repeats[n - 1 :] |= ~np.isin(np.arange(len(grams)), first)
    return repeats
