"""One training experiment: configuration -> run directory -> training loop -> export.

    python train.py --run-tag baseline
    python train.py --config configs/presets/shakespeare_cpu.yaml --n-embd 256
    python train.py --resume baseline
    python train.py --help

Or from a notebook: `from train import train; result = train(Config(...), quiet=True)`.
"""

from __future__ import annotations

import contextlib
import math
import os
import shlex
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.cli import PROJECT_ROOT, ExperimentArguments, Parser, parse_experiment, script
from utils.config import Config, RuleError, config_hash, derived_settings, warmup_steps
from utils.config_loader import ConfigError, ConfigLoader, LoadedConfig, relative_name, rule_error
from utils.console import Terminal, TrainingProgress, duration, facts, settings_table
from utils.errors import UserError
from utils.files import write_json
from utils.metadata import GitFacts, MetadataCapture
from utils.resume import (
    Origin,
    Relation,
    check_longer,
    check_model,
    check_overrides,
    config_of_fork,
    find_origin,
    parent_facts,
    pin,
    pinned_settings,
    recorded_config,
    resumable_runs,
)
from utils.run_log import RunLog, cut_logs, decode_number, encode_number
from utils.run_manager import Run, RunLockedError, Status, read_record
from utils.signals import Deadline, StopRequest, stop_on_signals

if TYPE_CHECKING:  # torch takes a second to import: --help and mistakes must not wait for it
    import torch

    from data import Corpus
    from tokenizer import CharTokenizer
    from utils.checkpoint import Checkpoint
    from utils.flight_recorder import FlightRecorder
    from utils.tracking import Feeders
    from utils.train_state import TrainState

CHECKPOINTS = Path("artifacts", "checkpoints")
TOKENIZER = Path("meta", "tokenizer.json")
BIT_EXACT = "bit-exact: the same configuration, code, torch and processor give the same numbers, also after a resume"
NOT_EXACT = "none: deterministic is off, so numbers may differ in their last bits from run to run"


@dataclass(frozen=True)
class TrainResult:
    """How a run ended. Losses are in nats per token; None where there was no evaluation."""

    run_dir: Path
    status: Status
    exit_reason: str | None
    steps: int
    train_loss: float | None  # of the last evaluation, like val_loss
    val_loss: float | None
    losses_step: int | None
    best_val_loss: float | None
    best_step: int | None
    seconds: float
    parameters: int
    exported: str | None = None  # which weights
    signum: int | None = None

    @property
    def exit_status(self) -> int:
        """0 completed or stopped by max_minutes, 1 failed or diverged, 128 + signal number after a signal."""
        if self.signum is not None:
            return 128 + self.signum
        return 0 if self.status in ("completed", "interrupted") else 1


@dataclass(frozen=True)
class Setup:
    """What the three gates found, before a directory is made.

    config: what `loaded` says; in a resume with the values that "auto" had when the run was started.
    origin, checkpoint: where a fork or fine-tuning starts. (A resume reads its checkpoint once it has the lock.)
    """

    root: Path
    loaded: LoadedConfig
    config: Config
    corpus: Corpus
    device: torch.device
    dtype: torch.dtype
    max_iters: int
    origin: Origin | None = None
    checkpoint: Checkpoint | None = None

    @property
    def resumes(self) -> bool:
        return self.origin is not None and self.origin.relation == "resume"

    @property
    def runs_dir(self) -> Path:
        return self.root / self.config.tracking.runs_dir

    @property
    def epochs(self) -> float:
        """Passes over the training tokens that the run will make."""
        tokens = self.max_iters * self.config.train.batch_size * self.config.model.block_size
        return tokens / self.corpus.n_train


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
        "--strict-resume", action="store_true", help="refuse a damaged newest checkpoint; do not use the one before it"
    )


@dataclass(frozen=True)
class Start:
    """What training begins with: nothing, a checkpoint of its own, or one of the run's parent."""

    checkpoint: Checkpoint | None = None
    relation: Relation = "resume"

    @property
    def own(self) -> bool:
        return self.checkpoint is not None and self.relation == "resume"

    @property
    def step(self) -> int:
        return self.checkpoint.step if self.checkpoint is not None and self.relation != "init" else 0


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
    return train(loaded, origin=fork_or_init, argv=command).exit_status


