# PYTHON_ARGCOMPLETE_OK
"""Runs: list, show, compare, explain, check and reproduce them.

python experiments.py list --sort val_loss
python experiments.py diff baseline wider
python experiments.py reproduce baseline --steps 200

RUN is a path, an id, a tag, latest, NAME@vN of a promoted run, or a part of an id. A tag names its newest run; for
compare, plot and report it names all its runs, and so does a sweep.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from utils.errors import UserError
from utils.experiments.commands import (
    ALL_RUNS,
    COMMANDS,
    COMPARED_METRIC,
    CURVE,
    METRIC,
    RUN,
    RUNS,
    WHERE,
    all_named_runs,
    command,
    named_run,
    named_runs,
    run_path,
    runs_folder,
)
from utils.files import unwritable
from utils.runs.layout import MODELS, SEAL
from utils.runs.metrics import VIEWS
from utils.runs.run import RunError, check_links
from utils.terminal.cli import PROJECT_ROOT, Parser, naming, place, script, timespan
from utils.terminal.commands import Answer, fields_of, flag
from utils.terminal.words import printable
from utils.training.notify import VARIABLE as NOTIFY_VARIABLE

TRACKERS = {"tensorboard": "TensorBoard", "aim": "Aim", "wandb": "Weights & Biases"}


@script
def main(argv: Sequence[str]) -> int:
    os.environ.pop(NOTIFY_VARIABLE, None)  # notifications are for runs that the user starts, not for those of a command
    parser = Parser(prog="experiments.py", description=__doc__)
    return COMMANDS.run(parser, argv)


# -------------------------------------------------------------------------------------------------- which runs exist


@command(
    "list",
    "a table of the runs, oldest first",
    WHERE,
    flag("--sort", metavar="SQL", help='column to sort by: val_loss, bits_per_byte, "steps desc"'),
    flag("--columns", metavar="A,B", help="columns to show: facts (--columns all) and settings"),
    flag("--limit", type=int, metavar="N", help="show the first N (without --sort: the newest N; default: 20)"),
    flag("--all", action="store_true", help="show all; --json always does, unless --limit is given"),
)
def list_runs(args: argparse.Namespace) -> Answer:
    from utils.experiments.sql import choose_runs
    from utils.experiments.tables import chosen_columns, list_screen
    from utils.runs.index import read_index

    if args.limit is not None and args.limit < 1:
        raise UserError(f"--limit must be at least 1, not {args.limit}")
    folder = runs_folder(args)
    everything = read_index(folder)
    fitting = choose_runs(everything, args.where, args.sort)
    limit = args.limit or (len(fitting) if args.all or args.json else SHOWN)
    runs = fitting[:limit] if args.sort else fitting[-limit:]
    others = fitting[limit:] if args.sort else fitting[:-limit]
    columns = chosen_columns(args.columns, runs)
    rows = [run.row() for run in runs] if args.json else []
    rows = [{column: row.get(column) for column in columns} for row in rows] if columns else rows
    none = f"none of {len(everything):,} runs fits" if everything else f"{folder} has no runs yet: {FIRST_RUN}"
    return Answer(rows, lambda console: list_screen(runs, columns, console, others) if runs else [none])


SHOWN = 20  # runs of a list, unless more are asked for
FIRST_RUN = "python train.py --run-tag baseline makes one"


@command(
    "sql",
    "one SELECT over the views runs and metrics",
    flag("query", metavar="SELECT", help='"SELECT run, min(val_loss) FROM metrics GROUP BY run"'),
)
def sql(args: argparse.Namespace) -> Answer:
    from utils.experiments.sql import RunDatabase
    from utils.experiments.tables import sql_screen
    from utils.runs.index import read_index

    found = RunDatabase(read_index(runs_folder(args))).select(args.query)
    for problem in found.problems:
        warn(problem)
    rows = [dict(zip(found.columns, row, strict=True)) for row in found.rows]
    return Answer(rows, lambda console: sql_screen(found.columns, found.rows, console))


@command("show", "one run on one screen", RUN)
def show(args: argparse.Namespace) -> Answer:
    from utils.experiments.tables import show_screen
    from utils.runs.index import read_index
    from utils.runs.names import names_of_run

    run = named_run(args.run, runs_folder(args))
    children = [other.id for other in read_index(run.path.parent) if other.row(())["parent"] == run.id]
    names, problem = names_of_run(run.path)
    if problem:
        warn(problem)
    data = {**run.row(), "evaluations": run.evaluations, "record": run.record, "children": children, "promoted": names}
    return Answer(data, lambda console: show_screen(run, children, names))


# ------------------------------------------------------------------------------------------------------ what differs


@command("diff", "what differs between runs, likely causes first", RUNS)
def diff(args: argparse.Namespace) -> Answer:
    from utils.experiments.comparison_tables import diff_screen
    from utils.experiments.diff import diff

    found = diff(named_runs(args, least=2), PROJECT_ROOT)
    return Answer(found, lambda console: diff_screen(found))


@command(
    "compare",
    "which runs are better, and is it more than noise? Runs that differ only in seed are one group",
    *ALL_RUNS,
    COMPARED_METRIC,
)
def compare(args: argparse.Namespace) -> Answer:
    from utils.experiments.compare import compare
    from utils.experiments.comparison_tables import comparison_screen

    found = compare(all_named_runs(args, least=2), args.metric)
    return Answer(found, lambda console: comparison_screen(found))


@command(
    "explain",
    "a setting: its value, where it was set, what that shadows, what it means",
    flag("run", metavar="RUN", nargs="?", help="as it was for a run (default: as the configuration files say now)"),
    flag("key", metavar="KEY", help="name of the setting"),
)
def explain(args: argparse.Namespace) -> Answer:
    from utils.experiments.comparison_tables import explanation_screen
    from utils.experiments.explain import explain, explain_of_run

    if args.run is not None:
        found = explain_of_run(args.key, named_run(args.run, runs_folder(args)))
    else:
        from utils.config.loader import ConfigLoader

        found = explain(args.key, ConfigLoader(PROJECT_ROOT).load())
    return Answer(found, lambda console: explanation_screen(found))


@command(
    "plot",
    "curves of runs, in the terminal or as a picture",
    *ALL_RUNS,
    METRIC,
    *CURVE,
    flag("--out", type=place, metavar="FILE", help="write a .png or .svg instead of drawing in the terminal"),
)
def plot(args: argparse.Namespace) -> Answer:
    from utils.experiments.plot import load_curves, plot_screen, save_plot

    curves = load_curves(all_named_runs(args), args.metric, args.x, args.smooth)
    if args.out:
        write_out(args.out, lambda: save_plot(curves, args.metric, args.x, args.out))
    data = {"metric": args.metric, "x": args.x, "curves": curves, "out": args.out}
    return Answer(
        data, lambda console: [str(args.out)] if args.out else plot_screen(curves, args.metric, args.x, console)
    )


@command(
    "watch",
    "the curves of a run in the terminal, redrawn while it trains, until it ends; status 1 if it failed",
    RUN,
    flag("--metric", metavar="NAME", help="(default: train/loss and val/loss)"),
    *CURVE,
    flag("--interval", type=timespan, default=1.0, metavar="TIME", help="between readings of the log (default: 1s)"),
)
def watch(args: argparse.Namespace) -> Answer:
    from utils.experiments.watch import GOOD, LOSSES, Watch, watch
    from utils.terminal.console import Terminal

    path = named_run(args.run, runs_folder(args)).path
    shown = Watch(path, [args.metric] if args.metric else LOSSES, args.x, args.smooth)
    run = watch(shown, None if args.json else Terminal().console, args.interval)
    data = {"run": run.id, "status": run.status, **run.summary()}
    return Answer(data, lambda console: [shown.picture(console)], 0 if run.status in GOOD else 1)


@command(
    "report",
    "one HTML page about runs that needs no other file and no network",
    *ALL_RUNS,
    flag("--out", type=place, metavar="FILE", default=Path("report.html"), help="(default: report.html)"),
)
def report(args: argparse.Namespace) -> Answer:
    from utils.experiments.report import write_report

    runs = all_named_runs(args)
    write_out(args.out, lambda: write_report(runs, args.out, PROJECT_ROOT))
    return Answer({"runs": [run.id for run in runs], "out": args.out}, lambda console: [str(args.out)])


@command(
    "ui",
    "pages of the runs in a browser: table, curves, comparison, live while they train",
    flag("--host", default="127.0.0.1", metavar="ADDRESS", help="listen here (default: 127.0.0.1, this machine only)"),
    flag("--port", type=int, default=8265, metavar="N", help="(default: 8265; 0: any free one)"),
    flag("--edit", action="store_true", help="let the pages change tags and notes"),
    note="The pages read the run directories: no tracker and no database is needed. serve.py has them at /runs, too.",
)
def ui(args: argparse.Namespace) -> Answer:
    if not 0 <= args.port <= 65535:
        raise UserError(f"--port must be from 0 to 65535, not {args.port}")
    from utils.pages.server import serve_pages

    serve_pages(runs_folder(args), args.host, args.port, edit=args.edit)


def write_out(path: Path, write: Callable[[], None]) -> None:
    """Call `write`, which writes the file of --out.

    Raises:
        UserError: the file cannot be written.
        OSError: its disk is full or fails.
    """
    try:
        write()
    except OSError as error:
        raise unwritable(path, error, UserError(f"--out {path}: cannot be written: {error.strerror}")) from None


# ----------------------------------------------------------------------------------------- what is kept, and its name


@command(
    "edit",
    "change the tag, note, tags or pin of a run",
    RUN,
    flag("--tag", metavar="TAG", help="the name of the run; its id stays"),
    flag("--note", metavar="TEXT", help="replaces the note"),
    flag("--add-tag", metavar="TAG", action="append", default=[], help="(repeatable)"),
    flag("--remove-tag", metavar="TAG", action="append", default=[], help="(repeatable)"),
    flag("--pin", action=argparse.BooleanOptionalAction, default=None, help="prune never touches a pinned run"),
)
def edit(args: argparse.Namespace) -> Answer:
    from utils.experiments.notes import edit

    if args.tag is None and args.note is None and args.pin is None and not args.add_tag and not args.remove_tag:
        raise UserError("edit: expected --tag, --note, --add-tag, --remove-tag, --pin or --no-pin")
    run = named_run(args.run, runs_folder(args))
    tags = {"add_tags": tuple(args.add_tag), "remove_tags": tuple(args.remove_tag)}
    notes = edit(run.path, tag=args.tag, note=args.note, pinned=args.pin, **tags)
    words = f"tag {notes['tag'] or 'none'}, tags {', '.join(notes['tags']) or 'none'}"
    words += ", pinned" if notes["pinned"] else ""
    return Answer(notes, lambda console: [f"{run.id}: {words}: {notes['note']}"])


@command(
    "promote",
    f"give the exported weights of a run a name: NAME@v1, NAME@v2, ... in {MODELS} beside the runs",
    RUN,
    flag("name", metavar="NAME"),
)
def promote(args: argparse.Namespace) -> Answer:
    from utils.experiments.notes import promote

    name, version = promote(run_path(args), args.name, runs_folder(args))
    origin = f"{version['run']}, {version['weights']} weights of {version['checkpoint']}"
    return Answer({"name": name, **version}, lambda console: [f"{name}: {origin}, sha256 {version['sha256'][:12]}"])


@command(
    "prune",
    "free disk space: checkpoints before whole runs, the oldest first; without --yes it only says what it would delete",
    flag("--keep-last", type=int, default=0, metavar="N", help="leave the newest N runs alone"),
    flag("--older-than", metavar="AGE", help="leave runs alone that started within 12h, 30d, 8w"),
    flag("--max-size", metavar="SIZE", help="stop when all runs together are not larger than 20GB"),
    flag("--whole-runs", action="store_true", help="delete runs, not only their checkpoints"),
    flag("--unfinished", action="store_true", help="also delete from runs that could still be resumed"),
    flag("--yes", action="store_true", help="delete"),
)
def prune(args: argparse.Namespace) -> Answer:
    from utils.experiments.prune import parse_age, parse_size, plan_pruning, remove_all
    from utils.experiments.tables import prune_screen

    if args.keep_last < 0:
        raise UserError(f"--keep-last must be at least 0, not {args.keep_last}")
    if not (args.keep_last or args.older_than or args.max_size):
        raise UserError("prune: expected --keep-last N, --older-than AGE or --max-size SIZE")
    with naming("--max-size"):
        max_bytes = parse_size(args.max_size) if args.max_size else None
    with naming("--older-than"):
        older_than = parse_age(args.older_than) if args.older_than else 0.0
    plan = plan_pruning(
        runs_folder(args),
        keep_last=args.keep_last,
        older_than=older_than,
        max_bytes=max_bytes,
        whole_runs=args.whole_runs,
        unfinished=args.unfinished,
    )
    failed = remove_all(plan.removals) if args.yes else {}
    for removal, reason in failed.items():
        print(printable(f"error: {removal.path} was not deleted: {reason}"), file=sys.stderr)
    freed = plan.freed - sum(removal.bytes for removal in failed)
    data = {"deleted": args.yes, "bytes": freed, **fields_of(plan)}
    unreached = args.max_size if max_bytes is not None and plan.total - freed > max_bytes else None
    return Answer(data, lambda console: prune_screen(plan, freed, args.yes, unreached), 1 if failed else 0)


@command(
    "seen",
    "the documents (or the file and line) that an update was made from",
    RUN,
    flag("--step", type=int, required=True, metavar="N", help="number of the update, from 0"),
    flag("--top", type=int, metavar="N", help="only the N with the highest loss under a checkpoint of the run"),
    flag("--checkpoint", metavar="WHICH", help="latest, best or a step (default: latest)"),
    note="It is computed from the configuration and the corpus of the run: no log is needed.",
)
def seen(args: argparse.Namespace) -> Answer:
    if args.top is not None and args.top < 1:
        raise UserError(f"--top must be at least 1, not {args.top}")
    if args.checkpoint and args.top is None:
        raise UserError("--checkpoint is of use only with --top N, which ranks by its losses")
    run = named_run(args.run, runs_folder(args))
    from utils.inference.seen import seen, seen_screen

    found = seen(run, PROJECT_ROOT, args.step, args.top, args.checkpoint or "latest", warn)
    return Answer(found, lambda console: seen_screen(found, console.width))


# ---------------------------------------------------------------------------------------- checksums, repetitions


@command(
    "seal",
    "write the checksums of a run again, after an intended change (training writes them when a run ends)",
    RUN,
)
def seal(args: argparse.Namespace) -> Answer:
    from utils.runs.seal import write_seal

    run = named_run(args.run, runs_folder(args))
    if not run.readable or run.status == "running":
        raise RunError(f"{run.id}: {run.problem or 'it is being trained, and is sealed when it ends'}")
    check_links(run.path)
    try:
        write_seal(run.path)
    except OSError as error:
        seal = run.path / SEAL
        raise unwritable(seal, error, RunError(f"{seal} cannot be written: {error.strerror}")) from None
    return Answer({"run": run.id, "seal": run.path / SEAL}, lambda console: [f"{run.id}: sealed"])


@command(
    "check",
    "compare meta/, logs and export of a run with their checksums (its seal), and checkpoints with their manifests",
    RUN,
    note="A seal detects accidents. It does not protect against somebody who changes the files and the seal.",
)
def check(args: argparse.Namespace) -> Answer:
    from utils.experiments.tables import check_screen
    from utils.runs.seal import verify_seal

    run = named_run(args.run, runs_folder(args))
    found = verify_seal(run.path)
    data = {"good": found.good, **fields_of(found)}
    return Answer(data, lambda console: check_screen(run.id, found), 0 if found.good else 1)


@command(
    "reproduce",
    "train a run again from its recorded code, configuration and corpus, and compare the two bit by bit",
    RUN,
    flag("--steps", type=int, metavar="N", help="train only N steps (default: all)"),
    flag("--from-checkpoint", action="store_true", help="begin with a checkpoint instead of step 0"),
    flag(
        "--code",
        choices=("recorded", "current"),
        default="recorded",
        help="current: does the code of today give the same numbers? (default: recorded)",
    ),
    flag("--trust", action="store_true", help="run the code that a run made elsewhere brings along or names"),
)
def reproduce(args: argparse.Namespace) -> Answer:
    from utils.experiments.reproduce import reproduce

    if args.steps is not None and args.steps < 1:
        raise UserError(f"--steps must be at least 1, not {args.steps}")
    found = reproduce(
        named_run(args.run, runs_folder(args)),
        PROJECT_ROOT,
        steps=args.steps,
        from_checkpoint=args.from_checkpoint,
        code=args.code,
        trusted=args.trust,
        progress=sys.stderr if args.json else sys.stdout,
    )
    lines = [f"not known: {unknown}" for unknown in found.unknown]
    lines.append(f"{found.repetition} against {found.run}: {found.verdict}")
    data = {"identical": found.identical, "verdict": found.verdict, **fields_of(found)}
    stopped = found.exit_status in (129, 130, 143)  # by a signal
    return Answer(data, lambda console: lines, found.exit_status if stopped else 0 if found.identical else 1)


@command(
    "rebuild",
    "feed the logs of a run to trackers anew, replacing what they show (default: all trackers that it was fed to)",
    RUN,
    *(flag(f"--{name}", action="append_const", const=name, dest="views", help=TRACKERS[name]) for name in VIEWS),
)
def rebuild(args: argparse.Namespace) -> Answer:
    from utils.tracking.rebuild import rebuild

    return _feed(args, lambda path, report: rebuild(path, PROJECT_ROOT, args.views or (), report, warn), "rebuilt")


@command("finish", "do what a process that was killed at the end of its run left undone: trackers, curves, seal", RUN)
def finish(args: argparse.Namespace) -> Answer:
    from utils.tracking.rebuild import finish

    return _feed(args, lambda path, report: finish(path, PROJECT_ROOT, report, warn), "finished")


def _feed(args: argparse.Namespace, feed: Callable[..., list[str]], done: str) -> Answer:
    """Feed the trackers of a run with a progress line; if one fails, print one line and answer with status 1."""
    from utils.terminal.console import Terminal
    from utils.terminal.progress import FeedingProgress
    from utils.tracking.rebuild import RebuildError

    path = run_path(args)
    try:
        with FeedingProgress(Terminal()) as progress:
            names = feed(path, progress.update)
    except RebuildError as error:
        print(printable(f"error: {error}"), file=sys.stderr)
        return Answer({"run": path.name, "problem": str(error)}, lambda console: [], 1)
    trackers = ", ".join(TRACKERS[name] for name in names)
    words = f"rebuilt from the logs of {path.name}: {trackers}" if names else f"{path.name}: curves drawn, sealed"
    return Answer({"run": path.name, done: names}, lambda console: [words])


# Declares gate, noise and bisect, after the commands above.
import utils.experiments.gate_commands  # noqa: E402, F401


def warn(message: str) -> None:
    """Print a warning as one line on stderr."""
    print(printable(f"warning: {message}"), file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
