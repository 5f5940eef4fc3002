"""Where the time of a step goes: measured as a whole, by phases, and by operators with torch.profiler."""

from __future__ import annotations

import errno
import statistics
import tempfile
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

from utils.machine.device import synchronize
from utils.optim.schedules import apply_schedules
from utils.profiling.operators import (
    UNKNOWN_TYPE,
    WITHOUT_MOVING,
    Argument,
    is_attention,
    is_operator,
    operator_bytes,
    operator_flops,
    short_name,
)
from utils.profiling.record import ATTENTION, MATRIX_PRODUCTS, OTHER_OPERATORS, OTHER_PHASE, OperatorTime, PhaseTime
from utils.training.state import TrainState
from utils.training.step import (
    COMMUNICATION,
    PHASES,
    MarkedClock,
    Phase,
    PhaseClock,
    no_phase,
)
from utils.training.step_buffer import StepBuffer
from utils.training.step_graph import make_update

STEP = "step"
STRETCHES = 5  # of consecutive steps, each timed as one; a single disturbance does not move their median
COMPILED = ("## Call CompiledFxGraph", "CompiledFxGraph")  # the names that the profiler gives to compiled code

StepFunction = Callable[[Phase], None]  # makes one training step, in phases


@dataclass(frozen=True)
class StepTimes:
    """The time of one step: as a whole, by phases, and by operators.

    step_ms: milliseconds of an undisturbed step; None: not measured.
    phases: timed with a wait for the device after each.
    profiled_ms, operators: timed under the profiler.
    profiler: holds the trace.
    """

    steps: int
    step_ms: float | None
    phases: list[PhaseTime]
    profiled_ms: float
    operators: list[OperatorTime]
    profiler: profile

    @property
    def phases_ms(self) -> float:
        return sum(phase.ms for phase in self.phases)


def training_step(state: TrainState, warn: Callable[[str], None], buffer: StepBuffer | None = None) -> StepFunction:
    """A function that makes the training loop's update of `state` each time it is called.

    On CUDA it launches a recorded update, as training does; a step that is measured in phases is not recorded.

    Args:
        warn: called with one line if updates cannot be recorded.
        buffer: receives the numbers of each step, and is flushed as often as in training; None: nothing is logged.
    """
    update = make_update(state, warn)

    def step(phase: Phase) -> None:
        lr = apply_schedules(state.optimizer, state.step % state.max_iters, state.config.optimizer, state.max_iters)
        loss, grad_norms = update.gradients(phase)
        with phase("optimizer"):
            update.apply(grad_norms)
        if buffer is not None:
            with phase("logging"):
                buffer.add(state.step - 1, loss, grad_norms, lr)
                if buffer.due():
                    buffer.flush()

    state.model.train()
    return step


def measure_steps(step: StepFunction, device: torch.device, *, steps: int, warmup: int) -> StepTimes:
    """Call `step` `warmup` times without measuring it, then `steps` times for each of the three measurements."""
    for _ in range(warmup):
        step(no_phase)
    step_ms = time_steps(step, device, steps)
    clock = PhaseClock(device)
    began = time.perf_counter()
    for _ in range(steps):
        step(clock)
    phases = phase_times(clock, time.perf_counter() - began, steps)
    profiler, marks = new_profiler(device), MarkedClock(device)
    with profiler:
        for _ in range(steps):
            with record_function(STEP):
                step(marks)
    profiled_ms, operators = read_operators(profiler, device)
    return StepTimes(steps, step_ms, phases, profiled_ms, operators, profiler)


def time_steps(step: StepFunction, device: torch.device, steps: int) -> float:
    """Milliseconds of a step: the median over stretches, at whose end alone the device is waited for."""
    times = []
    for index in range(min(steps, STRETCHES)):
        count = len(range(index, steps, STRETCHES))
        synchronize(device)
        began = time.perf_counter()
        for _ in range(count):
            step(no_phase)
        synchronize(device)
        times.append(1000 * (time.perf_counter() - began) / count)
    return statistics.median(times)


def phase_times(clock: PhaseClock, seconds: float, steps: int) -> list[PhaseTime]:
    """The phases per step, from the clock of `steps` steps that took `seconds`; time outside of phases is `other`."""
    names = [name for name in PHASES if name != COMMUNICATION or clock.calls[name]]
    rows = [(name, clock.calls[name], clock.seconds[name]) for name in names]
    rows.append((OTHER_PHASE, steps, max(0.0, seconds - sum(clock.seconds.values()))))
    return [PhaseTime(name=n, calls=calls / steps, ms=1000 * s / steps, gflop=0.0) for n, calls, s in rows]


