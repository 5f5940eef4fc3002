"""The numbers of the last steps, on their device until they are written to the log in one transfer."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch

from utils.run_log import LogWriter, metric_record

FLUSH_SECONDS = 2.0


class NonFiniteError(Exception):
    """A loss or gradient norm is NaN or infinite: training has diverged."""

    def __init__(self, step: int, name: str, value: float) -> None:
        super().__init__(f"the {name} at step {step} is {value}")
        self.step = step


@dataclass(frozen=True)
class _Step:
    step: int
    time: float
    tokens: int
    lr: float


class StepBuffer:
    """Collects steps, writes them as records of metrics.jsonl.

    The device works ahead of the host, so the time of one step is known only as a mean over the
    steps between two transfers.

    Args:
        writer: of metrics.jsonl.
        flush_interval: steps between flushes; a flush is also due every FLUSH_SECONDS.
        log_interval: every how many steps one is recorded.
        tokens_per_step: tokens of one update.
        tolerance: steps in a row that may be non-finite (under float16 the scaler skips them).
        nonfinite_in_a_row: how many there were just before.
    """

    def __init__(
        self,
        writer: LogWriter,
        flush_interval: int,
        log_interval: int,
        tokens_per_step: int,
        tolerance: int = 0,
        nonfinite_in_a_row: int = 0,
    ) -> None:
        self.writer = writer
        self.tolerance, self.nonfinite_in_a_row = tolerance, nonfinite_in_a_row
        self.flush_interval, self.log_interval = flush_interval, log_interval
        self.tokens_per_step = tokens_per_step
        self.last_loss: float | None = None
        self.tokens_per_second: float | None = None
        self._steps: list[_Step] = []
        self._values: list[torch.Tensor] = []  # loss, grad norm, loss, grad norm, ...
        self.restart_clock()

    def restart_clock(self) -> None:
        """What happened since the last flush (an evaluation, say) was not training."""
        self._clock = time.perf_counter()

    def add(self, step: int, loss: torch.Tensor, grad_norms: torch.Tensor, lr: float) -> None:
        """Remember update `step`; nothing is transferred.

        Args:
            loss: 0-dimensional, on the device.
            grad_norms: of the parameter groups, (groups,), on the device.
        """
        self._steps.append(_Step(step, time.time(), step * self.tokens_per_step, lr))
        self._values += (loss, grad_norms.norm())

    def due(self) -> bool:
        return len(self._steps) >= self.flush_interval or time.perf_counter() - self._clock >= FLUSH_SECONDS

    def flush(self) -> bool:
        """Write the collected steps; False if there are none.

        Raises:
            NonFiniteError: after the records are written; more than `tolerance` steps in a row are non-finite.
        """
        if not self._steps:
            return False
        values = torch.stack([value.float() for value in self._values]).tolist()
        seconds = (time.perf_counter() - self._clock) / len(self._steps)
        steps, self._steps, self._values = (
            self._steps,
            [],
            [],
        )  # taken out first: what fails to be written is not repeated
        self.tokens_per_second = self.tokens_per_step / seconds
        losses, grad_norms = values[::2], values[1::2]
        self.writer.write(
            metric_record(
                s.step,
                s.time,
                {
                    "tokens": s.tokens,
                    "train/loss": loss,
                    "lr": s.lr,
                    "grad_norm": grad_norm,
                    "tokens_per_second": round(self.tokens_per_second, 1),
                    "step_ms": round(seconds * 1000, 3),
                },
            )
            for s, loss, grad_norm in zip(steps, losses, grad_norms, strict=True)
            if s.step % self.log_interval == 0 or not math.isfinite(loss + grad_norm)
        )
        self.last_loss = losses[-1]
        self.restart_clock()
        for s, loss, grad_norm in zip(steps, losses, grad_norms, strict=True):
            if math.isfinite(loss) and math.isfinite(grad_norm):
                self.nonfinite_in_a_row = 0
                continue
            self.nonfinite_in_a_row += 1
            if self.nonfinite_in_a_row > self.tolerance:
                name, value = ("gradient norm", grad_norm) if math.isfinite(loss) else ("loss", loss)
                raise NonFiniteError(s.step, name, value)
        return True
