"""How a session ends, as far as that is known while it runs."""

from __future__ import annotations

from dataclasses import dataclass, field

from utils.runs.run import Status
from utils.training.result import TrainResult
from utils.training.state import TrainState


@dataclass
class Outcome:
    """How a session ends, as far as that is known: `failed` until something else is recorded.

    at_once: a second signal asked to end without waiting for anything.
    """

    status: Status = "failed"
    reason: str | None = None
    at_once: bool = False
    exported: str | None = None
    last_step: int | None = None
    losses: dict[str, float] = field(default_factory=dict)  # of the last evaluation, and the best val/loss
    losses_step: int | None = None
    best_step: int | None = None
    parameters: int = 0
    unsaved: str | None = None  # why the last checkpoint is missing

    def read(self, state: TrainState) -> None:
        """Copy the step, the losses and the size of the model."""
        self.last_step, self.losses_step, self.best_step = state.step, state.losses_step, state.best_step
        self.parameters = state.model.num_parameters()
        if state.losses is not None:
            best = state.bits_per_byte({"val/loss": state.best_val_loss})["val/bits_per_byte"]
            bits = {**state.bits_per_byte(state.losses), "best_bits_per_byte": best}
            self.losses = {**state.losses, "best_val_loss": state.best_val_loss, **bits}


class StartInterruptedError(Exception):
    """A signal ended a session before its first step; the run is closed.

    result: how it ended.
    """

    def __init__(self, result: TrainResult) -> None:
        super().__init__(f"{result.run_dir.name} was interrupted before its first step")
        self.result = result
