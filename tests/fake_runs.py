"""Writes run directories as a training leaves them, without training."""

from __future__ import annotations

import fcntl
import json
import os
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from utils.config.fields import SECTION_OF
from utils.config.loader import LoadedConfig
from utils.config.settings import Config
from utils.runs.index import IndexedRun, read_run
from utils.runs.log import HISTOGRAMS_FILE, METRICS_FILE, SAMPLES_FILE

PARENT = {"path": "/runs/mother", "step": 1, "relation": "fork"}  # and "run"
GIT = {"commit": "c" * 40, "branch": "main", "dirty": False, "remote": None}
RESOLVED = {
    "corpus_hash": "corpus",
    "tokenizer_hash": "tokenizer",
    "vocab_size": 65,
    "train_tokens": 900,
    "val_tokens": 100,
    "parameters": 1000,
    "torch": "2.4.0",
    "processor": "a processor",
    "device": "cpu",
    "dtype": "float32",
}


def config_of(**settings: Any) -> Config:
    """A configuration with some settings by leaf name."""
    sections: dict[str, dict[str, Any]] = {}
    for key, value in settings.items():
        sections.setdefault(SECTION_OF[key], {})[key] = value
    return Config.model_validate(sections)


def record_of(run_id: str, **facts: Any) -> dict[str, Any]:
    """The run.json of a completed run: the fields of Run.create and those that are added later."""
    return {
        "schema_version": 1,
        "id": run_id,
        "tag": None,
        "status": "completed",
        "exit_reason": None,
        "start": "2026-01-31T14:25:01.000+00:00",
        "end": "2026-01-31T14:25:11.500+00:00",
        "pid": 1,
        "host": socket.gethostname(),
        "last_step": 100,
        "summary": {"val/loss": 2.5, "train/eval_loss": 2.25, "best_val_loss": 2.0},
        "parent": None,
        "resumes": [],
        "views": {},
        "best_step": 50,
        "argv": ["train.py"],
        "git": GIT,
        "config_hash": "h" * 64,
        "resolved": RESOLVED,
        **facts,
    }


def write(path: Path, content: str | bytes | Any) -> Path:
    """Write a file and create its folders; content that is neither text nor bytes is written as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not isinstance(content, str | bytes):
        content = json.dumps(content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return path


def log_lines(records: Iterable[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def training_records(losses: Sequence[Any], interval: int = 10) -> list[dict[str, Any]]:
    """Records with a val/loss every `interval` steps; a step takes a second and a hundred tokens."""
    return [
        {"step": i * interval, "time": 1000.0 + i * interval, "tokens": 100 * i * interval, "val/loss": loss}
        for i, loss in enumerate(losses)
    ]


def make_run(
    runs_dir: Path,
    run_id: str,
    *,
    settings: Mapping[str, Any] | None = None,
    metrics: Iterable[Mapping[str, Any]] = (),
    histograms: Iterable[Mapping[str, Any]] = (),
    samples: Iterable[Mapping[str, Any]] = (),
    notes: Mapping[str, Any] | None = None,
    checkpoints: Mapping[int, int] | None = None,
    patch: str = "",
    **facts: Any,
) -> Path:
    """Write a run directory.

    Args:
        settings: the settings that differ from the defaults, by leaf name.
        checkpoints: the size in bytes of the checkpoint of each step.
        patch: the content of meta/code.patch.
        facts: fields of run.json.
    """
    path = runs_dir / run_id
    config = config_of(**(settings or {}))
    write(path / "run.json", record_of(run_id, **facts))
    write(path / "lock", "")
    write(path / "notes.json", {"tags": [], "note": "", "pinned": False, **(notes or {})})
    write(path / "meta" / "full_config.json", config.model_dump(mode="json"))
    write(path / "meta" / "config_sources.json", LoadedConfig.from_config(config).sources_json())
    write(path / "meta" / "env.txt", "python: 3.11.2 (CPython)\npackages:\n  torch==2.4.0\n")
    write(path / "meta" / "code.patch", patch)
    write(path / "logs" / METRICS_FILE, log_lines(metrics))
    write(path / "logs" / HISTOGRAMS_FILE, log_lines(histograms))
    write(path / "logs" / SAMPLES_FILE, log_lines(samples))
    for step, size in (checkpoints or {}).items():
        write(path / "artifacts" / "checkpoints" / f"step_{step:06d}" / "model.safetensors", b"x" * size)
    return path


def indexed(runs_dir: Path, run_id: str = "run", **facts: Any) -> IndexedRun:
    """A run of `make_run`, as the index reads it."""
    return read_run(make_run(runs_dir, run_id, **facts))


@contextmanager
def held_lock(run: Path) -> Iterator[None]:
    """Hold the lock of a run, as its training does; flock also excludes another handle of the same process."""
    handle = os.open(run / "lock", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)
