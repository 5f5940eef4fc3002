"""A session: one process that trains a run, from the checks before its directory is made to the final status."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from utils.config.loader import LoadedConfig, relative_name
from utils.errors import RankError, UserError, number_text
from utils.machine.device import torch_settings
from utils.machine.process import gc_frozen
from utils.machine.ranks import ONE, Ranks
from utils.machine.signals import Deadline, StopRequest, stop_on_signals
from utils.runs.code import GitFacts
from utils.runs.index import STARTING, read_index
from utils.runs.layout import CHECKPOINTS, LOGS, TRAIN_LOG
from utils.runs.log import RunLog
from utils.runs.metrics import encode_number
from utils.runs.origin import Origin
from utils.runs.run import Run, Status
from utils.terminal.console import Terminal, settings_table
from utils.terminal.progress import TrainingProgress
from utils.terminal.words import duration
from utils.tracking import RunEnd
from utils.tracking.feeder import Budget, Feeder, Feeders
from utils.tracking.views import build_views, is_installed, wanted_views, without_builds
from utils.training.agreement import agree, assign, send_state
from utils.training.batch_size import memory_explained
from utils.training.callbacks import Callbacks, TrainingRun
from utils.training.checkpointer import Checkpointer
from utils.training.compiler import begin_compiler
from utils.training.evaluate import evaluate, evaluation_due, is_best
from utils.training.finish import draw, dump_flight_recorder, export, seal_run, warn_if_possible
from utils.training.monitor import Monitor
from utils.training.notify import Notifier
from utils.training.outcome import Outcome, StartInterruptedError
from utils.training.preflight import preflight, report_adapters, report_noise, report_preflight
from utils.training.result import TrainResult, print_result, rebuild_command
from utils.training.setup import Setup, make_setup
from utils.training.sharded_checkpointer import make_checkpointer
from utils.training.start import Start, evaluate_at_old_end, open_run, prepare_run, read_git, record_ranks, write_meta
from utils.training.state import TrainState
from utils.training.step import Update
from utils.training.step_buffer import NonFiniteError
from utils.training.step_graph import make_update

TRAINING = threading.Lock()  # held while this process trains


class Session:
    """What the training loop queries and calls between its updates.

    state: model, optimizer and everything else that training changes.
    update: makes one optimizer update.
    result: how the session ended; set when it is closed.
    """

    state: TrainState
    update: Update
    monitor: Monitor
    callbacks: Callbacks
    checkpoints: Checkpointer
    result: TrainResult

    def __init__(
        self, setup: Setup, run: Run, start: Start, terminal: Terminal, stop: StopRequest, deadline: Deadline
    ) -> None:
        self.setup, self.run, self.terminal = setup, run, terminal
        self.outcome = Outcome()
        self._start, self._stop, self._deadline = start, stop, deadline
        self._began = time.monotonic()
        self._warn = warn_if_possible(terminal, run)
        self._status_is_written = False

    # ------------------------------------------------------------------------------------ queries of the loop

    @property
    def path(self) -> Path:
        """The run directory."""
        return self.run.path

    @property
    def evaluation_due(self) -> bool:
        return evaluation_due(self.state)

    @property
    def checkpoint_due(self) -> bool:
        return self._stop.save_due or (self.state.shards is None and self.checkpoints.due(self.state.step))

    def should_stop(self) -> bool:
        """Whether training is finished, or was asked to stop by a signal, a callback or a limit."""
        settings, state = self.state.config.train, self.state
        if self._deadline.is_near(reserve=self.checkpoints.seconds_to_save(state)):
            self._stop.stop(f"max_minutes ({number_text(settings.max_minutes or 0)}) is almost reached")
        if settings.stop_at_step is not None and state.step >= settings.stop_at_step:
            self._stop.stop(f"stop_at_step ({settings.stop_at_step:,}) is reached")
        if state.shards is not None and self.checkpoints.due(state.step):
            self._stop.save = True  # `agree` passes it on to all ranks
        return agree(self._stop, state.ranks) or state.finished

    def _must_stop(self) -> bool:
        """Whether to abandon an evaluation: a signal has arrived, or the time limit is reached."""
        left = self._deadline.seconds_left
        is_over = left is not None and left < self.checkpoints.seconds_to_save(self.state)
        return is_over or self._stop.signum is not None

    # ------------------------------------------------------------------------------------ actions of the loop

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Flush the log before work that is not training, and leave the time of that work out of the step times.

        Raises:
            NonFiniteError: a loss or gradient since the last flush was not finite.
        """
        with self.state.ranks.busy():
            self.monitor.flush()
            yield
            self.monitor.pause_over()

    def evaluate(self) -> None:
        """Evaluate both splits after `state.step` updates; save a checkpoint if val/loss is the best so far."""
        state = self.state
        with state.ranks.busy():
            self.monitor.flush()
        evaluate(state, self.monitor, self.callbacks, self._must_stop)
        self.monitor.pause_over()
        if is_best(state):
            self.save()

    def save(self) -> None:
        """Save a checkpoint, after a flush has shown that every loss and gradient so far was finite."""
        self._stop.save = self._stop.save_due = False
        with self.pause():
            self.checkpoints.save(self.state)

    def log_step(self, loss: torch.Tensor, grad_norms: torch.Tensor, lr: float) -> None:
        """Record the update that is about to be made, without a transfer from the device.

        Args:
            loss: the mean loss of its batch, ().
            grad_norms: the norm of each parameter group before clipping, (groups,).
        """
        with self.state.ranks.busy():
            self.monitor.log_step(self.state.step, loss, grad_norms, lr)

    def step_done(self, loss: torch.Tensor) -> None:
        """After an update, call the callbacks and flush the log if that is due.

        Args:
            loss: the mean loss of its batch, (), on the device.
        """
        self._deadline.step_done()
        self.callbacks.on_step(self.state.step - 1, loss)
        with self.state.ranks.busy():
            self.monitor.step_done()

    # -------------------------------------------------------------------------------------- beginning and end

    def begin(self, git: GitFacts, before_status: ExitStack, after_status: ExitStack) -> None:
        """Write the record of the run and make everything that training needs.

        Args:
            before_status: receives what must be done before the status is written.
            after_status: receives what is closed after that.
        """
        setup, run, terminal = self.setup, self.run, self.terminal
        terminal.attach(run.path / TRAIN_LOG)
        write_meta(setup, run, git)
        log = RunLog(run.path / LOGS)
        after_status.callback(self._attempt, self._close_log, log)
        after_views = after_status.enter_context(ExitStack())
        before_status.callback(self._attempt, log.sync)
        self.state = state = prepare_run(setup, run, self._start, terminal)
        before_status.callback(self.outcome.read, state)
        self.update = make_update(state, terminal.warn)
        record_ranks(run, state, self.update)
        if state.ranks.several and state.shards is None:
            send_state(state)
        feeders = build_feeders(setup, run, terminal, state.step)
        after_status.callback(self._attempt, self._close_views, feeders)
        self.progress = TrainingProgress(
            terminal,
            setup.max_iters,
            state.step,
            stop_at=setup.config.train.stop_at_step,
            eval_interval=setup.config.train.eval_interval,
            stops=lambda: bool(self._stop),
        )
        self.monitor = Monitor(state, log, run.path, self.progress, feeders.watch)
        before_status.callback(self._dump_flight_recorder)
        callback_run = TrainingRun(run.path, state, self.monitor.log, self._stop)
        self.callbacks = Callbacks(list(setup.callbacks.values()), callback_run)
        folder, config_hash = run.path / CHECKPOINTS, run.record["config_hash"]
        saved_step = state.step if self._start.own else None
        base = self._start.checkpoint.base if self._start.own and self._start.checkpoint else None
        self.checkpoints = make_checkpointer(
            state, folder, state.config.train, config_hash, log, self._warn, saved_step=saved_step, base=base
        )
        after_views.callback(self.checkpoints.abandon)
        self._stop.on_continue.append(self.checkpoints.continued)
        before_status.callback(self._wait_for_checkpoint)

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """Show progress during the loop, start and end the callbacks, export the model, and record how it ended."""
        try:
            with self.progress, gc_frozen():
                self.state.model.train()
                self._deadline.step_done()  # the first evaluation counts as a step
                self.callbacks.on_start()
                self._stop.patient = True
                self.state.ranks.training_begins()
                yield
            with self.state.ranks.busy():
                self.checkpoints.wait()
                if self.state.finished and not self.evaluation_due:  # due: a signal cut the last evaluation short
                    self.outcome.exported = export(self.state, self.run, self.terminal)
            if self.outcome.exported is not None:
                stopped_early = self.state.early_stopping
                self._end("completed", stopped_early.reason if stopped_early.stopped else None)
            else:
                self._end("interrupted", self._stop.reason)
        except NonFiniteError as error:
            self._end("diverged", str(error))
        except KeyboardInterrupt:
            with contextlib.suppress(NonFiniteError):
                self.monitor.flush()
            raise
        except BaseException:  # reported as it is, whatever fails below
            for last_call in (self.monitor.flush, lambda: self.callbacks.on_end("failed"), self.monitor.flush):
                with contextlib.suppress(Exception, KeyboardInterrupt):
                    last_call()
            raise

    def _end(self, status: Status, reason: str | None) -> None:
        """Record how training ended, and let the callbacks log their last numbers."""
        self.outcome.status, self.outcome.reason = status, reason
        self.state.ranks.training_is_over(status)
        with contextlib.suppress(NonFiniteError):
            self.monitor.flush()
        self.callbacks.on_end(status)
        if status != "diverged" and self._stop.signum is None:  # after a signal, torchrun's store may be gone
            self.state.ranks.collect("ended", status)  # raises if a callback has failed on another rank
        self.monitor.flush()

    def interrupt(self) -> None:
        """Record that a second signal ended the run at once, so that closing it waits for nothing."""
        self._stop.signum = self._stop.signum or signal.SIGINT
        self.setup.ranks.training_is_over("interrupted")
        self.outcome.status, self.outcome.at_once = "interrupted", True
        self.outcome.reason = f"{signal.Signals(self._stop.signum).name}, at once"

    def fail(self, error: BaseException) -> None:
        """Record and print the exception that ended the run."""
        self._stop.deaf = isinstance(error, RankError)
        reason = str(error) if isinstance(error, RankError) else f"{type(error).__name__}: {error}"
        self.setup.ranks.training_is_over("failed", reason)
        self.outcome.status, self.outcome.reason = "failed", reason
        where = relative_name(self.run.path, Path.cwd())
        words = f"failed after {duration(time.monotonic() - self._began)}: {where}"
        self._attempt(self.terminal.print, words)
        with contextlib.suppress(OSError):
            trace = error.trace if isinstance(error, RankError) else ""
            self.terminal.print(trace or traceback_of(error), log_only=True)

    def write_status(self) -> None:
        """Write to run.json how the run ended, before the views are closed, so that a kill meanwhile does not lose it.

        If this fails, `report` tries again after the views are closed; until it succeeds the run counts as crashed.
        """
        self._stop.patient = False  # from here on, even a first signal ends the waiting
        self._status_is_written = self._attempt(self._finish)

    def _finish(self) -> None:
        outcome = self.outcome
        self.run.finish(
            outcome.status,
            outcome.reason,
            last_step=outcome.last_step,
            summary={name: encode_number(value) for name, value in outcome.losses.items()},
            best_step=outcome.best_step,
        )

    def _attempt(self, action: Callable[..., object], *args: Any) -> bool:
        """Call `action` at the end of a run; return False, with a warning, after an OSError.

        A full disk must not hide how the run ended.
        """
        try:
            action(*args)
        except OSError as error:
            self._warn(f"{error.filename or self.run.path.name}: cannot be written: {error.strerror or error}")
            return False
        return True

    def report(self) -> None:
        """Set `result`, and print it unless the run failed."""
        outcome = self.outcome
        if not self._status_is_written:
            try:
                self._finish()
            except OSError as error:
                if outcome.status != "failed":  # if it did fail, that failure is the one to report
                    raise
                self._warn(f"{self.run.id}: its status was not written: {error.strerror}; it counts as crashed")
        self.result = TrainResult(
            run_dir=self.run.path,
            status=outcome.status,
            exit_reason=outcome.reason,
            steps=outcome.last_step or 0,
            train_loss=outcome.losses.get("train/eval_loss"),
            val_loss=outcome.losses.get("val/loss"),
            losses_step=outcome.losses_step,
            val_bits_per_byte=outcome.losses.get("val/bits_per_byte"),
            val_loss_without_leaks=outcome.losses.get("val/loss_without_leaks"),
            best_val_loss=outcome.losses.get("best_val_loss"),
            best_step=outcome.best_step,
            seconds=time.monotonic() - self._began,
            parameters=outcome.parameters,
            exported=outcome.exported,
            unsaved=outcome.unsaved,
            signum=(self._stop.signum or self._stop.signum_of_others) if outcome.status == "interrupted" else None,
        )
        if outcome.status != "failed":
            self._attempt(print_result, self.result, self.run, self.setup, self.terminal, self._start.step)

    def _dump_flight_recorder(self) -> None:
        if self.outcome.status in ("diverged", "failed"):
            reason = self.outcome.reason or self.outcome.status
            with contextlib.suppress(KeyboardInterrupt):  # a further signal ends the waiting, not the closing
                dump_flight_recorder(self.monitor.recorder, self.run, reason, self.terminal)

    def _wait_for_checkpoint(self) -> None:
        if not self.outcome.at_once:
            with contextlib.suppress(KeyboardInterrupt):
                self.checkpoints.wait()
        self.outcome.unsaved = self.checkpoints.unsaved

    def _close_log(self, log: RunLog) -> None:
        if not self.outcome.at_once:  # otherwise the thread that writes a checkpoint may still need the log
            log.close()

    def _close_views(self, feeders: Feeders) -> None:
        """Draw the curves while the views receive the rest of the log, then close the views in closing_seconds."""
        outcome, seconds = self.outcome, self.setup.config.tracking.closing_seconds
        if self._deadline.seconds_left is not None:
            seconds = max(1.0, min(self._deadline.seconds_left, seconds))
        if outcome.at_once:
            seconds = min(1.0, seconds)
        feeders.lift_budget()
        with contextlib.suppress(KeyboardInterrupt):  # a further signal skips the picture
            if not outcome.at_once:
                draw(self.run, self.terminal)
        end = RunEnd(outcome.status, outcome.losses, outcome.last_step or 0)
        feeders.finish(end, self.terminal.print, seconds)


