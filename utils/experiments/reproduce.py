"""Training a run again, from its recorded code, configuration and corpus, and comparing the two bit by bit.

The repetition runs in a process of its own, so that it can run the recorded code.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from utils.checkpoints.folder import WEIGHTS_FILE, CheckpointError, list_checkpoints
from utils.checkpoints.header import tensors_sha256
from utils.config.loader import ConfigLoader, flag_name
from utils.experiments.bits import LogComparison, compare_logs
from utils.experiments.diff import environment_of
from utils.experiments.recorded_code import Code, ReproductionError, code_of_its_own, recorded_code
from utils.experiments.training_process import run_training
from utils.files import is_regular, read_bytes, real_path, write_atomic
from utils.runs.find import moved_path, parent_path
from utils.runs.index import IndexedRun, read_run, resolved_setting
from utils.runs.layout import CHECKPOINTS, CONFIG, EXPORT, GIT, LOGS, METRICS_LOG, PATCH, TOKENIZER
from utils.runs.log import last_record, read_metrics
from utils.runs.origin import PER_SESSION, PINNED_KEYS, PRETRAINED_PREFIX
from utils.runs.run import REPRODUCTION, RunError, change_record, read_record
from utils.runs.seal import write_seal
from utils.runs.trust import made_elsewhere, made_here, require_trust
from utils.terminal.words import printable

WEIGHTS = EXPORT / WEIGHTS_FILE
UNTRACKED = {"aim_logging": False, "wandb_mode": "disabled"}  # only the log of a repetition is needed


@dataclass(frozen=True)
class Reproduction:
    """The result of training a run again.

    first: the step of the checkpoint that the repetition began with, or 0.
    expected: number of updates in the old log that were to be trained again.
    weights: whether the exported weights are the same; None without two exports of the same step.
    environment: facts that differ, such as "torch 2.13.0 -> 2.14.0".
    unknown: what the record of the run does not say, in words.
    """

    run: str
    repetition: str
    status: str
    exit_status: int
    first: int
    expected: int
    logs: LogComparison
    weights: bool | None
    environment: list[str]
    unknown: list[str]

    @property
    def identical(self) -> bool:
        return self.logs.identical and self.logs.steps == self.expected and self.weights is not False

    @property
    def verdict(self) -> str:
        if self.identical:
            weights = ", and the same weights" if self.weights else ""
            return f"identical for {self.logs.steps:,} steps{weights}"
        if self.logs.problem is not None:
            what = self.logs.problem
        elif self.logs.difference is not None:
            what = str(self.logs.difference)
        elif self.logs.steps == self.expected > 0:
            what = f"the logs of {self.expected:,} steps are identical, but the exported weights differ"
        else:
            what = (
                f"identical for {self.logs.steps:,} of {self.expected:,} steps; the repetition ended as {self.status}"
            )
        differs = f"environment differs in: {', '.join(self.environment)}" if self.environment else ""
        return f"{what}; {differs or 'the environment is the same'}"


def reproduce(
    run: IndexedRun,
    root: Path,
    *,
    steps: int | None = None,
    from_checkpoint: bool = False,
    code: Code = "recorded",
    trusted: bool = False,
    progress: IO[str] | None = None,
) -> Reproduction:
    """Train a run again in a new run directory beside it, which names it as its parent, and compare their logs.

    Args:
        root: the project folder, whose git repository has the commit of the run.
        steps: number of steps to train; None: all.
        from_checkpoint: begin with a checkpoint of the run instead of step 0: the newest with enough steps after it.
        code: "recorded": the commit with its patch, in a temporary folder; "current": the project folder as it is.
        trusted: allow the code of a run that was made elsewhere to run.
        progress: where the progress of training is printed; stdout by default.

    Raises:
        UserError: the run was made elsewhere, and its code is not trusted.
        ReproductionError: the run has no log or no checkpoint to begin with, or its code is not available.
    """
    progress = progress or sys.stdout
    if not run.settings or not run.record.get("resolved"):
        why = run.problem or "it ended before its first step"
        raise ReproductionError(f"{run.id}: {why}: there is nothing to reproduce")
    ranks = run.record["resolved"].get("world_size", 1)
    if ranks > 1 and run.settings.get("lanes") is None:
        raise ReproductionError(
            f"{run.id}: was trained on {ranks} ranks without lanes, so its sums depend on the number of ranks; "
            f"torchrun --standalone --nproc-per-node {ranks} train.py with its settings (experiments.py show {run.id}) "
            "repeats it, on the same kind of machine"
        )
    require_trust(run.path, root, code_of_its_own(run, root, code), trusted)
    parent = _parent(run)
    first, end, expected = _part(run, parent, steps, from_checkpoint)
    with tempfile.TemporaryDirectory(prefix="reproduce-") as folder:
        unknown: list[str] = []
        project = root
        if code == "recorded":
            project, unknown = recorded_code(run, root, Path(folder))
        which = "the current code" if project == root else "the recorded code"
        print(printable(f"training {run.id} again from step {first:,}, with {which}"), file=progress, flush=True)
        if steps is not None and project != root and "stop_at_step" not in run.settings:
            raise ReproductionError(f"the code of {run.id} cannot stop at a step: leave --steps out, or --code current")
        flags = [*_start_flags(run, first, parent, from_checkpoint), *settings_flags(run, root, end)]
        if "log_interval" in run.settings:  # log every step: a resume may have changed the interval
            flags.append(f"{flag_name('log_interval')}=1")
        path, exit_status = run_training(project, flags, run.path.parent, progress, Path(folder))
    if path is None:
        raise ReproductionError(f"the repetition made no run directory (exit status {exit_status}): see above")
    _adopt(run, path, root, keep_code=project == root)
    repetition = read_run(path)
    sessions = run.record.get("resumes") or []
    logs = compare_logs(run.path, path, first, 1 + int(sessions[-1].get("step") or 0) if sessions else 0)
    both = all((one / WEIGHTS).is_file() for one in (run.path, path)) and end is None and not from_checkpoint
    weights = _have_same_tensors(run.path / WEIGHTS, path / WEIGHTS) if both else None
    environment = environment_differences(run, repetition)
    status = repetition.status
    return Reproduction(run.id, path.name, status, exit_status, first, expected, logs, weights, environment, unknown)


def _have_same_tensors(first: Path, second: Path) -> bool:
    """Whether two weight files hold the same tensors; False if one is damaged."""
    try:
        return tensors_sha256(first) == tensors_sha256(second)
    except CheckpointError:
        return False


def _part(
    run: IndexedRun, parent: Mapping[str, Any] | None, steps: int | None, from_checkpoint: bool
) -> tuple[int, int | None, int]:
    """Choose the updates to train again.

    Returns:
        The first step, the step to stop at (None: the end of the schedule), and how many of these updates are logged.

    Raises:
        ReproductionError: the log is empty or damaged, or there is no checkpoint to begin with.
    """
    try:
        last = last_record(run.path / METRICS_LOG)
        losses = read_metrics(run.path / LOGS, "train/loss")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ReproductionError(f"{run.id}: its log is damaged: {error}") from None
    if last is None:
        raise ReproductionError(f"{run.id} has logged nothing")
    if from_checkpoint:
        first = _checkpoint_step(run, steps, losses[-1][0] + 1 if losses else 0)
    else:
        first = parent["step"] if parent is not None and parent["relation"] == "fork" else 0
    end = None
    if steps is not None:
        end = min(last["step"], first + steps)
    elif run.status != "completed" and losses:
        end = losses[-1][0] + 1  # the run did not get further
    return first, end, sum(first <= step and (end is None or step < end) for step, _ in losses)


def _checkpoint_step(run: IndexedRun, steps: int | None, last_step: int) -> int:
    """The step of the newest checkpoint with `steps` logged steps after it; if there is none, of the oldest checkpoint.

    Raises:
        ReproductionError: there is no checkpoint before the end of the log.
    """
    found = [step for step, _ in list_checkpoints(run.path / CHECKPOINTS) if step < last_step]
    if not found:
        raise ReproductionError(f"{run.id} has no checkpoint before step {last_step:,}, where its log ends")
    return next((step for step in found if step + (steps or 0) <= last_step), found[-1])


def _parent(run: IndexedRun) -> Mapping[str, Any] | None:
    """The run whose weights this one began with, as run.json names it; None if it began from scratch.

    Raises:
        ReproductionError: that run was deleted.
    """
    parent = run.record.get("parent")
    if parent is None or parent["relation"] == REPRODUCTION:
        return None
    try:
        return {**parent, "path": os.path.abspath(parent_path(run.path, parent))}
    except RunError as error:
        raise ReproductionError(str(error)) from None


def first_weights_flags(run: IndexedRun) -> list[str]:
    """Flags with which a new run begins with the configuration and the first weights of `run`.

    Raises:
        ReproductionError: the run whose weights `run` began with was deleted.
    """
    parent = _parent(run)
    first, *_ = _part(run, parent, None, False)
    return list(_start_flags(run, first, parent, False))


def _start_flags(run: IndexedRun, first: int, parent: Mapping[str, Any] | None, from_checkpoint: bool) -> Iterator[str]:
    """Flags for the start of a repetition: a checkpoint of the run, the weights of its parent, or neither."""
    if from_checkpoint:
        yield from ("--resume", f"{os.path.abspath(run.path)}:{first}", "--fork")
        return
    if parent is not None:
        weights = parent["path"] if "export" in parent else f"{parent['path']}:{parent['step']}"
        if "pretrained" in parent:
            weights = f"{PRETRAINED_PREFIX}{parent['path']}"
        yield from ("--resume", weights, "--fork") if parent["relation"] == "fork" else ("--init-from", weights)
    yield from ("--config", os.path.join(os.path.abspath(run.path), CONFIG))


def settings_flags(run: IndexedRun, root: Path, end: int | None = None) -> Iterator[str]:
    """Flags for settings of a repetition: the values that "auto" resolved to, the same folders, and no trackers."""
    tag = run.record.get("tag")
    overrides: dict[str, Any] = {
        **{key: resolved_setting(run, key) for key in PINNED_KEYS},
        **UNTRACKED,
        **dict.fromkeys(PER_SESSION),
        "runs_dir": real_path(run.path.parent),
        "dataset": moved_path(run.settings.get("dataset", ""), root),
        **{key: root / _folder(key, run, root) for key in ("corpora_dir", "datasets_dir")},
        "callbacks": run.settings.get("callbacks") or (),  # as flags they need no --trust
        "run_tag": f"{tag[:55]}-repeated" if tag else "repeated",
        "stop_at_step": end,
    }
    if str(run.settings.get("tokenizer")).startswith("hf:"):  # the run has a copy of that file
        overrides["tokenizer"] = f"hf:{os.path.abspath(run.path / TOKENIZER)}"
    if not overrides["callbacks"]:
        del overrides["callbacks"]
    # Older code may not have all settings.
    yield from flags_of({key: value for key, value in overrides.items() if key in run.settings})


def flags_of(settings: Mapping[str, Any]) -> Iterator[str]:
    """Write settings as flags of a command line, each in one word: a value may begin with a dash."""
    for key, value in settings.items():
        if isinstance(value, bool):
            yield flag_name(key, value)
        else:
            text = ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
            yield f"{flag_name(key)}={'none' if value is None else text}"


def _folder(key: str, run: IndexedRun, root: Path) -> str:
    """The folder where a repetition finds or writes its corpus; as configured here if the run was made elsewhere."""
    if made_elsewhere(run.path, root):
        return str(getattr(ConfigLoader(root).load().config.data, key))
    return moved_path(run.settings.get(key, ""), root)


def _adopt(run: IndexedRun, path: Path, root: Path, keep_code: bool) -> None:
    """Record in the repetition its parent and the code that it was trained with, and renew its seal."""
    facts: dict[str, Any] = {"made": made_here(root)}
    if read_record(path).get("parent") is None:
        facts["parent"] = {"run": run.id, "path": os.fspath(run.path), "step": 0, "relation": REPRODUCTION}
    if not keep_code:
        facts["git"] = run.record.get("git")
        for name in (GIT, PATCH):
            if is_regular(run.path / name, run.path):
                write_atomic(path / name, read_bytes(run.path / name, run.path))
    change_record(path, **facts)
    write_seal(path)


def environment_differences(run: IndexedRun, other: IndexedRun) -> list[str]:
    """The facts of the environment that differ; those that can change the numbers come first."""
    old, new = (environment_of(one) for one in (run, other))
    resolved: list[Mapping[str, Any]] = [one.record.get("resolved") or {} for one in (run, other)]
    for key in ("corpus_hash", "processor", *PINNED_KEYS):
        old[key], new[key] = (str(of_run.get(key)) for of_run in resolved)
    names = dict.fromkeys(("corpus_hash", "torch", "numpy", "python", *old, *new))
    repeated = ("torch threads",)  # in env.txt; it is the setting `threads`
    differing = (name for name in names if old.get(name) != new.get(name) and name not in repeated)
    return [f"{name} {old.get(name, 'absent')} -> {new.get(name, 'absent')}" for name in differing]
