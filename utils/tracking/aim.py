"""The Aim view: one Aim run for each run directory, to compare runs with `aim up`."""

from __future__ import annotations

import contextlib
import errno
import importlib
import logging
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import TYPE_CHECKING, Any

from utils.runs.layout import CURVES
from utils.runs.log import HISTOGRAMS_FILE, METRICS_FILE
from utils.runs.metrics import encode_number, shown_metrics
from utils.tracking import RunEnd, RunFacts

if TYPE_CHECKING:
    import aim

REMOTE = "aim://"
FREE_BYTES = 4_000_000  # on a full disk, Aim leaves partial runs behind and its database (RocksDB) may wait forever
INDEX_ATTEMPTS = 3  # another run that ends may have the index open for a moment
ANSWER_SECONDS = 10.0  # for an `aim server` to accept what it was sent


class AimView:
    """Metrics with their subset as context, distributions, sample texts, hyperparameters, git facts, status, curves.

    Aim's Run and Repo are not thread-safe: they are created, used and closed in the feeder's thread. Aim's own system
    metrics and terminal capture are off. `status` is our own parameter, because Aim calls a crashed run finished.

    Args:
        repo: a folder that holds, or will hold, `.aim`; or aim://HOST:PORT of an `aim server`.
        run_hash: the hash of the Aim run that a resumed run continues; None: a new Aim run.
    """

    name = "aim"
    rolls_back = False  # a point stays until its step is tracked again

    def __init__(self, facts: RunFacts, repo: str, run_hash: str | None = None) -> None:
        self.facts = facts
        self.repo = repo
        self.run_hash = run_hash
        self.starts_empty = False
        self._run: aim.Run | None = None
        self._unfinished: aim.Run | None = None  # being created
        self._stale: tuple[aim.Repo, str]  # repository and hash of a run that is being deleted

    @property
    def run(self) -> aim.Run:
        assert self._run is not None, "open() comes first"
        return self._run

    @property
    def is_remote(self) -> bool:
        return self.repo.startswith(REMOTE)

    def open(self, first_step: int) -> Mapping[str, Any]:
        warnings.filterwarnings("ignore", message="SOCKS support in urllib3")  # from a package that Aim imports
        import aim
        from aim.sdk.errors import MissingRunError

        # Aim's log would appear between the lines of training; the feeder reports each failure in one line.
        logging.getLogger("aim").setLevel(logging.CRITICAL)
        threading.excepthook = _excepthook_without_aim
        setattr(importlib.import_module("aim.storage.structured.db"), "upgrade_database", _upgrade_database)  # noqa: B010
        if not self.is_remote:
            Path(self.repo).mkdir(parents=True, exist_ok=True)
            self._check_disk()
            if not aim.Repo.exists(self.repo):
                self._make_repo(aim)
        if self._run is None and self.run_hash is not None:
            with contextlib.suppress(MissingRunError):  # deleted in Aim: make a new one
                self._run = self._open_run(aim.Run.__new__(aim.Run), run_hash=self.run_hash, force_resume=True)
        if self._run is None:  # a second attempt continues with the run of the first
            self._run, self.starts_empty = self._new_run(aim), True
        return {"hash": self.run.hash, "repo": self.repo}

    def _check_disk(self) -> None:
        """Raises OSError if the disk of the repository is nearly full."""
        if shutil.disk_usage(self.repo).free < FREE_BYTES:
            raise OSError(errno.ENOSPC, "less than 4 MB left on its disk", self.repo)

    def _make_repo(self, aim: ModuleType) -> None:
        """Create the repository completely or not at all: Aim cannot use one whose creation failed on a full disk.

        Aim creates it in a temporary folder, because it runs a process for that which prints its errors.
        """
        with TemporaryDirectory() as elsewhere, TemporaryDirectory(dir=self.repo, prefix=".aim_") as beside:
            made = Path(aim.Repo(elsewhere, init=True).path)
            new = Path(shutil.copytree(made, Path(beside, made.name)))
            new.rename(Path(self.repo, made.name))  # fails if another process was faster

    def _open_run(self, run: aim.Run, **which: Any) -> aim.Run:
        """Initialise the SDK's Run, without its own system metrics, terminal capture and threads."""
        try:
            self._initialize(run, **which)
        except BaseException:
            _roll_back(run)
            raise
        return run

    def _initialize(self, run: aim.Run, **which: Any) -> None:
        settings = {"system_tracking_interval": None, "capture_terminal_logs": False}
        run.__init__(repo=self.repo, experiment=self.facts.experiment, **settings, **which)
        # Aim's threads for signs of life are not needed: we have `status` and the lock of the run directory.
        run._heartbeat.stop()
        run._checkins.close()
        if self.is_remote:  # now: later, garbage collection would contact the server, perhaps in the training thread
            run._checkins.file_manager._resources.close()
        run._heartbeat = run._checkins = run._resources._heartbeat = run._resources._checkins = None
        before = run.get("run_dir")  # set if an earlier run is continued
        if before is None or run.name == Path(before).name:  # otherwise it was renamed in Aim
            run.name = self.facts.id
        if self.facts.note:  # without a note, keep a description that was written in Aim
            run.description = self.facts.note
        for tag in [tag for tag in self.facts.tags if tag not in run.tags]:
            run.add_tag(tag)
        run["hparams"] = _plain(self.facts.hparams)
        run["git"] = _plain(self.facts.git)
        run["resolved"] = _plain(self.facts.resolved)
        run["run_dir"] = str(self.facts.path)
        run["status"] = "running"

    def _new_run(self, aim: ModuleType) -> aim.Run:
        """Create an Aim run; if this fails halfway, nothing of the run is left behind."""
        self._unfinished = aim.Run.__new__(aim.Run)  # has its hash even if its constructor fails
        try:
            run = self._open_run(self._unfinished)
        except BaseException:  # including Ctrl-C during a rebuild
            self.abandon()
            raise
        self._unfinished = None
        return run

    def clear(self) -> Mapping[str, Any]:
        """Delete the run and create a new one, since Aim cannot empty a run.

        Raises:
            OSError: Aim does not delete the run.
        """
        import aim

        if self._run is not None:  # the first attempt
            self._run.close()
            self._stale, self._run = (self._run.repo, self._run.hash), None  # frees it: its files must be closed first
        repo, stale = self._stale
        if not repo.delete_run(stale):  # the reason is only in Aim's log
            raise OSError(f"run {stale} cannot be deleted from {self.repo}")
        self._run = self._new_run(aim)
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
        """Like `Run.track`, but with the time of the record: `Run.track` uses the time of the call.

        In Aim 3.29, the tracker behind it takes the time as an argument.
        """
        self.run._tracker._track(value, record["time"], name, record["step"], context=dict(context))

    def flush(self) -> None:
        """Check that Aim still has what was tracked. Readers see new data without a flush.

        Raises:
            OSError: the repository was deleted, its disk is full, or its server does not answer.
        """
        repo = self.run.repo
        if not self.is_remote:
            self._check_disk()
            if not Path(repo.path, "meta", "chunks", self.run.hash).exists():  # its open files remain writable
                raise FileNotFoundError(f"the run was deleted from {repo.path}")
            return
        try:
            repo._client.client_heartbeat()
        except OSError as error:  # a requests.RequestException, whose message is long
            raise ConnectionError(f"{self.repo} does not answer") from error
        deadline = time.monotonic() + ANSWER_SECONDS
        while repo._client.get_queue()._queue.unfinished_tasks:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self.repo} does not accept what is sent to it")
            time.sleep(0.01)

    def background_seconds(self) -> float:
        """Processor time of the threads of Aim's database, which sort its data: two thirds of the feeder's own time."""
        ticks = sum(_ticks(task) for task in Path("/proc/self/task").glob("*") if _is_of_rocksdb(task))
        return ticks / os.sysconf("SC_CLK_TCK")

    def close(self, end: RunEnd) -> None:
        from aim import Image

        curves = self.facts.path / CURVES
        if curves.exists():
            self.run.track(Image(str(curves)), name="curves", step=end.step)
        self.run["status"] = end.status
        self.run["summary"] = {name: encode_number(value) for name, value in end.summary.items()}
        self.flush()
        run_hash = self.run.hash
        self.run.close()
        self._run = None
        if not self.is_remote:
            self._index(run_hash)

    def _index(self, run_hash: str) -> None:
        """Add a run that has ended to Aim's index, in which its SDK looks for runs; `aim up` does the same."""
        import aim
        from aim.sdk import index_manager

        index_manager.Observer = index_manager.PollingObserver  # the default starts a thread that never ends
        for _ in range(INDEX_ATTEMPTS):
            try:
                index_manager.RepoIndexManager(aim.Repo(self.repo)).index(run_hash)
                return
            except Exception:  # the tracker boundary: for example, `aim up` has the index open, and will index the run
                time.sleep(0.2)

    def abandon(self) -> None:
        """Stop Aim from closing its files when the process ends: if that failed or waited, the process would hang."""
        cleanup = sys.modules.get("aim.ext.cleanup")
        if cleanup is None:  # Aim is not imported, or only partly
            return
        for owner, (_, finalizer) in list(cleanup.AutoClean._finalizers.items()):
            if self._is_ours(owner):
                finalizer.detach()
        if self._unfinished is not None and not self.is_remote:
            _remove(self._unfinished)

    def _is_ours(self, owner: Any) -> bool:
        """Whether an object of Aim (Run, Repo, database, server resource) belongs to our repository."""
        holder = getattr(owner, "repo", owner)
        client = getattr(holder, "_client", None) or getattr(holder, "_rpc_client", None)
        if client is not None:
            return REMOTE + client.remote_path == self.repo
        return Path(getattr(holder, "path", "")).is_relative_to(os.path.abspath(self.repo))


