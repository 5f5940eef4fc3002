"""Building a Profile: from a configuration, or from measurements of a training state."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from utils.machine.device import memory_in_use, processor_name
from utils.machine.limits import measure_copy, measure_gemm
from utils.nn.costs import forward_flops, training_flops
from utils.nn.linear import linear
from utils.profiling.decoding import measure_generation
from utils.profiling.measure import StepTimes, measure_steps, training_step
from utils.profiling.memory import activation_phase, peak, reset_peak, state_bytes
from utils.profiling.record import (
    Communication,
    Generation,
    Limits,
    Machine,
    MemoryBytes,
    OperatorTime,
    PhaseTime,
    Profile,
)
from utils.runs.log import METRICS_FILE, LogWriter
from utils.runs.run import utc_now
from utils.terminal.console import Terminal
from utils.training.setup import Setup
from utils.training.state import TrainState, build_state
from utils.training.step import no_phase
from utils.training.step_buffer import StepBuffer


def profile_training(setup: Setup, steps: int, warmup: int, terminal: Terminal) -> tuple[Profile, StepTimes]:
    """Build a training state and measure its steps and its generation; the StepTimes hold the trace."""
    device, before = setup.device, memory_in_use(setup.device)
    state = build_state(setup.config, setup.max_iters, setup.corpus, device, setup.dtype, terminal, setup.ranks)
    tracking = state.config.tracking
    with tempfile.TemporaryDirectory() as folder:
        writer = LogWriter(Path(folder) / METRICS_FILE)
        buffer = StepBuffer(writer, tracking.flush_interval, tracking.log_interval, state.tokens_per_step)
        step = training_step(state, terminal.warn, buffer)
        activations = activation_phase(state)
        step(no_phase)
        peak_is_known = reset_peak(device)
        step(activations or no_phase)
        highest = peak(device) - before if peak_is_known else None
        sent = setup.ranks.sent_bytes
        times = measure_steps(step, device, steps=steps, warmup=warmup)
        sent = (setup.ranks.sent_bytes - sent) // (warmup + 3 * steps)
    if setup.ranks.rank == 0:
        limits, generation = limits_of(state), measure_generation(state.model)
    else:  # rank 0 shows them
        limits, generation = None, None
    measured = build_profile(
        state,
        times,
        limits,
        activations=activations.bytes if activations else None,
        peak=highest,
        generation=generation,
        sent_bytes=sent,
    )
    return measured, times


def limits_of(state: TrainState) -> Limits | None:
    """The machine's limits in the precisions of training and generation; None if there is too little memory left."""
    with contextlib.suppress(torch.OutOfMemoryError):
        weights = next(state.model.parameters()).dtype
        return measure_limits(state.device, sorted({state.dtype, weights}, key=str))
    return None


def measure_limits(device: torch.device, dtypes: Sequence[torch.dtype]) -> Limits:
    """The best rates over several sizes, measured in about a second without touching the global random state.

    Raises:
        torch.OutOfMemoryError: a few hundred megabytes cannot be allocated.
    """
    return Limits(
        gemm={str(dtype).removeprefix("torch."): measure_gemm(device, dtype, linear) / 1e9 for dtype in dtypes},
        copy_gbytes=measure_copy(device) / 1e9,
    )


def build_profile(
    state: TrainState,
    times: StepTimes,
    limits: Limits | None,
    *,
    activations: int | None,
    peak: int | None,
    generation: Generation | None = None,
    run: str | None = None,
    step: int | None = None,
    sent_bytes: int = 0,
) -> Profile:
    """The contents of profile.json.

    Args:
        activations, peak: bytes, for MemoryBytes; None: not measured.
        run, step: of the training run that was profiled, if it was one.
        sent_bytes: by this rank in a step, to other ranks.
    """
    config, device, ranks = state.config, state.device, state.ranks
    sequences, block_size = config.train.sequences, config.model.block_size
    gflop = training_flops(state.model, sequences, block_size) / 1e9 / ranks.world_size
    forward = forward_flops(state.model, sequences * block_size, (block_size + 1) / 2) / 1e9 / ranks.world_size
    return Profile(
        created=utc_now(),
        run=run,
        step=step,
        machine=Machine(
            device=str(device),
            processor=processor_name(device),
            dtype=str(state.dtype).removeprefix("torch."),
            threads=torch.get_num_threads(),
            torch=torch.__version__,
            compile=state.compiled,
        ),
        config=config.model_dump(mode="json"),
        parameters=state.model.num_parameters(),
        tokens_per_step=state.tokens_per_step,
        steps=times.steps,
        step_ms=times.step_ms,
        phases_ms=times.phases_ms,
        profiled_ms=times.profiled_ms,
        gflop=gflop,
        limits=limits,
        phases=with_operations(times.phases, times.operators, {"forward": forward, "backward": gflop - forward}),
        operators=times.operators,
        operator_times=device.type != "mps",
        memory=MemoryBytes(**state_bytes(state), activations=activations, peak=peak),
        generation=generation,
        communication=Communication(
            world_size=ranks.world_size, backend=ranks.backend, lanes=config.train.lanes, sent_bytes=sent_bytes
        )
        if ranks.several
        else None,
    )


def with_operations(
    phases: Sequence[PhaseTime], operators: Sequence[OperatorTime], needed: Mapping[str, float]
) -> list[PhaseTime]:
    """Phases with their operations: what the model needs in its two passes, and what operators did in other phases.

    Args:
        needed: GFLOP of each pass.
    """
    seen = {phase.name: sum(o.gflop for o in operators if o.phase == phase.name) for phase in phases}
    return [phase.model_copy(update={"gflop": needed.get(phase.name, seen[phase.name])}) for phase in phases]
