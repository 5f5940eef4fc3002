"""One training experiment: configuration -> run directory -> training loop -> export.

    python train.py --run-tag baseline
    python train.py --config configs/presets/shakespeare_cpu.yaml --n-embd 256
    python train.py --help

Or from a notebook: `from train import train; result = train(Config(...), quiet=True)`.
"""

from __future__ import annotations

import math
import os
import shlex
import shutil
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.cli import PROJECT_ROOT, Parser, parse_experiment, script
from utils.config import Config, RuleError, config_hash, derived_settings, warmup_steps
from utils.config_loader import LoadedConfig, relative_name, rule_error
from utils.console import Terminal, TrainingProgress, duration, facts, settings_table
from utils.files import write_json
from utils.metadata import GitFacts, MetadataCapture
from utils.run_log import RunLog, encode_number
from utils.run_manager import Run, Status
from utils.signals import StopRequest, stop_on_signals

if TYPE_CHECKING:  # torch takes a second to import: --help and mistakes must not wait for it
    import torch

    from data import Corpus
    from utils.tracking import Feeders
    from utils.training import TrainState


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
    signum: int | None = None

    @property
    def exit_status(self) -> int:
        """0 completed, 1 failed or diverged, 128 + signal number after a signal."""
        if self.status == "interrupted":
            return 128 + (self.signum or 2)
        return 0 if self.status == "completed" else 1


@dataclass(frozen=True)
class Setup:
    """What the three gates found, before a directory is made."""

    root: Path
    loaded: LoadedConfig
    corpus: Corpus
    device: torch.device
    dtype: torch.dtype
    max_iters: int

    @property
    def config(self) -> Config:
        return self.loaded.config

    @property
    def runs_dir(self) -> Path:
        return self.root / self.config.tracking.runs_dir

    @property
    def epochs(self) -> float:
        """Passes over the training tokens that the run will make."""
        tokens = self.max_iters * self.config.train.batch_size * self.config.model.block_size
        return tokens / self.corpus.n_train


@script
def main(argv: Sequence[str]) -> int:
    parser = Parser(prog="train.py", description=__doc__)
    _, loaded = parse_experiment(argv, parser)
    return train(loaded, argv=("train.py", *argv)).exit_status


def train(
    config: Config | LoadedConfig, *, quiet: bool = False, argv: Sequence[str] = (), root: Path = PROJECT_ROOT
) -> TrainResult:
    """Run one experiment.

    Args:
        config: the merged configuration, with or without the sources of its values.
        quiet: print warnings only.
        argv: the command line, for the record.
        root: the folder that relative paths start from.

    Returns:
        How it ended; also for a run that diverged or was interrupted.

    Raises:
        UserError: a mistake found before the run directory is made.
        Exception: whatever ended the run, after its status was written.
    """
    terminal = Terminal(quiet)
    setup = check_gates(config if isinstance(config, LoadedConfig) else LoadedConfig.from_config(config), root)
    from utils.device import torch_settings

    terminal.print(settings_table(setup.loaded.non_default()))
    git = read_git(setup)
    with stop_on_signals() as stop, torch_settings(setup.config.train, setup.device):
        run = Run.create(setup.runs_dir, setup.config.tracking.run_tag, argv=list(argv), git=git.summary())
        try:
            terminal.attach(run.path / "logs" / "train.log")
            write_meta(setup, run, git)
            return run_experiment(setup, run, terminal, stop)
        finally:
            run.release()
            terminal.close()


def check_gates(loaded: LoadedConfig, root: Path) -> Setup:
    """Corpus and device; the configuration was validated when it was made.

    Raises:
        UserError: with the first thing that is not as it must be.
    """
    from data import load_corpus
    from utils.device import choose_device, choose_dtype
    from utils.generation import start_tokens

    loaded = absolute_dataset(loaded, root)
    config = loaded.config
    corpus = load_corpus(config.data, config.model.block_size, root / config.data.corpora_dir)
    start_tokens(corpus.tokenizer, config.tracking.sample_prompt)
    max_iters = config.train.max_iters
    if max_iters is None:
        assert config.train.epochs is not None
        max_iters = math.ceil(config.train.epochs * corpus.n_train / config.train.batch_size / config.model.block_size)
        try:
            warmup_steps(config.optimizer, max_iters)
        except RuleError as error:
            raise rule_error(error, loaded) from None
    device = choose_device(config.train.device)
    return Setup(root, loaded, corpus, device, choose_dtype(config.train.dtype, device), max_iters)


