"""Does the model learn as well as nanoGPT's? The CPU recipe on Tiny Shakespeare, exported, reopened, evaluated.

python -m benchmarks.shakespeare                       # ten runs of 2000 steps, about 13 minutes on 2 CPU cores
python -m benchmarks.shakespeare --seeds 1337

Two models take turns: the preset, with rotary positions, and nanoGPT's exact recipe, with learned positions.
The loss is that of the exported weights over the whole validation split.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from benchmarks.common import add_config_flag, at_least, load_config, machine_facts, split_loss, verdict
from utils.config.loader import LoadedConfig
from utils.errors import UserError
from utils.runs.layout import EXPORT, LOGS
from utils.runs.log import METRICS_FILE, read_metrics, read_records
from utils.terminal.cli import PROJECT_ROOT, Parser, numbers, script
from utils.terminal.console import Terminal

PRESET = PROJECT_ROOT / "configs" / "presets" / "shakespeare_cpu.yaml"
TARGET = 1.90  # nats per token
NANOGPT = 1.886  # nanoGPT's own code, learned positions, 132 s on 2 cores
POSITIONS = ("rope", "learned")  # those of the preset and of nanoGPT


@dataclass(frozen=True)
class Trained:
    """One run: losses in nats per token, throughput as the median over the log's records."""

    position: str
    seed: int
    steps: int
    split_loss: float  # over the whole validation split
    estimate: float  # as reported by the run itself
    seconds: float  # from start to end
    training_seconds: float  # from the first evaluation (and sample text) to the last
    tokens_per_second: float
    parameters: int


@script
def main(argv: Sequence[str]) -> int:
    parser = Parser(prog="python -m benchmarks.shakespeare", description=__doc__)
    parser.add_argument("--steps", type=int, default=2000, metavar="N", help="optimizer updates (default: 2000)")
    parser.add_argument(
        "--seeds", default="1337,1,2,3,4", metavar="A,B", help="seeds of the runs (default: 1337,1,2,3,4)"
    )
    add_config_flag(parser)
    args = parser.parse(argv)
    at_least(1, steps=args.steps)
    terminal = Terminal()
    results: dict[str, list[Trained]] = {position: [] for position in POSITIONS}
    for seed in numbers(args.seeds, "--seeds", int, 0):
        for position in POSITIONS:
            terminal.print(f"seed {seed}, {position} positions: training {args.steps:,} steps")
            with tempfile.TemporaryDirectory() as folder:
                overrides: dict[str, str | bool] = {
                    "position": position,
                    "seed": str(seed),
                    "max_iters": str(args.steps),
                    "warmup_iters": str(args.steps // 20),  # 100 for 2000 steps, and valid for short trials
                    "aim_logging": False,
                }
                results[position].append(measure(load_config([PRESET, *args.config], Path(folder), overrides)))
    terminal.print("", results_table(results), f"machine: {machine_facts()}")
    for position, runs in results.items():
        loss = statistics.median(run.split_loss for run in runs)
        reached = f"target {TARGET:.2f} {verdict(loss <= TARGET)}"
        against = f"nanoGPT {NANOGPT:.3f}, ratio {loss / NANOGPT:.4f}"
        terminal.print(f"{position} positions: median loss {loss:.4f}: {reached}; {against}")
    return 0


def measure(loaded: LoadedConfig) -> Trained:
    """Train, reopen the export, and evaluate it on every token of the validation split.

    Raises:
        UserError: the corpus is missing, or the run did not complete.
        KeyboardInterrupt: the run was interrupted.
    """
    import torch

    from data import load_corpus
    from train import train
    from utils.inference.export import load_export

    config = loaded.config
    result = train(loaded, quiet=True)
    if result.status == "interrupted":
        raise KeyboardInterrupt
    if result.status != "completed":
        raise UserError(f"the run ended as {result.status}: {result.exit_reason}")
    assert result.val_loss is not None
    export = load_export(result.run_dir / EXPORT, torch.device("cpu"))
    corpus = load_corpus(config.data, config.model.block_size, PROJECT_ROOT / config.data.corpora_dir)
    rates = read_metrics(result.run_dir / LOGS, "tokens_per_second")
    return Trained(
        position=config.model.position,
        seed=config.train.seed,
        steps=result.steps,
        split_loss=split_loss(export.model, corpus.split("val")),
        estimate=result.val_loss,
        seconds=result.seconds,
        training_seconds=training_seconds(result.run_dir / LOGS),
        tokens_per_second=statistics.median(rate for _, rate in rates),
        parameters=result.parameters,
    )


def training_seconds(logs: Path) -> float:
    """Seconds from the end of the evaluation before the first step to the end of the one after the last step."""
    evaluations = [record["time"] for record in read_records(logs / METRICS_FILE) if "val/loss" in record]
    return evaluations[-1] - evaluations[0]


def results_table(results: Mapping[str, Sequence[Trained]]) -> Table:
    table = Table(title="Tiny Shakespeare, nanoGPT's CPU recipe", title_justify="left", title_style="bold")
    table.add_column("positions")
    for header in ("seed", "steps", "val split", "estimate", "seconds", "tokens/s"):
        table.add_column(header, justify="right")
    for position, runs in results.items():
        for run in runs:
            table.add_row(position, f"{run.seed}", f"{run.steps:,}", *_cells([run]))
        table.add_row(position, "median", "", *_cells(runs), style="bold")
        table.add_section()
    return table


def _cells(results: Sequence[Trained]) -> tuple[str, ...]:
    return (
        f"{statistics.median(r.split_loss for r in results):.4f}",
        f"{statistics.median(r.estimate for r in results):.4f}",
        f"{statistics.median(r.seconds for r in results):.1f}",
        f"{statistics.median(r.tokens_per_second for r in results):,.0f}",
    )


if __name__ == "__main__":
    sys.exit(main())
