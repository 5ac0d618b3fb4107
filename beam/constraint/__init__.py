"""What may be generated."""

from .binding import AllOf, as_constraint, bind
from .protocol import Banks, Bound, Constraint, Context, Proposed

__all__ = ["AllOf", "Banks", "Bound", "Constraint", "Context", "Proposed", "as_constraint", "bind"]
