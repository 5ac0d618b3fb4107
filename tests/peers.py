"""The same search by Hugging Face's ``generate`` and by flashbeam: one tiny random GPT-2, one list of items."""

import inspect
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers import GPT2Config, GPT2LMHeadModel, logging

import flashbeam as fb

# a prompt of one token needs no attention mask, but its continuations hold padding
logging.set_verbosity_error()
# its name from transformers 5.21 on, and before
CACHE = next(
    name for name in ("cache", "past_key_values") if name in inspect.signature(GPT2LMHeadModel.forward).parameters
)
Item = tuple[int, ...]


def model(vocab: int, seed: int = 0, width: int = 32) -> GPT2LMHeadModel:
    """BOS, EOS and padding are the last three tokens."""
    ids = {"bos_token_id": vocab - 3, "eos_token_id": vocab - 2, "pad_token_id": vocab - 1}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        size = {"n_positions": 32, "n_embd": width, "n_layer": 1, "n_head": 2, "initializer_range": 0.5}
        return GPT2LMHeadModel(GPT2Config(vocab_size=vocab, **ids, **size)).eval()


def random_items(count: int, vocab: int, shortest: int = 3, longest: int = 3, seed: int = 0) -> list[Item]:
    generator = torch.Generator().manual_seed(seed)
    items: set[Item] = set()
    while len(items) < count:
        length = int(torch.randint(shortest, longest + 1, (), generator=generator))
        items.add(tuple(torch.randint(0, vocab - 3, (length,), generator=generator).tolist()))
    return sorted(items)


def trie_as_dict(items: list[Item], eos: int):
    """A ``prefix_allowed_tokens_fn``, the usual way: the tokens that may follow each prefix. Items are sorted."""
    follow: dict[Item, list[int]] = {}
    for item in items:
        for end, token in enumerate((*item, eos)):
            tokens = follow.setdefault(item[:end], [])
            if token not in tokens[-1:]:
                tokens.append(token)
    return lambda request, tokens: follow.get(tuple(tokens[1:].tolist()), [eos])


def by_generate(lm: GPT2LMHeadModel, allowed, beams: int, max_length: int, batch: int = 1, **options):
    """Hugging Face's n-best: what ``generate`` returns."""
    prompts = torch.full((batch, 1), lm.config.bos_token_id)
    options = {"length_penalty": 0.0, "early_stopping": True, **options}
    return lm.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        do_sample=False,
        num_beams=beams,
        num_return_sequences=beams,
        max_new_tokens=max_length,
        prefix_allowed_tokens_fn=allowed,
        output_scores=True,
        return_dict_in_generate=True,
        **options,
    )


@torch.inference_mode()
def by_flashbeam(lm: GPT2LMHeadModel, constraint, beams: int, max_length: int, batch: int = 1, **options):
    """flashbeam's n-best, with Hugging Face's cache."""
    config = lm.config
    options = {"length_penalty": 0, "pad_id": config.pad_token_id, **options}
    search = fb.BeamSearch(beams, max_length, config.eos_token_id, constraint=constraint, **options)
    state = search.init(batch)
    out = lm(torch.full((batch, 1), config.bos_token_id), use_cache=True)
    while True:
        step = search.step(state, out.logits[:, -1])
        if state.all_done():
            return search.finalize(state)
        cache = out[CACHE]
        cache.reorder_cache(step.source_rows)
        out = lm(step.tokens.view(-1, 1), use_cache=True, **{CACHE: cache})


@torch.inference_mode()
def forwards_alone(lm: GPT2LMHeadModel, beams: int, steps: int, batch: int = 1) -> None:
    """What both spend on the model: its forward passes, and no search."""
    out = lm(torch.full((batch, 1), lm.config.bos_token_id), use_cache=True)
    rows = torch.arange(batch).repeat_interleave(beams)
    for _ in range(steps - 1):
        cache = out[CACHE]
        cache.reorder_cache(rows)
        rows = torch.arange(batch * beams)
        out = lm(torch.zeros(batch * beams, 1, dtype=torch.int64), use_cache=True, **{CACHE: cache})
