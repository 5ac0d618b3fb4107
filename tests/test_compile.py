"""``torch.compile(search.step, fullgraph=True)``: one graph for all steps but the first, same bits."""

import shutil

import pytest
import torch

import flashbeam as fb
from fake_graph import assert_equal
from flashbeam.kernels import exp, reorder, settled
from step_cases import CASES, CONSTRAINTS, given_to, search_of


def all_of(*names):
    return fb.AllOf(*(CONSTRAINTS[name]() for name in names))


# what a case of step_cases is given besides
MORE = {
    **{name: {} for name in CASES if name.endswith("many")},
    "own, pool": {},
    "trie, pool": {"budget": fb.Budget(tokens=9)},
    "phrases, pool": {"constraint": lambda: all_of("phrases", "veto")},
    "ngram, stochastic": {
        "constraint": lambda: all_of("automaton", "forbidden", "ngram", "prefix", "penalty", "copy", "ordered")
    },
    "coverage": {"terms": (fb.Coverage(0.3), fb.UID("variance", 0.5), fb.TokenReward(0.3)), "statistics": True},
    "mixture": {"dialect": fb.Dialect(finishes="double", at_max_length="spare"), "stopping": fb.Exact()},
    "contrast": {"finished": "in_place"},
    "switch": {"dialect": fb.Dialect(finishes="row", at_max_length="end"), "stopping": fb.Shrinking()},
}


def compare(name, backend, **more):
    """Whole searches by a compiled step, all but the first step, where the host prepares constraints and terms."""
    torch._dynamo.reset()
    search = search_of(name, **more)
    step = torch.compile(search.step, fullgraph=True, backend=backend)
    for steps in (7, 3):
        compiled, eager = search.init(2), search.init(2)
        logits, rest = given_to(name, 2)
        for state in (compiled, eager):
            search.step(state, logits, **rest)
        for t in range(1, steps):
            logits, rest = given_to(name, 8)
            with torch._dynamo.config.patch(error_on_recompile=steps < 7 or t > 1):
                got = step(compiled, logits, **rest)
            assert_equal(got, search.step(eager, logits, **rest))
        assert_equal(compiled, eager)


@pytest.mark.parametrize("name", MORE)
def test_one_graph_for_every_later_step(name):
    compare(name, "eager", **MORE[name])


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # inductor imports it
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor asks for a C++ compiler")
def test_fused_operations_have_the_same_bits():
    compare("topk, in_place, many", "inductor")


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor asks for a C++ compiler")
def test_what_is_known_before_a_write_stays_known():
    def write(x, rows):
        before = x + 1
        total = (before * 2).sum()
        (before,) = settled([before])
        reorder(x, rows, out=x)
        return before * 2, total

    rows, x = torch.tensor([2, 0, 1]), torch.arange(3.0)
    torch._dynamo.reset()
    assert_equal(torch.compile(write, fullgraph=True)(x.clone(), rows), write(x.clone(), rows))


def test_opaque_operations():
    x = torch.randn(3, 70)
    torch.library.opcheck(torch.ops.flashbeam.exp.default, (x,))
    torch.library.opcheck(torch.ops.flashbeam.settle.default, ([x, x > 0],))
    assert torch.allclose(exp(x), x.exp())
    assert settled([x])[0] is x
