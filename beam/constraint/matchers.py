"""Matchers of xgrammar and llguidance behind one interface. Neither library is imported before it is used."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

# an array, not a tensor: of pinned memory some libraries would make out a device's
Words = NDArray[np.int32]


class Vocabulary(NamedTuple):
    """What a library knows of the tokens. The masks of matchers that agree in it are made together."""

    size: int
    stops: tuple[int, ...]  # tokens that the library takes for the end


class Matcher:
    """Where a text stands in its grammar. Changed by ``accept``."""

    def __init__(self, inner: Any, vocabulary: Vocabulary):
        self.inner, self.vocabulary = inner, vocabulary

    def fork(self) -> Matcher:
        """A copy that goes its own way; nothing is parsed again."""
        raise NotImplementedError

    def accept(self, token: int) -> bool:
        """Go on by a token that is no stop token; whether it may follow. If not, the matcher is of no more use."""
        raise NotImplementedError

    def may_stop(self) -> bool:
        """Whether the text is complete."""
        raise NotImplementedError

    @staticmethod
    def threads() -> Any:
        """What ``fill`` makes masks with."""
        raise NotImplementedError

    @staticmethod
    def fill(threads: Any, matchers: Sequence[Matcher], rows: list[int], words: Words) -> None:
        """Write what may follow each to its row of ``words [n, ceil(size / 32)]``, contiguous."""
        raise NotImplementedError


class XGrammar(Matcher):
    """``xgrammar.GrammarMatcher``."""

    @classmethod
    def start(cls, compiled: Any) -> Matcher:
        """At the beginning of a text of ``xgrammar.CompiledGrammar``."""
        import xgrammar

        info = compiled.tokenizer_info
        return cls(xgrammar.GrammarMatcher(compiled), Vocabulary(info.vocab_size, tuple(info.stop_token_ids)))

    def fork(self) -> Matcher:
        return XGrammar(self.inner.fork(), self.vocabulary)

    def accept(self, token: int) -> bool:
        return bool(self.inner.accept_token(token))

    def may_stop(self) -> bool:
        return bool(self.inner.is_completed())

    @staticmethod
    def threads() -> Any:
        import xgrammar

        return xgrammar.BatchGrammarMatcher()

    @staticmethod
    def fill(threads: Any, matchers: Sequence[Matcher], rows: list[int], words: Words) -> None:
        threads.batch_fill_next_token_bitmask([each.inner for each in matchers], words, rows)


class LLGuidance(Matcher):
    """``llguidance.LLMatcher``."""

    @classmethod
    def start(cls, grammar: str, tokenizer: Any) -> Matcher:
        """At the beginning of a text of a grammar, for an ``llguidance.LLTokenizer``."""
        import llguidance

        matcher = llguidance.LLMatcher(tokenizer, grammar, log_level=0)
        if matcher.is_error():
            raise ValueError(f"compiled: expected a grammar of llguidance, got {grammar!r}: {matcher.get_error()}")
        return cls(matcher, Vocabulary(tokenizer.vocab_size, tuple(tokenizer.eos_tokens)))

    def fork(self) -> Matcher:
        return LLGuidance(self.inner.deep_copy(), self.vocabulary)

    def accept(self, token: int) -> bool:
        return bool(self.inner.consume_token(token))

    def may_stop(self) -> bool:
        return bool(self.inner.is_accepting())

    @staticmethod
    def threads() -> Any:
        import llguidance

        return llguidance.LLExecutor()

    @staticmethod
    def fill(threads: Any, matchers: Sequence[Matcher], rows: list[int], words: Words) -> None:
        pairs = [(each.inner, row) for each, row in zip(matchers, rows, strict=True)]
        count, width = words.shape
        threads.unsafe_compute_mask_ptr(pairs, words.ctypes.data, 4 * width, count)


def is_compiled(given: Any) -> bool:
    """Whether it is an ``xgrammar.CompiledGrammar``."""
    return _is(given, "xgrammar", "CompiledGrammar")


def is_tokenizer(given: Any) -> bool:
    """Whether it is an ``llguidance.LLTokenizer``."""
    return _is(given, "llguidance", "LLTokenizer")


def is_tokenizer_info(given: Any) -> bool:
    """Whether it is an ``xgrammar.TokenizerInfo``."""
    return _is(given, "xgrammar", "TokenizerInfo")


def _is(given: Any, library: str, name: str) -> bool:
    # whoever has an object of a library has imported it
    module = sys.modules.get(library)
    return module is not None and isinstance(given, getattr(module, name))
