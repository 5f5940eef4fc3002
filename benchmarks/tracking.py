"""What does tracking cost, and does it lose anything?

python -m benchmarks.tracking                          # all parts, about 20 minutes
python -m benchmarks.tracking --parts steps --step-ms 10 --repeats 20
python -m benchmarks.tracking --parts records,closing

steps: training runs whose tracking is switched on and off about every second. Three runs differ in what "on" means: the
log alone; log, TensorBoard and Aim, with histograms of all parameters and gradients every 100 steps; or inline tracking
as in a plain loop (.item(), add_scalar, Run.track, add_histogram). Ratios are medians over pairs of neighbouring
blocks, with bootstrapped intervals. records: a million records through buffer, log and feeder. closing: the end of a
run of 2,000 steps of 50 ms.
"""

from __future__ import annotations

import math
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

from rich.table import Table

from benchmarks import common
from benchmarks.switched_run import (
    ALL,
    HISTOGRAM_STEPS,
    LOG,
    NAIVE,
    OFF,
    Measured,
    check,
    percentile,
    run_switched,
    schedule,
)
from utils.config.loader import LoadedConfig
from utils.errors import UserError
from utils.terminal.cli import Parser, numbers, script
from utils.terminal.console import Terminal

PARTS = ("steps", "records", "closing")
LIMITS = {ALL: {50: 1.02, 10: 1.04}, LOG: {10: 1.01}}  # ratio to everything off, by milliseconds of a step
LOGGING_LIMITS = (30.0, 200.0)  # microseconds that the loop spends in a step: median, 99th percentile
MEMORY_LIMIT = 50.0  # MiB
CLOSING_LIMIT = 2.0  # seconds
CLOSING_STEPS, CLOSING_STEP_MS = 2000, 50.0
CALIBRATION = (2, 16)  # batch sizes
CALIBRATION_STEPS = 3  # further batch sizes that are tried
LARGEST_BATCH = 24 * CALIBRATION[1]  # on a busy machine the larger batch can seem no slower than the smaller one
BLOCK_SECONDS = 1.0


@script
def main(argv: Sequence[str]) -> int:
    parser = Parser(prog="python -m benchmarks.tracking", description=__doc__)
    parser.add_argument(
        "--parts", default=",".join(PARTS), metavar="A,B", help=f"some of {', '.join(PARTS)} (default: all)"
    )
    parser.add_argument("--step-ms", default="50,10", metavar="X,Y", help="lengths of a step in ms (default: 50,10)")
    parser.add_argument("--repeats", type=int, default=20, metavar="N", help="blocks of each kind (default: 20)")
    parser.add_argument("--block", type=int, metavar="N", help="steps of a block (default: 1 s, rounded up to 100)")
    parser.add_argument("--warmup", type=int, default=100, metavar="N", help="steps before the blocks (default: 100)")
    parser.add_argument("--records", type=int, default=10**6, metavar="N", help="records (default: a million)")
    parser.add_argument(
        "--steps", type=int, default=CLOSING_STEPS, metavar="N", help="steps of the run that is closed (default: 2000)"
    )
    common.add_config_flag(parser)
    args = parser.parse(argv)
    common.at_least(1, repeats=args.repeats, warmup=args.warmup, records=args.records, steps=args.steps)
    parts = [part.strip() for part in args.parts.split(",")]
    if unknown := set(parts) - set(PARTS):
        raise UserError(f"--parts: unknown: {', '.join(sorted(unknown))}; expected {', '.join(PARTS)}")
    lengths = numbers(args.step_ms, "--step-ms", float, 0.1)
    terminal = Terminal()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if "steps" in parts:
            for step_ms in lengths:
                report_steps(step_ms, args.block, args.repeats, args.warmup, args.config, folder, terminal)
        if "records" in parts:
            report_records(args.records, folder, terminal)
        if "closing" in parts:
            report_closing(args.steps, args.config, folder, terminal)
    return 0


# ------------------------------------------------------------------------------------------------- steps


def load(files: Sequence[Path], folder: Path, batch_size: int, steps: int) -> LoadedConfig:
    """The shipped configuration, every step logged, with one cheap evaluation at either end and no checkpoints."""
    fixed: dict[str, str | bool] = {"sample_tokens": "0", "log_interval": "1", "eval_iters": "1", "aim_logging": True}
    fixed |= {"checkpoint_interval": "0", "checkpoint_minutes": "none", "keep_best": False}
    lengths = {"batch_size": str(batch_size), "max_iters": str(steps), "eval_interval": str(steps)}
    return common.load_config(files, folder, {**fixed, **lengths, "histogram_interval": str(HISTOGRAM_STEPS)})


