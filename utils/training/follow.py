"""Several ranks: rank 0 trains as a single process does; the others follow it and write nothing."""

from __future__ import annotations

import contextlib
import os
import signal
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from tokenizer import tokenizer_from_json
from utils.config.settings import Config
from utils.errors import RankError, UserError
from utils.machine.device import available_memory, choose_dtype, torch_settings
from utils.machine.process import gc_frozen, tune_process
from utils.machine.process_ranks import ProcessRanks
from utils.machine.ranks import RanksOverError
from utils.machine.signals import STOP_SIGNALS, StopRequest, StopSignal, stop_on_signals
from utils.terminal.cli import PROJECT_ROOT
from utils.terminal.console import Terminal
from utils.training.agreement import agree, check_same, receive_start, receive_state
from utils.training.callbacks import Callbacks, TrainingRun, load_callbacks
from utils.training.compiler import begin_compiler
from utils.training.evaluate import evaluate, evaluation_due, is_best
from utils.training.finish import follow_export
from utils.training.launch import launch_facts
from utils.training.monitor import Monitor
from utils.training.setup import device_of_rank, read_corpus
from utils.training.sharded_checkpointer import FollowerCheckpointer
from utils.training.state import TrainState, build_state
from utils.training.step import Update
from utils.training.step_graph import make_update

# Settings of work besides training that only rank 0 does.
NOT_FOLLOWED = {"tracking": {"sample_tokens": 0, "histogram_interval": 0}, "train": {"profile_step": None}}

Loop = Callable[[Any], None]  # trains a session


def train_on_ranks(argv: Sequence[str], lead: Callable[[ProcessRanks], int], loop: Loop) -> int:
    """Train one run together with the other processes of torchrun; return the exit status, the same on all ranks.

    Args:
        lead: trains on rank 0 and returns its exit status.
        loop: the training loop.

    Raises:
        UserError, RankError: see `run_on_ranks`.
    """
    return run_on_ranks(lambda: launch_facts(argv), lead, lambda ranks: _train_as_follower(ranks, loop))


def run_on_ranks(
    find_facts: Callable[[], dict[str, Any]],
    lead: Callable[[ProcessRanks], int],
    work: Callable[[ProcessRanks], object],
) -> int:
    """Check that all ranks agree, then let rank 0 lead and the others work; return the exit status, the same on all.

    Args:
        find_facts: returns the facts that must be the same on all ranks (`launch_facts`).
        lead: the work of rank 0; returns its exit status.
        work: the work of each other rank.

    Raises:
        UserError: on rank 0: a mistake of the user's on any rank.
        RankError: on rank 0: another rank has failed. On another rank: rank 0 is gone.
    """
    tune_process()
    ranks = ProcessRanks()
    for signum in STOP_SIGNALS:
        signal.signal(signum, ranks.handle_signal)
    if ranks.rank:
        return run_other_rank(find_facts, ranks, work)
    status = 1
    try:
        facts = ranks.collect("facts", with_memory(find_facts(), ranks))
        check_same(facts)
        ranks.memory = min((found["memory"] for found in facts if "memory" in found), default=None)
        status = lead(ranks)
    except SystemExit as ending:  # --help
        status = ending.code if isinstance(ending.code, int) else 0
        raise
    except UserError:
        status = 2
        raise
    except KeyboardInterrupt as interruption:
        status = 128 + getattr(interruption, "signum", signal.SIGINT)
        raise
    except RankError as error:
        ranks.training_is_over("failed", str(error))
        raise
    finally:
        ranks.end(status)
    return status


def run_other_rank(
    find_facts: Callable[[], dict[str, Any]], ranks: ProcessRanks, work: Callable[[ProcessRanks], object]
) -> int:
    """Run `work` on a rank other than 0; return the exit status of rank 0.

    Raises:
        RankError: rank 0 is gone, so this rank must report why.
    """
    status, lost = 1, None  # 1 also if torchrun is gone
    try:
        ranks.collect("facts", _facts_or_mistake(find_facts, ranks))
        work(ranks)
    except RanksOverError:
        pass
    except StopSignal as interruption:
        ranks.failed(f"{signal.Signals(interruption.signum).name}, at once", "")
        status = 128 + interruption.signum
    except RankError as error:  # rank 0 reports which rank has failed, unless it is rank 0 itself
        lost = error
    except BaseException as error:
        message, trace = f"{type(error).__name__}: {error}", "".join(traceback.format_exception(error))
        ranks.failed(message, trace)
        lost = RankError(f"rank {ranks.rank}: {message}", trace)
    ended = ranks.leave()
    if ended is not None:
        return ended
    if lost is None and not ranks.board.gone:
        lost = RankError("rank 0 gave no sign of life: killed, stopped, or cut off")
    if lost is not None:
        raise lost
    return status


