"""The folder of a sweep. What is searched, and how, is written once; a sweep is resumed only if it is still the same.

sweeps/NAME/
    sweep.json           the space, the sampler and the pruner with their arguments, and a random id
    full_config.json     every setting that is not searched, as at the start: later edits of configs/ change nothing
    journal.jsonl        what happened to each trial (Optuna's JournalStorage)
    trials/17/           the lock of trial 17, and the output of its processes
    report/              the pictures, drawn at the end
"""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from utils.config.fields import FIELDS, field_fact, flat
from utils.config.loader import ConfigLoader
from utils.config.section import TRAJECTORY
from utils.config.settings import Config
from utils.errors import UserError
from utils.files import read_json, write_json
from utils.locks import folder_lock
from utils.runs import layout
from utils.runs.run import utc_now
from utils.sweeps.pruning import Pruner
from utils.sweeps.sampling import SamplerName, sampler_arguments
from utils.sweeps.space import Space, Value
from utils.terminal.words import setting_text

SCHEMA_VERSION = 1
RECORD = "sweep.json"
CONFIG = layout.CONFIG.name
JOURNAL = "journal.jsonl"
TRIALS = "trials"
REPORT = "report"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,49}")  # the tags of the runs begin with it: NAME-17


@dataclass(frozen=True)
class Plan:
    """The definition of a sweep, which never changes.

    config: the settings that are not searched, including those that the space fixes.
    threads: CPU threads of a trial; None: as the configuration or the space says.
    """

    space: Space
    config: Config
    sampler: SamplerName = "tpe"
    sampler_seed: int = 0
    pruner: Pruner = field(default_factory=Pruner)
    threads: int | None = None

    @property
    def searched(self) -> set[str]:
        return {dimension.key for dimension in self.space.dimensions}


@dataclass(frozen=True)
class Sweep:
    """The folder of a sweep, which may be moved and renamed.

    id, name: a random id, and the name that the sweep began with; run.json of each of its runs has both.
    root: the folder of the project.
    """

    path: Path
    id: str
    name: str
    plan: Plan
    root: Path

    @property
    def runs_dir(self) -> Path:
        return self.root / self.plan.config.tracking.runs_dir

    @property
    def maximize(self) -> bool:
        return self.plan.space.goal.maximize

    @property
    def fixed(self) -> dict[str, Value]:
        """The configured values of all settings, for conditions; a trial's values take precedence."""
        return flat(self.plan.config)

    @property
    def seeds(self) -> list[int]:
        """The seeds of the runs of a trial."""
        return self.plan.space.seeds_from(self.plan.config.train.seed)

    def trial_folder(self, number: int) -> Path:
        return self.path / TRIALS / str(number)

    def tag(self, number: int) -> str:
        """The tag of the runs of a trial."""
        return f"{self.name}-{number}"


def check_name(name: str, flag: str = "--name") -> str:
    """Return `name`. Raises UserError unless it is a valid name of a sweep; the message refers to `flag`."""
    if not NAME.fullmatch(name):
        expected = "a letter or digit, then up to 49 letters, digits, '.', '_' or '-'"
        raise UserError(f"{flag}: the name of a sweep is {expected}, not {name!r}")
    return name


def open_sweep(path: Path, plan: Plan, root: Path, *, resume: bool) -> Sweep:
    """Create the folder of a sweep, or open an existing one.

    Args:
        plan: if the folder exists, it must have this plan.
        resume: whether the folder may exist already.

    Raises:
        UserError: the folder exists without `resume`, belongs to another sweep, or cannot be written.
    """
    try:
        (path / TRIALS).mkdir(parents=True, exist_ok=True)
        with folder_lock(path):
            if not (path / RECORD).exists():
                write_json(path / CONFIG, plan.config.model_dump(mode="json"))
                write_json(path / RECORD, _record_of(path.name, plan))  # last: the sweep exists once this file does
                resume = True
    except OSError as error:
        raise UserError(f"{path}: the sweep cannot be written: {error.strerror}") from None
    sweep = read_sweep(path, root)
    if not resume:
        raise UserError(f"{path} exists: --resume continues this sweep, --name NAME starts another one")
    if found := list(differences(sweep.plan, plan)):
        raise UserError("\n".join(f"{path} is a different sweep: {line}" for line in found))
    return sweep


