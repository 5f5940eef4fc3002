"""Flags that the commands of experiments.py share, and the runs that those flags name."""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from utils.errors import UserError, shown
from utils.experiments.curve import AXES
from utils.runs.find import resolve_run, resolve_runs
from utils.runs.run import RunError
from utils.terminal.cli import PROJECT_ROOT
from utils.terminal.commands import Commands, flag

if TYPE_CHECKING:
    from utils.runs.index import IndexedRun

COMMANDS = Commands()
command = COMMANDS.declare

RUN_HELP = "path, id, tag, NAME@vN, part of an id, or latest"
RUN = flag("run", metavar="RUN", help=RUN_HELP)
RUNS = flag("runs", metavar="RUN", nargs="+", help=RUN_HELP)
WHERE = flag("--where", metavar="SQL", help="condition: \"status = 'completed' and learning_rate > 1e-3\"")
ALL_RUNS = (  # a tag, a sweep or a condition can each name many runs
    flag(
        "runs",
        metavar="RUN",
        nargs="*",
        help="path, id, tag or sweep (all runs), NAME@vN, part of an id, latest",
    ),
    flag("--where", metavar="SQL", help="only the runs (of those named, or of all) that fulfil a condition; see list"),
)
METRIC = flag("--metric", default="val/loss", metavar="NAME", help="name in the log (default: val/loss)")
COMPARED_METRIC = flag(
    "--metric", metavar="NAME", help="(default: val/loss; val/bits_per_byte if the tokenizers differ)"
)


def weight(text: str) -> float:
    """Argument type for the weight of the past in a moving average: at least 0 and below 1."""
    with contextlib.suppress(ValueError):
        if 0 <= (value := float(text)) < 1:
            return value
    raise argparse.ArgumentTypeError(f"expected a number >= 0 and < 1, got {shown(text)}")


CURVE = (
    flag("--x", choices=AXES, default="step", help="the axis (default: step)"),
    flag("--smooth", type=weight, default=0.0, metavar="X", help="weight of the past, 0 to 1 (default: 0)"),
)


def runs_folder(args: argparse.Namespace) -> Path:
    """The folder of the runs: --runs-dir, or the configured one."""
    if args.runs_dir:
        return PROJECT_ROOT / args.runs_dir
    from utils.config.loader import ConfigLoader  # takes a third of a second, and --help does not need it

    return PROJECT_ROOT / ConfigLoader(PROJECT_ROOT).load().config.tracking.runs_dir


def run_path(args: argparse.Namespace) -> Path:
    """The run directory that RUN names, as an absolute path.

    Raises:
        RunError: there is no such run.
    """
    return Path(os.path.abspath(resolve_run(args.run, runs_folder(args))))  # the path `.` would have no name


def named_run(text: str, runs_dir: Path) -> IndexedRun:
    """The run that RUN names; for a tag, its newest run.

    Raises:
        UserError: there is no such run, or the folder of that name is not a run; the message says why.
    """
    return _named(text, runs_dir, lambda text, runs_dir: [resolve_run(text, runs_dir)])[0]


def _named(text: str, runs_dir: Path, resolve: Callable[[str, Path], list[Path]] = resolve_runs) -> list[IndexedRun]:
    """The runs that `resolve` finds for RUN."""
    from utils.runs.index import read_run

    try:
        return [read_run(Path(os.path.abspath(path))) for path in resolve(text, runs_dir)]
    except RunError:
        if text and (runs_dir / text).exists():
            raise UserError(f"{text} is not a run: {read_run(runs_dir / text).problem}") from None
        raise


def named_runs(args: argparse.Namespace, least: int = 1) -> list[IndexedRun]:
    """The named runs, each once; for a tag, its newest run.

    Raises:
        UserError: there is no such run, or fewer than `least`.
    """
    folder = runs_folder(args)
    runs = [named_run(text, folder) for text in args.runs]
    words = [
        f"{text} (here the newest run of that tag)" if text == run.record.get("tag") else text
        for text, run in zip(args.runs, runs, strict=True)
    ]
    return _at_least(least, runs, words)


def all_named_runs(args: argparse.Namespace, least: int = 1) -> list[IndexedRun]:
    """The runs that the flags ALL_RUNS name, each once: all of a tag or a sweep, and those that fulfil a condition.

    Raises:
        UserError: there is no such run, or fewer than `least`; or the condition is not valid SQL.
    """
    if not args.runs and args.where is None:
        raise UserError(f"{args.command.name}: expected RUN or --where SQL (see experiments.py {args.command.name} -h)")
    folder = runs_folder(args)
    runs = [run for text in args.runs for run in _named(text, folder)]
    if args.where is not None:
        from utils.experiments.sql import choose_runs
        from utils.runs.index import read_index

        runs = choose_runs(runs if args.runs else read_index(folder), args.where)
    return _at_least(least, runs, [*args.runs, *([f"--where {args.where}"] if args.where is not None else [])])


def _at_least(least: int, runs: Iterable[IndexedRun], words: Iterable[str]) -> list[IndexedRun]:
    different = {run.path: run for run in runs}
    if len(different) < least:
        expected = f"{least} different runs" if least > 1 else "a run"
        raise UserError(f"expected {expected}, got {len(different)}: {', '.join(words)}")
    return list(different.values())
