"""Searches whose later steps are compiled, captured and replayed: every rule, every constraint that is no host's."""

import torch

import flashbeam as fb
from flashbeam.kernels import pack_bitmask

V = 80


class NotAgain:
    """A constraint of one's own: no token twice in a row, and the last is even."""

    def init(self, batch_size, beam_size, vocab_size, device):
        self.tokens = torch.arange(vocab_size, device=device)
        return {"last": torch.full((batch_size * beam_size,), -1, device=device)}

    def advance(self, state, tokens):
        return {"last": tokens}

    def bitmask(self, state):
        return pack_bitmask(self.tokens != state["last"][:, None])

    def accepts(self, state):
        return state["last"] % 2 == 0


RULES = {
    "topk": fb.TopK(),
    "stochastic": fb.Stochastic(1),
    "poisson": fb.ConditionalPoisson(1),
    "sample": fb.Sample(1),
    "filtered": fb.Sample(1, top_k=9, top_p=0.9, min_p=0.01),
    "arithmetic": fb.Arithmetic(1),
    "groups": fb.DiverseGroups(2, 0.5),
    "siblings": fb.DiverseSiblings(0.5),
    "width": fb.DynamicWidth(0.9),
}
CONSTRAINTS = {
    "trie": lambda: fb.Trie([[3, 4, 5], [3, 4], [5, 6, 7], [9] * 6]),
    "automaton": lambda: fb.Automaton([0, 3, 4, 4], [3, 4, 5, 9], [1, 0, 2, 2], [False, False, True]),
    "phrases": lambda: fb.Phrases([[3, 4], [[5], [6, 7]]]),
    "ordered": lambda: fb.Phrases([[3, 4], [5]], ordered=True),
    "forbidden": lambda: fb.ForbiddenPhrases([[3, 4], [5]]),
    "ngram": lambda: fb.NoRepeatNgram(2),
    "prefix": lambda: fb.Prefix([3, 4]),
    "penalty": lambda: fb.RepetitionPenalty(1.3),
    "veto": lambda: fb.SuffixVeto([3, 4, 5, 6, 7, 8], 2),
    "copy": lambda: fb.Copy([3, 4, 5, 6, 7, 8, 9], monotone=False, min_span=2),
    "own": lambda: [NotAgain(), None],
    "all of": lambda: fb.AllOf(fb.Trie([[3, 4, 5, 8], [6, 3]]), fb.NoRepeatNgram(1), fb.RepetitionPenalty(1.1)),
}
MANY = {"eos_id": [1, 2], "min_length": 2, "temperature": [0.5, 2.0], "normalize": "allowed", "max_length": [7, 4]}
STOPPING = (fb.FirstFinished(), fb.Exact(), fb.Exhausted(), fb.Shrinking(), fb.BestLive())
OTHERS = {
    "budget": {"budget": fb.Budget(tokens=9)},
    "statistics": {"statistics": True},
    "terms": {"terms": (fb.UID("variance", 0.5), fb.TokenReward(0.3))},
    "end": {"dialect": fb.Dialect(at_max_length="end")},
    "spare": {"dialect": fb.Dialect(finishes="double", at_max_length="spare")},
    "row": {"dialect": fb.Dialect(finishes="row", counts_eos=False), "length_penalty": 0.0},
    "coverage": {"terms": (fb.Coverage(0.3),)},
    "mixture": {"models": fb.Mixture([0.5, 0.5])},
    "contrast": {"models": fb.Contrast()},
    "switch": {"models": fb.Switch()},
    **{repr(rule): {"stopping": rule} for rule in STOPPING},
}


def _cases():
    for name, rule in RULES.items():
        for regime in rule.regimes:
            yield f"{name}, {regime}", {"selection": rule, "finished": regime}
            yield f"{name}, {regime}, many", {"selection": rule, "finished": regime, **MANY}
    for name, constraint in CONSTRAINTS.items():
        yield f"{name}, pool", {"constraint": constraint}
        yield f"{name}, in place", {"constraint": constraint, "finished": "in_place", "normalize": "allowed"}
        if name != "veto":
            yield f"{name}, stochastic", {"constraint": constraint, "selection": RULES["stochastic"]}
    yield from OTHERS.items()


CASES = dict(_cases())


def search_of(name, **options):
    """The search of a case: two requests may have settings of their own."""
    settings = {"beam_size": 4, "max_length": 7, "eos_id": 2, **CASES[name], **options}
    if "constraint" in settings:
        settings["constraint"] = settings["constraint"]()
    return fb.BeamSearch(**settings)


def given_to(name, rows):
    """``(logits, other arguments)`` of a step, for two requests."""
    options = CASES[name]
    logits = torch.randn(rows, V)
    if "models" in options:
        gate = {"gate": torch.rand(rows) < 0.5} if name == "switch" else {}
        return (logits, torch.randn(rows, V)), gate
    return logits, {"attention": torch.rand(rows, 5)} if name == "coverage" else {}
