"""What does tracking cost a training step? train.py with its views, without them, and a bare loop.

python -m benchmarks.tracking                     # steps of about 50 ms, five minutes
python -m benchmarks.tracking --step-ms 50,35 --repeats 7

tracked: every step logged, TensorBoard and Aim fed by their threads while training runs. no views: the same
without feeders. bare: without log and progress too. Short runs of the three alternate in one process; each
counts after its warmup, in which the views are opened. What is not fed when a run ends is fed before the next.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.table import Table

from benchmarks import common
from benchmarks.step_timing import BARE, NO_VIEWS, TRACKED, Timing, timed_run
from utils.cli import Parser, script
from utils.config_loader import LoadedConfig
from utils.console import Terminal

LIMIT = 1.05  # tracked / no views, at steps of about 50 ms
CALIBRATION = (4, 24)  # batch sizes: a step costs about a + b * batch_size
LARGEST_BATCH = 16 * CALIBRATION[1]  # a busy machine can make the larger batch look no slower than the smaller one


@script
def main(argv: Sequence[str]) -> int:
    parser = Parser(prog="python -m benchmarks.tracking", description=__doc__)
    parser.add_argument("--step-ms", default="50", metavar="X,Y", help="lengths of a step to aim at (default: 50)")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="runs of each kind (default: 5)")
    parser.add_argument("--steps", type=int, default=300, metavar="N", help="measured steps of a run (default: 300)")
    parser.add_argument("--warmup", type=int, default=80, metavar="N", help="steps before them (default: 80)")
    common.add_config_flag(parser)
    args = parser.parse(argv)
    common.at_least(1, repeats=args.repeats, steps=args.steps, warmup=args.warmup)
    terminal = Terminal()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for step_ms in common.numbers(args.step_ms, "--step-ms", float, 0.1):
            batch_size = choose_batch_size(step_ms, args.config, folder)
            terminal.print(f"steps of about {step_ms:g} ms: batch_size {batch_size}")
            loaded = load(args.config, folder, batch_size, args.warmup + args.steps)
            timings = measure(loaded, args.warmup, args.repeats, lambda line: terminal.print(f"  {line}"))
            ratio, *_ = common.ratio_interval(*columns(timings, "mean_ms", NO_VIEWS))
            terminal.print(
                "",
                results_table(timings),
                f"machine: {common.machine_facts()}; batch_size {batch_size}, {args.repeats} runs of each kind, "
                f"{args.steps} steps each",
                f"fed when training ended (median): {fed_text(timings[TRACKED])}",
                f"tracked / no views, mean step: {ratio:.3f}, limit {LIMIT} {common.verdict(ratio <= LIMIT)}",
                "",
            )
    return 0


def load(files: Sequence[Path], folder: Path, batch_size: int, steps: int) -> LoadedConfig:
    """The shipped configuration, every step logged, with one cheap evaluation at either end."""
    return common.load_config(
        files,
        folder,
        {
            "batch_size": str(batch_size),
            "max_iters": str(steps),
            "eval_interval": str(steps),
            "eval_iters": "1",
            "sample_tokens": "0",
            "log_interval": "1",
            "aim_logging": True,
        },
    )


def choose_batch_size(step_ms: float, files: Sequence[Path], folder: Path) -> int:
    """The batch size whose step takes about `step_ms`, on the line through two short bare runs."""
    small, large = CALIBRATION
    low, high = (timed_run(load(files, folder, size, 25), 5, BARE).median_ms for size in CALIBRATION)
    slope = max((high - low) / (large - small), 1e-6)  # ms a sequence
    return min(max(1, round(small + (step_ms - low) / slope)), LARGEST_BATCH)


def measure(
    loaded: LoadedConfig, warmup: int, repeats: int, report: Callable[[str], None] = lambda line: None
) -> dict[str, list[Timing]]:
    """Alternate runs of the three kinds, after one of the tracked kind that imports what the views need."""
    timed_run(loaded, warmup, TRACKED)
    arms = {kind: lambda kind=kind: timed_run(loaded, warmup, kind) for kind in (TRACKED, NO_VIEWS, BARE)}
    return common.interleaved(arms, repeats, report)


def columns(timings: dict[str, list[Timing]], number: str, base: str) -> tuple[list[float], list[float]]:
    """That number of every tracked run, and of every run of `base`."""
    return [getattr(t, number) for t in timings[TRACKED]], [getattr(t, number) for t in timings[base]]


def fed_text(tracked: Sequence[Timing]) -> str:
    names = tracked[0].fed
    shares = (f"{name} {statistics.median(t.fed.get(name, 0.0) for t in tracked):.0%}" for name in names)
    return ", ".join(shares) or "nothing: the runs were too short for the views to open"


def results_table(timings: dict[str, list[Timing]]) -> Table:
    table = Table(title="A training step; ratio: tracked / this loop", title_justify="left", title_style="bold")
    table.add_column("loop", style="cyan")
    for header in ("median ms", "ratio", "95%", "mean ms", "ratio", "95%"):
        table.add_column(header, justify="right")
    for kind, runs in timings.items():
        cells = []
        for number in ("median_ms", "mean_ms"):
            ratio, low, high = common.ratio_interval(*columns(timings, number, kind))
            cells.append(f"{statistics.median(getattr(run, number) for run in runs):.2f}")
            cells += ["", ""] if kind == TRACKED else [f"{ratio:.3f}", f"{low:.3f}-{high:.3f}"]
        table.add_row(kind, *cells)
    return table


if __name__ == "__main__":
    sys.exit(main())