def resume(
    origin: Origin, given: ExperimentArguments | None = None, *, quiet: bool = False, argv: Sequence[str] = ()
) -> TrainResult:
    """Go on with a run, with its own configuration and what may be overridden of it.

    Raises:
        UserError: it is being trained, complete, has no good checkpoint, or an override is refused.
    """
    given = given or ExperimentArguments(ConfigLoader(PROJECT_ROOT))
    recorded = recorded_config(origin.run, given.loader)
    loaded = absolute_dataset(given.loader.load_onto(recorded, given.files, given.overrides), PROJECT_ROOT)
    check_overrides(origin.run, recorded, loaded, pinned_settings(read_record(origin.run)))
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
) -> TrainResult:
    """Run one experiment.

    Args:
        config: the merged configuration, with or without the sources of its values.
        origin: the run that this one goes on with, forks, or takes its first weights from.
        quiet: print warnings only.
        argv: the command line, for the record.
        root: the folder that relative paths start from.

    Returns:
        How it ended; also for a run that diverged or was interrupted.

    Raises:
        UserError: a mistake found before the run directory is made or changed.
        Exception: whatever ended the run, after its status was written.
    """
    loaded = config if isinstance(config, LoadedConfig) else LoadedConfig.from_config(config)
    deadline = Deadline(loaded.config.train.max_minutes)
    terminal = Terminal(quiet)
    setup = check_gates(loaded, root, origin, terminal.warn)
    from utils.device import torch_settings

    git = read_git(setup)
    with stop_on_signals() as stop, torch_settings(setup.config.train, setup.device):
        run, start = open_run(setup, git, argv, terminal)
        try:
            terminal.print(settings_table(setup.loaded.non_default()))
            return run_experiment(setup, run, git, start, terminal, stop, deadline)
        finally:
            run.release()
            terminal.close()


def check_gates(
    loaded: LoadedConfig,
    root: Path,
    origin: Origin | None = None,
    warn: Callable[[str], None] = lambda message: None,
) -> Setup:
    """Corpus, device and origin; the configuration was validated when it was made.

    Raises:
        UserError: with the first thing that is not as it must be.
    """
    from data import load_corpus
    from tokenizer import CharTokenizer
    from utils.device import choose_device, choose_dtype
    from utils.generation import start_tokens

    loaded = absolute_dataset(loaded, root)
    config = loaded.config
    checkpoint, tokenizer = None, None
    if origin is not None and origin.relation == "resume":
        config = pin(config, pinned_settings(read_record(origin.run)))
        tokenizer = CharTokenizer.load(origin.run / TOKENIZER) if (origin.run / TOKENIZER).is_file() else None
    elif origin is not None:
        checkpoint, tokenizer = read_parent(origin, config, warn)
    corpus = load_corpus(config.data, config.model.block_size, root / config.data.corpora_dir, tokenizer)
    start_tokens(corpus.tokenizer, config.tracking.sample_prompt)
    max_iters = config.train.max_iters
    if max_iters is None:
        assert config.train.epochs is not None
        max_iters = math.ceil(config.train.epochs * corpus.n_train / config.train.batch_size / config.model.block_size)
        try:
            warmup_steps(config.optimizer, max_iters)
        except RuleError as error:
            raise rule_error(error, loaded) from None
    if origin is not None and origin.relation == "fork":
        assert checkpoint is not None
        if checkpoint.step >= max_iters:
            raise UserError(
                f"--fork: {origin.run.name} is at step {checkpoint.step:,} already: --max-iters must be more than "
                f"that, not {max_iters:,}"
            )
    device = choose_device(config.train.device)
    dtype = choose_dtype(config.train.dtype, device)
    return Setup(root, loaded, config, corpus, device, dtype, max_iters, origin, checkpoint)


def read_parent(origin: Origin, config: Config, warn: Callable[[str], None]) -> tuple[Checkpoint, CharTokenizer]:
    """The checkpoint that a fork or fine-tuning starts from, and its tokenizer.

    Raises:
        UserError: there is none, it is damaged, or it is of another model.
    """
    from tokenizer import CharTokenizer
    from utils.checkpointing import choose_checkpoint

    checkpoint = choose_checkpoint(origin.run / CHECKPOINTS, origin.which, strict=origin.strict, warn=warn)
    check_model(config.model, checkpoint.state["model"], origin.run.name)
    return checkpoint, CharTokenizer.from_json(checkpoint.tokenizer, str(checkpoint.path / "tokenizer.json"))