def _upgrade_database(db_url: str) -> None:
    """Run alembic as Aim's own function does, but print no traceback, and allow `%` in the path of its configuration.

    Raises:
        OSError: the database cannot be upgraded; its message has the last error that alembic printed.
    """
    from aim.storage.migrations.utils import create_migration_cmd

    command = create_migration_cmd()
    place = command.index("-c") + 1
    with TemporaryDirectory() as folder:  # alembic would interpret a `%` in the path of its configuration
        command[place] = shutil.copy(command[place], folder)
        environment = {**os.environ, "AIM_RUN_META_DATA_DB_URL": db_url}
        result = subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace")
    if result.returncode:
        errors = re.findall(r"^[\w.]+(?:Error|Exception)\b.*", result.stderr, re.MULTILINE)
        raise OSError(f"its database cannot be upgraded: {errors[-1] if errors else result.returncode}")


def _is_of_rocksdb(task: Path) -> bool:
    try:
        return (task / "comm").read_text().startswith("rocksdb")
    except OSError:  # the thread has ended
        return False


def _ticks(task: Path) -> int:
    """User and system time of a thread, in clock ticks."""
    try:
        after_name = (task / "stat").read_text().rpartition(") ")[2].split()
    except OSError:
        return 0
    return int(after_name[11]) + int(after_name[12])


def _roll_back(run: aim.Run) -> None:
    """Roll back a failed write to Aim's database of runs, which refuses all other writes until then."""
    database = getattr(getattr(run, "repo", None), "structured_db", None)
    if database is not None:  # with an `aim server`, the database is on the server
        database.session_cls.rollback()


def _remove(run: aim.Run) -> None:
    """Remove what is left of a run that Aim could not create, because it disturbs Aim's readers."""
    if getattr(run, "_heartbeat", None) is not None:  # a thread, which touches a file of the run
        run._heartbeat.touch_path = None
        run._heartbeat.stop_signal.set()
    if getattr(run, "hash", None) is None:
        return
    for path in [path for place in ("*", "*/*") for path in Path(run.repo.path).glob(f"{place}/{run.hash}*")]:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


_thread_failed = threading.excepthook


def _excepthook_without_aim(failure: threading.ExceptHookArgs) -> None:
    """A threading.excepthook without Aim's own threads: they die if the repository is lost, which `flush` reports."""
    modules = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(failure.exc_traceback)]
    if not any(module.startswith("aim.") for module in modules):
        _thread_failed(failure)


def _plain(value: Any) -> Any:
    """Convert mappings to dicts and tuples to lists, since Aim can store no others."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
