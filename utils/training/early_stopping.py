"""Early stopping: the end of training when the validation loss no longer improves."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from utils.errors import number_text
from utils.runs.metrics import decode_number, encode_number


@dataclass
class EarlyStopping:
    """Counts evaluations without an improvement [Prechelt 1998, "Early Stopping - But When?"].

    patience: training ends after so many evaluations in a row without improvement; None: never.
    min_delta: a loss is an improvement if it is more than this below the best one, in nats.
    """

    patience: int | None
    min_delta: float
    best: float = math.inf
    without_improvement: int = 0

    def update(self, loss: float) -> None:
        """Count an evaluation by its validation loss."""
        if loss < self.best - self.min_delta:
            self.best, self.without_improvement = loss, 0
        else:
            self.without_improvement += 1

    @property
    def stopped(self) -> bool:
        return self.patience is not None and self.without_improvement >= self.patience

    @property
    def reason(self) -> str:
        return (
            f"early stopping: val/loss did not improve by more than {number_text(self.min_delta)} "
            f"in {self.without_improvement} evaluations"
        )

    def state_dict(self) -> dict[str, Any]:
        return {"best": encode_number(self.best), "without_improvement": self.without_improvement}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best, self.without_improvement = decode_number(state["best"]), state["without_improvement"]
