"""How the next beams are chosen from the candidates of a step."""

from .arithmetic import Arithmetic
from .conditional_poisson import ConditionalPoisson
from .diverse_groups import DiverseGroups
from .diverse_siblings import DiverseSiblings
from .dynamic_width import DynamicWidth
from .protocol import Decided, Expansion, Ranked, Selection, Veto
from .sample import Sample
from .stochastic import Stochastic
from .topk import TopK

__all__ = [
    "Arithmetic",
    "ConditionalPoisson",
    "Decided",
    "DiverseGroups",
    "DiverseSiblings",
    "DynamicWidth",
    "Expansion",
    "Ranked",
    "Sample",
    "Selection",
    "Stochastic",
    "TopK",
    "Veto",
]
