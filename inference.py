# PYTHON_ARGCOMPLETE_OK
"""Generate text from a run's export: streamed to the terminal, for a file of prompts, or in a conversation.

python inference.py baseline --prompt "The "
python inference.py latest --max-new-tokens 500 --temperature 0.7 --top-k 40 --seed 1
python inference.py runs/20260131_142501_baseline --temperature 0     # greedy
python inference.py baseline --prompt-file prompts.txt --out completions.jsonl
python inference.py wider --draft baseline --stats                    # a small run proposes, the large one judges
python inference.py baseline --interactive
python inference.py baseline wider --prompt "The " --html completions.html
python inference.py baseline --score text.txt --quantize int8
"""

from __future__ import annotations

import argparse
import functools
import io
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from utils.config.loader import flag_name
from utils.config.settings import InferenceConfig
from utils.errors import UserError
from utils.inference.flags import add_arguments
from utils.machine.process import hide_imports
from utils.runs.find import find_export
from utils.terminal.cli import PROJECT_ROOT, Parser, script
from utils.terminal.config_flags import parse_experiment
from utils.terminal.words import printable

if TYPE_CHECKING:  # arguments are parsed before torch is imported
    from utils.inference.generator import Generator, Request
    from utils.inference.prompts import FilePrompt
    from utils.inference.quantization import Weights


def complete_prompt(args: argparse.Namespace, exports: Sequence[Path], settings: InferenceConfig) -> int:
    """--prompt: print the text as it is generated, several samples one after the other, or a JSON line for each."""
    from utils.inference.prompts import FilePrompt, completion_line
    from utils.terminal.console import dim, say

    generator, request = load(args, exports[0], settings)
    prompt, request = with_template(args, generator, request)
    shown = "" if args.mode == "qa" else prompt
    if args.json:
        asked = FilePrompt("--prompt", prompt, {"prompt": args.prompt})
        for completion in generator.completions([prompt] * args.samples, request, args.batch_size):
            print(completion_line(asked, completion), flush=True)
    elif args.samples == 1:
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


def compare_runs(args: argparse.Namespace, exports: Sequence[Path], settings: InferenceConfig) -> int:
    """Several RUNs: print their completions of one prompt side by side."""
    from utils.inference.page import completion_page
    from utils.inference.prompts import FilePrompt, check_out, completion_line, write_out
    from utils.inference.side_by_side import RunCompletions, completion_tables
    from utils.runs.metrics import decode_number
    from utils.terminal.console import Terminal

    if args.html is not None:
        check_out(args.html)
    asked = []
    for export in exports:  # mistakes are reported before hours of work
        try:
            generator, request = load(args, export, settings)
            prompt, request = with_template(args, generator, request)
        except UserError as error:
            raise UserError(f"{export}: {error}") from None
        asked.append((generator, prompt, request))
    runs = []
    for generator, prompt, request in asked:
        completions = generator.generate_batch([prompt] * args.samples, request, args.batch_size)
        val_loss = generator.training.get("val/loss")
        val_loss = None if val_loss is None else decode_number(val_loss)
        runs.append(RunCompletions(generator.name, val_loss, completions, generator.tokenizer))
    terminal = Terminal(quiet=args.json)
    terminal.print(*completion_tables(runs, terminal.console.width, args.logprobs))
    if args.json:
        for run in runs:
            record = FilePrompt("--prompt", args.prompt, {"run": run.name, "prompt": args.prompt})
            print(*(completion_line(record, completion) for completion in run.completions), sep="\n")
    if args.html is not None:
        values = settings.model_dump() | vars(args)
        chosen = [f"{flag_name(key)[2:]} {values[key]}" for key in SAMPLING if values[key] not in (None, "", [], ())]
        write_out(args.html, completion_page(runs, ", ".join(chosen)))
        print(printable(f"wrote {args.html}"), file=sys.stderr)
    return 0


def complete_file(args: argparse.Namespace, exports: Sequence[Path], settings: InferenceConfig) -> int:
    """--prompt-file: write a JSONL line for each completion, all into --out at the end or to stdout one by one."""
    from utils.inference.prompts import check_out, completion_line, read_prompts, write_out
    from utils.terminal.progress import CompletionProgress

    prompts = read_prompts(args.prompt_file)
    if args.out is not None:
        check_out(args.out, args.prompt_file)
    elif isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8")  # the encoding of JSON
    generator, request = load(args, exports[0], settings)
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
        print(printable(f"wrote {len(lines):,} completions to {args.out}"), file=sys.stderr)
    if args.stats:
        print_stats(generator, request)
    return 0


