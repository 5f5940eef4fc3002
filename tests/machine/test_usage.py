"""System metrics are plausible, sampled at their interval, logged in step order, and ignored when runs are compared."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from equal_runs import assert_equal_runs

import train
from utils.machine import usage
from utils.machine.usage import GIB, MIB, SystemSampler
from utils.runs.log import read_records
from utils.runs.metrics import metric

Argv = Callable[..., list[str]]
CPU = torch.device("cpu")
ALWAYS = ("--system-interval", "0.000001")  # at each write of the log
NAMES = ("system/process_cpu", "system/process_memory", "system/disk_free")


class Clock:
    """Stands in for time.monotonic."""

    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(usage, "time", clock)
    return clock


def test_a_sample_agrees_with_the_system(tmp_path: Path) -> None:
    sampler = SystemSampler(CPU, tmp_path, 10.0)
    sum(i * i for i in range(10**6))  # work, so that some CPU time is used
    values = sampler.sample()
    assert tuple(values) == NAMES
    assert 0 < values["system/process_cpu"] <= 100 * (os.cpu_count() or 1) + 1
    assert values["system/process_memory"] == pytest.approx(psutil.Process().memory_info().rss / MIB, rel=0.2)
    assert values["system/disk_free"] == pytest.approx(shutil.disk_usage(tmp_path).free / GIB, rel=0.1)
    assert [metric(name).unit for name in NAMES] == ["%", "MiB", "GiB"]


def test_a_sample_is_due_once_per_interval(clock: Clock, tmp_path: Path) -> None:
    sampler = SystemSampler(CPU, tmp_path, 10.0)
    assert not sampler.due()
    clock.now += 9.9
    assert not sampler.due()
    clock.now += 0.1
    assert sampler.due()
    sampler.sample()
    assert not sampler.due()
    clock.now += 25  # late: the next interval begins with the sample
    assert sampler.due()
    sampler.sample()
    clock.now += 5
    assert not sampler.due()


def test_with_interval_0_no_sample_is_ever_due(clock: Clock, tmp_path: Path) -> None:
    sampler = SystemSampler(CPU, tmp_path, 0.0)
    clock.now += 1e9
    assert not sampler.due()


def test_metrics_that_cannot_be_measured_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = SystemSampler(CPU, tmp_path / "away", 10.0)

    def gone() -> float:
        raise psutil.AccessDenied

    monkeypatch.setattr(sampler, "_process", SimpleNamespace(cpu_percent=gone))
    assert sampler.sample() == {}


def test_samples_are_logged_at_the_next_step(tiny_argv: Argv, only_run: Callable[[], Path]) -> None:
    assert train.main(tiny_argv(*ALWAYS, "--flush-interval", "2")) == 0
    records = list(read_records(only_run() / "logs" / "metrics.jsonl"))
    steps = [record["step"] for record in records]
    assert steps == sorted(steps)
    samples = [record for record in records if "system/process_cpu" in record]
    assert [record["step"] for record in samples] == [2, 3, 5, 6]  # after each write of the log
    assert all(tuple(record)[2:] == NAMES for record in samples)
    times = [record["time"] for record in records if "train/loss" not in record]
    assert times == sorted(times)


def test_with_interval_0_no_sample_is_logged(tiny_argv: Argv, only_run: Callable[[], Path]) -> None:
    assert train.main(tiny_argv("--system-interval", "0", "--flush-interval", "1")) == 0
    records = read_records(only_run() / "logs" / "metrics.jsonl")
    assert not [name for record in records for name in record if name.startswith("system/")]


def test_runs_that_differ_only_in_samples_are_equal(tiny_argv: Argv, runs_dir: Path) -> None:
    assert train.main(tiny_argv(*ALWAYS, "--flush-interval", "2", "--run-tag", "with")) == 0
    assert train.main(tiny_argv("--system-interval", "0", "--run-tag", "without")) == 0
    (sampled,), (unsampled,) = runs_dir.glob("*_with"), runs_dir.glob("*_without")
    assert_equal_runs(sampled, unsampled)


def test_a_gpu_reports_its_memory_and_utilisation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 3 * MIB)
    monkeypatch.setattr(torch.cuda, "utilization", lambda device: 87)
    values = SystemSampler(torch.device("cuda"), tmp_path, 10.0).sample()
    assert (values["system/gpu_memory"], values["system/gpu_utilization"]) == (3.0, 87.0)


def test_the_utilisation_of_a_gpu_is_left_out_if_the_driver_does_not_report_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(device: torch.device) -> int:
        raise RuntimeError("NVML is not there")

    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 3 * MIB)
    monkeypatch.setattr(torch.cuda, "utilization", unknown)
    values = SystemSampler(torch.device("cuda"), tmp_path, 10.0).sample()
    assert values["system/gpu_memory"] == 3.0
    assert "system/gpu_utilization" not in values
