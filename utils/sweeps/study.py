"""The journal of a sweep, from which several processes claim trials safely, even if some of them are killed.

The journal is Optuna's JournalStorage: one line for each change, appended under a lock. A trial gets its number and
all of its parameters in one line. The lock of a trial (trials/NUMBER/lock) is held by the process that carries it out
and by the training process that it has started, so it is free if and only if nobody works on the trial. Any process
that finds an unfinished trial with a free lock may continue it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from utils.errors import UserError
from utils.files import open_regular, regular_fd
from utils.locks import folder_lock
from utils.runs.lock import RunLock
from utils.runs.log import truncate
from utils.sweeps.folder import JOURNAL, TRIALS, Sweep
from utils.sweeps.population import forks
from utils.sweeps.pruning import STARTUP_TRIALS, Promotion, promotion
from utils.sweeps.sampling import distribution_of, grid, propose, quiet_optuna
from utils.sweeps.space import Value

if TYPE_CHECKING:
    from optuna.storages.journal._file import BaseJournalFileLock
    from optuna.trial import FrozenTrial

# Attributes of a trial:
RUNG = "rung"  # the index of the rung that it may train to
REASON = "reason"  # why it failed or ended early
RUNS = "runs"  # ids of its runs
MEMBER, PARENT = "member", "parent"  # of a fork: its member; the trial, run and step that it is a fork of


class _JournalLock:
    """The lock under which the journal is appended to, released when its process ends. Removes a torn last line."""

    def __init__(self, sweep: Sweep) -> None:
        self._sweep = sweep
        self._held = ExitStack()

    def acquire(self) -> bool:
        self._held.enter_context(folder_lock(self._sweep.path))
        with open_regular(self._sweep.path / JOURNAL) as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 1))
            torn = size > 0 and file.read() != b"\n"
        if torn:
            truncate(self._sweep.path / JOURNAL)
        return True

    def release(self) -> None:
        self._held.close()


@dataclass
class Work:
    """A claimed trial.

    step: the step to train to; None: the end.
    parent: RUN:STEP if the trial is a fork.
    """

    number: int
    values: Mapping[str, Value]
    step: int | None
    lock: RunLock
    parent: str | None = None

    def release(self) -> None:
        self.lock.release()


@dataclass(frozen=True)
class NoWork:
    """There is no work to claim, either for good (`finished`) or while other processes work on their trials."""

    finished: bool


class Study:
    """The trials of a sweep. Several threads may use it at once."""

    def __init__(self, sweep: Sweep) -> None:
        optuna = quiet_optuna()
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        self.sweep = sweep
        self._states = optuna.trial.TrialState
        journal = sweep.path / JOURNAL
        os.close(regular_fd(journal, sweep.path, os.O_RDWR | os.O_CREAT))
        try:
            storage = JournalStorage(
                JournalFileBackend(os.fspath(journal), lock_obj=cast("BaseJournalFileLock", _JournalLock(sweep)))
            )
            self.optuna = optuna.create_study(
                storage=storage,
                study_name=sweep.id,
                direction="maximize" if sweep.maximize else "minimize",
                load_if_exists=True,
            )
        except (ValueError, LookupError, TypeError) as error:
            raise UserError(f"{journal}: the journal is damaged: {error}") from None
        self._storage, self._id = storage, self.optuna._study_id
        plan = sweep.plan
        self._points = len(grid(plan.space, sweep.fixed)) if plan.sampler == "grid" else None

    # ------------------------------------------------------------------------------------------------- reading

    def trials(self) -> list[FrozenTrial]:
        """All trials, by number."""
        return self.optuna.get_trials(deepcopy=False)

    def is_unfinished(self, trial: FrozenTrial) -> bool:
        """Whether a trial is unfinished: waiting, running or paused."""
        return trial.state == self._states.RUNNING

    def is_complete(self, trial: FrozenTrial) -> bool:
        return trial.state == self._states.COMPLETE

    def is_failed(self, trial: FrozenTrial) -> bool:
        return trial.state == self._states.FAIL

    def is_paused(self, trial: FrozenTrial) -> bool:
        """Whether a trial waits at a rung for its promotion."""
        return self.is_unfinished(trial) and self._target(trial) in trial.intermediate_values

    def best(self) -> list[FrozenTrial]:
        """The trials with a value, best first."""
        found = [trial for trial in self.trials() if self.is_complete(trial)]
        sign = -1 if self.sweep.maximize else 1
        return sorted(found, key=lambda trial: (sign * (trial.value or 0.0), trial.number))

    def limit(self, total: int) -> int:
        """The number of trials if `total` are wanted: a grid has no more trials than points."""
        return total if self._points is None else min(total, self._points)

    def _target(self, trial: FrozenTrial) -> int | None:
        """The step that a trial may train to; None: the end."""
        rungs = self.sweep.plan.pruner.rungs
        if not self.sweep.plan.pruner.pauses:
            return None
        rung = rung_of(trial)
        return rungs[rung] if rung < len(rungs) - 1 else None

    # -------------------------------------------------------------------------------------------------- claims

    def claim(self, total: int) -> Work | NoWork:
        """Claim the next piece of work: first unfinished trials that nobody works on, then promotions, then new trials.

        Args:
            total: the wanted number of trials.

        Raises:
            OSError: the journal cannot be written.
        """
        with folder_lock(self.sweep.path / TRIALS):
            trials, total = self.trials(), self.limit(total)
            if self.sweep.plan.pruner.name == "pbt" and len(trials) >= total:
                trials = self._next_generation(trials)
            unfinished = [trial for trial in trials if self.is_unfinished(trial) and not self.is_paused(trial)]
            held_back = {self._parent_held_back(trial) for trial in unfinished}
            for trial in unfinished:
                if trial.number not in held_back and (lock := self._try_lock(trial.number)) is not None:
                    return self._work(trial, lock)
            if (found := self._promotion(trials)) is not None:
                return self._promote(found)
            if len(trials) < total:
                return self._create(trials)
            if unfinished:
                return NoWork(finished=False)
            if (found := self._promotion(trials, last_call=True)) is not None:
                return self._promote(found)
            for trial in filter(self.is_paused, trials):
                self.finish(trial.number, reason="not promoted", pruned=True)
            return NoWork(finished=True)

    def _try_lock(self, number: int) -> RunLock | None:
        """Take the lock of a trial; None if another process holds it."""
        folder = self.sweep.trial_folder(number)
        folder.mkdir(exist_ok=True)
        try:
            lock = RunLock(folder)
        except BlockingIOError:
            return None
        lock.sign()
        return lock

    def _work(self, trial: FrozenTrial, lock: RunLock) -> Work:
        parent = trial.user_attrs.get(PARENT)
        place = None if parent is None else f"{parent['run']}:{parent['step']}"
        return Work(trial.number, trial.params, self._target(trial), lock, place)

    def _next_generation(self, trials: list[FrozenTrial]) -> list[FrozenTrial]:
        """Once all members of a population have paused at a rung, let them train on, or replace them by forks.

        If this process is killed in between, another one completes the work: the forks depend only on the results at
        the rung, each fork is written in one line, and the members that train on are marked last.

        Returns:
            The trials after these changes.
        """
        plan, running = self.sweep.plan, [trial for trial in trials if self.is_unfinished(trial)]
        rung = min(map(rung_of, running), default=len(plan.pruner.rungs))
        waiting = {trial.number for trial in running if rung_of(trial) == rung}
        if rung >= len(plan.pruner.rungs) - 1 or not all(self.is_paused(trials[number]) for number in waiting):
            return trials
        step = plan.pruner.rungs[rung]
        there = [trial for trial in trials if self._first_rung(trial) <= rung <= rung_of(trial)]
        known = {trial.user_attrs[MEMBER] for trial in trials if self._first_rung(trial) == rung + 1}
        for fork in forks(
            plan.space,
            plan.sampler_seed,
            rung,
            {trial.number: trial.user_attrs.get(MEMBER, trial.number) for trial in there},
            {trial.number: trial.intermediate_values[step] for trial in there if step in trial.intermediate_values},
            {trial.number: trial.params for trial in there},
            self.sweep.maximize,
        ):
            if fork.member not in known:
                parent = {"trial": fork.parent, "run": trials[fork.parent].user_attrs[RUNS][0], "step": step}
                self._add(fork.values, {MEMBER: fork.member, PARENT: parent, RUNG: rung + 1})
            if fork.replaced in waiting:
                self.finish(fork.replaced, reason=f"replaced by a fork of trial {fork.parent}", pruned=True)
                waiting.remove(fork.replaced)
        for number in waiting:
            self._storage.set_trial_user_attr(trials[number]._trial_id, RUNG, rung + 1)
        return self.trials()

    def _first_rung(self, trial: FrozenTrial) -> int:
        """The index of the first rung that a trial trains to."""
        parent = trial.user_attrs.get(PARENT)
        return 0 if parent is None else self.sweep.plan.pruner.rungs.index(parent["step"]) + 1

    def _parent_held_back(self, trial: FrozenTrial) -> int | None:
        """The parent of a fork at its first rung: it must wait, since it might delete the checkpoint of the fork."""
        begins = PARENT in trial.user_attrs and self._first_rung(trial) == rung_of(trial)
        return int(trial.user_attrs[PARENT]["trial"]) if begins else None

    def _promotion(self, trials: Sequence[FrozenTrial], last_call: bool = False) -> Promotion | None:
        pruner = self.sweep.plan.pruner
        if pruner.name != "asha":
            return None
        below = pruner.rungs[:-1]
        at_rungs: list[dict[int, float]] = [
            {t.number: t.intermediate_values[step] for t in trials if step in t.intermediate_values} for step in below
        ]
        # A trial that ended by itself before the first rung was never compared with others.
        complete = [t for t in trials if self.is_complete(t) and rung_of(t) > 0]
        at_rungs.append({t.number: t.value for t in complete if t.value is not None})
        ended = {t.number for t in trials if not self.is_unfinished(t)}
        promoted = [ended | {t.number for t in trials if rung_of(t) > rung} for rung in range(len(below))]
        return promotion(at_rungs, promoted, pruner.eta, self.sweep.maximize, last_call=last_call)

    def _promote(self, found: Promotion) -> Work | NoWork:
        if (lock := self._try_lock(found.number)) is None:  # the process that has just reported it still holds it
            return NoWork(finished=False)
        trial = self.trials()[found.number]
        self._storage.set_trial_user_attr(trial._trial_id, RUNG, found.rung)
        return self._work(self.trials()[found.number], lock)

    def _create(self, trials: Sequence[FrozenTrial]) -> Work:
        plan = self.sweep.plan
        values = propose(
            plan.space, self.sweep.fixed, plan.sampler, plan.sampler_seed, self._history(trials), self.sweep.maximize
        )
        number = len(trials)
        lock = self._try_lock(number)
        assert lock is not None, "a new trial has no process"
        self._add(values)
        return self._work(self.trials()[number], lock)

    def _add(self, values: Mapping[str, Value], attributes: Mapping[str, object] | None = None) -> None:
        """Write a new trial into the journal, with its values and attributes in one line."""
        from optuna.trial import create_trial

        dimensions = {dimension.key: dimension for dimension in self.sweep.plan.space.dimensions}
        template = create_trial(
            state=self._states.RUNNING,
            params=dict(values),
            distributions={key: distribution_of(dimensions[key]) for key in values},
            user_attrs=dict(attributes or {}),
        )
        created = self._storage.create_new_trial(self._id, template)
        assert self.trials()[-1]._trial_id == created

    def _history(self, trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
        """The trials as a sampler should see them: a paused one looks pruned, so that its value counts."""
        from optuna.trial import create_trial

        return [
            create_trial(
                state=self._states.PRUNED,
                params=trial.params,
                distributions=trial.distributions,
                intermediate_values=trial.intermediate_values,
            )
            if self.is_paused(trial)
            else trial
            for trial in trials
        ]

    # ------------------------------------------------------------------------------------------------- results

    def report(self, number: int, step: int, value: float, runs: Sequence[str] = ()) -> None:
        """Record the ids of the runs of an unfinished trial, then its value at a step."""
        trial = self.trials()[number]
        if runs and trial.user_attrs.get(RUNS) != list(runs):
            self._storage.set_trial_user_attr(trial._trial_id, RUNS, list(runs))
        if trial.intermediate_values.get(step) != value:
            self._storage.set_trial_intermediate_value(trial._trial_id, step, value)

    def should_stop(self, number: int) -> bool:
        """Whether the median rule ends a trial after its last reported value."""
        import optuna

        pruner = optuna.pruners.MedianPruner(STARTUP_TRIALS, n_warmup_steps=self.sweep.plan.pruner.rungs[0])
        return bool(pruner.prune(self.optuna, self.trials()[number]))

    def finish(
        self,
        number: int,
        value: float | None = None,
        *,
        reason: str | None = None,
        pruned: bool = False,
        runs: Sequence[str] = (),
    ) -> None:
        """Record how a trial ended: complete with a value, or without one, ended early (`pruned`) or failed."""
        trial = self.trials()[number]
        if not self.is_unfinished(trial):  # recorded by another process, on a file system without locks
            return
        if runs:
            self._storage.set_trial_user_attr(trial._trial_id, RUNS, list(runs))
        if reason is not None:
            self._storage.set_trial_user_attr(trial._trial_id, REASON, reason)
        state = self._states.COMPLETE if value is not None else self._states.PRUNED if pruned else self._states.FAIL
        assert value is None or math.isfinite(value)
        self._storage.set_trial_state_values(trial._trial_id, state, None if value is None else [value])


def rung_of(trial: FrozenTrial) -> int:
    """The index of the rung that a trial may train to."""
    return int(trial.user_attrs.get(RUNG, 0))
