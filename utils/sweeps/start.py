"""Starting a sweep from a command line, and printing its result."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.text import Text

from utils.config.loader import LoadedConfig
from utils.corpora.absolute_paths import with_absolute_paths
from utils.errors import UserError
from utils.machine.process import available_cores
from utils.sweeps.driver import Driver, Ending
from utils.sweeps.folder import RECORD as SWEEP_RECORD
from utils.sweeps.folder import Plan, Sweep, check_name, open_sweep, read_sweep, steps_of
from utils.sweeps.population import check_population
from utils.sweeps.pruning import Pruner, PrunerName, make_pruner
from utils.sweeps.sampling import SamplerName, grid
from utils.sweeps.space import Space, read_space
from utils.sweeps.study import PARENT, REASON, RUNS, Study
from utils.sweeps.table import Display, longer_command, summary
from utils.terminal.commands import print_json
from utils.terminal.config_flags import ExperimentArguments
from utils.terminal.console import Terminal

if TYPE_CHECKING:
    from utils.experiments.compare import Comparison

SWEEPS = "sweeps"


def start_sweep(parsed: ExperimentArguments, root: Path) -> int:
    """Run or resume the sweep that a command line of sweep.py describes.

    Returns:
        The exit status.

    Raises:
        UserError: a mistake on the command line, in the space, or in the configuration.
    """
    own = parsed.own
    space = read_space(own.space, root)
    base = parsed.loader.put_layer(parsed.loader.load(parsed.files), space.fixed)
    loaded = with_absolute_paths(parsed.loader.load_onto(base, (), parsed.overrides), root)
    folder = sweeps_folder(loaded, root, own.sweeps_dir) / check_name(own.name or own.space.stem)
    known = read_sweep(folder, root).plan if own.resume and (folder / SWEEP_RECORD).exists() else None
    plan = plan_of(space, loaded, own, known)
    sweep = open_sweep(folder, plan, root, resume=own.resume)
    if own.engine == "ray":
        from utils.sweeps.ray_engine import run_on_ray

        study, terminal = Study(sweep), Terminal(quiet=own.json)
        display = Display(terminal, sweep, study, {}, own.trials)
        return finish(sweep, study, run_on_ray(sweep, own.trials, own.jobs, own.max_failures, display.ended), own.json)
    return finish(sweep, *drive(sweep, own.trials, own.jobs, own.max_failures, own.json), own.json)


def sweeps_folder(loaded: LoadedConfig, root: Path, chosen: Path | None) -> Path:
    """The folder of all sweeps: `chosen`, or `sweeps` beside the folder of the runs."""
    if chosen is not None:
        return Path(os.path.abspath(chosen))
    return Path(os.path.abspath(root / loaded.config.tracking.runs_dir)).parent / SWEEPS


def plan_of(space: Space, loaded: LoadedConfig, own: Any, known: Plan | None) -> Plan:
    """The sweep that the command line describes.

    Args:
        own: the flags of sweep.py.
        known: the plan of the sweep that is resumed, which replaces the defaults of flags that were not given.

    Raises:
        UserError: the flags do not fit each other or the space.
    """
    config = loaded.config
    seed = own.sampler_seed if own.sampler_seed is not None else known.sampler_seed if known else 0
    if own.pruner is None and own.min_steps is None and own.eta is None and known is not None:
        pruner = known.pruner
    else:
        name: PrunerName = own.pruner or (known.pruner.name if known else "none")
        pruner = make_pruner(name, steps_of(config, space), own.min_steps, own.eta, own.trials)
    usual: SamplerName = "random" if pruner.name == "pbt" else "tpe"
    sampler: SamplerName = own.sampler or (known.sampler if known else usual)
    check_goal(space, pruner)
    check_population(space, sampler, pruner, own.trials)
    if sampler == "grid":
        grid(space, {})
    searched = {dimension.key for dimension in space.dimensions}
    if known is not None:
        threads = known.threads
    elif config.train.threads is not None or "threads" in searched or own.jobs == 1:
        threads = None
    else:
        threads = threads_of_job(own.jobs)
    return Plan(space, config, sampler, seed, pruner, threads)


def threads_of_job(jobs: int) -> int:
    """CPU threads of each of `jobs` parallel trials: an equal share of the cores that this process may use."""
    return max(1, available_cores() // jobs)


def check_goal(space: Space, pruner: Pruner) -> None:
    """Raises UserError if the pruner cannot compare trials by the goal of the space."""
    if pruner.name != "none" and space.goal.seconds_to_loss is not None:
        raise UserError(f"--pruner {pruner.name} compares trials at the same step, which {space.goal} does not allow")


def drive(sweep: Sweep, total: int, jobs: int, max_failures: int, quiet: bool) -> tuple[Study, Ending]:
    """Run a sweep on this machine and show its progress."""
    study = Study(sweep)
    terminal = Terminal(quiet=quiet)
    display: Display | None = None
    driver = Driver(sweep, study, total, jobs, max_failures, lambda *end: display.ended(*end) if display else None)
    display = Display(terminal, sweep, study, driver.runner.activities, total)
    with display:
        return study, driver.run(display.update)


def finish(
    sweep: Sweep,
    study: Study,
    ending: Ending,
    as_json: bool,
    compare: Callable[[Sweep, Study], Comparison | None] | None = None,
) -> int:
    """Print the summary of a sweep that has ended, and write its pictures if it is complete.

    Args:
        compare: compares the runs of the sweep; if given, no pictures are drawn.

    Returns:
        The exit status.
    """
    from utils.experiments.comparison_tables import comparison_screen
    from utils.sweeps.report import write_report

    importance: dict[str, float] = {}
    files: list[Path] = []
    comparison: Comparison | None = None
    if ending.exit_status == 0 and compare is not None:
        comparison = compare(sweep, study)
    elif ending.exit_status == 0:
        importance, files = write_report(sweep, study)
    if as_json:
        data = as_data(sweep, study, importance, files)
        compared = {"comparison": comparison} if compare is not None else {}
        print_json({**data, **compared})
    else:
        Terminal().print("", *summary(sweep, study, importance, files))
        if comparison is not None:
            Terminal().print(Text("\nComparison", style="bold"), *comparison_screen(comparison))
    if ending.problem:
        print(f"error: {ending.problem}", file=sys.stderr)
    elif ending.signum is not None:
        print(f"stopped: --resume continues {sweep.path.name}", file=sys.stderr)
    return ending.exit_status


def as_data(sweep: Sweep, study: Study, importance: dict[str, float], files: list[Path]) -> dict[str, Any]:
    """The result of a sweep for --json."""
    return {
        "sweep": sweep.name,
        "folder": str(sweep.path),
        "metric": str(sweep.plan.space.goal),
        "best": [trial.number for trial in study.best()],
        "importance": importance,
        "pictures": [str(path) for path in files],
        "train_longer": longer_command(sweep, study),
        "trials": [
            {
                "number": trial.number,
                "state": "paused" if study.is_paused(trial) else trial.state.name.lower(),
                "value": trial.value,
                "settings": trial.params,
                "reason": trial.user_attrs.get(REASON),
                "runs": trial.user_attrs.get(RUNS, []),
                **({"parent": trial.user_attrs[PARENT]} if PARENT in trial.user_attrs else {}),
                "at_steps": {str(step): value for step, value in trial.intermediate_values.items()},
            }
            for trial in study.trials()
        ],
    }
