"""What a run starts from if it does not start from scratch, and with which configuration.

A run has one of three relations to an earlier one:

    resume      the same run continues in its own directory, bit for bit
    fork        a new run continues from a checkpoint of another run, perhaps with other settings
    init        a new run begins at step 0 with the weights of another run (fine-tuning)
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from utils.checkpoints.folder import CHOICES, is_choice
from utils.config.fields import SECTION_OF, flat, get_value
from utils.config.loader import (
    ConfigError,
    ConfigLoader,
    LoadedConfig,
    Setting,
    relative_name,
)
from utils.config.settings import Config
from utils.files import expand_home, read_json
from utils.runs.find import is_export, list_run_paths, moved_path, resolve_run
from utils.runs.layout import CONFIG, CONFIG_SOURCES
from utils.runs.lock import is_elsewhere
from utils.runs.run import RunError, read_record, status_of
from utils.runs.seal import checkpoints_are_gone
from utils.runs.trust import callback_words, enclosing_run, made_elsewhere, require_trust

Relation = Literal["resume", "fork", "init"]
RESUMABLE = ("interrupted", "crashed", "failed")  # what made a run fail (a full disk, a callback) may be fixed
BATCH_KEYS = ("batch_size", "gradient_accumulation_steps", "tokens_per_step")
PRETRAINED_PREFIX = "hf:"  # marks the name of a published model where --init-from expects a RUN
FOUND_BATCH = "batch_size auto"  # the source of a batch size that the search found (utils/training/batch_size.py)
PER_SESSION = ("max_minutes", "stop_at_step")  # settings of one process, which a resume does not inherit
OUTPUT_KEYS = ("corpora_dir", "datasets_dir", "runs_dir", "aim_repo")  # paths that training writes to
PATH_KEYS = ("dataset", *OUTPUT_KEYS)  # settings that may be paths; dataset and aim_repo may also be names or addresses
MOVED_PATH = "found after a move"  # the source of a path that was found at another place
LOCAL_PATH = "of this project, as the run was made elsewhere"  # the source of a path that replaces the recorded one
PINNED_KEYS = ("device", "dtype", "threads", "deterministic")  # a resume keeps the values that "auto" resolved to


@dataclass(frozen=True)
class Origin:
    """The checkpoint that training starts from.

    run: directory of the earlier run; for `init` also an export, or the folder of a published model.
    which: the checkpoint: `latest`, `best` or a step.
    strict: whether a damaged newest checkpoint is an error; otherwise the one before it is used.
    trusted: whether the code of a run made elsewhere may run (--trust).
    pretrained: the name of the published model; None for a run or an export.
    revision: the commit of the published model, if known.
    """

    relation: Relation
    run: Path
    which: str = "latest"
    strict: bool = False
    trusted: bool = False
    pretrained: str | None = None
    revision: str | None = None

    @property
    def name(self) -> str:
        """The name of the earlier run or model in messages."""
        return self.run.name if self.pretrained is None else f"{PRETRAINED_PREFIX}{self.pretrained}"


def split_choice(text: str) -> tuple[str, str]:
    """Split RUN[:latest|:best|:STEP] into RUN and the checkpoint, `latest` by default."""
    name, colon, which = text.rpartition(":")
    if colon and name and is_choice(which):
        return name, which
    return text, "latest"


def find_origin(
    relation: Relation, text: str, runs_dir: Path, *, strict: bool = False, trusted: bool = False
) -> Origin:
    """The origin that RUN[:which] on a command line names.

    Raises:
        RunError: there is no such run, or a resume asks for a checkpoint other than the newest.
    """
    name, which = split_choice(text)
    name = expand_home(name)
    if name and is_export(Path(name)):
        if relation != "init" or which not in CHOICES:
            raise RunError(f"{text} is an export, which has only weights: --init-from {name} starts with them")
        return Origin(relation, Path(os.path.abspath(name)))
    run = resolve_run(name, runs_dir)
    if relation == "resume" and which != "latest":
        raise RunError(
            f"--resume {text}: a run continues from its newest checkpoint; --fork starts a new run from any checkpoint"
        )
    path = Path(os.path.abspath(run))  # links are not resolved: a run that was moved and linked stays beside others
    return Origin(relation, path, which, strict, trusted)


def resumable_runs(runs_dir: Path, tag: str, report: Callable[[str], None] = lambda line: None) -> list[Path]:
    """The runs with this tag that can be resumed, newest first: interrupted, crashed or failed, with a configuration.

    Args:
        report: gets one line for each run that cannot be resumed and is newer than the first result, back to the newest
            complete one; and one for each unreadable run whose id seems to contain the tag.
    """
    found: list[Path] = []
    complete = False
    for path in reversed(list_run_paths(runs_dir)):
        try:
            record = read_record(path)
        except RunError as error:
            if f"_{tag}" in path.name:
                report(f"{path.name} is not resumed: {error}")
            continue
        if record.get("tag") != tag:
            continue
        if (reason := _why_not(path, record)) is None:
            found.append(path)
        elif not found and not complete:
            report(f"{path.name} is not resumed: {reason}")
            complete = record["status"] == "completed"
    return found


def _why_not(path: Path, record: Mapping[str, Any]) -> str | None:
    """Why `--resume auto` does not continue a run; None if it can."""
    status = status_of(path, record)
    if status == "completed":
        return "it is complete"
    if status == "running" and not is_elsewhere(path, record):  # elsewhere it may just have died: `Run.resume` waits
        return f"it is being trained by process {record.get('pid')} on {record.get('host')}"
    if status not in (*RESUMABLE, "running"):
        return f"it {status}: {record.get('exit_reason')}"
    if checkpoints_are_gone(path):
        return "its checkpoints were deleted"
    return None if (path / CONFIG).is_file() else "it ended before its configuration was written"


def recorded_config(run: Path, loader: ConfigLoader) -> LoadedConfig:
    """The configuration that a run was started with, with the recorded source of each value.

    The settings in PER_SESSION are taken from the current configuration files instead. A path that no longer exists is
    looked for in this project, which may have moved; a missing runs_dir is replaced by the folder that contains the
    run. If the run was made elsewhere, the folders to write to are those of this project.

    Raises:
        ConfigError: the recorded configuration is missing or damaged.
    """
    if not (run / CONFIG).is_file():
        raise ConfigError(f"{run.name} ended before its configuration was written: nothing can be resumed")
    config, current = loader.load_only(run / CONFIG).config, loader.load()
    try:
        sources = read_json(run / CONFIG_SOURCES, run)
    except (OSError, ValueError):  # sources are only reported, so training can do without them
        sources = {}
    place = f"{run.name}/{CONFIG}"
    layers = {key: _recorded_layers(sources, key, value, place) for key, value in flat(config).items()}
    layers |= {key: current.layers[key] for key in PER_SESSION}
    recorded = LoadedConfig(pin(config, {key: get_value(current.config, key) for key in PER_SESSION}), layers)
    now, source = {key: moved_path(get_value(config, key), loader.root) for key in PATH_KEYS}, MOVED_PATH
    if os.path.isabs(config.tracking.runs_dir) and not os.path.lexists(config.tracking.runs_dir):
        now["runs_dir"] = os.fspath(run.absolute().parent)  # not another folder of that name in this project
    if made_elsewhere(run, loader.root):
        now, source = (
            {"dataset": now["dataset"], **{key: get_value(current.config, key) for key in OUTPUT_KEYS}},
            LOCAL_PATH,
        )
    return put_on_top(recorded, {key: path for key, path in now.items() if path != get_value(config, key)}, source)


def _recorded_layers(sources: Any, key: str, value: Any, place: str) -> list[Setting]:
    """The layers of one setting in meta/config_sources.json; if it is not there, one layer with the source `place`."""
    try:
        below = [Setting(shadowed["value"], shadowed["source"]) for shadowed in reversed(sources[key]["shadowed"])]
        return [*below, Setting(value, sources[key]["source"])]
    except (LookupError, TypeError):
        return [Setting(value, place)]


def without_foreign_places(loaded: LoadedConfig, files: Iterable[Path], root: Path, trusted: bool) -> LoadedConfig:
    """`loaded`, without the folders to write to that are set by configuration files inside runs made elsewhere.

    Args:
        files: the configuration files of --config.
        root: the project folder.
        trusted: whether such files are trusted; then nothing is left out.

    Raises:
        UserError: callbacks come from such a file, and the user does not allow them.
    """
    layers, values = dict(loaded.layers), {}
    for path in files:
        name, run = relative_name(path, root), enclosing_run(path)
        if trusted or run is None or made_elsewhere(run, root) is None:
            continue
        if loaded.source("callbacks").rpartition(":")[0] == name:
            require_trust(run, root, callback_words(loaded.config.train.callbacks), trusted)
        for key in OUTPUT_KEYS:
            kept = [layer for layer in layers[key] if layer.source.rpartition(":")[0] != name]
            if len(kept) < len(layers[key]):
                layers[key], values[key] = kept, kept[-1].value
    return replace(loaded, config=pin(loaded.config, values), layers=layers)


def config_of_fork(
    run: Path, loader: ConfigLoader, files: Iterable[Path], overrides: Mapping[str, str | bool]
) -> LoadedConfig:
    """The configuration of a fork: that of `run` with the given overrides; an inherited tag gets the suffix `-fork`."""
    recorded = recorded_config(run, loader)
    loaded = loader.load_onto(recorded, files, overrides)
    tag = recorded.config.tracking.run_tag
    if tag is None or len(loaded.layers["run_tag"]) > len(recorded.layers["run_tag"]):
        return loaded
    tag = tag if tag.endswith("-fork") else f"{tag[:59]}-fork"
    return put_on_top(loaded, {"run_tag": tag}, "--fork")


def pinned_settings(config: Config, record: Mapping[str, Any]) -> dict[str, Any]:
    """The values that "auto" or none in PINNED_KEYS resolved to when the run started; others may change the numbers."""
    resolved = record.get("resolved") or {}
    is_open = {key: get_value(config, key) in (None, "auto") for key in PINNED_KEYS}
    return {key: resolved[key] for key in PINNED_KEYS if key in resolved and is_open[key]}


def pin(config: Config, pinned: Mapping[str, Any]) -> Config:
    """`config` with the values in `pinned` instead of its own."""
    sections: dict[str, Any] = {}
    for key, value in pinned.items():
        section = SECTION_OF[key]
        sections[section] = (sections.get(section) or getattr(config, section)).model_copy(update={key: value})
    return config.model_copy(update=sections)


def put_on_top(loaded: LoadedConfig, values: Mapping[str, Any], source: str) -> LoadedConfig:
    """`loaded` with `values` as one more layer on top."""
    layers = {key: [*loaded.layers[key], Setting(value, source)] for key, value in values.items()}
    return LoadedConfig(pin(loaded.config, values), {**loaded.layers, **layers})


def keep_batch(recorded: LoadedConfig, loaded: LoadedConfig) -> LoadedConfig:
    """`loaded`, with the batch size that the run found if `loaded` asks for the same search that the run made.

    Thus the command that started a run with batch_size auto can resume it, even on a machine with less memory.
    """
    given = [[s for s in recorded.layers[key] if s.source != FOUND_BATCH] for key in BATCH_KEYS]
    asked_then = [str(layers[-1].value) if layers else "" for layers in given]
    asked_now = [str(get_value(loaded.config, key)) for key in BATCH_KEYS]
    if recorded.source("batch_size") != FOUND_BATCH or asked_then != asked_now:
        return loaded
    config = pin(loaded.config, {key: get_value(recorded.config, key) for key in BATCH_KEYS})
    return LoadedConfig(config, {**loaded.layers, **{key: recorded.layers[key] for key in BATCH_KEYS}})


def parent_facts(origin: Origin, step: int, state: Mapping[str, Any]) -> dict[str, Any]:
    """The entry `parent` in run.json of a run that starts from `origin` at `step`.

    The parent is found again by its id; `path` is only a hint, for runs in different folders.

    Args:
        state: the state of the checkpoint; for an export or a published model, a name as `run`, and the checksum of
            the weights as `export` or `pretrained`.
    """
    facts = {"run": origin.name, "path": os.fspath(origin.run), "step": step, "relation": origin.relation}
    if checksum := state.keys() & {"export", "pretrained"}:
        facts |= {key: state[key] for key in ("run", *sorted(checksum))}
    return facts
