"""The decode loop: a model of transformers, a search, and what the user of ``generate`` wants to have a say in."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..search import BeamSearch
from ..selection import TopK
from ..state import State
from .choosing import AsGenerate, stop_in_place
from .decoder import Decoder, Sequences
from .outputs import Recorder
from .processors import Processors
from .streaming import Stream


@dataclass
class Hooks:
    """What goes on beside the search."""

    processors: Processors
    criteria: Any | None  # a StoppingCriteriaList
    deadline: float | None  # by time.time()
    recorder: Recorder
    stream: Stream | None
    progress: Callable[[int, State], Any] | None
    quick: bool  # log-probabilities may be as transformers' in their last bits


class Loop:
    """One call's decoding.

    Args:
        decoder: the model, before its prompt.
        search: it chooses as ``generate`` does where processors or criteria ask for it.
        prompts: int64 ``[B, L]``.
        hooks: what else goes on.
    """

    def __init__(self, decoder: Decoder, search: BeamSearch, prompts: Tensor, hooks: Hooks):
        self.decoder, self.search, self.prompts, self.hooks = decoder, search, prompts, hooks
        self.sequences: Sequences | None = None
        self.chooser = _chooser(search, hooks)
        if self.chooser is not None:
            self.search = copy.copy(search)
            self.search.selection = self.chooser
        # with rules that sample, and for greedy decoding, generate's processors are given logits
        self.as_logits = bool(hooks.processors) and (self.chooser is None or decoder.beams == 1)

    def run(self, request_ids: Any, source_lengths: Any) -> State:
        """Decode to the end."""
        decoder, search, hooks = self.decoder, self.search, self.hooks
        logits, outputs = decoder.prompt()
        state = search.init(self.prompts.shape[0], logits.device, request_ids, source_lengths)
        steps = max(state.max_lengths)
        if decoder.whole or hooks.processors or hooks.criteria is not None:
            self.sequences = Sequences(self.prompts, decoder.beams, steps)
            if self.chooser is not None:
                self.chooser.sequences = self.sequences
        for number in range(1, steps + 1):
            hooks.recorder.model(outputs, logits)
            if hooks.deadline is not None and time.time() > hooks.deadline:
                state.limits.max_length.clamp_(max=number)  # the best of this step are all there will be
            tokens, source_rows = self._step(state, logits)
            if hooks.stream is not None:
                hooks.stream.show(search, state)
            stop = hooks.progress is not None and hooks.progress(number, state)
            if stop or state.all_done():
                break
            logits, outputs = decoder.step(tokens, source_rows)
        return state

    def _step(self, state: State, logits: Tensor) -> tuple[Tensor, Tensor]:
        """One step of the search: what the model is to be run on, and the rows that it continues."""
        hooks, sequences = self.hooks, self.sequences
        if hooks.processors or hooks.recorder.scores is not None:
            logits = self._processed(state, logits)
        step = self.search.step(state, logits)
        tokens = step.tokens.view(-1, 1).to(self.prompts.device)
        if sequences is None:
            return tokens, step.source_rows
        sequences.advance(step.parents.to(tokens.device), tokens)
        if self.chooser is not None:
            self.chooser.settle(state, self.search.stopping.rule)
        elif hooks.criteria is not None:
            stopped = hooks.criteria(sequences.now, hooks.recorder.scores)
            stop_in_place(state, stopped.view_as(step.tokens).to(state.device))
        return (sequences.now if self.decoder.whole else tokens), step.source_rows

    def _processed(self, state: State, logits: Tensor) -> Tensor:
        """What the search is given: processed logits; or the model's, and the chooser the scores."""
        hooks, rows = self.hooks, state.batch_size * state.beam_size
        scores = logits.float() if self.as_logits else logits.float().log_softmax(-1)
        repeats = rows // logits.shape[0]
        if repeats > 1:
            scores = scores.repeat_interleave(repeats, 0)
        if hooks.processors:
            assert self.sequences is not None
            active, device = state.slots.active.flatten(), self.prompts.device
            scores = hooks.processors(self.sequences.now, scores.to(device), active).to(logits.device).float()
        hooks.recorder.step(scores)
        if not hooks.processors:
            return logits
        scores = scores[::repeats]  # the rows that were given: source_rows counts them
        if self.chooser is None or self.as_logits:
            return scores
        self.chooser.increments, self.chooser.scores = scores, hooks.recorder.scores
        return logits


def _chooser(search: BeamSearch, hooks: Hooks) -> AsGenerate | None:
    """How to choose where processors or criteria have a say, if the search's own rule is not to."""
    rule, criteria = search.selection, hooks.criteria
    quick = hooks.quick and search.constraint.values == [None]  # a constraint may ask more of the rule
    if not hooks.processors and criteria is None and not quick:
        return None
    if type(rule) is not TopK or (criteria is not None and search.finished == "in_place"):
        if criteria is not None and search.finished == "pool":
            names = [type(each).__name__ for each in criteria]
            raise ValueError(
                f"stopping_criteria: expected lengths, EOS and times with fb.{type(rule).__name__}, got {names}"
            )
        return None
    return AsGenerate(criteria)
