"""The decode loop: a model of transformers, a search, and what the user of ``generate`` wants to have a say in."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flashbeam.kernels import pack_bitmask

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
    shown: Processors  # what the search does itself, for the scores that are recorded
    own: bool  # the search is that of ``generate``: log-probabilities as transformers' in their last bits, its bounds
    greedy: bool  # ``generate`` without beams, whose scores are logits


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
        # greedy decoding gives processors logits; so do we where the rule ranks by nothing but the logits it is given
        self.as_logits = hooks.greedy or (bool(hooks.processors) and self.chooser is None)

    def run(self, request_ids: Any, source_lengths: Any) -> State:
        """Decode to the end."""
        decoder, search, hooks = self.decoder, self.search, self.hooks
        logits, outputs = decoder.prompt()
        state = search.init(self.prompts.shape[0], logits.device, request_ids, source_lengths)
        steps = max(state.max_lengths)
        shows = bool(hooks.shown) and hooks.recorder.scores is not None
        if decoder.whole or hooks.processors or shows or hooks.criteria is not None:
            self.sequences = Sequences(self.prompts, decoder.beams, steps)
            if self.chooser is not None:
                self.chooser.state, self.chooser.sequences = state, self.sequences
        for number in range(1, steps + 1):
            hooks.recorder.model(outputs, logits)
            late = hooks.deadline is not None and time.time() > hooks.deadline
            tokens, source_rows = self._last_step(state, logits) if late else self._step(state, logits)
            if hooks.stream is not None:
                hooks.stream.show(search, state)
            stop = hooks.progress is not None and hooks.progress(number, state)
            if stop or state.all_done():
                break
            logits, outputs = decoder.step(tokens, source_rows)
        return state

    def _last_step(self, state: State, logits: Tensor) -> tuple[Tensor, Tensor]:
        """One step before its time: the best of it are all there will be, and nobody knows what would have come."""
        limits, requests = state.limits.max_length.clone(), state.requests
        cut = ~requests.done & (requests.steps + 1 < limits)
        state.limits.max_length.copy_(torch.where(cut, requests.steps + 1, limits))
        found = self._step(state, logits)
        state.limits.max_length.copy_(limits)
        state.bound.masked_fill_(cut, torch.inf)
        return found

    def _step(self, state: State, logits: Tensor) -> tuple[Tensor, Tensor]:
        """One step of the search: what the model is to be run on, and the rows that it continues."""
        hooks, sequences = self.hooks, self.sequences
        bitmask = None
        if hooks.processors or hooks.recorder.scores is not None:
            logits, bitmask = self._processed(state, logits)
        step = self.search.step(state, logits, bitmask)
        tokens = step.tokens.view(-1, 1).to(self.prompts.device)
        if sequences is None:
            return tokens, step.source_rows
        sequences.advance(step.parents.to(tokens.device), tokens)
        if self.chooser is not None:
            self.chooser.settle(state)
        elif hooks.criteria is not None:
            stopped = hooks.criteria(sequences.now, hooks.recorder.scores)
            stop_in_place(state, stopped.view_as(step.tokens).to(state.device))
        return (sequences.now if self.decoder.whole else tokens), step.source_rows

    def _processed(self, state: State, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits and a bitmask for the search: processed, or the model's where the chooser is given the scores."""
        hooks, rows = self.hooks, state.batch_size * state.beam_size
        given = logits.float() if self.as_logits else logits.float().log_softmax(-1)
        repeats = rows // logits.shape[0]
        if repeats > 1:
            given = given.repeat_interleave(repeats, 0)
        scores, processors = given, hooks.processors or hooks.shown
        if processors:
            assert self.sequences is not None
            active, device = state.slots.active.flatten(), self.prompts.device
            scores = processors(self.sequences.now, given.to(device), active).to(logits.device).float()
        alone, bitmask = self.as_logits and not hooks.greedy, None
        barred = scores == -torch.inf
        if alone and self.search.selection.seed is None:  # bans do not renormalise, what else is changed does
            scores = torch.where(barred, given, scores)
            bitmask = pack_bitmask(~barred[::repeats])
        hooks.recorder.step(scores.log_softmax(-1).masked_fill(barred, -torch.inf) if alone else scores)
        if not hooks.processors:
            return logits, None
        if self.chooser is not None and not self.as_logits:
            self.chooser.increments, self.chooser.scores = scores[::repeats], hooks.recorder.scores
            return logits, None
        # the rows that were given: source_rows counts them
        return scores[::repeats], bitmask


def _chooser(search: BeamSearch, hooks: Hooks) -> AsGenerate | None:
    """How to choose where processors or criteria have a say, if the search's own rule is not to."""
    rule, criteria = search.selection, hooks.criteria
    quick = hooks.own and search.constraint.values == [None]  # a constraint may ask more of the rule
    if not hooks.processors and criteria is None and not quick:
        return None
    if type(rule) is not TopK or (criteria is not None and search.finished == "in_place"):
        if criteria is not None and search.finished == "pool":
            names = [type(each).__name__ for each in criteria]
            raise ValueError(
                f"stopping_criteria: expected lengths, EOS and times with fb.{type(rule).__name__}, got {names}"
            )
        return None
    if search.terms:
        raise ValueError(f"terms: expected none beside logits processors and stopping criteria, got {search.terms[0]}")
    if search.dialect.finishes != "beam":
        raise ValueError(
            "dialect: expected finishes='beam' beside logits processors and stopping criteria, got "
            f"{search.dialect.finishes!r}"
        )
    return AsGenerate(criteria, search.stopping.rule, hooks.own, hooks.own or hooks.processors.never_raise)
