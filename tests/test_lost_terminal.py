"""With stdout and stderr closed, broken, full or not UTF-8, training goes on, and every script prints what it can."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, wait_until_trained

from utils.checkpoints.folder import list_checkpoints
from utils.runs.layout import CHECKPOINTS
from utils.runs.log import read_metrics
from utils.runs.run import read_record

DEADLINE_SECONDS = 60.0
ENDLESS = [
    "--max-iters",
    "1000000",
    "--eval-interval",
    "1000000",
    "--flush-interval",
    "5",
    "--checkpoint-interval",
    "0",
]
ASCII = os.environ | {"PYTHONIOENCODING": "ascii"}

Command = Callable[..., list[str]]


@pytest.fixture
def start(runs_dir: Path) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Starts processes, which are killed at the end of the test."""
    started = []

    def begin(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
        started.append(subprocess.Popen(command, **options))
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.wait()


def check_interrupted(run: Path, reason: str) -> None:
    """Check that a run has ended properly: its status, a checkpoint of its last step, its result in the log."""
    record = read_record(run)
    assert (record["status"], record["exit_reason"]) == ("interrupted", reason)
    assert next(step for step, _ in list_checkpoints(run / CHECKPOINTS)) == record["last_step"]
    assert f"interrupted: {reason}" in (run / "logs" / "train.log").read_text(encoding="utf-8")


def broken_pipe() -> int:
    """Return the write end of a pipe whose read end is closed."""
    reader, writer = os.pipe()
    os.close(reader)
    return writer


# ------------------------------------------------------------------------------------------------- training goes on


@pytest.mark.usefixtures("warm_processes")
@pytest.mark.parametrize("output", ["full", "broken", "read-only"])
def test_training_needs_no_output(output: str, train_command: Command, only_run: Callable[[], Path]) -> None:
    opened = {"full": lambda: os.open("/dev/full", os.O_WRONLY), "broken": broken_pipe}
    fd = opened.get(output, lambda: os.open(os.devnull, os.O_RDONLY))()
    assert subprocess.run(train_command(), stdout=fd, stderr=fd, check=False).returncode == 0
    os.close(fd)
    assert read_record(only_run())["status"] == "completed"
    log = (only_run() / "logs" / "train.log").read_text(encoding="utf-8")
    assert all(text in log for text in ("max_iters", "step 0/6", "step 6/6", "completed", "Next"))


@pytest.mark.usefixtures("warm_processes")
def test_training_goes_on_when_the_disk_behind_stdout_fills_up(
    train_command: Command, only_run: Callable[[], Path], small_disk: Path
) -> None:
    (small_disk / "filler").write_bytes(bytes(2**20 - 4096))
    with (small_disk / "out").open("wb", buffering=0) as out:
        out.write(bytes(3000))
        assert subprocess.run(train_command(), stdout=out, stderr=out, check=False).returncode == 0
    assert (small_disk / "out").stat().st_size == 4096
    assert read_record(only_run())["status"] == "completed"
    assert "step 6/6" in (only_run() / "logs" / "train.log").read_text(encoding="utf-8")


@pytest.mark.usefixtures("warm_processes")
def test_a_full_disk_under_the_log_of_the_output_ends_no_run(
    train_command: Command, only_run: Callable[[], Path], tmp_path: Path
) -> None:
    patched = tmp_path / "patched.py"
    patched.write_text(
        "import sys, pathlib, train\n"
        "from utils.terminal.console import Terminal\n"
        "attach = Terminal.attach\n"
        "Terminal.attach = lambda self, path: attach(self, pathlib.Path('/dev/full'))\n"
        "sys.exit(train.main(sys.argv[1:]))\n"
    )
    command = [sys.executable, str(patched), *train_command()[2:]]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    assert "warning: the log of the output is incomplete: No space left on device" in result.stdout
    assert read_record(only_run())["status"] == "completed"


@pytest.mark.usefixtures("warm_processes")
def test_callbacks_and_warnings_may_print(train_command: Command, only_run: Callable[[], Path], tmp_path: Path) -> None:
    (tmp_path / "loud.py").write_text(
        "import sys, warnings\n"
        "from workbench import Callback\n"
        "class Loud(Callback):\n"
        "    def on_step(self, run):\n"
        "        print('ü' * 10_000)\n"
        "        print('ü' * 10_000, file=sys.stderr, flush=True)\n"
        "        warnings.warn(f'step {run.state.step}')\n"
    )
    fd = broken_pipe()
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = train_command("--callbacks", "loud:Loud")
    assert subprocess.run(command, stdout=fd, stderr=fd, env=environment, check=False).returncode == 0
    os.close(fd)
    assert read_record(only_run())["status"] == "completed"


# ---------------------------------------------------------------------------------------------------------- signals


@pytest.mark.usefixtures("warm_processes")
@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_ends_training_properly_even_if_its_message_cannot_be_written(
    signum: signal.Signals, status: int, train_command: Command, start: Callable[..., Any], runs_dir: Path
) -> None:
    reader, writer = os.pipe()
    process = start(train_command(*ENDLESS), stdout=writer, stderr=writer)
    os.close(writer)
    run = wait_until_trained(process, runs_dir)
    os.close(reader)  # as `| tee log` does after Ctrl-C
    process.send_signal(signum)
    assert process.wait(timeout=DEADLINE_SECONDS) == status
    check_interrupted(run, signum.name)


@pytest.mark.slow
@pytest.mark.parametrize("ignored", [False, True])
def test_closing_the_terminal_ends_training_unless_sighup_is_ignored(
    ignored: bool, train_command: Command, start: Callable[..., Any], runs_dir: Path
) -> None:
    master, terminal = os.openpty()

    def lead() -> None:
        os.login_tty(terminal)
        signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)

    process = start(train_command(*ENDLESS), preexec_fn=lead)
    os.close(terminal)
    run = wait_until_trained(process, runs_dir)
    os.close(master)  # the kernel sends SIGHUP; writing fails from now on
    if ignored:
        wait_until_trained(process, runs_dir, len(read_metrics(run / "logs", "train/loss")) + 500)
        process.terminate()
    assert process.wait(timeout=DEADLINE_SECONDS) == (143 if ignored else 129)
    check_interrupted(run, "SIGTERM" if ignored else "SIGHUP")


