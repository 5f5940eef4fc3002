"""The numbers of the last steps, kept on their device until they are written to the log in one transfer."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from utils.runs.log import LogWriter
from utils.runs.metrics import BITS_PER_BYTE, bits_per_byte, metric, metric_record

FLUSH_SECONDS = 2.0


class NonFiniteError(Exception):
    """A loss or gradient norm is NaN or infinite: training has diverged."""

    def __init__(self, step: int, name: str, value: float) -> None:
        super().__init__(f"the {name} at step {step} is {value}")
        self.step = step


class StepRecord(NamedTuple):
    """The numbers of one update."""

    step: int
    time: float
    lr: float
    loss: torch.Tensor  # (), on the device
    grad_norms: torch.Tensor  # (groups,), on the device


@dataclass(frozen=True)
class _Logged:
    """Other numbers, logged after `after` updates were added to the buffer."""

    after: int
    step: int
    time: float
    numbers: Mapping[str, float]
    tensors: Mapping[str, torch.Tensor]


class StepBuffer:
    """Collects the numbers of steps and writes them to metrics.jsonl in one transfer from the device.

    The device lags behind the host, so the time of a step is known only as a mean over the steps between two transfers.

    Args:
        writer: writes metrics.jsonl.
        flush_interval: steps between flushes; a flush is also due every FLUSH_SECONDS.
        log_interval: steps between records.
        tokens_per_step: tokens of one update.
        tolerance: how many steps in a row may be non-finite (under float16 the scaler skips them).
        nonfinite_in_a_row: how many steps in a row were non-finite before a resume.
        bytes_per_token: bytes of training text per token, to log the loss in bits per byte as well; None: not logged.
        extra_tokens: see TrainState.
    """

    def __init__(
        self,
        writer: LogWriter,
        flush_interval: int,
        log_interval: int,
        tokens_per_step: int,
        tolerance: int = 0,
        nonfinite_in_a_row: int = 0,
        bytes_per_token: float | None = None,
        extra_tokens: int = 0,
    ) -> None:
        self.writer, self.bytes_per_token = writer, bytes_per_token
        self.tolerance, self.nonfinite_in_a_row = tolerance, nonfinite_in_a_row
        self.flush_interval, self.log_interval = flush_interval, log_interval
        self.tokens_per_step, self.extra_tokens = tokens_per_step, extra_tokens
        self.last_loss: float | None = None
        self.tokens_per_second: float | None = None
        self._steps: list[StepRecord] = []
        self._logged: list[_Logged] = []
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leave the time since the last flush out of the step times."""
        self._clock = time.perf_counter()

    def add(self, step: int, loss: torch.Tensor, grad_norms: torch.Tensor, lr: float) -> StepRecord:
        """Keep the numbers of update `step` and return them; nothing is transferred.

        Args:
            loss: (), on the device.
            grad_norms: the norm of each parameter group, (groups,), on the device.
        """
        update = StepRecord(step, time.time(), lr, loss, grad_norms)
        self._steps.append(update)
        return update

    def log(self, step: int, values: Mapping[str, float | torch.Tensor]) -> None:
        """Keep other numbers of `step`, which is the last step added or a later one; nothing is transferred.

        Raises:
            KeyError: a name that is not registered.
            TypeError, RuntimeError: a value is not one number.
        """
        for name in values:
            metric(name)
        tensors = {
            name: value.detach().float().reshape(()).clone()
            for name, value in values.items()
            if isinstance(value, torch.Tensor)
        }
        numbers = {name: float(value) for name, value in values.items() if not isinstance(value, torch.Tensor)}
        self._logged.append(_Logged(len(self._steps), step, time.time(), numbers, tensors))

    def due(self) -> bool:
        return len(self._steps) >= self.flush_interval or time.perf_counter() - self._clock >= FLUSH_SECONDS

    def flush(self) -> bool:
        """Write what was collected; return whether that included updates.

        Raises:
            NonFiniteError: more than `tolerance` steps in a row were not finite; the records are written.
        """
        steps, logged = self._steps, self._logged
        self._steps, self._logged = [], []  # cleared first, so that a failed write is not repeated
        tensors = [tensor for entry in logged for tensor in entry.tensors.values()]
        losses, grad_norms, others = _numbers(steps, tensors)
        records: list[dict[str, Any] | None] = []
        if steps:
            seconds = (time.perf_counter() - self._clock) / len(steps)
            self.tokens_per_second = self.tokens_per_step / seconds
            self.last_loss = losses[-1]
            speed = {"tokens_per_second": round(self.tokens_per_second, 1), "step_ms": round(1000 * seconds, 3)}
            records = [self._record(*update, speed) for update in zip(steps, losses, grad_norms, strict=True)]
        self.writer.write(_in_order(records, logged, iter(others)))
        if not steps:
            return False
        self.restart_clock()
        self._check_finite(steps, losses, grad_norms)
        return True

    def _record(
        self, s: StepRecord, loss: float, grad_norm: float, speed: Mapping[str, float]
    ) -> dict[str, Any] | None:
        """The record of one update; None if log_interval leaves it out."""
        if s.step % self.log_interval and math.isfinite(loss + grad_norm):
            return None
        numbers = {"train/loss": loss, "lr": s.lr, "grad_norm": grad_norm}
        if self.bytes_per_token is not None:
            numbers[BITS_PER_BYTE["train/loss"]] = bits_per_byte(loss, self.bytes_per_token)
        tokens = s.step * self.tokens_per_step + self.extra_tokens
        return metric_record(s.step, s.time, {"tokens": tokens, **numbers, **speed})

    def _check_finite(self, steps: list[StepRecord], losses: list[float], grad_norms: list[float]) -> None:
        """Raises NonFiniteError at the first step with which more than `tolerance` in a row are not finite."""
        for s, loss, grad_norm in zip(steps, losses, grad_norms, strict=True):
            if math.isfinite(loss) and math.isfinite(grad_norm):
                self.nonfinite_in_a_row = 0
                continue
            self.nonfinite_in_a_row += 1
            if self.nonfinite_in_a_row > self.tolerance:
                name, value = ("gradient norm", grad_norm) if math.isfinite(loss) else ("loss", loss)
                raise NonFiniteError(s.step, name, value)


def _numbers(steps: list[StepRecord], tensors: list[torch.Tensor]) -> tuple[list[float], list[float], list[float]]:
    """Losses and global gradient norms of the steps, and the values of other tensors, in one transfer."""
    parts = (
        [torch.stack([s.loss for s in steps]).float(), torch.stack([s.grad_norms for s in steps]).norm(dim=1)]
        if steps
        else []
    )
    if tensors:
        device = steps[0].loss.device if steps else tensors[0].device
        parts.append(torch.stack([tensor.to(device) for tensor in tensors]))
    numbers = torch.cat([part.float() for part in parts]).tolist() if parts else []
    n = len(steps)
    return numbers[:n], numbers[n : 2 * n], numbers[2 * n :]


def _in_order(
    records: list[dict[str, Any] | None], logged: list[_Logged], numbers: Iterator[float]
) -> Iterator[dict[str, Any]]:
    """The records of updates with those of `logged` between them; `numbers` are the values of the logged tensors."""
    begin = 0
    for entry in logged:
        yield from filter(None, records[begin : entry.after])
        begin = entry.after
        values = {**entry.numbers, **{name: next(numbers) for name in entry.tensors}}
        yield metric_record(entry.step, entry.time, values)
    yield from filter(None, records[begin:])
