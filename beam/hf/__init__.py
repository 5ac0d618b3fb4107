"""flashbeam for models of Hugging Face's transformers, 4.57 to 5.x.

    model.generate(**inputs, num_beams=4, custom_generate=flashbeam.hf.generate)
    flashbeam.hf.beam_search(model, inputs, fb.BeamSearch(...))

Needs transformers, which ``import flashbeam`` does not.
"""

from .generate import generate
from .search import beam_search
from .streaming import BestStreamer

__all__ = ["BestStreamer", "beam_search", "generate"]
