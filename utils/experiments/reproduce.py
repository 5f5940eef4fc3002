"""Training a run again, from its recorded code, configuration and corpus, and comparing the two bit by bit.

The repetition is a process of its own, so that it can run the recorded code.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from utils.checkpoints.folder import WEIGHTS_FILE, list_checkpoints
from utils.config.loader import ConfigLoader, flag_name
from utils.errors import UserError
from utils.experiments.bits import LogComparison, compare_logs
from utils.experiments.diff import COMMIT, environment_of
from utils.files import read_bytes, real_path
from utils.machine.watchdog import watched
from utils.runs.code import LEFT_OUT, git_environment, listed_files, open_repo
from utils.runs.find import moved_path, parent_path
from utils.runs.index import IndexedRun, later_code, read_run, resolved_setting
from utils.runs.layout import CHECKPOINTS, CONFIG, EXPORT, GIT, LOGS, METRICS_LOG, PATCH, RECORD, TOKENIZER
from utils.runs.log import last_record, read_metrics
from utils.runs.origin import PER_SESSION, PINNED, PRETRAINED_PREFIX
from utils.runs.run import REPRODUCTION, RunError, change_record, read_record
from utils.runs.seal import file_sha256, write_seal
from utils.runs.trust import callback_words, made_elsewhere, made_here, require_trust
from utils.terminal.cli import INSTALLED, script_file
from utils.terminal.words import printable

WEIGHTS = EXPORT / WEIGHTS_FILE
FORWARDED = ("step ", "estimated", "warning", "failed", "error")  # beginnings of the lines of training that are shown
UNTRACKED = {"aim_logging": False, "wandb_mode": "disabled"}  # a repetition is compared by its log
Code = Literal["recorded", "current"]


class ReproductionError(UserError):
    """The code, configuration or first weights of a run are no longer available."""


@dataclass(frozen=True)
class Reproduction:
    """The result of training a run again.

    first: the step of the checkpoint that it began with, or 0.
    expected: number of updates that the old log has in the part that was trained again.
    weights: whether the exported weights are the same; None where there are no two exports of the same step.
    environment: what differs, as "torch 2.13.0 -> 2.14.0".
    unknown: what the record of the run does not say.
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
    """Train a run again into a new run directory beside it, whose parent it becomes, and compare their logs.

    Args:
        root: the project folder, whose git repository has the commit of the run.
        steps: number of steps to train; None: all.
        from_checkpoint: begin with a checkpoint of the run instead of step 0: the newest with enough steps after it.
        code: "recorded": the commit with its patch, in a temporary folder; "current": the project folder as it is.
        trusted: let the code of a run that was made elsewhere run.
        progress: where the progress of training is printed; stdout by default.

    Raises:
        UserError: the run was made elsewhere, and its code may not run.
        ReproductionError: the run has no log or no checkpoint to begin with, or its code is not available.
    """
    progress = progress or sys.stdout
    if not run.settings or not run.record.get("resolved"):
        why = run.problem or "it ended before its first step"
        raise ReproductionError(f"{run.id}: {why}: there is nothing to reproduce")
    ranks = run.record["resolved"].get("world_size", 1)
    if ranks > 1 and run.settings.get("lanes") is None:
        raise ReproductionError(
            f"{run.id}: was trained on {ranks} ranks without lanes, whose sums depend on how many there are; "
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
        flags = [*_origin(run, first, parent, from_checkpoint), *settings_of_again(run, root, end)]
        path, exit_status = train_again(project, flags, run.path.parent, progress, Path(folder))
    if path is None:
        raise ReproductionError(f"the repetition made no run directory (exit status {exit_status}): see above")
    _adopt(run, path, root, keep_code=project == root)
    repetition = read_run(path)
    logs = compare_logs(run.path, path, first)
    both = all((one / WEIGHTS).is_file() for one in (run.path, path)) and end is None and not from_checkpoint
    weights = file_sha256(run.path / WEIGHTS) == file_sha256(path / WEIGHTS) if both else None
    environment = environment_differences(run, repetition)
    status = repetition.status
    return Reproduction(run.id, path.name, status, exit_status, first, expected, logs, weights, environment, unknown)


def code_of_its_own(run: IndexedRun, root: Path, code: Code) -> list[str]:
    """What a repetition runs that this project does not have already, in words."""
    known = ConfigLoader(root).load().config.train.callbacks
    words = callback_words(name for name in run.settings.get("callbacks") or () if name not in known)
    if code == "recorded" and os.path.lexists(run.path / PATCH):
        with contextlib.suppress(OSError):  # reported when it is applied
            if read_bytes(run.path / PATCH, run.path):
                words.append(f"{PATCH}, which changes {', '.join(_changed_by(run.path / PATCH)) or 'no file'}")
    return words


def _changed_by(patch: Path) -> list[str]:
    """The files that `apply_patch` would change, as git reads the patch: parts of it may lack the line `diff --git`."""
    command = ["git", "apply", "--numstat", "-z", os.fspath(real_path(patch))]
    with tempfile.TemporaryDirectory() as folder:  # in a repository, git would leave out what is not below the folder
        listing = subprocess.run(command, cwd=folder, env=_outside(folder), capture_output=True).stdout
    return [os.fsdecode(entry.split(b"\t", 2)[-1]) for entry in listing.split(b"\0") if entry]


def _outside(folder: str | Path) -> dict[str, str]:
    """The environment for a git process that works in `folder`, whatever repository that is in."""
    return {**git_environment(), "GIT_CEILING_DIRECTORIES": os.fspath(real_path(Path(folder)).parent)}


def _part(
    run: IndexedRun, parent: Mapping[str, Any] | None, steps: int | None, from_checkpoint: bool
) -> tuple[int, int | None, int]:
    """Choose the updates that are trained again.

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
        first = _checkpoint_step(run, steps, last["step"])
    else:
        first = parent["step"] if parent is not None and parent["relation"] == "fork" else 0
    end = None
    if steps is not None:
        end = min(last["step"], first + steps)
    elif run.status != "completed" and losses:
        end = losses[-1][0] + 1  # the run did not get further
    return first, end, sum(first <= step and (end is None or step < end) for step, _ in losses)


def _checkpoint_step(run: IndexedRun, steps: int | None, last_step: int) -> int:
    """The step of the newest checkpoint with `steps` logged steps after it, or else of the oldest checkpoint.

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


def first_weights(run: IndexedRun) -> list[str]:
    """Flags that begin a run with the configuration and the first weights of this one.

    Raises:
        ReproductionError: the run whose weights it began with was deleted.
    """
    parent = _parent(run)
    first, *_ = _part(run, parent, None, False)
    return list(_origin(run, first, parent, False))


def _origin(run: IndexedRun, first: int, parent: Mapping[str, Any] | None, from_checkpoint: bool) -> Iterator[str]:
    """Flags for the start of the repetition: a checkpoint of the run, one of its parent, or the configuration alone."""
    if from_checkpoint:
        yield from ("--resume", f"{os.path.abspath(run.path)}:{first}", "--fork")
        return
    if parent is not None:
        weights = parent["path"] if "export" in parent else f"{parent['path']}:{parent['step']}"
        if "pretrained" in parent:
            weights = f"{PRETRAINED_PREFIX}{parent['path']}"
        yield from ("--resume", weights, "--fork") if parent["relation"] == "fork" else ("--init-from", weights)
    yield from ("--config", os.path.join(os.path.abspath(run.path), CONFIG))


def settings_of_again(run: IndexedRun, root: Path, end: int | None = None) -> Iterator[str]:
    """Flags for settings of the repetition: the values that "auto" resolved to, the same folders, and no trackers."""
    tag = run.record.get("tag")
    overrides: dict[str, Any] = {
        **{key: resolved_setting(run, key) for key in PINNED},
        **UNTRACKED,
        **dict.fromkeys(PER_SESSION),
        "runs_dir": real_path(run.path.parent),
        "dataset": moved_path(run.settings.get("dataset", ""), root),
        **{key: root / _folder(key, run, root) for key in ("corpora_dir", "datasets_dir")},
        "callbacks": ",".join(run.settings.get("callbacks") or ()),  # named here, so that no --trust is needed again
        "run_tag": f"{tag[:55]}-repeated" if tag else "repeated",
        "stop_at_step": end,
    }
    if str(run.settings.get("tokenizer")).startswith("hf:"):  # the run has a copy of that file
        overrides["tokenizer"] = f"hf:{os.path.abspath(run.path / TOKENIZER)}"
    for key, value in overrides.items():
        if key not in run.settings or (key == "callbacks" and not value):  # older code may not have this setting
            continue
        if isinstance(value, bool):
            yield flag_name(key, value)
        else:
            yield from (flag_name(key), "none" if value is None else str(value))


def _folder(key: str, run: IndexedRun, root: Path) -> str:
    """Where the repetition writes or finds its corpus; a run that was made elsewhere does not say where to write."""
    if made_elsewhere(run.path, root):
        return str(getattr(ConfigLoader(root).load().config.data, key))
    return moved_path(run.settings.get(key, ""), root)


def train_again(
    project: Path, flags: Sequence[str], runs_dir: Path, output: IO[str], temporary: Path
) -> tuple[Path | None, int]:
    """Run train.py of the project folder `project` in a process of its own.

    Args:
        output: where the lines FORWARDED of its output go; `temporary`: removed if this process is killed.

    Returns:
        The run directory that it made in `runs_dir`, None if it made none, and its exit status.
    """
    existing = {path.name for path in runs_dir.iterdir()} if runs_dir.is_dir() else set()
    command = [sys.executable, str(script_file(project, "train.py")), *flags]
    exit_status, pid = _train(command, project, output, temporary)
    return _new_run(runs_dir, existing, pid), exit_status


def _train(command: Sequence[str], folder: Path, output: IO[str], temporary: Path) -> tuple[int, int]:
    """Run a training process and pass our signals on to it; if we are killed, it stops and `temporary` is removed.

    Losing our own output does not stop it.

    Returns:
        Its exit status and process id.
    """
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True, errors="replace")
    assert process.stdout is not None
    passed_on = [s for s in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(s) != signal.SIG_IGN]
    previous = {signum: signal.getsignal(signum) for signum in passed_on}
    with contextlib.suppress(ValueError):  # not in the main thread
        for signum in passed_on:
            signal.signal(signum, lambda signum, _: process.send_signal(signum))
    try:
        with watched(process.pid, temporary):
            while True:
                with contextlib.suppress(KeyboardInterrupt):  # Ctrl-C reaches the child too, which then stops in order
                    for line in process.stdout:
                        if line.startswith(FORWARDED):  # not the hint how to resume: the code is deleted at the end
                            with contextlib.suppress(OSError):  # lost, like the output of training itself
                                print(printable(line), end="", file=output, flush=True)
                    return process.wait(), process.pid
    finally:
        with contextlib.suppress(ValueError):
            for signum, handler in previous.items():
                signal.signal(signum, handler)


