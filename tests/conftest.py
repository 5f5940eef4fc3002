"""Shared fixtures and helpers: a corpus of a few kilobytes, and an experiment that trains in a second."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from warm_python import PIXEL, WarmPython, copy_databases

from utils.runs.log import read_metrics

if TYPE_CHECKING:
    from playwright.sync_api import Browser

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as in `make test &`; children inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)
if not Path("/dev/nvidiactl").exists():
    os.environ["TRITON_INTERPRET"] = "1"  # if a module imports Triton, its kernels run on the CPU

ROOT = Path(__file__).resolve().parent.parent
PAGE_MS = 60_000  # the timeout of a browser page, which takes one to five seconds on a slow machine
FORK = multiprocessing.get_context("fork")
TINY_FLAGS = {
    "--n-layer": "1",
    "--n-head": "2",
    "--n-embd": "16",
    "--block-size": "8",
    "--batch-size": "4",
    "--max-iters": "6",
    "--eval-interval": "3",
    "--eval-iters": "2",
    "--histogram-interval": "3",
    "--sample-tokens": "8",
    "--threads": "1",
}


def pytest_xdist_auto_num_workers() -> int:
    """Start 1.5 workers per core: a test spends a quarter of its time waiting for a disk, a process or a browser."""
    return (os.cpu_count() or 1) * 3 // 2


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Keep texts of many kilobytes out of the names of tests."""
    return f"{argname} of {len(val):,}" if isinstance(val, str | bytes) and len(val) > 1000 else None


def in_child(prepare: Callable[[], object], action: Callable[[], object]) -> Any:
    """Return what `action` returns or raises in a forked process, after `prepare` has changed that process."""

    def work(pipe: Connection) -> None:
        prepare()
        try:
            pipe.send(action())
        except Exception as error:
            pipe.send(error)

    receiver, sender = FORK.Pipe(duplex=False)
    process = FORK.Process(target=work, args=(sender,))
    process.start()
    sender.close()
    result = receiver.recv()
    process.join()
    return result


def copy_code(folder: Path, *names: str) -> None:
    """Copy files and folders of the project with their times and their compiled code, which saves seconds per copy."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, dirs_exist_ok=True)
            continue
        shutil.copy2(ROOT / name, folder / name)
        for compiled in (ROOT / name).parent.glob(f"__pycache__/{Path(name).stem}.*.pyc"):
            (folder / name).parent.joinpath("__pycache__").mkdir(exist_ok=True)
            shutil.copy2(compiled, folder / compiled.relative_to(ROOT))


def git(folder: Path, *words: str) -> str:
    """Run git and return its output; commits are by Ada, independent of this machine's configuration."""
    identity = ["-c", "user.name=Ada", "-c", "user.email=ada@example.org", "-c", "commit.gpgsign=false"]
    return subprocess.run(["git", *identity, *words], cwd=folder, check=True, capture_output=True, text=True).stdout


def one_error(capsys: pytest.CaptureFixture[str]) -> str:
    """Return the line of an error, after checking that it is all that was printed."""
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1, captured.err
    return captured.err


def wait_until_trained(process: subprocess.Popen[Any], runs_dir: Path, losses: int = 1, seconds: float = 60.0) -> Path:
    """Wait until a training has logged that many losses, and return its run directory."""
    deadline = time.monotonic() + seconds
    while sum(len(read_metrics(path, "train/loss")) for path in runs_dir.glob("*/logs")) < losses:
        assert process.poll() is None, "training ended before it had logged its losses"
        assert time.monotonic() < deadline
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=0.1)
    (run,) = runs_dir.iterdir()
    return run


@pytest.fixture(autouse=True)
def torch_settings() -> Iterator[None]:
    """Restore the settings of torch that a run in this process changes (determinism, threads, precision)."""
    import torch

    before = (torch.get_deterministic_debug_mode(), torch.get_num_threads(), torch.get_float32_matmul_precision())
    yield
    torch.set_deterministic_debug_mode(before[0])  # unlike use_deterministic_algorithms, imports no compiler
    torch.set_num_threads(before[1])
    torch.set_float32_matmul_precision(before[2])


