"""Steps of real training runs, timed: with the views, without them, and in a bare loop."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from utils.config_loader import LoadedConfig
from utils.errors import UserError
from utils.run_manager import read_record

if TYPE_CHECKING:
    from utils.tracking.feeder import Feeders
    from utils.train_state import TrainState

TRACKED, NO_VIEWS, BARE = "tracked", "no views", "bare"


@dataclass(frozen=True)
class Timing:
    """One run: milliseconds of a step, and the share of the metrics log that each view had when training ended."""

    median_ms: float
    mean_ms: float  # the rare things count here: writing the log, a feeder at work
    fed: dict[str, float]


def timed_run(loaded: LoadedConfig, warmup: int, kind: str) -> Timing:
    """One run of train.train, timed from the end of one update to the end of the next.

    Args:
        warmup: updates before the first that counts.

    Raises:
        UserError: the run or one of its views failed: then there is nothing to compare.
        KeyboardInterrupt: the run was interrupted.
    """
    import train
    from utils import training
    from utils.device import synchronize
    from utils.tracking.feeder import Feeders

    build_feeders, optimizer_step = train.build_feeders, training.optimizer_step
    last_step = loaded.config.train.max_iters
    built: list[Feeders] = []
    clock: list[float] = []
    fed: dict[str, float] = {}

    def keep_feeders(*arguments: Any) -> Feeders:
        built.append(build_feeders(*arguments) if kind == TRACKED else Feeders())
        return built[-1]

    def timed_step(state: TrainState) -> None:
        optimizer_step(state)
        synchronize(state.device)
        clock.append(time.perf_counter())
        if state.step == last_step:
            fed.update(fed_shares(built[-1]))

    with (
        patch.object(train, "build_feeders", keep_feeders),
        patch.object(training, "optimizer_step", timed_step),
        patch.object(training, "training_loop", bare_loop if kind == BARE else training.training_loop),
    ):
        result = train.train(loaded, quiet=True)
    if result.status == "interrupted":
        raise KeyboardInterrupt
    views = read_record(result.run_dir)["views"]
    failed = [f"{name}: {facts.get('reason')}" for name, facts in views.items() if facts.get("state") == "off"]
    if failed or result.status != "completed":
        raise UserError(f"the {kind} run ended as {result.status}; views that are off: {'; '.join(failed) or 'none'}")
    steps = [(after - before) * 1000 for before, after in zip(clock[warmup - 1 :], clock[warmup:], strict=False)]
    return Timing(statistics.median(steps), statistics.fmean(steps), fed)


def bare_loop(state: TrainState, *_unused: object) -> None:
    """The updates of training_loop and nothing else."""
    from utils import training
    from utils.optim import learning_rate_at, set_learning_rate

    state.model.train()
    while state.step < state.max_iters:
        set_learning_rate(state.optimizer, learning_rate_at(state.step, state.config.optimizer, state.max_iters))
        training.forward_backward(state)
        training.clip_gradients(state)
        training.optimizer_step(state)


def fed_shares(feeders: Feeders) -> dict[str, float]:
    """Per view whose thread is running: how much of metrics.jsonl it has read."""
    from utils.run_log import METRICS_FILE

    running = [feeder for feeder in feeders.feeders if feeder.is_alive()]
    sizes = {f.view.name: max((f.logs_dir / METRICS_FILE).stat().st_size, 1) for f in running}
    return {f.view.name: f.offsets[METRICS_FILE] / sizes[f.view.name] for f in running}