@contextlib.contextmanager
def one_at_a_time() -> Iterator[None]:
    """Raises UserError if this process is training already, in another thread or in a caller of this function.

    Torch's random generators and settings belong to the whole process, so two runs at once would disturb each other.
    """
    if not TRAINING.acquire(blocking=False):
        raise UserError("this process is training already: wait until that training ends, or use another process")
    try:
        yield
    finally:
        TRAINING.release()


def traceback_of(error: BaseException) -> str:
    """The traceback of an exception, as Python prints it."""
    return "".join(traceback.format_exception(error))


@contextlib.contextmanager
def open_session(
    loaded: LoadedConfig,
    origin: Origin | None,
    deadline: Deadline,
    ranks: Ranks | None = None,
    notifier: Notifier | None = None,
    *,
    quiet: bool,
    argv: Sequence[str],
    root: Path,
    strict: bool,
    facts: Mapping[str, Any],
) -> Iterator[Session]:
    """Check everything, make or reopen the run directory, and yield the session to train in; on exit close the run.

    A run that diverges or is interrupted after its first step raises nothing: `session.result` says how it ended.

    Args:
        argv: the command line, to be recorded.
        root: the folder that relative paths start from.
        ranks: the ranks that train the run together; this process is rank 0. None: it trains alone.
        notifier: reports how the run ended, once another process may resume it.
        strict: raise UserError if the preflight finds anything.
        facts: extra fields for run.json of a new run.

    Raises:
        UserError: a mistake found before the run directory is made or changed.
        StartInterruptedError: a signal came before the first step.
        Exception: the failure that ended the run, after its status was written.
    """
    terminal, begun, ranks = Terminal(quiet), False, ranks or ONE
    session: Session | None = None
    setup = make_setup(loaded, root, origin, terminal.warn, terminal.print, ranks)
    git = read_git(setup)
    with ExitStack() as stack:
        stop = stack.enter_context(stop_on_signals())
        stop.on_continue.append(deadline.continued)
        stop.patient = False  # the first signal stops at once until there is a step to finish
        if setup.config.train.compile:
            begin_compiler(setup.device)
        stack.enter_context(torch_settings(setup.config.train, setup.device))
        if not setup.resumes:
            report_findings(setup, git, strict, terminal)
        setup = dataclasses.replace(setup, corpus=setup.corpus.stored())
        if ranks.several:
            assign(setup)
        run, start = open_run(setup, git, argv, terminal, facts)
        if notifier is not None:
            stack.callback(lambda: notifier.send(getattr(session, "result", None)))
        stack.callback(run.release)
        setup = evaluate_at_old_end(setup, run, start)
        ranks.share("run", {"path": str(run.path), "config": setup.config.model_dump(mode="json")})
        stack.callback(seal_run, run, terminal)
        terminal.print(settings_table(setup.loaded.non_default()))
        session = Session(setup, run, start, terminal, stop, deadline)
        stack.callback(session.report)
        after_status = stack.enter_context(ExitStack())
        stack.callback(session.write_status)
        before_status = stack.enter_context(ExitStack())
        try:
            with memory_explained(setup.config, setup.device):
                session.begin(git, before_status, after_status)
                begun = True
                with session.training():
                    yield session
        except KeyboardInterrupt:
            if not begun and (dead := ranks.dead()) is not None:
                session.fail(dead)
                raise dead from None
            session.interrupt()
        except BaseException as error:
            failure = with_rank(error, ranks)
            session.fail(failure)
            if failure is error:
                raise
            raise failure from error
    if not begun:
        raise StartInterruptedError(session.result)


