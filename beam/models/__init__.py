"""Several models in one search: how their logits become the rows that are searched."""

from .contrast import Contrast
from .mixture import Mixture
from .protocol import Combined, Given, Models
from .switch import Switch

__all__ = ["Combined", "Contrast", "Given", "Mixture", "Models", "Switch"]
