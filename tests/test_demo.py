"""The demo: its language model, the loop that newcomers copy, the tree it draws, and what it says to whom."""

import importlib
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

import flashbeam as fb

sys.path.insert(0, str(Path(__file__).parents[1] / "docs" / "examples"))

from choose import COUNT, choose, distinct_bigrams, sequences
from code_corpus import PROMPTS as HELD_OUT
from codelm import EOS_ID, WEIGHTS, CodeLM, Tokenizer, load
from demo import BEFORE_NAMES, PROMPTS, complete, main
from evaluate import best_completions
from names import any_identifier, complete_names, find_cursor, find_cursors, is_public, read_names, real_names
from report import NOISE, Completions
from terminal import cut, one_line, printable
from tree import Ending, Line, draw, grow
from views import MILD, RUNS, SHARP

EXAMPLES = WEIGHTS.parent
MEGABYTE = 2**20


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """The model is so small that threads wait for each other, the longer the busier the machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def lm() -> tuple[CodeLM, Tokenizer]:
    return load()


@pytest.fixture(scope="module")
def prompts(lm: tuple[CodeLM, Tokenizer]) -> list[list[int]]:
    lengths = [len(ids) for ids in map(lm[1].encode, PROMPTS)]
    assert len(set(lengths)) > 1  # else nothing is padded
    return [lm[1].encode(prompt) for prompt in PROMPTS]


@pytest.fixture(scope="module")
def found(lm: tuple[CodeLM, Tokenizer], prompts: list[list[int]]) -> Completions:
    return complete(lm[0], prompts, beam_size=4, max_length=24)


def demo(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, str(EXAMPLES / "demo.py"), *arguments],
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=120,
        env={**os.environ, "PYTHONIOENCODING": "utf-8", **environment},
    )


# the model


def test_weights_are_small_and_need_no_pickle() -> None:
    assert WEIGHTS.stat().st_size <= 4 * MEGABYTE
    with np.load(WEIGHTS, allow_pickle=False) as data:
        assert all(data[name].dtype in (np.float16, np.int64, np.uint16) for name in data.files)


def test_text_survives_the_tokenizer(lm: tuple[CodeLM, Tokenizer]) -> None:
    for text in ("def f(x):\n\treturn 'π ≠ 3'\n", "a = 1\n\nb = 2", "   \x1b\r", *PROMPTS):
        assert lm[1].decode(lm[1].encode(text)) == text


@torch.inference_mode()
def test_prompt_is_read_the_same_alone_and_padded(lm: tuple[CodeLM, Tokenizer], prompts: list[list[int]]) -> None:
    logits, _ = lm[0].prefill(prompts)
    alone = torch.cat([lm[0].prefill([prompt])[0] for prompt in prompts])
    torch.testing.assert_close(logits, alone, atol=1e-3, rtol=0)


@torch.inference_mode()
def test_cached_steps_equal_reading_at_once(lm: tuple[CodeLM, Tokenizer], prompts: list[list[int]]) -> None:
    model = lm[0]
    shortened = [prompt[:-3] for prompt in prompts]
    logits, cache = model.prefill(shortened)
    for i in (-3, -2, -1):
        logits, cache = model(torch.tensor([prompt[i] for prompt in prompts]), cache)
    torch.testing.assert_close(logits, model.prefill(prompts)[0], atol=1e-3, rtol=0)


def rescored(model: CodeLM, prompt: Sequence[int], completion: Sequence[int], temperature: float = 1.0) -> torch.Tensor:
    """The log-probability of each token of a completion, read at once and without a cache."""
    tokens = torch.tensor([[EOS_ID, *prompt, *completion]])
    states, _ = model.states(tokens[:, :-1], None)
    logits = states[0] @ model.embedding.weight.T / temperature
    return logits.log_softmax(-1).gather(1, tokens[0, 1:, None])[len(prompt) :, 0]


@torch.inference_mode()
def test_hypotheses_have_the_log_probs_of_a_rescoring_from_scratch(
    lm: tuple[CodeLM, Tokenizer], prompts: list[list[int]], found: Completions
) -> None:
    for request, prompt in enumerate(prompts):
        endings = found.endings(request)
        assert len(endings) == 4
        for n, ending in enumerate(endings):
            each = rescored(lm[0], prompt, ending.tokens)
            assert each.sum().item() == pytest.approx(ending.log_prob, abs=1e-3)
            reported = found.hypotheses.token_log_probs[request, n, : len(ending.tokens)]
            torch.testing.assert_close(reported, each, atol=1e-3, rtol=0)


def test_greedy_takes_the_likeliest_token(lm: tuple[CodeLM, Tokenizer], prompts: list[list[int]]) -> None:
    greedy = complete(lm[0], prompts, beam_size=1, max_length=8)
    for request, prompt in enumerate(prompts):
        ids = list(prompt)
        for token in greedy.endings(request)[0].tokens:
            assert token == lm[0].prefill([ids])[0].argmax()
            ids.append(token)


def test_prompt_alone_gives_the_same_completions(
    lm: tuple[CodeLM, Tokenizer], prompts: list[list[int]], found: Completions
) -> None:
    alone = complete(lm[0], prompts[:1], beam_size=4, max_length=24)
    assert [ending.tokens for ending in alone.endings(0)] == [ending.tokens for ending in found.endings(0)]


def test_beams_improve_held_out_prompts(lm: tuple[CodeLM, Tokenizer]) -> None:
    texts = json.loads(HELD_OUT.read_text())
    assert len(set(texts)) == 100
    # all 100, with their interval, are in docs/demo.md
    greedy, beams = (best_completions(*lm, texts[:20], beam_size, max_length=24) for beam_size in (1, 16))
    assert beams.tokenises.mean() >= 0.6
    assert (beams.log_probs > greedy.log_probs + NOISE).mean() >= 0.8


# the tree


def drawn(steps: list[tuple[list[int], list[int], list[bool]]], endings: list[Ending]) -> list[Line]:
    return list(draw(grow(steps, endings), lambda tokens: " ".join(map(str, tokens))))


YES, NO = [True, True], [True, False]


def test_tree_shares_beginnings_and_cuts_what_was_pruned() -> None:
    steps = [
        ([1, 2], [0, 0], YES),
        ([3, 4], [0, 0], YES),  # 1 3, 1 4; 2 is pruned
        ([5, 6], [1, 1], YES),  # 1 4 5, 1 4 6; 1 3 is pruned
        ([7, 0], [0, 1], NO),  # 1 4 5 7; 1 4 6 ends here
    ]
    endings = [Ending([1, 4, 6, 9], -1.0, True), Ending([1, 4, 5, 7], -2.0, False)]
    assert drawn(steps, endings) == [
        Line(0, None, "├─ ", "1 4"),
        Line(1, endings[0], "│  ├─ ", "6 9"),
        Line(2, endings[1], "│  ├─ ", "5 7", live=True),
        Line(0, None, "│  ╰╌ ", "3", pruned=1),
        Line(0, None, "╰╌ ", "2", pruned=1),
    ]


def test_tree_goes_on_below_a_hypothesis_and_shows_open_branches() -> None:
    # in the second step 1 ends, and goes on as 1 2
    steps = [([1, 0], [0, 0], NO), ([2, 3], [0, 0], YES), ([0, 0], [0, 1], [False, False])]
    ending = Ending([1, 9], -1.0, True)
    assert drawn(steps, [ending]) == [
        Line(0, None, "└─ ", "1"),
        Line(1, ending, "   ├─ ", "9"),
        Line(0, None, "   ├─ ", "2", live=True),
        Line(0, None, "   └─ ", "3", live=True),
    ]


def test_tree_of_a_search_holds_all_hypotheses_and_all_steps(found: Completions) -> None:
    for request in range(len(PROMPTS)):
        steps = [tuple(field[request].tolist() for field in (s.tokens, s.parents, s.valid)) for s in found.steps]
        endings = found.endings(request)
        root = grow(steps, endings)
        lines = list(draw(root, lambda tokens: ""))
        assert sorted(line.rank for line in lines if line.ending) == [1, 2, 3, 4]
        assert any(line.pruned for line in lines)


def test_steps_of_a_search_are_not_overwritten_by_later_ones(found: Completions) -> None:
    assert len({step.tokens.data_ptr() for step in found.steps}) == len(found.steps)


# the text


def test_code_on_one_line() -> None:
    assert one_line("if x:\n        return 1\n    y\n\n") == "if x:↵  return 1↵ y"
    assert printable("\tx\x1b[31m") == "    x\N{REPLACEMENT CHARACTER}[31m"
    assert cut("abcdef", 4) == "abc…"
    assert cut("abcd", 4) == "abcd"


# the program


def test_demo_shows_what_it_promises() -> None:
    result = demo("--max-length", "24", COLUMNS="80")
    assert result.returncode == 0, result.stderr
    assert all(line.startswith("progress [") for line in result.stderr.splitlines())
    text = result.stdout
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) <= 80
    for expected in ("greedy", "4 beams", "16 beams", "log-prob", "Prompt 4 of 4", "EOS", "├─", "pruned", "steps/s"):
        assert expected in text
    assert "4 of 4, mean gain" in text
    assert "def __init__(self▸, value):" in text


def test_demo_completes_prompts_of_the_user() -> None:
    result = demo("--beams", "3", "--num", "2", "--max-length", "6", "--", "-x = ", "π")
    assert result.returncode == 0, result.stderr
    assert "-x = ▸" in result.stdout
    assert "π▸" in result.stdout
    assert "3 beams" in result.stdout
    assert "16 beams" not in result.stdout


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([""], "PROMPT: expected some text, got ''"),
        (["x " * 300], "PROMPT: expected at most 191 tokens with --max-length 64, got 301 in 'x x x"),
        (["--beams", "4;16"], "--beams: expected whole numbers from 1 to 256 with commas between, got '4;16'"),
        (["--beams", "0"], "--beams: expected whole numbers from 1 to 256 with commas between, got '0'"),
        (["--beams"], "--beams: expected one argument, got none"),
        (["--num", "1.5"], "--num: expected a whole number from 1 to 256, got '1.5'"),
        (["--max-length", "0"], "--max-length: expected a whole number from 1 to 200, got '0'"),
        (["--threads", "-1"], "--threads: expected a whole number from 1 to 1024, got '-1'"),
        (
            ["--colour"],
            "--colour: expected --stochastic, --diverse, --sample, --trie, --lattice, --seed, --beams, --max-length, "
            "--num, --threads, --to or --help, got '--colour'",
        ),
        (["--stochastic", "--diverse"], "--diverse: expected no other view beside it, got --stochastic"),
        (["--sample", "--beams", "4"], "--beams: expected no view beside it, got --sample"),
        (["--seed", "1"], "--seed: expected --stochastic or --sample beside it, got neither"),
        (["--diverse", "--seed", "1"], "--seed: expected --stochastic or --sample beside it, got --diverse"),
        (["--trie", "--seed", "1"], "--seed: expected --stochastic or --sample beside it, got --trie"),
        (["--trie", "x = os.zz"], "PROMPT: expected the beginning of names of os at its end, got 'zz'"),
        (["--trie", "pr", "x = 1"], "PROMPT: expected the beginning of builtins or modules at its end, got '1'"),
        (["--to", "a.svg"], "--to: expected --lattice beside it, got nothing"),
        (["--lattice", "--to", "a.png"], "--to: expected .html, .svg, .txt or .json in a folder that exists, got 'a"),
        (
            ["--lattice", "--to", "no/a.svg"],
            "--to: expected .html, .svg, .txt or .json in a folder that exists, got 'n",
        ),
        (["--sample", "--seed", "-1"], "--seed: expected a whole number from 0 to 999999999, got '-1'"),
    ],
)
def test_bad_arguments_are_named(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["demo.py", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    captured = capsys.readouterr()
    assert stopped.value.code == 2
    assert captured.out == ""
    assert captured.err.startswith(message)
    assert captured.err.count("\n") == 1


def test_bad_argument_of_the_program_is_no_traceback() -> None:
    result = demo("--beams", "many")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "--beams: expected whole numbers from 1 to 256 with commas between, got 'many'\n"


# the views


LENGTH = 12
TEXTS = (PROMPTS[1], PROMPTS[2])
Show = Callable[..., str]


@pytest.fixture
def show(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Show:
    """Run the program on ``TEXTS``, without the seconds a new process takes."""

    def run(*arguments: str, length: int = LENGTH, texts: Sequence[str] = TEXTS) -> str:
        monkeypatch.setattr(sys, "argv", ["demo.py", *arguments, "--max-length", str(length), "--", *texts])
        monkeypatch.setenv("COLUMNS", "80")
        main()
        return capsys.readouterr().out

    return run


def completion_lines(text: str) -> list[tuple[float, ...]]:
    """The numbers before each completion, its length last."""
    found = re.findall(r"^((?: +-?\d+\.\d\d)+) +(\d+)[ +]  \S", text, re.MULTILINE)
    return [(*map(float, numbers.split()), int(length)) for numbers, length in found]


def parts(text: str) -> list[str]:
    """The text of each prompt, and what is said of all."""
    _, *of_prompts = re.split(r"^Prompt \d of \d ─+$", text, flags=re.MULTILINE)
    *others, last = of_prompts
    return [*others, *re.split(r"^[A-Z][a-z ]+ ─+$", last, flags=re.MULTILINE)]


@torch.inference_mode()
@pytest.mark.parametrize(
    "selection, temperature",
    [
        (fb.Stochastic(3), SHARP),
        (fb.Sample(3), 1.0),
        (fb.Sample(3, top_p=0.9), MILD),
        (fb.Arithmetic(3), MILD),
        (fb.DiverseGroups(4, 0.5), 1.0),
        (fb.DiverseSiblings(0.5), 1.0),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, float) else str(value),
)
def test_chosen_completions_have_the_log_probs_of_a_rescoring_from_scratch(
    lm: tuple[CodeLM, Tokenizer], prompts: list[list[int]], selection: fb.selection.Selection, temperature: float
) -> None:
    hyps = choose(lm[0], prompts, selection, LENGTH, temperature)
    for request, prompt in enumerate(prompts):
        completions = sequences(hyps, request)
        assert len(completions) == COUNT
        for n, tokens in enumerate(completions):
            each = rescored(lm[0], prompt, tokens, temperature)
            assert hyps.log_probs[request, n].item() == pytest.approx(each.sum().item(), abs=1e-3 / temperature)
            assert hyps.finished[request, n] == (tokens[-1] == EOS_ID)


def test_stochastic_view_weighs_distinct_completions(lm: tuple[CodeLM, Tokenizer], show: Show) -> None:
    length = 48  # by then most have ended
    *shown, end = parts(show("--stochastic", "--seed", "5", length=length))
    encoded = [lm[1].encode(prompt) for prompt in TEXTS]
    hyps = choose(lm[0], encoded * RUNS, fb.Stochastic(5), length, SHARP)
    plain = choose(lm[0], encoded * RUNS, fb.Sample(5), length, SHARP)
    assert len(shown) == len(TEXTS)
    for request, part in enumerate(shown):
        lines = completion_lines(part)
        assert len(lines) == COUNT == len(set(sequences(hyps, request)))
        perturbed, log_probs, weights, lengths = zip(*lines, strict=True)
        assert log_probs == pytest.approx(hyps.log_probs[request].tolist(), abs=0.03)
        assert list(perturbed) == sorted(perturbed, reverse=True)
        # Kool et al. 2019: p / P(perturbed > the last), over their sum; the last does not count
        gaps = [math.exp(log_prob - perturbed[-1]) for log_prob in log_probs[:-1]]
        expected = [math.exp(log_prob) / -math.expm1(-gap) for log_prob, gap in zip(log_probs, gaps, strict=False)]
        assert weights == pytest.approx([*(weight / sum(expected) for weight in expected), 0.0], abs=0.02)
        mean = re.search(r"Expected length: (\S+) tokens, estimated from these 8;\n +(\S+) from 8 plain", part)
        exact = [length * weight / sum(expected) for length, weight in zip(lengths, expected, strict=False)]
        assert mean
        assert float(mean[1]) == pytest.approx(sum(exact), abs=0.5)
        assert float(mean[2]) == pytest.approx(plain.lengths[request].double().mean().item(), abs=0.06)
        assert f"{len(set(sequences(plain, request)))} of them distinct" in part
    said = re.findall(r"(\d+\.\d)(?: tokens)? with fb", end)
    means = [(fb.weights(hyps) * hyps.lengths).sum(1), plain.lengths.double().mean(1)]
    runs = [[of[request :: len(TEXTS)].numpy() for request in range(len(TEXTS))] for of in means]
    spread = [math.sqrt(np.mean([np.var(of, ddof=1) for of in of_rule])) for of_rule in runs]
    assert min(spread) > 1.0
    assert [float(number) for number in said] == pytest.approx(spread, abs=0.06)


def test_diverse_view_counts_what_diversity_costs(lm: tuple[CodeLM, Tokenizer], show: Show) -> None:
    rules = {"8 beams": fb.TopK(), "4 groups": fb.DiverseGroups(4, 0.5), "siblings": fb.DiverseSiblings(0.5)}
    *shown, end = parts(show("--diverse"))
    encoded = [lm[1].encode(prompt) for prompt in TEXTS]
    summary = {line[:12].strip(): [float(number) for number in line[12:].split()] for line in end.splitlines()[2:]}
    for name, rule in rules.items():
        hyps = choose(lm[0], encoded, rule, LENGTH)
        bigrams: list[tuple[int, int]] = []
        for request, part in enumerate(shown):
            of_rule = part[part.index(f"  {name}: ") :]
            tokens, lengths = hyps.tokens[request].tolist(), hyps.lengths[request].tolist()
            pairs = [pair for row, length in zip(tokens, lengths, strict=True) for pair in pairwise(row[:length])]
            bigrams.append((len(set(pairs)), len(pairs)))
            mean = hyps.log_probs[request].mean().item()
            assert of_rule.startswith(
                f"  {name}: {bigrams[-1][0]} distinct 2-grams of {bigrams[-1][1]}, mean log-prob {mean:.2f}\n"
            )
            lines = completion_lines(of_rule)[:COUNT]
            assert [line[0] for line in lines] == pytest.approx(hyps.log_probs[request].tolist(), abs=0.01)
            assert [line[1] for line in lines] == lengths
        best = hyps.log_probs.max(1).values.mean().item()
        expected = [*map(sum, zip(*bigrams, strict=True)), hyps.log_probs.mean().item(), best]
        assert summary[name] == pytest.approx(expected, abs=0.01)
    assert list(summary) == list(rules)
    assert summary["4 groups"][0] > summary["8 beams"][0]  # diversity
    assert summary["4 groups"][2] < summary["8 beams"][2]  # and its cost


def test_groups_without_a_penalty_find_the_same(lm: tuple[CodeLM, Tokenizer], prompts: list[list[int]]) -> None:
    hyps = choose(lm[0], prompts, fb.DiverseGroups(4, 0.0), LENGTH)
    pairs = complete(lm[0], prompts, beam_size=COUNT // 4, max_length=LENGTH)
    for request in range(len(prompts)):
        expected = [tuple(ending.tokens) for ending in pairs.endings(request) for _ in range(4)]
        assert sequences(hyps, request) == expected


def test_sample_view_shows_repetitions_and_the_filter(lm: tuple[CodeLM, Tokenizer], show: Show) -> None:
    text = show("--sample", "--seed", "2", "--num", "6")
    *shown, end = parts(text)
    encoded = [lm[1].encode(prompt) for prompt in TEXTS]
    rules = {"top-p 0.9": fb.Sample(2, top_p=0.9), "arithmetic": fb.Arithmetic(2)}
    for name, rule in rules.items():
        hyps = choose(lm[0], encoded, rule, LENGTH, MILD)
        counts = [len({tuple(row) for row in hyps.tokens[request].tolist()}) for request in range(len(TEXTS))]
        for request, part in enumerate(shown):
            of_rule = part[part.index(f"  {name}: ") :]
            assert of_rule.startswith(f"  {name}: {counts[request]} of 8 distinct\n")
            lines = completion_lines(of_rule)[:6]
            assert [line[0] for line in lines] == pytest.approx(hyps.log_probs[request, :6].tolist(), abs=0.01)
            filtered = [line[1] - line[0] for line in lines]
            assert min(filtered) >= 0.0
            assert (max(filtered) > 0.1) == (name == "top-p 0.9")
        row = next(line for line in end.splitlines() if name in line)
        assert float(row[12:].split()[0]) == pytest.approx(sum(counts) / len(counts), abs=0.06)
    assert len(completion_lines(text)) == 2 * 2 * 6
    assert show("--sample", "--seed", "2", "--num", "6") == text
    assert show("--sample", "--seed", "3", "--num", "6") != text


def test_distinct_bigrams() -> None:
    assert distinct_bigrams([(1, 2, 1, 2), (2, 1), (3,), ()]) == (2, 4)
    assert distinct_bigrams([]) == (0, 0)


@pytest.mark.parametrize("view", ["stochastic", "diverse", "sample", "trie", "lattice"])
def test_view_fits_the_terminal(view: str, show: Show, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # a lattice is written there
    text = show(f"--{view}")
    assert "\x1b" not in text
    lines = [line for line in text.splitlines() if str(tmp_path) not in line]  # a path is as long as it is
    assert max(map(len, lines)) <= 80
    assert "completes 2 prompts of Python code in one batch" in text


def test_make_passes_the_view_beside_the_prompt() -> None:
    # a make above this one would have it announce its folder
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    command = ["make", "--no-print-directory", "-n", "-o", ".venv/.installed", "demo"]
    for arguments, expected in (
        ([], ""),
        (["VIEW=stochastic"], "--stochastic|"),
        (["VIEW=trie"], "--trie|"),
        (["VIEW=lattice", "TO=a $b.svg"], "--lattice|--to|a $b.svg|"),
        (["VIEW=sample", "PROMPT=it's $(x) "], "--sample|--|it's $(x) |"),
    ):
        root = EXAMPLES.parents[1]
        line = subprocess.run(
            [*command, *arguments], cwd=root, env=environment, capture_output=True, text=True, check=True
        ).stdout
        echo = line.strip().replace(".venv/bin/python docs/examples/demo.py", "printf '%s|'")
        prompt = next((one.removeprefix("PROMPT=") for one in arguments if one.startswith("PROMPT=")), "")
        to = next((one.removeprefix("TO=") for one in arguments if one.startswith("TO=")), "")
        shell = {**environment, "DEMO_PROMPT": prompt, "DEMO_TO": to}
        said = subprocess.run(["sh", "-c", echo], env=shell, capture_output=True, text=True, check=True).stdout
        assert said.removeprefix("|") == expected  # printf without arguments prints one


def test_lattice_view_draws_the_search_and_writes_it(lm: tuple[CodeLM, Tokenizer], show: Show, tmp_path: Path) -> None:
    text = show("--lattice", "--to", str(tmp_path / "a.json"))
    *shown, end = parts(text)
    found = json.loads((tmp_path / "a.json").read_text())["requests"]
    assert str(tmp_path / "a.json") in end
    for request, (part, prompt) in enumerate(zip(shown, TEXTS, strict=True)):
        best = complete(lm[0], [lm[1].encode(prompt)], beam_size=4, max_length=LENGTH).endings(0)
        nodes = found[request]["nodes"]
        for rank, ending in enumerate(best, 1):
            node = nodes["rank"].index(rank)
            assert nodes["log_prob"][node] == pytest.approx(ending.log_prob, abs=1e-3)
            said = re.search(rf"^ +{rank} +(-\d+\.\d\d) +(-\d+\.\d\d)  ", part, re.MULTILINE)
            assert said and [float(number) for number in said.groups()] == pytest.approx(
                [ending.log_prob] * 2, abs=0.02
            )
        assert f"{len(nodes['parent']) - 1} nodes" in part
        assert len(found[request]["statistics"]["width"]) == found[request]["steps"]


# the names


@pytest.mark.parametrize(
    "prompt, before, place, some",
    [
        ("x = os.pa", "x = os.", "names of os", {"path", "pathsep", "pardir"}),
        ("os.path.jo", "os.path.", "names of os.path", {"join"}),
        ("str.sp", "str.", "names of builtins.str", {"split", "splitlines"}),
        ('", ".jo', '", ".', "names of any module", {"join"}),
        ("self.appe", "self.", "names of any module", {"append"}),
        ("from json import ", "from json import", "names of json", {"load", "dumps", "decoder"}),
        ("from json import loads, dum", "from json import loads,", "names of json", {"dump", "dumps"}),
        ("import js", "import", "modules", {"json"}),
        ("import os, js", "import os,", "modules", {"json"}),
        ("    ran", "    ", "builtins or modules", {"range", "random"}),
        ("x = 1\n\nfor i in ran", "x = 1\n\nfor i in", "builtins or modules", {"range", "random"}),
        ("f(", "f(", "builtins or modules", {"range", "print", "os"}),
        ("f(Tru", "f(", "builtins or modules", set()),  # a keyword
        ("x = 1", "x =", "builtins or modules", set()),
    ],
)
def test_legal_names_follow_from_the_prompt(prompt: str, before: str, place: str, some: set[str]) -> None:
    cursor = find_cursor(prompt, read_names())
    assert (cursor.before, cursor.place) == (before, place)
    assert some <= set(cursor.names) and bool(some) == bool(cursor.names)
    spelled = [cursor.before + cursor.spelled(name) for name in cursor.names]
    assert all(text.startswith(prompt) for text in spelled)


def test_names_are_those_of_python() -> None:
    known = read_names()
    for names in known.values():
        assert names == sorted(set(names)) and all(map(is_public, names))
    for module in ("builtins", "json", "math", "os.path", "re"):  # whatever version runs the tests
        there = [hasattr(importlib.import_module(module), name) for name in known[module]]
        assert np.mean(there) > 0.9, module
    assert {name for name in dir(str) if is_public(name)} >= set(known["builtins.str"])


@torch.inference_mode()
def test_names_have_the_log_probs_of_a_rescoring_from_scratch(lm: tuple[CodeLM, Tokenizer]) -> None:
    model, tokenizer = lm
    cursors = find_cursors(BEFORE_NAMES)
    found = complete_names(*lm, cursors, [real_names(cursor, tokenizer) for cursor in cursors], 64)
    word = re.compile(rb"[A-Za-z0-9_\x80-\xff]")
    ends = torch.tensor([not word.match(piece) for piece in tokenizer.pieces])
    for cursor, names in zip(cursors, found, strict=True):
        assert len(names) == min(COUNT, len(cursor.names))  # fewer names than beams: exactly those
        assert len({name.text for name in names}) == len(names)
        for name in names:
            assert name.real and name.text in cursor.names
            before, tokens = tokenizer.encode(cursor.before), tokenizer.encode_piece(cursor.spelled(name.text))
            read = torch.tensor([[EOS_ID, *before, *tokens]])
            states, _ = model.states(read, None)
            log_probs = (states[0, len(before) :] @ model.embedding.weight.T).log_softmax(-1)
            each = log_probs[range(len(tokens)), tokens].sum() + log_probs[-1, ends].logsumexp(0)
            assert name.log_prob == pytest.approx(each.item(), abs=1e-3)


def test_any_identifier_may_be_invented_but_begins_as_typed(lm: tuple[CodeLM, Tokenizer]) -> None:
    cursors = find_cursors(BEFORE_NAMES)
    found = complete_names(*lm, cursors, [any_identifier(cursor, lm[1]) for cursor in cursors], 64)
    for cursor, names in zip(cursors, found, strict=True):
        assert len(names) == COUNT
        assert all(name.text.isidentifier() and name.text.startswith(cursor.typed.strip()) for name in names)
        assert [name.real for name in names] == [name.text in cursor.names for name in names]
        assert not all(name.real for name in names)


def test_trie_view_marks_what_is_invented(show: Show) -> None:
    texts = ("x = json.l", "from collections import ")
    *shown, end = parts(show("--trie", "--num", "7", texts=texts))
    counts = {"any identifier": [0, 0], "real names": [0, 0]}
    for part, cursor in zip(shown, find_cursors(texts), strict=True):
        assert f"{len(cursor.names)} {cursor.place}\n" in part
        for line in part.splitlines():
            cells = re.findall(r"(-\d+\.\d\d)  (✗?) +(\w+)", line)
            for way, (log_prob, mark, name) in zip(counts, cells, strict=False):
                assert (name in cursor.names) == (not mark)
                assert float(log_prob) < 0.0
                counts[way][0] += 1
                counts[way][1] += not mark
    assert counts["real names"] == [2 + 7, 2 + 7]
    said = {line[:16].strip(): line[16:].split() for line in end.splitlines()[1:]}
    assert said["real names"][:2] == ["10", "10"]
    assert float(said["real names"][2]) >= float(said["any identifier"][2])
    assert counts["any identifier"][0] == 2 * 7 > counts["any identifier"][1] > 0


# the licence


def test_licence_of_the_prompts_and_the_training_text_is_named() -> None:
    page = (EXAMPLES.parent / "demo.md").read_text()
    assert "Python Software Foundation License" in page
    assert "held_out_prompts.json" in page
