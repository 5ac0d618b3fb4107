"""What a grammar derives: matchers of xgrammar or llguidance that follow the beams."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .matchers import LLGuidance, Matcher, Vocabulary, Words, XGrammar, is_compiled, is_tokenizer, is_tokenizer_info
from .protocol import Bound, Context


class Grammar:
    """Only texts of a grammar: JSON of a schema, a regular expression, a context-free grammar.

    A token may follow where the grammar's library says so, EOS exactly where the text is complete. What reaches
    ``max_length`` is a hypothesis only if it is complete; there is no look-ahead, so leave room for the shortest text.

    The matchers run on the host: unlike every other constraint, this one waits for the device in each step, and cannot
    be captured in a graph. A matcher is forked where a beam has more than one child, and advanced by one token a step:
    no prefix is parsed again.

    Args:
        compiled: an ``xgrammar.CompiledGrammar``; or, with a tokenizer, a grammar of llguidance, as
            ``llguidance.grammar_from`` and ``LLMatcher.grammar_from_regex`` make them.
        tokenizer: the ``llguidance.LLTokenizer``; ``None`` for xgrammar, whose grammars know theirs.

    Raises:
        ValueError, TypeError: ``<argument>: expected X, got Y``. At the first step, a grammar whose tokenizer stops at
            other tokens than the search.

    The vocabulary of the grammar may be smaller or larger than that of the logits: only tokens of both may follow. The
    tokenizer's stop tokens may not, unless they are the search's EOS. See xgrammar (Dong et al. 2024) and llguidance
    (Microsoft 2025), which where the text is forced allows no other tokens for it than its tokenizer would choose,
    unless the grammar begins with ``%llguidance {"no_forcing": true}``.
    """

    on_host = True

    def __init__(self, compiled: Any, tokenizer: Any = None):
        if is_compiled(compiled) and tokenizer is None:
            self.root: Matcher = XGrammar.start(compiled)
        elif isinstance(compiled, str) and is_tokenizer(tokenizer):
            self.root = LLGuidance.start(compiled, tokenizer)
        else:
            raise TypeError(
                "compiled: expected an xgrammar.CompiledGrammar, or a grammar of llguidance and an LLTokenizer, got "
                f"{type(compiled).__name__} and {type(tokenizer).__name__}"
            )

    def __repr__(self) -> str:
        return f"Grammar({type(self.root).__name__})"

    @classmethod
    def json_schema(cls, schema: str | dict[str, Any], tokenizer: Any, **options: Any) -> Grammar:
        """JSON of a schema. ``tokenizer``: an ``xgrammar.TokenizerInfo`` or ``llguidance.LLTokenizer``.

        ``options`` go to xgrammar's ``compile_json_schema`` or llguidance's ``grammar_from_json_schema``.
        """
        if compiler := _compiler(tokenizer):
            return cls(compiler.compile_json_schema(schema, **options))
        import llguidance

        return cls(llguidance.LLMatcher.grammar_from_json_schema(schema, **options), tokenizer)

    @classmethod
    def regex(cls, pattern: str, tokenizer: Any) -> Grammar:
        """Texts that match a regular expression as a whole, in the library's dialect; ``tokenizer`` as above."""
        if compiler := _compiler(tokenizer):
            return cls(compiler.compile_regex(pattern))
        import llguidance

        return cls(llguidance.LLMatcher.grammar_from_regex(pattern), tokenizer)

    @classmethod
    def ebnf(cls, text: str, tokenizer: Any) -> Grammar:
        """A context-free grammar in GBNF, whose start is ``root``; ``tokenizer`` as above."""
        if compiler := _compiler(tokenizer):
            return cls(compiler.compile_grammar(text))
        import llguidance

        return cls(llguidance.grammar_from("gbnf", text), tokenizer)

    @staticmethod
    def bind(requests: list[Grammar | None], context: Context) -> Bound:
        """See :class:`Bound`."""
        return _Bound(requests, context)


def _compiler(tokenizer: Any) -> Any:
    """xgrammar's compiler for its tokenizers, ``None`` for llguidance's."""
    if is_tokenizer(tokenizer):
        return None
    if not is_tokenizer_info(tokenizer):
        name = type(tokenizer).__name__
        raise TypeError(f"tokenizer: expected an xgrammar.TokenizerInfo or llguidance.LLTokenizer, got {name}")
    import xgrammar

    return xgrammar.GrammarCompiler(tokenizer)


class Matchers:
    """One per row; ``None`` where nothing goes on, or anything may. Rows that are alike may share one."""

    def __init__(self, rows: list[Matcher | None]):
        self.rows = rows

    def __deepcopy__(self, memo: dict[int, Any]) -> Matchers:
        distinct = {matcher for matcher in self.rows if matcher is not None}
        forks = {matcher: matcher.fork() for matcher in distinct}
        return Matchers([None if matcher is None else forks[matcher] for matcher in self.rows])


