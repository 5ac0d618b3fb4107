"""What a search explored, and pictures of it."""

from .lattice import Lattice, lattice
from .tree import Path, Status, Steps, Tree

__all__ = ["Lattice", "Path", "Status", "Steps", "Tree", "lattice"]
