"""The Aim view: one Aim run a run directory, for comparing runs with `aim up`."""

from __future__ import annotations

import contextlib
import logging
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from utils.run_log import HISTOGRAMS_FILE, METRICS_FILE, encode_number, shown_metrics
from utils.run_manager import CURVES
from utils.tracking import RunEnd, RunFacts

if TYPE_CHECKING:
    import aim

REMOTE = "aim://"
ANSWER_SECONDS = 10.0  # for an `aim server` to take what it was sent


class AimView:
    """Metrics with subset context, distributions, sample texts, hyperparameters, git facts, status, loss curve.

    Aim's Run and Repo are not thread-safe: they live and die in the feeder's thread. Its own system
    metrics and terminal capture are off; `status` is ours, since Aim calls a crashed run finished.

    Args:
        repo: a folder that holds, or will hold, `.aim`; or aim://HOST:PORT of an `aim server`.
        run_hash: of the Aim run that a resumed run goes on with.
    """

    name = "aim"
    rolls_back = False  # points stay until the same step is tracked again

    def __init__(self, facts: RunFacts, repo: str, run_hash: str | None = None) -> None:
        self.facts = facts
        self.repo = repo
        self.run_hash = run_hash
        self._run: aim.Run | None = None

    @property
    def run(self) -> aim.Run:
        assert self._run is not None, "open() comes first"
        return self._run

    @property
    def is_remote(self) -> bool:
        return self.repo.startswith(REMOTE)

    def open(self, first_step: int) -> Mapping[str, Any]:
        warnings.filterwarnings("ignore", message="SOCKS support in urllib3")  # of a package that Aim imports
        import aim
        from aim.sdk.errors import MissingRunError

        # It tells every user that it takes over a lock; the lock of the run directory has shown that it may.
        logging.getLogger("aim.sdk.lock_manager").setLevel(logging.ERROR)
        if not self.is_remote:
            Path(self.repo).mkdir(parents=True, exist_ok=True)
        if self._run is None and self.run_hash is not None:
            with contextlib.suppress(MissingRunError):  # deleted in Aim since: a new one
                self._run = self._open_run(aim, run_hash=self.run_hash, force_resume=True)
        if self._run is None:  # a second attempt goes on with the run of the first
            self._run = self._open_run(aim)
        self._describe()
        return {"hash": self.run.hash, "repo": self.repo}

    def _open_run(self, aim: ModuleType, **which: Any) -> aim.Run:
        """The SDK's Run, without its own system metrics and terminal capture."""
        settings = {"system_tracking_interval": None, "capture_terminal_logs": False}
        run = aim.Run(repo=self.repo, experiment=self.facts.experiment, **settings, **which)
        # Its threads that report signs of life: status and the lock of the run directory are ours.
        run._heartbeat.stop()
        run._checkins.close()
        run._heartbeat = run._checkins = run._resources._heartbeat = run._resources._checkins = None
        return run

    def _describe(self) -> None:
        self.run.name = self.facts.id
        self.run.description = self.facts.note
        for tag in [tag for tag in self.facts.tags if tag not in self.run.tags]:
            self.run.add_tag(tag)
        self.run["hparams"] = _plain(self.facts.hparams)
        self.run["git"] = _plain(self.facts.git)
        self.run["resolved"] = _plain(self.facts.resolved)
        self.run["run_dir"] = str(self.facts.path)
        self.run["status"] = "running"

    def forget(self) -> Mapping[str, Any]:
        """Aim has no command that empties a run: it is deleted, and a new one made."""
        import aim

        repo, stale = self.run.repo, self.run.hash
        self.run.close()
        self._run = None
        repo.delete_run(stale)
        self._run = self._open_run(aim)
        self._describe()
        return {"hash": self.run.hash}

    def feed(self, log_file: str, record: Mapping[str, Any]) -> None:
        if log_file == METRICS_FILE:
            for metric, value in shown_metrics(record, self.name):
                self._track(value, record, metric.short_name, {"subset": metric.subset} if metric.subset else {})
        elif log_file == HISTOGRAMS_FILE:
            from aim import Distribution

            if sum(record["counts"]):
                kind, _, parameter = record["name"].partition("/")
                bins = Distribution(hist=record["counts"], bin_range=(record["min"], record["max"]))
                self._track(bins, record, parameter, {"kind": kind})
        else:
            from aim import Text

            self._track(Text(record["text"]), record, "sample", {})

    def _track(self, value: Any, record: Mapping[str, Any], name: str, context: Mapping[str, str]) -> None:
        """Like `Run.track`, at the time of the record: Run.track takes the time at which it is called.

        The tracker behind it does the same in Aim 3.29.
        """
        self.run._tracker._track(value, record["time"], name, record["step"], context=dict(context))

    def flush(self) -> None:
        """Aim's readers see what was tracked without it; but what was lost shows only here.

        Raises:
            OSError: the repository was deleted, or its server does not answer.
        """
        repo = self.run.repo
        if not self.is_remote:
            if not Path(repo.path, "meta", "chunks", self.run.hash).exists():  # its files are open: writing goes on
                raise FileNotFoundError(f"the run was deleted from {repo.path}")
            return
        repo._client.client_heartbeat()
        deadline = time.monotonic() + ANSWER_SECONDS
        while repo._client.get_queue()._queue.unfinished_tasks:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self.repo} does not take what it is sent")
            time.sleep(0.01)

    def close(self, end: RunEnd) -> None:
        from aim import Image

        curves = self.facts.path / CURVES
        if curves.exists():
            self.run.track(Image(str(curves)), name="curves", step=end.step)
        self.run["status"] = end.status
        self.run["summary"] = {name: encode_number(value) for name, value in end.summary.items()}
        self.flush()
        self.run.close()
        self._run = None

    def abandon(self) -> None:
        """Aim closes what is open when the process ends, and waits for a lost server for ever: not for this one."""
        if not self.is_remote:
            return
        from aim.ext.cleanup import AutoClean

        for owner, (_, finalizer) in list(AutoClean._finalizers.items()):
            holders = (owner, getattr(owner, "repo", None))
            clients = [getattr(holder, name, None) for holder in holders for name in ("_client", "_rpc_client")]
            if any(client is not None and REMOTE + client.remote_path == self.repo for client in clients):
                finalizer.detach()


def _plain(value: Any) -> Any:
    """Aim stores dicts, lists, numbers, strings, None; not tuples or other mappings."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
