"""Real faults of trackers: locks, disks, servers, kills and clocks.

In each case training is unaffected, the log complete, one line is printed, the process ends, and a rebuild repairs the
view.
"""

from __future__ import annotations

import contextlib
import gc
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.plugin_event_accumulator import TENSORS, EventAccumulator
from tensorboard.util.tensor_util import make_ndarray

import experiments
import train
import utils.training.step
from benchmarks.run_equality import log_without_times
from utils.runs.log import HISTOGRAMS_FILE, METRICS_FILE, SAMPLES_FILE, read_records
from utils.runs.metrics import shown_metrics
from utils.runs.run import read_record, read_status
from utils.tracking import feeder
from utils.tracking.tensorboard import event_files
from utils.training.state import TrainState

pytestmark = pytest.mark.usefixtures("warm_processes")
Argv = Callable[..., list[str]]
ROOT = Path(__file__).resolve().parents[2]
MIDDLE = 20  # of 40 steps
FORTY = ("--max-iters", "40", "--eval-interval", "20", "--histogram-interval", "20", "--flush-interval", "5")
SETTINGS = (*FORTY, "--tracking-budget", "1", "--system-interval", "0", "--checkpoint-interval", "10")
PROMPT_SECONDS = 5.0  # from the last line that a process prints to its end


# ------------------------------------------------------------------------------------------ training in a process


