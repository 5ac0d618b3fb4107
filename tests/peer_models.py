"""Tiny random networks for peers and flashbeam alike: five seeds of four shapes, each prompt a request of one batch.

A ``Lookup`` remembers the logits of every prefix, so that a grid of settings costs few forward passes. Hugging Face's
``generate`` runs on a model that looks them up; CTranslate2 runs the networks itself, converted.
"""

import os
from typing import NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from torch import Tensor
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    GenerationMixin,
    GPT2Config,
    GPT2LMHeadModel,
    PretrainedConfig,
    PreTrainedModel,
    logging,
)
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput, Seq2SeqLMOutput

logging.set_verbosity_error()

START, PAD, EOS, UNK = 0, 1, 2, 3
SEEDS, PROMPTS = 5, 2
Tokens = tuple[int, ...]


class Shape(NamedTuple):
    encoder: bool
    vocab: int
    width: int
    prompt: int  # tokens of a prompt or a source

    def __str__(self) -> str:
        return f"{'encoder-decoder' if self.encoder else 'decoder-only'}-{self.vocab}x{self.width}"


SHAPES = [Shape(False, 10, 16, 2), Shape(False, 19, 32, 1), Shape(True, 12, 16, 3), Shape(True, 16, 32, 2)]


def network(shape: Shape, seed: int) -> GPT2LMHeadModel | BartForConditionalGeneration:
    ids = {"bos_token_id": START, "pad_token_id": PAD, "eos_token_id": EOS}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if not shape.encoder:
            size = {"n_positions": 32, "n_embd": shape.width, "n_layer": 1, "n_head": 2, "initializer_range": 0.7}
            net = GPT2LMHeadModel(GPT2Config(vocab_size=shape.vocab, **ids, **size)).eval()
            return _inclined_to_end(net, net.transformer.ln_f, shape.width)
        sides = ({f"{side}_layers": 1, f"{side}_attention_heads": 2} for side in ("encoder", "decoder"))
        size = {
            "d_model": shape.width,
            "encoder_ffn_dim": 16,
            "decoder_ffn_dim": 16,
            "init_std": 0.7,
            "max_position_embeddings": 32,
        }
        config = BartConfig(
            vocab_size=shape.vocab, decoder_start_token_id=START, **ids, **size, **next(sides), **next(sides)
        )
        net = BartForConditionalGeneration(config).eval()
        return _inclined_to_end(net, net.model.decoder.layers[-1].final_layer_norm, shape.width)


def _inclined_to_end(net: PreTrainedModel, last_norm: torch.nn.LayerNorm, width: int) -> PreTrainedModel:
    """The logit of EOS raised so that about half of all hypotheses end, by the last bias that every library has."""
    towards = net.get_output_embeddings().weight.detach()[EOS]
    last_norm.bias.data += width / 8 * towards / towards.square().sum()
    return net


