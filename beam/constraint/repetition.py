"""The repetition penalty of CTRL (Keskar et al. 2019), as Hugging Face applies it.

logit / penalty where logit > 0, logit * penalty elsewhere, for every token that was said; before the temperature
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..arguments import positive_number
from .csr import int_array
from .protocol import Bound, Context
from .said import Said
from .token_lists import check_inside, on_device, padded


class RepetitionPenalty:
    """Tokens already in the hypothesis are made less likely: a positive logit is divided, any other multiplied.

    The log-probabilities reported are those of the penalised logits, normalised again. Logits of 16 bits go on in
    float32, in which they are penalised: rounded to 16 bits, a penalised logit could be off by 2**-9 of itself.

    Args:
        penalty: above 0; 1 changes nothing, above 1 discourages.
        prompt: tokens that count as said before, as those of a decoder-only model's prompt do for Hugging Face. For
            prompts that differ by request, give a list of constraints.

    Raises:
        ValueError, TypeError: ``<argument>: expected X, got Y``; ids outside the vocabulary at the first step.
    """

    def __init__(self, penalty: float, prompt: Any = None):
        self.penalty = positive_number("penalty", penalty)
        self.prompt = int_array("prompt", [] if prompt is None else prompt)

    def __repr__(self) -> str:
        prompt = f", prompt={self.prompt.tolist()}" if len(self.prompt) else ""
        return f"RepetitionPenalty({self.penalty}{prompt})"

    @staticmethod
    def bind(requests: list["RepetitionPenalty | None"], context: Context) -> Bound:
        """See :class:`Bound`."""
        return _Bound(requests, context)


class _Bound(Bound):
    def __init__(self, requests: list[RepetitionPenalty | None], context: Context):
        self.context = context
        prompts = [np.zeros(0, np.int32) if request is None else np.unique(request.prompt) for request in requests]
        for prompt in prompts:
            check_inside("prompt", prompt, context.vocab_size)
        penalties = [1.0 if request is None else request.penalty for request in requests]
        self.nothing = all(penalty == 1.0 for penalty in penalties)
        self.penalties = on_device(penalties, np.float32, context)[:, None]  # [B, 1]
        self.prompts = on_device(padded(prompts, max(map(len, prompts))), np.int64, context)  # [B, P]

    def init(self) -> Said:
        return Said.begin(self.context)

    def advance(self, state: Said, tokens: Tensor) -> Said:
        return state.then(tokens)

    def adjust(self, state: Said, logits: Tensor) -> Tensor:
        if self.nothing:
            return logits
        rows = logits.shape[0]
        said = torch.cat([self.context.of_rows(self.prompts, rows), state.tokens.long()], 1)
        # a place that holds nothing stands for token 0, as said or not
        counts = (said >= 0) | (said == 0).any(1, keepdim=True)
        token = said.clamp(min=0)
        logit = logits.gather(1, token).float()
        penalty = self.context.of_rows(self.penalties, rows)
        penalised = torch.where(logit > 0, logit / penalty, logit * penalty)
        return logits.to(torch.float32, copy=True).scatter_(1, token, torch.where(counts, penalised, logit))
