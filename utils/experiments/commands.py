"""The commands of experiments.py: one declaration each, and what all of them share.

A command names its flags and computes an Answer; reading the command line, --json, printing and the exit status are
the same for all.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from utils.config.loader import ConfigLoader
from utils.errors import UserError
from utils.runs.find import resolve_run, resolve_runs
from utils.runs.index import IndexedRun, read_index, read_run
from utils.runs.run import RunError
from utils.terminal.cli import PROJECT_ROOT, Parser, place
from utils.terminal.console import Terminal, print_to
from utils.terminal.streams import is_unicode
from utils.terminal.words import json_text

if TYPE_CHECKING:
    from rich.console import Console, RenderableType


class Answer(NamedTuple):
    """What a command found.

    data: printed by --json; dataclasses, paths and non-finite numbers are allowed.
    render: makes what is printed otherwise, for the width of the console.
    status: the exit status.
    """

    data: Any
    render: Callable[[Console], Iterable[RenderableType]]
    status: int = 0


class Flag(NamedTuple):
    """The arguments of one `add_argument`."""

    names: tuple[str, ...]
    options: dict[str, Any]


@dataclass(frozen=True)
class Command:
    """One command: `python experiments.py NAME FLAGS`.

    help: one line, without a full stop.
    compute: answers the parsed command line; raises UserError for a mistake in it.
    note: a sentence below the help of the command.
    """

    name: str
    help: str
    flags: Sequence[Flag]
    compute: Callable[[argparse.Namespace], Answer]
    note: str | None = None

    def add_to(self, commands: argparse._SubParsersAction[Parser]) -> None:
        """Add the parser of this command, with the flags that all commands have."""
        description = f"{self.help[0].upper()}{self.help[1:]}."
        parser = commands.add_parser(self.name, help=self.help, description=description, epilog=self.note)
        for names, options in self.flags:
            parser.add_argument(*names, **options)
        parser.add_argument("--runs-dir", type=place, metavar="DIR", help="folder of the runs (default: as configured)")
        parser.add_argument("--json", action="store_true", help="print JSON")
        parser.set_defaults(command=self)

    def run(self, args: argparse.Namespace) -> int:
        """Compute the answer and print it.

        Returns:
            The exit status.
        """
        answer = self.compute(args)
        if args.json:
            print(json_text(_as_json(answer.data), indent=2, ensure_ascii=not is_unicode(sys.stdout)))
            return answer.status
        console = Terminal().console
        for part in answer.render(console):
            print_to(console, part)
        return answer.status


COMMANDS: list[Command] = []


def flag(*names: str, **options: Any) -> Flag:
    """A flag or argument of a command, written as for `add_argument`."""
    return Flag(names, options)


def command(
    name: str, help: str, *flags: Flag, note: str | None = None
) -> Callable[[Callable[[argparse.Namespace], Answer]], Callable[[argparse.Namespace], Answer]]:
    """Decorator: the function becomes the command `name`, in the order of the file."""

    def declare(compute: Callable[[argparse.Namespace], Answer]) -> Callable[[argparse.Namespace], Answer]:
        COMMANDS.append(Command(name, help, flags, compute, note))
        return compute

    return declare


RUN_HELP = "path, id, tag, NAME@vN, part of an id, or latest"
RUN = flag("run", metavar="RUN", help=RUN_HELP)
RUNS = flag("runs", metavar="RUN", nargs="+", help=RUN_HELP)
WHERE = flag("--where", metavar="SQL", help="condition: \"status = 'completed' and learning_rate > 1e-3\"")
ALL_RUNS = (  # several runs, of which a tag or a condition can name many at once
    flag("runs", metavar="RUN", nargs="*", help="path, id, tag (all its runs), NAME@vN, part of an id, or latest"),
    flag("--where", metavar="SQL", help="of the named runs, or of all, those that fulfil a condition, as for list"),
)
METRIC = flag("--metric", default="val/loss", metavar="NAME", help="name in the log (default: val/loss)")


def runs_folder(args: argparse.Namespace) -> Path:
    """The folder of the runs: --runs-dir, or as configured."""
    runs_dir = args.runs_dir or ConfigLoader(PROJECT_ROOT).load().config.tracking.runs_dir
    return PROJECT_ROOT / runs_dir


def run_path(args: argparse.Namespace) -> Path:
    """The run directory that RUN names.

    Raises:
        RunError: there is no such run.
    """
    return Path(os.path.abspath(resolve_run(args.run, runs_folder(args))))  # `.` has no name


def named_run(text: str, runs_dir: Path) -> IndexedRun:
    """What is known about the run that RUN names; of a tag, about its newest run.

    Raises:
        UserError: there is no such run, or a folder of that name that is not a run, with the reason.
    """
    return _named(text, runs_dir)[-1]


def _named(text: str, runs_dir: Path) -> list[IndexedRun]:
    """What is known about each run that RUN names."""
    try:
        return [read_run(Path(os.path.abspath(path))) for path in resolve_runs(text, runs_dir)]
    except RunError:
        if text and (runs_dir / text).exists():
            raise UserError(f"{text} is not a run: {read_run(runs_dir / text).problem}") from None
        raise


def named_runs(args: argparse.Namespace, least: int = 1) -> list[IndexedRun]:
    """The runs that are named, each once; of a tag, its newest run.

    Raises:
        UserError: there is no such run, or fewer than `least`.
    """
    folder = runs_folder(args)
    return _at_least(least, [named_run(text, folder) for text in args.runs], args.runs)


def all_named_runs(args: argparse.Namespace, least: int = 1) -> list[IndexedRun]:
    """The runs that the flags ALL_RUNS name, each once: all of a tag, those that fulfil a condition.

    Raises:
        UserError: there is no such run, or fewer than `least`; or the condition is not valid SQL.
    """
    if not args.runs and args.where is None:
        raise UserError(f"{args.command.name}: expected RUN or --where SQL (see experiments.py {args.command.name} -h)")
    folder = runs_folder(args)
    runs = [run for text in args.runs for run in _named(text, folder)]
    if args.where is not None:
        from utils.experiments.sql import choose_runs

        runs = choose_runs(runs if args.runs else read_index(folder), args.where)
    return _at_least(least, runs, [*args.runs, *([f"--where {args.where}"] if args.where is not None else [])])


def _at_least(least: int, runs: Iterable[IndexedRun], words: Iterable[str]) -> list[IndexedRun]:
    different = {run.path: run for run in runs}
    if len(different) < least:
        expected = f"{least} different runs" if least > 1 else "a run"
        raise UserError(f"expected {expected}, got {len(different)}: {', '.join(words)}")
    return list(different.values())


def _as_json(value: Any) -> Any:
    """`value` in the types of JSON; NaN and infinities are strings, as in the logs."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _as_json(fields_of(value))
    if isinstance(value, dict):
        return {str(key): _as_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, str | int | float | None) else str(value)


def fields_of(value: Any) -> dict[str, Any]:
    """The fields of a dataclass by name."""
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
