"""The numbers of the last steps, on their device until they are written to the log in one transfer."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch

from utils.run_log import LogWriter, metric_record

FLUSH_SECONDS = 2.0


class NonFiniteLossError(Exception):
    """A loss is NaN or infinite: training has diverged."""

    def __init__(self, step: int, loss: float) -> None:
        super().__init__(f"the loss at step {step} is {loss}")
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
    """

    def __init__(self, writer: LogWriter, flush_interval: int, log_interval: int, tokens_per_step: int) -> None:
        self.writer = writer
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

    def add(self, step: int, loss: torch.Tensor, grad_norm: torch.Tensor, lr: float) -> None:
        """Remember update `step`; nothing is transferred.

        Args:
            loss, grad_norm: 0-dimensional, on the device.
        """
        self._steps.append(_Step(step, time.time(), step * self.tokens_per_step, lr))
        self._values += (loss, grad_norm)

    def due(self) -> bool:
        return len(self._steps) >= self.flush_interval or time.perf_counter() - self._clock >= FLUSH_SECONDS

    def flush(self) -> bool:
        """Write the collected steps; False if there are none.

        Raises:
            NonFiniteLossError: after the records are written.
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
            if s.step % self.log_interval == 0 or not math.isfinite(loss)
        )
        self.last_loss = losses[-1]
        self.restart_clock()
        for s, loss in zip(steps, losses, strict=True):
            if not math.isfinite(loss):
                raise NonFiniteLossError(s.step, loss)
        return True
