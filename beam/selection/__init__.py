"""How the next beams are chosen from the candidates of a step."""

from .protocol import Expansion, Selection
from .topk import TopK

__all__ = ["Expansion", "Selection", "TopK"]
