"""The demo: its language model, the loop that newcomers copy, the tree it draws, and what it says to whom."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "docs" / "examples"))

from code_corpus import PROMPTS as HELD_OUT
from codelm import EOS_ID, WEIGHTS, CodeLM, Tokenizer, load
from demo import PROMPTS, complete, main
from evaluate import best_completions
from report import NOISE, Completions
from terminal import cut, one_line, printable
from tree import Ending, Line, draw, grow

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


@torch.inference_mode()
def test_hypotheses_have_the_log_probs_of_a_rescoring_from_scratch(
    lm: tuple[CodeLM, Tokenizer], prompts: list[list[int]], found: Completions
) -> None:
    for request, prompt in enumerate(prompts):
        endings = found.endings(request)
        assert len(endings) == 4
        for n, ending in enumerate(endings):
            tokens = torch.tensor([[EOS_ID, *prompt, *ending.tokens]])
            states, _ = lm[0].states(tokens[:, :-1], None)
            logits = states[0] @ lm[0].embedding.weight.T
            each = logits.log_softmax(-1).gather(1, tokens[0, 1:, None])[len(prompt) :, 0]
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
        (["--colour"], "--colour: expected --beams, --max-length, --num, --threads or --help, got '--colour'"),
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


# the licence


def test_licence_of_the_prompts_and_the_training_text_is_named() -> None:
    page = (EXAMPLES.parent / "demo.md").read_text()
    assert "Python Software Foundation License" in page
    assert "held_out_prompts.json" in page
