"""What may be generated."""

from .automaton import Automaton
from .binding import AllOf, as_constraint, bind
from .forbidden import ForbiddenPhrases
from .ngram import NoRepeatNgram
from .phrases import Phrases
from .prefix import Prefix
from .protocol import Banks, Bound, Constraint, Context, Proposed
from .repetition import RepetitionPenalty
from .trie import Trie

__all__ = [
    "AllOf",
    "Automaton",
    "Banks",
    "Bound",
    "Constraint",
    "Context",
    "ForbiddenPhrases",
    "NoRepeatNgram",
    "Phrases",
    "Prefix",
    "Proposed",
    "RepetitionPenalty",
    "Trie",
    "as_constraint",
    "bind",
]
