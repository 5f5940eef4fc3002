"""The Aim view: one Aim run a run directory, for comparing runs with `aim up`."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from utils.run_log import HISTOGRAMS_FILE, METRICS_FILE, NOT_METRICS, decode_number, metric
from utils.tracking import RunEnd, RunFacts

if TYPE_CHECKING:
    import aim


def aim_is_installed() -> bool:
    return importlib.util.find_spec("aim") is not None


class AimView:
    """Metrics with subset context, distributions, sample texts, hyperparameters, git facts, status.

    Aim's Run and Repo are not thread-safe: they live and die in the feeder's thread. Its own system
    metrics and terminal capture are off; `status` is ours, since Aim calls a crashed run finished.
    """

    name = "aim"

    def __init__(self, facts: RunFacts, repo: Path, run_hash: str | None = None) -> None:
        self.facts = facts
        self.repo = repo
        self.run_hash = run_hash  # of the Aim run that a resumed run goes on with
        self._run: aim.Run | None = None

    @property
    def run(self) -> aim.Run:
        assert self._run is not None, "open() comes first"
        return self._run

    def open(self, first_step: int) -> Mapping[str, Any]:
        warnings.filterwarnings("ignore", message="SOCKS support in urllib3")  # of a package that Aim imports
        import aim
        from aim.sdk.errors import MissingRunError

        self.repo.mkdir(parents=True, exist_ok=True)
        if self._run is None and self.run_hash is not None:
            # It tells every user that it takes over a lock; the lock of the run directory has shown that it may.
            logging.getLogger("aim.sdk.lock_manager").setLevel(logging.ERROR)
            with contextlib.suppress(MissingRunError):  # deleted in Aim since: a new one
                self._run = self._open_run(aim, run_hash=self.run_hash, force_resume=True)
        if self._run is None:  # a second attempt goes on with the run of the first
            self._run = self._open_run(aim)
        self._describe()
        return {"hash": self.run.hash, "repo": str(self.repo)}

    def _open_run(self, aim: ModuleType, **which: Any) -> aim.Run:
        """The SDK's Run, without its own system metrics and terminal capture."""
        settings = {"system_tracking_interval": None, "capture_terminal_logs": False}
        return aim.Run(repo=str(self.repo), experiment=self.facts.experiment, **settings, **which)

    def _describe(self) -> None:
        self.run.name = self.facts.id
        self.run.description = self.facts.note
        wanted = dict.fromkeys((*([self.facts.tag] if self.facts.tag else []), *self.facts.tags))
        for tag in [tag for tag in wanted if tag not in self.run.tags]:
            self.run.add_tag(tag)
        self.run["hparams"] = _plain(self.facts.hparams)
        self.run["git"] = _plain(self.facts.git)
        self.run["model_summary"] = _plain(self.facts.model_summary)
        self.run["run_dir"] = str(self.facts.path)
        self.run["status"] = "running"

    def restart(self) -> Mapping[str, Any]:
        """Aim keeps points beyond a resume until they are tracked again; where they never are, a new Aim run it is."""
        import aim

        repo, stale = self.run.repo, self.run.hash
        self.run.close()
        repo.delete_run(stale)
        self._run = self._open_run(aim)
        self._describe()
        return {"hash": self.run.hash}

    def feed(self, log_file: str, record: Mapping[str, Any]) -> None:
        step = record["step"]
        if log_file == METRICS_FILE:
            for name, value in record.items():
                if name not in NOT_METRICS and metric(name).views:
                    facts = metric(name)
                    context = {"subset": facts.subset} if facts.subset else {}
                    self.run.track(decode_number(value), name=facts.short_name, step=step, context=context)
        elif log_file == HISTOGRAMS_FILE:
            from aim import Distribution

            if sum(record["counts"]):
                kind, _, parameter = record["name"].partition("/")
                bins = Distribution(hist=record["counts"], bin_range=(record["min"], record["max"]))
                self.run.track(bins, name=parameter, step=step, context={"kind": kind})
        else:
            from aim import Text

            self.run.track(Text(record["text"]), name="sample", step=step)

    def flush(self) -> None:
        """Aim's readers see what was tracked without it."""

    def close(self, end: RunEnd) -> None:
        self.run["status"] = end.status
        self.run["summary"] = _plain(end.summary)
        self.run.close()


def _plain(value: Any) -> Any:
    """Aim stores dicts, lists, numbers, strings, None; not tuples or other mappings."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
