"""Carrying out a trial: train.py trains each of its runs in a process, and continues a run that was stopped."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from utils.config.loader import ConfigError, ConfigLoader, flag_name
from utils.errors import UserError, first_line
from utils.files import read_bytes
from utils.folders import remove
from utils.runs.layout import CONFIG, LOCK, METRICS_LOG, NOTES, RECORD
from utils.runs.lock import lock_is_free, wait_until_free
from utils.runs.log import last_record
from utils.runs.run import RunError, read_record, read_status, status_of
from utils.sweeps.folder import CONFIG as SWEEP_CONFIG
from utils.sweeps.folder import Sweep, steps_of
from utils.sweeps.results import Evaluations, value_of_run
from utils.sweeps.space import Value
from utils.sweeps.study import Study, Work
from utils.terminal.cli import script_file

LOOK_SECONDS = 1.0  # between reads of the log of a run
POLL_SECONDS = 0.05
MOST_KILLS = 20  # in a row without a step of progress, after which a trial fails
RELATION = "sweep"  # key of run.json: the sweep, trial and place that a run belongs to
OUTPUT = "output.txt"
TRAIN = "train.py"
NO_SPACE = (os.strerror(28), os.strerror(122))  # ENOSPC, EDQUOT


Guard = Callable[[int], AbstractContextManager[object]]


class DiskFullError(Exception):
    """The disk has no room for a run: the sweep ends, and can be resumed once there is room."""


@dataclass(frozen=True)
class Outcome:
    """How a piece of work ended.

    value: the value of the trial, at the step of the work or at its end.
    at_end: whether its runs have ended; `patience`, `max_minutes` or a callback may end them before the step.
    reason: why there is no value: the trial failed or, with `pruned`, ended early. Without value and reason, it was
        asked to stop.
    """

    value: float | None = None
    reason: str | None = None
    pruned: bool = False
    runs: tuple[str, ...] = ()
    at_end: bool = False

    @property
    def was_stopped(self) -> bool:
        return self.value is None and self.reason is None

    @property
    def failed(self) -> bool:
        return self.value is None and self.reason is not None and not self.pruned


def record(study: Study, work: Work, outcome: Outcome) -> None:
    """Write into the journal how a piece of work ended; nothing if it was asked to stop."""
    if outcome.value is not None and work.step is not None and not outcome.at_end:
        study.report(work.number, work.step, outcome.value, outcome.runs)
    elif not outcome.was_stopped:
        study.finish(work.number, outcome.value, reason=outcome.reason, pruned=outcome.pruned, runs=outcome.runs)


@dataclass
class Activity:
    """The progress of a trial, for the display."""

    began: float = field(default_factory=time.monotonic)
    step: int = 0
    loss: float | None = None


class TrialRunner:
    """Carries out the trials of a sweep. Several threads may do so at once.

    Args:
        guard: makes a context in which a training process, given by its id, is watched.

    activities: the progress of the trials that are being carried out, by number.
    """

    def __init__(self, sweep: Sweep, study: Study, guard: Guard = lambda pid: contextlib.nullcontext()) -> None:
        self.sweep, self.study, self._guard = sweep, study, guard
        self.stopping = threading.Event()
        self.activities: dict[int, Activity] = {}
        self._processes: set[subprocess.Popen[bytes]] = set()
        self._mutex = threading.Lock()
        self._loader = ConfigLoader(sweep.root)
        self._base = self._loader.load_only(sweep.path / SWEEP_CONFIG)

    def stop(self, signum: int) -> None:
        """Pass a signal on to the training processes; they save a checkpoint and end."""
        self.stopping.set()
        with self._mutex:
            for process in self._processes:
                with contextlib.suppress(ProcessLookupError):
                    process.send_signal(signum)

    def carry_out(self, work: Work) -> Outcome:
        """Train the runs of a trial to the step of the work.

        Raises:
            DiskFullError: a run could not be written.
        """
        activity = self.activities[work.number] = Activity()
        values, runs, at_end = [], [], True
        try:
            for place, seed in enumerate(self.sweep.seeds):
                run, reason, pruned = self._train(work, place, seed, activity)
                runs += [run.name] if run is not None else []
                if reason is not None:
                    return Outcome(reason=reason, pruned=pruned, runs=tuple(runs))
                if run is None or (self.stopping.is_set() and not self._is_done(run, work.step)):
                    return Outcome(runs=tuple(runs))
                step = work.step if self._has_reached(run, work.step) else None
                at_end = at_end and step is None
                value = self._value(run, step)
                if value is None or not math.isfinite(value):
                    goal = self.sweep.plan.space.goal
                    never = f"{goal.metric} {goal.seconds_to_loss:g} was never reached" if goal.seconds_to_loss else ""
                    missing = never or f"{goal} is not in its log" if value is None else f"{goal} is {value}"
                    return Outcome(reason=missing, pruned=bool(never) or value is not None, runs=tuple(runs))
                values.append(value)
        except UserError as error:  # for example, a damaged log
            return Outcome(reason=str(error), runs=tuple(runs))
        finally:
            self.activities.pop(work.number, None)
        return Outcome(statistics.fmean(values), runs=tuple(runs), at_end=at_end)

    def _value(self, run: Path, step: int | None) -> float | None:
        plan = self.sweep.plan
        return value_of_run(run, plan.space.goal, step, best_weights=step is None and plan.config.train.exports_best)

    def _has_reached(self, run: Path, step: int | None) -> bool:
        return step is not None and (read_record(run).get("last_step") or 0) >= step

    def _is_done(self, run: Path, step: int | None) -> bool:
        """Whether a run has completed, was ended by `max_minutes` or a callback, or has reached `step`."""
        record = read_record(run)
        if record["status"] == "interrupted":
            reason = record.get("exit_reason")
            by_itself = reason is not None and not reason.startswith(("SIG", "stop_at_step"))
            return by_itself or self._has_reached(run, step)
        return record["status"] == "completed"

    def _train(self, work: Work, place: int, seed: int, activity: Activity) -> tuple[Path | None, str | None, bool]:
        """Train one run to the step of the work, or to its end.

        Returns:
            The run; why it did not get there; and whether this is a result (the run diverged, or the median rule ended
            it) rather than a failure.
        """
        kills, progress, first = 0, -1, True
        output = self.sweep.trial_folder(work.number) / OUTPUT
        while True:
            run = self._find_run(work.number, place)
            if run is not None:
                if self._is_done(run, work.step):
                    return run, None, False
                record = read_record(run)
                reason = str(record.get("exit_reason"))
                if record["status"] == "diverged":
                    return run, f"diverged: {reason}", True
                full = any(words in reason for words in NO_SPACE)
                if record["status"] == "failed" and full and not first:
                    raise DiskFullError(f"{run}: {reason}")
                if record["status"] == "failed" and not full:
                    return run, reason, False
            if self.stopping.is_set():
                return run, None, False
            try:
                command = self._command(work, place, seed, run)
            except ConfigError as error:
                return run, first_line(error), False
            start = output.stat().st_size if output.exists() else 0
            status, pruned = self._run(command, work, place, activity, output)
            first = False
            if pruned:
                return self._find_run(work.number, place), "median: worse than half of the trials at that step", True
            if self.stopping.is_set():
                continue  # to look at what the run has reached
            if 0 < status < 128 and self._has_refused(run := self._find_run(work.number, place)):
                reason = last_error(output, start) or f"train.py ended with status {status}"
                if any(words in reason for words in NO_SPACE):
                    raise DiskFullError(reason)
                return run, reason, False
            if status < 0 or status >= 128:  # killed: continue from the checkpoint
                now = _last_step(self._find_run(work.number, place))
                kills = kills + 1 if now <= progress else 1
                progress = max(progress, now)
                if kills >= MOST_KILLS:
                    name = signal.Signals(-status if status < 0 else status - 128).name
                    return run, f"killed by {name} {kills} times without a step of progress", False

    def _has_refused(self, run: Path | None) -> bool:
        """Whether the last process ended with an error before it started or continued the run."""
        return run is None or read_status(run) in ("interrupted", "crashed")

    # --------------------------------------------------------------------------------------------------- runs

    def _find_run(self, number: int, place: int) -> Path | None:
        """Find the run of a trial by its run.json; remove what a process that was killed at its start has left."""
        for path in sorted(self.sweep.runs_dir.glob(f"*_{self.sweep.tag(number)}*")):
            try:
                record = read_record(path)
            except RunError:
                self._remove_remains(path, number)
                continue
            facts = record.get(RELATION) or {}
            if (facts.get("id"), facts.get("number"), facts.get("place")) != (self.sweep.id, number, place):
                continue
            if record["status"] == "running" and status_of(path, record) == "running":
                wait_until_free(path, 60.0)
            if not (path / CONFIG).is_file():  # killed before it could be resumed
                remove(path)
                continue
            return path
        return None

    def _remove_remains(self, path: Path, number: int) -> None:
        """Remove a run directory of this trial if its process was killed before it wrote run.json."""
        own = path.name.split("_", 2)[-1].rpartition("_")
        named = self.sweep.tag(number) in (path.name.split("_", 2)[-1], own[0])
        files = [place for place in path.rglob("*") if place.is_file()] if path.is_dir() and named else None
        if files is None or (path / RECORD).exists() or not lock_is_free(path):
            return
        if all(place.name in (LOCK.name, NOTES.name) or place.name.startswith(".") for place in files):
            remove(path)

    def _command(self, work: Work, place: int, seed: int, run: Path | None) -> list[str]:
        """The command line that starts a run, or continues `run`.

        Raises:
            ConfigError: the values of the trial do not fit each other.
        """
        train = [sys.executable, os.fspath(script_file(self.sweep.root, TRAIN))]
        step = f"--stop-at-step={'none' if work.step is None else work.step}"
        if run is not None:
            minutes = self.sweep.plan.config.train.max_minutes
            return [*train, f"--resume={run}", step, f"--max-minutes={'none' if minutes is None else minutes}"]
        settings: dict[str, Value] = dict(work.values)
        if len(self.sweep.seeds) > 1 or self.sweep.seeds[0] != self.sweep.plan.config.train.seed:
            settings["seed"] = seed
        if self.sweep.plan.threads is not None:
            settings.setdefault("threads", self.sweep.plan.threads)
        flags = [_flag(key, value) for key, value in settings.items()]
        self._loader.load_onto(self._base, (), {key: _text(value) for key, value in settings.items()})
        if rungs := self.sweep.plan.pruner.rungs[:-1]:
            evaluations = sorted({*self.sweep.plan.config.train.eval_at, *rungs})
            flags.append(f"--eval-at={','.join(map(str, evaluations))}")
        origin = [f"--resume={self.sweep.runs_dir / work.parent}", "--fork"] if work.parent is not None else []
        return [
            *train,
            *origin,
            f"--config={self.sweep.path / SWEEP_CONFIG}",
            *flags,
            f"--run-tag={self.sweep.tag(work.number)}",
            f"--trial={self.sweep.name}:{self.sweep.id}:{work.number}:{place}",
            step,
        ]

    # ---------------------------------------------------------------------------------------------- processes

    def _run(self, command: list[str], work: Work, place: int, activity: Activity, output: Path) -> tuple[int, bool]:
        """Run a training process to its end, and follow its log meanwhile.

        Returns:
            Its exit status, as subprocess gives it, and whether the median rule has ended it.
        """
        with output.open("ab") as file, self._mutex:
            if self.stopping.is_set():
                return 0, False
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                pass_fds=[work.lock.fd],  # the lock is held as long as this process or the training lives
                start_new_session=True,  # Ctrl-C reaches this process, which passes it on
            )
            self._processes.add(process)
        log = self._watch(work, place, activity, process.pid)
        pruned = False
        try:
            with self._guard(process.pid):
                next_look = time.monotonic() + LOOK_SECONDS
                while True:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        return process.wait(POLL_SECONDS), pruned
                    if time.monotonic() >= next_look:
                        next_look = time.monotonic() + LOOK_SECONDS
                        if next(log) and not pruned:
                            pruned = True
                            process.send_signal(signal.SIGTERM)
        finally:
            with self._mutex:
                self._processes.discard(process)

    def _watch(self, work: Work, place: int, activity: Activity, pid: int) -> Iterator[bool]:
        """Keep `activity` up to date; yield whether the median rule ends the trial, judged by its first run.

        Args:
            pid: the training process. Until run.json names it, the log may still be cut back.
        """
        judged = self.sweep.plan.pruner.name == "median" and place == 0
        end = steps_of(self.sweep.plan.config, self.sweep.plan.space)
        evaluations: Evaluations | None = None
        reported: dict[int, float] = {}
        while True:
            stop = False
            if evaluations is None:
                run = self._find_started(work.number, pid)
                if run is not None:
                    evaluations = Evaluations(run, self.sweep.plan.space.goal.metric)
            if evaluations is not None:
                for step, value in evaluations.new():
                    activity.loss = value
                    if judged and step > 0 and math.isfinite(value) and step not in reported:
                        reported[step] = value
                        self.study.report(work.number, step, value)
                        stop = stop or self.study.should_stop(work.number)
                stop = stop and evaluations.last_step != end  # a run at its last step may as well export its model
                activity.step = max(activity.step, evaluations.last_step)
            yield stop

    def _find_started(self, number: int, pid: int) -> Path | None:
        """The run of a trial whose run.json names the process `pid`; None if there is none yet."""
        for path in self.sweep.runs_dir.glob(f"*_{self.sweep.tag(number)}*"):
            with contextlib.suppress(RunError):
                if read_record(path).get("pid") == pid:
                    return path
        return None


def _flag(key: str, value: Value) -> str:
    return flag_name(key, value) if isinstance(value, bool) else f"{flag_name(key)}={_text(value)}"


def _text(value: Value) -> Any:
    """A value as the command line takes it; a switch stays a bool."""
    return value if isinstance(value, bool) else "none" if value is None else str(value)


def _last_step(run: Path | None) -> int:
    """The last step in the log of a run; -1 if there is none."""
    if run is None:
        return -1
    try:
        record = last_record(run / METRICS_LOG)
    except (UserError, OSError):
        return -1
    return int(record["step"]) if record else -1


def last_error(output: Path, start: int) -> str | None:
    """The last error message in the output of a process: the last `error: ` line, or else the last line.

    Args:
        start: the byte at which the output of the process begins.
    """
    try:
        lines = read_bytes(output)[start:].decode(errors="replace").strip().splitlines()
    except OSError:
        return None
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return next(reversed(errors or lines), None)
