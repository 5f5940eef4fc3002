# PYTHON_ARGCOMPLETE_OK
"""Prepare datasets: read, clean, split and tokenize texts once; training then reads the tokens in place.

python prepare.py notes/ --out notes --tokenizer bpe
python prepare.py 'dumps/*.jsonl.zst' --field content --clean --out web --licence "CC BY 4.0"
python prepare.py list                        # also: show NAME, verify NAME

SOURCE is a text file (also .gz and .zst), a folder, a quoted glob, a JSON lines or Parquet file, pydocs or shakespeare,
a dataset that the package datasets saved, or OWNER/NAME on the Hugging Face hub. To continue a preparation that was
interrupted, run the same command again.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.config.loader import ConfigLoader
from utils.config.settings import Config
from utils.errors import UserError
from utils.files import expand_home
from utils.machine.process import available_cores
from utils.machine.signals import raise_on_signals
from utils.terminal.cli import CODE_ROOT, PROJECT_ROOT, Parser, place, script
from utils.terminal.commands import print_json
from utils.terminal.config_flags import ExperimentArguments, parse_experiment
from utils.terminal.words import counted, size

if TYPE_CHECKING:  # arguments are parsed before numpy is imported
    from utils.corpora.datasets import Dataset
    from utils.preparation.options import Outcome, Preparation
    from utils.terminal.console import Terminal

COMMANDS = {
    "list": "list the datasets",
    "show": "show the size and the origin of a dataset, and what was removed from it",
    "verify": "read every byte of a dataset, and compare it with its checksums",
}
SETTINGS = (
    *("tokenizer", "bpe_vocab_size", "special_tokens", "unknown_token"),
    *("val_fraction", "corpora_dir", "datasets_dir"),
)
CLEANING = "configs/cleaning.yaml"
DRY_RUN = "dry_run"  # the name of the dataset in a dry run without --out


@script
def main(argv: Sequence[str]) -> int:
    if argv and argv[0] in COMMANDS:
        return run_command(argv)
    arguments = parse(argv)
    return make(preparation_options(arguments), arguments.own.json)


def parse(argv: Sequence[str]) -> ExperimentArguments:
    parser = Parser(prog="prepare.py", description=__doc__)
    parser.usage = (
        "python prepare.py SOURCE ... --out NAME [--FLAG VALUE ...]\n       python prepare.py list|show|verify"
    )
    add = parser.add_argument
    add("sources", metavar="SOURCE", nargs="+", help="what to read (above)")
    add("--out", metavar="NAME", help="name of the dataset in the folder of datasets, or a path")
    add(
        "--field",
        metavar="NAME",
        help="field of JSON lines, or column of a table, that has the text (default: text); with this flag, .json "
        "files are also read as JSON lines",
    )
    add(
        "--separator",
        metavar="TEXT",
        default="",
        help="text between the documents of a text file, such as "
        r"'<|endoftext|>' or '\n\n' (default: each file is one document)",
    )
    add(
        "--clean",
        metavar="FILE",
        nargs="?",
        const=CLEANING,
        help=f"clean the texts by the steps in FILE ({CLEANING} if no file is named); without this flag, nothing is "
        "changed or removed",
    )
    add(
        "--errors",
        choices=("strict", "replace", "skip"),
        default="strict",
        help="for NUL and bytes that are not UTF-8: report an error, replace them by U+FFFD, or skip the document "
        "(default: strict)",
    )
    add(
        "--tolerate",
        type=int,
        default=0,
        metavar="N",
        help="leave out up to N records that are not JSON or lack the field (default: 0)",
    )
    add(
        "--leaks",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="look for validation documents that nearly equal a training document (default: on)",
    )
    add("--workers", type=int, metavar="N", help="number of processes (default: one per core); does not affect results")
    add("--licence", "--license", metavar="TEXT", default="", help="licence of the texts, for CARD.md")
    add("--origin", metavar="TEXT", default="", help="origin of the texts, for CARD.md")
    add("--replace", action="store_true", help="replace an existing dataset of this name")
    add("--dry-run", action="store_true", help="read and clean everything, show what would be removed, write nothing")
    add("--json", action="store_true", help="print only warnings, and the result as JSON")
    return parse_experiment(argv, parser, sections=("data",), keys=SETTINGS)


def run_command(argv: Sequence[str]) -> int:
    """Run the command list, show or verify."""
    name = argv[0]
    parser = Parser(prog=f"prepare.py {name}", description=f"{COMMANDS[name][0].upper()}{COMMANDS[name][1:]}.")
    if name != "list":
        parser.add_argument("name", metavar="NAME", help="name or path of a dataset")
    parser.add_argument("--datasets-dir", type=place, metavar="DIR", help="folder of datasets (default: as configured)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse(argv[1:])

    from utils.preparation import commands

    folder = PROJECT_ROOT / (args.datasets_dir or ConfigLoader(PROJECT_ROOT).load().config.data.datasets_dir)
    if name == "list":
        rows = commands.list_datasets(folder)
        return print_answer(args.json, rows, lambda: commands.list_lines(rows, folder))
    dataset = commands.named_dataset(args.name, folder)
    if name == "show":
        return print_answer(args.json, commands.show_dataset(dataset), lambda: commands.show_lines(dataset))
    lines = commands.verify_dataset(dataset)
    return print_answer(args.json, {"name": dataset.name, "good": True, "found": lines}, lambda: lines)


def print_answer(as_json: bool, data: Any, lines: Callable[[], Iterable[Any]]) -> int:
    if as_json:
        print_json(data)
    else:
        from utils.terminal.console import Terminal, print_to

        console = Terminal().console
        for line in lines():
            print_to(console, line)
    return 0


def datasets_folder(config: Config) -> Path:
    return PROJECT_ROOT / config.data.datasets_dir


def preparation_options(arguments: ExperimentArguments) -> Preparation:
    """The preparation that the command line describes.

    Raises:
        UserError: there is a mistake in the command line or in the configuration.
    """
    args, config = arguments.own, arguments.load().config
    if args.out is None and not args.dry_run:
        raise UserError("--out NAME is missing: the name of the dataset (see prepare.py --help)")
    workers = available_cores() if args.workers is None else args.workers
    for flag, value, least in (("--workers", workers, 1), ("--tolerate", args.tolerate, 0)):
        if value < least:
            raise UserError(f"{flag} must be at least {least}, not {value}")
    try:
        separator = args.separator.encode("latin-1", "backslashreplace").decode("unicode_escape")
    except UnicodeDecodeError as error:
        raise UserError(f"--separator {args.separator!r}: {error.reason}") from None

    from utils.corpora.cleaning import load_pipeline
    from utils.corpora.readers import Reading
    from utils.preparation.options import Preparation

    corpora_dir = str(PROJECT_ROOT / config.data.corpora_dir)
    return Preparation(
        sources=args.sources,
        target=target_of(args.out or DRY_RUN, datasets_folder(config)),
        config=config.data.model_copy(update={"corpora_dir": corpora_dir}),
        reading=Reading(args.field or "text", separator, args.errors, args.field is not None, corpora_dir),
        tolerated=args.tolerate,
        pipeline=load_pipeline(cleaning_file(args.clean)) if args.clean else None,
        leaks=args.leaks,
        workers=workers,
        notes={key: value for key, value in (("licence", args.licence), ("origin", args.origin)) if value},
        replace=args.replace,
        dry_run=args.dry_run,
    )


def cleaning_file(name: str) -> Path:
    """The file that --clean names; configs/cleaning.yaml of the project or, if it has none, of the code."""
    if name != CLEANING:
        return Path(expand_home(name))
    own = PROJECT_ROOT / CLEANING
    return own if own.exists() else CODE_ROOT / CLEANING


def target_of(name: str, folder: Path) -> Path:
    """The folder of the dataset that --out names.

    Raises:
        UserError: the name is not valid, or it already names a corpus.
    """
    from utils.corpora.sources import NAMES

    path = Path(expand_home(name))
    if not path.name or path.name.startswith(".") or "\0" in name:
        raise UserError(f"--out {name!r}: expected a name that does not begin with a dot, or a path")
    if len(os.fsencode(path.name)) > 200:
        raise UserError(f"--out {name[:20]}...: a name of {len(path.name)} characters is too long")
    target = Path(os.path.abspath(path)) if os.sep in name else folder / name
    if target.parent == folder and target.name in NAMES:
        raise UserError(f"--out {name}: --dataset {target.name} means the registered corpus; choose another name")
    return target


def make(options: Preparation, as_json: bool) -> int:
    """Prepare the dataset and print the outcome."""
    from utils.preparation.commands import show_dataset
    from utils.preparation.options import Outcome
    from utils.preparation.pipeline import prepare
    from utils.terminal.console import Terminal

    terminal = Terminal(quiet=as_json)

    try:
        with raise_on_signals():
            made = prepare(options, terminal)
    except KeyboardInterrupt:
        if not options.dry_run:
            terminal.print("finished parts are kept; run the same command again to continue")
        raise
    if isinstance(made, Outcome):
        print_dry_run(made, options, terminal)
    else:
        print_result(made, terminal)
    if as_json:
        print_json(made.summary(options) if isinstance(made, Outcome) else show_dataset(made))
    return 0


def print_dry_run(outcome: Outcome, options: Preparation, terminal: Terminal) -> None:
    summary = outcome.summary(options)
    terminal.print(f"{counted(summary['documents_read'], 'document')} read, {summary['documents_kept']:,} would stay")
    print_removed(summary, terminal)
    if outcome.cleaning is not None:
        terminal.print(*outcome.cleaning.lines())


def print_removed(report: dict[str, Any], terminal: Terminal) -> None:
    for reason, facts in report["left_out"].items():
        examples = f", such as {facts['examples'][0]}" if facts["examples"] else ""
        terminal.print(f"left out, {reason}: {facts['count']:,}{examples}")


def print_result(dataset: Dataset, terminal: Terminal) -> None:
    """Print the contents of the dataset, and how to train on it."""
    from utils.files import read_json
    from utils.packing.prepared import MANY_LEAKS
    from utils.preparation.report import REPORT, leak_words

    report = read_json(dataset.folder / REPORT)
    print_removed(report, terminal)
    for step in report["cleaning"]:
        if step["documents_removed"] or step["documents_changed"]:
            removed = counted(step["documents_removed"], "document")
            terminal.print(f"cleaning, {step['step']}: {removed} removed, {step['documents_changed']:,} changed")
    for name, facts in report["splits"].items():
        words = f"{counted(facts['documents'], 'document')}, {facts['tokens']:,} tokens, {size(facts['bytes'])} of text"
        terminal.print(f"{name:<5} {words}")
    leaks = report["leaks"]
    if leaks["share"] > MANY_LEAKS:
        terminal.warn(f"{leak_words(leaks, report['splits']['val']['documents'])}: val/loss looks better than it is")
    elif leaks["looked_for"]:
        terminal.print(leak_words(leaks, report["splits"]["val"]["documents"]))
    terminal.print(f"{dataset.folder}: ready; its card is CARD.md")
    folder = datasets_folder(ConfigLoader(PROJECT_ROOT).load().config)  # where train.py looks without further flags
    name = dataset.name if dataset.folder.parent == folder else str(dataset.folder)
    terminal.print(f"python train.py --dataset {shlex.quote(name)}")


if __name__ == "__main__":
    sys.exit(main())
