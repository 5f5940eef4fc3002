"""`profile_step`: a step of a real run is profiled without changing the run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import train
from utils.machine import limits
from utils.profiling import in_run
from utils.runs.find import list_run_paths
from utils.runs.log import read_records

Argv = Callable[..., list[str]]
LONG = ("--max-iters", "14", "--eval-interval", "7", "--dropout", "0.2", "--system-interval", "0")
TIMES = {"time", "tokens_per_second", "step_ms"}


@pytest.fixture(autouse=True)
def quick_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "GEMM_SIZES", {"cpu": (64,)})
    monkeypatch.setattr(limits, "COPY_MIB", {"cpu": (1,)})


def numbers(run: Path) -> list[dict[str, Any]]:
    records = read_records(run / "logs" / "metrics.jsonl")
    return [{key: value for key, value in record.items() if key not in TIMES} for record in records]


def weights(run: Path) -> bytes:
    return (run / "artifacts" / "export" / "model.safetensors").read_bytes()


def profile_of(run: Path) -> dict[str, Any]:
    record = json.loads((run / "artifacts" / "profile" / "profile.json").read_text(encoding="utf-8"))
    assert isinstance(record, dict)
    return record


def test_a_profiled_run_has_the_same_numbers_and_weights(
    tiny_argv: Argv, runs_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main(tiny_argv(*LONG)) == 0
    assert train.main(tiny_argv(*LONG, "--profile-step", "11", "--gradient-accumulation-steps", "1")) == 0
    assert "profiled step 11: artifacts/profile/profile.png" in capsys.readouterr().out
    plain, profiled = list_run_paths(runs_dir)
    assert numbers(plain) == numbers(profiled)
    assert weights(plain) == weights(profiled)
    assert not (plain / "artifacts" / "profile").exists()

    folder = profiled / "artifacts" / "profile"
    assert sorted(path.name for path in folder.iterdir()) == ["profile.json", "profile.png", "trace.json"]
    record = profile_of(profiled)
    assert (record["run"], record["step"], record["steps"]) == (profiled.name, 11, 1)
    assert min(record["step_ms"], record["phases_ms"], record["profiled_ms"], record["mfu"]) > 0
    assert record["memory"]["activations"] > 0
    assert {row["phase"] for row in record["operators"]} >= {"forward", "backward", "optimizer"}
    events = json.loads((folder / "trace.json").read_text(encoding="utf-8"))["traceEvents"]
    assert [event.get("name") for event in events].count("step") == 1


def test_the_first_step_is_profiled_without_an_undisturbed_step_time(
    tiny_argv: Argv, only_run: Callable[[], Path]
) -> None:
    assert train.main(tiny_argv("--profile-step", "0")) == 0
    record = profile_of(only_run())
    assert record["step_ms"] is None
    assert record["memory"]["activations"] is None
    assert record["phases_ms"] > 0


def test_a_resumed_run_profiles_its_step_and_keeps_its_numbers(tiny_argv: Argv, runs_dir: Path) -> None:
    assert train.main(tiny_argv(*LONG)) == 0
    assert train.main(tiny_argv(*LONG, "--stop-at-step", "9", "--profile-step", "11")) == 0
    plain, profiled = list_run_paths(runs_dir)
    assert not (profiled / "artifacts" / "profile").exists()
    assert train.main(["--resume", str(profiled)]) == 0
    assert numbers(plain) == numbers(profiled)
    assert weights(plain) == weights(profiled)
    assert profile_of(profiled)["step"] == 11
    assert profile_of(profiled)["step_ms"] is None  # two steps are too few to time an undisturbed one


def test_a_step_that_is_never_reached_is_reported(
    tiny_argv: Argv, only_run: Callable[[], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main(tiny_argv("--profile-step", "6")) == 0
    message = "preflight: --profile-step: profile_step has no effect: the run ends before that step"
    assert message in capsys.readouterr().out
    assert not (only_run() / "artifacts" / "profile").exists()


@pytest.mark.parametrize("broken", ["new_profiler", "read_operators", "draw_profile", "limits_of", "phase_times"])
def test_a_failing_profiler_is_one_warning(
    broken: str,
    tiny_argv: Argv,
    only_run: Callable[[], Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("out of order")

    monkeypatch.setattr(in_run, broken, fail)
    assert train.main(tiny_argv("--profile-step", "3")) == 0
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    assert warnings == ["warning: profile_step: no profile was written: RuntimeError: out of order"]
    assert json.loads((only_run() / "run.json").read_text())["status"] == "completed"
    assert not list((only_run() / "artifacts").glob("profile/*"))


def test_a_full_disk_under_the_profile_does_not_end_the_run(
    tiny_argv: Argv,
    only_run: Callable[[], Path],
    small_disk: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(in_run.layout, "PROFILE", small_disk / "profile")
    (small_disk / "full").write_bytes(bytes(1_048_576 - 30_000))
    assert train.main(tiny_argv("--profile-step", "3")) == 0
    assert "warning: profile_step: no profile was written: OSError: " in capsys.readouterr().out
    assert json.loads((only_run() / "run.json").read_text())["status"] == "completed"
    assert list((small_disk / "profile").iterdir()) == []


def test_an_error_in_a_profiled_step_is_not_hidden(
    tiny_argv: Argv, only_run: Callable[[], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from utils.training import step as training

    forward_backward = training.forward_backward

    def broken(state: Any, phase: Any) -> Any:
        if state.step == 3:
            raise ZeroDivisionError("of the model")
        return forward_backward(state, phase)

    monkeypatch.setattr(training, "forward_backward", broken)
    with pytest.raises(ZeroDivisionError):
        train.main(tiny_argv("--profile-step", "3"))
    assert json.loads((only_run() / "run.json").read_text())["status"] == "failed"
    import torch

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):  # fails if another is active
        pass