class Lookup:
    """The logits of B requests, ``SEEDS * PROMPTS``; request b is prompt ``b % PROMPTS`` of seed ``b // PROMPTS``."""

    def __init__(self, shape: Shape):
        self.shape, self.networks = shape, [network(shape, seed) for seed in range(SEEDS)]
        rng = np.random.default_rng([shape.vocab, shape.width])
        self.prompts = rng.integers(4, shape.vocab, (SEEDS * PROMPTS, shape.prompt)).tolist()
        self.seen: dict[tuple[int, Tokens], np.ndarray] = {}  # request and what it generated, to float32 [V]

    def rows(self, requests: list[int], prefixes: list[Tokens]) -> Tensor:
        """float32 ``[R, V]``. The prefixes are of one length."""
        keys = list(zip(requests, prefixes, strict=True))
        for seed, net in enumerate(self.networks):
            missing = sorted({key for key in keys if key[0] // PROMPTS == seed and key not in self.seen})
            if missing:
                with torch.inference_mode():
                    logits = self._run(net, [self.prompts[b] for b, _ in missing], [list(y) for _, y in missing])
                self.seen.update(zip(missing, logits.numpy(), strict=True))
        return torch.from_numpy(np.stack([self.seen[key] for key in keys]))

    def _run(self, net: PreTrainedModel, prompts: list[list[int]], prefixes: list[list[int]]) -> Tensor:
        if self.shape.encoder:
            decoder = torch.tensor([[START, *prefix] for prefix in prefixes])
            return net(input_ids=torch.tensor(prompts), decoder_input_ids=decoder, use_cache=False).logits[:, -1]
        tokens = torch.tensor([prompt + prefix for prompt, prefix in zip(prompts, prefixes, strict=True)])
        return net(tokens, use_cache=False).logits[:, -1]

    def log_probs(self, request: int, prefix: Tokens) -> np.ndarray:
        """float64 ``[V]``."""
        return torch.log_softmax(self.rows([request], [prefix])[0].double(), 0).numpy()

    def __call__(self, tokens: Tensor, cache: dict[str, Tensor] | None) -> tuple[Tensor, dict[str, Tensor]]:
        """For ``fb.decode``, whose first tokens are the requests' numbers."""
        if cache is None:
            cache = {"request": tokens, "prefix": torch.zeros(len(tokens), 0, dtype=torch.int64)}
        else:
            cache = {"request": cache["request"], "prefix": torch.cat([cache["prefix"], tokens[:, None]], 1)}
        return self.rows(cache["request"].tolist(), [tuple(y) for y in cache["prefix"].tolist()]), cache


# ---------------------------------------------------------------------------------------------------------------------
# transformers


class _Config(PretrainedConfig):
    model_type = "lookup"


class _Encoder(torch.nn.Module):
    main_input_name = "input_ids"

    def forward(self, input_ids: Tensor, **_: object) -> BaseModelOutput:
        return BaseModelOutput(last_hidden_state=input_ids[..., None].float())


class LookupModel(PreTrainedModel, GenerationMixin):
    """A model for ``generate`` whose prompt, of any length, says nothing but the request's number."""

    config_class = _Config

    def __init__(self, lookup: Lookup):
        super().__init__(_Config(is_encoder_decoder=lookup.shape.encoder, vocab_size=lookup.shape.vocab))
        self.lookup, self.weight = lookup, torch.nn.Parameter(torch.zeros(1))

    def get_encoder(self, *_: object, **__: object) -> _Encoder:
        return _Encoder()

    def prepare_inputs_for_generation(self, input_ids: Tensor, encoder_outputs=None, **kwargs):
        return {"input_ids": input_ids, "encoder_outputs": encoder_outputs}

    def forward(self, input_ids: Tensor, attention_mask=None, encoder_outputs=None, **kwargs):
        if encoder_outputs is None:
            requests, prefixes = input_ids[:, 0], input_ids[:, self.lookup.shape.prompt :]
            output = CausalLMOutput
        else:
            requests, prefixes = encoder_outputs[0][:, 0, 0].long(), input_ids[:, 1:]
            output = Seq2SeqLMOutput
        return output(logits=self.lookup.rows(requests.tolist(), [tuple(y) for y in prefixes.tolist()])[:, None])

    def n_best(self, **options) -> list[list[tuple]]:
        """What ``generate`` returns for every request: tokens up to EOS, and scores where there is more than a beam."""
        prompts = torch.arange(SEEDS * PROMPTS)[:, None].repeat(1, self.lookup.shape.prompt)
        start = {"decoder_start_token_id": START} if self.lookup.shape.encoder else {}
        beams = options["num_beams"]
        out = self.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            do_sample=False,
            use_cache=False,
            num_return_sequences=beams,
            output_scores=True,
            return_dict_in_generate=True,
            **start,
            **options,
        )
        begin = 1 if self.lookup.shape.encoder else self.lookup.shape.prompt
        hypotheses = [until(tokens, options["eos_token_id"]) for tokens in out.sequences[:, begin:].tolist()]
        if beams == 1:  # greedy decoding reports no score
            return [[(tokens,)] for tokens in hypotheses]
        found = list(zip(hypotheses, out.sequences_scores.tolist(), strict=True))
        return [found[b : b + beams] for b in range(0, len(found), beams)]


def until(tokens: list[int], eos: int | list[int]) -> Tokens:
    """The tokens up to the first EOS, that included; all where there is none."""
    ends = [eos] if isinstance(eos, int) else eos
    return tuple(tokens[: next((i + 1 for i, token in enumerate(tokens) if token in ends), len(tokens))])


# ---------------------------------------------------------------------------------------------------------------------
# CTranslate2


def translators(lookup: Lookup, folder) -> list:
    """The networks of a lookup as CTranslate2's, one for each seed. Token 7 is called ``t7``."""
    import ctranslate2
    from ctranslate2.converters import transformers as converters

    names = [f"t{token}" for token in range(lookup.shape.vocab)]
    found = []
    for seed, net in enumerate(lookup.networks):
        if lookup.shape.encoder:
            net.config.normalize_before, net.config.normalize_embedding = False, True  # transformers 5 has dropped them
            spec = converters.BartLoader().get_model_spec(net)
            spec.register_source_vocabulary(names)
            spec.register_target_vocabulary(names)
            spec.config.decoder_start_token, spec.config.add_source_eos = names[START], False
        else:
            spec = converters.GPT2Loader().get_model_spec(net)
            spec.register_vocabulary(names)
        spec.config.bos_token, spec.config.eos_token, spec.config.unk_token = (names[i] for i in (START, EOS, UNK))
        spec.validate()
        spec.optimize()
        (path := folder / str(seed)).mkdir()
        spec.save(str(path))
        kind = ctranslate2.Translator if lookup.shape.encoder else ctranslate2.Generator
        found.append(kind(str(path), compute_type="float32", inter_threads=1, intra_threads=1))
    return found


def by_ctranslate2(lookup: Lookup, nets: list, **options) -> list[list[tuple[Tokens, float]]]:
    """The n-best of every request, in Generator's argument names."""
    found = []
    for seed, net in enumerate(nets):
        prompts = [[f"t{i}" for i in prompt] for prompt in lookup.prompts[seed * PROMPTS : (seed + 1) * PROMPTS]]
        if lookup.shape.encoder:
            given = dict(options)
            lengths = {"max_decoding_length": given.pop("max_length"), "min_decoding_length": given.pop("min_length")}
            results = net.translate_batch(prompts, return_scores=True, **lengths, **given)
            found += [
                [(tuple(int(t[1:]) for t in y), score) for y, score in zip(r.hypotheses, r.scores, strict=True)]
                for r in results
            ]
        else:
            results = net.generate_batch(prompts, return_scores=True, include_prompt_in_result=False, **options)
            found += [[(tuple(y), score) for y, score in zip(r.sequences_ids, r.scores, strict=True)] for r in results]
    return found
