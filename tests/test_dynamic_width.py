"""Where DynamicWidth cuts: shares that hit p, and bans that take nearly all of the mass."""

import pytest
import torch

import flashbeam as fb


def kept(logits, p, **options):
    search = fb.BeamSearch(16, 2, 0, selection=fb.DynamicWidth(p), length_penalty=0.0, **options)
    state = search.init(1)
    return int(search.step(state, logits[None]).valid.sum())


@pytest.mark.parametrize(
    ("count", "p", "width"), [(10, 0.9, 9), (4, 0.5, 2), (10, 0.3, 3), (5, 0.6, 3), (8, 0.75, 6), (10, 0.31, 4)]
)
def test_a_share_of_p_is_enough(count, p, width):
    logits = torch.cat([torch.tensor([-torch.inf]), torch.zeros(count)])
    assert kept(logits, p) == width


@pytest.mark.parametrize("normalize", ["vocab", "allowed"])
@pytest.mark.parametrize("excess", [0.0, 14.0, 18.0, 40.0])
def test_a_banned_eos_has_no_mass(excess, normalize):
    logits = torch.cat([torch.tensor([excess]), torch.zeros(10)])
    assert kept(logits, 0.45, min_length=2, normalize=normalize) == 5


def test_a_row_that_is_invalid_takes_no_place():
    # +inf at a banned token: the normaliser over the vocabulary makes the row invalid, whatever is allowed of it
    mask = torch.tensor([[0b0111110]], dtype=torch.int32)
    for rule in (fb.TopK(), fb.DynamicWidth(1.0), fb.Stochastic(1), fb.ConditionalPoisson(1)):
        search = fb.BeamSearch(4, 2, None, selection=rule, finished="in_place")
        state = search.init(6)
        step = search.step(state, torch.randn(6, 7, generator=torch.Generator().manual_seed(0)), mask.expand(6, -1))
        rows = torch.randn(24, 7, generator=torch.Generator().manual_seed(1))
        rows[step.tokens.flatten() == 3, 0] = torch.inf
        assert bool((rows == torch.inf).any())
        step = search.step(state, rows, mask.expand(24, -1))
        alive = (rows.view(6, 4, 7) != torch.inf).all(2).sum(1) * 5
        assert torch.equal(step.valid.sum(1), alive.clamp(max=4)), rule
