"""Sweeps on a real Ray cluster on this machine, with two workers."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from benchmarks.sweep import SPACE, command, differences, facts, trainings
from utils.errors import UserError
from utils.runs.find import list_run_paths
from utils.runs.lock import wait_until_free
from utils.runs.run import read_record

ROOT = Path(__file__).resolve().parents[2]
STAND_IN = "tests/sweeps/stand_in.py sweep"


def test_without_the_package_ray_one_line_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from utils.sweeps.ray_engine import run_on_ray

    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match="--engine ray needs the package ray: pip install"):
        run_on_ray(None, 1, 1, 1)  # type: ignore[arg-type]


def test_an_error_of_ray_without_a_message_is_reported_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from utils.sweeps.ray_engine import run_on_ray

    def init(**settings: object) -> None:
        raise TimeoutError

    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(init=init, tune=None))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    plan = SimpleNamespace(threads=1, config=SimpleNamespace(train=SimpleNamespace(threads=None)))
    with pytest.raises(UserError, match=r"^Ray \(on this machine\): TimeoutError$"):
        run_on_ray(SimpleNamespace(plan=plan, root=ROOT), 1, 1, 1)  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_killed_ray_worker_is_replaced_and_its_trial_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same trials, values and logs as without Ray, although a worker was killed."""
    monkeypatch.setenv("SWEEP_STEP_SECONDS", "0.2")
    (tmp_path / "space.yaml").write_text(SPACE)
    for name in ("local", "ray"):
        (tmp_path / name).mkdir()
    subprocess.run(command(tmp_path / "local", 3, 10, script=STAND_IN), cwd=ROOT, check=True)
    driver = subprocess.Popen(
        command(tmp_path / "ray", 3, 10, "--engine=ray", "--jobs=2", script=STAND_IN), cwd=ROOT, stdout=subprocess.PIPE
    )
    found: list[psutil.Process] = []
    while driver.poll() is None and not found:
        found = trainings(tmp_path / "ray")
        time.sleep(0.05)
    assert found, "the driver ended without a training"
    worker = psutil.Process(found[0].ppid())
    assert "ray" in worker.name()
    worker.kill()
    output, _ = driver.communicate()
    assert driver.returncode == 0
    assert b"3 complete trials" in output
    assert differences(facts(tmp_path / "local"), facts(tmp_path / "ray")) == []


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1])  # Tune handles SIGUSR1 itself
def test_a_signal_stops_the_trials_and_another_driver_continues_them(
    signum: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trainings save checkpoints when Ray ends their workers."""
    monkeypatch.setenv("SWEEP_STEP_SECONDS", "1")
    (tmp_path / "space.yaml").write_text(SPACE)
    folder = tmp_path / "ray"
    folder.mkdir()
    words = command(folder, 3, 20, "--jobs=2", script=STAND_IN)
    driver = subprocess.Popen([*words, "--engine=ray"], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while driver.poll() is None and not trainings(folder):
        time.sleep(0.05)
    driver.send_signal(signum)
    _, errors = driver.communicate()
    assert driver.returncode == 128 + signum
    assert b"stopped: --resume continues space" in errors
    stopped = list_run_paths(folder / "runs")
    for path in stopped:
        wait_until_free(path, 60.0)
        assert read_record(path)["status"] == "interrupted"
    monkeypatch.setenv("SWEEP_STEP_SECONDS", "0")
    resumed = subprocess.run(words, cwd=ROOT, stdout=subprocess.PIPE, check=True)
    assert b"3 complete trials" in resumed.stdout
    records = [read_record(path) for path in list_run_paths(folder / "runs")]
    assert sorted(record["sweep"]["number"] for record in records) == [0, 1, 2]
    assert [len(record["resumes"]) for record in records] == [1] * len(stopped) + [0] * (3 - len(stopped))