# ------------------------------------------------------------------------------------------------ closed descriptors


@pytest.mark.slow
@pytest.mark.parametrize("closed", [(2,), (0, 1, 2)])
def test_no_file_takes_the_descriptor_of_a_closed_standard_stream(
    closed: tuple[int, ...], train_command: Command, start: Callable[..., Any], runs_dir: Path
) -> None:
    def close() -> None:
        for fd in closed:
            os.close(fd)

    process = start(train_command(*ENDLESS, "--note", "größer"), preexec_fn=close)
    run = wait_until_trained(process, runs_dir)
    process.terminate()  # its message is written to descriptor 2
    assert process.wait(timeout=DEADLINE_SECONDS) == 143
    check_interrupted(run, "SIGTERM")
    (line,) = (run / "lock").read_text(encoding="utf-8").splitlines()
    assert line.split()[0] == str(process.pid)


# --------------------------------------------------------------------------------------------------------- encodings


@pytest.mark.slow
@pytest.mark.usefixtures("warm_processes")
def test_every_script_prints_any_text_to_an_ascii_stream(
    train_command: Command, tiny_argv: Command, runs_dir: Path
) -> None:
    def output(script: str, *words: str) -> str:
        result = subprocess.run([sys.executable, ROOT / script, *words], capture_output=True, env=ASCII, check=False)
        assert (result.returncode, result.stderr) == (0, b""), script
        return result.stdout.decode("ascii")

    printed = output("train.py", *tiny_argv("--note", "größer"))
    assert r"gr\xf6\xdfer" in printed
    folder = ("--runs-dir", str(runs_dir))
    assert r"gr\xf6\xdfer" in output("experiments.py", "list", *folder)
    assert json.loads(output("experiments.py", "list", "--json", *folder))[0]["note"] == "größer"
    plot = output("experiments.py", "plot", "latest", *folder)
    assert "**" in plot
    assert "\\" not in plot
    profile = output("profile_model.py", *tiny_argv("--steps", "1", "--warmup", "0"))
    assert "##" in profile
    assert "\\" not in profile
    assert output("inference.py", "latest", "--show-info", *folder)


# ------------------------------------------------------------------------------------------------- the other scripts


@pytest.mark.parametrize("words", [["train.py", "--help"], ["experiments.py", "--help"]])
def test_help_that_cannot_be_written_is_reported_in_one_line(words: list[str]) -> None:
    command = [sys.executable, ROOT / words[0], *words[1:]]
    with Path("/dev/full").open("w") as full:
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (result.returncode, result.stderr) == (1, "error: output: cannot be written: No space left on device\n")
    fd = broken_pipe()
    result = subprocess.run(command, stdout=fd, stderr=subprocess.PIPE, text=True, check=False)
    os.close(fd)
    assert (result.returncode, result.stderr) == (141, "")


def test_messages_that_cannot_be_written_change_no_exit_status() -> None:
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, ROOT / "experiments.py", "show", "nothing", "--runs-dir", "nowhere"]
        assert subprocess.run(command, stderr=full, check=False).returncode == 2


# ------------------------------------------------------------------------------------------------- the next commands


@pytest.mark.slow
@pytest.mark.usefixtures("warm_processes")
def test_the_next_commands_work_as_pasted_from_another_folder(train_command: Command, tmp_path: Path) -> None:
    here = tmp_path / "another folder"
    here.mkdir()

    def run(command: str | list[str]) -> dict[str, str]:
        """Run a command in the folder, and return the commands that it prints."""
        shell = isinstance(command, str)
        result = subprocess.run(command, shell=shell, cwd=here, capture_output=True, text=True, check=False)
        assert (result.returncode, result.stderr) == (0, ""), command
        _, _, following = result.stdout.partition("\nNext\n")
        return {line.split()[0]: line.split(maxsplit=1)[1] for line in following.splitlines()}

    following = run(train_command("--runs-dir", str(tmp_path / "my runs"), "--run-tag", "x", "--stop-at-step", "3"))
    following = run(following["continue"])
    assert "--prompt" not in following["generate"]  # the text of this corpus has no T
    run(following["generate"])
    program, _, folder = shlex.split(following["curves"])  # not run: it would serve until Ctrl-C
    assert shutil.which(program)
    assert Path(folder) == tmp_path / "my runs"