class Training:
    """A train.py in its own process; with `pause` it waits halfway, when the views already have some records."""

    def __init__(self, argv: list[str], errors: Path, *, pause: bool) -> None:
        self.errors = errors
        reader, writer = os.pipe()
        program = ["troubled_training.py", "pause", str(MIDDLE)] if pause else ["../train.py"]
        with errors.open("w") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, str(ROOT / "tests" / program[0]), *program[1:], *argv],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                pass_fds=[writer],
                env={**os.environ, "PAUSE_FD": str(writer)},
            )
        os.close(writer)
        self._paused = os.fdopen(reader)

    def wait(self) -> None:
        """Wait until it is halfway."""
        assert self._paused.readline() == "paused\n", self.errors.read_text()

    def end(self) -> str:
        """Let it continue, assert that it ends promptly and without errors, and return its output."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with self._paused:
            try:
                self.process.stdin.write("go on\n")
                self.process.stdin.close()
                output = ""
                for line in self.process.stdout:
                    output, printed = output + line, time.monotonic()
                assert self.process.wait(timeout=PROMPT_SECONDS) == 0, self.errors.read_text()
            finally:
                self.process.kill()
                self.process.wait()
        assert time.monotonic() - printed < PROMPT_SECONDS
        assert self.errors.read_text() == ""
        return output


@pytest.fixture
def training(tiny_argv: Argv, tmp_path: Path) -> Callable[..., Training]:
    """Start a train.py with these arguments."""

    def start(*words: str, pause: bool = True) -> Training:
        number = len(list(tmp_path.glob("errors_*")))
        return Training(tiny_argv(*SETTINGS, *words), tmp_path / f"errors_{number}.txt", pause=pause)

    return start


UNTROUBLED: list[list[dict[str, Any]]] = []  # the same in all tests


@pytest.fixture
def untroubled_log(tiny_argv: Argv, tmp_path: Path) -> list[dict[str, Any]]:
    """The records of all logs of a run without faults."""
    if not UNTROUBLED:
        folder = tmp_path / "untroubled"
        assert train.main(tiny_argv(*SETTINGS, "--runs-dir", str(folder))) == 0
        UNTROUBLED.append(log_without_times(next(folder.iterdir())))
    return UNTROUBLED[0]


@pytest.fixture
def assert_only_view_failed(
    only_run: Callable[[], Path], untroubled_log: list[dict[str, Any]]
) -> Callable[[str, str], None]:
    """Assert that the run equals one without trackers, except for one line that reports the problem."""

    def check(output: str, problem: str) -> None:
        """`problem` is the line up to its first colon, for example "aim is off"."""
        run, (view, _, state) = only_run(), problem.split()
        record = read_record(run)
        assert (record["status"], record["last_step"]) == ("completed", 40)
        assert log_without_times(run) == untroubled_log
        reported = [line for line in output.splitlines() if f"{view} is" in line]
        assert len(reported) == 1, reported
        assert reported[0].startswith(f"warning: {problem}: ")
        assert reported[0].endswith(f"experiments.py rebuild {run} --{view}")
        assert record["views"][view]["state"] == state
        assert record["views"][view]["reason"]
        shown = (run / "logs" / "train.log").read_text()
        begin = f"run         {run.name}"
        assert output.partition(begin)[2] == shown.partition(begin)[2]  # nothing else was printed
        others = {name: facts["state"] for name, facts in record["views"].items() if name != view}
        assert set(others.values()) <= {"complete"}

    return check


def rebuild(run: Path, view: str) -> None:
    assert experiments.main(["rebuild", str(run), f"--{view}"]) == 0
    assert (read_record(run)["views"][view]["state"], read_record(run)["views"][view]["reason"]) == ("complete", None)


# ------------------------------------------------------------------------------------------ views that equal the log


def shown_points(run: Path, view: str) -> dict[str, list[tuple[int, float]]]:
    """The points (step, value) of each metric that a view should show."""
    points: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for record in read_records(run / "logs" / METRICS_FILE):
        for metric, value in shown_metrics(record, view):
            points[metric.name].append((record["step"], value))
    assert points["train/loss"] == sorted(points["train/loss"])
    return points


def assert_tensorboard_equals_log(run: Path) -> None:
    """Assert that TensorBoard reads the contents of the logs from the event files; this reader returns only tensors."""
    events = EventAccumulator(str(run), size_guidance={TENSORS: 0})
    events.Reload()

    def points(tag: str) -> list[tuple[int, Any]]:
        return [(event.step, make_ndarray(event.tensor_proto)) for event in events.Tensors(tag)]

    for name, expected in shown_points(run, "tensorboard").items():
        assert points(name) == [(step, pytest.approx(value, rel=1e-6)) for step, value in expected], name
    for name, counts in histograms(run).items():  # TensorBoard cuts empty bins off at the ends
        shown = [(step, [count for count in bins[:, 2] if count]) for step, bins in points(name)]
        assert shown == [(step, [count for count in bins if count]) for step, bins in counts], name
    texts = [(record["step"], record["text"]) for record in read_records(run / "logs" / SAMPLES_FILE)]
    fenced = [(step, "\n".join("    " + line for line in text.splitlines())) for step, text in texts]
    assert [(step, text.item().decode()) for step, text in points("sample/text_summary")] == fenced
    ((_, status),) = points("status/text_summary")
    assert status.item().decode() == read_status(run)


def histograms(run: Path) -> dict[str, list[tuple[int, list[int]]]]:
    """The points (step, counts) of each histogram."""
    found: dict[str, list[tuple[int, list[int]]]] = defaultdict(list)
    for record in read_records(run / "logs" / HISTOGRAMS_FILE):
        found[record["name"]].append((record["step"], record["counts"]))
    return found


def assert_aim_equals_log(repo: Path, *runs: Path) -> None:
    """Assert that the Aim repository in the folder `repo` holds these runs and nothing else."""
    from aim import Repo
    from aim.sdk.index_manager import RepoIndexManager

    aim = Repo(str(repo))
    hashes = os.listdir(repo / ".aim" / "meta" / "chunks")
    for run_hash in hashes:
        RepoIndexManager.get_index_manager(aim).index(run_hash)  # what `aim up` does in the background
    shown = {run.name: run for run in aim.iter_runs()}
    assert sorted(shown) == sorted(run.name for run in runs)
    assert len(hashes) == len(list(aim.structured_db.runs())) == len(runs)
    for run in runs:
        _assert_aim_run_equals_log(shown[run.name], run)


def _assert_aim_run_equals_log(shown: Any, run: Path) -> None:
    from aim.storage.context import Context

    assert shown.hash == read_record(run)["views"]["aim"]["hash"]
    assert (shown["status"], shown["hparams", "model", "n_embd"]) == (read_status(run), 16)
    expected = shown_points(run, "aim")
    names = {"/".join([*metric.context.to_dict().values(), metric.name]) for metric in shown.metrics()}
    assert names == set(expected)
    for name, points in expected.items():
        subset, _, short = name.rpartition("/")
        steps, (values, *_) = shown.get_metric(short, Context({"subset": subset} if subset else {})).data.items_list()
        assert list(zip(steps, values, strict=True)) == points, name
    for name, counts in histograms(run).items():
        kind, _, parameter = name.partition("/")
        steps, (bins, *_) = shown.get_distribution_sequence(parameter, Context({"kind": kind})).data.items_list()
        assert list(zip(steps, (b.weights.tolist() for b in bins), strict=True)) == counts, name
    steps, (texts, *_) = shown.get_text_sequence("sample", Context({})).data.items_list()
    samples = [(record["step"], record["text"]) for record in read_records(run / "logs" / SAMPLES_FILE)]
    assert list(zip(steps, (text.data for text in texts), strict=True)) == samples


# ------------------------------------------------------------------------------------------ locks


@pytest.fixture
def aim_released() -> Iterator[None]:
    """Afterwards, close the files that Aim's caches keep open, because another test may reuse the path."""
    from aim.storage.structured.db import DB

    yield
    gc.collect()
    for database in [thing for thing in gc.get_objects() if type(thing) is DB]:
        database.session_cls.remove()
        database.engine.dispose()