def _new_run(runs_dir: Path, existing: set[str], pid: int) -> Path | None:
    """The run directory that the process `pid` has made since there were only the `existing` ones."""
    for path in runs_dir.iterdir() if runs_dir.is_dir() else ():
        if path.name not in existing and (path / RECORD).is_file() and read_record(path).get("pid") == pid:
            return path
    return None


def _adopt(run: IndexedRun, path: Path, root: Path, keep_code: bool) -> None:
    """Make the repetition name its parent and the code that it was trained with, and renew its seal."""
    facts: dict[str, Any] = {"made": made_here(root)}
    if read_record(path).get("parent") is None:
        facts["parent"] = {"run": run.id, "path": os.fspath(run.path), "step": 0, "relation": REPRODUCTION}
    if not keep_code:
        facts["git"] = run.record.get("git")
        for name in (GIT, PATCH):
            if (run.path / name).is_file():
                shutil.copyfile(run.path / name, path / name)
    change_record(path, **facts)
    write_seal(path)


def environment_differences(run: IndexedRun, other: IndexedRun) -> list[str]:
    """Facts of the environment that differ, those that can change the numbers first."""
    old, new = (environment_of(one) for one in (run, other))
    resolved: list[Mapping[str, Any]] = [one.record.get("resolved") or {} for one in (run, other)]
    for key in ("corpus_hash", "processor", *PINNED):
        old[key], new[key] = (str(of_run.get(key)) for of_run in resolved)
    names = [name for name in dict.fromkeys(("corpus_hash", "torch", "numpy", "python", *old, *new))]
    repeated = ("torch threads",)  # in env.txt; it is the setting `threads`
    differing = (name for name in names if old.get(name) != new.get(name) and name not in repeated)
    return [f"{name} {old.get(name, 'absent')} -> {new.get(name, 'absent')}" for name in differing]