def converse(args: argparse.Namespace, exports: Sequence[Path], settings: InferenceConfig) -> int:
    """--interactive: let a person and the model write one text in turns."""
    from utils.inference.interactive import Conversation

    generator, request = load(args, exports[0], settings)
    report = functools.partial(print_stats, generator) if args.stats else None
    return Conversation(generator, request, args.mode == "qa", report).run()


def score_text(args: argparse.Namespace, exports: Sequence[Path], settings: InferenceConfig) -> int:
    """--score: print how well each run predicts a text, and how much smaller weights change that.

    Raises:
        UserError: the file cannot be read, is not UTF-8, has text without a token or nothing to predict.
    """
    from tokenizer import TokenizerError
    from utils.inference.export import document_token
    from utils.inference.generator import Generator
    from utils.inference.prompts import read_text
    from utils.inference.quantization import with_weights
    from utils.inference.scoring import score, score_report
    from utils.terminal.commands import print_json
    from utils.terminal.console import Terminal

    text, terminal = read_text(args.score), Terminal(quiet=args.json)
    weights: Weights = args.quantize or ("float32" if args.weights == "auto" else args.weights)
    for export in exports:
        generator = Generator.from_export(export, args.device, "float32")
        read_unknown(args, generator)
        try:
            scores = [("float32", generator.score(text))]
        except TokenizerError as error:
            line = "" if error.position is None else f":{text.count(chr(10), 0, error.position) + 1}"
            raise UserError(f"{args.score}{line}: {error}") from None
        except UserError as error:
            raise UserError(f"{args.score}: {error}") from None
        if weights != "float32":
            smaller = with_weights(generator.model, weights)
            begin = document_token(generator.tokenizer, generator.training)
            scores.append((weights, score(smaller, generator.tokenizer, text, begin)))
        terminal.print(score_report(f"{args.score}, by {generator.name}", scores))
        if args.json:
            for kind, found in scores:
                facts = {"run": generator.name, "text": args.score, "weights": kind, **found.facts()}
                print_json(facts, indent=None)
    return 0


def show_info(args: argparse.Namespace, exports: Sequence[Path], settings: InferenceConfig) -> int:
    """--show-info: describe each run."""
    from utils.inference.export import load_export
    from utils.inference.info import info_data, info_screen
    from utils.machine.device import choose_device
    from utils.terminal.commands import print_json
    from utils.terminal.console import Terminal

    terminal = Terminal(quiet=args.json)
    for folder in exports:
        export = load_export(folder, choose_device(args.device))
        terminal.print(*info_screen(export, folder))
        if args.json:
            print_json(info_data(export, folder), indent=None)
    return 0


class Mode(NamedTuple):
    """What inference.py does in one call.

    name: what messages call the mode.
    options: flags that mean something in this mode, besides RUN, --device, --runs-dir and --config.
    """

    name: str
    run: Callable[[argparse.Namespace, Sequence[Path], InferenceConfig], int]
    options: frozenset[str]
    several_runs: bool = False


SAMPLING = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "ban", "stop", "seed")
WEIGHTS = frozenset({"weights", "quantize"})
GENERATION = WEIGHTS | {"unknown_token", *InferenceConfig.model_fields, *SAMPLING, "window", "mode"}
DRAFT = frozenset({"draft", "draft_tokens"})
MODES = {
    "prompt": Mode("one RUN", complete_prompt, GENERATION | DRAFT | {"samples", "batch_size", "stats", "json"}),
    "compare": Mode(
        "several RUNs",
        compare_runs,
        GENERATION | {"samples", "batch_size", "html", "logprobs", "json"},
        several_runs=True,
    ),
    "prompt_file": Mode(
        "--prompt-file", complete_file, GENERATION | DRAFT | {"samples", "batch_size", "stats", "out", "json"}
    ),
    "interactive": Mode("--interactive", converse, GENERATION | DRAFT | {"stats"}),
    "score": Mode("--score", score_text, WEIGHTS | {"unknown_token", "json"}, several_runs=True),
    "show_info": Mode("--show-info", show_info, frozenset({"json"}), several_runs=True),
}
OPTIONS = frozenset().union(*(mode.options for mode in MODES.values()))


