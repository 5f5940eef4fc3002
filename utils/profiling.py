"""Where the time of a step goes: phases and operators, from torch.profiler."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.autograd.profiler_util import FunctionEvent, FunctionEventAvg
from torch.profiler import ProfilerActivity, profile, record_function

from utils.device import synchronize

STEP = "step"
OTHER = "other"


@dataclass(frozen=True)
class Row:
    """One phase or operator. time_ms: per step; share: of the step, in percent; calls: per step."""

    name: str
    share: float
    calls: float
    time_ms: float


@dataclass(frozen=True)
class StepProfile:
    """Phases in their order, operators by time; in each the shares add up to 100."""

    steps: int
    step_ms: float
    phases: list[Row]
    operators: list[Row]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def profile_steps(
    step: Callable[[], None],
    phase_names: Sequence[str],
    device: torch.device,
    *,
    steps: int,
    warmup: int,
    top: int,
    trace: Path | None = None,
) -> StepProfile:
    """Profile `steps` calls of `step` after `warmup` calls that are not counted.

    Args:
        step: one training step that marks its parts with record_function(name).
        phase_names: the parts, in the order of the table; what is in none of them is "other".
        top: operators shown by name; the rest is one row "other".
        trace: where to write the Chrome trace (open in chrome://tracing or Perfetto).

    The device is waited for at the end of each phase, so that its work counts where it was asked for.
    """
    for _ in range(warmup):
        step()
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    synchronize(device)
    with profile(activities=activities) as profiler:
        for _ in range(steps):
            with record_function(STEP):
                step()
    if trace is not None:
        profiler.export_chrome_trace(str(trace))
    events = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CPU]
    total_us = sum(event.time_range.elapsed_us() for event in events if event.name == STEP)
    return StepProfile(
        steps=steps,
        step_ms=total_us / steps / 1000,
        phases=_phases(events, phase_names, steps, total_us),
        operators=_operators(profiler.key_averages(), device, {STEP, *phase_names}, steps, top),
    )


def _phases(events: Sequence[FunctionEvent], names: Sequence[str], steps: int, total_us: float) -> list[Row]:
    """Wall time of each phase; what a step spends outside of them is `other`."""
    spans = {name: [e.time_range.elapsed_us() for e in events if e.name == name] for name in names}
    rows = [
        Row(name, 100 * sum(spans[name]) / total_us, len(spans[name]) / steps, sum(spans[name]) / steps / 1000)
        for name in names
    ]
    rest = total_us - sum(map(sum, spans.values()))
    return [*rows, Row(OTHER, 100 * rest / total_us, 1.0, rest / steps / 1000)]


def operator_clock(device: torch.device) -> str:
    """Whose time the operators are charged with: "cuda", else "cpu" (the profiler does not see MPS kernels)."""
    return "cuda" if device.type == "cuda" else "cpu"


def _operators(
    averages: Sequence[FunctionEventAvg], device: torch.device, phases: set[str], steps: int, top: int
) -> list[Row]:
    """Operators by their own time, without the operators that they call.

    On CUDA an operator has the time of the kernels that it launched; the kernels themselves and the
    profiler's annotations stand in the averages too and must not be counted again.
    """
    on_device = operator_clock(device) == "cuda"

    def own_us(event: FunctionEventAvg) -> float:
        return float(event.self_device_time_total if on_device else event.self_cpu_time_total)

    def is_operator(event: FunctionEventAvg) -> bool:
        return event.key not in phases and event.device_type == torch.autograd.DeviceType.CPU

    counted = sorted((e for e in averages if is_operator(e) and own_us(e) > 0), key=own_us, reverse=True)
    total = sum(map(own_us, counted))
    rows = [Row(str(e.key), 100 * own_us(e) / total, e.count / steps, own_us(e) / steps / 1000) for e in counted]
    shown, rest = rows[:top], rows[top:]
    if rest:
        shown.append(Row(OTHER, *(sum(getattr(row, fact) for row in rest) for fact in ("share", "calls", "time_ms"))))
    return shown
