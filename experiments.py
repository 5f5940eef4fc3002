"""What is known about runs, and what can be made of their logs again.

python experiments.py rebuild baseline           # TensorBoard and Aim, fed from the first record on
python experiments.py rebuild latest --aim
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from utils.cli import PROJECT_ROOT, Parser, script
from utils.config_loader import ConfigLoader
from utils.console import FeedingProgress, Terminal
from utils.run_log import VIEWS
from utils.run_manager import resolve_run

TRACKERS = {"tensorboard": "TensorBoard", "aim": "Aim", "wandb": "Weights & Biases"}


@script
def main(argv: Sequence[str]) -> int:
    parser = Parser(prog="experiments.py", description=__doc__)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=Parser)
    add_rebuild(commands)
    args = parser.parse(argv)
    return int(args.run_command(args))


def add_rebuild(commands: argparse._SubParsersAction[Parser]) -> None:
    parser = commands.add_parser(
        "rebuild",
        help="feed trackers anew from the logs of a run",
        description="Feed trackers anew from the logs of a run, in the place of what they show of it. "
        "Without a flag: all that the run is tracked with.",
    )
    parser.add_argument("run", metavar="RUN", help="path, id, tag, part of an id, or latest")
    for name in VIEWS:
        parser.add_argument(f"--{name}", action="append_const", const=name, dest="views", help=TRACKERS[name])
    parser.add_argument("--runs-dir", type=Path, metavar="DIR", help="folder of the runs (default: as configured)")
    parser.set_defaults(run_command=rebuild_command)


def rebuild_command(args: argparse.Namespace) -> int:
    from utils.tracking.rebuild import RebuildError, rebuild

    found = resolve_run(args.run, PROJECT_ROOT / (args.runs_dir or default_runs_dir()))
    path = Path(os.path.abspath(found))  # `.` has no name; and trackers are told where the run is
    terminal = Terminal()
    try:
        with FeedingProgress(terminal) as progress:
            names = rebuild(path, PROJECT_ROOT, args.views or (), progress.update)
    except RebuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    terminal.print(f"rebuilt from the logs of {path.name}: {', '.join(TRACKERS[name] for name in names)}")
    return 0


def default_runs_dir() -> str:
    return ConfigLoader(PROJECT_ROOT).load().config.tracking.runs_dir


if __name__ == "__main__":
    sys.exit(main())
