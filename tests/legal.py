"""Constraints against oracles: token by token, and as whole searches against enumeration.

An oracle is ``allowed(said, token) -> bool`` for a tuple of tokens already generated; EOS is a token like any other.
"""

import functools

import numpy as np
import pytest
import torch

import flashbeam as fb
from flashbeam.constraint import Context
from flashbeam.kernels import unpack_bitmask
from oracles import TableLM, enumerate_leaves

EVERYTHING = dict(length_penalty=0, stopping=fb.Exhausted())


def context(batch=1, beams=1, vocab=4, eos=(), min_length=0, max_length=4):
    return Context(batch, beams, vocab, torch.device("cpu"), tuple(eos), (min_length,) * batch, (max_length,) * batch)


def unpacked(bound, state, vocab):
    return unpack_bitmask(bound.bitmask(state), vocab).numpy()


def assert_masks(constraints, oracles, sequences, where):
    """Every row says its ``sequences [R, T]``; while what it said was allowed, so is what its oracle allows, no more.

    ``constraints`` and ``oracles`` are one per request.
    """
    kind = next(type(each) for each in constraints if each is not None)
    bound = kind.bind(constraints, where)
    state, rows = bound.init(), where.rows
    legal = np.ones(rows, bool)
    for t in range(sequences.shape[1]):
        got = unpacked(bound, state, where.vocab_size)
        for row in np.flatnonzero(legal):
            said, oracle = tuple(sequences[row, :t].tolist()), oracles[row // where.beam_size]
            want = [oracle is None or oracle(said, token) for token in range(where.vocab_size)]
            assert got[row].tolist() == want, (row, said)
        legal &= got[np.arange(rows), sequences[:, t]]
        state = bound.advance(state, torch.from_numpy(sequences[:, t]))
    return legal


def search_all(constraint, vocab, batch=1, seed=0, **options):
    """Every legal hypothesis of each request: ``{tokens: log-probability}``."""
    given = {} if "selection" in options else EVERYTHING
    search = fb.BeamSearch(constraint=constraint, **{"beam_size": 400, **given, **options})
    return as_dicts(fb.decode(search, TableLM(vocab, seed), torch.arange(batch)))


def as_dicts(hyps):
    return [
        {
            tuple(hyps.tokens[b, i, : hyps.lengths[b, i]].tolist()): float(hyps.log_probs[b, i])
            for i in np.flatnonzero(hyps.valid[b].numpy())
        }
        for b in range(hyps.tokens.shape[0])
    ]


def enumerated(oracle, vocab, bos=0, seed=0, *, eos=(), accepts=None, **options):
    """The same by enumeration; ``accepts(tokens)`` judges what reaches ``max_length`` without EOS."""

    @functools.cache
    def mask(prefix):
        return np.array([oracle is None or oracle(prefix[1:], token) for token in range(vocab)])

    leaves = enumerate_leaves(TableLM(vocab, seed).logits, bos, eos=eos, mask=mask, **options)
    return {leaf.tokens: leaf.log_prob for leaf in leaves if leaf.finished or accepts is None or accepts(leaf.tokens)}


def assert_same(got, want):
    assert got.keys() == want.keys()
    for tokens, log_prob in want.items():
        assert got[tokens] == pytest.approx(log_prob, abs=1e-5, rel=1e-6)


def assert_enumerates(constraints, oracles, vocab, *, eos=(), normalize="vocab", **options):
    """One search of all requests, which have lists of everything, against enumeration of each."""
    got = search_all(constraints, vocab, len(oracles), eos_id=list(eos) or None, normalize=normalize, **options)
    lengths = {name: options[name] for name in ("min_length", "max_length") if name in options}
    for bos, oracle in enumerate(oracles):
        assert_same(got[bos], enumerated(oracle, vocab, bos, eos=eos, normalize=normalize, **lengths))


def assert_batch_invariant(constraints, vocab, model=None, **options):
    """Each request alone, bitwise as in the batch."""
    search = functools.partial(fb.BeamSearch, **{"beam_size": 4, **options})
    model, batch = model or TableLM(vocab), len(constraints)
    together = fb.decode(search(constraint=constraints), model, torch.arange(batch))
    for b, constraint in enumerate(constraints):
        settings = search(constraint=constraint)
        state = settings.init(1, request_ids=[b])
        tokens, cache = torch.tensor([b]), None
        while not state.all_done():
            logits, cache = model(tokens, cache)
            step = settings.step(state, logits)
            tokens, cache = step.tokens.flatten(), fb.reorder(cache, step.source_rows)
        alone = settings.finalize(state)
        for name in ("tokens", "lengths", "log_probs", "scores", "valid"):
            assert torch.equal(getattr(alone, name)[0], getattr(together, name)[b]), name