def open_run(setup: Setup, git: GitFacts, argv: Sequence[str], terminal: Terminal) -> tuple[Run, Start]:
    """A new run directory; or that of the run that goes on, its logs cut back to its newest good checkpoint.

    Raises:
        UserError: it cannot be made; or the run is being trained, complete, or all its checkpoints are damaged.
    """
    origin = setup.origin
    if origin is None or not setup.resumes:
        facts: dict[str, Any] = {"argv": list(argv), "git": git.summary()}
        if origin is not None and setup.checkpoint is not None:
            facts["parent"] = parent_facts(origin, setup.checkpoint.step)
        start = Start(setup.checkpoint, origin.relation) if origin else Start()
        return Run.create(setup.runs_dir, setup.config.tracking.run_tag, **facts), start
    from utils.checkpointing import newest_good, put_aside_newer

    run = Run.resume(origin.run)
    try:
        record = run.record
        check_longer(run.path, record, setup.config, setup.max_iters)
        checkpoint = newest_good(run.path / CHECKPOINTS, strict=origin.strict, warn=terminal.warn)
        start = Start(checkpoint, "resume") if checkpoint else start_of_parent(record, terminal.warn)
        step = start.step
        for what, before, now in changed_facts(record, setup, git):
            terminal.warn(f"{what} was {before} when {run.id} was started and is {now} now: numbers may differ")
        cut_logs(run.path / "logs", checkpoint.state["log_offsets"] if checkpoint else {})
        put_aside_newer(run.path / CHECKPOINTS, step)
        run.restart(argv, step, git=git.summary())
    except BaseException:
        run.release()
        raise
    return run, start


def start_of_parent(record: Mapping[str, Any], warn: Callable[[str], None]) -> Start:
    """Where a run without a checkpoint of its own begins again: at step 0, or where it came from.

    Raises:
        UserError: the checkpoint of its parent is not there any more.
    """
    from utils.checkpointing import choose_checkpoint

    parent = record.get("parent")
    if parent is None:
        return Start()
    folder = Path(parent["path"]) / CHECKPOINTS
    return Start(choose_checkpoint(folder, str(parent["step"]), strict=True, warn=warn), parent["relation"])


def changed_facts(record: Mapping[str, Any], setup: Setup, git: GitFacts) -> Iterator[tuple[str, Any, Any]]:
    """What is not as it was when the run was started, and matters for its numbers: (what, before, now)."""
    import torch

    from utils.device import processor_name

    resolved, git_before, git_now = record.get("resolved") or {}, record.get("git") or {}, git.summary()
    now = {"torch": torch.__version__, "processor": processor_name(setup.device)}
    for key, value in now.items():
        if resolved.get(key, value) != value:
            yield key, resolved[key], value
    if git_before.get("commit") != git_now.get("commit"):
        yield "the commit", git_before.get("commit"), git_now.get("commit")


def absolute_dataset(loaded: LoadedConfig, root: Path) -> LoadedConfig:
    """A dataset that is a path, made absolute: the recorded configuration must mean the same from every folder.

    A path in a file of configs/ starts from `root`, one from a flag or from code where it was typed.
    """
    from data import CORPORA

    data, source = loaded.config.data, loaded.source("dataset")
    if data.dataset in CORPORA:
        return loaded
    start = Path.cwd() if source.startswith("--") or source == "code" else root
    path = Path(os.path.abspath(start / os.path.expanduser(data.dataset)))
    if not path.exists():
        return loaded  # the corpus gate names what was written
    config = loaded.config.model_copy(update={"data": data.model_copy(update={"dataset": str(path)})})
    return LoadedConfig(config, loaded.layers)


def read_git(setup: Setup) -> GitFacts:
    """The state of the code; what runs, corpora and trackers keep is not code."""
    tracking, data = setup.config.tracking, setup.config.data
    kept = (setup.runs_dir, setup.root / tracking.aim_repo / ".aim", setup.root / data.corpora_dir, Path(data.dataset))
    return MetadataCapture(setup.root, excluded=kept).git_facts()


