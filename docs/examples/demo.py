"""Complete prompts of Python code by beam search: greedy beside wider beams, with their n-best and their search tree.

``complete`` is the decode loop to copy; ``codelm.py`` is the model it drives, ``report.py`` prints what it returns.
With ``--stochastic``, ``--diverse`` or ``--sample``, ``choose.py`` chooses otherwise; with ``--trie``, ``names.py``
completes one name, of those there are; with ``--lattice``, ``explore.py`` draws a search. ``views.py`` prints that.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import NoReturn

import torch

import flashbeam as fb
from codelm import EOS_ID, CodeLM, Tokenizer, load
from names import find_cursors
from report import Completions, Report
from terminal import Progress
from views import COUNT, Views

PROMPTS = (
    "class Stack:\n    def __init__(self",
    "def read_json(path):\n    with open(",
    "    try:\n        fd = os.open(",
    "if __name__ == '__main__':\n    ",
)
BEFORE_NAMES = (  # of --trie
    "def read_json(path):\n    with open(path) as f:\n        return json.l",
    "from collections import ",
    "    digest = hashlib.",
    "    raise No",
)
CONTEXT = 256  # tokens the model was trained to look back
MAX_BEAM_SIZE = 256
MAX_THREADS = 1024
BEAMS = "4,16"
NUM = 3
VIEWS = {
    "stochastic": f"{COUNT} samples without replacement, with their weights in an estimate",
    "diverse": f"{COUNT} beams beside beams that avoid each other",
    "sample": f"{COUNT} samples, independent and spread evenly",
    "trie": f"{COUNT} identifiers beside {COUNT} names of builtins and the standard library",
    "lattice": "all that a search tried, as text and as a page for a browser",
}


@torch.inference_mode()
def complete(
    model: CodeLM,
    prompts: Sequence[Sequence[int]],
    beam_size: int,
    max_length: int,
    tick: Callable[[], None] = lambda: None,
) -> Completions:
    """Find the likeliest completions of a batch of prompts: the loop that drives flashbeam.

    Args:
        model: returns logits ``[rows, V]`` and a cache, a nest of tensors with rows first.
        prompts: B lists of token ids, of any lengths.
        beam_size: K; 1 is greedy search.
        max_length: most tokens of a completion.
        tick: called after every step.
    """
    began = time.perf_counter()
    search = fb.BeamSearch(
        beam_size=beam_size,
        max_length=max_length,
        eos_id=EOS_ID,
        length_penalty=0.0,  # rank by log-probability: what the demo compares
        stopping=fb.Exact(),  # stop when no live beam can change the n-best any more
    )
    logits, cache = model.prefill(prompts)  # [B, V]: a prompt is read once, not once per beam
    state = search.init(batch_size=len(prompts), device=logits.device)
    steps = [search.step(state, logits)]
    while not state.all_done():
        step = steps[-1]
        cache = fb.reorder(cache, step.source_rows)  # rows follow their beams: first [B] -> [B*K], then [B*K] -> [B*K]
        logits, cache = model(step.tokens.flatten(), cache)  # [B*K, V]
        steps.append(search.step(state, logits))
        tick()
    hypotheses = search.finalize(state)
    return Completions(beam_size, hypotheses, steps, time.perf_counter() - began)


def complete_all(
    model: CodeLM, prompts: Sequence[Sequence[int]], beam_sizes: Sequence[int], max_length: int
) -> list[Completions]:
    """Complete the same prompts with one width after another, behind a progress bar."""
    costs = [4 + beam_size for beam_size in beam_sizes]  # of a step: one part is there for any width
    progress = Progress(total=max_length * sum(costs))
    found: list[Completions] = []
    try:
        for i, beam_size in enumerate(beam_sizes):
            progress.label = f"beam size {beam_size}"
            found.append(complete(model, prompts, beam_size, max_length, lambda cost=costs[i]: progress.advance(cost)))
            progress.reach(max_length * sum(costs[: i + 1]))
    finally:
        progress.close()
    return found


class Parser(argparse.ArgumentParser):
    """Says what was wrong in one line."""

    def error(self, message: str) -> NoReturn:
        message = message.removeprefix("argument ")
        if message.endswith("expected one argument"):
            message += ", got none"
        message = message.replace("not allowed with argument", "expected no other view beside it, got")
        self.exit(2, f"{message}\n")


def whole_number(low: int, high: int) -> Callable[[str], int]:
    """Return a reader of numbers from ``low`` to ``high``."""

    def read(text: str) -> int:
        if not (text.isascii() and text.isdigit() and len(text) < 10 and low <= int(text) <= high):
            raise argparse.ArgumentTypeError(f"expected a whole number from {low} to {high}, got {text!r}")
        return int(text)

    return read


def picture(text: str) -> str:
    """Read where a lattice is to be written."""
    folder, name = os.path.split(text)
    if not os.path.isdir(folder or ".") or os.path.splitext(name)[1] not in (".html", ".svg", ".txt", ".json"):
        raise argparse.ArgumentTypeError(f"expected .html, .svg, .txt or .json in a folder that exists, got {text!r}")
    return text


def beam_sizes(text: str) -> list[int]:
    """Read widths such as ``4,16``; greedy search is always the first."""
    try:
        return sorted({1, *map(whole_number(1, MAX_BEAM_SIZE), text.split(","))})
    except argparse.ArgumentTypeError:
        message = f"expected whole numbers from 1 to {MAX_BEAM_SIZE} with commas between, got {text!r}"
        raise argparse.ArgumentTypeError(message) from None


def make_parser() -> Parser:
    parser = Parser(
        prog="demo.py",
        description="Complete prompts of Python code by beam search: greedy beside wider beams.",
        epilog="A prompt of two lines in bash or zsh: $'def f(x):\\n'. Put -- before prompts that begin with -.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("prompts", nargs="*", metavar="PROMPT", help="the beginning of a piece of code; default: four of our own")
    add("--beams", type=beam_sizes, metavar="K,K", help=f"beam sizes beside greedy; default {BEAMS}")
    add("--max-length", type=whole_number(1, 200), default=64, metavar="T", help="tokens; default %(default)s")
    add(
        "--num",
        type=whole_number(1, MAX_BEAM_SIZE),
        metavar="N",
        help=f"completions to print of each search; default {NUM}, with a view all {COUNT}",
    )
    add(
        "--threads",
        type=whole_number(1, MAX_THREADS),
        default=1,
        metavar="N",
        help="default %(default)s: a small model",
    )
    add("--seed", type=whole_number(0, 999_999_999), metavar="N", help="of --stochastic and --sample; default 0")
    add("--to", type=picture, metavar="FILE", help="of --lattice: .html, .svg, .txt or .json; default lattice.html")
    views = parser.add_argument_group("other views of the same prompts").add_mutually_exclusive_group()
    for view, text in VIEWS.items():
        views.add_argument(f"--{view}", dest="view", action="store_const", const=view, help=text)
    return parser


def read_arguments(parser: Parser) -> argparse.Namespace:
    """Read the command line, or exit and say what does not fit together."""
    args, unknown = parser.parse_known_args()
    if unknown:
        options = ", ".join(f"--{name}" for name in (*VIEWS, "seed", "beams", "max-length", "num", "threads", "to"))
        parser.error(f"{unknown[0]}: expected {options} or --help, got {unknown[0]!r}")
    if args.beams and args.view:
        parser.error(f"--beams: expected no view beside it, got --{args.view}")
    if args.seed is not None and args.view not in ("stochastic", "sample"):
        got = f"--{args.view}" if args.view else "neither"
        parser.error(f"--seed: expected --stochastic or --sample beside it, got {got}")
    if args.to is not None and args.view != "lattice":
        parser.error(f"--to: expected --lattice beside it, got {f'--{args.view}' if args.view else 'nothing'}")
    return args


def encode(parser: Parser, tokenizer: Tokenizer, prompts: Sequence[str], max_length: int) -> list[list[int]]:
    """Turn prompts into token ids, or exit and say why not."""
    longest = CONTEXT - max_length - 1  # EOS stands before a prompt
    encoded = []
    for prompt in prompts:
        if not prompt:
            parser.error("PROMPT: expected some text, got ''")
        if not prompt.isprintable() and any("\ud800" <= character <= "\udfff" for character in prompt):
            parser.error(f"PROMPT: expected text in UTF-8, got {prompt!r}")
        encoded.append(tokenizer.encode(prompt))
        if len(encoded[-1]) > longest:
            parser.error(
                f"PROMPT: expected at most {longest} tokens with --max-length {max_length}, got {len(encoded[-1])}"
                f" in {prompt[:20]!r}..."
            )
    return encoded


def main() -> None:
    parser = make_parser()
    args = read_arguments(parser)
    prompts = args.prompts or (BEFORE_NAMES if args.view == "trie" else PROMPTS)
    torch.set_num_threads(args.threads)
    model, tokenizer = load()
    encoded = encode(parser, tokenizer, prompts, args.max_length)
    for cursor in find_cursors(prompts) if args.view == "trie" else ():
        if not cursor.names:
            parser.error(f"PROMPT: expected the beginning of {cursor.place} at its end, got {cursor.typed.strip()!r}")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal without the symbols shows "?"
    report = Report(tokenizer)
    parameters = sum(weight.numel() for weight in model.parameters())
    plural = "s" if len(prompts) > 1 else ""
    print(f"flashbeam {fb.__version__} completes {len(prompts)} prompt{plural} of Python code in one batch")
    report.note(f"language model: {parameters / 1e6:.1f} M parameters, on the CPU, threads: {args.threads}")
    if args.view:
        views = Views(model, tokenizer, args.max_length, args.num or COUNT, args.seed or 0, args.to or "lattice.html")
        views.show(args.view, prompts, encoded)
        return
    found = complete_all(model, encoded, args.beams or beam_sizes(BEAMS), args.max_length)
    report.note("log-prob: natural logarithm of a completion's probability; gain: over greedy")
    report.note(f"▸ a completion begins; ↵ new line, a blank per level; + no end in {args.max_length} tokens\n")
    for request, prompt in enumerate(prompts):
        report.rule(f"Prompt {request + 1} of {len(prompts)}")
        report.completions(found, request, prompt, args.num or NUM)
    drawn = found[min(1, len(found) - 1)]
    report.rule(f"Search tree of prompt 1, {drawn.name}")
    report.tree(drawn, 0, prompts[0])
    report.rule("Speed and gain")
    report.summary(found)
    report.note("  See all that a search tried, in a browser: make demo VIEW=lattice")


if __name__ == "__main__":
    try:
        main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader, such as `head`, has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
