"""Automata from regular expressions: their words are what ``re.fullmatch`` matches, no more and no less."""

import itertools
import re

import numpy as np
import pytest
import torch

import flashbeam as fb
from flashbeam.constraint import regex
from flashbeam.constraint.automaton import Automaton
from oracles import TableLM

LETTERS = ["a", "b", "1", " ", "\n", "é", None, ""]
PIECES = ["a", "b", "ab", "ba", "aab", "1", "11", "a1", " ", "\n", "b\n", "é", None, "", "É", "aa"]

PATTERNS = [
    r"",
    r"a",
    r"abba",
    r"a*",
    r"a+b?",
    r"(a|b)*a",
    r"(?:ab|a)(?:b|ba)",
    r"(a*)*b",
    r"(a?){3}",
    r"(a|b){2,4}",
    r"a{0}b",
    r"a{2,}",
    r"a{,2}b",
    r"(?:){5}a",
    r"(|a)+b",
    r"a*?b+?",
    r"[ab]+",
    r"[^ab]+",
    r"[^a]",
    r"[a-c1]*",
    r"[\d\s]+",
    r"[^\w]+",
    r".+",
    r"(?s).+",
    r"(?s:.)b.",
    r"\d+",
    r"\D+",
    r"\w+",
    r"\W+",
    r"\s+a",
    r"\S+",
    r"(?a)\w+",
    r"(?a:\W)a",
    r"(?i)AB|É",
    r"a(?i:B)a",
    r"(?i:a(?-i:é))+",
    r"(?i)[a-b]+",
    r"(?i)[^A]+",
    r"(?x) a  b # said",
    r"^ab$",
    r"\Aab\Z",
    r"(^a|b)+",
    r"a^b|^^a",
    r"a$",
    r"(a$|b)*",
    r"a$\n",
    r"a$\s",
    r"a$.|b",
    r"(?s)a$.|b",
    r"a$\n$",
    r"a$\n\n",
    r"a\Z\n|b\Z$",
    r"a\Z$\n|b",
    r"a$b?",
    r"$^|a",
    r"$\n",
    r"(?P<x>a)(?#comment)b",
    r"(a|ab)(c|bcd)?(d*)",
    r"a\.?|\x61\u0062",
]


def allowed_words(automaton: Automaton, longest: int) -> set[tuple[int, ...]]:
    """Every word of up to ``longest`` tokens, by walking."""
    edges = [
        dict(zip(automaton.tokens[a:b].tolist(), automaton.targets[a:b].tolist(), strict=True))
        for a, b in zip(automaton.indptr[:-1].tolist(), automaton.indptr[1:].tolist(), strict=True)
    ]
    words, front = set(), [((), automaton.start)]
    for _ in range(longest + 1):
        words |= {word for word, state in front if automaton._accepting[state]}
        front = [((*word, token), target) for word, state in front for token, target in edges[state].items()]
    return words


def matching_words(pattern: object, vocabulary: list, longest: int) -> set[tuple[int, ...]]:
    """The same by trying all."""
    matches = re.compile(pattern).fullmatch
    used = [token for token, string in enumerate(vocabulary) if string]
    empty = next(string for string in vocabulary if string)[:0]
    return {
        word
        for n in range(longest + 1)
        for word in itertools.product(used, repeat=n)
        if matches(empty.join(vocabulary[token] for token in word))
    }


def words_of(pattern: object, vocabulary: list, longest: int) -> set[tuple[int, ...]]:
    return allowed_words(Automaton.from_regex(pattern, vocabulary), longest)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_words_are_what_re_matches(pattern: str) -> None:
    try:
        assert words_of(pattern, LETTERS, 4) == matching_words(pattern, LETTERS, 4)
    except ValueError as error:  # no word at all
        assert "none does" in str(error)
        assert not matching_words(pattern, LETTERS, 4)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_tokens_of_several_characters(pattern: str) -> None:
    try:
        assert words_of(pattern, PIECES, 3) == matching_words(pattern, PIECES, 3)
    except ValueError as error:
        assert "none does" in str(error)
        assert not matching_words(pattern, PIECES, 3)


