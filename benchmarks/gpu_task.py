"""Shared by the jobs of benchmarks.gpu: their task, the settings of the runs that they time, their reports."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import load_config
from utils.config.fields import FIELDS
from utils.config.loader import LoadedConfig
from utils.runs.layout import TRAIN_LOG
from utils.terminal.cli import PROJECT_ROOT

MARK = "measured:"  # begins each line with the results so far
PRESETS = PROJECT_ROOT / "configs" / "presets"
NEVER = str(10**9)  # steps
NOT_YET = frozenset(("cuda_graph", "fp8", "activation_checkpointing"))  # settings that some versions do not have
COMPILER_FACTS = ("compiled", "compile_seconds")  # of run.json
TARGET = 1.47  # nats per character: what nanoGPT reports for its GPU recipe

Overrides = Mapping[str, str | bool]

# Sizes of a dry run: they show that everything works, and their times mean nothing.
TINY: Overrides = {
    "n_layer": "1",
    "n_head": "2",
    "n_embd": "16",
    "block_size": "16",
    "batch_size": "4",
    "gradient_accumulation_steps": "1",
    "eval_iters": "1",
    "compile": False,
    "threads": "1",
}
QUIET: Overrides = {"eval_interval": NEVER, "eval_iters": "1", "sample_tokens": "0"}  # nothing but steps
AS_NANOGPT: Overrides = {"bias": False, "mlp": "gelu"}  # of gpt2_124m: the model that nanoGPT's bench.py times
NO_CHECKPOINTS: Overrides = {
    "checkpoint_interval": "0",
    "checkpoint_minutes": "none",
    "keep_best": False,
    "export_weights": "last",
}


@dataclass(frozen=True)
class Task:
    """The input of a job.

    folder: where it writes.
    text: the corpus of the small models; words: a text with as many different characters as GPT-2 has tokens.
    nanogpt: a prepared copy of nanoGPT; None: there is none to compare with.
    repeats: measurements of each arm.
    dry: tiny sizes on the CPU.
    """

    folder: str
    text: str
    words: str
    nanogpt: str | None
    repeats: int
    dry: bool

    @property
    def device(self) -> str:
        return "cpu" if self.dry else "cuda"

    @property
    def target(self) -> float:
        """The validation loss to reach; in a dry run every evaluation is below it."""
        return 100.0 if self.dry else TARGET

    def overrides(self, *more: Overrides, text: str | None = None) -> dict[str, str | bool]:
        """The settings of a run that differ from its preset, minus those of NOT_YET that this version does not have.

        Args:
            more: later ones win, except over the sizes of a dry run.
            text: the dataset (default: that of the small models).
        """
        places: Overrides = {"dataset": text or self.text, "corpora_dir": str(Path(self.folder) / "corpora")}
        merged = {**places, "aim_logging": False, "device": self.device}
        for settings in (*more, TINY if self.dry else {}):
            merged |= settings
        return {key: value for key, value in merged.items() if key in FIELDS or key not in NOT_YET}

    def load(self, preset: str, folder: Path, *more: Overrides, text: str | None = None) -> LoadedConfig:
        """A preset with `overrides`; its runs go into `folder`."""
        return load_config([PRESETS / f"{preset}.yaml"], folder, self.overrides(*more, text=text))

    def command(self, preset: str, folder: Path, *more: Overrides, text: str | None = None) -> list[str]:
        """The same as a command line of train.py."""
        places = [f"--runs-dir={folder / 'runs'}", f"--aim-repo={folder}"]
        flags = flags_of(self.overrides(*more, text=text))
        return [sys.executable, "train.py", "--config", str(PRESETS / f"{preset}.yaml"), *places, *flags]

    def make_folder(self, name: str) -> Path:
        """A new folder for the runs of one arm."""
        base, number = Path(self.folder) / name, 1
        while (path := base if number == 1 else base.with_name(f"{name}_{number}")).exists():
            number += 1
        path.mkdir(parents=True)
        return path


def flags_of(overrides: Overrides) -> list[str]:
    """Settings as flags of train.py."""
    flags = []
    for key, value in overrides.items():
        name = key.replace("_", "-")
        flags.append(f"--{name}={value}" if isinstance(value, str) else f"--{name}" if value else f"--no-{name}")
    return flags


def report(results: Mapping[str, Any]) -> None:
    """Print the results so far; the last line of a process counts, so that a later failure loses nothing."""
    print(MARK, json.dumps(results), flush=True)


def read_report(line: str) -> dict[str, Any] | None:
    """The results in a line of output; None if it is another line or an incomplete one."""
    if not line.startswith(MARK):
        return None
    try:
        found = json.loads(line.removeprefix(MARK), parse_constant=lambda name: None)  # NaN and infinity are not JSON
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def warnings_of(run: Path) -> list[str]:
    """The warnings that a run printed, such as that something could not be compiled or recorded."""
    try:
        lines = (run / TRAIN_LOG).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    return [line[:300] for line in lines if line.startswith(("warning: ", "preflight: "))][:5]


def median(values: Sequence[float]) -> float | None:
    """The median; None without values."""
    import statistics

    return statistics.median(values) if values else None
