"""Which run is continued, with which configuration, or whose weights a new run starts from. No torch here.

Three relations of a run to an earlier one:

    resume      the same run goes on in its own directory, bit for bit
    fork        a new run goes on from a checkpoint of another one, with other settings
    init        a new run begins at step 0 with another run's weights (fine-tuning)
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from utils.config.fields import FIELDS, SECTION_OF, derived_settings, field_fact, flat, get_value
from utils.config.loader import ALTERNATIVES, ConfigError, ConfigLoader, LoadedConfig, Setting, flag_name
from utils.config.settings import TRAJECTORY, Config, ModelConfig
from utils.runs.find import list_run_paths, resolve_run
from utils.runs.layout import CONFIG, CONFIG_SOURCES
from utils.runs.run import RunError, read_record, read_status

Relation = Literal["resume", "fork", "init"]
CHOICES = ("latest", "best")
RESUMABLE = ("interrupted", "crashed")
BATCH = ("batch_size", "gradient_accumulation_steps", "tokens_per_step")
FOUND = "batch_size auto"  # the source of a batch that was searched for (utils/training/batch_size.py)
PER_SESSION = ("max_minutes", "stop_at_step")  # settings of one process, which the next one does not inherit


@dataclass(frozen=True)
class Origin:
    """Where training starts from.

    run: the earlier run's directory.
    which: `latest`, `best` or a step: one of its checkpoints.
    strict: a damaged newest checkpoint is an error; otherwise the one before it is used.
    """

    relation: Relation
    run: Path
    which: str = "latest"
    strict: bool = False


def split_choice(text: str) -> tuple[str, str]:
    """RUN[:latest|:best|:STEP] as (RUN, which)."""
    name, colon, which = text.rpartition(":")
    if colon and name and (which in CHOICES or which.isdecimal()):
        return name, which
    return text, "latest"


def find_origin(relation: Relation, text: str, runs_dir: Path, *, strict: bool = False) -> Origin:
    """The origin that RUN[:which] on a command line means.

    Raises:
        RunError: no such run; or a resume from another checkpoint than the newest.
    """
    name, which = split_choice(text)
    run = resolve_run(name, runs_dir)
    if relation == "resume" and which != "latest":
        raise RunError(
            f"--resume {text}: a run goes on from its newest checkpoint; --fork starts a new run from another one"
        )
    return Origin(relation, run.resolve(), which, strict)


def resumable_runs(runs_dir: Path, tag: str) -> list[Path]:
    """Runs with this tag that were interrupted or have crashed, newest first."""
    found = []
    for path in reversed(list_run_paths(runs_dir)):
        try:
            if read_record(path).get("tag") == tag and read_status(path) in RESUMABLE and _config_path(path).is_file():
                found.append(path)
        except RunError:
            continue
    return found


def _config_path(run: Path) -> Path:
    return run / CONFIG


def recorded_config(run: Path, loader: ConfigLoader) -> LoadedConfig:
    """The configuration that a run was started with, with the sources it had then.

    Settings of PER_SESSION are those of configs/ now.

    Raises:
        ConfigError: it is missing or damaged.
    """
    if not _config_path(run).is_file():
        raise ConfigError(f"{run.name} ended before its configuration was written: nothing can be resumed")
    config, current = loader.load_only(_config_path(run)).config, loader.load()
    try:
        sources = json.loads((run / CONFIG_SOURCES).read_text(encoding="utf-8"))
        layers = {
            key: [
                *(Setting(shadowed["value"], shadowed["source"]) for shadowed in reversed(sources[key]["shadowed"])),
                Setting(value, sources[key]["source"]),
            ]
            for key, value in flat(config).items()
        }
    except (OSError, ValueError, KeyError, TypeError):  # the values count; where they came from is only told
        layers = {key: [Setting(value, f"{run.name}/{CONFIG}")] for key, value in flat(config).items()}
    layers |= {key: current.layers[key] for key in PER_SESSION}
    return LoadedConfig(pin(config, {key: get_value(current.config, key) for key in PER_SESSION}), layers)


def check_overrides(run: Path, recorded: LoadedConfig, loaded: LoadedConfig, resolved: Mapping[str, Any]) -> None:
    """Whether a run that was started as `recorded` may go on as `loaded`.

    Settings of kind observation and machine may differ, and max_iters within the limits of `check_longer`:
    everything else would make it another experiment.

    Args:
        resolved: what "auto" and none came to: to ask for that is to ask for nothing new.

    Raises:
        ConfigError: an override that a resume must refuse, with the reason.
    """
    before, after = flat(recorded.config), flat(loaded.config)
    alternatives = {key for pair in ALTERNATIVES for key in pair}
    for key in FIELDS:
        if after[key] == before[key] or key in alternatives or field_fact(key, "kind") != TRAJECTORY:
            continue
        value = resolved.get(key) if before[key] in (None, "auto") else before[key]
        if after[key] == value or (key == "device" and _device_type(after[key]) == _device_type(str(value))):
            continue
        raise ConfigError(
            f"{loaded.source(key)}: {key} changes the numbers of a run, so {run.name} goes on with "
            f"{_shown(value)}, not {_shown(after[key])}; --fork starts a new run from its checkpoint"
        )


def _device_type(device: str) -> str:
    return device.split(":")[0]


def check_longer(run: Path, record: Mapping[str, Any], config: Config, max_iters: int) -> None:
    """Whether a run may go on to step `max_iters`.

    Args:
        record: its run.json.
        config: with which it goes on.

    Raises:
        ConfigError: it is complete, would shrink, or was trained with learning rates that depend on max_iters.
    """
    old, last_step = record.get("resolved") or {}, record.get("last_step") or 0
    if "max_iters" not in old:  # it ended before it began
        return
    complete = record["status"] == "completed"
    if complete and last_step < old["max_iters"]:
        raise ConfigError(f"{run.name} is complete: it stopped early at step {last_step:,}; --fork starts a new run")
    new = derived_settings(config, max_iters)
    grows = max_iters - old["max_iters"]
    if grows < 0:
        raise ConfigError(f"--max-iters: {run.name} may grow, not shrink, from {old['max_iters']:,} to {max_iters:,}")
    if grows == 0 and complete:
        raise ConfigError(
            f"{run.name} is complete ({max_iters:,} steps); a larger --max-iters lets it go on where the schedule "
            "allows, --fork starts a new run from its checkpoint"
        )
    if grows and config.optimizer.weight_decay and config.optimizer.weight_decay_schedule != "constant":
        raise ConfigError(
            f"--max-iters: {max_iters:,} steps would change the weight decay that {run.name} was trained with: its "
            f"schedule is {config.optimizer.weight_decay_schedule}; --fork starts a new run from its checkpoint"
        )
    decisive = ("warmup_iters",) if config.optimizer.schedule == "constant" else ("warmup_iters", "lr_decay_iters")
    for key in decisive:
        if old[key] != new[key]:
            raise ConfigError(
                f"--max-iters: {max_iters:,} steps would change {key} from {old[key]:,} to {new[key]:,} and so the "
                f"learning rates that {run.name} was trained with; --fork starts a new run from its checkpoint"
            )


def config_of_fork(
    run: Path, loader: ConfigLoader, files: Iterable[Path], overrides: Mapping[str, str | bool]
) -> LoadedConfig:
    """The configuration of a run that branches off: as recorded, with any override; its own tag ends in `-fork`."""
    recorded = recorded_config(run, loader)
    loaded = loader.load_onto(recorded, files, overrides)
    tag = recorded.config.tracking.run_tag
    if tag is None or len(loaded.layers["run_tag"]) > len(recorded.layers["run_tag"]):
        return loaded
    tag = tag if tag.endswith("-fork") else f"{tag[:59]}-fork"
    return put_on_top(loaded, {"run_tag": tag}, "--fork")


def pinned_settings(config: Config, record: Mapping[str, Any]) -> dict[str, Any]:
    """What "auto" and none came to when the run was started: a resume keeps them, or the numbers would differ."""
    resolved = record.get("resolved") or {}
    return {
        key: resolved[key]
        for key in ("device", "dtype", "threads", "deterministic")
        if key in resolved and get_value(config, key) in (None, "auto")
    }


def pin(config: Config, pinned: Mapping[str, Any]) -> Config:
    """`config` with `pinned` settings in the place of its own."""
    sections: dict[str, Any] = {}
    for key, value in pinned.items():
        section = SECTION_OF[key]
        sections[section] = (sections.get(section) or getattr(config, section)).model_copy(update={key: value})
    return config.model_copy(update=sections)


def put_on_top(loaded: LoadedConfig, values: Mapping[str, Any], source: str) -> LoadedConfig:
    """`values` as one more layer, above all others."""
    layers = {key: [*loaded.layers[key], Setting(value, source)] for key, value in values.items()}
    return LoadedConfig(pin(loaded.config, values), {**loaded.layers, **layers})


def keep_batch(recorded: LoadedConfig, loaded: LoadedConfig) -> LoadedConfig:
    """`loaded`; the batch is that of the run where it only asks again for the search that found it.

    So one command can start a run with batch_size auto and resume it, on a machine with less memory too.
    """
    asked = [next((str(s.value) for s in reversed(recorded.layers[key]) if s.source != FOUND), "") for key in BATCH]
    if recorded.source("batch_size") != FOUND or asked != [str(get_value(loaded.config, key)) for key in BATCH]:
        return loaded
    config = pin(loaded.config, {key: get_value(recorded.config, key) for key in BATCH})
    return LoadedConfig(config, {**loaded.layers, **{key: recorded.layers[key] for key in BATCH}})


# Settings that may differ between a model and the one whose weights it takes.
FREE_MODEL_SETTINGS = ("dropout", "rope_theta", "zero_init")


def check_model(own: ModelConfig, parent: Mapping[str, Any], name: str) -> None:
    """Whether a model can take the weights of another one.

    Args:
        own: the architecture that is asked for.
        parent: that of the weights.
        name: of the run they come from.

    Raises:
        ConfigError: what differs, and the flags that would fit.
    """
    theirs = ModelConfig.model_validate(parent)
    differing = [
        key
        for key in differing_model_settings(own, theirs)
        # rotations need no table: with another context the weights are the same
        if key not in FREE_MODEL_SETTINGS and not (key == "block_size" and own.position == theirs.position == "rope")
    ]
    if differing:
        facts = ", ".join(f"{key} {_shown(getattr(theirs, key))}, not {_shown(getattr(own, key))}" for key in differing)
        flags = " ".join(_flag(key, getattr(theirs, key)) for key in differing)
        raise ConfigError(f"the weights of {name} are of another model: {facts}; fitting: {flags}")


def differing_model_settings(own: ModelConfig, theirs: ModelConfig) -> list[str]:
    """Settings that mean another architecture; what is derived from another setting that differs is left out."""
    return [
        key
        for key in ModelConfig.model_fields
        if own.derived.get(key, getattr(own, key)) != theirs.derived.get(key, getattr(theirs, key))
        and not (getattr(own, key) is None and getattr(theirs, key) is None)
    ]


def _flag(key: str, value: Any) -> str:
    return flag_name(key, value) if isinstance(value, bool) else f"{flag_name(key)} {_shown(value)}"


def _shown(value: Any) -> str:
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def parent_facts(origin: Origin, step: int) -> dict[str, Any]:
    """What run.json says of the run that a new one comes from."""
    return {"run": origin.run.name, "path": os.fspath(origin.run), "step": step, "relation": origin.relation}
