"""flashbeam: batched beam search for people who own their inference loop."""

from flashbeam.kernels import FLAG_DEAD_END, FLAG_INF, FLAG_NAN

from .cache import reorder
from .decode import decode
from .hypotheses import Hypotheses
from .scoring import GNMT
from .search import BeamSearch, Step
from .selection import DiverseGroups, DiverseSiblings, DynamicWidth, Stochastic, TopK
from .state import State
from .stopping import Exact, Exhausted, FirstFinished, Patience

__version__ = "0.1.0"

__all__ = [
    "FLAG_DEAD_END",
    "FLAG_INF",
    "FLAG_NAN",
    "GNMT",
    "BeamSearch",
    "DiverseGroups",
    "DiverseSiblings",
    "DynamicWidth",
    "Exact",
    "Exhausted",
    "FirstFinished",
    "Hypotheses",
    "Patience",
    "State",
    "Step",
    "Stochastic",
    "TopK",
    "decode",
    "reorder",
]
