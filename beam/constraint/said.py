"""What each row has said so far, for constraints that look back."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from .protocol import Context
from .reach import Ints
from .token_lists import on_device, padded


class Said(NamedTuple):
    """The tokens of each row, in the order they were said; rows first, so that they follow the beams."""

    tokens: Tensor  # int32 [R, W]; -1 where nothing is said yet
    lengths: Tensor  # int64 [R], places filled

    @staticmethod
    def begin(context: Context, prompts: Sequence[Ints] | None = None) -> "Said":
        """Before the first token, after ``prompts [B]`` if given, with room for the longest hypothesis."""
        if prompts is None:
            prompts = [np.zeros(0, np.int32)] * context.batch_size
        lengths = [len(prompt) for prompt in prompts]
        tokens = on_device(padded(prompts, max(lengths) + max(context.max_lengths)), np.int32, context)
        counts = on_device(lengths, np.int64, context)
        return Said(context.of_rows(tokens, context.rows), context.of_rows(counts, context.rows))

    def then(self, tokens: Tensor) -> "Said":
        """With ``tokens [R]`` said too. A full row, whose search is over, loses its last."""
        place = self.lengths.clamp(max=self.tokens.shape[1] - 1)[:, None]
        return Said(self.tokens.scatter(1, place, tokens[:, None].int()), self.lengths + 1)