def choose_batch_size(step_ms: float, files: Sequence[Path], folder: Path) -> int:
    """Search for the batch size whose step takes about `step_ms` milliseconds."""

    def measure(size: int) -> float:
        """Milliseconds of a step without tracking."""
        return statistics.median(run_switched(load(files, folder, size, 190), [OFF] * 6, 30, 10).blocks[OFF])

    measured = {size: measure(size) for size in CALIBRATION}
    for _ in range(CALIBRATION_STEPS):
        (low, low_ms), (high, high_ms) = sorted(sorted(measured.items(), key=lambda one: abs(one[1] - step_ms))[:2])
        slope = max((high_ms - low_ms) / (high - low), 1e-6)  # ms a sequence: a step costs about a + b * batch_size
        guess = min(max(1, round(low + (step_ms - low_ms) / slope)), LARGEST_BATCH)
        if guess in measured:
            break
        measured[guess] = measure(guess)
    return min(measured, key=lambda size: abs(measured[size] - step_ms))


def report_steps(
    step_ms: float,
    block: int | None,
    repeats: int,
    warmup: int,
    files: Sequence[Path],
    folder: Path,
    terminal: Terminal,
) -> None:
    """Measure and print the cost of a step of each kind."""
    batch_size = choose_batch_size(step_ms, files, folder)
    block = block or HISTOGRAM_STEPS * max(1, math.ceil(BLOCK_SECONDS * 1000 / step_ms / HISTOGRAM_STEPS))
    terminal.print(f"steps of about {step_ms:g} ms: batch_size {batch_size}, blocks of {block} steps")
    # Each in its own run, because the threads of a tracker continue for a while during the next block.
    arms = {LOG: repeats, ALL: repeats, NAIVE: max(1, repeats // 3)}
    measured = {
        kind: run_switched(load(files, folder, batch_size, warmup + block * len(kinds)), kinds, block, warmup)
        for kind, kinds in ((kind, schedule((OFF, kind), count)) for kind, count in arms.items())
    }
    seconds, wall = measured[ALL].feeding
    rows = [
        f"machine: {common.machine_facts()}; {repeats} blocks of each kind",
        f"feeders and their threads: {seconds / wall:.2%} of the wall time, budget 2%; fed when the last block ended: "
        + ", ".join(f"{name} {share:.0%}" for name, share in measured[ALL].fed.items()),
        logging_text(measured[ALL]),
    ]
    terminal.print("", steps_table(measured, step_ms), *rows, "")


def steps_table(measured: Mapping[str, Measured], step_ms: float) -> Table:
    """Each kind compared with the blocks of the same run in which everything is off."""
    table = Table(title="Mean time of a step, medians of blocks", title_justify="left", title_style="bold")
    table.add_column("what is on", style="cyan", no_wrap=True)
    for header in ("on, ms", "off, ms", "ratio", "95%", "limit", ""):
        table.add_column(header, justify="right")
    for kind, blocks in ((kind, run.blocks) for kind, run in measured.items()):
        ratio, low, high = common.median_ratio(blocks[kind], blocks[OFF])
        limit = LIMITS.get(kind, {}).get(round(step_ms))
        verdict = common.verdict(ratio <= limit) if limit else ""
        medians = (f"{statistics.median(blocks[name]):.2f}" for name in (kind, OFF))
        table.add_row(kind, *medians, f"{ratio:.3f}", f"{low:.3f}-{high:.3f}", f"{limit or ''}", verdict)
    return table


def logging_text(measured: Measured) -> str:
    """The microseconds that the loop itself spends on logging, in one sentence."""
    median, late = statistics.median(measured.plain), percentile(measured.plain, 99)
    reached = common.verdict(median <= LOGGING_LIMITS[0] and late <= LOGGING_LIMITS[1])
    flushing, binning = (statistics.median(n) if n else 0.0 for n in (measured.flushing, measured.binning))
    return (
        f"the loop itself spends on logging in a step: median {median:.1f}, 99th percentile {late:.1f} microseconds "
        f"(limits {LOGGING_LIMITS[0]:g} and {LOGGING_LIMITS[1]:g}: {reached}); in one that writes the log: median "
        f"{flushing:,.0f}; with histograms: {binning:,.0f}"
    )


# ----------------------------------------------------------------------------------------------- records


class CountingView:
    """A view that only counts records, and those that are out of order."""

    name = "counting"
    rolls_back = True
    starts_empty = False

    def __init__(self) -> None:
        self.count = self.out_of_order = 0

    def open(self, first_step: int) -> Mapping[str, Any]:
        return {}

    def feed(self, log_file: str, record: Mapping[str, Any]) -> None:
        self.out_of_order += record["step"] != self.count
        self.count += 1

    def flush(self) -> None: ...

    def clear(self) -> Mapping[str, Any]:
        return {}

    def close(self, end: object) -> None: ...

    def background_seconds(self) -> float:
        return 0.0

    def abandon(self) -> None: ...


def report_records(records: int, folder: Path, terminal: Terminal) -> None:
    """Send records through the buffer, the log and a feeder; print how many arrive and how much memory they leave."""
    import torch

    from utils.runs.log import RunLog, read_records
    from utils.tracking import RunEnd
    from utils.tracking.feeder import Budget, Feeder
    from utils.training.step_buffer import StepBuffer

    log, view = RunLog(folder), CountingView()
    buffer = StepBuffer(log.metrics, flush_interval=50, log_interval=1, tokens_per_step=768)
    feeder = Feeder(view, folder, Budget(1.0), lambda *facts, **more: None, terminal.warn, rebuild_command="")
    loss, grad_norms = torch.tensor(2.0), torch.tensor([0.5, 0.25])
    began, memory_before = time.perf_counter(), 0.0
    feeder.start()
    for step in range(records):
        if step == min(1000, records - 1):  # one-time allocations are over
            memory_before = anonymous_memory()
        buffer.add(step, loss, grad_norms, 1e-3)
        if buffer.due():
            buffer.flush()
    buffer.flush()
    feeder.finish(RunEnd("completed"))
    feeder.join()
    grown, seconds = anonymous_memory() - memory_before, time.perf_counter() - began
    log.close()
    lost = records - sum(record["step"] == step for step, record in enumerate(read_records(log.metrics.path)))
    complete = lost == view.out_of_order == 0 and view.count == records
    terminal.print(
        f"{records:,} records in {seconds:.0f} s: {lost} lost in the log, {records - view.count} not fed, "
        f"{view.out_of_order} out of order: {common.verdict(complete)}",
        f"anonymous resident memory grew by {grown:.1f} MiB, limit {MEMORY_LIMIT:g}: "
        + common.verdict(grown <= MEMORY_LIMIT),
        "",
    )


def anonymous_memory() -> float:
    """MiB of resident memory of this process that is not backed by files (Linux only)."""
    status = Path("/proc/self/status").read_text()
    found = re.search(r"RssAnon:\s+(\d+) kB", status)
    assert found, "the kernel does not report RssAnon"
    return int(found.group(1)) / 1024


# ----------------------------------------------------------------------------------------------- closing


def report_closing(steps: int, files: Sequence[Path], folder: Path, terminal: Terminal) -> None:
    """Train, and print how long the views take from the last step until they are closed."""
    batch_size = choose_batch_size(CLOSING_STEP_MS, files, folder)
    seconds, backlog = timed_closing(load(files, folder, batch_size, steps))
    terminal.print(
        f"end of a run of {steps:,} steps of about {CLOSING_STEP_MS:g} ms (batch_size {batch_size}): "
        f"{backlog / 1024:,.0f} KiB of the log had not been fed; views closed after {seconds:.2f} s, "
        f"limit {CLOSING_LIMIT:g}: {common.verdict(seconds <= CLOSING_LIMIT)}"
    )


def timed_closing(loaded: LoadedConfig) -> tuple[float, int]:
    """Seconds from the last step until the views are closed, and the bytes of the log that they lacked before.

    The seconds include writing the status into run.json and the picture, but not the last evaluation and the export.
    """
    import train
    from utils.tracking.feeder import Feeders
    from utils.training.session import Session

    write_status, finish = Session.write_status, Feeders.finish
    began: list[float] = []
    taken: list[float] = []
    lacking: list[int] = []

    def before(self: Session) -> None:
        began.append(time.perf_counter())
        write_status(self)

    def closed(self: Feeders, *arguments: Any) -> None:
        finish(self, *arguments)
        taken.append(time.perf_counter() - began[0])

    def lifted(self: Feeders) -> None:
        lacking.append(sum(feeder.backlog_bytes() for feeder in self.feeders))
        lift_budget(self)

    lift_budget = Feeders.lift_budget
    with (
        patch.object(Session, "write_status", before),
        patch.object(Feeders, "lift_budget", lifted),
        patch.object(Feeders, "finish", closed),
    ):
        result = train.train(loaded, quiet=True)
    check(result.run_dir, result.status)
    return taken[0], lacking[0]


if __name__ == "__main__":
    sys.exit(main())
