"""One training run whose tracking is switched between blocks of steps.

Blocks of two kinds alternate within one run of train.train, so that both are measured with the same model, memory and
moment of a noisy machine. During a block without views the feeders are paused and their clock stands still: by this
clock they work all the time, with their usual budget.
"""

from __future__ import annotations

import random
import statistics
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from utils.config.loader import LoadedConfig
from utils.errors import UserError
from utils.runs.layout import fed_note
from utils.runs.run import read_record

if TYPE_CHECKING:
    import torch

    from utils.training.monitor import Monitor

ALL, LOG, OFF, NAIVE = "log and views", "log alone", "everything off", "naive loop"
OPENING_SECONDS = 60.0  # for the views to open, before the first block
HISTOGRAM_STEPS = 100


@dataclass
class Measured:
    """The results of one switched run.

    blocks: kind -> mean milliseconds of a step in each of its blocks, in order.
    plain, flushing, binning: microseconds that the loop spent on logging in a step; flushing if it wrote the log,
        binning if it made histograms, else plain.
    feeding: seconds that the feeders used, and seconds that passed on their own clock.
    """

    blocks: dict[str, list[float]] = field(default_factory=dict)
    plain: list[float] = field(default_factory=list)
    flushing: list[float] = field(default_factory=list)
    binning: list[float] = field(default_factory=list)
    feeding: tuple[float, float] = (0.0, 0.0)
    fed: dict[str, float] = field(default_factory=dict)  # view -> the share of the log it had after the last block


class Switch:
    """The kind of the current block, and a clock that runs only in blocks with views."""

    def __init__(self) -> None:
        self.kind = ALL
        self._before, self._since = 0.0, time.monotonic()
        self._changed = threading.Condition()

    def set(self, kind: str) -> None:
        with self._changed:
            self._before, self._since = self.clock(), time.monotonic()
            self.kind = kind
            self._changed.notify_all()

    def clock(self) -> float:
        return self._before + (time.monotonic() - self._since if self.kind == ALL else 0.0)

    def wait_for_views(self) -> None:
        """Return when a block with views is running."""
        with self._changed:
            self._changed.wait_for(lambda: self.kind == ALL)

    def rest(self, seconds: float, wake: threading.Event) -> None:
        """Wait for `seconds` of this clock, or until `wake` is set."""
        until = self.clock() + seconds
        while not wake.is_set() and (left := until - self.clock()) > 0:
            self.wait_for_views()
            wake.wait(min(left, 0.1))


def schedule(kinds: Sequence[str], repeats: int) -> list[str]:
    """One block of each kind per repeat, shuffled each time (with a fixed seed)."""
    generator = random.Random(0)
    return [kind for _ in range(repeats) for kind in generator.sample(kinds, len(kinds))]


def run_switched(loaded: LoadedConfig, kinds: Sequence[str], block_steps: int, warmup: int) -> Measured:
    """Train; the steps after `warmup` are blocks of these kinds, each of `block_steps` steps.

    Raises:
        UserError: the run or one of its views failed.
        KeyboardInterrupt: the run was interrupted.
    """
    import train
    from utils.tracking import feeder
    from utils.training import session

    switch, measured = Switch(), Measured()
    spend = feeder.Budget.spend
    taken: list[float] = []

    def held_rest(self: feeder.Feeder, seconds: float) -> None:
        switch.rest(seconds, self._wake)
        self._wake.clear()
        switch.wait_for_views()  # here, between two turns, because turns are timed

    def noted_spend(self: feeder.Budget, seconds: float) -> None:
        taken.append(seconds)
        spend(self, seconds)

    feeder_time = SimpleNamespace(
        monotonic=switch.clock, perf_counter=time.perf_counter, thread_time=time.thread_time, sleep=time.sleep
    )
    switched = _switched_monitor(session.Monitor, switch, measured, kinds, block_steps, warmup, taken)
    with ExitStack() as patches:
        for owner, name, new in (
            (feeder, "time", feeder_time),
            (feeder.Feeder, "rest", held_rest),
            (feeder.Budget, "spend", noted_spend),
            (session, "Monitor", switched),
        ):
            patches.enter_context(patch.object(owner, name, new))
        result = train.train(loaded, quiet=True)
    check(result.run_dir, result.status)
    return measured


def check(run: Path, status: str) -> None:
    """Check that a run and its views are complete.

    Raises:
        UserError: the run or one of its views failed.
        KeyboardInterrupt: the run was interrupted.
    """
    if status == "interrupted":
        raise KeyboardInterrupt
    views = read_record(run)["views"]
    failed = [f"{name}: {facts.get('reason')}" for name, facts in views.items() if facts.get("state") != "complete"]
    if failed or status != "completed":
        raise UserError(f"the run ended as {status}; views that are not complete: {'; '.join(failed) or 'none'}")


