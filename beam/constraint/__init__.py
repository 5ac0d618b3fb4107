"""What may be generated."""

from .protocol import Constraint

__all__ = ["Constraint"]
