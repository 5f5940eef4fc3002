"""`train.py --multirun learning_rate=1e-3,3e-3 seed=1,2,3`: one run for each combination, like Hydra's multirun."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_origin

from utils.config.fields import FIELDS
from utils.config.loader import Setting, check_values, flag_name
from utils.config.parse import ConfigError
from utils.corpora.absolute_paths import with_absolute_paths
from utils.errors import UserError, nearest, shown
from utils.runs.index import read_run
from utils.sweeps.driver import MAX_FAILURES
from utils.sweeps.folder import RECORD, Plan, Sweep, check_name, open_sweep
from utils.sweeps.sampling import grid
from utils.sweeps.space import SET_BY_SWEEP, Dimension, Space, Value, is_whole, plain_value
from utils.sweeps.start import drive, finish, sweeps_folder, threads_of_job
from utils.sweeps.study import RUNS, Study
from utils.terminal.config_flags import ExperimentArguments

if TYPE_CHECKING:
    from utils.experiments.compare import Comparison

FLAG = "--multirun"
NAME = "multirun"  # of the sweep, without --run-tag
SWITCHES = {**dict.fromkeys(("true", "on", "yes", "1"), True), **dict.fromkeys(("false", "off", "no", "0"), False)}


def multirun(parsed: ExperimentArguments, root: Path) -> int:
    """Train the runs that a command line describes, `--jobs` at a time, and compare them.

    With --run-tag, the same command resumes what was stopped.

    Returns:
        The exit status.

    Raises:
        UserError: a mistake on the command line or in the configuration.
    """
    own = parsed.own
    for flag in ("resume", "init_from", "budget"):
        if getattr(own, flag) is not None:
            name = flag.replace("_", "-")
            raise UserError(f"{FLAG} starts runs from scratch, with as many steps as configured: leave --{name} out")
    if own.jobs < 1:
        raise UserError(f"--jobs must be at least 1, not {own.jobs}")
    space = space_of(own.multirun)
    loaded = with_absolute_paths(parsed.loader.put_layer(parsed.load(), space.fixed), root)
    points = grid(space, {})
    threads = None if own.jobs == 1 or loaded.config.train.threads is not None else threads_of_job(own.jobs)
    plan = Plan(space, loaded.config, "grid", threads=threads)
    tag, folder = loaded.config.tracking.run_tag, sweeps_folder(loaded, root, None)
    path = folder / check_name(tag, "--run-tag") if tag is not None else _unused_folder(folder)
    sweep = open_sweep(path, plan, root, resume=True)
    study, ending = drive(sweep, len(points), own.jobs, MAX_FAILURES, own.json)
    return finish(sweep, study, ending, own.json, compare_runs)


def space_of(words: Sequence[str]) -> Space:
    """The grid of `KEY=A,B` words; a setting with one value is fixed.

    Raises:
        ConfigError: one line for each mistake.
    """
    dimensions: list[Dimension] = []
    fixed: dict[str, Setting] = {}
    mistakes: list[str] = []
    for word in words:
        key, equals, text = word.partition("=")
        key = key.removeprefix("--").replace("-", "_")
        texts = [part.strip() for part in text.split(",")]
        if not equals or not all(texts):
            mistakes.append(f"{FLAG}: expected SETTING=VALUE,VALUE, got {shown(word)}")
        elif key not in FIELDS:
            mistakes.append(f"{FLAG}: unknown setting {key}{nearest(key, FIELDS)}")
        elif key in SET_BY_SWEEP or key == "runs_dir" or key in {one.key for one in dimensions} | fixed.keys():
            why = "is given twice" if key not in (*SET_BY_SWEEP, "runs_dir") else "is set for each run"
            mistakes.append(f"{FLAG}: {key} {why}")
        elif get_origin(FIELDS[key].annotation) is tuple:
            why = f"is a list, and commas separate values here: {flag_name(key)} sets it for all runs"
            mistakes.append(f"{FLAG}: {key} {why}")
        else:
            values = [_value(key, part) for part in texts]
            mistakes += _mistakes(key, values)
            if len(set(values)) < len(values):
                mistakes.append(f"{FLAG}: {key}: a value is given twice: {text}")
            if len(values) == 1:
                fixed[key] = Setting(values[0], FLAG)
            else:
                dimensions.append(Dimension(key, "choice", tuple(values), whole=is_whole(key)))
    if not mistakes and not dimensions:
        mistakes.append(f"{FLAG}: expected a setting with several values: SETTING=A,B")
    if mistakes:
        raise ConfigError("\n".join(mistakes))
    return Space(tuple(dimensions), fixed)


def _value(key: str, text: str) -> Value:
    """A value as YAML would give it; a switch may also be on, off, yes, no, 1 or 0."""
    value: Value = plain_value(key, text)
    return SWITCHES.get(text.lower(), value) if _is_switch(key) else value


def _is_switch(key: str) -> bool:
    return bool in (FIELDS[key].annotation, *get_args(FIELDS[key].annotation))


def _mistakes(key: str, values: Iterable[Any]) -> list[str]:
    found = []
    for value in values:
        if value is None and _is_switch(key):  # a run gets its settings as flags, and no flag sets a switch to none
            found.append(f"{FLAG}: {key}: expected true or false, got none")
        try:
            check_values({key: Setting(value, FLAG)})
        except ConfigError as error:
            lines = str(error).splitlines()
            found += [line if key in line else line.replace(FLAG, f"{FLAG}: {key}", 1) for line in lines]
    return found


def _unused_folder(folder: Path) -> Path:
    """The first of multirun, multirun_2, ... that is not the name of a sweep yet."""
    names = itertools.chain([NAME], (f"{NAME}_{number}" for number in itertools.count(2)))
    return next(folder / name for name in names if not (folder / name / RECORD).exists())


def compare_runs(sweep: Sweep, study: Study) -> Comparison | None:
    """Compare the runs, grouping those that differ only in their seed; None if there is only one run."""
    from utils.experiments.compare import compare

    names = [name for trial in study.trials() for name in trial.user_attrs.get(RUNS, ())]
    runs = [read_run(sweep.runs_dir / name) for name in names]
    return compare(runs, None) if len(runs) > 1 else None
