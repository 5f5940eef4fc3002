"""Generate text from a run's export: streamed to the terminal, for a file of prompts, or in turns.

python inference.py baseline --prompt "The "
python inference.py latest --max-new-tokens 500 --temperature 0.7 --top-k 40 --seed 1
python inference.py runs/20260131_142501_baseline --temperature 0     # greedy
python inference.py baseline --prompt-file prompts.txt --out completions.jsonl
python inference.py baseline --interactive
python inference.py baseline wider --prompt "The " --html completions.html
python inference.py baseline --score text.txt --quantize int8
"""

from __future__ import annotations

import argparse
import functools
import io
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from utils.config.loader import ConfigLoader
from utils.config.settings import TrackingConfig
from utils.errors import UserError
from utils.runs.find import find_export
from utils.terminal.cli import PROJECT_ROOT, Parser, script

if TYPE_CHECKING:  # arguments are parsed before torch is imported
    from utils.inference.generator import Generator, Request
    from utils.inference.prompts import FilePrompt
    from utils.inference.quantization import Weights


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "runs",
        metavar="RUN",
        nargs="*",
        help="path, id, tag, part of an id, or latest (default: the newest with an export); several: side by side",
    )
    parser.add_argument(
        "--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:N or mps (default: auto)"
    )
    parser.add_argument("--runs-dir", type=Path, metavar="DIR", help="folder of the runs (default: as configured)")
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument(
        "--weights", choices=("float32", "bfloat16"), help="precision of the weights and activations (default: float32)"
    )
    weights.add_argument("--quantize", choices=("int8",), help="matrices of 8 bits, each row with a scale of its own")
    add_prompt_arguments(parser.add_argument_group("prompts"))
    add_sampling_arguments(parser.add_argument_group("sampling"))


def add_prompt_arguments(group: argparse._ArgumentGroup) -> None:
    source = group.add_mutually_exclusive_group()
    source.add_argument(
        "--prompt", default="", metavar="TEXT", help="text to continue; empty: start from a line break (default: empty)"
    )
    source.add_argument(
        "--prompt-file",
        type=Path,
        metavar="FILE",
        help='one prompt a line, or .jsonl with {"prompt": ...} in each line; empty lines are left out',
    )
    source.add_argument("--interactive", action="store_true", help="a prompt loop; /help lists its commands")
    source.add_argument(
        "--score", type=Path, metavar="FILE", help="loss, perplexity and bits per byte of a text, and nothing generated"
    )
    source.add_argument(
        "--show-info", action="store_true", help="parameters, vocabulary, training data and origin of the run"
    )
    group.add_argument(
        "--out", type=Path, metavar="FILE", help="JSONL with the completions of --prompt-file (default: stdout)"
    )
    group.add_argument(
        "--batch-size", type=int, default=16, metavar="N", help="sequences generated together (default: 16)"
    )
    group.add_argument(
        "--mode",
        choices=("text", "qa"),
        default="text",
        help="qa: a prompt is a question, put into the setting qa_template; the answer ends at qa_stop (default: text)",
    )
    group.add_argument("--stats", action="store_true", help="after the text, how fast it was generated, on stderr")
    group.add_argument("--html", type=Path, metavar="FILE", help="a page that shows several RUNs side by side")
    group.add_argument("--logprobs", action="store_true", help="of several RUNs, each token with its log-probability")


