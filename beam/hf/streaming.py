"""What is shown while a search runs: what is settled, or the current best."""

from __future__ import annotations

import shutil
import sys
from typing import TYPE_CHECKING, Any, TextIO

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ..hypotheses import Hypotheses
    from ..search import BeamSearch
    from ..state import State


class BestStreamer:
    """Writes the text of the best hypothesis so far and rewrites it where a step changes its mind.

    For terminals: what is taken back is erased with ANSI sequences. Any object with methods ``best`` and ``end`` will
    do in its place.

    Args:
        tokenizer: its ``decode(token_ids, **decode_kwargs)`` makes the text.
        file: where to write; standard output.
        decode_kwargs: such as ``skip_special_tokens=True``.
    """

    def __init__(self, tokenizer: Any, file: TextIO | None = None, **decode_kwargs: Any):
        self.tokenizer, self.decode_kwargs = tokenizer, decode_kwargs
        self.file = sys.stdout if file is None else file
        self.shown = ""

    def best(self, tokens: Tensor, score: float, finished: bool) -> None:
        """Called after every step with the best hypothesis: int64 ``[T]``, the prompt left out, and its score."""
        text = self.tokenizer.decode(tokens, **self.decode_kwargs)
        if text.startswith(self.shown):
            self.file.write(text[len(self.shown) :])
        else:
            width = shutil.get_terminal_size().columns
            lines = sum(max(0, len(line) - 1) // width + 1 for line in self.shown.split("\n")) - 1
            self.file.write((f"\x1b[{lines}A" if lines else "") + "\r\x1b[J" + text)
        self.file.flush()
        self.shown = text

    def end(self) -> None:
        """Called once, when the search is over."""
        self.file.write("\n")
        self.file.flush()
        self.shown = ""


class Stream:
    """Feeds a streamer from a search of one request.

    A streamer with ``best`` is shown the best hypothesis after each step. Any other, such as transformers'
    ``TextStreamer``, cannot take anything back: ``put`` is given the prompt, then tokens as soon as all that is live
    or finished begins with them, and the rest of the best in the end; all of it in the end where live beams are spare
    (``fb.Dialect``).
    """

    def __init__(self, streamer: Any, prompt: Tensor):
        if prompt.shape[0] != 1:
            raise ValueError(f"streamer: expected one request, got {prompt.shape[0]}")
        self.streamer = streamer
        self.shows_best = callable(getattr(streamer, "best", None))
        self.count = 0  # tokens that were put
        if not self.shows_best:
            streamer.put(prompt.cpu())

    def show(self, search: BeamSearch, state: State) -> None:
        """After a step."""
        if self.shows_best:
            self._best(state.best())
            return
        if state.dialect.at_max_length == "spare":  # what is live is no hypothesis yet, and may replace those there are
            return
        alive = search.finalize(state, 2 * state.beam_size)
        tokens, lengths = alive.tokens[0][alive.valid[0]].cpu(), alive.lengths[0][alive.valid[0]]
        if tokens.shape[0] == 0:
            return
        shortest = int(lengths.min())
        agree = (tokens[:, :shortest] == tokens[:1, :shortest]).all(0)
        self._put(tokens[0, : int(agree.long().cumprod(0).sum())])

    def end(self, best: Hypotheses) -> None:
        """After the last step, with the n-best."""
        if self.shows_best:
            self._best(best)
        else:
            self._put(best.tokens[0, 0, : int(best.lengths[0, 0])].cpu())
        self.streamer.end()

    def _best(self, best: Hypotheses) -> None:
        if bool(best.valid[0, 0]):
            tokens = best.tokens[0, 0, : int(best.lengths[0, 0])].cpu()
            self.streamer.best(tokens, float(best.scores[0, 0]), bool(best.finished[0, 0]))

    def _put(self, tokens: Tensor) -> None:
        for token in torch.split(tokens[self.count :], 1):
            self.streamer.put(token)
        self.count = max(self.count, tokens.shape[0])
