"""The profile of a training step: shares add up, and profile_model.py writes what it shows."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch.profiler import record_function

import profile_model
from utils.profiling import OTHER, StepProfile, profile_steps

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def switches_restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """profile_model.main sets up its process; the tests after it find it as it was."""
    monkeypatch.setenv("KINETO_LOG_LEVEL", "99")
    deterministic = torch.are_deterministic_algorithms_enabled()
    precision, threads = torch.get_float32_matmul_precision(), torch.get_num_threads()
    with torch.random.fork_rng():
        yield
    torch.use_deterministic_algorithms(deterministic)
    torch.set_float32_matmul_precision(precision)
    torch.set_num_threads(threads)


class Step:
    """A step with two marked phases and some work outside of them."""

    def __init__(self) -> None:
        self.calls = 0
        self.matrix = torch.randn(120, 120)

    def __call__(self) -> None:
        self.calls += 1
        with record_function("small"):
            self.matrix.add(1.0)
        for _ in range(2):
            with record_function("large"):
                for _ in range(20):
                    self.matrix @ self.matrix
        self.matrix.sin()


def check_sums(result: StepProfile) -> None:
    assert sum(row.share for row in result.phases) == pytest.approx(100)
    assert sum(row.share for row in result.operators) == pytest.approx(100)
    assert sum(row.time_ms for row in result.phases) == pytest.approx(result.step_ms)
    assert all(row.share >= 0 and row.time_ms >= 0 for row in result.phases + result.operators)


@pytest.fixture(scope="module")
def result() -> StepProfile:
    return profile_steps(Step(), ("small", "large"), CPU, steps=4, warmup=1, top=100)


def test_phases_come_in_their_order_and_add_up_to_100(result: StepProfile) -> None:
    check_sums(result)
    assert [row.name for row in result.phases] == ["small", "large", OTHER]
    small, large, _ = result.phases
    assert (small.calls, large.calls) == (1.0, 2.0)  # per step
    assert large.share > small.share


def test_operators_come_by_time_and_are_counted_per_step(result: StepProfile) -> None:
    shares = [row.share for row in result.operators]
    assert shares == sorted(shares, reverse=True)
    calls = {row.name: row.calls for row in result.operators}
    assert calls["aten::mm"] == 40
    assert calls["aten::sin"] == 1
    assert calls.keys().isdisjoint({"step", "small", "large", OTHER})
    assert result.operators[0].name == "aten::mm"


def test_operators_beyond_top_are_one_row() -> None:
    result = profile_steps(Step(), ("small", "large"), CPU, steps=2, warmup=0, top=1)
    check_sums(result)
    assert [row.name for row in result.operators] == ["aten::mm", OTHER]


def test_warmup_steps_are_run_and_not_counted(result: StepProfile) -> None:
    step = Step()
    measured = profile_steps(step, ("small",), CPU, steps=3, warmup=2, top=5)
    assert step.calls == 5
    assert measured.steps == 3
    assert measured.phases[0].calls == 1.0


def test_the_script_writes_its_profile_and_a_chrome_trace(
    tiny_argv: Callable[..., list[str]], tmp_path: Path, runs_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "deep" / "profile"
    words = ("--steps", "3", "--warmup", "1", "--top", "4", "--gradient-accumulation-steps", "2", "--out", str(out))
    assert profile_model.main(tiny_argv(*words)) == 0

    profile = json.loads((out / "profile.json").read_text(encoding="utf-8"))
    assert profile["steps"] == 3
    assert profile["step_ms"] > 0
    phases = {row["name"]: row for row in profile["phases"]}
    assert list(phases) == [*profile_model.PHASES, OTHER]
    assert all(phases[name]["share"] > 0 for name in profile_model.PHASES)
    assert [phases[name]["calls"] for name in profile_model.PHASES] == [2.0, 2.0, 2.0, 1.0, 1.0]  # two micro-steps
    assert len(profile["operators"]) == 5
    for table in ("phases", "operators"):
        assert sum(row["share"] for row in profile[table]) == pytest.approx(100)

    events = json.loads((out / "trace.json").read_text(encoding="utf-8"))["traceEvents"]
    names = [event.get("name") for event in events]
    assert names.count("step") == 3
    assert names.count("forward") == 6
    assert any(str(name).startswith("aten::") for name in names)

    shown = capsys.readouterr().out
    assert all(name in shown for name in profile_model.PHASES)
    assert shown.count("100.0%") == 2
    assert str(out / "profile.json") in shown.replace("\n", "")
    assert not runs_dir.exists()  # profiling is no run


def test_the_script_without_out_writes_no_files(
    tiny_argv: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert profile_model.main(tiny_argv("--steps", "1", "--warmup", "0")) == 0
    assert os.listdir() == []


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (("--steps", "0"), "--steps must be at least 1, not 0"),
        (("--warmup", "-1"), "--warmup must be at least 0, not -1"),
        (("--top", "0"), "--top must be at least 1, not 0"),
        (("--steps", "many"), "--steps"),
        (("--dataset", "/no/such/text"), "unknown dataset /no/such/text"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(
    tiny_argv: Callable[..., list[str]], words: tuple[str, ...], error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert profile_model.main(tiny_argv(*words)) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert error in message
    assert message.count("\n") == 1


def test_an_out_folder_that_cannot_be_made_is_a_mistake(
    tiny_argv: Callable[..., list[str]], tiny_corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert profile_model.main(tiny_argv("--out", str(tiny_corpus))) == 2
    assert "cannot be made" in capsys.readouterr().err
