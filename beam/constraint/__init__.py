"""What may be generated."""

from .automaton import Automaton
from .binding import AllOf, as_constraint, bind
from .ngram import NoRepeatNgram
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
    "NoRepeatNgram",
    "Prefix",
    "Proposed",
    "RepetitionPenalty",
    "Trie",
    "as_constraint",
    "bind",
]
