"""Does cost grow as it should? Step time against batch size, block size, width and depth, next to the operation count.

python -m benchmarks.scaling                            # about 5 minutes on 2 CPU cores
python -m benchmarks.scaling --repeats 2 --steps 3 --out scaling.png

Starting from the shape of nanoGPT's CPU model, each of the four varies alone. All shapes are timed once per repeat, in
rotating order, each with a new model. The prediction is the time at the base shape, scaled by the operations that the
matrix products need (utils/nn/costs.py). A ratio below 1 means that an operation has become cheaper, above 1 that there
is work that the count leaves out.
"""

from __future__ import annotations

import functools
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from benchmarks import common
from utils.config.loader import LoadedConfig
from utils.errors import UserError
from utils.files import write_output
from utils.terminal.cli import PROJECT_ROOT, Parser, place, script
from utils.terminal.console import Terminal
from utils.terminal.pictures import new_figure, picture_of

BASE = {"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 64, "batch_size": 12}
VARIED = {  # setting -> its values, while the others stay the same
    "batch_size": (1, 3, 6, 12, 24, 48, 96),
    "block_size": (16, 32, 64, 128, 256),
    "n_embd": (32, 64, 128, 256, 512),
    "n_layer": (1, 2, 4, 8, 16),
}
NAMES = {"batch_size": "batch size", "block_size": "block size", "n_embd": "width", "n_layer": "depth"}
MEASURED, PREDICTED, LEAST = "#3b6fb6", "#e07b1f", "#7a7f87"

Shape = tuple[tuple[str, int], ...]  # the settings of BASE with their values


@dataclass(frozen=True)
class Point:
    """One value of one varied setting. axis: the setting; gflop: what the matrix products of a step need."""

    axis: str
    value: int
    measured_ms: float
    predicted_ms: float
    gflop: float


@script
def main(argv: Sequence[str]) -> int:
    parser = Parser(prog="python -m benchmarks.scaling", description=__doc__)
    parser.add_argument("--steps", type=int, default=9, metavar="N", help="timed steps of a measurement (default: 9)")
    parser.add_argument("--warmup", type=int, default=3, metavar="N", help="untimed steps before those (default: 3)")
    parser.add_argument("--repeats", type=int, default=7, metavar="N", help="measurements of a shape (default: 7)")
    parser.add_argument("--out", type=place, metavar="FILE", help="also write a picture there (PNG)")
    common.add_config_flag(parser)
    args = parser.parse(argv)
    common.at_least(1, steps=args.steps, repeats=args.repeats)
    common.at_least(0, warmup=args.warmup)
    if args.out is not None and args.out.suffix.lower() != ".png":
        raise UserError(f"--out {args.out}: expected a file that ends in .png")
    if args.out is not None and not args.out.parent.is_dir():
        raise UserError(f"--out {args.out}: there is no folder {args.out.parent}")
    terminal = Terminal()
    with tempfile.TemporaryDirectory() as name:
        points, gflops = measure(args.config, args.steps, args.warmup, args.repeats, Path(name), terminal)
    terminal.print(
        scaling_table(points, gflops),
        f"MFU: share of the {gflops:,.0f} GFLOP/s that a large matrix product reaches",
        f"machine: {common.machine_facts()}",
    )
    if args.out is not None:
        try:
            write_output(args.out, picture(points, gflops))
        except OSError as error:
            raise UserError(f"--out {args.out}: cannot be written: {error.strerror}") from None
        terminal.print(f"written: {args.out}")
    return 0


def shapes() -> dict[str, dict[int, Shape]]:
    """axis -> value -> shape; the base shape is on every axis."""
    return {axis: {value: tuple((BASE | {axis: value}).items()) for value in VARIED[axis]} for axis in VARIED}


def load(files: Sequence[Path], folder: Path, shape: Shape) -> LoadedConfig:
    """The shipped configuration, then `files`, then this shape; the text is random characters."""
    fixed: dict[str, str | bool] = {key: str(value) for key, value in shape}
    fixed |= {"dataset": str(folder / "random.txt"), "corpora_dir": str(folder / "corpora")}
    return common.load_config(files, folder, {**fixed, "gradient_accumulation_steps": "1"})


def measure(
    files: Sequence[Path], steps: int, warmup: int, repeats: int, folder: Path, terminal: Terminal
) -> tuple[list[Point], float]:
    """All points, axis by axis, and the rate of a large matrix product in GFLOP/s."""
    from model import outline
    from utils.machine.device import torch_settings
    from utils.machine.limits import measure_gemm
    from utils.nn.costs import training_flops
    from utils.profiling.shapes import time_shape
    from utils.training.setup import make_setup

    common.random_text(folder / "random.txt")
    configs = {shape: load(files, folder, shape).config for of_axis in shapes().values() for shape in of_axis.values()}
    names = {shape: ", ".join(f"{key} {value}" for key, value in shape) for shape in configs}
    longest = max(configs, key=lambda shape: dict(shape)["block_size"])
    setup = make_setup(load(files, folder, longest), PROJECT_ROOT)

    def step_ms(shape: Shape) -> float:
        return time_shape(setup, configs[shape], steps, warmup, terminal).step_ms

    arms = {name: functools.partial(step_ms, shape) for shape, name in names.items()}
    with torch_settings(setup.config.train, setup.device):
        before = measure_gemm(setup.device, setup.dtype)
        times = common.interleaved(arms, repeats, lambda line: terminal.print(f"  {line}"))
        gflops = max(before, measure_gemm(setup.device, setup.dtype)) / 1e9
    medians = {shape: statistics.median(times[name]) for shape, name in names.items()}
    vocab_size = setup.corpus.tokenizer.vocab_size
    gflop = {
        shape: training_flops(outline(config.model, vocab_size), config.train.sequences, config.model.block_size) / 1e9
        for shape, config in configs.items()
    }
    return points_of(medians, gflop), gflops


def points_of(measured_ms: Mapping[Shape, float], gflop: Mapping[Shape, float]) -> list[Point]:
    """All points, axis by axis, predicted from the base shape by their number of operations."""
    base: Shape = tuple(BASE.items())
    rate = measured_ms[base] / gflop[base]
    return [
        Point(axis, value, measured_ms[shape], rate * gflop[shape], gflop[shape])
        for axis, by_value in shapes().items()
        for value, shape in by_value.items()
    ]


def scaling_table(points: Sequence[Point], gflops: float) -> Table:
    table = Table(title="Time of a step when one size varies", title_justify="left", title_style="bold")
    table.add_column("", style="cyan", no_wrap=True)
    for header in ("", "GFLOP", "measured ms", "predicted ms", "ratio", "MFU"):
        table.add_column(header, justify="right")
    for axis, name in NAMES.items():
        for index, point in enumerate(point for point in points if point.axis == axis):
            table.add_row(
                "" if index else name,
                f"{point.value:,}",
                f"{point.gflop:,.2f}",
                f"{point.measured_ms:,.2f}",
                f"{point.predicted_ms:,.2f}",
                f"{point.measured_ms / point.predicted_ms:.2f}",
                f"{point.gflop / point.measured_ms * 1000 / gflops:.0%}",
                style="bold" if point.value == BASE[axis] else "",
            )
        table.add_section()
    return table


def picture(points: Sequence[Point], gflops: float) -> bytes:
    """A PNG of four panels: measured, predicted, and the time that matrix products alone would take."""
    with new_figure(9, 6.2, dpi=150) as figure:
        from matplotlib.ticker import FuncFormatter, NullLocator

        panels = figure.subplots(2, 2, sharey=True)
        for axes, (axis, name) in zip(panels.flat, NAMES.items(), strict=True):
            here = [point for point in points if point.axis == axis]
            values = [point.value for point in here]
            least = [point.gflop / gflops * 1000 for point in here]
            axes.plot(values, least, ":", color=LEAST, linewidth=1.4, label="matrix products at full speed")
            predicted = [point.predicted_ms for point in here]
            axes.plot(values, predicted, "--", color=PREDICTED, linewidth=1.4, label="as the operations grow")
            axes.plot(
                values, [point.measured_ms for point in here], "o-", color=MEASURED, markersize=4, label="measured"
            )
            (base,) = (point for point in here if point.value == BASE[axis])
            axes.plot(
                [base.value], [base.measured_ms], "o", color=MEASURED, markersize=10, fillstyle="none", label="base"
            )
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.set_xticks(values, [f"{value:,}" for value in values])
            axes.xaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_major_formatter(FuncFormatter(lambda ms, _: f"{ms:,g}"))
            axes.set_xlabel(name)
            axes.grid(alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)
        for axes in panels[:, 0]:
            axes.set_ylabel("ms per step")
        others = (
            f"{BASE['n_layer']} layers, width {BASE['n_embd']}, block {BASE['block_size']}, batch {BASE['batch_size']}"
        )
        figure.suptitle(f"Time of a training step; one size varies, the others stay: {others}", fontsize=11)
        figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
        return picture_of(figure)


if __name__ == "__main__":
    sys.exit(main())