def new_profiler(device: torch.device) -> profile:
    """A profiler that records the shapes of arguments; to be entered as a context."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    return profile(activities=activities, record_shapes=True)


def read_operators(profiler: profile, device: torch.device) -> tuple[float, list[OperatorTime]]:
    """Milliseconds of a step, and the operators of each phase, the longest first.

    An operator is what the model or autograd calls, and includes what it calls itself. On CUDA its time is that of
    the kernels that it launches. Compiled code counts as one operator.
    """
    events = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CPU]
    total_us, steps = _length(events, STEP)
    spans = sorted((e.time_range.start, e.time_range.end, e.name) for e in events if e.name in PHASES)
    starts = [start for start, _, _ in spans]

    def phase_of(event: FunctionEvent) -> str:
        index = bisect_right(starts, event.time_range.start) - 1
        return spans[index][2] if index >= 0 and event.time_range.start < spans[index][1] else OTHER_PHASE

    on_device = device.type == "cuda"
    rows: dict[tuple[str, str], list[float]] = {}
    kinds: dict[tuple[str, str], str] = {}
    for name, event, us in _outermost(events, on_device):
        flops, moved = _cost(event) if is_operator(event.name) else (0.0, 0.0)
        key = (phase_of(event), short_name(name))
        if flops or key not in kinds:
            kinds[key] = (ATTENTION if is_attention(name) else MATRIX_PRODUCTS) if flops else OTHER_OPERATORS
        row = rows.setdefault(key, [0, 0.0, 0.0, 0.0])
        for index, value in enumerate((1, us / 1000, flops / 1e9, moved / 1e9)):
            row[index] += value
    operators = [
        OperatorTime(
            name=name,
            phase=phase,
            kind=kinds[phase, name],
            calls=calls / steps,
            ms=ms / steps,
            gflop=gflop / steps,
            gbyte=gbyte / steps,
        )
        for (phase, name), (calls, ms, gflop, gbyte) in rows.items()
    ]
    return total_us / steps / 1000, sorted(operators, key=lambda operator: -operator.ms)


def read_trace(profiler: profile) -> bytes:
    """The Chrome trace, by way of a temporary file: the profiler does not report that a disk is full.

    Raises:
        OSError: the folder of temporary files has no room for the trace.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        trace = path.read_bytes() if path.exists() else b""
    if not trace.rstrip().endswith(b"}"):
        raise OSError(errno.ENOSPC, "the profiler could not write its trace", folder)
    return trace


def _length(events: list[FunctionEvent], name: str) -> tuple[float, int]:
    """The total microseconds and the number of the events of that name."""
    spans = [event.time_range.elapsed_us() for event in events if event.name == name]
    return sum(spans), len(spans)


def _outermost(events: list[FunctionEvent], on_device: bool) -> Iterator[tuple[str, FunctionEvent, float]]:
    """Name, event and microseconds of each operator that is not called by another operator."""
    waiting = [event for event in events if event.cpu_parent is None]
    while waiting:
        event = waiting.pop()
        if is_operator(event.name):
            yield event.name, event, event.device_time_total if on_device else event.time_range.elapsed_us()
            continue
        own = event.self_device_time_total if on_device else event.self_cpu_time_total
        if event.name.startswith(COMPILED):
            yield "compiled code", event, own
        elif on_device and own > 0:  # a kernel that was not launched by an operator
            yield event.name, event, own
        waiting += event.cpu_children


def _cost(event: FunctionEvent) -> tuple[float, float]:
    """Floating-point operations and bytes of an operator; the sum over its callees if it only calls others."""
    shapes, dtypes = _arguments(event)
    flops = operator_flops(event.name, shapes, event.concrete_inputs)
    if flops is None:
        of_children = [_cost(child) for child in event.cpu_children if is_operator(child.name)]
        flops, moved = sum(f for f, _ in of_children), sum(b for _, b in of_children)
        if flops or not shapes or short_name(event.name) in WITHOUT_MOVING:
            return flops, moved
    return flops, operator_bytes(event.name, shapes, dtypes)


def _arguments(event: FunctionEvent) -> tuple[Sequence[Argument], Sequence[str]]:
    """Shapes and element types of an operator's arguments.

    Before torch 2.12 an event has neither types nor the shapes of tensors in a list: the types are then unknown, and
    such a list looks empty.
    """
    shapes: Any = getattr(event, "structured_input_shapes", None)
    if shapes is None:
        shapes = event.input_shapes or ()
    dtypes: Any = getattr(event, "input_dtypes", None)
    return shapes, [UNKNOWN_TYPE] * len(shapes) if dtypes is None else dtypes
