"""The operations of flashbeam, each usable alone: one torch definition, one Triton kernel, one public function.

A CPU tensor runs the torch definition, a CUDA tensor the kernel; the results are equal (docs/numerics.md).
"""

from .advance_chosen import Choice, advance_chosen_
from .advance_in_place import advance_in_place_
from .advance_pool import advance_pool_
from .automaton import Edges, follow, listed_bitmask
from .beamstate import (
    FLAG_DEAD_END,
    FLAG_INEXACT,
    Draws,
    Endings,
    History,
    Limits,
    Moves,
    Pool,
    Requests,
    Rule,
    Slots,
    endings,
    next_length,
    total_order,
)
from .bitmask import apply_bitmask_, bits_at, mark_bits, pack_bitmask, unpack_bitmask
from .checks import check_all_apart
from .contrast import contrast
from .divergence import divergence
from .draw import Drawn, draw_children
from .entropy import row_entropy
from .filters import filter_bitmask
from .history import backtrace, trace_slots, update_ancestry
from .invert import Inverted, invert_cdf
from .keys import adjust, pack_key, token_log_prob
from .listed import Listed, summarize_listed, top_listed
from .lse import FLAG_INF, FLAG_NAN
from .mixture import mixture
from .opaque import exp, settled
from .poisson import PoissonSample, conditional_poisson
from .random import Stream, child_nodes, gumbel, random_bits, random_codes, root_nodes, uniforms
from .reorder import check_reorder, reorder
from .sample import Sampled, sample
from .select import Candidates, top_candidates
from .summary import Summary, summarize
from .symmetric import log_odds
from .tiles import Tiles, place
from .topk import Selected, TopK, select_beams, topk_log_probs
from .urn import draw_distinct

__all__ = [
    "FLAG_DEAD_END",
    "FLAG_INEXACT",
    "FLAG_INF",
    "FLAG_NAN",
    "Candidates",
    "Choice",
    "Drawn",
    "Draws",
    "Edges",
    "Endings",
    "History",
    "Inverted",
    "Limits",
    "Listed",
    "Moves",
    "PoissonSample",
    "Pool",
    "Requests",
    "Rule",
    "Sampled",
    "Selected",
    "Slots",
    "Stream",
    "Summary",
    "Tiles",
    "TopK",
    "adjust",
    "advance_chosen_",
    "advance_in_place_",
    "advance_pool_",
    "apply_bitmask_",
    "backtrace",
    "bits_at",
    "check_all_apart",
    "check_reorder",
    "child_nodes",
    "conditional_poisson",
    "contrast",
    "divergence",
    "draw_children",
    "draw_distinct",
    "endings",
    "exp",
    "filter_bitmask",
    "follow",
    "gumbel",
    "invert_cdf",
    "listed_bitmask",
    "log_odds",
    "mark_bits",
    "mixture",
    "next_length",
    "pack_bitmask",
    "pack_key",
    "place",
    "random_bits",
    "random_codes",
    "reorder",
    "root_nodes",
    "row_entropy",
    "sample",
    "select_beams",
    "settled",
    "summarize",
    "summarize_listed",
    "token_log_prob",
    "top_candidates",
    "top_listed",
    "topk_log_probs",
    "total_order",
    "trace_slots",
    "uniforms",
    "unpack_bitmask",
    "update_ancestry",
]
