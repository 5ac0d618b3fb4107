"""What may be generated."""

from .automaton import Automaton
from .binding import AllOf, as_constraint, bind
from .copying import Copy
from .forbidden import ForbiddenPhrases
from .grammar import Grammar
from .ngram import NoRepeatNgram
from .phrases import Phrases
from .prefix import Prefix
from .protocol import Banks, Bound, Constraint, Context, Proposed
from .repetition import RepetitionPenalty
from .suffix_veto import SuffixVeto
from .trie import Trie

__all__ = [
    "AllOf",
    "Automaton",
    "Banks",
    "Bound",
    "Constraint",
    "Context",
    "Copy",
    "ForbiddenPhrases",
    "Grammar",
    "NoRepeatNgram",
    "Phrases",
    "Prefix",
    "Proposed",
    "RepetitionPenalty",
    "SuffixVeto",
    "Trie",
    "as_constraint",
    "bind",
]
