"""How a hypothesis is scored: its log-probability over a norm of its length, and terms that are added."""

from .coverage import Coverage
from .length import GNMT, LengthPower, NormTables, Scoring, as_scoring, check_norms, norm_tables
from .protocol import Seen, Term
from .rewards import TokenReward, WordReward
from .terms import Terms
from .uid import UID

__all__ = [
    "GNMT",
    "UID",
    "Coverage",
    "LengthPower",
    "NormTables",
    "Scoring",
    "Seen",
    "Term",
    "Terms",
    "TokenReward",
    "WordReward",
    "as_scoring",
    "check_norms",
    "norm_tables",
]
