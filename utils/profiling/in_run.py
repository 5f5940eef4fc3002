"""`profile_step`: profile one step of a real run into its artifacts/profile/, without changing the run's results."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path

from torch.profiler import profile, record_function

from utils.machine.device import synchronize
from utils.profiling.assemble import build_profile, limits_of
from utils.profiling.measure import STEP, StepTimes, new_profiler, phase_times, read_operators, read_trace
from utils.profiling.memory import activation_phase, peak, reset_peak
from utils.profiling.picture import draw_profile
from utils.profiling.record import PICTURE, save_profile
from utils.runs import layout
from utils.terminal.console import Terminal
from utils.training.state import TrainState
from utils.training.step import MarkedClock, Phase, PhaseClock, no_phase

# Before the profiled step come: one step whose activations are counted, TIMED steps that are timed as a whole, and
# CLOCKED steps whose phases are timed.
TIMED, CLOCKED = 4, 4
FIRST = TIMED + CLOCKED + 1


class RunProfiler:
    """Measures the steps up to `profile_step`. A failure in the profiler becomes a warning, and training continues.

    Args:
        state: the training state.
        path: the run directory.
        terminal: shows the warning, or the path of the result.
    """

    def __init__(self, state: TrainState, path: Path, terminal: Terminal) -> None:
        self.state, self.path, self.terminal = state, path, terminal
        self.step = state.config.train.profile_step
        self.ready = False  # True once the step has been profiled and `save` should be called
        self._activations = activation_phase(state)
        self._timed: list[float] = []
        self._clock = PhaseClock(state.device)
        self._clocked: list[float] = []
        self._marks = MarkedClock(state.device)
        self._profiler: profile | None = None
        self._sent = 0  # bytes sent to other ranks: before the profiled step, then during it

    def watch(self, step: int) -> AbstractContextManager[Phase]:
        """A context for the update `step`, which yields the function that marks the phases of the update."""
        if self.step is None or not 0 <= self.step - step <= FIRST:
            return contextlib.nullcontext(no_phase)
        return self._watch(self.step - step)

    @contextlib.contextmanager
    def _watch(self, steps_left: int) -> Iterator[Phase]:
        watching = ExitStack()
        phase: Phase = no_phase
        with self._harmless():
            phase = self._begin(steps_left, watching)
        began = time.perf_counter()
        try:
            yield phase
            with self._harmless():
                synchronize(self.state.device)
                self._end(steps_left, time.perf_counter() - began)
        finally:
            with self._harmless():
                watching.close()

    def _begin(self, steps_left: int, watching: ExitStack) -> Phase:
        synchronize(self.state.device)
        if steps_left == FIRST:
            return self._activations or no_phase
        if steps_left > CLOCKED:
            if not self._timed and self.state.device.type == "cuda":  # the peak of a process is not that of a step
                reset_peak(self.state.device)
            return no_phase
        if steps_left > 0:
            return self._clock
        self._sent = self.state.ranks.sent_bytes
        self._profiler = watching.enter_context(new_profiler(self.state.device))
        watching.enter_context(record_function(STEP))
        return self._marks

    def _end(self, steps_left: int, seconds: float) -> None:
        if 0 < steps_left <= CLOCKED:
            self._clocked.append(seconds)
        elif CLOCKED < steps_left < FIRST:
            self._timed.append(seconds)
        elif steps_left == 0 and self._profiler is not None:
            self.ready = True
            self._sent = self.state.ranks.sent_bytes - self._sent
            if not self._clocked:  # the run started or resumed at this step
                self._clock, self._clocked = self._marks, [seconds]

    def save(self) -> None:
        """Measure the machine's limits and write the profile, which takes a second or two."""
        self.ready = False
        with self._harmless():
            assert self._profiler is not None
            device = self.state.device
            highest = peak(device) if self._timed and device.type == "cuda" else None
            profiled_ms, operators = read_operators(self._profiler, device)
            times = StepTimes(
                steps=1,
                step_ms=1000 * statistics.median(self._timed) if self._timed else None,
                phases=phase_times(self._clock, sum(self._clocked), len(self._clocked)),
                profiled_ms=profiled_ms,
                operators=operators,
                profiler=self._profiler,
            )
            measured = build_profile(
                self.state,
                times,
                limits_of(self.state),
                activations=self._activations.bytes or None if self._activations else None,
                peak=highest,
                run=self.path.name,
                step=self.step,
                sent_bytes=self._sent,
            )
            save_profile(self.path / layout.PROFILE, measured, read_trace(self._profiler), draw_profile)
            self.terminal.print(f"profiled step {self.step:,}: {layout.PROFILE / PICTURE}")
        self._profiler = None  # frees the memory of its events

    @contextlib.contextmanager
    def _harmless(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # a profile is not worth losing a run
            self.step, self.ready = None, False
            self.terminal.warn(f"profile_step: no profile was written: {type(error).__name__}: {error}")