def random_pattern(rng: np.random.Generator, depth: int = 3) -> str:
    """Any nesting of what is supported."""
    leaves = ["a", "b", "1", r"\d", r"\w", ".", "[ab]", "[^b]", r"\s", "^", "$", "", r"\Z"]
    if depth == 0 or rng.random() < 0.2:
        return leaves[rng.integers(len(leaves))]
    kind = rng.integers(4)
    parts = [random_pattern(rng, depth - 1) for _ in range(rng.integers(1, 4))]
    if kind == 0:
        return "".join(parts)
    if kind == 1:
        return "(?:" + "|".join(parts) + ")"
    repeats = ["*", "+", "?", "{2}", "{1,2}", "{0,3}", "{2,}"]
    return f"(?:{parts[0]}){repeats[rng.integers(len(repeats))]}"


@pytest.mark.parametrize("seed", range(60))
def test_random_patterns(seed: int) -> None:
    rng = np.random.default_rng(seed)
    pattern = "".join(random_pattern(rng) for _ in range(3))
    vocabulary = ["a", "b", "1", "\n", "a1", "bb\n"]
    wanted = matching_words(pattern, vocabulary, 4)
    try:
        assert words_of(pattern, vocabulary, 4) == wanted
    except ValueError as error:
        assert "none does" in str(error) and not wanted


@pytest.mark.parametrize("pattern", [b"a+", rb"[\x80-\xff]{2}", rb"(?i)A\x00?", rb"\w+", rb"\W", rb".", rb"(?s)."])
def test_bytes(pattern: bytes) -> None:
    vocabulary = [b"a", b"A", b"\x00", b"\xff", b"\x80\x81", b"\n", None, b"\xc3", b"\xa9"]
    assert words_of(pattern, vocabulary, 3) == matching_words(pattern, vocabulary, 3)


@pytest.mark.parametrize(
    "pattern", ["é+", ".", r"\w{2}", r"[^a]", "[à-ö€]", "(?i)É|\u017f", "[\U00010000-\U0010ffff]", "a$\n|é"]
)
def test_characters_may_be_spread_over_tokens_of_bytes(pattern: str) -> None:
    vocabulary = [
        b"a",
        b"\xc3",
        b"\xa9",
        b"\xc3\xa9",
        b"\xe2\x82",
        b"\xac",
        b"\xf0\x90",
        b"\x80",
        b"\n",
        b"\xed",
        b"\xa0",
    ]

    def matches(word: tuple[int, ...]) -> bool:
        try:
            return re.fullmatch(pattern, b"".join(vocabulary[token] for token in word).decode()) is not None
        except UnicodeDecodeError:
            return False

    words = {w for n in range(5) for w in itertools.product(range(len(vocabulary)), repeat=n) if matches(w)}
    assert words_of(pattern, vocabulary, 4) == words and words


@pytest.mark.parametrize("pattern", [".", "[^é]", "[\x7f-\uffff]", r"[^\W\d_]"])
def test_every_character_in_utf8(pattern: str) -> None:
    dfa = regex.compile_pattern(pattern, True)
    characters = [chr(c) for c in range(0x110000) if not 0xD800 <= c <= 0xDFFF]
    lengths = np.array([1 + (c >= 0x80) + (c >= 0x800) + (c >= 0x10000) for c in map(ord, characters)])
    data = np.frombuffer("".join(characters).encode(), np.uint8)
    kinds = dfa.kinds[np.searchsorted(dfa.bounds, data, side="right") - 1]
    state, begins = np.zeros(len(characters), np.int64), np.cumsum(lengths) - lengths
    for n in range(4):
        goes_on = np.flatnonzero((lengths > n) & (state >= 0))
        state[goes_on] = dfa.table[state[goes_on], kinds[begins[goes_on] + n]]
    accepted = (state >= 0) & dfa.accepting[state]
    single = re.compile(pattern).fullmatch
    assert accepted.tolist() == [single(character) is not None for character in characters]


def test_compiled_patterns_keep_their_flags() -> None:
    pattern = re.compile("a.", re.IGNORECASE | re.DOTALL)
    assert words_of(pattern, ["a", "A", "\n", "b"], 3) == matching_words(pattern, ["a", "A", "\n", "b"], 3)


def test_states_that_accept_the_same_are_one() -> None:
    automaton = Automaton.from_regex(r"(?:foo|bar|fob|bao)*", list("abfor"))
    assert len(automaton.indptr) - 1 == 5
    unbounded = Automaton.from_regex(".*", list("ab"))
    assert len(unbounded.indptr) - 1 == 1


