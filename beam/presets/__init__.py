"""Beam search as other libraries do it: their argument names and defaults, their hypotheses and scores.

Each preset returns a :class:`flashbeam.BeamSearch`. They follow transformers 5.24 (and 4.57), fairseq 0.12.2,
CTranslate2 4.8, vLLM 0.33 and T5X; docs/dialects.md says where these differ, with examples. What a library leaves to
chance, which of two equal candidates comes first, follows flashbeam's total order. Where a candidate is barred a
library may carry on with a stand-in of score -1e9; here it does not exist. Arguments that are about running the model
or about a feature of its own are accepted at the value that switches them off and refused otherwise, with what to use
instead.
"""

from .ctranslate2 import ctranslate2
from .fairseq import fairseq
from .huggingface import huggingface
from .t5x import t5x
from .vllm import vllm

__all__ = ["ctranslate2", "fairseq", "huggingface", "t5x", "vllm"]
