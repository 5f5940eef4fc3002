"""Which recipe reaches a validation loss first? Tiny Shakespeare, with the loss over the whole validation split.

python -m benchmarks.speedrun --target 1.88            # about 15 minutes on 2 CPU cores
python -m benchmarks.speedrun --seeds 1,2,3 --recipes shakespeare_cpu,speedrun_cpu

A recipe is a preset; the suffix ":learned" replaces rotary positions by learned ones, as in nanoGPT. Each trains for
its own number of steps with all tracking on. Seconds run from the evaluation before the first step to the end of that
after the last step: start-up does not count, and there are no other evaluations and no sample texts. Then the last
recipe is trained for as many steps as fit into the time of the first one.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from benchmarks.common import add_config_flag, load_config, machine_facts, verdict
from benchmarks.shakespeare import Trained, measure
from utils.errors import UserError, nearest
from utils.terminal.cli import PROJECT_ROOT, Parser, numbers, script
from utils.terminal.console import Terminal

PRESETS = PROJECT_ROOT / "configs" / "presets"
RECIPES = "shakespeare_cpu,shakespeare_cpu:learned,speedrun_cpu"
SHARE = 1 / 5  # of the first recipe's time that the last may take
TOLERANCE = 0.01  # nats by which the worst seed may miss the target
EQUAL_TIME_TARGET = 1.65
LEAST_SEEDS = 3


@script
def main(argv: Sequence[str]) -> int:
    parser = Parser(prog="python -m benchmarks.speedrun", description=__doc__)
    parser.add_argument(
        "--target", type=float, default=1.88, metavar="LOSS", help="loss to reach, nats per token (default: 1.88)"
    )
    parser.add_argument(
        "--seeds", default="1337,1,2,3,4", metavar="A,B", help="seeds of the runs (default: 1337,1,2,3,4)"
    )
    parser.add_argument("--recipes", default=RECIPES, metavar="A,B", help=f"presets (default: {RECIPES})")
    add_config_flag(parser)
    args = parser.parse(argv)
    recipes = [name for name in args.recipes.split(",") if name]
    for name in recipes:
        if not preset_of(name).is_file():
            raise UserError(
                f"--recipes: no preset {name}{nearest(name, [path.stem for path in PRESETS.glob('*.yaml')])}"
            )
    if not recipes:
        raise UserError("--recipes: expected names of presets, separated by commas")
    seeds = numbers(args.seeds, "--seeds", int, 0)
    terminal = Terminal()
    if len(set(seeds)) < LEAST_SEEDS:
        terminal.warn(f"fewer than {LEAST_SEEDS} seeds: losses differ by 0.01 between them")
    results: dict[str, list[Trained]] = {name: [] for name in recipes}
    for seed in seeds:
        for name in recipes:
            terminal.print(f"seed {seed}: {name}")
            results[name].append(train_recipe(name, seed, args.config))
    first, last = recipes[0], recipes[-1]
    steps = round(results[last][0].steps * mean_seconds(results[first]) / mean_seconds(results[last]))
    long_name = f"{last}, {steps:,} steps"
    results[long_name] = []
    for seed in seeds:
        terminal.print(f"seed {seed}: {long_name}")
        results[long_name].append(train_recipe(last, seed, args.config, steps))
    terminal.print("", results_table(results, args.target), f"machine: {machine_facts()}")
    for line in judgements(results[first], results[last], results[long_name], args.target):
        terminal.print(line)
    return 0


def preset_of(recipe: str) -> Path:
    return PRESETS / f"{recipe.removesuffix(':learned')}.yaml"


def train_recipe(name: str, seed: int, more: Sequence[Path], steps: int | None = None) -> Trained:
    """Train a recipe once, for its own number of steps or for `steps`."""
    with tempfile.TemporaryDirectory() as folder:
        overrides: dict[str, str | bool] = {"seed": str(seed), "eval_interval": str(10**9), "sample_tokens": "0"}
        if name.endswith(":learned"):
            overrides["position"] = "learned"
        if steps is not None:
            overrides["max_iters"] = str(steps)
        return measure(load_config([preset_of(name), *more], Path(folder), overrides))


def mean_seconds(runs: Sequence[Trained]) -> float:
    return statistics.mean(run.training_seconds for run in runs)


def judgements(first: Sequence[Trained], last: Sequence[Trained], long: Sequence[Trained], target: float) -> list[str]:
    """The targets and whether they are reached, one line each."""
    share = mean_seconds(last) / mean_seconds(first)
    losses = [run.split_loss for run in last]
    mean, worst = statistics.mean(losses), max(losses)
    long_mean = statistics.mean(run.split_loss for run in long)
    return [
        f"mean loss {mean:.4f}, at most {target:g}: {verdict(mean <= target)}; "
        f"worst {worst:.4f}, at most {target + TOLERANCE:g}: {verdict(worst <= target + TOLERANCE)}",
        f"time 1/{1 / share:.1f} of the first recipe, at most 1/{1 / SHARE:g}: {verdict(share <= SHARE)}",
        f"parameters {last[0].parameters:,}, at most {first[0].parameters:,}: "
        f"{verdict(last[0].parameters <= first[0].parameters)}",
        f"in the time of the first recipe: mean loss {long_mean:.4f}, at most {EQUAL_TIME_TARGET}: "
        f"{verdict(long_mean <= EQUAL_TIME_TARGET)}",
    ]


def results_table(results: dict[str, list[Trained]], target: float) -> Table:
    table = Table(title=f"Tiny Shakespeare, target {target:g}", title_justify="left", title_style="bold")
    table.add_column("recipe", overflow="fold")
    for header in ("ms/step", "seconds", "worst", "loss", "best", "worst", "at target"):
        table.add_column(header, justify="right", no_wrap=True)
    for name, runs in results.items():
        losses, seconds = [run.split_loss for run in runs], [run.training_seconds for run in runs]
        table.add_row(
            name,
            f"{1000 * mean_seconds(runs) / runs[0].steps:.1f}",
            *(f"{number:.2f}" for number in (mean_seconds(runs), max(seconds))),
            *(f"{loss:.4f}" for loss in (statistics.mean(losses), min(losses), max(losses))),
            f"{sum(loss <= target for loss in losses)} of {len(runs)}",
        )
    return table


if __name__ == "__main__":
    sys.exit(main())
