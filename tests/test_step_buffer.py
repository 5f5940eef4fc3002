"""The step buffer: what was added is what the log holds."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from utils import step_buffer
from utils.run_log import LogWriter, read_records
from utils.step_buffer import FLUSH_SECONDS, NonFiniteError, StepBuffer


class Clock:
    """Stands in for time.perf_counter."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(step_buffer.time, "perf_counter", clock)
    return clock


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[LogWriter]:
    writer = LogWriter(tmp_path / "metrics.jsonl")
    yield writer
    writer.close()


def add(buffer: StepBuffer, *steps: int, loss: float = 2.0) -> None:
    for step in steps:
        buffer.add(step, torch.tensor(loss + step), torch.tensor([step / 4, 0.0]), 0.1 * step)


def records(writer: LogWriter) -> list[dict[str, Any]]:
    return list(read_records(writer.path))


def test_records_hold_what_was_added(writer: LogWriter, clock: Clock) -> None:
    buffer = StepBuffer(writer, flush_interval=10, log_interval=1, tokens_per_step=96)
    began = time.time()
    add(buffer, 0, 1, 2, 3)
    clock.now += 0.5
    buffer.flush()
    found = records(writer)
    for record in found:
        assert began - 1e-3 <= record.pop("time") <= time.time() + 1e-3
    assert found == [
        {
            "step": step,
            "tokens": 96 * step,
            "train/loss": 2.0 + step,
            "lr": 0.1 * step,
            "grad_norm": step / 4,
            "tokens_per_second": 768.0,  # 4 x 96 tokens in half a second
            "step_ms": 125.0,
        }
        for step in range(4)
    ]
    assert buffer.last_loss == 5.0
    assert buffer.tokens_per_second == pytest.approx(768.0)


def test_nothing_is_written_before_a_flush(writer: LogWriter) -> None:
    buffer = StepBuffer(writer, 10, 1, 96)
    add(buffer, 0, 1)
    assert records(writer) == []
    assert buffer.last_loss is None


def test_a_flush_writes_each_step_once(writer: LogWriter) -> None:
    buffer = StepBuffer(writer, 10, 1, 96)
    add(buffer, 0, 1)
    buffer.flush()
    buffer.flush()
    add(buffer, 2)
    buffer.flush()
    assert [record["step"] for record in records(writer)] == [0, 1, 2]


def test_log_interval_thins_the_records_but_not_the_last_loss(writer: LogWriter) -> None:
    buffer = StepBuffer(writer, 10, log_interval=3, tokens_per_step=96)
    add(buffer, *range(5))
    buffer.flush()
    add(buffer, *range(5, 9))
    buffer.flush()
    assert [record["step"] for record in records(writer)] == [0, 3, 6]
    assert buffer.last_loss == 10.0


def test_a_flush_is_due_after_flush_interval_steps(writer: LogWriter, clock: Clock) -> None:
    buffer = StepBuffer(writer, 3, 1, 96)
    due = []
    for step in range(4):
        add(buffer, step)
        due.append(buffer.due())
    clock.now += 0.1
    assert due == [False, False, True, True]
    buffer.flush()
    assert not buffer.due()


def test_a_flush_is_due_after_a_while(writer: LogWriter, clock: Clock) -> None:
    buffer = StepBuffer(writer, 1000, 1, 96)
    add(buffer, 0)
    clock.now += FLUSH_SECONDS - 0.1
    assert not buffer.due()
    clock.now += 0.1
    assert buffer.due()
    buffer.flush()
    assert not buffer.due()


def test_what_was_not_training_is_not_in_the_step_time(writer: LogWriter, clock: Clock) -> None:
    buffer = StepBuffer(writer, 10, 1, 96)
    clock.now += 60
    buffer.restart_clock()
    add(buffer, 0, 1)
    clock.now += 0.25
    buffer.flush()
    clock.now += 0.5  # the next flush measures from the last one
    add(buffer, 2)
    buffer.flush()
    assert [record["step_ms"] for record in records(writer)] == [125.0, 125.0, 500.0]


@pytest.mark.parametrize(("loss", "word"), [(float("nan"), "nan"), (float("inf"), "inf"), (float("-inf"), "-inf")])
def test_a_nonfinite_loss_raises_after_the_records_are_written(writer: LogWriter, loss: float, word: str) -> None:
    buffer = StepBuffer(writer, 10, 1, 96)
    add(buffer, 0)
    buffer.add(1, torch.tensor(loss), torch.tensor([1.0, float("nan")]), 0.1)
    add(buffer, 2)
    with pytest.raises(NonFiniteError, match=f"the loss at step 1 is {word}") as caught:
        buffer.flush()
    assert caught.value.step == 1
    assert [record["step"] for record in records(writer)] == [0, 1, 2]
    assert (records(writer)[1]["train/loss"], records(writer)[1]["grad_norm"]) == (word, "nan")
    buffer.flush()  # the loop's last flush: nothing is left, so nothing is raised or written again
    assert len(records(writer)) == 3


def test_a_nonfinite_gradient_norm_alone_raises_too(writer: LogWriter) -> None:
    buffer = StepBuffer(writer, 10, 1, 96)
    buffer.add(0, torch.tensor(1.0), torch.tensor([0.5, float("inf")]), 0.1)
    with pytest.raises(NonFiniteError, match="the gradient norm at step 0 is inf"):
        buffer.flush()
    assert records(writer)[0]["grad_norm"] == "inf"


def test_steps_in_a_row_may_be_nonfinite_up_to_the_tolerance(writer: LogWriter) -> None:
    buffer = StepBuffer(writer, 10, 1, 96, tolerance=2, nonfinite_in_a_row=1)
    buffer.add(0, torch.tensor(1.0), torch.tensor([float("inf"), 0.0]), 0.1)
    add(buffer, 1)
    buffer.add(2, torch.tensor(1.0), torch.tensor([float("nan"), 0.0]), 0.1)
    buffer.flush()
    assert buffer.nonfinite_in_a_row == 1
    for step in (3, 4):
        buffer.add(step, torch.tensor(float("nan")), torch.tensor([1.0]), 0.1)
    with pytest.raises(NonFiniteError, match="the loss at step 4 is nan"):
        buffer.flush()


def test_a_nonfinite_step_is_recorded_whatever_the_log_interval(writer: LogWriter) -> None:
    buffer = StepBuffer(writer, 10, log_interval=5, tokens_per_step=96, tolerance=1)
    add(buffer, 0)
    buffer.add(1, torch.tensor(1.0), torch.tensor([float("inf"), 0.0]), 0.1)
    add(buffer, 2)
    buffer.flush()
    assert [record["step"] for record in records(writer)] == [0, 1]


def test_the_norm_is_that_of_all_groups(writer: LogWriter) -> None:
    buffer = StepBuffer(writer, 10, 1, 96)
    buffer.add(0, torch.tensor(1.0), torch.tensor([3.0, 4.0]), 0.1)
    buffer.flush()
    assert records(writer)[0]["grad_norm"] == 5.0


def test_half_precision_losses_are_written_as_numbers(writer: LogWriter) -> None:
    buffer = StepBuffer(writer, 10, 1, 96)
    buffer.add(0, torch.tensor(1.5, dtype=torch.bfloat16), torch.tensor([0.25], dtype=torch.float16), 0.1)
    buffer.flush()
    assert (records(writer)[0]["train/loss"], records(writer)[0]["grad_norm"]) == (1.5, 0.25)
