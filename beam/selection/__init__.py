"""How the next beams are chosen from the candidates of a step."""

from .diverse_groups import DiverseGroups
from .diverse_siblings import DiverseSiblings
from .dynamic_width import DynamicWidth
from .protocol import Decided, Expansion, Ranked, Selection
from .stochastic import Stochastic
from .topk import TopK

__all__ = [
    "Decided",
    "DiverseGroups",
    "DiverseSiblings",
    "DynamicWidth",
    "Expansion",
    "Ranked",
    "Selection",
    "Stochastic",
    "TopK",
]