def absolute_dataset(loaded: LoadedConfig, root: Path) -> LoadedConfig:
    """A dataset that is a path, made absolute: the recorded configuration must mean the same from every folder.

    A path in a file of configs/ starts from `root`, one from a flag or from code where it was typed.
    """
    from data import CORPORA

    data, source = loaded.config.data, loaded.source("dataset")
    if data.dataset in CORPORA:
        return loaded
    start = Path.cwd() if source.startswith("--") or source == "code" else root
    path = Path(os.path.abspath(start / Path(data.dataset).expanduser()))
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
    """meta/ and notes.json: the configuration with its sources, the code, the environment."""
    from utils.device import device_facts

    meta, tracking = run.path / "meta", setup.config.tracking
    write_json(meta / "full_config.json", setup.config.model_dump(mode="json"))
    write_json(meta / "config_sources.json", setup.loaded.sources_json())
    MetadataCapture.write(meta, git, device_facts(setup.device))
    if tracking.tags or tracking.note:
        write_json(run.path / "notes.json", {"tags": list(tracking.tags), "note": tracking.note, "pinned": False})


def run_experiment(setup: Setup, run: Run, terminal: Terminal, stop: StopRequest) -> TrainResult:
    """Train inside a run directory; whatever happens, its status, logs and views are closed."""
    from utils.step_buffer import NonFiniteLossError
    from utils.training import training_loop

    began = time.monotonic()
    log = RunLog(run.path / "logs")
    state: TrainState | None = None
    feeders: Feeders | None = None
    status: Status = "failed"
    reason: str | None = None
    try:
        state = prepare_run(setup, run, terminal)
        feeders = build_feeders(setup, run, state, terminal)

        with TrainingProgress(terminal, setup.max_iters) as progress:
            training_loop(state, log, progress, stop, feeders.start)
        if state.step == setup.max_iters:
            export(state, run)
            status = "completed"
        else:
            status, reason = "interrupted", stop.name
    except NonFiniteLossError as error:
        status, reason = "diverged", str(error)
    except KeyboardInterrupt:
        status, reason = "interrupted", f"{stop.name or 'SIGINT'}, at once"
    except BaseException as error:
        reason = f"{type(error).__name__}: {error}"
        terminal.print(traceback.format_exc(), log_only=True)
        terminal.print(f"failed after {duration(time.monotonic() - began)}: {relative_name(run.path, setup.root)}")
        raise
    finally:
        stop.patient = False  # from here on a signal ends the waiting
        summary = close_run(run, log, feeders, state, status, reason, terminal)
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
        signum=stop.signum,
    )
    print_result(result, run, setup, terminal)
    return result


def prepare_run(setup: Setup, run: Run, terminal: Terminal) -> TrainState:
    """Model and optimizer, the resolved values in run.json, the start-up facts."""
    import torch

    from utils.training import build_state

    config, corpus = setup.config, setup.corpus
    state = build_state(config, setup.max_iters, corpus, setup.device, setup.dtype, terminal)
    decisive = {
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
            ]
        )
    )
    return state


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
        views.append(AimView(run_facts, setup.root / tracking.aim_repo))
    elif tracking.aim_logging:
        terminal.warn("aim_logging is on but Aim is not installed: this run is not fed to Aim")
        run.update_view("aim", state="off", reason="not installed")
    budget = tracking.tracking_budget / len(views)
    feeders = [Feeder(view, run.path / "logs", budget, run.update_view, terminal.warn) for view in views]
    return Feeders(feeders, terminal.warn, run.update_view)


def export(state: TrainState, run: Run) -> None:
    """artifacts/export from the final weights."""
    from utils.export import save_export

    training: dict[str, Any] = {
        "run": run.id,
        "step": state.step,
        **{name: encode_number(loss) for name, loss in (state.losses or {}).items()},
        "dataset": state.corpus.name,
        "corpus_hash": state.corpus.hash,
    }
    save_export(run.path / "artifacts" / "export", state.model, state.corpus.tokenizer, training)


def close_run(
    run: Run,
    log: RunLog,
    feeders: Feeders | None,
    state: TrainState | None,
    status: Status,
    reason: str | None,
    terminal: Terminal,
) -> dict[str, float]:
    """Sync the logs, write the end into run.json, close the views; the summary."""
    from utils.tracking import RunEnd

    summary: dict[str, float] = {}
    if state is not None and state.losses is not None:
        summary = {**state.losses, "best_val_loss": state.best_val_loss}
    try:
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
        feeders.finish(RunEnd(status, summary), terminal.print)
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
        rows.append(("export", f"{where}/artifacts/export"))
    terminal.print("", facts(rows))
    runs_dir = relative_name(setup.runs_dir, setup.root)
    commands = [("curves", f"{_program('tensorboard', setup.root)} --logdir {shlex.quote(runs_dir)}")]
    if run.record["views"].get("aim", {}).get("state", "off") != "off":
        commands.append(("compare runs", _program("aim", setup.root) + " up" + _aim_repo_flag(setup)))
    if result.status == "completed":
        found_by_tag = run.record["tag"] and not setup.loaded.source("runs_dir").startswith("--")
        name = run.record["tag"] if found_by_tag else shlex.quote(where)
        commands.append(("generate", f'{_program("python", setup.root)} inference.py {name} --prompt "The "'))
    terminal.print("", facts(commands, title="Next"))


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
