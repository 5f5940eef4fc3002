"""The flight recorder: the last 64 steps as readable JSON, even if their numbers are not finite."""

from __future__ import annotations

import json
import math
import time
import zlib
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

from utils.training import flight_recorder
from utils.training.flight_recorder import STEPS, FlightRecorder, fingerprint
from utils.training.step_buffer import StepRecord

CPU = torch.device("cpu")


def recorder() -> FlightRecorder:
    return FlightRecorder(CPU, ["matrices", "vectors"], lambda step: [step, 10 * step])


def update(step: int, loss: torch.Tensor, grad_norms: torch.Tensor) -> StepRecord:
    return StepRecord(step, time.time(), 1e-3, loss, grad_norms)


def record(recorder: FlightRecorder, *steps: int, loss: float = 2.5) -> None:
    for step in steps:
        recorder.record(update(step, torch.tensor(loss), torch.tensor([0.5, 0.25])))


def dumped(recorder: FlightRecorder, folder: Path, reason: str = "why") -> dict[str, Any]:
    recorder.dump(folder / "flight_recorder.json", reason)
    return json.loads((folder / "flight_recorder.json").read_text(encoding="utf-8"))


def test_a_step_is_recorded_in_full(tmp_path: Path) -> None:
    before = time.time()
    one = recorder()
    record(one, 7)
    content = dumped(one, tmp_path, "train/loss is nan at step 7")
    assert content["reason"] == "train/loss is nan at step 7"
    (step,) = content["steps"]
    assert before - 1 <= step.pop("time") <= time.time() + 1
    assert step.pop("memory_bytes") > 1_000_000
    assert step == {
        "step": 7,
        "loss": 2.5,
        "grad_norms": {"matrices": 0.5, "vectors": 0.25},
        "lr": 1e-3,
        "sample_offsets": [7, 70],
        "rng_crc32": fingerprint(torch.get_rng_state()),
    }


@pytest.mark.parametrize("count", [0, 1, STEPS - 1, STEPS, STEPS + 1, 200])
def test_the_last_64_steps_are_kept_in_order(tmp_path: Path, count: int) -> None:
    one = recorder()
    record(one, *range(count))
    assert STEPS == 64
    assert [step["step"] for step in dumped(one, tmp_path)["steps"]] == list(range(count))[-64:]


def test_numbers_that_are_not_finite_are_words(tmp_path: Path) -> None:
    one = recorder()
    one.record(update(0, torch.tensor(math.nan), torch.tensor([math.inf, -math.inf])))
    (step,) = dumped(one, tmp_path)["steps"]
    assert step["loss"] == "nan"
    assert step["grad_norms"] == {"matrices": "inf", "vectors": "-inf"}


def test_low_precision_losses_are_written_as_numbers(tmp_path: Path) -> None:
    one = recorder()
    one.record(update(0, torch.tensor(2.5, dtype=torch.bfloat16), torch.tensor([1.0, 2.0], dtype=torch.float16)))
    assert dumped(one, tmp_path)["steps"][0]["loss"] == 2.5


def test_recording_transfers_nothing_from_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_arguments: object) -> NoReturn:
        raise AssertionError("a number was read while training")

    one = recorder()
    with monkeypatch.context() as patch:
        for name in ("item", "tolist", "cpu", "__float__", "__bool__"):
            patch.setattr(torch.Tensor, name, fail)
        record(one, 0)
    assert dumped(one, tmp_path)["steps"][0]["loss"] == 2.5


def test_recording_draws_no_random_numbers() -> None:
    before = torch.get_rng_state()
    record(recorder(), 0, 1, 2)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_fingerprint_tells_random_states_apart() -> None:
    torch.manual_seed(3)
    first = fingerprint(torch.get_rng_state())
    assert first == f"{zlib.crc32(torch.get_rng_state().numpy().tobytes()):08x}"
    torch.rand(1)
    second = fingerprint(torch.get_rng_state())
    torch.manual_seed(3)
    assert fingerprint(torch.get_rng_state()) == first != second


def test_each_step_has_the_fingerprint_of_its_random_state(tmp_path: Path) -> None:
    one = recorder()
    fingerprints = []
    for step in range(3):
        torch.rand(1)
        fingerprints.append(fingerprint(torch.get_rng_state()))
        record(one, step)
    assert [step["rng_crc32"] for step in dumped(one, tmp_path)["steps"]] == fingerprints
    assert len(set(fingerprints)) == 3


def test_without_dropout_the_fingerprint_is_that_of_the_last_look(tmp_path: Path) -> None:
    one = FlightRecorder(CPU, ["matrices", "vectors"], lambda step: [], draws=False)
    record(one, 0)
    torch.rand(1)
    one.look()
    record(one, 1)
    first, second = (step["rng_crc32"] for step in dumped(one, tmp_path)["steps"])
    assert first != second == fingerprint(torch.get_rng_state())


def test_memory_is_that_of_the_last_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    amounts = iter((5, 6))
    monkeypatch.setattr(flight_recorder, "memory_in_use", lambda device: next(amounts))
    one = recorder()
    record(one, 0, 1)
    one.look()
    record(one, 2)
    assert [step["memory_bytes"] for step in dumped(one, tmp_path)["steps"]] == [5, 5, 6]


def test_a_later_dump_replaces_an_earlier_one(tmp_path: Path) -> None:
    one = recorder()
    record(one, 0)
    dumped(one, tmp_path, "first")
    record(one, 1)
    content = dumped(one, tmp_path, "second")
    assert (content["reason"], len(content["steps"])) == ("second", 2)
    assert [path.name for path in tmp_path.iterdir()] == ["flight_recorder.json"]


def test_a_dump_into_a_missing_folder_raises(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        recorder().dump(tmp_path / "nowhere" / "flight_recorder.json", "why")
