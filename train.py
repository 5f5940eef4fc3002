"""One training experiment: configuration -> run directory -> training loop -> export.

    python train.py --run-tag baseline
    python train.py --config configs/presets/shakespeare_cpu.yaml --n-embd 256
    python train.py --resume baseline
    python train.py --help

Or from a notebook: `from train import train; result = train(Config(...), quiet=True)`.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.text import Text

from utils.config.loader import ConfigLoader, LoadedConfig, relative_name
from utils.config.settings import Config
from utils.errors import UserError
from utils.machine.process import gc_frozen, tune_process
from utils.machine.signals import Deadline, StopRequest, stop_on_signals
from utils.runs.code import GitFacts
from utils.runs.layout import CHECKPOINTS
from utils.runs.log import RunLog
from utils.runs.origin import (
    Origin,
    check_overrides,
    config_of_fork,
    find_origin,
    keep_batch,
    recorded_config,
    resumable_runs,
)
from utils.runs.run import Run, RunLockedError, Status, read_record, wait_until_free
from utils.terminal.cli import PROJECT_ROOT, ExperimentArguments, Parser, parse_experiment, script
from utils.terminal.console import Terminal, settings_table
from utils.terminal.progress import TrainingProgress
from utils.terminal.words import duration
from utils.training.result import TrainResult, print_result, rebuild_command

WAIT_SECONDS = 60.0  # for a run that has stopped to let go of its directory

if TYPE_CHECKING:  # torch takes a second to import: --help and mistakes must not wait for it
    from utils.tracking.feeder import Feeders
    from utils.training.setup import Setup
    from utils.training.start import Start
    from utils.training.state import TrainState


def add_origin_flags(parser: Parser) -> None:
    group = parser.add_argument_group("stop, resume, fork, fine-tune", "RUN: path, id, tag, part of an id, or latest")
    origin = group.add_mutually_exclusive_group()
    origin.add_argument(
        "--resume",
        metavar="RUN",
        help="go on with a run from its newest checkpoint; auto: with the newest interrupted or crashed run "
        "of this --run-tag, or start a new one",
    )
    origin.add_argument(
        "--init-from",
        metavar="RUN[:WHICH]",
        help="start a new run with the weights of a checkpoint: latest (default), best, or a step",
    )
    group.add_argument(
        "--fork",
        action="store_true",
        help="with --resume RUN[:WHICH]: a new run goes on from that checkpoint, with any other setting",
    )
    group.add_argument(
        "--strict", action="store_true", help="refuse to start where the preflight has something to tell"
    )
    group.add_argument(
        "--strict-resume", action="store_true", help="refuse a damaged newest checkpoint; do not use the one before it"
    )


@script
def main(argv: Sequence[str]) -> int:
    parser = Parser(prog="train.py", description=__doc__)
    add_origin_flags(parser)
    parsed = parse_experiment(argv, parser)
    own, command = parsed.own, ("train.py", *argv)
    if own.fork and own.resume in (None, "auto"):
        raise UserError("--fork needs --resume RUN: the run that the new one goes on from")
    if own.strict_resume and own.resume is None:
        raise UserError("--strict-resume needs --resume RUN")
    loaded = parsed.load()
    runs_dir = PROJECT_ROOT / loaded.config.tracking.runs_dir
    if own.resume == "auto":
        return resume_auto(parsed, loaded, runs_dir, command).exit_status
    if own.resume is not None and not own.fork:
        origin = find_origin("resume", own.resume, runs_dir, strict=own.strict_resume)
        return resume(origin, parsed, argv=command).exit_status
    fork_or_init: Origin | None = None
    if own.resume is not None:
        fork_or_init = find_origin("fork", own.resume, runs_dir, strict=own.strict_resume)
        loaded = config_of_fork(fork_or_init.run, parsed.loader, parsed.files, parsed.overrides)
    elif own.init_from is not None:
        fork_or_init = find_origin("init", own.init_from, runs_dir)
    return train(loaded, origin=fork_or_init, argv=command, strict=own.strict).exit_status


def resume(
    origin: Origin, given: ExperimentArguments | None = None, *, quiet: bool = False, argv: Sequence[str] = ()
) -> TrainResult:
    """Go on with a run, with its own configuration and what may be overridden of it.

    Raises:
        UserError: it is being trained, complete, has no good checkpoint, or an override is refused.
    """
    from utils.training.setup import absolute_dataset

    given = given or ExperimentArguments(ConfigLoader(PROJECT_ROOT))
    recorded = recorded_config(origin.run, given.loader)
    loaded = keep_batch(recorded, given.loader.load_onto(recorded, given.files, given.overrides))
    loaded = absolute_dataset(loaded, PROJECT_ROOT)
    check_overrides(origin.run, recorded, loaded, read_record(origin.run).get("resolved") or {})
    return train(loaded, origin=origin, quiet=quiet, argv=argv)


def resume_auto(parsed: ExperimentArguments, loaded: LoadedConfig, runs_dir: Path, argv: Sequence[str]) -> TrainResult:
    """Go on with the newest interrupted or crashed run of this tag that nobody trains, or start a new one.

    Raises:
        UserError: there is no tag, or as `resume`.
    """
    tag = loaded.config.tracking.run_tag
    if tag is None:
        raise UserError("--resume auto needs --run-tag: it goes on with the newest unfinished run of that tag")
    for path in resumable_runs(runs_dir, tag):
        if read_record(path)["status"] != "running":  # its process may still be feeding the views
            wait_until_free(path, WAIT_SECONDS)
        try:
            return resume(Origin("resume", path.resolve(), strict=parsed.own.strict_resume), parsed, argv=argv)
        except RunLockedError:  # another process was faster
            continue
    return train(loaded, argv=argv)


def train(
    config: Config | LoadedConfig,
    *,
    origin: Origin | None = None,
    quiet: bool = False,
    argv: Sequence[str] = (),
    root: Path = PROJECT_ROOT,
    strict: bool = False,
) -> TrainResult:
    """Run one experiment.

    Args:
        config: the merged configuration, with or without the sources of its values.
        origin: the run that this one goes on with, forks, or takes its first weights from.
        quiet: print warnings only.
        argv: the command line, for the record.
        root: the folder that relative paths start from.
        strict: what the preflight tells is a mistake.

    Returns:
        How it ended; also for a run that diverged or was interrupted.

    Raises:
        UserError: a mistake found before the run directory is made or changed.
        Exception: whatever ended the run, after its status was written.
    """
    loaded = config if isinstance(config, LoadedConfig) else LoadedConfig.from_config(config)
    deadline = Deadline(loaded.config.train.max_minutes)
    tune_process()
    from utils.machine.device import torch_settings
    from utils.training.finish import seal_run
    from utils.training.preflight import preflight
    from utils.training.setup import check_gates
    from utils.training.start import open_run, read_git

    terminal = Terminal(quiet)
    setup = check_gates(loaded, root, origin, terminal.warn, terminal.print)
    git = read_git(setup)
    with stop_on_signals() as stop, torch_settings(setup.config.train, setup.device):
        if not setup.resumes:
            tell_preflight(preflight(setup, git), strict, terminal)
        run, start = open_run(setup, git, argv, terminal)
        try:
            terminal.print(settings_table(setup.loaded.non_default()))
            return run_experiment(setup, run, git, start, terminal, stop, deadline)
        finally:
            try:
                seal_run(run, terminal)
            finally:
                run.release()


def tell_preflight(findings: Sequence[str], strict: bool, terminal: Terminal) -> None:
    """Print what the preflight found.

    Raises:
        UserError: there is something, and `strict`.
    """
    if findings and strict:
        raise UserError("\n".join(f"--strict: {finding}" for finding in findings))
    for finding in findings:
        terminal.print(Text.assemble(("preflight: ", "yellow"), finding))


def run_experiment(
    setup: Setup,
    run: Run,
    git: GitFacts,
    start: Start,
    terminal: Terminal,
    stop: StopRequest,
    deadline: Deadline,
) -> TrainResult:
    """Train inside a run directory; whatever happens, its status, logs, checkpoints and views are closed."""
    from utils.profiling.in_run import RunProfiler
    from utils.training.callbacks import Callbacks, TrainingRun
    from utils.training.checkpointer import Checkpointer
    from utils.training.finish import close_run, dump_flight_recorder, export
    from utils.training.monitor import Monitor
    from utils.training.start import prepare_run, write_meta
    from utils.training.step import training_loop
    from utils.training.step_buffer import NonFiniteError

    began = time.monotonic()
    log: RunLog | None = None
    state: TrainState | None = None
    feeders: Feeders | None = None
    checkpoints: Checkpointer | None = None
    monitor: Monitor | None = None
    callbacks: Callbacks | None = None
    status: Status = "failed"
    reason: str | None = None
    exported: str | None = None
    try:
        terminal.attach(run.path / "logs" / "train.log")
        write_meta(setup, run, git)
        log = RunLog(run.path / "logs")
        state = prepare_run(setup, run, start, terminal)
        feeders = build_feeders(setup, run, terminal, state.step)
        progress = TrainingProgress(terminal, setup.max_iters, state.step)
        monitor = Monitor(state, log, run.path, progress, feeders.watch)
        callbacks = Callbacks(list(setup.callbacks.values()), TrainingRun(run.path, state, monitor.buffer, stop))
        settings, saved_step = setup.config.train, state.step if start.own else None
        folder, config_hash = run.path / CHECKPOINTS, run.record["config_hash"]
        checkpoints = Checkpointer(folder, settings, config_hash, log, terminal.warn, saved_step)
        profiler = RunProfiler(state, run.path, terminal)
        try:
            with progress, gc_frozen():
                training_loop(state, monitor, callbacks, checkpoints, profiler, stop, deadline)
            checkpoints.wait()
            if state.finished:
                exported = export(state, run, terminal)
                status, reason = "completed", state.early_stopping.reason if state.early_stopping.stopped else None
            else:
                status, reason = "interrupted", stop.reason
        except NonFiniteError as error:
            status, reason = "diverged", str(error)
        callbacks.on_end(status)
        monitor.buffer.flush()
    except KeyboardInterrupt:
        stop.signum = stop.signum or signal.SIGINT
        status, reason = "interrupted", f"{signal.Signals(stop.signum).name}, at once"
    except BaseException as error:
        status, reason = "failed", f"{type(error).__name__}: {error}"
        terminal.print(traceback.format_exc(), log_only=True)
        terminal.print(f"failed after {duration(time.monotonic() - began)}: {relative_name(run.path, setup.root)}")
        if callbacks is not None and monitor is not None:
            with contextlib.suppress(Exception):  # the first failure is the one that counts
                callbacks.on_end(status)
                monitor.buffer.flush()
        raise
    finally:
        at_once = status == "interrupted" and reason != stop.reason
        with contextlib.suppress(KeyboardInterrupt):  # an impatient signal ends the waiting, not the closing
            if monitor is not None and status in ("diverged", "failed"):
                dump_flight_recorder(monitor.recorder, run, reason or status, terminal)
            if checkpoints is not None and not at_once:
                checkpoints.wait()
        stop.patient = False  # from here on the first signal ends the waiting
        left = setup.config.tracking.closing_seconds
        if deadline.seconds_left is not None:
            left = max(1.0, min(deadline.seconds_left, left))
        seconds_to_close = min(1.0, left) if at_once else left
        summary = close_run(run, log, feeders, state, status, reason, terminal, seconds_to_close, at_once)
        if log is not None and not at_once:  # at once: a checkpoint may still be written, and needs the log
            log.close()
    seconds = time.monotonic() - began
    result = TrainResult(
        run_dir=run.path,
        status=status,
        exit_reason=reason,
        steps=state.step if state else 0,
        train_loss=summary.get("train/eval_loss"),
        val_loss=summary.get("val/loss"),
        losses_step=state.losses_step if state else None,
        best_val_loss=summary.get("best_val_loss"),
        best_step=state.best_step if state else None,
        seconds=seconds,
        parameters=state.model.num_parameters() if state else 0,
        exported=exported,
        signum=stop.signum if status == "interrupted" else None,
    )
    print_result(result, run, setup, terminal)
    return result


def build_feeders(setup: Setup, run: Run, terminal: Terminal, step: int) -> Feeders:
    """A feeder for each view that is asked for and installed, on one budget; not started yet.

    Args:
        step: at which training begins.
    """
    from utils.tracking.feeder import Budget, Feeder, Feeders
    from utils.tracking.views import build_views, is_installed, wanted_views

    names = []
    for name in wanted_views(setup.config):
        if is_installed(name):
            names.append(name)
        else:
            terminal.warn(f"{name} is not installed: this run is not fed to it (later: {rebuild_command(run, name)})")
            run.update_view(name, state="off", reason="not installed")
    budget = Budget(setup.config.tracking.tracking_budget)
    feeders = [
        Feeder(
            view,
            run.path / "logs",
            budget,
            run.update_view,
            terminal.warn,
            rebuild_command(run, view.name),
            step if setup.resumes else None,
        )
        for view in build_views(names, run.path, setup.config, setup.root)
    ]
    return Feeders(feeders, terminal.warn, run.update_view)


if __name__ == "__main__":
    sys.exit(main())
