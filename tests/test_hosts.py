"""Training on two hosts, one of which is cut off. Network namespaces stand in for the hosts."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from conftest import ROOT
from test_ranks import tensors_of

import train
from utils.checkpoints.folder import list_checkpoints
from utils.experiments.bits import compare_logs
from utils.runs.layout import CHECKPOINTS
from utils.runs.run import read_record

pytestmark = pytest.mark.slow
SECONDS = 200.0
END_SECONDS = 30.0  # within which the ranks of a host that is cut off must end
STEPS = 1000
IP = shutil.which("ip", path=f"{os.environ['PATH']}:/usr/sbin:/sbin") or "ip"


class Hosts:
    """Two hosts joined by a cable; close() ends the processes that start() has started."""

    def __init__(self) -> None:
        self.names = [f"wb{os.getpid()}-{number}" for number in range(2)]
        self.cables = [f"wb{os.getpid() % 100_000}v{number}" for number in range(2)]
        self.processes: list[subprocess.Popen[bytes]] = []

    def connect(self) -> None:
        for name in self.names:
            ip("netns", "add", name)
        ip("link", "add", self.cables[0], "netns", self.names[0], "type", "veth", "peer", "name", self.cables[1],
           "netns", self.names[1])  # fmt: skip
        for number, (name, cable) in enumerate(zip(self.names, self.cables, strict=True)):
            folder = Path("/etc/netns") / name  # `ip netns exec` mounts its files over those of /etc
            folder.mkdir(parents=True)
            (folder / "hosts").write_text("127.0.0.1 localhost\n10.77.0.1 host0\n10.77.0.2 host1\n")
            (folder / "nsswitch.conf").write_text("hosts: files\n")
            ip("-n", name, "addr", "add", f"10.77.0.{number + 1}/24", "dev", cable)
            ip("-n", name, "link", "set", cable, "up")
            ip("-n", name, "link", "set", "lo", "up")

    def start(self, number: int, output: Path, *words: str) -> subprocess.Popen[bytes]:
        """Start torchrun with one rank on a host."""
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=1:2", "--nproc-per-node=1"]
        torchrun += ["--rdzv-backend=c10d", "--rdzv-endpoint=10.77.0.1:29500", "--rdzv-id=hosts", "--max-restarts=3"]
        torchrun += [f"--local-addr=10.77.0.{number + 1}"]
        torchrun += [f"--rdzv-conf=is_host={1 - number},last_call_timeout=5,read_timeout=15"]
        path = os.pathsep.join([str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])])
        env = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": self.cables[number], "PYTHONPATH": path}
        with output.open("wb") as file:
            command = [IP, "netns", "exec", self.names[number], *torchrun, str(ROOT / "train.py"), *words]
            self.processes.append(subprocess.Popen(command, env=env, stdout=file, stderr=subprocess.STDOUT))
        return self.processes[-1]

    def cut_off(self, number: int) -> None:
        ip("-n", self.names[number], "link", "set", self.cables[number], "down")

    def ranks(self, number: int) -> list[psutil.Process]:
        """The ranks on a host, without torchrun."""
        agent = psutil.Process(self.processes[number].pid)
        return [process for process in agent.children(recursive=True) if "train.py" in " ".join(process.cmdline())]

    def close(self) -> None:
        for process in self.processes:
            with contextlib.suppress(psutil.Error):
                for child in psutil.Process(process.pid).children(recursive=True):
                    child.kill()
            process.kill()
            process.wait()
        for name in self.names:
            subprocess.run([IP, "netns", "delete", name], stderr=subprocess.DEVNULL)
            shutil.rmtree(Path("/etc/netns") / name, ignore_errors=True)


def ip(*words: str) -> None:
    subprocess.run([IP, *words], check=True, stderr=subprocess.PIPE, text=True)


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    """Two connected hosts; skips the test (in CI, fails it) without the right to make network namespaces."""
    made = Hosts()
    try:
        made.connect()
    except (OSError, subprocess.CalledProcessError) as error:
        made.close()
        why = getattr(error, "stderr", None) or error
        (pytest.fail if os.environ.get("CI") else pytest.skip)(
            f"needs iproute2 and the right to make namespaces: {why}"
        )
    try:
        yield made
    finally:
        made.close()


def wait_for(condition: Callable[[], bool], what: str, seconds: float = SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def test_training_continues_without_a_host_that_is_cut_off(
    hosts: Hosts, tiny_argv: Callable[..., list[str]], runs_dir: Path, tmp_path: Path
) -> None:
    words = [
        "--device",
        "cpu",
        "--lanes",
        "2",
        "--threads",
        "1",
        "--max-iters",
        str(STEPS),
        "--eval-interval",
        str(STEPS),
    ]
    words += ["--checkpoint-interval", "5", "--flush-interval", "1", "--sample-tokens", "0"]
    argv = tiny_argv(*words, "--run-tag", "two", "--resume", "auto", "--rank-timeout", "5")
    outputs = [tmp_path / f"host{number}.txt" for number in range(2)]
    for number in range(2):
        hosts.start(number, outputs[number], *argv)

    def printed() -> str:
        return "\n".join(path.read_text(errors="replace")[-5000:] for path in outputs)

    def has_checkpoint() -> bool:
        assert all(process.poll() is None for process in hosts.processes), printed()
        return any(list_checkpoints(run / CHECKPOINTS) for run in runs_dir.glob("*_two"))

    wait_for(has_checkpoint, "no checkpoint")
    ranks = hosts.ranks(1)
    assert len(ranks) == 1
    hosts.cut_off(1)
    wait_for(lambda: ranks[0].status() == psutil.STATUS_ZOMBIE, printed(), END_SECONDS)  # torchrun hangs too
    hosts.processes[1].send_signal(signal.SIGKILL)  # torchrun itself would wait for its store forever
    assert hosts.processes[0].wait(SECONDS) == 0, printed()
    (run,) = runs_dir.glob("*_two")
    record = read_record(run)
    assert (record["status"], len(record["resumes"])) == ("completed", 1)
    assert outputs[0].read_text(errors="replace").count("error: ") == 1
    assert "error: rank 1 gave no sign of life" in outputs[0].read_text(errors="replace")

    assert train.main(tiny_argv(*words, "--run-tag", "alone")) == 0
    (alone,) = runs_dir.glob("*_alone")
    expected = tensors_of(alone)
    assert all((tensor == expected[name]).all() for name, tensor in tensors_of(run).items())
    assert compare_logs(alone, run).identical
