"""The result of a run: a value for the caller, and a summary for the user with the next commands to type."""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.config.loader import ConfigError, ConfigLoader, relative_name
from utils.errors import UserError
from utils.files import real_path
from utils.runs.find import resolve_run
from utils.runs.layout import EXPORT
from utils.runs.run import Run, Status
from utils.terminal.cli import INSTALLED, PROJECT_ROOT
from utils.terminal.commands import print_json
from utils.terminal.words import bits_text, duration, fact_lines

if TYPE_CHECKING:
    from utils.terminal.console import Terminal
    from utils.training.setup import Setup

PROMPT = "The "  # in the printed command that generates text
FAR_WORSE = 1.1  # times the best val/loss: a last loss above it gets a warning


@dataclass(frozen=True)
class TrainResult(Mapping[str, Any]):
    """How a run ended. Losses are in nats per token, or None if there was no evaluation.

    It is a mapping as well: `results["val_loss"]` is `results.val_loss`.

    >>> results: TrainResult = train(max_iters=20, quiet=True)
    >>> results.status, results["steps"], results["val_loss"] == results.val_loss
    ('completed', 20, True)
    """

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
    exported: str | None = None  # which weights were exported, in words
    signum: int | None = None
    val_bits_per_byte: float | None = None  # val_loss per byte of the text instead of per token
    val_loss_without_leaks: float | None = None  # without documents that are near-duplicates of training documents
    unsaved: str | None = None  # if the last checkpoint was not written: why, and which is the newest, in words

    def __getitem__(self, name: str) -> Any:
        if name not in self.__dataclass_fields__:
            raise KeyError(name)
        return getattr(self, name)

    def __iter__(self) -> Iterator[str]:
        return (field.name for field in fields(self))

    def __len__(self) -> int:
        return len(fields(self))

    @property
    def warning(self) -> str | None:
        """A warning if the last weights are far worse than the best ones, which were not exported; otherwise None."""
        last, best = self.val_loss, self.best_val_loss
        if last is None or best is None or last <= FAR_WORSE * best or (self.exported or "").startswith("best"):
            return None
        of_export = ", and the export has the last weights" if self.exported else ""
        found = f"the last val/loss, {last:.4f}, is far worse than the best, {best:.4f} at step {self.best_step:,}"
        return f"{found}{of_export} (--export-weights best exports the best ones)"

    def report(self, *, as_json: bool) -> int:
        """Print the result as JSON if `as_json` (training itself prints it for people); return the exit status."""
        if as_json:
            print_json(dict(self))
        return self.exit_status

    @property
    def exit_status(self) -> int:
        """0: completed or stopped without a signal; 1: failed or diverged; 128 + its number: stopped by a signal."""
        if self.signum is not None:
            return 128 + self.signum
        return 0 if self.status in ("completed", "interrupted") else 1


def print_result(result: TrainResult, run: Run, setup: Setup, terminal: Terminal, first_step: int) -> None:
    """Print the losses, the time, where the files are, and what to type next.

    Args:
        first_step: the step at which the session began; the time is that of the session.
    """
    here = Path.cwd()
    where = shlex.quote(relative_name(run.path, here))
    export = shlex.quote(relative_name(run.path / EXPORT, here))
    rows = [("status", result.status + (f": {result.exit_reason}" if result.exit_reason else ""))]
    if result.val_loss is not None:
        rows.append(
            (
                "last losses",
                f"train {result.train_loss:.4f}, val {result.val_loss:.4f}"
                f"{bits_text(result.val_loss, result.val_bits_per_byte)} at step {result.losses_step:,}",
            )
        )
        if result.val_loss_without_leaks is not None:
            rows.append(("without leaks", f"val {result.val_loss_without_leaks:.4f}"))
        rows.append(("best val loss", f"{result.best_val_loss:.4f} at step {result.best_step:,}"))
    of_session = f", {result.steps - first_step:,} of them" if first_step else ""
    rows += [
        ("steps", f"{result.steps:,} of {setup.max_iters:,}{of_session} in {duration(result.seconds)}"),
        ("parameters", f"{result.parameters:,}"),
        ("run directory", where),
        *([("checkpoint", result.unsaved)] if result.unsaved else []),
    ]
    if result.status == "completed":
        rows.append(("export", f"{export} ({result.exported})"))
    terminal.print("", fact_lines(rows))
    if result.warning:
        terminal.warn(result.warning)
    runs_dir = shlex.quote(relative_name(run.path.parent, here))
    commands = [("curves", f"{_program('tensorboard')} --logdir {runs_dir}")]
    if run.record["views"].get("aim", {}).get("state", "off") != "off":
        commands.append(("compare runs", f"{_program('aim')} up{_aim_repo_flag(setup)}"))
    name = short_name(run)
    if result.status == "interrupted":
        commands.append(("continue", f"{script_command('train.py')} --resume {name}"))
    if result.status == "completed":
        commands.append(("generate", f"{script_command('inference.py')} {name}{_prompt_flag(setup)}"))
    terminal.print("", fact_lines(commands, title="Next", copied=True))


def short_name(run: Run) -> str:
    """How a command names the run: by its tag, or by its directory if scripts would not find it by its tag."""
    tag, runs_dir = run.record["tag"], run.path.parent
    usable = tag and not tag.startswith("-") and is_default_runs_dir(runs_dir)  # a dash would begin a flag
    if usable and real_path(resolve_run(tag, runs_dir)) == real_path(run.path):
        return str(tag)
    return shlex.quote(relative_name(run.path, Path.cwd()))


def rebuild_command(run: Run, view: str) -> str:
    """The command that rebuilds a view of the run from its log."""
    name = run.id if is_default_runs_dir(run.path.parent) else shlex.quote(str(run.path))
    return f"{script_command('experiments.py')} rebuild {name} --{view}"


def script_command(script: str) -> str:
    """The command that calls a script of this project from the current folder, in this environment."""
    if INSTALLED:
        return f"{_program('lm-workbench')} {script.removesuffix('.py').removesuffix('_model')}"
    return f"{_program('python')} {shlex.quote(relative_name(PROJECT_ROOT / script, Path.cwd()))}"


def is_default_runs_dir(folder: Path) -> bool:
    """Whether scripts look for runs in `folder` by default."""
    try:
        runs_dir = ConfigLoader(PROJECT_ROOT).load().config.tracking.runs_dir
    except ConfigError:
        return False
    return real_path(PROJECT_ROOT / runs_dir) == real_path(folder)


def _program(name: str) -> str:
    """The command that calls a program of this environment: its name if PATH finds it, or its path from here."""
    path, here = Path(sys.executable).parent / name, Path.cwd()
    if (found := shutil.which(name)) and Path(found).parent == path.parent:
        return name
    return shlex.quote(str(path.relative_to(here) if path.is_relative_to(here) else path))  # links are not resolved


def _aim_repo_flag(setup: Setup) -> str:
    repo = setup.config.tracking.aim_repo
    if repo.startswith("aim://"):
        return "  (on the machine of the aim server)"
    name = relative_name(setup.root / repo, Path.cwd())
    return "" if name == "." else f" --repo {shlex.quote(name)}"


def _prompt_flag(setup: Setup) -> str:
    """The --prompt flag of the command that generates text; empty if the vocabulary lacks its characters."""
    try:
        setup.corpus.tokenizer.encode(PROMPT)
    except UserError:
        return ""
    return f' --prompt "{PROMPT}"'
