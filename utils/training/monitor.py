"""Everything that watches training: the log and its buffer, the flight recorder, system metrics, the progress line."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from utils.machine.usage import SystemSampler
from utils.runs.log import RunLog
from utils.runs.metrics import metric_record
from utils.terminal.progress import TrainingProgress
from utils.training.flight_recorder import FlightRecorder
from utils.training.histograms import Histograms
from utils.training.state import TrainState
from utils.training.step_buffer import StepBuffer


class Monitor:
    """Records training for the log, the flight recorder and the progress display, without changing it.

    Args:
        state: the training to record; its settings say how much and how often.
        log: receives the records.
        path: the run directory.
        progress: shows steps and losses to a person.
        after_flush: called after each write of training records to the log.
    """

    def __init__(
        self,
        state: TrainState,
        log: RunLog,
        path: Path,
        progress: TrainingProgress,
        after_flush: Callable[[], None] = lambda: None,
    ) -> None:
        tracking, settings = state.config.tracking, state.config.train
        self.state, self.progress = state, progress
        self._log = log
        self._buffer = StepBuffer(
            log.metrics,
            tracking.flush_interval,
            tracking.log_interval,
            state.tokens_per_step,
            tolerance=settings.skip_nonfinite if state.scaler.is_enabled() else 0,
            nonfinite_in_a_row=state.nonfinite_in_a_row,
            bytes_per_token=state.bytes_per_token["train/loss"],
            extra_tokens=state.extra_tokens,
        )
        groups = [group["name"] for group in state.optimizer.param_groups]
        draws = bool(state.config.model.dropout)
        self.recorder = FlightRecorder(state.device, groups, state.sampler.train_offsets, draws)
        self.system = SystemSampler(state.device, path, tracking.system_interval)
        self._parameters = {name: p for name, p in state.model.named_parameters() if p.requires_grad}
        self._histograms, self._histogram_interval = Histograms(), tracking.histogram_interval
        self._after_flush = after_flush

    def log_step(self, step: int, loss: torch.Tensor, grad_norms: torch.Tensor, lr: float) -> None:
        """Record update `step`, after its gradients and before its weights are computed; nothing leaves the device.

        Args:
            loss: (), on the device.
            grad_norms: the norm of each parameter group, (groups,), on the device.
        """
        if self._histogram_interval and step % self._histogram_interval == 0:
            self.log_histograms()
        self.recorder.record(self._buffer.add(step, loss, grad_norms, lr))

    def step_done(self) -> None:
        """After an update, flush if that is due; otherwise move the progress display."""
        if self._buffer.due():
            self.flush()
        elif self.progress.moves:
            self.progress.update(self.state.step)

    def log(self, step: int, values: Mapping[str, float | torch.Tensor]) -> None:
        """Log numbers of a callback under registered metric names; tensors stay on their device until the next flush.

        Raises:
            KeyError: a name that is not registered.
            TypeError, RuntimeError: a value is not one number.
        """
        self._buffer.log(step, values)

    def flush(self) -> None:
        """Write what was collected to the log.

        Raises:
            NonFiniteError: a loss or gradient was not finite; the records are written.
        """
        if not self._buffer.flush():
            return
        self.state.nonfinite_in_a_row = self._buffer.nonfinite_in_a_row
        self.recorder.look()
        if self.system.due():
            self._log.metrics.write([metric_record(self.state.step, time.time(), self.system.sample())])
        self._after_flush()
        assert self._buffer.last_loss is not None
        assert self._buffer.tokens_per_second is not None
        self.progress.update(
            self.state.step, loss=self._buffer.last_loss, tokens_per_second=self._buffer.tokens_per_second
        )

    def pause_over(self) -> None:
        """Leave the time since the last flush, which an evaluation or a checkpoint took, out of the step times."""
        self._buffer.restart_clock()

    def log_histograms(self) -> None:
        """Log histograms of the parameters before update `state.step` and of the clipped gradients of its batch."""
        if self.state.shards is not None:
            for name, tensor in self.state.shards.whole_tensors():
                self._log.histograms.write(self._histograms.records(self.state.step, time.time(), {name: tensor}))
            return
        tensors: dict[str, torch.Tensor] = {f"params/{name}": p for name, p in self._parameters.items()}
        tensors |= {f"grads/{name}": p.grad for name, p in self._parameters.items() if p.grad is not None}
        self._log.histograms.write(self._histograms.records(self.state.step, time.time(), tensors))

    def log_losses(self, losses: Mapping[str, float]) -> None:
        """Log an evaluation after `state.step` updates, its losses also in bits per byte."""
        values = {"tokens": self.state.tokens_at(self.state.step), **losses, **self.state.bits_per_byte(losses)}
        self._log.metrics.write([metric_record(self.state.step, time.time(), values)])

    def log_sample(self, text: str) -> None:
        """Log a sample text of the model after `state.step` updates."""
        self._log.samples.write([{"step": self.state.step, "time": round(time.time(), 4), "text": text}])
