"""How long does start-up take? `--help`, and the first training step against `import torch`.

python -m benchmarks.startup
python -m benchmarks.startup --repeats 3

The first step is that of the default experiment in the shipped configuration (views on), from the start of the process
to the end of the first update. The evaluation at step 0 and its sample text come before it.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from benchmarks.common import at_least, interleaved, machine_facts, verdict
from utils.errors import UserError
from utils.terminal.cli import PROJECT_ROOT, Parser, script
from utils.terminal.console import Terminal

HELP, IMPORT, LOOP, FIRST_STEP = "train.py --help", "import torch", "training loop begins", "first step done"
HELP_LIMIT = 0.3  # seconds
STEP_LIMIT = 2.0  # seconds after `import torch`


@script
def main(argv: Sequence[str]) -> int:
    parser = Parser(prog="python -m benchmarks.startup", description=__doc__)
    parser.add_argument("--repeats", type=int, default=7, metavar="N", help="timings of each command (default: 7)")
    args = parser.parse(argv)
    at_least(1, repeats=args.repeats)
    terminal = Terminal()
    with tempfile.TemporaryDirectory() as folder:
        seconds = measure(args.repeats, Path(folder))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    after_torch = medians[FIRST_STEP] - medians[IMPORT]
    terminal.print(
        results_table(seconds),
        f"machine: {machine_facts()}",
        f"help {medians[HELP]:.2f} s: limit {HELP_LIMIT} s {verdict(medians[HELP] <= HELP_LIMIT)}",
        f"first step minus import torch {after_torch:.2f} s: limit {STEP_LIMIT} s {verdict(after_torch <= STEP_LIMIT)}",
    )
    return 0


def measure(repeats: int, folder: Path, flags: Sequence[str] = ()) -> dict[str, list[float]]:
    """Seconds of each command, interleaved, after a warmup round that fills the caches.

    Args:
        folder: for the runs and the Aim repository.
        flags: further flags of the training run.
    """
    places = ["--runs-dir", str(folder / "runs"), "--aim-repo", str(folder)]
    training = ["train.py", "--max-iters", "1", "--callbacks", "benchmarks.callbacks:ClockPrinter", *places, *flags]

    def first_step() -> list[float]:
        from benchmarks.callbacks import MARK

        start = time.time()
        output = run_python(*training)
        return [float(line.split(MARK)[1]) - start for line in output.splitlines() if line.startswith(MARK)]

    arms = {
        HELP: lambda: [_timed("train.py", "--help")],
        IMPORT: lambda: [_timed("-c", "import torch")],
        FIRST_STEP: first_step,
    }
    results = interleaved(arms, repeats + 1)
    seconds = {name: [values[-1] for values in results[name][1:]] for name in (HELP, IMPORT)}
    for index, name in enumerate((LOOP, FIRST_STEP)):
        seconds[name] = [values[index] for values in results[FIRST_STEP][1:]]
    return seconds


def _timed(*words: str) -> float:
    start = time.perf_counter()
    run_python(*words)
    return time.perf_counter() - start


def run_python(*words: str) -> str:
    """The output of a Python process.

    Raises:
        UserError: it fails.
    """
    done = subprocess.run([sys.executable, *words], cwd=PROJECT_ROOT, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"python {words[0]} ended with {done.returncode}: {done.stderr.strip() or 'no message'}")
    return done.stdout


def results_table(seconds: dict[str, list[float]]) -> Table:
    table = Table(title="Seconds since the process started", title_justify="left", title_style="bold")
    table.add_column("what", style="cyan")
    for header in ("median", "least", "most", "/ import torch"):
        table.add_column(header, justify="right")
    reference = statistics.median(seconds[IMPORT])
    for name, values in seconds.items():
        median = statistics.median(values)
        table.add_row(name, *(f"{x:.2f}" for x in (median, min(values), max(values), median / reference)))
    return table


if __name__ == "__main__":
    sys.exit(main())
