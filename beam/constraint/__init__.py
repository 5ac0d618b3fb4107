"""What may be generated.

protocol, binding           what a constraint is asked; from settings, shared or per request, to what works in a batch
automaton, trie             the settings; walk: at work; csr, reach, storage: their tables, made, checked and saved
regex, characters, spelling an automaton from a pattern and a vocabulary
phrases, forbidden          the settings; aho_corasick, phrase_automaton, phrase_tables, lookahead: their automata
suffix_veto, suffix_array   no long span of a corpus
grammar, matchers           other libraries' matchers, on the host
copying, ngram, prefix, repetition    a file each; said and token_lists: what they share
"""

from .automaton import Automaton
from .binding import AllOf, as_constraint, bind, runs_on_host
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
    "runs_on_host",
]