def _record_of(name: str, plan: Plan) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "id": secrets.token_hex(8),
        "name": name,
        "start": utc_now(),
        "space": plan.space.as_json(),
        "sampler": {
            "name": plan.sampler,
            "seed": plan.sampler_seed,
            **sampler_arguments(plan.sampler, plan.space),
        },
        "pruner": plan.pruner.as_json(),
        "threads": plan.threads,
    }


def read_sweep(path: Path, root: Path) -> Sweep:
    """The sweep in a folder.

    Raises:
        UserError: the folder has no sweep, or its record is damaged.
    """
    try:
        record = read_json(path / RECORD, path)
        if record["schema_version"] != SCHEMA_VERSION:
            raise UserError(
                f"{path / RECORD} has schema_version {record['schema_version']!r}, expected {SCHEMA_VERSION}"
            )
        config = ConfigLoader(root).load_only(path / CONFIG).config
        sampler = record["sampler"]
        plan = Plan(
            Space.from_json(record["space"]),
            config,
            sampler["name"],
            sampler["seed"],
            Pruner.from_json(record["pruner"]),
            record["threads"],
        )
        if not NAME.fullmatch(record["name"]):
            raise ValueError(f"its name is {record['name']!r}")
        return Sweep(Path(os.path.abspath(path)), record["id"], record["name"], plan, root)
    except FileNotFoundError:
        raise UserError(f"{path} is not the folder of a sweep: it has no {RECORD}") from None
    except OSError as error:
        raise UserError(f"{path / RECORD} cannot be read: {error.strerror}") from None
    except UserError:
        raise
    except (LookupError, TypeError, ValueError, StopIteration) as error:
        raise UserError(f"{path / RECORD} is not the record of a sweep: {error}") from None


def differences(recorded: Plan, wanted: Plan) -> Iterator[str]:
    """One line for each difference between the sweep in a folder and the wanted one."""
    before, after = (_as_text(plan) for plan in (recorded, wanted))
    for name in dict.fromkeys((*before, *after)):
        old, new = before.get(name, "not searched"), after.get(name, "not searched")
        if old != new:
            yield f"{name} was {old}, is now {new}"
    old_config, new_config = flat(recorded.config), flat(wanted.config)
    for key in FIELDS:
        if key in recorded.searched or field_fact(key, "kind") != TRAJECTORY:
            continue
        if old_config[key] != new_config[key]:
            yield f"{key} was {setting_text(old_config[key])}, is now {setting_text(new_config[key])}"


def _as_text(plan: Plan) -> dict[str, str]:
    """The parts of a plan other than its configuration, as text by name."""
    space = plan.space.as_json()
    searched: Mapping[str, Mapping[str, Any]] = space["settings"]
    words = {key: " ".join(f"{kind} {value}" for kind, value in spec.items()) for key, spec in searched.items()}
    pruner = " ".join(f"{key} {value}" for key, value in plan.pruner.as_json().items()).removeprefix("name ")
    return {
        "metric": str(plan.space.goal),
        "seeds": str(plan.space.seeds),
        **words,
        "sampler": plan.sampler,
        "sampler seed": str(plan.sampler_seed),
        "pruner": pruner,
    }


def steps_of(config: Config, space: Space) -> int | None:
    """The number of steps of a whole trial; None if it differs between trials, or `epochs` decides it."""
    if any(dimension.key in ("max_iters", "epochs") for dimension in space.dimensions):
        return None
    return config.train.max_iters
