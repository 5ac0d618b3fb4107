"""The operations of flashbeam, each usable alone: one torch definition, one Triton kernel, one public function.

A CPU tensor runs the torch definition, a CUDA tensor the kernel; the results are equal (docs/numerics.md).
"""

from .advance_in_place import advance_in_place_
from .advance_pool import advance_pool_
from .beamstate import FLAG_DEAD_END, History, Limits, Moves, Pool, Requests, Slots
from .bitmask import apply_bitmask_, pack_bitmask, unpack_bitmask
from .history import backtrace, trace_slots, update_ancestry
from .lse import FLAG_INF, FLAG_NAN
from .reorder import check_reorder, reorder
from .select import Candidates, top_candidates
from .summary import Summary, Tiles, summarize
from .topk import Selected, TopK, select_beams, topk_log_probs

__all__ = [
    "FLAG_DEAD_END",
    "FLAG_INF",
    "FLAG_NAN",
    "Candidates",
    "History",
    "Limits",
    "Moves",
    "Pool",
    "Requests",
    "Selected",
    "Slots",
    "Summary",
    "Tiles",
    "TopK",
    "advance_in_place_",
    "advance_pool_",
    "apply_bitmask_",
    "backtrace",
    "check_reorder",
    "pack_bitmask",
    "reorder",
    "select_beams",
    "summarize",
    "top_candidates",
    "topk_log_probs",
    "trace_slots",
    "unpack_bitmask",
    "update_ancestry",
]