@pytest.fixture(autouse=True)
def quick_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let runs in this process plot their curves without rendering them, which takes a third of a tiny training."""
    import utils.runs.curves

    monkeypatch.setattr(utils.runs.curves, "picture_of", lambda figure: PIXEL)


@pytest.fixture(autouse=True)
def quick_databases(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Once a test has imported Aim, copy its new databases instead of creating them."""
    if "aim.storage.migrations.utils" in sys.modules:
        copy_databases(tmp_path_factory.getbasetemp())


@pytest.fixture
def prompt_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait for each checkpoint: a step takes a millisecond, so which steps have one would depend on the disk."""
    from utils.training.checkpointer import Checkpointer

    save = Checkpointer.save

    def patched(self: Checkpointer, state: Any) -> None:
        save(self, state)
        self.wait()

    monkeypatch.setattr(Checkpointer, "save", patched)


@pytest.fixture
def tiny_text() -> str:
    """About 6,000 characters with some structure and a few non-ASCII letters."""
    return "".join(f"line {i}: the quick brown fox jumps über {i * i % 97} lazy dogs.\n" for i in range(100))


@pytest.fixture
def tiny_corpus(tmp_path: Path, tiny_text: str) -> Path:
    """A UTF-8 text file."""
    path = tmp_path / "tiny.txt"
    path.write_text(tiny_text, encoding="utf-8")
    return path


@pytest.fixture
def tiny_argv(tmp_path: Path, tiny_corpus: Path) -> Callable[..., list[str]]:
    """Flags of a tiny experiment below tmp_path, without Aim; later words win: `tiny_argv("--seed", "1")`."""

    def argv(*words: str) -> list[str]:
        places = {
            "--dataset": str(tiny_corpus),
            "--corpora-dir": str(tmp_path / "corpora"),
            "--runs-dir": str(tmp_path / "runs"),
            "--aim-repo": str(tmp_path),
        }
        flags = [word for pair in (places | TINY_FLAGS).items() for word in pair]
        return [*flags, "--no-aim-logging", *words]

    return argv


@pytest.fixture
def runs_dir(tmp_path: Path) -> Path:
    return tmp_path / "runs"


@pytest.fixture
def only_run(runs_dir: Path) -> Callable[[], Path]:
    """The one run directory that a test has made."""

    def find() -> Path:
        (path,) = runs_dir.iterdir()
        return path

    return find


@pytest.fixture(scope="session")
def warm_python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WarmPython]:
    """The interpreter for tests of what a script does; tests of how it starts and ends use sys.executable."""
    python = WarmPython(tmp_path_factory.mktemp("warm"))
    yield python
    python.close()


@pytest.fixture
def warm_processes(warm_python: WarmPython, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `warm_python` sys.executable, for the tests and for the processes that the project starts in them."""
    monkeypatch.setattr(sys, "executable", str(warm_python.path))


@pytest.fixture
def train_command(tiny_argv: Callable[..., list[str]]) -> Callable[..., list[str]]:
    """The command line of a tiny experiment in a process of its own."""
    return lambda *words: [sys.executable, str(ROOT / "train.py"), *tiny_argv(*words)]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A new file system of one megabyte; skips the test (in CI, fails it) without the right to mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    options = ["-t", "tmpfs", "-o", "size=1m", "tmpfs"]
    if shutil.which("mount") is None or subprocess.run(["mount", *options, folder], stderr=subprocess.PIPE).returncode:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("needs the right to mount a tmpfs")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.fixture
def make_read_only(small_disk: Path) -> Callable[[], None]:
    """Remounts `small_disk` read-only (file permissions do not stop root)."""
    return lambda: subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Headless Chromium that sends no requests of its own."""
    from playwright.sync_api import expect, sync_playwright

    flags = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=flags)
        expect.set_options(timeout=PAGE_MS)
        yield browser
        browser.close()