def add_sampling_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--max-new-tokens", type=int, default=300, metavar="N", help="tokens to generate (default: 300)")
    group.add_argument(
        "--temperature", type=float, default=0.8, metavar="X", help="below 1 sharper, 0 greedy (default: 0.8)"
    )
    group.add_argument("--top-k", type=int, metavar="N", help="draw among the N most likely tokens (default: all)")
    group.add_argument(
        "--top-p",
        type=float,
        metavar="X",
        help="draw among the most likely tokens that reach probability X (default: all)",
    )
    group.add_argument(
        "--min-p",
        type=float,
        metavar="X",
        help="draw among tokens at least X times as likely as the most likely one (default: all)",
    )
    group.add_argument(
        "--repetition-penalty",
        type=float,
        default=1.0,
        metavar="X",
        help="above 1: tokens that stood in the text become less likely (default: 1)",
    )
    group.add_argument(
        "--ban",
        action="append",
        default=[],
        metavar="TEXT",
        help=r"no token of TEXT is ever drawn; \n is a line break (repeatable)",
    )
    group.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help=r"the completion ends before TEXT; \n is a line break (repeatable)",
    )
    group.add_argument("--seed", type=int, default=1337, metavar="N", help="of the random stream (default: 1337)")
    group.add_argument(
        "--samples", type=int, default=1, metavar="N", help="completions of each prompt, each with the next seed"
    )
    group.add_argument(
        "--window",
        choices=("sliding", "exact"),
        default="sliding",
        help="past the context, sliding: go on from the cached tokens (with learned positions their newer half is "
        "computed anew when the context is full); exact: compute all anew for each token (default: sliding)",
    )


SAMPLING = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "ban", "stop", "seed")
GENERATION = (*SAMPLING, "samples", "window", "mode", "stats", "batch_size")
NOT_WITH = {  # what would say nothing
    "score": (*GENERATION, "out", "html", "logprobs"),
    "show_info": (*GENERATION, "out", "html", "logprobs", "weights", "quantize"),
    "interactive": ("samples", "batch_size", "out", "html", "logprobs"),
    "prompt_file": ("html", "logprobs"),
}
MOST = 1_000_000  # of all that is counted