def report_findings(setup: Setup, git: GitFacts, strict: bool, terminal: Terminal) -> None:
    """Print the preflight's findings about a new run, its number of trained parameters and the noise between seeds.

    Raises:
        UserError: the preflight found something, and `strict` is set.
    """
    runs = read_index(setup.runs_dir)
    report_preflight(preflight(setup, git, runs), strict, terminal)
    report_adapters(setup, terminal)
    report_noise(setup, git, runs, terminal)


def with_rank(error: BaseException, ranks: Ranks) -> BaseException:
    """`error`; if several ranks train, as a RankError that names this rank, rank 0."""
    if not ranks.several or isinstance(error, RankError):
        return error
    return RankError(f"rank 0: {type(error).__name__}: {error}", traceback_of(error))


def build_feeders(setup: Setup, run: Run, terminal: Terminal, step: int) -> Feeders:
    """Make a feeder for each configured view that is installed, all on one budget, without starting them.

    Args:
        step: the step at which training begins.
    """
    names = []
    for name in wanted_views(setup.config):
        if is_installed(name):
            names.append(name)
            run.update_view(name, state=STARTING, reason=None)
        else:
            why, later = without_builds(name), f" (later: {rebuild_command(run, name)})"
            terminal.warn(f"{why or f'{name} is not installed'}: this run is not sent to it{'' if why else later}")
            run.update_view(name, state="off", reason="not installed")
    budget = Budget(setup.config.tracking.tracking_budget)
    feeders = [
        Feeder(
            view,
            run.path / LOGS,
            budget,
            run.update_view,
            warn_if_possible(terminal, run),
            rebuild_command(run, view.name),
            step if setup.resumes else None,
        )
        for view in build_views(names, run.path, setup.config, setup.root)
    ]
    return Feeders(feeders, warn_if_possible(terminal, run), run.update_view)