def write_meta(setup: Setup, run: Run, git: GitFacts) -> None:
    """meta/ and notes.json: the code, the environment, the tokenizer, the configuration with its sources."""
    from utils.device import device_facts

    meta, tracking = run.path / "meta", setup.config.tracking
    if not setup.resumes:  # these say how the run was started
        setup.corpus.tokenizer.save(run.path / TOKENIZER)
        MetadataCapture.write(meta, git, device_facts(setup.device))
        if tracking.tags or tracking.note:
            write_json(run.path / "notes.json", {"tags": list(tracking.tags), "note": tracking.note, "pinned": False})
    write_json(meta / "config_sources.json", setup.loaded.sources_json())
    write_json(meta / "full_config.json", setup.loaded.config.model_dump(mode="json"))  # last: with it a run can resume


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
    from utils.checkpointing import Checkpointer
    from utils.step_buffer import NonFiniteError
    from utils.training import training_loop

    began = time.monotonic()
    log: RunLog | None = None
    state: TrainState | None = None
    feeders: Feeders | None = None
    checkpoints: Checkpointer | None = None
    recorder: FlightRecorder | None = None
    status: Status = "failed"
    reason: str | None = None
    exported: str | None = None
    try:
        terminal.attach(run.path / "logs" / "train.log")
        write_meta(setup, run, git)
        log = RunLog(run.path / "logs")
        state = prepare_run(setup, run, start, terminal)
        feeders = build_feeders(setup, run, state, terminal)
        recorder = build_recorder(state)
        settings, saved_step = setup.config.train, state.step if start.own else None
        folder, config_hash = run.path / CHECKPOINTS, run.record["config_hash"]
        checkpoints = Checkpointer(folder, settings, config_hash, log, terminal.warn, saved_step)

        with TrainingProgress(terminal, setup.max_iters, state.step) as progress:
            training_loop(state, log, progress, stop, deadline, checkpoints, recorder, feeders.start)
        checkpoints.wait()
        if state.finished:
            exported = export(state, run, terminal)
            status, reason = "completed", state.early_stopping.reason if state.early_stopping.stopped else None
        else:
            status, reason = "interrupted", stop.reason
    except NonFiniteError as error:
        status, reason = "diverged", str(error)
    except KeyboardInterrupt:
        stop.signum = stop.signum or signal.SIGINT
        status, reason = "interrupted", f"{signal.Signals(stop.signum).name}, at once"
    except BaseException as error:
        reason = f"{type(error).__name__}: {error}"
        terminal.print(traceback.format_exc(), log_only=True)
        terminal.print(f"failed after {duration(time.monotonic() - began)}: {relative_name(run.path, setup.root)}")
        raise
    finally:
        stop.patient = False  # from here on a signal ends the waiting
        if recorder is not None and status in ("diverged", "failed"):
            dump_flight_recorder(recorder, run, reason or status, terminal)
        if checkpoints is not None and status != "interrupted":
            with contextlib.suppress(KeyboardInterrupt):
                checkpoints.wait()
        summary = close_run(run, log, feeders, state, status, reason, terminal, deadline)
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


def build_recorder(state: TrainState) -> FlightRecorder:
    from utils.flight_recorder import FlightRecorder

    groups = [group["name"] for group in state.optimizer.param_groups]
    return FlightRecorder(state.device, groups, state.sampler.train_offsets)


def dump_flight_recorder(recorder: FlightRecorder, run: Run, reason: str, terminal: Terminal) -> None:
    """artifacts/flight_recorder.json; where it cannot be written, one warning, for worse has happened already."""
    path = run.path / "artifacts" / "flight_recorder.json"
    try:
        recorder.dump(path, reason)
    except (OSError, RuntimeError) as error:  # RuntimeError: a GPU that has failed gives no numbers back
        terminal.warn(f"{path.name} was not written: {error}")