HOLDERS = {
    "run_metadata.sqlite": "import sqlite3\nheld = sqlite3.connect(path).execute('BEGIN EXCLUSIVE')",
    "locks/structured_db_lock": "import filelock\nheld = filelock.SoftFileLock(path).acquire()",
}


@pytest.mark.slow
@pytest.mark.usefixtures("aim_released")
@pytest.mark.parametrize("locked", HOLDERS)
def test_training_survives_an_aim_repository_locked_by_another_process(
    locked: str,
    training: Callable[..., Training],
    only_run: Callable[[], Path],
    assert_only_view_failed: Callable[[str, str], None],
    tmp_path: Path,
) -> None:
    from aim import Repo

    Repo(str(tmp_path), init=True)
    lines = ("import sys", "path = sys.argv[1]", HOLDERS[locked], "print('locked', flush=True)", "sys.stdin.readline()")
    command = [sys.executable, "-c", "\n".join(lines), str(tmp_path / ".aim" / locked)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "locked\n"
        output = training("--aim-logging", "--closing-seconds", "8", pause=False).end()
        holder.communicate("enough\n")
    assert_only_view_failed(output, "aim is incomplete")
    rebuild(only_run(), "aim")
    assert_aim_equals_log(tmp_path, only_run())


# ------------------------------------------------------------------------------------------ disks


@pytest.fixture
def disk(small_disk: Path, aim_released: None) -> Path:
    """`small_disk`, which Aim releases at the end."""
    return small_disk


def resize(disk: Path, size: str) -> None:
    subprocess.run(["mount", "-o", f"remount,rw,size={size}", disk], check=True)


def fill(disk: Path) -> None:
    """Leave no free byte."""
    with (disk / "filled").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


def assert_repaired_with_more_room(disk: Path, run: Path) -> None:
    """Enlarge the disk (which also makes it writable), rebuild the view of Aim there, and compare it with the log."""
    resize(disk, "64m")
    rebuild(run, "aim")
    assert_aim_equals_log(disk, run)


@pytest.mark.slow
def test_training_survives_a_disk_that_fills_up(
    training: Callable[..., Training],
    only_run: Callable[[], Path],
    assert_only_view_failed: Callable[[str, str], None],
    disk: Path,
) -> None:
    resize(disk, "16m")
    run = training("--aim-logging", "--aim-repo", str(disk))
    run.wait()
    fill(disk)
    assert_only_view_failed(run.end(), "aim is off")
    assert_repaired_with_more_room(disk, only_run())


def in_process(argv: list[str], repo: Path, capfd: pytest.CaptureFixture[str]) -> str:
    """Run train.py in this process and return its output; asserts that Aim has left nothing open in `repo`."""
    from aim import Repo
    from aim.ext.cleanup import AutoClean

    capfd.readouterr()
    assert train.main(argv) == 0
    output, errors = capfd.readouterr()
    assert errors == ""
    alive = [owner for owner, (_, finalizer) in AutoClean._finalizers.items() if finalizer.alive]
    places = [getattr(owner, "repo", owner).path for owner in alive if not isinstance(owner, Repo)]
    assert not [place for place in places if Path(place).is_relative_to(repo)]
    return output


@pytest.mark.slow
def test_training_survives_a_disk_that_is_too_small_for_aim(
    tiny_argv: Argv,
    untroubled_log: list[dict[str, Any]],
    only_run: Callable[[], Path],
    assert_only_view_failed: Callable[[str, str], None],
    disk: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(feeder, "RETRY_SECONDS", (0.01, 0.01, 0.01))
    output = in_process(tiny_argv(*SETTINGS, "--aim-logging", "--aim-repo", str(disk)), disk, capfd)
    assert_only_view_failed(output, "aim is off")
    assert_repaired_with_more_room(disk, only_run())


def test_training_survives_a_read_only_aim_repository(
    tiny_argv: Argv,
    untroubled_log: list[dict[str, Any]],
    only_run: Callable[[], Path],
    assert_only_view_failed: Callable[[str, str], None],
    disk: Path,
    make_read_only: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    from aim import Repo

    monkeypatch.setattr(feeder, "RETRY_SECONDS", (0.01, 0.01, 0.01))
    resize(disk, "64m")
    Repo(str(disk), init=True)
    make_read_only()
    output = in_process(tiny_argv(*SETTINGS, "--aim-logging", "--aim-repo", str(disk)), disk, capfd)
    assert_only_view_failed(output, "aim is off")
    assert_repaired_with_more_room(disk, only_run())


# ------------------------------------------------------------------------------------------ deleted


@pytest.mark.slow
def test_training_survives_the_deletion_of_its_aim_repository(
    training: Callable[..., Training],
    only_run: Callable[[], Path],
    assert_only_view_failed: Callable[[str, str], None],
    tmp_path: Path,
) -> None:
    run = training("--aim-logging")
    run.wait()
    shutil.rmtree(tmp_path / ".aim")
    assert_only_view_failed(run.end(), "aim is off")
    rebuild(only_run(), "aim")
    assert_aim_equals_log(tmp_path, only_run())


def test_training_survives_the_deletion_of_its_event_files(
    training: Callable[..., Training],
    only_run: Callable[[], Path],
    assert_only_view_failed: Callable[[str, str], None],
) -> None:
    run = training()
    run.wait()
    for path in event_files(only_run()):
        path.unlink()
    assert_only_view_failed(run.end(), "tensorboard is off")
    rebuild(only_run(), "tensorboard")
    assert_tensorboard_equals_log(only_run())


# ------------------------------------------------------------------------------------------ servers


class AimServer:
    """An `aim server` of a repository, which keeps its port when it is restarted."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.folder = folder
        self.start()

    @property
    def url(self) -> str:
        return f"aim://127.0.0.1:{self.port}"

    def start(self) -> None:
        command = [str(Path(sys.executable).parent / "aim"), "server", "--yes", "--repo", str(self.folder)]
        address = ["--host", "127.0.0.1", "--port", str(self.port)]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen([*command, *address], start_new_session=True, **quiet)
        deadline = time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/status/", timeout=5).close()
                return
            except OSError:
                assert time.monotonic() < deadline
                assert self.process.poll() is None, f"aim server ended with status {self.process.returncode}"
                time.sleep(0.1)

    def send(self, signum: signal.Signals) -> None:
        os.killpg(self.process.pid, signum)

    def kill(self) -> None:
        self.send(signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def aim_server(tmp_path: Path) -> Iterator[AimServer]:
    (tmp_path / "server").mkdir()
    server = AimServer(tmp_path / "server")
    yield server
    server.kill()


def rebuild_elsewhere(run: Path) -> None:
    """Rebuild in another process, because this one would remain a client of the server; assert that it ends."""
    command = [sys.executable, str(ROOT / "experiments.py"), "rebuild", str(run), "--aim"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (0, "")
    assert read_record(run)["views"]["aim"]["state"] == "complete"


@pytest.mark.slow
def test_training_survives_the_end_of_its_aim_server(
    aim_server: AimServer,
    training: Callable[..., Training],
    only_run: Callable[[], Path],
    assert_only_view_failed: Callable[[str, str], None],
    tmp_path: Path,
) -> None:
    remote = ("--aim-logging", "--aim-repo", aim_server.url)
    lucky = training(*remote, "--runs-dir", str(tmp_path / "lucky"), "--run-tag", "lucky", pause=False)
    unlucky = training(*remote)
    assert "aim is" not in lucky.end()
    unlucky.wait()
    aim_server.kill()
    assert_only_view_failed(unlucky.end(), "aim is off")
    aim_server.start()
    rebuild_elsewhere(only_run())
    aim_server.kill()
    assert_aim_equals_log(aim_server.folder, only_run(), *(tmp_path / "lucky").iterdir())


@pytest.mark.slow
def test_training_survives_an_aim_server_that_hangs(
    aim_server: AimServer,
    training: Callable[..., Training],
    only_run: Callable[[], Path],
    assert_only_view_failed: Callable[[str, str], None],
) -> None:
    run = training("--aim-logging", "--aim-repo", aim_server.url, "--closing-seconds", "2")
    run.wait()
    aim_server.send(signal.SIGSTOP)
    assert_only_view_failed(run.end(), "aim is incomplete")
    aim_server.send(signal.SIGCONT)
    rebuild_elsewhere(only_run())
    aim_server.kill()
    assert_aim_equals_log(aim_server.folder, only_run())


# ------------------------------------------------------------------------------------------ kills, two runs, clocks


def test_a_run_killed_during_a_write_is_rebuilt_and_resumed(
    tiny_argv: Argv, only_run: Callable[[], Path], untroubled_log: list[dict[str, Any]]
) -> None:
    command = [sys.executable, str(ROOT / "tests" / "troubled_training.py"), "tear", "27"]
    result = subprocess.run([*command, *tiny_argv(*SETTINGS)], capture_output=True, timeout=60)
    assert result.returncode == -signal.SIGKILL, result.stderr
    run = only_run()
    metrics = run / "logs" / METRICS_FILE
    assert not metrics.read_bytes().endswith(b"\n")
    whole = [record for record in untroubled_log if record["log"] == METRICS_FILE]
    torn = [record for record in log_without_times(run) if record["log"] == METRICS_FILE]
    assert torn == whole[: len(torn)]
    assert torn[-1]["step"] == 26

    rebuild(run, "tensorboard")
    assert_tensorboard_equals_log(run)  # as far as the log goes
    assert read_status(run) == "crashed"
    assert train.main(["--resume", str(run)]) == 0
    assert log_without_times(run) == untroubled_log
    assert_tensorboard_equals_log(run)


@pytest.mark.slow
def test_two_runs_at_once_create_a_repository_and_share_it(
    training: Callable[..., Training], runs_dir: Path, untroubled_log: list[dict[str, Any]], tmp_path: Path
) -> None:
    both = [training("--aim-logging", "--run-tag", tag) for tag in ("one", "other")]
    for run in both:
        run.wait()
    for run in both:
        assert "aim is" not in run.end()
    assert_aim_equals_log(tmp_path, *runs_dir.iterdir())
    for path in runs_dir.iterdir():
        assert log_without_times(path) == untroubled_log
        assert read_record(path)["views"]["aim"]["state"] == "complete"
        assert_tensorboard_equals_log(path)


def test_a_clock_that_goes_backwards_changes_neither_losses_nor_views(
    tiny_argv: Argv,
    only_run: Callable[[], Path],
    untroubled_log: list[dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now, optimizer_step = time.time, utils.training.step.optimizer_step

    def step_with_changes(state: TrainState, *grad_norms: Any) -> None:
        optimizer_step(state, *grad_norms)
        if state.step == 10:
            monkeypatch.setattr(time, "time", lambda: now() - 3600)
        if state.step == 23:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(utils.training.step, "optimizer_step", step_with_changes)
    assert train.main(tiny_argv(*SETTINGS, "--aim-logging")) == 128 + signal.SIGTERM
    run = only_run()
    times = [record["time"] for record in read_records(run / "logs" / METRICS_FILE)]
    assert times != sorted(times)
    assert_tensorboard_equals_log(run)

    monkeypatch.setattr(utils.training.step, "optimizer_step", optimizer_step)
    monkeypatch.setattr(time, "time", lambda: now() - 7200)
    assert train.main(["--resume", str(run)]) == 0
    assert log_without_times(run) == untroubled_log
    assert len(event_files(run)) == 2
    assert_tensorboard_equals_log(run)
    assert_aim_equals_log(tmp_path, run)
