"""The commands of experiments.py that train the runs they need: gate, noise, bisect."""

from __future__ import annotations

import argparse
import contextlib
import math
import sys
from collections.abc import Iterator
from typing import IO

from utils.errors import UserError
from utils.experiments.commands import COMPARED_METRIC, RUN_HELP, command, runs_folder
from utils.terminal.cli import PROJECT_ROOT, timespan
from utils.terminal.commands import Answer, flag

SUBJECT_HELP = "RUN or tag (all its seeds), commit, FILE.patch, or settings: learning_rate=3e-3,dropout=0.1"
TRUST = flag("--trust", action="store_true", help="run the code that a run made elsewhere brings along or names")
SET = flag("--set", metavar="SETTINGS", help="settings of both, if neither is a run: max_iters=500,dropout=0.1")
BUDGET = flag(
    "--budget", type=timespan, metavar="TIME", help="stop after 90s, 30m or 2h of wall time; another call continues"
)


def output(args: argparse.Namespace) -> IO[str]:
    """Where progress is printed: stderr with --json, so that stdout has the JSON alone."""
    return sys.stderr if args.json else sys.stdout


@contextlib.contextmanager
def report_kept_runs(args: argparse.Namespace) -> Iterator[None]:
    """If a signal ends the block, print that the completed runs will not be trained again."""
    try:
        yield
    except KeyboardInterrupt:
        with contextlib.suppress(OSError):
            print("complete runs are kept; the same command continues with the others", file=output(args), flush=True)
        raise


@command(
    "gate",
    "is a candidate better than a baseline, or was it the seed? Trains what is missing; exit status 0: keep, 1: "
    "discard, 3: unsure",
    flag("candidate", metavar="CANDIDATE", help=SUBJECT_HELP),
    flag("baseline", metavar="BASELINE", help="the same"),
    COMPARED_METRIC,
    flag("--min-effect", type=float, default=0.0, metavar="X", help="the improvement to exceed (default: 0)"),
    flag("--max-seeds", type=int, default=8, metavar="N", help="the most pairs of runs, at least 3 (default: 8)"),
    BUDGET,
    SET,
    TRUST,
    note="A commit or a patch is code that runs with your rights.\n"
    "The verdict goes into gate.jsonl beside the runs, and the same question is not tried again.",
)
def gate(args: argparse.Namespace) -> Answer:
    from utils.experiments.gate import EXIT_STATUS, gate
    from utils.experiments.gate_screens import gate_screen
    from utils.experiments.sequential import FIRST_LOOK

    if not FIRST_LOOK <= args.max_seeds <= 1000:
        raise UserError(f"--max-seeds must be from {FIRST_LOOK} to 1000, not {args.max_seeds}")
    if not 0 <= args.min_effect < math.inf:
        raise UserError(f"--min-effect must be at least 0, not {args.min_effect:g}")
    with report_kept_runs(args):
        answer = gate(
            args.candidate,
            args.baseline,
            PROJECT_ROOT,
            runs_folder(args),
            metric=args.metric,
            min_effect=args.min_effect,
            max_seeds=args.max_seeds,
            budget=args.budget,
            settings=args.set,
            trusted=args.trust,
            output=output(args),
        )
    return Answer(answer, lambda console: gate_screen(answer), EXIT_STATUS[answer.verdict])


@command(
    "noise",
    "how much a result varies with the seed alone, and how many seeds an effect needs; trains what is missing",
    flag("subject", metavar="RUN", help=f"{RUN_HELP}; or a commit, FILE.patch or settings"),
    flag("--seeds", type=int, default=5, metavar="N", help="the fewest complete runs, at least 3 (default: 5)"),
    COMPARED_METRIC,
    flag("--effect", type=float, action="append", default=[], metavar="X", help="in units of the metric (repeatable)"),
    TRUST,
)
def noise(args: argparse.Namespace) -> Answer:
    from utils.experiments.gate_screens import noise_screen
    from utils.experiments.noise import noise

    if args.seeds < 3:
        raise UserError(f"--seeds must be at least 3, not {args.seeds}")
    if any(not 0 < effect < math.inf for effect in args.effect):
        raise UserError("--effect must be above 0")
    with report_kept_runs(args):
        found = noise(
            args.subject,
            PROJECT_ROOT,
            runs_folder(args),
            seeds=args.seeds,
            metric=args.metric,
            effects=args.effect,
            trusted=args.trust,
            output=output(args),
        )
    return Answer(found, lambda console: noise_screen(found))


@command(
    "bisect",
    "which commit, or which settings together, make the difference between two experiments? Exit status 3: not found",
    flag("good", metavar="GOOD", help="RUN, commit, FILE.patch or settings, as for gate"),
    flag("bad", metavar="BAD", help="the same"),
    flag(
        "--oracle",
        choices=("bits", "loss"),
        help="judge a trial by the numbers in its log, or by its loss (default: loss if settings differ)",
    ),
    COMPARED_METRIC,
    flag("--seeds", type=int, default=3, metavar="N", help="seeds of each trial, if judged by the loss (default: 3)"),
    SET,
    TRUST,
    note="The commits in between run with your rights. Package versions are named, but not changed.",
)
def bisect(args: argparse.Namespace) -> Answer:
    from utils.experiments.bisect import bisect
    from utils.experiments.gate_screens import bisection_screen

    if not 1 <= args.seeds <= 1000:
        raise UserError(f"--seeds must be from 1 to 1000, not {args.seeds}")
    with report_kept_runs(args):
        found = bisect(
            args.good,
            args.bad,
            PROJECT_ROOT,
            runs_folder(args),
            oracle=args.oracle,
            metric=args.metric,
            seeds=args.seeds,
            settings=args.set,
            trusted=args.trust,
            output=output(args),
        )
    return Answer(found, lambda console: bisection_screen(found), 3 if found.problem else 0)