# -------------------------------------------------------------------------------------------------- code


def recorded_code(run: IndexedRun, root: Path, folder: Path) -> tuple[Path, list[str]]:
    """Put the code of a run into `folder`: its commit from the repository of `root`, with its patch applied.

    Returns:
        The project folder there (`root` itself for a run without git), and what is not known about the code.

    Raises:
        ReproductionError: the repository does not have the commit, or the patch does not apply.
    """
    facts = run.record.get("git") or {}
    if facts.get("commit") is None:
        return root, ["the code of the run: it was started without git, so the current code was used"]
    if not COMMIT.fullmatch(str(facts["commit"])):  # git would read "--output=..." as an option
        raise ReproductionError(f"{run.id}: {facts['commit']!r} is not a commit")
    tree = folder / "code"
    try:
        place = unpack_commit(facts["commit"], root, tree, f" of {run.id}")
    except ReproductionError as error:
        raise ReproductionError(f"{error}; --code current trains with the current code") from None
    if (run.path / PATCH).is_file():
        apply_patch(run.path / PATCH, tree)
    left_out = listed_files(run.path, LEFT_OUT)
    unknown = [f"the content of files that were left out of the patch: {', '.join(left_out)}"] if left_out else []
    unknown += [
        f"the code from step {step:,} on: it was changed between two sessions, and the first is repeated"
        for step, *_ in later_code(run.path, run.record)
    ]
    return place, unknown


