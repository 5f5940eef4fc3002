# PYTHON_ARGCOMPLETE_OK
"""Search over settings: train many trials, each an ordinary run, and report the best.

    python sweep.py examples/sweep.yaml --trials 20 --max-iters 300
    python sweep.py examples/sweep.yaml --trials 50 --jobs 2 --pruner asha --resume

SPACE.yaml names the settings to search (docs/sweeps.md); all other settings are those of train.py. A sweep can be
stopped and resumed at any time, and several drivers, on several machines, can work on the same one.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from utils.errors import UserError
from utils.sweeps.driver import MAX_FAILURES
from utils.sweeps.pruning import PRUNERS
from utils.sweeps.sampling import SAMPLERS
from utils.terminal.cli import PROJECT_ROOT, Parser, place, script
from utils.terminal.config_flags import parse_experiment
from utils.training.notify import VARIABLE as NOTIFY_VARIABLE

ENGINES = ("local", "ray")


@script
def main(argv: Sequence[str]) -> int:
    os.environ.pop(NOTIFY_VARIABLE, None)  # it is for runs that the user starts, not for trials
    parser = Parser(prog="sweep.py", description=__doc__, usage="python sweep.py SPACE.yaml [--FLAG VALUE ...]")
    add_flags(parser)
    parsed = parse_experiment(argv, parser)
    own = parsed.own
    for name, least in (("trials", 1), ("jobs", 1), ("max_failures", 0)):
        if (value := getattr(own, name)) is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} must be at least {least}, not {value}")
    from utils.sweeps.start import start_sweep

    return start_sweep(parsed, PROJECT_ROOT)


def add_flags(parser: Parser) -> None:
    """The flags that are not settings of a run."""
    parser.add_argument("space", metavar="SPACE.yaml", type=place, help="the settings to search")
    group = parser.add_argument_group("sweep")
    group.add_argument(
        "--trials", type=int, default=50, metavar="N", help="total number of trials, also with --resume (default: 50)"
    )
    group.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="trials at a time, which share the cores (default: 1)"
    )
    group.add_argument("--sampler", choices=SAMPLERS, help="how values are chosen (default: tpe; with pbt: random)")
    group.add_argument("--sampler-seed", type=int, metavar="N", help="seed of the sampler (default: 0)")
    group.add_argument("--pruner", choices=PRUNERS, help="how trials end early or are replaced (default: none)")
    group.add_argument("--min-steps", type=int, metavar="N", help="steps before a pruner first compares trials")
    group.add_argument("--eta", type=int, metavar="N", help="asha: promote one trial in N from each rung (default: 3)")
    group.add_argument("--resume", action="store_true", help="continue the sweep of this name, or join its drivers")
    group.add_argument("--name", metavar="NAME", help="name of the sweep (default: that of the file)")
    group.add_argument(
        "--sweeps-dir", type=place, metavar="DIR", help="folder of the sweeps (default: beside the runs)"
    )
    group.add_argument(
        "--max-failures",
        type=int,
        default=MAX_FAILURES,
        metavar="N",
        help=f"trials in a row that may fail before the sweep ends (default: {MAX_FAILURES})",
    )
    group.add_argument("--engine", choices=ENGINES, default="local", help="ray: use a Ray cluster (default: local)")
    group.add_argument("--json", action="store_true", help="print the result as JSON")


if __name__ == "__main__":
    sys.exit(main())
