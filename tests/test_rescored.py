"""The best candidates by a score of one's own, against every candidate ranked in Python."""

import itertools

import numpy as np
import pytest
import torch

import flashbeam as fb
from flashbeam.kernels import pack_bitmask
from flashbeam.selection.rescored import rescored, rows_of

EOS = [1, 4]


class By(fb.TopK):
    """Ranks by increments of one's own, and keeps what it was given and returned."""

    def __init__(self, increments):
        object.__setattr__(self, "increments", increments)

    def select(self, expansion, k):
        increments = self.increments(expansion)
        ranked = rescored(expansion, increments, k)
        slots = type(expansion.slots)(*(field.clone() for field in expansion.slots))  # a step changes them
        before = expansion._replace(slots=slots, active=expansion.active.clone())
        object.__setattr__(self, "last", (before, increments.clone(), ranked))
        return ranked


def in_order(expansion, increments, allowed):
    """Candidates that are not EOS of each request: (score, parent, adjusted logit, token), best first."""
    batch, parents = expansion.slots.scores.shape[0], expansion.parents
    logits = expansion.logits.float().nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    if expansion.temperature is not None:
        logits = logits / expansion.temperature[:, None]
    found = []
    for b in range(batch):
        candidates = []
        norm = 1.0 if expansion.divisor is None else expansion.divisor[b].numpy()
        for parent, token in itertools.product(range(parents), range(expansion.vocab_size)):
            row = b * parents + parent
            score = (expansion.slots.scores[b, parent] + increments[row, token]).numpy()
            there = expansion.active[row] and allowed[row, token] and token not in EOS
            there = there and logits[row, : expansion.vocab_size].max() < torch.inf
            if there and score > -np.inf and logits[row, token] > -np.inf:
                candidates.append((-score / norm, parent, -float(logits[row, token]) + 0.0, token))
        found.append(sorted(candidates))
    return found


@pytest.mark.parametrize("regime", ["pool", "in_place"])
def test_against_every_candidate_ranked(regime):
    generator = torch.Generator().manual_seed(3)
    # ties by score, by score and logit, by rank alone; fewer candidates than beams, half precision, padded vocabularies
    for coarse, vocab, dtype, columns in [
        (0.5, 9, torch.float32, 9), (4.0, 70, torch.float32, 77), (0.0, 5, torch.float32, 5),
        (1.0, 100, torch.bfloat16, 100), (0.0, 40, torch.float16, 41), (100.0, 150, torch.float32, 150),
        ("ulps", 30, torch.float32, 30),
    ]:  # fmt: skip

        def increments(expansion, coarse=coarse, vocab=vocab):
            x = torch.randn(expansion.logits.shape[0], vocab, generator=generator) * 3 + 1
            if coarse == "ulps":  # ties once they are divided by a norm
                x = -4.0 - torch.randint(8, x.shape, generator=generator) * 2.0**-21
            elif coarse:
                x = (x / coarse).round() * coarse
            return x.masked_fill(torch.rand(x.shape, generator=generator) < 0.1, -torch.inf)

        rule = By(increments)
        search = fb.BeamSearch(
            [6, 4], 4, EOS, selection=rule, finished=regime, temperature=[0.7, 1.0], vocab_size=vocab
        )
        state = search.init(2)
        for rows in (2, 12, 12):
            logits = torch.randn(rows, columns, generator=generator).mul(2).round().div(2)
            logits[0, :3] = -torch.inf
            if rows > 2:  # of beams in use
                logits[8, 2], logits[7, 3] = torch.nan, torch.inf
            mask = torch.rand(rows, columns, generator=generator) < 0.8
            search.step(state, logits.to(dtype), pack_bitmask(mask))
            expansion, given, ranked = rule.last
            best, wanted = ranked.candidates, in_order(expansion, given, mask)
            for b, want in enumerate(wanted):
                want, count = want[:6], min(6, len(want))
                assert best.parents[b, :count].tolist() == [parent for _, parent, _, _ in want]
                assert best.tokens[b, :count].tolist() == [token for *_, token in want]
                row = b * expansion.parents + best.parents[b, :count]
                scores = expansion.slots.scores[b, best.parents[b, :count]] + given[row, best.tokens[b, :count]]
                assert torch.equal(best.scores[b, :count], scores)
                assert (best.log_probs[b, count:] == -torch.inf).all()
                assert torch.isinf(ranked.bound).all()


@pytest.mark.parametrize("regime", ["pool", "in_place"])
def test_the_models_own_increments_are_plain_search_bit_for_bit(regime):
    for seed, (dtype, coarse) in enumerate([(torch.float32, 0.5), (torch.float32, None), (torch.float16, None)]):
        searches = [
            fb.BeamSearch([5, 3], 5, EOS, selection=rule, finished=regime, temperature=0.9, min_length=2)
            for rule in (fb.TopK(), By(lambda expansion: rows_of(expansion).token_log_probs()))
        ]
        found = []
        for search in searches:
            generator, state, rows = torch.Generator().manual_seed(seed), search.init(2), 2
            while not state.all_done():
                logits = torch.randn(rows, 90, generator=generator) * 2
                logits = logits if coarse is None else (logits / coarse).round() * coarse
                mask = pack_bitmask(torch.rand(rows, 90, generator=generator) < 0.7) if seed else None
                search.step(state, logits.to(dtype), mask)
                rows = 10
            found.append(search.finalize(state))
        for name in ("tokens", "scores", "log_probs", "token_log_probs", "valid", "finished"):
            assert torch.equal(getattr(found[0], name), getattr(found[1], name)), name


def test_eos_gets_its_score_or_is_barred():
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0, 0.5]])
    for bonus, ends in [(3.0, True), (-torch.inf, False)]:

        def increments(expansion, bonus=bonus):
            x = torch.tensor([[-1.0, bonus, -2.0, -5.0, -torch.inf]])
            return x.expand(expansion.logits.shape[0], -1)

        search = fb.BeamSearch(2, 3, EOS, length_penalty=0, selection=By(increments), stopping=fb.Exhausted())
        state = search.init(1)
        search.step(state, logits)
        hyps = search.finalize(state)
        finished = hyps.finished[0]
        assert finished.tolist()[0] is ends
        assert float(hyps.scores[0, 0]) == pytest.approx(3.0 if ends else -1.0)
        assert float(hyps.log_probs[0, 0]) == pytest.approx(float(logits.log_softmax(1)[0, 1 if ends else 0]))