def unpack_commit(commit: str, root: Path, tree: Path, of: str = "") -> Path:
    """Put the files of a commit into the new folder `tree`.

    Args:
        root: the project folder, whose git repository has the commit.
        of: what the commit is of, for messages.

    Returns:
        The project folder in `tree`.

    Raises:
        ReproductionError: the repository does not have the commit, or it cannot be unpacked.
    """
    import git

    if INSTALLED:
        raise ReproductionError(
            f"commit {commit[:12]}{of}: this workbench is installed as a package, without a repository; work in a "
            "checkout for the code of a commit"
        )
    archive = tree.with_name(f"{tree.name}.tar")
    try:
        with open_repo(root) as repo, archive.open("wb") as file:
            repo.archive(file, commit, format="tar")
            top = Path(str(repo.working_tree_dir))
    except (git.GitError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise ReproductionError(
            f"commit {commit[:12]}{of} is not available in the repository of {root} ({reason})"
        ) from None
    tree.mkdir()
    try:
        with tarfile.open(archive) as tar:
            tar.extractall(tree, filter="data")
    except tarfile.TarError as error:
        raise ReproductionError(f"commit {commit[:12]}{of} cannot be unpacked: {error}") from None
    archive.unlink()
    return tree / real_path(root).relative_to(real_path(top))


def apply_patch(patch: Path, tree: Path) -> None:
    """Apply a patch to the files in `tree`; git refuses paths outside it.

    Raises:
        ReproductionError: it does not apply, or would write outside `tree`.
    """
    command = ["git", "apply", "--whitespace=nowarn", os.fspath(real_path(patch))]
    result = subprocess.run(command, cwd=tree, env=_outside(tree), capture_output=True, text=True, errors="replace")
    if result.returncode:
        reason = (result.stderr.strip().splitlines() or ["git apply failed"])[0]
        raise ReproductionError(f"{patch}: the patch cannot be applied: {reason.removeprefix('error: ')}")
