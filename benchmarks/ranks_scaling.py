"""How does training scale over ranks? Strong and weak scaling as measured here, and a model of it for 8, 64, 512 GPUs.

python -m benchmarks.ranks_scaling --out ranks.png      # about 3 minutes on 2 CPU cores
python -m benchmarks.ranks_scaling --ranks 1,2,4,8      # on a machine with 8 cores

Each rank has one thread. Strong scaling: the same batch on more ranks. Weak scaling: the same number of sequences for
each rank on more ranks. The model of a step of W ranks is

    compute = fixed + sequences / W x time of a sequence
    lanes:  log2(W) x (buckets x latency + bytes / bandwidth)                  one partner a level
    ring:   buckets x 2 (W - 1) x latency + 2 (W - 1) / W x bytes / bandwidth
    step    = compute + communication - what the backward pass hides

with four constants: two from steps of one rank, two from sums of two ranks, all measured here. It assumes that
- the backward pass is two thirds of computing, and hides all buckets but the last, of the ring or of the first level;
- links are alike, none is shared, and no rank is slower than another;
- evaluation, checkpoints and reading data cost nothing.
On a CPU, sending takes time from the cores that compute, so the measured steps are longer than the model says.

For GPUs the same model takes the steps of GPT-2 (124M parameters) that were measured on one H200 (docs/performance.md),
and a link that was not measured: --gpu-gbytes and --gpu-latency-us, whose defaults are those of a network adapter of
400 Gbit/s for each GPU. So that part is a forecast, not a measurement.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from rich.table import Table

from benchmarks import common
from benchmarks.ranks import WARM_STEPS, command, flags_of, run_of
from utils.errors import UserError
from utils.files import write_output
from utils.runs.layout import LOGS
from utils.runs.log import read_metrics
from utils.runs.run import read_record
from utils.terminal.cli import Parser, numbers, place, script
from utils.terminal.console import Terminal
from utils.terminal.pictures import new_figure, picture_of

MODEL = {"n-layer": 4, "n-head": 4, "n-embd": 256, "block-size": 128, "dropout": 0.0}
STRONG, WEAK = 16, 8  # sequences of a batch; sequences for each rank
FITTED = (4, 8, 16)  # batch sizes of one rank whose steps give the time of a sequence
SUM_BYTES = (1 << 12, 1 << 24)  # sizes of the sums that give latency and bandwidth
BUCKET_BYTES = 25 << 20  # as in utils/training/lanes.py
BACKWARD = 2 / 3
FORECAST = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
SHOWN = (8, 64, 512)
GPU_SECONDS = {12: 12 * 1024 / 499_300, 64: 64 * 1024 / 562_800}  # of a step, by sequences: docs/performance.md
GPU_BYTES = 4 * 124.4e6  # gradients
GPU_STRONG, GPU_WEAK = 512, 64  # sequences of a batch; sequences for each GPU

Arm = tuple[int, int]  # ranks, sequences of the batch


@dataclass(frozen=True)
class Constants:
    """The constants of the model.

    fixed, sequence: seconds of a step are fixed + sequence * (sequences of a rank).
    latency: seconds of a message without bytes. bandwidth: bytes/s of a link.
    """

    fixed: float
    sequence: float
    latency: float
    bandwidth: float


def step_seconds(constants: Constants, ranks: int, sequences: float, size: float, *, lanes: bool) -> float:
    """The model: seconds of a step.

    Args:
        sequences: the sequences in the batch of all ranks.
        size: bytes of the gradients.
        lanes: exact sums in pairs; otherwise in a ring.
    """
    compute = constants.fixed + constants.sequence * sequences / ranks
    if ranks == 1:
        return compute
    buckets, levels = math.ceil(size / BUCKET_BYTES), math.log2(ranks)
    if lanes:
        first = buckets * constants.latency + size / constants.bandwidth
        total = levels * first
    else:
        first = total = 2 * (ranks - 1) * (buckets * constants.latency + size / ranks / constants.bandwidth)
    hidden = min(first * (1 - 1 / buckets), BACKWARD * constants.sequence * sequences / ranks)
    return compute + total - hidden


def line(points: Mapping[int, float]) -> tuple[float, float]:
    """Intercept, at least 0, and slope of a straight line through points, by least squares."""
    slope, intercept = statistics.linear_regression(list(points), list(points.values()))
    return max(0.0, intercept), slope


def time_step(arm: Arm, number: int, folder: Path, steps: int, lanes: int | None) -> tuple[float, int]:
    """Median seconds of a step, and the parameters of the model."""
    ranks, sequences = arm
    tag = f"r{number}"
    settings: dict[str, int | str] = {
        "batch_size": sequences,
        "max_iters": steps,
        "eval_interval": 1000000,
        "eval_iters": 1,
        "threads": 1,
    }
    settings |= {"sample_tokens": 0, "histogram_interval": 0, "flush_interval": 1, "checkpoint_interval": 0}
    settings |= {"stop_at_step": steps - 1, "run_tag": tag, "lanes": lanes or "none"}
    common.launch(command(ranks, flags_of(MODEL, folder, **settings)), f"{ranks} ranks, {sequences} sequences")
    run = run_of(folder, tag)
    milliseconds = [value for step, value in read_metrics(run / LOGS, "step_ms") if step >= WARM_STEPS]
    return statistics.median(milliseconds) / 1000, read_record(run)["resolved"]["parameters"]


def measure_sums(repeats: int) -> dict[int, float]:
    """Median seconds of a sum of each size in SUM_BYTES; runs in the processes that torchrun starts."""
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    seconds: dict[int, list[float]] = {size: [] for size in SUM_BYTES}
    for repeat in range(repeats + 2):
        for size, found in seconds.items():
            tensor = torch.ones(size // 4)
            dist.barrier()
            began = time.perf_counter()
            dist.all_reduce(tensor)
            if repeat >= 2:
                found.append(time.perf_counter() - began)
    dist.destroy_process_group()
    return {size: statistics.median(found) for size, found in seconds.items()}


def sums_of_two_ranks() -> tuple[float, float]:
    """Latency in seconds and bandwidth in bytes/s of a sum of two ranks on this machine."""
    with tempfile.TemporaryDirectory() as name:
        out = Path(name) / "sums.json"
        words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        common.launch([*words, "-m", "benchmarks.ranks_scaling", "--measure-sums", str(out)], "sums of two ranks")
        small, large = json.loads(out.read_text()).values()
    return small, SUM_BYTES[1] / (large - small)


def measure(counts: Sequence[int], repeats: int, steps: int, terminal: Terminal) -> tuple[dict[Arm, float], float]:
    """Seconds of a step of each arm, and the bytes of the gradients. Several ranks train in as many lanes."""
    arms = {(1, sequences) for sequences in FITTED} | {(ranks, STRONG) for ranks in counts}
    arms |= {(ranks, WEAK * ranks) for ranks in counts}
    parameters = 0
    number = 0
    with tempfile.TemporaryDirectory() as name:

        def timed(arm: Arm) -> float:
            nonlocal number, parameters
            number += 1
            seconds, parameters = time_step(arm, number, Path(name), steps, arm[0] if arm[0] > 1 else None)
            return seconds

        names = {f"{ranks} ranks, {sequences} sequences": (ranks, sequences) for ranks, sequences in sorted(arms)}
        calls = {name: (lambda arm=arm: timed(arm)) for name, arm in names.items()}
        found = common.interleaved(calls, repeats, lambda words: terminal.print(f"  {words}"))
    return {arm: statistics.median(found[name]) for name, arm in names.items()}, 4.0 * parameters


def measured_table(seconds: Mapping[Arm, float], counts: Sequence[int], here: Constants, size: float) -> Table:
    table = Table(title="Measured on this machine, in lanes", title_justify="left", title_style="bold")
    for header in ("", "ranks", "sequences", "ms", "speed", "efficiency", "model ms"):
        table.add_column(header, justify="right")
    for name, arms in (("strong", [(n, STRONG) for n in counts]), ("weak", [(n, WEAK * n) for n in counts])):
        rate = {arm: arm[1] / seconds[arm] for arm in arms}
        for arm in arms:
            speed = rate[arm] / rate[arms[0]]
            model = step_seconds(here, *arm, size, lanes=True)
            numbers = (f"{1000 * seconds[arm]:.1f}", f"{speed:.2f}", f"{speed * arms[0][0] / arm[0]:.0%}")
            table.add_row(name, str(arm[0]), str(arm[1]), *numbers, f"{1000 * model:.1f}")
        table.add_section()
    return table


def forecast_table(gpu: Constants) -> Table:
    """The speed and the efficiency that the model gives for 8, 64 and 512 GPUs."""
    table = Table(
        title="Forecast for GPUs, 124M parameters, 1,024 tokens a sequence", title_justify="left", title_style="bold"
    )
    for header in ("GPUs", "sequences", "", "step ms", "speed", "efficiency"):
        table.add_column(header, justify="right")
    for count in SHOWN:
        for name, sequences in (("strong", GPU_STRONG), ("weak", GPU_WEAK * count)):
            for lanes in (True, False):
                speed = gpu_speed(gpu, count, sequences, lanes=lanes)
                ms = 1000 * step_seconds(gpu, count, sequences, GPU_BYTES, lanes=lanes)
                words = f"{name}, {'lanes' if lanes else 'ring'}"
                table.add_row(
                    str(count), f"{sequences:,.0f}", words, f"{ms:.2f}", f"{speed:.1f}", f"{speed / count:.0%}"
                )
        table.add_section()
    return table


def gpu_speed(gpu: Constants, count: int, sequences: float, *, lanes: bool) -> float:
    """Sequences per second, relative to one GPU with a batch of GPU_WEAK."""
    one = GPU_WEAK / step_seconds(gpu, 1, GPU_WEAK, GPU_BYTES, lanes=lanes)
    return sequences / step_seconds(gpu, count, sequences, GPU_BYTES, lanes=lanes) / one


def picture(seconds: Mapping[Arm, float], counts: Sequence[int], here: Constants, size: float, gpu: Constants) -> bytes:
    """A PNG of two panels: efficiency here, as measured and modelled; efficiency of GPUs, as modelled."""
    with new_figure(9, 4.2, dpi=150) as figure:
        left, right = figure.subplots(1, 2, sharey=True)
        for name, color, sequences in (
            ("strong", "#3b6fb6", lambda n: STRONG),
            ("weak", "#e07b1f", lambda n: WEAK * n),
        ):
            base = sequences(counts[0]) / seconds[counts[0], sequences(counts[0])] / counts[0]
            found = [sequences(n) / seconds[n, sequences(n)] / n / base for n in counts]
            left.plot(counts, found, "o", color=color, label=f"{name}, measured")
            one = sequences(1) / step_seconds(here, 1, sequences(1), size, lanes=True)
            more = [n for n in FORECAST if n <= 16]
            model = [sequences(n) / step_seconds(here, n, sequences(n), size, lanes=True) / n / one for n in more]
            left.plot(more, model, "--", color=color, linewidth=1.4, label=f"{name}, model")
        for name, color, total in (
            (f"strong, {GPU_STRONG} sequences", "#3b6fb6", GPU_STRONG),
            (f"weak, {GPU_WEAK} for each", "#e07b1f", None),
        ):
            for lanes, style in ((True, "-"), (False, ":")):
                values = [gpu_speed(gpu, n, total or GPU_WEAK * n, lanes=lanes) / n for n in FORECAST]
                label = f"{name}, {'lanes' if lanes else 'ring'}"
                right.plot(FORECAST, values, style, color=color, linewidth=1.6, label=label)
        left.set_title("CPU ranks of this machine, in lanes", fontsize=10)
        right.set_title("forecast: GPUs, 124M parameters", fontsize=10)
        for axes in (left, right):
            axes.set_xscale("log", base=2)
            ticks = [n for n in FORECAST if n <= 16] if axes is left else FORECAST
            axes.set_xticks(ticks, [str(n) for n in ticks])
            axes.set_ylim(0, 1.1)
            axes.set_xlabel("ranks")
            axes.grid(alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)
            axes.legend(frameon=False, fontsize=8, loc="lower left")
        left.set_ylabel("efficiency")
        return picture_of(figure)


@script
def main(argv: Sequence[str]) -> int:
    parser = Parser(prog="python -m benchmarks.ranks_scaling", description=__doc__)
    parser.add_argument("--ranks", default="1,2", metavar="A,B", help="numbers of ranks (default: 1,2)")
    parser.add_argument("--repeats", type=int, default=3, help="how often each is timed (default: 3)")
    parser.add_argument("--steps", type=int, default=8, help="updates of a measurement (default: 8)")
    parser.add_argument("--gpu-gbytes", type=float, default=50.0, help="bandwidth of a GPU's link, GB/s (default: 50)")
    parser.add_argument("--gpu-latency-us", type=float, default=20.0, help="its latency, microseconds (default: 20)")
    parser.add_argument("--out", type=place, metavar="FILE", help="also write a picture there (PNG)")
    parser.add_argument(
        "--measure-sums", type=place, metavar="FILE", help="for the ranks that this benchmark starts itself"
    )
    args = parser.parse(argv)
    if args.measure_sums is not None:
        import os

        found = measure_sums(20)
        if os.environ["RANK"] == "0":
            args.measure_sums.write_text(json.dumps(found))
        return 0
    counts = sorted(numbers(args.ranks, "--ranks", int, 1))
    if counts[0] != 1 or any(count & (count - 1) or count > STRONG for count in counts):
        raise UserError(f"--ranks: expected powers of two up to {STRONG}, including 1, got {args.ranks}")
    common.at_least(1, repeats=args.repeats)
    common.at_least(WARM_STEPS + 3, steps=args.steps)
    terminal = Terminal()
    latency, bandwidth = sums_of_two_ranks()
    seconds, size = measure(counts, args.repeats, args.steps, terminal)
    here = Constants(*line({sequences: seconds[1, sequences] for sequences in FITTED}), latency, bandwidth)
    gpu = Constants(*line(GPU_SECONDS), args.gpu_latency_us / 1e6, args.gpu_gbytes * 1e9)
    terminal.print(
        measured_table(seconds, counts, here, size),
        f"constants: {1000 * here.fixed:.1f} ms a step, {1000 * here.sequence:.2f} ms a sequence; a sum of two ranks "
        f"{1e6 * latency:.0f} us and {bandwidth / 1e9:.2f} GB/s; gradients {size / 1e6:.1f} MB",
        "",
        forecast_table(gpu),
        f"from {1000 * gpu.fixed:.1f} ms a step and {1000 * gpu.sequence:.2f} ms a sequence on one H200 (measured), "
        f"and a link of {args.gpu_gbytes:g} GB/s and {args.gpu_latency_us:g} us (assumed)",
        f"machine: {common.machine_facts()}",
    )
    if args.out is not None:
        try:
            write_output(args.out, picture(seconds, counts, here, size, gpu))
        except OSError as error:
            raise UserError(f"--out {args.out}: cannot be written: {error.strerror}") from None
        terminal.print(f"written: {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