def with_memory(facts: dict[str, Any], ranks: ProcessRanks) -> dict[str, Any]:
    """The facts of this rank, with the number of bytes that it can allocate as `memory`."""
    with contextlib.suppress(UserError):  # no such device: reported later
        device = device_of_rank(Config.model_validate({"train": {"device": facts["settings"]["device"]}}), ranks)
        sharers = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if device.type == "cpu" else 1
        return facts | {"memory": available_memory(device) // sharers}
    return facts


def _facts_or_mistake(find_facts: Callable[[], dict[str, Any]], ranks: ProcessRanks) -> dict[str, Any]:
    try:
        with contextlib.redirect_stdout(None):  # --help
            return with_memory(find_facts(), ranks)
    except UserError as error:
        return {"error": str(error)}
    except SystemExit:
        return {}


def _train_as_follower(ranks: ProcessRanks, loop: Loop) -> None:
    assignment = ranks.share("assignment", None)
    config = Config.model_validate(assignment["config"])
    ranks.seconds = config.train.rank_timeout
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(stop_on_signals())
        stop.silent = True
        try:
            device = device_of_rank(config, ranks)
            dtype = choose_dtype(config.train.dtype, device)
            callbacks = load_callbacks(config.train.callbacks, PROJECT_ROOT / config.tracking.runs_dir, PROJECT_ROOT)
            corpus = read_corpus(config, PROJECT_ROOT, tokenizer_from_json(assignment["tokenizer"], "rank 0")).stored()
            if corpus.hash != assignment["corpus_hash"]:
                raise UserError(f"{config.data.dataset}: the text is not that of rank 0")
            if str(dtype) != assignment["dtype"]:
                raise UserError(f"its device computes in {dtype}, that of rank 0 in {assignment['dtype']}: set dtype")
        except UserError as error:
            ranks.collect("ready", str(error))
            ranks.share("run", None)  # never answered: raises when rank 0 has reported the mistake and ended
            raise
        if config.train.compile:
            begin_compiler(device)
        stack.enter_context(torch_settings(config.train, device))
        ranks.collect("ready", "")
        run = ranks.share("run", None)
        config = _follower_config(Config.model_validate(run["config"]))
        terminal = SilentTerminal()
        state = build_state(config, assignment["max_iters"], corpus, device, dtype, terminal, ranks)
        state.callbacks = dict(callbacks)
        if state.shards is None:
            receive_state(state)
        else:
            receive_start(state)
        follower = Follower(state, make_update(state, terminal.warn), Path(run["path"]), stop)
        follower.train(loop)


def _follower_config(config: Config) -> Config:
    """The configuration without the work that only rank 0 does; if the model is sharded, all ranks take part in it."""
    if config.train.shard != "none":
        return config
    changed = {name: getattr(config, name).model_copy(update=values) for name, values in NOT_FOLLOWED.items()}
    return config.model_copy(update=changed)


class SilentTerminal(Terminal):
    """A terminal that prints nothing."""

    def __init__(self) -> None:
        super().__init__(quiet=True)

    def print(self, *renderables: Any, log_only: bool = False) -> None: ...

    def warn(self, message: str) -> None: ...


class NoMonitor(Monitor):
    """A monitor that records nothing."""

    def __init__(self) -> None:
        self.progress = NoProgress()  # type: ignore[assignment]

    def log_losses(self, losses: Mapping[str, float]) -> None: ...

    def log(self, step: int, values: Mapping[str, float | torch.Tensor]) -> None: ...

    def log_sample(self, text: str) -> None: ...


class NoProgress:
    """A progress display that shows nothing."""

    def evaluating(self, step: int, done: int, total: int) -> None: ...

    def evaluation(self, step: int, losses: Mapping[str, float]) -> None: ...


class Follower:
    """The session (utils/training/session.py) of a rank other than 0, which decides and writes nothing."""

    def __init__(self, state: TrainState, update: Update, path: Path, stop: StopRequest) -> None:
        self.state, self.update, self._stop = state, update, stop
        self.path, self.terminal = path, SilentTerminal()
        self._monitor = NoMonitor()
        run = TrainingRun(path, state, self._monitor.log, stop)
        self.callbacks = Callbacks(list(state.callbacks.values()), run)  # type: ignore[arg-type]
        self._checkpointer = FollowerCheckpointer(state.ranks) if state.shards is not None else None

    @property
    def evaluation_due(self) -> bool:
        return evaluation_due(self.state)

    def evaluate(self) -> None:
        evaluate(self.state, self._monitor, self.callbacks, lambda: self._stop.signum is not None)
        if is_best(self.state):
            self.save()

    def should_stop(self) -> bool:
        return agree(self._stop, self.state.ranks) or self.state.finished

    @property
    def checkpoint_due(self) -> bool:
        return self._stop.save_due

    def save(self) -> None:
        self._stop.save = self._stop.save_due = False
        if self._checkpointer is not None:
            self._checkpointer.save(self.state)

    def log_step(self, loss: torch.Tensor, grad_norms: torch.Tensor, lr: float) -> None:
        interval = self.state.config.tracking.histogram_interval
        if self.state.shards is not None and interval and self.state.step % interval == 0:
            for _ in self.state.shards.whole_tensors():
                pass

    def step_done(self, loss: torch.Tensor) -> None:
        self.callbacks.on_step(self.state.step - 1, loss)

    def pause(self) -> AbstractContextManager[None]:
        return contextlib.nullcontext()

    def train(self, loop: Loop) -> None:
        """Train as rank 0 does, until rank 0 ends training."""
        ranks = self.state.ranks
        assert isinstance(ranks, ProcessRanks)
        with gc_frozen():
            self.state.model.train()
            self.callbacks.on_start()
            ranks.training_begins()
            try:
                loop(self)
                if self.state.shards is not None and self.state.finished and not self.evaluation_due:
                    follow_export(self.state)
                status = ranks.end_of_training()
            except RanksOverError as over:
                status = over.status
            with ranks.busy():
                self.callbacks.on_end(status)
                ranks.collect("ended", status)
                if self._checkpointer is not None:
                    self._checkpointer.wait()
