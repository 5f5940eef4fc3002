"""The step buffer: the log holds what was added."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from utils.runs.log import LogWriter, read_records
from utils.training import step_buffer
from utils.training.step_buffer import FLUSH_SECONDS, NonFiniteError, StepBuffer


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


def test_a_flush_is_due_after_flush_seconds(writer: LogWriter, clock: Clock) -> None:
    buffer = StepBuffer(writer, 1000, 1, 96)
    add(buffer, 0)
    clock.now += FLUSH_SECONDS - 0.1
    assert not buffer.due()
    clock.now += 0.1
    assert buffer.due()
    buffer.flush()
    assert not buffer.due()


def test_time_outside_training_is_not_in_the_step_time(writer: LogWriter, clock: Clock) -> None:
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


def test_as_many_steps_in_a_row_as_tolerated_may_be_nonfinite(writer: LogWriter) -> None:
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


def test_a_nonfinite_step_is_recorded_at_any_log_interval(writer: LogWriter) -> None:
    buffer = StepBuffer(writer, 10, log_interval=5, tokens_per_step=96, tolerance=1)
    add(buffer, 0)
    buffer.add(1, torch.tensor(1.0), torch.tensor([float("inf"), 0.0]), 0.1)
    add(buffer, 2)
    buffer.flush()
    assert [record["step"] for record in records(writer)] == [0, 1]


def test_the_gradient_norm_is_that_of_all_groups(writer: LogWriter) -> None:
    buffer = StepBuffer(writer, 10, 1, 96)
    buffer.add(0, torch.tensor(1.0), torch.tensor([3.0, 4.0]), 0.1)
    buffer.flush()
    assert records(writer)[0]["grad_norm"] == 5.0


def test_half_precision_losses_are_written_as_numbers(writer: LogWriter) -> None:
    buffer = StepBuffer(writer, 10, 1, 96)
    buffer.add(0, torch.tensor(1.5, dtype=torch.bfloat16), torch.tensor([0.25], dtype=torch.float16), 0.1)
    buffer.flush()
    assert (records(writer)[0]["train/loss"], records(writer)[0]["grad_norm"]) == (1.5, 0.25)


# ------------------------------------------------------------------------------------------ other numbers


def other(writer: LogWriter) -> list[tuple[int, Any]]:
    """(step, lr) of the records that hold lr alone, which stands for any registered name."""
    return [(record["step"], record["lr"]) for record in records(writer) if record.keys() == {"step", "time", "lr"}]


@pytest.mark.parametrize(
    ("value", "logged"),
    [
        (0.1, 0.1),
        (3, 3.0),
        (True, 1.0),
        (np.float32(0.5), 0.5),
        (float("nan"), "nan"),
        (torch.tensor(0.5), 0.5),
        (torch.tensor([[0.5]]), 0.5),
        (torch.tensor(0.5, dtype=torch.bfloat16), 0.5),
        (torch.tensor(7), 7.0),
        (torch.tensor(0.1, dtype=torch.float64), torch.tensor(0.1).item()),
        (torch.tensor(float("-inf")), "-inf"),
        (torch.nn.Parameter(torch.tensor(0.25)), 0.25),
    ],
    ids=str,
)
def test_any_number_can_be_logged(value: Any, logged: float | str, writer: LogWriter) -> None:
    buffer = StepBuffer(writer, 10, 1, 96)
    buffer.log(4, {"lr": value})
    assert records(writer) == []
    assert not buffer.flush()  # no update was among the records
    assert other(writer) == [(4, logged)]
    buffer.flush()
    assert len(records(writer)) == 1


@pytest.mark.parametrize(
    ("values", "error"),
    [
        ({"lr": 0.1, "no/such": 1.0}, KeyError),
        ({"lr": None}, TypeError),
        ({"lr": torch.zeros(2)}, RuntimeError),
        ({"lr": [1.0, 2.0]}, TypeError),
    ],
    ids=str,
)
def test_a_value_that_is_not_a_number_is_refused_when_it_is_logged(
    values: dict[str, Any], error: type[Exception], writer: LogWriter
) -> None:
    buffer = StepBuffer(writer, 10, 1, 96)
    with pytest.raises(error):
        buffer.log(4, values)
    buffer.flush()
    assert records(writer) == []


def test_a_tensor_has_the_value_that_it_had_when_it_was_logged(writer: LogWriter) -> None:
    buffer = StepBuffer(writer, 10, 1, 96)
    value = torch.tensor(1.0)
    buffer.log(0, {"lr": value})
    value.add_(1)
    buffer.log(0, {"lr": value})
    buffer.flush()
    assert other(writer) == [(0, 1.0), (0, 2.0)]


@pytest.mark.parametrize("log_interval", [1, 3])
def test_other_numbers_follow_the_update_that_they_belong_to(log_interval: int, writer: LogWriter) -> None:
    buffer = StepBuffer(writer, 10, log_interval, 96)
    buffer.log(0, {"lr": 100.0})  # before the first update
    for step in range(7):
        add(buffer, step)
        buffer.log(step, {"lr": torch.tensor(float(step))})
        if step in (2, 3):
            buffer.flush()
    buffer.log(7, {"lr": 200.0})  # an evaluation
    buffer.flush()
    expected: list[tuple[int, str]] = [(0, "other")]
    for step in range(7):
        expected += [(step, "update")] * (step % log_interval == 0) + [(step, "other")]
    kinds = [(record["step"], "update" if "train/loss" in record else "other") for record in records(writer)]
    assert kinds == [*expected, (7, "other")]
    assert [value for _, value in other(writer)] == [100.0, *map(float, range(7)), 200.0]


def test_other_numbers_are_written_even_if_a_loss_is_not_finite(writer: LogWriter) -> None:
    buffer = StepBuffer(writer, 10, 1, 96)
    buffer.add(0, torch.tensor(float("nan")), torch.tensor([1.0]), 0.1)
    buffer.log(0, {"lr": torch.tensor(5.0)})
    with pytest.raises(NonFiniteError):
        buffer.flush()
    assert other(writer) == [(0, 5.0)]
