"""`--engine ray`: the trials of a sweep on the machines of a Ray cluster, by Ray Tune.

Each trial of Ray Tune is one piece of work of the sweep. The worker that gets it opens the folder of the sweep, which
all machines share, claims work as any driver does, and reports the result. If a worker or its machine is lost, Tune
starts the piece again, and the trial continues from its checkpoint.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from utils.errors import UserError, first_line
from utils.machine.signals import StopRequest, stop_on_signals
from utils.machine.watchdog import watched
from utils.sweeps import trial as trials
from utils.sweeps.driver import WAIT_SECONDS, Ending, Report, disk_full_message, too_many_failures_message
from utils.sweeps.folder import Sweep, read_sweep
from utils.sweeps.study import NoWork, Study
from utils.sweeps.trial import DiskFullError, Outcome, TrialRunner, record

INSTALL = "pip install 'ray[tune]'"
RETRIES = 20  # of a piece of work whose worker was lost
# A worker that ends must not kill its training process, which the watchdog stops with a checkpoint.
KEEP_CHILDREN = {"RAY_kill_child_processes_on_worker_exit": "0"}
FINISHED, PROBLEM, REASON = "finished", "problem", "reason"  # keys of what a piece of work reports


def run_on_ray(sweep: Sweep, total: int, jobs: int, max_failures: int, report: Report = lambda *_: None) -> Ending:
    """Work on a sweep with `jobs` trials at a time, on the cluster of RAY_ADDRESS, or without one on this machine.

    Args:
        report: called with each trial that has ended or reached a rung.

    Raises:
        UserError: Ray is not installed, or its cluster does not answer.
    """
    try:
        import ray
        from ray import tune
    except ImportError:
        raise UserError(f"--engine ray needs the package ray: {INSTALL}") from None
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "0")
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
    os.environ.update(KEEP_CHILDREN)
    plan, address = sweep.plan, os.environ.get("RAY_ADDRESS")
    cpus = plan.threads or plan.config.train.threads or 1
    local = {} if address else {"num_cpus": max(os.cpu_count() or 1, jobs * cpus), "include_dashboard": False}
    settings = {"env_vars": {"PYTHONPATH": os.fspath(sweep.root), **KEEP_CHILDREN}}
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR", runtime_env=settings, **local)
    except Exception as error:  # Ray raises a plain Exception if a node does not start in time
        raise UserError(f"Ray ({address or 'on this machine'}): {first_line(error)}") from None
    resources = {"cpu": cpus, **({"gpu": 1} if plan.config.train.device.startswith("cuda") else {})}
    work = {"folder": os.fspath(sweep.path), "root": os.fspath(sweep.root), "total": total, "script": trials.TRAIN}
    pieces = _pieces(work, max_failures, report)
    try:
        # The folder is for Tune's own records, which are not kept. Handlers are set last: Ray sets one for SIGTERM.
        with tempfile.TemporaryDirectory() as storage, stop_on_signals() as stop:
            tune.Tuner(
                tune.with_resources(carry_out_piece, resources),
                tune_config=tune.TuneConfig(search_alg=pieces, num_samples=-1, max_concurrent_trials=jobs),
                run_config=tune.RunConfig(
                    name=sweep.name,
                    storage_path=storage,
                    stop=_stopper(stop),
                    failure_config=tune.FailureConfig(max_failures=RETRIES),
                    verbose=0,
                ),
            ).fit()
    finally:
        ray.shutdown()
    ending: Ending = pieces.ending
    ending.signum = stop.signum or (None if pieces.over else signal.SIGUSR1)  # at which Tune itself stops
    return ending


def _stopper(stop: StopRequest) -> Any:
    """Make Tune stop all pieces of work once a signal has come; their training processes then save a checkpoint."""
    from ray.tune import Stopper

    class StopOnSignal(Stopper):
        def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
            return False

        def stop_all(self) -> bool:
            return bool(stop)

    return StopOnSignal()


def _pieces(work: dict[str, Any], max_failures: int, report: Report) -> Any:
    """A search algorithm for Tune that hands out pieces of work until one of them finds nothing left to do.

    The worker that carries out a piece chooses the trial and its values, under the lock of the sweep.
    """
    from ray.tune.search import Searcher

    class Pieces(Searcher):
        def __init__(self, report: Report) -> None:
            super().__init__(metric="value", mode="min")
            self.report = report  # no closure: Tune pickles the class with everything that it refers to
            self.ending, self.given, self.failures, self.over = Ending(), 0, 0, False

        def suggest(self, trial_id: str) -> Any:
            if self.over:
                return Searcher.FINISHED
            self.given += 1
            return {**work, "piece": self.given}

        def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
            found = result or {}
            problem = found.get(PROBLEM)
            if error:
                problem = f"a worker was lost {RETRIES} times"
            elif "trial" in found and problem is None:
                value = None if math.isnan(found["value"]) else found["value"]
                outcome = Outcome(value, found[REASON], found["pruned"])
                self.report(found["trial"], outcome)
                self.failures = self.failures + 1 if outcome.failed else 0
                if self.failures > max_failures:
                    problem = too_many_failures_message(self.failures, outcome)
            self.ending.problem = self.ending.problem or problem
            self.over = self.over or bool(problem or found.get(FINISHED))

        def __getstate__(self) -> dict[str, Any]:
            return {}  # Tune saves it in its own records, which are never restored

        def save(self, checkpoint_path: str) -> None:
            """Nothing to do: the journal of the sweep has everything."""

        def restore(self, checkpoint_path: str) -> None:
            """Nothing to do: a resumed sweep begins with new pieces."""

    return Pieces(report)


def carry_out_piece(config: dict[str, Any]) -> None:
    """Claim a piece of work, carry it out, record it, and report it to Tune; runs in a worker of Ray."""
    from ray import tune

    trials.TRAIN = config["script"]
    sweep = read_sweep(Path(config["folder"]), Path(config["root"]))
    study = Study(sweep)
    while isinstance(work := study.claim(config["total"]), NoWork):
        if work.finished:
            tune.report({FINISHED: True, "value": 0.0})
            return
        time.sleep(WAIT_SECONDS)
    found: dict[str, Any] = {"trial": work.number, "step": work.step, **work.values}
    try:
        outcome = TrialRunner(sweep, study, _stopped_with_this_process).carry_out(work)
        record(study, work, outcome)
        found["value"] = math.nan if outcome.value is None else outcome.value
        found |= {REASON: outcome.reason, "pruned": outcome.pruned}
    except DiskFullError as error:
        found |= {PROBLEM: disk_full_message(error), "value": math.nan}
    finally:
        work.release()
    tune.report(found)


@contextlib.contextmanager
def _stopped_with_this_process(pid: int) -> Iterator[None]:
    """Make the training process `pid` stop with a checkpoint if this process ends: Ray kills its workers by SIGKILL."""
    with tempfile.TemporaryDirectory() as folder, watched(pid, Path(folder)):
        yield
