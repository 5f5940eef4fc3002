"""A callback that logs a smoothed training loss, and ends the run when it is low enough.

    python train.py --callbacks examples.smooth_loss:SmoothLoss

TensorBoard shows it as `train/smooth_loss`, beside `train/loss`.
"""

from __future__ import annotations

import torch

from workbench import Callback, Metric, TrainingRun, register_metric

register_metric(Metric("train/smooth_loss", "nats", "lower"))


class SmoothLoss(Callback):
    """An exponential moving average of the loss. Callbacks get no arguments, so subclasses set other constants."""

    DECAY = 0.98
    TARGET = 1.5  # nats
    LOOK_EVERY = 50  # steps

    def __init__(self) -> None:
        self.average: torch.Tensor | None = None  # 0-dimensional, on the device

    def on_step(self, run: TrainingRun) -> None:
        assert run.loss is not None
        loss = run.loss.float()
        self.average = loss if self.average is None else torch.lerp(loss, self.average.to(loss.device), self.DECAY)
        run.log({"train/smooth_loss": self.average})  # copied when the log is written: no wait for the device
        if run.state.step % self.LOOK_EVERY == 0 and self.average.item() < self.TARGET:  # .item() does wait
            run.stop(f"the smooth loss is below {self.TARGET:g}")

    def state_dict(self) -> dict[str, float]:
        return {} if self.average is None else {"average": self.average.item()}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.average = torch.tensor(state["average"]) if state else None