def check_arguments(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """What argparse cannot say.

    Raises:
        UserError: a number out of bounds, flags that do not go together.
    """
    given = [dest for dest, value in vars(args).items() if value != parser.get_default(dest)]
    for mode, others in NOT_WITH.items():
        if mode in given and (idle := [_flag(dest) for dest in others if dest in given]):
            raise UserError(f"{' and '.join(idle)} cannot go with {_flag(mode)}")
    for dest in ("max_new_tokens", "batch_size", "samples"):
        if not 1 <= (value := getattr(args, dest)) <= MOST:
            raise UserError(f"{_flag(dest)} must be from 1 to {MOST:,}, not {value}")
    if args.out is not None and args.prompt_file is None:
        raise UserError("--out is for the completions of --prompt-file, which is missing")
    for dest in ("html", "logprobs"):
        if dest in given and len(args.runs) < 2:
            raise UserError(f"{_flag(dest)} compares several RUNs, expected at least 2")
    if len(args.runs) > 1 and (single := [d for d in ("interactive", "prompt_file", "stats") if d in given]):
        raise UserError(f"{_flag(single[0])} is for one RUN; --prompt, --score and --show-info compare several")


def _flag(dest: str) -> str:
    return f"--{dest.replace('_', '-')}"


@script
def main(argv: Sequence[str]) -> int:
    parser = Parser(prog="inference.py", usage="python inference.py [RUN ...] [--FLAG VALUE ...]", description=__doc__)
    add_arguments(parser)
    args = parser.parse(argv)
    check_arguments(args, parser)
    tracking = configured()
    runs_dir = PROJECT_ROOT / (args.runs_dir or tracking.runs_dir)
    exports = [find_export(run, runs_dir) for run in args.runs or [None]]
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # what a terminal without UTF-8 cannot show
    if args.score is not None:
        return score_text(args, exports)
    if args.show_info:
        return show_info(args, exports)
    if len(exports) > 1:
        return compare_runs(args, exports, tracking)
    (export,) = exports
    if args.prompt_file is not None:
        return complete_file(args, export, tracking)
    if args.interactive:
        return converse(args, export, tracking)
    return complete_prompt(args, export, tracking)


def configured() -> TrackingConfig:
    return ConfigLoader(PROJECT_ROOT).load().config.tracking


def compare_runs(args: argparse.Namespace, exports: Sequence[Path], tracking: TrackingConfig) -> int:
    """Completions of one prompt by several runs, side by side."""
    from utils.inference.page import completion_page
    from utils.inference.prompts import check_out, write_out
    from utils.inference.side_by_side import RunCompletions, completion_tables
    from utils.runs.metrics import decode_number
    from utils.terminal.console import Terminal

    if args.html is not None:
        check_out(args.html)
    asked = []
    for export in exports:  # mistakes before hours of work
        try:
            generator, request = load(args, export, tracking)
            prompt, request = to_continue(args, generator, request)
        except UserError as error:
            raise UserError(f"{export}: {error}") from None
        asked.append((generator, prompt, request))
    runs = []
    for generator, prompt, request in asked:
        completions = generator.generate_batch([prompt] * args.samples, request, args.batch_size)
        loss = generator.training.get("val/loss")
        runs.append(
            RunCompletions(
                generator.name, None if loss is None else decode_number(loss), completions, generator.tokenizer
            )
        )
    terminal = Terminal()
    terminal.print(*completion_tables(runs, terminal.console.width, args.logprobs))
    if args.html is not None:
        chosen = [f"{_flag(dest)[2:]} {value}" for dest in SAMPLING if (value := getattr(args, dest))]
        write_out(args.html, completion_page(runs, ", ".join(chosen)))
        print(f"wrote {args.html}", file=sys.stderr)
    return 0


def score_text(args: argparse.Namespace, exports: Sequence[Path]) -> int:
    """--score: how well each run predicts a text, and what smaller weights cost.

    Raises:
        UserError: the file cannot be read, is not UTF-8, has characters without a token or nothing to predict.
    """
    from tokenizer import TokenizerError
    from utils.inference.generator import Generator
    from utils.inference.prompts import read_text
    from utils.inference.quantization import with_weights
    from utils.inference.scoring import score, score_report
    from utils.terminal.console import Terminal

    text, terminal = read_text(args.score), Terminal()
    weights: Weights = args.quantize or args.weights or "float32"
    for export in exports:
        generator = Generator.from_export(export, args.device)
        try:
            scores = [("float32", generator.score(text))]
        except TokenizerError as error:
            line = text.count("\n", 0, error.position) + 1
            raise UserError(f"{args.score}:{line}: {error}") from None
        except UserError as error:
            raise UserError(f"{args.score}: {error}") from None
        if weights != "float32":
            smaller = with_weights(generator.model, weights)
            scores.append((weights, score(smaller, generator.tokenizer, text)))
        terminal.print(score_report(f"{args.score}, by {generator.name}", scores))
    return 0


def show_info(args: argparse.Namespace, exports: Sequence[Path]) -> int:
    """--show-info: what each run is."""
    from utils.inference.export import load_export
    from utils.inference.info import info_screen
    from utils.machine.device import choose_device
    from utils.terminal.console import Terminal

    terminal = Terminal()
    for folder in exports:
        terminal.print(*info_screen(load_export(folder, choose_device(args.device)), folder))
    return 0


def load(args: argparse.Namespace, export: Path, tracking: TrackingConfig) -> tuple[Generator, Request]:
    """The model, and how to generate with it.

    Raises:
        UserError: a damaged export, no such device, options out of bounds, characters without a token.
    """
    from utils.inference.generator import Generator, Request
    from utils.inference.prompts import banned_tokens, stop_strings
    from utils.inference.sampling import SamplingOptions

    options = SamplingOptions(args.temperature, args.top_k, args.top_p, args.min_p, args.repetition_penalty)
    request = Request(args.max_new_tokens, options, seed=args.seed, window=args.window)
    generator = Generator.from_export(export, args.device, args.quantize or args.weights or "float32", tracking)
    options = replace(options, banned=banned_tokens(generator.tokenizer, args.ban))
    return generator, replace(request, options=options, stops=stop_strings(generator.tokenizer, args.stop))


def complete_prompt(args: argparse.Namespace, export: Path, tracking: TrackingConfig) -> int:
    """--prompt: the text as it comes; several samples one after the other."""
    from utils.terminal.console import dim, say

    generator, request = load(args, export, tracking)
    prompt, request = to_continue(args, generator, request)
    shown = "" if args.mode == "qa" else prompt
    if args.samples == 1:
        say(shown)
        for text in generator.stream(prompt, request):
            say(text)
        print(flush=True)
    else:
        completions = generator.completions([prompt] * args.samples, request, args.batch_size)
        for number, completion in enumerate(completions, start=1):
            print(dim(f"sample {number} of {args.samples}, seed {completion.seed}"))
            say(f"{shown}{completion.text}\n")
    if args.stats:
        print_stats(generator, request)
    return 0


def to_continue(args: argparse.Namespace, generator: Generator, request: Request) -> tuple[str, Request]:
    """--prompt as the model is to continue it, and how; that it sees only the end of it is told.

    Raises:
        UserError: a character without a token.
    """
    from utils.inference.decode import start_tokens

    prompt = args.prompt
    if args.mode == "qa":
        prompt, request = generator.qa_prompt(prompt), generator.qa_request(request)
    tokens = start_tokens(generator.tokenizer, prompt)
    if len(tokens) > (block_size := generator.model.config.block_size):
        print(f"note: of the {len(tokens)} tokens of the prompt the model sees the last {block_size}", file=sys.stderr)
    return prompt, request


def complete_file(args: argparse.Namespace, export: Path, tracking: TrackingConfig) -> int:
    """--prompt-file: a JSONL line for each completion, into --out at the end or to stdout as they come."""
    from utils.inference.prompts import check_out, completion_line, read_prompts, write_out
    from utils.terminal.progress import CompletionProgress

    prompts = read_prompts(args.prompt_file)
    if args.out is not None:
        check_out(args.out, args.prompt_file)
    elif isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8")  # as JSON is
    generator, request = load(args, export, tracking)
    asked = [prompt for prompt in prompts for _ in range(args.samples)]
    texts = [text for text in encodable(prompts, generator, args.mode) for _ in range(args.samples)]
    if args.mode == "qa":
        request = generator.qa_request(request)
    lines = []
    with CompletionProgress(len(asked), quiet=args.out is None and sys.stdout.isatty()) as progress:
        for prompt, completion in zip(asked, generator.completions(texts, request, args.batch_size), strict=True):
            line = completion_line(prompt, completion)
            if args.out is None:
                print(line, flush=True)
            lines.append(line)
            progress.advance(len(completion.tokens))
    if args.out is not None:
        write_out(args.out, "".join(f"{line}\n" for line in lines))
        print(f"wrote {len(lines):,} completions to {args.out}", file=sys.stderr)
    if args.stats:
        print_stats(generator, request)
    return 0


def encodable(prompts: Sequence[FilePrompt], generator: Generator, mode: str) -> list[str]:
    """What the model is to continue for each prompt of a file; those that it sees the end of are told.

    Raises:
        UserError: a character without a token, with its file and line.
    """
    from utils.inference.decode import start_tokens

    texts, long, block_size = [], 0, generator.model.config.block_size
    for prompt in prompts:
        try:
            texts.append(generator.qa_prompt(prompt.text) if mode == "qa" else prompt.text)
            long += len(start_tokens(generator.tokenizer, texts[-1])) > block_size
        except UserError as error:
            raise UserError(f"{prompt.place}: {error}") from None
    if long:
        print(f"note: of {long:,} longer prompts the model sees the last {block_size} tokens", file=sys.stderr)
    return texts


def converse(args: argparse.Namespace, export: Path, tracking: TrackingConfig) -> int:
    """--interactive: a loop over what is typed."""
    from utils.inference.interactive import Conversation

    generator, request = load(args, export, tracking)
    report = functools.partial(print_stats, generator) if args.stats else None
    return Conversation(generator, request, args.mode == "qa", report).run()


def print_stats(generator: Generator, request: Request) -> None:
    """--stats, on stderr."""
    from utils.terminal.words import fact_lines

    rows = generator.stats.rows(generator.model, cached=request.window == "sliding")
    print(fact_lines(rows).plain, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
