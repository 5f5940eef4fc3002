"""The interface of a view: a tracker (TensorBoard, Aim, Weights & Biases) that is fed from a run's logs.

A view never touches the training loop. A feeder reads what the loop has appended to the logs and passes it to the
view, record by record, at its own pace. A slow view falls behind, a failing one is switched off, and the missing
records can be fed later. A new tracker needs one file with one class, like those beside this one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from utils.files import read_json
from utils.runs.index import read_notes
from utils.runs.layout import CONFIG, METRICS_LOG, MODEL_SUMMARY
from utils.runs.log import last_record
from utils.runs.mend import read_modules
from utils.runs.metrics import decode_number
from utils.runs.run import NO_NOTES, read_record, read_status


@dataclass(frozen=True)
class RunFacts:
    """The facts about a run that a view shows besides the logs, as recorded in the run directory.

    hparams: the full configuration, nested by section.
    git: commit, branch, dirty.
    resolved: the values that "auto", none and the like resolved to; the sizes of the corpus and the model.
    modules: name, shape and number of elements of each parameter of the model.
    """

    id: str
    path: Path
    tags: tuple[str, ...]
    note: str
    hparams: Mapping[str, Any]
    git: Mapping[str, Any]
    resolved: Mapping[str, Any]
    modules: tuple[Mapping[str, Any], ...]

    @property
    def experiment(self) -> str:
        return str(self.hparams["tracking"]["experiment"])

    @classmethod
    def read(cls, path: Path) -> RunFacts:
        """Read the facts about the run in the directory `path`.

        Raises:
            RunError: run.json is missing or damaged.
            OSError, ValueError: the configuration is missing or damaged.
        """
        record = read_record(path)
        hparams = read_json(path / CONFIG, path)
        notes: dict[str, Any] = dict(NO_NOTES)
        modules: tuple[dict[str, Any], ...] = ()
        with contextlib.suppress(OSError, ValueError):  # files that only serve people and trackers never stop a run
            notes = read_notes(path)
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
            modules = read_modules(path / MODEL_SUMMARY)
        git = record.get("git") or {}
        return cls(
            id=path.name,
            path=path,
            tags=tuple(dict.fromkeys([*([record["tag"]] if record["tag"] else []), *notes["tags"]])),
            note=notes["note"],
            hparams=hparams,
            git={key: git.get(key) for key in ("commit", "branch", "dirty")},
            resolved=record.get("resolved") or {},
            modules=modules,
        )


@dataclass(frozen=True)
class RunEnd:
    """How a run ended.

    status: the status in run.json, or `crashed`.
    summary: the last losses, in nats per token.
    step: the last step.
    """

    status: str
    summary: Mapping[str, float] = field(default_factory=dict)
    step: int = 0

    @classmethod
    def read(cls, path: Path) -> RunEnd:
        """Read how the run in the directory `path` ended, or how far it is if it is being trained.

        Raises:
            RunError: run.json is missing or damaged.
        """
        record = read_record(path)
        status, step = read_status(path), record.get("last_step") or 0
        if status == "crashed":  # it had no chance to record its last step
            step = (last_record(path / METRICS_LOG) or {}).get("step", 0)
        summary = {name: decode_number(value) for name, value in (record.get("summary") or {}).items()}
        return cls(status, summary, step)


class View(Protocol):
    """A tracker that is fed from the logs. All methods except `abandon` are called from one thread.

    name: one of metrics.VIEWS.
    rolls_back: whether `open(first_step)` hides what an earlier session fed for that step and later ones.
    starts_empty: set by `open`: whether the tracker has no data of the run, even if an earlier session fed some, since
        the run was deleted there or is resumed with another repository. The view is then fed from step 0.
    """

    name: str
    rolls_back: bool
    starts_empty: bool

    def open(self, first_step: int) -> Mapping[str, Any]:
        """Import the tracker's package and open the run in the tracker.

        Args:
            first_step: records of this step and later ones will be fed, some perhaps for the second time; 0 for a
                new run.

        Returns:
            Facts for run.json, such as the run's id in the tracker.
        """

    def feed(self, log_file: str, record: Mapping[str, Any]) -> None:
        """Send one record to the tracker; `log_file` is the one of LOG_FILES that it comes from."""

    def flush(self) -> None:
        """Make the fed records visible to readers of the tracker.

        Raises:
            Exception: the tracker has lost some of them.
        """

    def background_seconds(self) -> float:
        """Processor time that the tracker's own threads have used in this process so far."""

    def clear(self) -> Mapping[str, Any]:
        """Remove everything that was fed of the run, which will be fed again from step 0; return facts for run.json."""

    def close(self, end: RunEnd) -> None:
        """Record how the run ended. Nothing is fed after that."""

    def abandon(self) -> None:
        """Release the tracker without waiting, since the view has failed or hangs. May be called from any thread."""