def _switched_monitor(
    base: type[Monitor],
    switch: Switch,
    measured: Measured,
    kinds: Sequence[str],
    block_steps: int,
    warmup: int,
    taken: list[float],
) -> type[Monitor]:
    """A Monitor that tracks as the kind of the current block says, and measures the blocks."""
    remaining = iter(kinds)

    class SwitchedMonitor(base):  # type: ignore[misc, valid-type]
        _left, _began, _spent = warmup, 0.0, 0.0
        _naive: NaiveTracking | None = None

        def log_step(self, step: int, loss: torch.Tensor, grad_norms: torch.Tensor, lr: float) -> None:
            began = time.perf_counter()
            if switch.kind in (ALL, LOG):
                super().log_step(step, loss, grad_norms, lr)
            elif switch.kind == NAIVE:
                self._naive = self._naive or NaiveTracking(self._log.metrics.path.parent.parent)
                self._naive.step(step, self.state.model, loss, grad_norms, lr)
            self._spent = time.perf_counter() - began

        def step_done(self) -> None:
            kept = measured.flushing if self._buffer.due() else measured.plain
            kept = measured.binning if (self.state.step - 1) % HISTOGRAM_STEPS == 0 else kept
            began = time.perf_counter()
            if switch.kind in (ALL, LOG):
                super().step_done()
                kept.append(1e6 * (self._spent + time.perf_counter() - began))
            self._left -= 1
            if self._left == 0:
                self._end_block()

        def _end_block(self) -> None:
            from utils.machine.device import synchronize

            if switch.kind in (ALL, LOG):
                self.flush()
            synchronize(self.state.device)
            if self._began:
                mean_ms = 1000 * (time.perf_counter() - self._began) / block_steps
                measured.blocks.setdefault(switch.kind, []).append(mean_ms)
            else:
                wait_until_open(self._log.metrics.path.parent)
                for numbers in (measured.plain, measured.flushing, measured.binning, taken):
                    numbers.clear()
                self._clock_began = switch.clock()
            kind = next(remaining, None)
            if kind is None:
                measured.feeding = (sum(taken), switch.clock() - self._clock_began)
                measured.fed.update(fed_shares(self._log.metrics.path))
            switch.set(kind or ALL)
            self._left = block_steps if kind else -1
            self.pause_over()
            self._began = time.perf_counter()

    return SwitchedMonitor


class NaiveTracking:
    """Tracking as a plain training loop does it: each number goes to each tracker at once, inside the loop."""

    def __init__(self, folder: Path) -> None:
        import aim
        from torch.utils.tensorboard import SummaryWriter

        settings = {"system_tracking_interval": None, "capture_terminal_logs": False}
        (folder / "naive").mkdir()
        self.writer, self.run = SummaryWriter(str(folder / "naive")), aim.Run(repo=str(folder / "naive"), **settings)
        self._last = time.perf_counter()

    def step(self, step: int, model: Any, loss: torch.Tensor, grad_norms: torch.Tensor, lr: float) -> None:
        now, before = time.perf_counter(), self._last
        numbers = {"loss": loss.item(), "lr": lr, "grad_norm": grad_norms.norm().item(), "steps_s": 1 / (now - before)}
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, step)
            self.run.track(value, name=name, step=step)
        if step % HISTOGRAM_STEPS == 0:
            for name, parameter in model.named_parameters():
                self.writer.add_histogram(f"params/{name}", parameter, step)
                self.writer.add_histogram(f"grads/{name}", parameter.grad, step)
        self._last = now


def wait_until_open(logs_dir: Path) -> None:
    """Return when all views have received something.

    Raises:
        UserError: that takes more than OPENING_SECONDS.
    """
    deadline = time.monotonic() + OPENING_SECONDS
    while not all((logs_dir / fed_note(name).name).exists() for name in ("tensorboard", "aim")):
        if time.monotonic() > deadline:
            raise UserError(f"the views did not open within {OPENING_SECONDS:g} s: a longer --warmup may help")
        time.sleep(0.1)


def fed_shares(metrics: Path) -> dict[str, float]:
    """View -> the share of metrics.jsonl that it has received."""
    import json

    notes = {
        path.stem.removeprefix("fed_"): json.loads(path.read_text()) for path in metrics.parent.glob(fed_note("*").name)
    }
    size = metrics.stat().st_size
    return {name: note["offsets"][metrics.name] / size for name, note in notes.items()}


def percentile(numbers: Sequence[float], percent: int) -> float:
    return statistics.quantiles(numbers, n=100)[percent - 1] if len(numbers) > 1 else numbers[0]