class _Bound(Bound):
    def __init__(self, requests: list[Grammar | None], context: Context):
        self.requests, self.context = requests, context
        self.free = [request for request, grammar in enumerate(requests) if grammar is None]
        self.threads: dict[type[Matcher], Any] = {}
        self.corrections: dict[Vocabulary, tuple[NDArray[np.int64], Words, Words]] = {}
        for grammar in requests:
            if grammar is not None:
                vocabulary = grammar.root.vocabulary
                if context.eos and vocabulary.stops and not {*vocabulary.stops} & {*context.eos}:
                    wanted, stops = list(context.eos), list(vocabulary.stops)
                    raise ValueError(f"constraint: expected a grammar for a tokenizer with EOS {wanted}, got {stops}")
                self.threads.setdefault(type(grammar.root), None)
                self.corrections[vocabulary] = self._correction(vocabulary)
        self.threads = {kind: kind.threads() for kind in self.threads}

    def _correction(self, vocabulary: Vocabulary) -> tuple[NDArray[np.int64], Words, Words]:
        """Words to correct ``[n]``, bits to keep of each and bits to set where the text is complete, ``[n]``.

        Whatever a library says of them: stop tokens that are no EOS, and bits past its vocabulary, may not follow.
        """
        keep, ends = np.zeros((2, _words(self.context.vocab_size) * 32), bool)
        eos = list(self.context.eos)
        keep[: vocabulary.size] = True
        keep[[token for token in (*vocabulary.stops, *eos) if token < len(keep)]] = False
        ends[eos] = True
        keep_words, end_words = (np.packbits(bits, bitorder="little").view("<i4") for bits in (keep, ends))
        words = np.flatnonzero(keep_words != -1)
        return words, keep_words[words], end_words[words]

    def init(self) -> Matchers:
        distinct = {grammar for grammar in self.requests if grammar is not None}
        roots = {grammar: grammar.root.fork() for grammar in distinct}
        begun = [None if grammar is None else roots[grammar] for grammar in self.requests]
        return Matchers([matcher for matcher in begun for _ in range(self.context.beam_size)])

    def take(self, state: Matchers, rows: Tensor) -> Matchers:
        return Matchers([state.rows[row] for row in rows.tolist()])

    def move(self, state: Matchers, rows: Tensor, tokens: Tensor, live: Tensor | None = None) -> Matchers:
        """As in :class:`Bound`; the state given is used up."""
        live = torch.ones_like(rows) if live is None else live
        parents, follow, goes_on = torch.stack([rows, tokens, live.to(rows.dtype)]).tolist()  # one transfer
        old = [state.rows[parent] if on else None for parent, on in zip(parents, goes_on, strict=True)]
        children = Counter(old)
        new: list[Matcher | None] = []
        for matcher, token in zip(old, follow, strict=True):
            children[matcher] -= 1
            if matcher is not None and children[matcher]:
                matcher = matcher.fork()
            new.append(matcher if matcher is not None and matcher.accept(token) else None)
        return Matchers(new)

    def bitmask(self, state: Matchers) -> Tensor:
        """As in :class:`Bound`; zero where nothing goes on."""
        device = self.context.device
        shape = len(state.rows), _words(self.context.vocab_size)
        sent = torch.zeros(shape, dtype=torch.int32, pin_memory=device.type == "cuda")
        mask = sent.numpy()
        first: dict[Matcher, int] = {}
        again: list[tuple[int, int]] = []
        together: dict[tuple[type[Matcher], Vocabulary], list[int]] = {}
        for row, matcher in enumerate(state.rows):
            if matcher is not None and first.setdefault(matcher, row) == row:
                together.setdefault((type(matcher), matcher.vocabulary), []).append(row)
            elif matcher is not None:
                again.append((row, first[matcher]))
        for (kind, vocabulary), group in together.items():
            self._fill(mask, group, [matcher for row in group if (matcher := state.rows[row])], kind, vocabulary)
        for row, like in again:
            mask[row] = mask[like]
        mask.reshape(len(self.requests), -1)[self.free] = -1
        return sent.to(device, non_blocking=True)

    def _fill(
        self, mask: Words, rows: list[int], matchers: list[Matcher], kind: type[Matcher], vocabulary: Vocabulary
    ) -> None:
        """Write the masks of matchers of one library and vocabulary to their rows of ``mask [R, W]``."""
        width = _words(vocabulary.size)
        if width == mask.shape[1]:
            kind.fill(self.threads[kind], matchers, rows, mask)
        else:
            own = np.zeros((len(rows), width), np.int32)
            kind.fill(self.threads[kind], matchers, list(range(len(rows))), own)
            both = min(width, mask.shape[1])
            mask[rows, :both] = own[:, :both]
        words, keep, ends = self.corrections[vocabulary]
        complete = np.array([matcher.may_stop() for matcher in matchers])
        place = np.array(rows)[:, None], words
        mask[place] = mask[place] & keep | np.where(complete[:, None], ends, 0)

    def accepts(self, state: Matchers) -> Tensor:
        per_request = len(state.rows) // len(self.requests)
        accepted = [matcher is not None and matcher.may_stop() for matcher in state.rows]
        for request in self.free:
            accepted[request * per_request : (request + 1) * per_request] = [True] * per_request
        return torch.tensor(accepted).to(self.context.device, non_blocking=True)


def _words(vocab_size: int) -> int:
    return (vocab_size + 31) // 32