def prepare_run(setup: Setup, run: Run, start: Start, terminal: Terminal) -> TrainState:
    """Model and optimizer (from a checkpoint, if there is one), the resolved values in run.json, the start-up facts."""
    import torch

    from utils.device import is_deterministic, processor_name
    from utils.train_state import branch, build_state, load_weights, restore

    config, corpus = setup.config, setup.corpus
    state = build_state(config, setup.max_iters, corpus, setup.device, setup.dtype, terminal)
    if start.checkpoint is not None:
        take_over = {"resume": restore, "fork": branch, "init": load_weights}[start.relation]
        take_over(state, start.checkpoint)
    deterministic = is_deterministic(config.train, setup.device)
    decisive = {
        "deterministic": deterministic,
        **derived_settings(config, setup.max_iters),
        "device": setup.device.type,
        "dtype": str(setup.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "dataset": corpus.hash,
        "corpus_hash": corpus.hash,
        "tokenizer_hash": corpus.tokenizer.hash(),
    }
    parameters = state.model.num_parameters()
    run.update(
        resolved={
            **decisive,
            "dataset": corpus.name,
            "device": str(setup.device),
            "compiled": state.forward is not state.model,
            "vocab_size": corpus.tokenizer.vocab_size,
            "train_tokens": corpus.n_train,
            "val_tokens": corpus.n_val,
            "epochs": round(setup.epochs, 4),
            "parameters": parameters,
            "torch": torch.__version__,
            "processor": processor_name(setup.device),
            "guarantee": BIT_EXACT if deterministic else NOT_EXACT,
        },
        config_hash=config_hash(config, decisive),
    )
    terminal.print(
        facts(
            [
                ("run", run.id),
                ("device", f"{setup.device}, {decisive['dtype']}, {decisive['threads']} CPU threads"),
                ("corpus", f"{corpus.name}: {corpus.n_train:,} training and {corpus.n_val:,} validation tokens"),
                ("epochs", f"{setup.epochs:.2f} in {setup.max_iters:,} steps of {state.tokens_per_step:,} tokens"),
                ("parameters", f"{parameters:,}, {corpus.n_train / parameters:.2f} training tokens per parameter"),
                *([("start", start_words(setup, start))] if setup.origin else []),
            ]
        )
    )
    return state


def start_words(setup: Setup, start: Start) -> str:
    """Where training starts from, for the start-up facts."""
    if start.checkpoint is None:
        return "again at step 0: there is no checkpoint yet"
    if start.own:
        return f"resumed at step {start.step:,}"
    parent, step = start.checkpoint.path.parent.parent.parent.name, start.checkpoint.step
    words = (
        f"forked from {parent} at step" if start.relation == "fork" else f"step 0 with the weights of {parent} at step"
    )
    return f"{words} {step:,}" + (", again: there is no checkpoint yet" if setup.resumes else "")


def build_feeders(setup: Setup, run: Run, state: TrainState, terminal: Terminal) -> Feeders:
    """One feeder for TensorBoard, and one for Aim where it is asked for and installed; not started yet."""
    from utils.tracking import Feeder, Feeders, RunFacts, View
    from utils.tracking.aim import AimView, aim_is_installed
    from utils.tracking.tensorboard import TensorBoardView

    tracking = setup.config.tracking
    run_facts = RunFacts(
        id=run.id,
        path=run.path,
        tag=tracking.run_tag,
        experiment=tracking.experiment,
        tags=tracking.tags,
        note=tracking.note,
        hparams=setup.config.model_dump(mode="json"),
        git=run.record["git"],
        model_summary={
            "parameters": state.model.num_parameters(),
            "vocab_size": state.model.vocab_size,
            "train_tokens": setup.corpus.n_train,
            "max_iters": setup.max_iters,
            "device": str(setup.device),
        },
    )
    views: list[View] = [TensorBoardView(run_facts, run.path / "logs" / "tensorboard")]
    if tracking.aim_logging and aim_is_installed():
        known = run.record["views"].get("aim", {})
        repo = setup.root / tracking.aim_repo
        views.append(AimView(run_facts, repo, known.get("hash") if known.get("repo") == str(repo) else None))
    elif tracking.aim_logging:
        terminal.warn("aim_logging is on but Aim is not installed: this run is not fed to Aim")
        run.update_view("aim", state="off", reason="not installed")
    budget = tracking.tracking_budget / len(views)
    resumed_step = state.step if setup.resumes else None
    logs_dir = run.path / "logs"
    feeders = [Feeder(view, logs_dir, budget, run.update_view, terminal.warn, resumed_step) for view in views]
    return Feeders(feeders, terminal.warn, run.update_view)


def export(state: TrainState, run: Run, terminal: Terminal) -> str:
    """artifacts/export from the chosen weights, those of the last step or of the best val/loss; which, in words."""
    from utils.checkpoint import CheckpointError, read_checkpoint
    from utils.checkpointing import best_path
    from utils.export import save_export
    from utils.train_state import load_weights

    step, losses, which = state.step, dict(state.losses or {}), "last"
    if state.config.train.exports_best and state.best_step == state.step:
        which = "best"
    elif state.config.train.exports_best:
        try:
            path = best_path(run.path / CHECKPOINTS)
            if path is None:
                raise CheckpointError("the best checkpoint is not there")
            checkpoint = read_checkpoint(path)
            load_weights(state, checkpoint)
            step, losses, which = checkpoint.step, checkpoint.state["losses"], "best"
        except CheckpointError as error:
            terminal.warn(f"{error}: the export is made from the last weights")
    training: dict[str, Any] = {
        "run": run.id,
        "weights": which,
        "step": step,
        **{name: encode_number(decode_number(loss)) for name, loss in losses.items()},
        "dataset": state.corpus.name,
        "corpus_hash": state.corpus.hash,
    }
    save_export(run.path / "artifacts" / "export", state.model, state.corpus.tokenizer, training)
    return f"{which} weights, of step {step:,}"


def close_run(
    run: Run,
    log: RunLog | None,
    feeders: Feeders | None,
    state: TrainState | None,
    status: Status,
    reason: str | None,
    terminal: Terminal,
    deadline: Deadline,
) -> dict[str, float]:
    """Sync the logs, write the end into run.json, close the views; the summary."""
    from utils.tracking import CLOSING_SECONDS, RunEnd

    summary: dict[str, float] = {}
    if state is not None and state.losses is not None:
        summary = {**state.losses, "best_val_loss": state.best_val_loss}
    try:
        if log is not None:
            log.close()
    finally:  # before the views: whoever kills the process while they are fed finds the true status
        run.finish(
            status,
            reason,
            last_step=state.step if state else None,
            summary={name: encode_number(value) for name, value in summary.items()},
            best_step=state.best_step if state else None,
        )
    if feeders is not None:
        end = RunEnd(status, summary, state.step if state else 0)
        left = deadline.seconds_left
        feeders.finish(end, terminal.print, CLOSING_SECONDS if left is None else max(1.0, min(left, CLOSING_SECONDS)))
    return summary


def print_result(result: TrainResult, run: Run, setup: Setup, terminal: Terminal) -> None:
    """Losses, time, where things are, and what to type next."""
    where = relative_name(run.path, setup.root)
    rows = [("status", result.status + (f": {result.exit_reason}" if result.exit_reason else ""))]
    if result.val_loss is not None:
        rows.append(
            ("last losses", f"train {result.train_loss:.4f}, val {result.val_loss:.4f} at step {result.losses_step:,}")
        )
        rows.append(("best val loss", f"{result.best_val_loss:.4f} at step {result.best_step:,}"))
    rows += [
        ("steps", f"{result.steps:,} of {setup.max_iters:,} in {duration(result.seconds)}"),
        ("parameters", f"{result.parameters:,}"),
        ("run directory", where),
    ]
    if result.status == "completed":
        rows.append(("export", f"{where}/artifacts/export ({result.exported})"))
    terminal.print("", facts(rows))
    runs_dir = relative_name(setup.runs_dir, setup.root)
    commands = [("curves", f"{_program('tensorboard', setup.root)} --logdir {shlex.quote(runs_dir)}")]
    if run.record["views"].get("aim", {}).get("state", "off") != "off":
        commands.append(("compare runs", _program("aim", setup.root) + " up" + _aim_repo_flag(setup)))
    name = run.record["tag"] if run.record["tag"] and is_default_runs_dir(run.path.parent) else shlex.quote(where)
    if result.status == "interrupted":
        commands.append(("go on", f"{_program('python', setup.root)} train.py --resume {name}"))
    if result.status == "completed":
        commands.append(("generate", f'{_program("python", setup.root)} inference.py {name} --prompt "The "'))
    terminal.print("", facts(commands, title="Next"))


def is_default_runs_dir(folder: Path) -> bool:
    """Whether scripts look for runs in `folder` without being told to."""
    try:
        runs_dir = ConfigLoader(PROJECT_ROOT).load().config.tracking.runs_dir
    except ConfigError:
        return False
    return (PROJECT_ROOT / runs_dir).resolve() == folder.resolve()


def _program(name: str, root: Path) -> str:
    """How to call a program of this environment: by name where PATH finds it, else by its path."""
    path = Path(sys.executable).parent / name
    if (found := shutil.which(name)) and Path(found).parent == path.parent:
        return name
    return str(path.relative_to(root)) if path.is_relative_to(root) else str(path)


def _aim_repo_flag(setup: Setup) -> str:
    repo = setup.config.tracking.aim_repo
    return "" if repo == "." else f" --repo {relative_name(setup.root / repo, setup.root)}"


if __name__ == "__main__":
    sys.exit(main())
