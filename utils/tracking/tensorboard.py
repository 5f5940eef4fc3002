"""The TensorBoard view: event files in logs/tensorboard/ of the run directory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.config import TRAJECTORY, field_fact
from utils.run_log import HISTOGRAMS_FILE, METRICS_FILE, NOT_METRICS, decode_number, metric
from utils.tracking import RunEnd, RunFacts

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

HPARAM_METRICS = ("val/loss", "train/eval_loss")  # tags whose last value stands beside the hyperparameters


class TensorBoardView:
    """Scalars, histograms, sample texts, the configuration, hyperparameters with the final metrics."""

    name = "tensorboard"

    def __init__(self, facts: RunFacts, log_dir: Path) -> None:
        self.facts = facts
        self.log_dir = log_dir
        self._writer: SummaryWriter | None = None

    @property
    def writer(self) -> SummaryWriter:
        assert self._writer is not None, "open() comes first"
        return self._writer

    def open(self, first_step: int) -> Mapping[str, Any]:
        from torch.utils.tensorboard import SummaryWriter

        if self._writer is None:  # a second attempt goes on with the file of the first
            # A reader drops what earlier files say of purge_step and later steps. The Python one ignores the
            # first such event of a run, so the first file needs one, too.
            self._writer = SummaryWriter(str(self.log_dir), purge_step=first_step)
        if first_step == 0:
            self.writer.add_text("config", _fenced(json.dumps(self.facts.hparams, indent=2)), 0)
            self.writer.add_text("model", _table(self.facts.model_summary), 0)
            self.writer.add_text("git", _table(self.facts.git), 0)
            if self.facts.note:
                self.writer.add_text("note", self.facts.note, 0)
        return {"path": "logs/tensorboard"}

    def restart(self) -> None:
        """Not needed: purge_step has removed what was fed before."""

    def feed(self, log_file: str, record: Mapping[str, Any]) -> None:
        step, when = record["step"], record["time"]
        if log_file == METRICS_FILE:
            for name, value in record.items():
                if name not in NOT_METRICS and metric(name).views:
                    self.writer.add_scalar(name, decode_number(value), step, walltime=when)
        elif log_file == HISTOGRAMS_FILE:
            self._histogram(record)
        else:
            self.writer.add_text("sample", _fenced(record["text"]), step, walltime=when)

    def _histogram(self, record: Mapping[str, Any]) -> None:
        """Ready bins: add_histogram would copy whole tensors to float64 and bin them again."""
        counts, low, high = record["counts"], record["min"], record["max"]
        total = sum(counts)
        if not total:
            return
        width = (high - low) / len(counts) or 1e-12
        limits = [low + width * (i + 1) for i in range(len(counts))]
        centers = [limit - width / 2 for limit in limits]
        self.writer.add_histogram_raw(
            record["name"],
            min=low,
            max=high,
            num=total,
            sum=sum(c * x for c, x in zip(counts, centers, strict=True)),
            sum_squares=sum(c * x * x for c, x in zip(counts, centers, strict=True)),
            bucket_limits=limits,
            bucket_counts=counts,
            global_step=record["step"],
            walltime=record["time"],
        )

    def flush(self) -> None:
        self.writer.flush()

    def close(self, end: RunEnd) -> None:
        """HParams records go into the same event file: add_hparams would open a second run."""
        from torch.utils.tensorboard.summary import hparams

        flat = {
            f"{section}.{key}": value if isinstance(value, bool | int | float | str) else str(value)
            for section, values in self.facts.hparams.items()
            for key, value in values.items()
            if field_fact(key, "kind") == TRAJECTORY
        }
        metrics = {name: value for name, value in end.summary.items() if name in HPARAM_METRICS}
        file_writer = self.writer._get_file_writer()
        for summary in hparams(flat, metrics):
            file_writer.add_summary(summary)
        self.writer.add_text("status", end.status, end.step)  # at its own step: a resume purges it
        self.writer.close()


def _fenced(text: str) -> str:
    """Markdown that shows text as it is."""
    return "\n".join("    " + line for line in text.splitlines() or [""])


def _table(values: Mapping[str, Any]) -> str:
    rows = [f"| {key} | {value} |" for key, value in values.items()]
    return "\n".join(["| | |", "|---|---|", *rows])
