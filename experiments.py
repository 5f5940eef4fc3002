"""Runs: list, show, compare, explain, check and reproduce them.

python experiments.py list --sort val_loss
python experiments.py diff baseline wider
python experiments.py reproduce baseline --steps 200

RUN is a path, an id, a tag (the newest run wins), latest, NAME@vN of a promoted run, or a part of an id.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from utils.config.loader import ConfigLoader
from utils.errors import UserError
from utils.runs.find import resolve_run
from utils.runs.index import IndexedRun, read_index, read_run
from utils.runs.metrics import VIEWS
from utils.runs.run import RunError
from utils.terminal.cli import PROJECT_ROOT, Parser, script
from utils.terminal.console import Terminal
from utils.terminal.progress import FeedingProgress

TRACKERS = {"tensorboard": "TensorBoard", "aim": "Aim", "wandb": "Weights & Biases"}
AXES = ("step", "tokens", "time")
UNLIMITED = 10_000  # characters of a line, where no terminal sets an end

Command = Callable[[argparse.Namespace], int]


@script
def main(argv: Sequence[str]) -> int:
    parser = Parser(prog="experiments.py", description=__doc__)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=Parser)
    for add in COMMANDS:
        add(commands)
    args = parser.parse(argv)
    return int(args.run_command(args))


def add_command(
    commands: argparse._SubParsersAction[Parser],
    name: str,
    command: Command,
    text: str,
    *,
    runs: str = "",
) -> Parser:
    """A command with what all have: RUN (runs: "1", "?" or "+"), --runs-dir, --json."""
    parser = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    if runs == "1":
        parser.add_argument("run", metavar="RUN", help="path, id, tag, NAME@vN, part of an id, or latest")
    elif runs:
        parser.add_argument("runs", metavar="RUN", nargs=runs, help="path, id, tag, NAME@vN, part of an id, or latest")
    parser.add_argument("--runs-dir", type=Path, metavar="DIR", help="folder of the runs (default: as configured)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run_command=command)
    return parser


def runs_folder(args: argparse.Namespace) -> Path:
    runs_dir = args.runs_dir or ConfigLoader(PROJECT_ROOT).load().config.tracking.runs_dir
    return PROJECT_ROOT / runs_dir


def named_run(text: str, runs_dir: Path) -> IndexedRun:
    """The run that RUN means; what is known of it.

    Raises:
        UserError: there is no such run, or what is there is none, with the reason.
    """
    try:
        return read_run(Path(os.path.abspath(resolve_run(text, runs_dir))))  # `.` has no name
    except RunError:
        if text and (runs_dir / text).exists():
            raise UserError(f"{text} is no run: {read_run(runs_dir / text).problem}") from None
        raise


def named_runs(args: argparse.Namespace, least: int = 1) -> list[IndexedRun]:
    """The runs that are named, each once.

    Raises:
        UserError: there is no such run, or fewer than `least`.
    """
    folder = runs_folder(args)
    runs = {run.path: run for run in (named_run(text, folder) for text in args.runs)}
    if len(runs) < least:
        raise UserError(f"expected {least} different runs, got {len(runs)}: {', '.join(args.runs)}")
    return list(runs.values())


def print_json(value: Any) -> int:
    """Dataclasses, paths and numbers as JSON; NaN and infinities as in the logs."""
    print(json.dumps(_plain(value), indent=2, ensure_ascii=False))
    return 0


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _plain({field.name: getattr(value, field.name) for field in dataclasses.fields(value)})
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, str | int | float | None) else str(value)


# ------------------------------------------------------------------------------------------ which runs are there


def add_list(commands: argparse._SubParsersAction[Parser]) -> None:
    parser = add_command(commands, "list", list_command, "a table of the runs, oldest first")
    parser.add_argument("--where", metavar="SQL", help="condition: \"status = 'completed' and learning_rate > 1e-3\"")
    parser.add_argument("--sort", metavar="SQL", help='column to sort by: val_loss, "steps desc"')
    parser.add_argument("--columns", metavar="A,B", help="columns to show: facts (--columns all) and settings")
    parser.add_argument("--limit", type=int, metavar="N", help="show the first N (without --sort: the newest N)")


def list_command(args: argparse.Namespace) -> int:
    from utils.experiments.sql import choose_runs
    from utils.experiments.tables import columns_of, list_table

    if args.limit is not None and args.limit < 1:
        raise UserError(f"--limit must be at least 1, not {args.limit}")
    folder = runs_folder(args)
    everything = read_index(folder)
    runs = choose_runs(everything, args.where, args.sort, args.limit)
    columns = chosen_columns(args.columns, runs) or columns_of(runs)
    if args.json:
        rows = [run.row() for run in runs]
        return print_json([{column: row.get(column) for column in columns} if args.columns else row for row in rows])
    if runs:
        console = Terminal().console
        fits = console.is_terminal and not args.columns
        console.width = console.width if fits else UNLIMITED
        console.print(list_table(runs, columns, console.width), crop=fits)
    elif everything:
        print(f"none of {len(everything):,} runs fits")
    else:
        print(f"{folder} has no runs yet: python train.py --run-tag baseline makes one")
    return 0


def chosen_columns(text: str | None, runs: Sequence[IndexedRun]) -> list[str]:
    """
    Raises:
        UserError: a column that no run has.
    """
    from utils.errors import nearest
    from utils.runs.index import FACTS

    known = [*FACTS, *dict.fromkeys(key for run in runs for key in run.settings if key not in FACTS)]
    names = [name.strip() for name in (text or "").split(",") if name.strip()]
    if text is not None and not names:
        raise UserError(f"--columns: expected names, separated by commas, got {text!r}")
    if names == ["all"]:
        return list(FACTS)
    for name in names:
        if name not in known:
            raise UserError(f"--columns: no column {name}{nearest(name, known)}")
    return names


def add_sql(commands: argparse._SubParsersAction[Parser]) -> None:
    parser = add_command(commands, "sql", sql_command, "one SELECT over the views runs and metrics")
    parser.add_argument("query", metavar="SELECT", help='"SELECT run, min(val_loss) FROM metrics GROUP BY run"')


def sql_command(args: argparse.Namespace) -> int:
    from utils.experiments.sql import RunDatabase
    from utils.experiments.tables import sql_table

    table = RunDatabase(read_index(runs_folder(args))).select(args.query)
    if args.json:
        return print_json([dict(zip(table.columns, row, strict=True)) for row in table.rows])
    console = Terminal().console
    console.width = console.width if console.is_terminal else UNLIMITED
    console.print(sql_table(table.columns, table.rows, console.width), crop=False)
    return 0


def add_show(commands: argparse._SubParsersAction[Parser]) -> None:
    add_command(commands, "show", show_command, "one run on one screen", runs="1")


def show_command(args: argparse.Namespace) -> int:
    from utils.experiments.tables import show_screen
    from utils.runs.names import read_models

    folder = runs_folder(args)
    run = named_run(args.run, folder)
    children = [other.id for other in read_index(run.path.parent) if other.row()["parent"] == run.id]
    models = [
        f"{name}@v{version['version']}"
        for name, versions in read_models(run.path.parent).items()
        for version in versions
        if version["run"] == run.id
    ]
    if args.json:
        return print_json({**run.row(), "record": run.record, "children": children, "promoted": models})
    Terminal().print(*show_screen(run, children, models))
    return 0


# ------------------------------------------------------------------------------------------------- what differs


def add_diff(commands: argparse._SubParsersAction[Parser]) -> None:
    add_command(commands, "diff", diff_command, "what differs between runs, likely causes first", runs="+")


def diff_command(args: argparse.Namespace) -> int:
    from utils.experiments.diff import diff
    from utils.experiments.tables import diff_tables

    found = diff(named_runs(args, least=2), PROJECT_ROOT)
    if args.json:
        return print_json(found)
    Terminal().print(*diff_tables(found))
    return 0


def add_compare(commands: argparse._SubParsersAction[Parser]) -> None:
    text = "which runs are better, and is it more than noise? Runs that differ only in seed are one group"
    parser = add_command(commands, "compare", compare_command, text, runs="+")
    parser.add_argument("--metric", default="val/loss", metavar="NAME", help="that is compared (default: val/loss)")


def compare_command(args: argparse.Namespace) -> int:
    from utils.experiments.compare import compare
    from utils.experiments.tables import comparison_tables

    found = compare(named_runs(args, least=2), args.metric)
    if args.json:
        return print_json(found)
    Terminal().print(*comparison_tables(found))
    return 0


def add_explain(commands: argparse._SubParsersAction[Parser]) -> None:
    text = "a setting: its value, where it was set, what that shadows, what it means"
    parser = add_command(commands, "explain", explain_command, text)
    parser.add_argument("words", metavar="[RUN] KEY", nargs="+", help="without RUN: as the files are merged now")


def explain_command(args: argparse.Namespace) -> int:
    from utils.experiments.explain import explain, explain_of_run
    from utils.experiments.tables import explanation

    if len(args.words) > 2:
        raise UserError(f"explain takes [RUN] KEY, got {' '.join(args.words)}")
    *run, key = args.words
    if run:
        found = explain_of_run(key, named_run(run[0], runs_folder(args)))
    else:
        found = explain(key, ConfigLoader(PROJECT_ROOT).load())
    if args.json:
        return print_json(found)
    Terminal().print(explanation(found))
    return 0


def add_plot(commands: argparse._SubParsersAction[Parser]) -> None:
    parser = add_command(commands, "plot", plot_command, "curves of runs, in the terminal or as a picture", runs="+")
    parser.add_argument("--metric", default="val/loss", metavar="NAME", help="that is drawn (default: val/loss)")
    parser.add_argument("--x", choices=AXES, default="step", help="the axis (default: step)")
    parser.add_argument(
        "--smooth", type=float, default=0.0, metavar="X", help="weight of the past, 0 to 1 (default: 0)"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="a .png or .svg instead of the terminal")


def plot_command(args: argparse.Namespace) -> int:
    from utils.experiments.plot import load_curves, save_plot, terminal_plot

    if not 0 <= args.smooth < 1:
        raise UserError(f"--smooth must be at least 0 and below 1, not {args.smooth:g}")
    curves = load_curves(named_runs(args), args.metric, args.x, args.smooth)
    if args.out:
        write_to(args.out, lambda: save_plot(curves, args.metric, args.x, args.out))
    if args.json:
        return print_json({"metric": args.metric, "x": args.x, "curves": curves, "out": args.out})
    if args.out:
        print(args.out)
        return 0
    console = Terminal().console
    width, height = min(console.width, 140), max(12, min(console.height - 2, 36))
    print(terminal_plot(curves, args.metric, args.x, width, height, colour=console.is_terminal))
    return 0


def write_to(path: Path, write: Callable[[], None]) -> None:
    """
    Raises:
        UserError: `write` cannot write the file.
    """
    try:
        write()
    except OSError as error:
        raise UserError(f"--out {path}: cannot be written: {error.strerror}") from None


def add_report(commands: argparse._SubParsersAction[Parser]) -> None:
    parser = add_command(commands, "report", report_command, "one HTML page about runs, complete in itself", runs="+")
    parser.add_argument("--out", type=Path, metavar="FILE", default=Path("report.html"), help="(default: report.html)")


def report_command(args: argparse.Namespace) -> int:
    from utils.experiments.report import write_report

    runs = named_runs(args)
    write_to(args.out, lambda: write_report(runs, args.out, PROJECT_ROOT))
    if args.json:
        return print_json({"runs": [run.id for run in runs], "out": args.out})
    print(args.out)
    return 0


# ------------------------------------------------------------------------------------------- what is kept, and how


def add_edit(commands: argparse._SubParsersAction[Parser]) -> None:
    parser = add_command(commands, "edit", edit_command, "change the tag, note, tags or pin of a run", runs="1")
    parser.add_argument("--tag", metavar="TAG", help="the name of the run; its id stays")
    parser.add_argument("--note", metavar="TEXT", help="replaces the note")
    parser.add_argument("--add-tag", metavar="TAG", action="append", default=[], help="(repeatable)")
    parser.add_argument("--remove-tag", metavar="TAG", action="append", default=[], help="(repeatable)")
    parser.add_argument("--pin", action=argparse.BooleanOptionalAction, default=None, help="prune never touches it")


def edit_command(args: argparse.Namespace) -> int:
    from utils.experiments.notes import edit

    if args.tag is None and args.note is None and args.pin is None and not args.add_tag and not args.remove_tag:
        raise UserError("edit: expected --tag, --note, --add-tag, --remove-tag, --pin or --no-pin")
    run = named_run(args.run, runs_folder(args))
    tags = {"add_tags": tuple(args.add_tag), "remove_tags": tuple(args.remove_tag)}
    notes = edit(run.path, tag=args.tag, note=args.note, pinned=args.pin, **tags)
    if args.json:
        return print_json(notes)
    pinned = ", pinned" if notes["pinned"] else ""
    print(f"{run.id}: tag {notes['tag'] or 'none'}, tags {', '.join(notes['tags']) or 'none'}{pinned}: {notes['note']}")
    return 0


def add_promote(commands: argparse._SubParsersAction[Parser]) -> None:
    text = "give the exported weights of a run a name: NAME@v1, NAME@v2, ... in models.json of the runs"
    parser = add_command(commands, "promote", promote_command, text, runs="1")
    parser.add_argument("name", metavar="NAME")


def promote_command(args: argparse.Namespace) -> int:
    from utils.experiments.notes import promote

    folder = runs_folder(args)
    name, facts = promote(resolve_run(args.run, folder), args.name, folder)
    if args.json:
        return print_json({"name": name, **facts})
    print(f"{name}: {facts['run']}, {facts['weights']} weights of {facts['checkpoint']}, sha256 {facts['sha256'][:12]}")
    return 0


def add_prune(commands: argparse._SubParsersAction[Parser]) -> None:
    text = "free disk space: checkpoints before whole runs, the oldest first; without --yes it only tells"
    parser = add_command(commands, "prune", prune_command, text)
    parser.add_argument("--keep-last", type=int, default=0, metavar="N", help="leave the newest N runs alone")
    parser.add_argument("--older-than", metavar="AGE", help="leave runs alone that started within 12h, 30d, 8w")
    parser.add_argument("--max-size", metavar="SIZE", help="stop when all runs together are not larger than 20GB")
    parser.add_argument("--whole-runs", action="store_true", help="delete runs, not only their checkpoints")
    parser.add_argument("--unfinished", action="store_true", help="also of runs that could still be resumed")
    parser.add_argument("--yes", action="store_true", help="delete")


def prune_command(args: argparse.Namespace) -> int:
    from utils.experiments.prune import parse_age, parse_size, plan_pruning, remove
    from utils.experiments.tables import prune_table
    from utils.terminal.words import size

    if args.keep_last < 0:
        raise UserError(f"--keep-last must be at least 0, not {args.keep_last}")
    if not (args.keep_last or args.older_than or args.max_size):
        raise UserError("prune: expected --keep-last N, --older-than AGE or --max-size SIZE")
    plan = plan_pruning(
        runs_folder(args),
        keep_last=args.keep_last,
        older_than=parse_age(args.older_than) if args.older_than else 0.0,
        max_bytes=parse_size(args.max_size) if args.max_size else None,
        whole_runs=args.whole_runs,
        unfinished=args.unfinished,
    )
    failed = []
    for removal in plan.removals if args.yes else ():
        try:
            remove(removal)
        except OSError as error:
            failed.append(removal)
            print(f"error: {removal.path} was not deleted: {error.strerror}", file=sys.stderr)
    freed = plan.freed - sum(removal.bytes for removal in failed)
    if args.json:
        print_json({"deleted": args.yes, "bytes": freed, **_plain(plan)})
        return 1 if failed else 0
    if plan.removals:
        Terminal().print(prune_table(plan), "")
    left = f"of {size(plan.total)}, {size(plan.total - freed)} are left"
    print(f"freed {size(freed)} {left}" if args.yes else f"--yes would free {size(freed)} {left}")
    if args.max_size and plan.total - freed > parse_size(args.max_size):
        print(f"--max-size {args.max_size} cannot be reached: the rest is not touched")
    for why, count in Counter(plan.kept.values()).items():
        print(f"{count} not touched: {why}")
    return 1 if failed else 0


def add_seal(commands: argparse._SubParsersAction[Parser]) -> None:
    text = "write the seal of a run anew, after a change that was meant (training writes it at the end of every run)"
    add_command(commands, "seal", seal_command, text, runs="1")


def seal_command(args: argparse.Namespace) -> int:
    from utils.runs.layout import SEAL
    from utils.runs.seal import seal

    run = named_run(args.run, runs_folder(args))
    if not run.readable or run.status == "running":
        raise RunError(f"{run.id}: {run.problem or 'it is being trained, and sealed when it ends'}")
    try:
        seal(run.path)
    except OSError as error:
        raise RunError(f"{run.path / SEAL} cannot be written: {error.strerror}") from None
    if args.json:
        return print_json({"run": run.id, "seal": run.path / SEAL})
    print(f"{run.id}: sealed")
    return 0


def add_check(commands: argparse._SubParsersAction[Parser]) -> None:
    text = "compare meta/, logs and export of a run with its seal, and its checkpoints with their manifests"
    add_command(
        commands, "check", check_command, text, runs="1"
    ).epilog = "A seal finds accidents. It is no protection against somebody who changes files and seal."


def check_command(args: argparse.Namespace) -> int:
    from utils.runs.seal import check

    run = named_run(args.run, runs_folder(args))
    found = check(run.path)
    if args.json:
        print_json({"good": found.good, **_plain(found)})
        return 0 if found.good else 1
    for what in ("changed", "missing", "added", "damaged"):
        for name in getattr(found, what):
            print(f"{what:<8} {name}")
    sealed = f"{found.files} files sealed at {found.sealed[:19].replace('T', ' ')} UTC, {found.checkpoints} checkpoints"
    print(f"{run.id}: {'as sealed' if found.good else 'not as sealed'}: {sealed}")
    print("(a seal finds accidents; it is no protection against somebody who changes files and seal)")
    return 0 if found.good else 1


def add_reproduce(commands: argparse._SubParsersAction[Parser]) -> None:
    text = "train a run again from its recorded code, configuration and corpus, and compare the two bit by bit"
    parser = add_command(commands, "reproduce", reproduce_command, text, runs="1")
    parser.add_argument("--steps", type=int, metavar="N", help="so many steps only (default: all)")
    parser.add_argument("--from-checkpoint", action="store_true", help="begin with a checkpoint instead of step 0")
    parser.add_argument(
        "--code",
        choices=("recorded", "current"),
        default="recorded",
        help="current: is a refactoring one? (default: recorded)",
    )


def reproduce_command(args: argparse.Namespace) -> int:
    from utils.experiments.reproduce import reproduce

    if args.steps is not None and args.steps < 1:
        raise UserError(f"--steps must be at least 1, not {args.steps}")
    run = named_run(args.run, runs_folder(args))
    out = sys.stderr if args.json else sys.stdout

    def tell(line: str) -> None:
        print(line, file=out, flush=True)

    found = reproduce(
        run,
        PROJECT_ROOT,
        steps=args.steps,
        from_checkpoint=args.from_checkpoint,
        code=args.code,
        quiet=args.json,
        tell=tell,
    )
    if args.json:
        print_json({"identical": found.identical, "verdict": found.verdict, **_plain(found)})
    else:
        for unknown in found.unknown:
            print(f"not known: {unknown}")
        print(f"{found.repetition} against {found.run}: {found.verdict}")
    if found.exit_status in (130, 143):  # after a signal
        return found.exit_status
    return 0 if found.identical else 1


def add_rebuild(commands: argparse._SubParsersAction[Parser]) -> None:
    text = "feed trackers anew from the logs of a run, in the place of what they show of it (default: all that it has)"
    parser = add_command(commands, "rebuild", rebuild_command, text, runs="1")
    for name in VIEWS:
        parser.add_argument(f"--{name}", action="append_const", const=name, dest="views", help=TRACKERS[name])


def rebuild_command(args: argparse.Namespace) -> int:
    from utils.tracking.rebuild import RebuildError, rebuild

    path = Path(os.path.abspath(resolve_run(args.run, runs_folder(args))))  # trackers are told where the run is
    terminal = Terminal()
    try:
        with FeedingProgress(terminal) as progress:
            names = rebuild(path, PROJECT_ROOT, args.views or (), progress.update)
    except RebuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if args.json:
        return print_json({"run": path.name, "rebuilt": names})
    terminal.print(f"rebuilt from the logs of {path.name}: {', '.join(TRACKERS[name] for name in names)}")
    return 0


COMMANDS = (
    *(add_list, add_sql, add_show, add_diff, add_compare, add_explain, add_plot, add_report),
    *(add_edit, add_promote, add_prune, add_seal, add_check, add_reproduce, add_rebuild),
)

if __name__ == "__main__":
    sys.exit(main())
