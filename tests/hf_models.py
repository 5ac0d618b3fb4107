"""Tiny models of transformers with random weights, and what a hypothesis is worth without any cache."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from transformers import logging

logging.set_verbosity_error()

VOCAB, BOS, EOS, PAD = 40, 1, 2, 3
TOKENS = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD, "vocab_size": VOCAB}
LLAMA = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.5,
    **TOKENS,
}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 4}
BART = {
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": 64,
    "decoder_start_token_id": EOS,
    "forced_eos_token_id": None,
    "init_std": 0.5,
    **TOKENS,
}
# architecture: (config class, model class, what the config says)
MODELS = {
    "gpt2": (
        "GPT2Config",
        "GPT2LMHeadModel",
        {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "initializer_range": 0.5, **TOKENS},
    ),
    "llama": ("LlamaConfig", "LlamaForCausalLM", LLAMA),
    "mistral": ("MistralConfig", "MistralForCausalLM", {**LLAMA, "sliding_window": 4}),
    "mamba": ("MambaConfig", "MambaForCausalLM", {**LLAMA, "state_size": 8, "expand": 2}),
    "bamba": ("BambaConfig", "BambaForCausalLM", {**LLAMA, **MAMBA, "attn_layer_indices": [1]}),
    "recurrent_gemma": (
        "RecurrentGemmaConfig",
        "RecurrentGemmaForCausalLM",
        {**LLAMA, "lru_width": 16, "attention_window_size": 4, "num_hidden_layers": 3},
    ),
    "rwkv": (
        "RwkvConfig",
        "RwkvForCausalLM",
        {"hidden_size": 16, "num_hidden_layers": 2, "context_length": 64, **TOKENS},
    ),
    "minimax": (
        "MiniMaxConfig",
        "MiniMaxForCausalLM",
        {
            **LLAMA,
            "layer_types": ["linear_attention", "full_attention"],
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "block_size": 4,
        },
    ),
    "t5": (
        "T5Config",
        "T5ForConditionalGeneration",
        {
            "d_model": 16,
            "d_kv": 8,
            "d_ff": 24,
            "num_layers": 2,
            "num_heads": 2,
            "initializer_factor": 4.0,
            **TOKENS,
            "pad_token_id": 0,
            "decoder_start_token_id": 0,
        },
    ),
    "bart": ("BartConfig", "BartForConditionalGeneration", BART),
    "whisper": (
        "WhisperConfig",
        "WhisperForConditionalGeneration",
        {
            **BART,
            "num_mel_bins": 4,
            "max_source_positions": 8,
            "max_target_positions": 32,
            "suppress_tokens": None,
            "begin_suppress_tokens": None,
        },
    ),
}


def model(name: str, seed: int = 0):
    config, kind, settings = MODELS[name]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return getattr(transformers, kind)(getattr(transformers, config)(**settings)).eval()


def inputs(name: str):
    """Two requests of different lengths, padded as the model wants it."""
    if name == "whisper":
        return {"input_features": torch.randn(2, 4, 16, generator=torch.Generator().manual_seed(0))}
    if name in ("t5", "bart"):
        pad = 0 if name == "t5" else PAD
        ids = torch.tensor([[7, 8, 9, 10], [5, 6, pad, pad]])
        return {"input_ids": ids, "attention_mask": (ids != pad).long()}
    ids = torch.tensor([[7, 8, 9, 10], [PAD, PAD, 5, 6]])
    return {"input_ids": ids, "attention_mask": (ids != PAD).long()}


@torch.no_grad()
def log_probs(lm, given, request: int, tokens) -> torch.Tensor:
    """Log-probabilities of ``tokens [T]`` behind a request's prompt, by one pass without a cache."""
    if lm.config.is_encoder_decoder:
        start = torch.cat([torch.tensor([lm.config.decoder_start_token_id]), tokens])[None]
        one = {name: value[request : request + 1] for name, value in given.items()}
        logits = lm(**one, decoder_input_ids=start, use_cache=False).logits[0, :-1]
    else:
        prompt = given["input_ids"][request][given["attention_mask"][request].bool()]
        logits = lm(torch.cat([prompt, tokens])[None], use_cache=False).logits[0, len(prompt) - 1 : -1]
    return logits.float().log_softmax(-1).gather(1, tokens[:, None])[:, 0]


def check_scores(lm, given, hyps, tolerance: float = 1e-4) -> None:
    """Every hypothesis has the log-probabilities that the model gives it."""
    assert hyps.valid.any(1).all()
    for request, place in hyps.valid.nonzero().tolist():
        tokens = hyps.tokens[request, place, : hyps.lengths[request, place]]
        found = hyps.token_log_probs[request, place, : len(tokens)]
        torch.testing.assert_close(found, log_probs(lm, given, request, tokens), rtol=tolerance, atol=tolerance)
