"""flashbeam: batched beam search for people who own their inference loop."""

from flashbeam.kernels import FLAG_DEAD_END, FLAG_INEXACT, FLAG_INF, FLAG_NAN

from . import presets
from .budget import Budget
from .cache import reorder
from .capture import Captured
from .constraint import (
    AllOf,
    Automaton,
    Copy,
    ForbiddenPhrases,
    Grammar,
    NoRepeatNgram,
    Phrases,
    Prefix,
    RepetitionPenalty,
    SuffixVeto,
    Trie,
)
from .decode import decode
from .dialect import Dialect
from .estimate import estimate, weights
from .hypotheses import Hypotheses
from .lattice import Lattice, lattice
from .models import Contrast, Mixture, Switch
from .noise import Noised, noise
from .p_exact import PExact, p_exact
from .scoring import GNMT, UID, Coverage, LengthPower, TokenReward, WordReward
from .search import BeamSearch, Step
from .selection import (
    Arithmetic,
    ConditionalPoisson,
    DiverseGroups,
    DiverseSiblings,
    DynamicWidth,
    Sample,
    Stochastic,
    TopK,
)
from .state import State
from .statistics import Statistics
from .stopping import BestFinished, BestLive, Exact, Exhausted, Filled, FirstFinished, Patience, Shrinking

__version__ = "0.1.0"

__all__ = [
    "FLAG_DEAD_END",
    "FLAG_INEXACT",
    "FLAG_INF",
    "FLAG_NAN",
    "GNMT",
    "UID",
    "AllOf",
    "Arithmetic",
    "Automaton",
    "BeamSearch",
    "BestFinished",
    "BestLive",
    "Budget",
    "Captured",
    "ConditionalPoisson",
    "Contrast",
    "Copy",
    "Coverage",
    "Dialect",
    "DiverseGroups",
    "DiverseSiblings",
    "DynamicWidth",
    "Exact",
    "Exhausted",
    "Filled",
    "FirstFinished",
    "ForbiddenPhrases",
    "Grammar",
    "Hypotheses",
    "Lattice",
    "LengthPower",
    "Mixture",
    "NoRepeatNgram",
    "Noised",
    "PExact",
    "Patience",
    "Phrases",
    "Prefix",
    "RepetitionPenalty",
    "Sample",
    "Shrinking",
    "State",
    "Statistics",
    "Step",
    "Stochastic",
    "SuffixVeto",
    "Switch",
    "TokenReward",
    "TopK",
    "Trie",
    "WordReward",
    "decode",
    "estimate",
    "lattice",
    "noise",
    "p_exact",
    "presets",
    "reorder",
    "weights",
]