def choose_mode(args: argparse.Namespace, parser: argparse.ArgumentParser) -> Mode:
    """The mode that the command line asks for; argparse lets at most one flag name it.

    Raises:
        UserError: there is an option of other modes, or too many RUNs.
    """
    given = [dest for dest, value in vars(args).items() if value != parser.get_default(dest)]
    named = [dest for dest in given if dest in MODES]
    name = "compare" if named in ([], ["prompt"]) and len(args.runs) > 1 else named[0] if named else "prompt"
    mode = MODES[name]
    if len(args.runs) > 1 and not mode.several_runs:
        raise UserError(f"{mode.name} is for one RUN")
    for dest in given:
        if dest in OPTIONS - mode.options:
            others = ", ".join(other.name for other in MODES.values() if dest in other.options)
            raise UserError(f"{flag_name(dest)} cannot go with {mode.name}; it goes with: {others}")
    return mode


@script
def main(argv: Sequence[str]) -> int:
    usage = "python inference.py [RUN ...] [--FLAG VALUE ...]"
    parser = Parser(prog="inference.py", usage=usage, description=__doc__)
    add_arguments(parser)
    parsed = parse_experiment(argv, parser, sections=("inference",))
    args = parsed.own
    mode = choose_mode(args, parser)
    config = parsed.load().config
    runs_dir = PROJECT_ROOT / (args.runs_dir or config.tracking.runs_dir)
    exports = [find_export(run, runs_dir) for run in args.runs or [None]]
    args.runs_dir = runs_dir
    return mode.run(args, exports, config.inference)


def load(args: argparse.Namespace, export: Path, settings: InferenceConfig) -> tuple[Generator, Request]:
    """Load the model of an export, and build the request of the command line.

    Raises:
        UserError: a damaged export, no such device, options out of bounds, or text without a token.
    """
    from utils.inference.generator import Generator, Request, find_draft
    from utils.inference.prompts import banned_tokens, stop_strings

    hide_imports()
    request = replace(Request.configured(settings), seed=args.seed, window=args.window)
    if args.draft is not None and args.window != "sliding":
        raise UserError(f"--draft needs --window sliding, not {args.window}")
    draft = find_draft(args.draft, args.runs_dir)
    weights = args.quantize or args.weights
    generator = Generator.from_export(export, args.device, weights, settings, draft, args.draft_tokens)
    read_unknown(args, generator)
    options = replace(request.options, banned=banned_tokens(generator.tokenizer, args.ban))
    return generator, replace(request, options=options, stops=stop_strings(generator.tokenizer, args.stop))


def read_unknown(args: argparse.Namespace, generator: Generator) -> None:
    """With --unknown-token, read characters that are not in the vocabulary as that one."""
    if args.unknown_token is not None:
        from utils.config.settings import DataConfig

        generator.tokenizer = generator.tokenizer.adjusted(DataConfig(unknown_token=args.unknown_token))


def with_template(args: argparse.Namespace, generator: Generator, request: Request) -> tuple[str, Request]:
    """Return --prompt, put into qa_template with --mode qa, and its request. Prints a note if the prompt is too long.

    Raises:
        UserError: text without a token.
    """
    from utils.inference.decode import start_tokens

    prompt = args.prompt
    if args.mode == "qa":
        prompt, request = generator.qa_prompt(prompt), generator.qa_request(request)
    tokens = start_tokens(generator.tokenizer, prompt)
    if len(tokens) > (block_size := generator.model.config.block_size):
        print(f"note: the model sees only the last {block_size} of the prompt's {len(tokens)} tokens", file=sys.stderr)
    return prompt, request


def encodable(prompts: Sequence[FilePrompt], generator: Generator, mode: str) -> list[str]:
    """Return the text to continue for each prompt of a file. Prints a note if prompts are too long.

    Raises:
        UserError: a prompt has text without a token; the message has its file and line.
    """
    from utils.inference.decode import start_tokens

    texts, too_long, block_size = [], 0, generator.model.config.block_size
    for prompt in prompts:
        try:
            texts.append(generator.qa_prompt(prompt.text) if mode == "qa" else prompt.text)
            too_long += len(start_tokens(generator.tokenizer, texts[-1])) > block_size
        except UserError as error:
            raise UserError(f"{prompt.place}: {error}") from None
    if too_long:
        print(f"note: the model sees only the last {block_size} tokens of {too_long:,} prompts", file=sys.stderr)
    return texts


def print_stats(generator: Generator, request: Request) -> None:
    """--stats: print the speed of generation on stderr."""
    from utils.terminal.words import fact_lines

    rows = generator.stats.rows(generator.model, cached=request.window == "sliding")
    print(printable(fact_lines(rows).plain), file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