def test_what_cannot_be_spelled_is_no_state() -> None:
    automaton = Automaton.from_regex(r"ab|ac|xyz1*", ["a", "b", "x", "y", "xx", "1"])
    assert allowed_words(automaton, 3) == {(0, 1)}
    assert len(automaton.indptr) - 1 == 3 and len(automaton.tokens) == 2


def test_surrogates_are_characters_of_str() -> None:
    assert words_of(".", ["a", "\ud800", "a\udfff"], 2) == {(0,), (1,)}


def test_many_states_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    from flashbeam.constraint import spelling

    wanted = words_of(r"(a|b){1,3}1*", PIECES, 3)
    monkeypatch.setattr(spelling, "_AT_ONCE", 1)
    assert words_of(r"(a|b){1,3}1*", PIECES, 3) == wanted


@pytest.mark.parametrize(
    ("pattern", "vocabulary", "error", "message"),
    [
        (r"(a)\1", ["a"], ValueError, "pattern: expected a regular one .*, got groupref"),
        (r"(?=a)a", ["a"], ValueError, "pattern: expected a regular one .*, got assert"),
        (r"(?!b)a", ["a"], ValueError, "pattern: expected a regular one .*, got assert_not"),
        (r"(?<=b)a", ["a"], ValueError, "pattern: expected a regular one .*, got assert"),
        (r"(a)?(?(1)a|b)", ["a"], ValueError, "pattern: expected a regular one .*, got groupref_exists"),
        (r"\ba", ["a"], ValueError, "pattern: expected a regular one .*, got at_boundary"),
        (r"(?m)^a", ["a"], ValueError, "pattern: expected a regular one .*, got at_beginning"),
        (r"(?m)a$", ["a"], ValueError, "pattern: expected a regular one .*, got at_end"),
        (b"(?L)a", [b"a"], ValueError, "pattern: expected one that depends on no locale"),
        (r"(a", ["a"], ValueError, r"pattern: expected a regular expression, got '\(a': missing"),
        (r"b", ["a"], ValueError, "pattern: expected one that some sequence of tokens matches"),
        (b"a", ["a"], TypeError, "pattern: expected str, as the vocabulary is, got bytes"),
        (3, ["a"], TypeError, "pattern: expected str, bytes or a compiled pattern, got int"),
        ("a", "abc", TypeError, "vocabulary: expected a list of strings, got str"),
        ("a", {"a": 0}, TypeError, "vocabulary: expected a list of strings, got dict"),
        ("a", ["a", b"a"], TypeError, "vocabulary: expected strings, all str or all bytes, or None, got bytes, str"),
        ("a", ["a", 3], TypeError, "vocabulary: expected strings, all str or all bytes, or None, got int, str"),
        ("a", [None], ValueError, "vocabulary: expected at least one string, got none"),
    ],
)
def test_rejects(pattern: object, vocabulary: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Automaton.from_regex(pattern, vocabulary)


@pytest.mark.parametrize("pattern", [r"a{1001}", r"(?:(?:a{10}){10}){11}", r"(a|b)*a(a|b){20}"])
def test_rejects_patterns_of_too_many_states(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regex, "MOST_STATES", 1000)
    with pytest.raises(ValueError, match="pattern: expected one of at most 1000 states, got more"):
        Automaton.from_regex(pattern, ["a", "b"])


@pytest.mark.skipif(not hasattr(re, "NOFLAG"), reason="atomic groups came with Python 3.11")
@pytest.mark.parametrize("pattern", [r"(?>a*)b", r"a*+b"])
def test_rejects_atomic(pattern: str) -> None:
    with pytest.raises(ValueError, match="pattern: expected a regular one"):
        Automaton.from_regex(pattern, ["a", "b"])


def test_a_wide_search_returns_the_language() -> None:
    vocabulary = ["a", "b", None, "ab", "1", "!"]
    pattern = r"a(b|1){0,2}!?"
    beams = fb.BeamSearch(
        64,
        4,
        eos_id=2,
        length_penalty=0,
        stopping=fb.Exhausted(),
        constraint=Automaton.from_regex(pattern, vocabulary),
    )
    hyps = fb.decode(beams, TableLM(len(vocabulary)), torch.tensor([5]))
    rows = zip(hyps.tokens[0].tolist(), hyps.lengths[0].tolist(), strict=True)
    said = {tuple(token for token in tokens[:n] if token != 2) for tokens, n in rows if n}
    assert said == matching_words(pattern, vocabulary, 4)
