"""The Weights & Biases view: one W&B run for each run directory, on the server or in files to sync later."""

from __future__ import annotations

import html
import re
import shutil
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from utils.runs.layout import LOGS, WANDB
from utils.runs.log import HISTOGRAMS_FILE, METRICS_FILE
from utils.runs.metrics import shown_metrics
from utils.tracking import RunEnd, RunFacts

if TYPE_CHECKING:
    import wandb

LONGEST_TAG, LONGEST_PROJECT = 64, 128  # characters; W&B refuses a run with longer ones
NOT_IN_A_PROJECT = re.compile(r"[/\\#?%:]")


class WandbView:
    """Metrics, histograms, sample texts, configuration, status and last losses.

    It uses the account of `wandb login` or WANDB_API_KEY, and stores no credentials in the run directory.

    Args:
        mode: offline (`wandb sync` uploads the files in logs/wandb later) or online.
        run_id: the id of the W&B run that a resumed run continues; None: the id of the run.
    """

    name = "wandb"
    rolls_back = False
    starts_empty = False  # without files here, the server may still have the run

    def __init__(self, facts: RunFacts, mode: Literal["offline", "online"], run_id: str | None = None) -> None:
        self.facts = facts
        self.run_id = run_id or facts.id
        self.mode = mode
        self._run: wandb.Run | None = None

    @property
    def run(self) -> wandb.Run:
        assert self._run is not None, "open() comes first"
        return self._run

    def open(self, first_step: int) -> Mapping[str, Any]:
        if self._run is None:  # a second attempt continues the run of the first
            self._run = self._open_run()
        return {"id": self.run.id, "mode": self.mode}

    def _open_run(self) -> wandb.Run:
        """Start the W&B run, without W&B's own records of code, environment and terminal, which the run has."""
        import wandb

        wandb.setup(wandb.Settings(silent=True))  # before init, since the login prints too, and asks for a key
        settings = wandb.Settings(console="off", silent=True, disable_git=True, disable_code=True, save_code=False)
        settings = settings.model_copy(update={"x_disable_stats": True, "x_disable_meta": True})
        run = wandb.init(
            mode=self.mode,
            project=NOT_IN_A_PROJECT.sub("-", self.facts.experiment)[:LONGEST_PROJECT],
            id=self.run_id,
            name=self.facts.id,
            notes=self.facts.note,
            tags=[tag[:LONGEST_TAG] for tag in self.facts.tags],
            config={**self.facts.hparams, "git": dict(self.facts.git)},
            dir=self.facts.path / LOGS,
            resume="allow",
            settings=settings,
        )
        run.define_metric("*", step_metric="step")  # W&B's own steps cannot be repeated after a resume
        return run

    def feed(self, log_file: str, record: Mapping[str, Any]) -> None:
        import wandb

        values: dict[str, Any]
        if log_file == METRICS_FILE:
            values = {metric.name: value for metric, value in shown_metrics(record, self.name)}
        elif log_file == HISTOGRAMS_FILE:
            edges = np.linspace(record["min"], record["max"], len(record["counts"]) + 1)
            values = {record["name"]: wandb.Histogram(np_histogram=(record["counts"], edges))}
        else:
            values = {"sample": wandb.Html(f"<pre>{html.escape(record['text'])}</pre>", inject=False)}
        if values:
            self.run.log({**values, "step": record["step"], "_timestamp": record["time"]})

    def flush(self) -> None:
        """Nothing to do: W&B's own process writes the records."""

    def background_seconds(self) -> float:
        return 0.0  # W&B works in a process of its own

    def clear(self) -> Mapping[str, Any]:
        """Offline, remove the files of the run. Online, W&B keeps its data, and the same steps are added again."""
        self.run.finish()
        for folder in (self.facts.path / WANDB).glob("offline-run-*"):
            shutil.rmtree(folder)
        self._run = self._open_run()
        return {"id": self.run.id}

    def close(self, end: RunEnd) -> None:
        self.run.summary.update({"status": end.status, **end.summary})
        self.run.finish(exit_code=0 if end.status == "completed" else 1)

    def abandon(self) -> None:
        """Stop W&B from waiting for minutes, at the end of this process, for a server that does not answer.

        W&B's own process ends with this one anyway.
        """
        setup = sys.modules.get("wandb.sdk.wandb_setup")
        connection = getattr(getattr(setup, "_singleton", None), "_connection", None)
        forget_at_exit = getattr(connection, "_cleanup", None)
        if forget_at_exit is not None:
            forget_at_exit()
