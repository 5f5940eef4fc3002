"""A profile from what was measured of a training state."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch

from utils.machine.device import processor_name
from utils.machine.limits import measure_copy, measure_gemm
from utils.nn.costs import training_flops
from utils.nn.linear import linear
from utils.profiling.measure import StepTimes
from utils.profiling.memory import state_bytes
from utils.profiling.record import Generation, Limits, Machine, Memory, OperatorTime, PhaseTime, Profile
from utils.runs.run import utc_now
from utils.training.state import TrainState

MODEL_SHARE = {"forward": 1 / 3, "backward": 2 / 3}  # of the operations of training


def limits_of(state: TrainState) -> Limits | None:
    """The machine's limits for training and for generation, or None where too little memory is left to measure them."""
    with contextlib.suppress(torch.OutOfMemoryError):
        weights = next(state.model.parameters()).dtype
        return measure_limits(state.device, sorted({state.dtype, weights}, key=str))
    return None


def measure_limits(device: torch.device, dtypes: Sequence[torch.dtype]) -> Limits:
    """The best rates over several sizes, in about a second; the global random state is left alone.

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
) -> Profile:
    """Everything that profile.json says."""
    config, device = state.config, state.device
    gflop = training_flops(state.model, config.train.sequences, config.model.block_size) / 1e9
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
        phases=with_operations(times.phases, times.operators, gflop),
        operators=times.operators,
        operator_times=device.type != "mps",
        memory=Memory(**state_bytes(state), activations=activations, peak=peak),
        generation=generation,
    )


def with_operations(phases: Sequence[PhaseTime], operators: Sequence[OperatorTime], gflop: float) -> list[PhaseTime]:
    """Phases with what the model needs in its two passes, and with the matrix products that were seen elsewhere."""
    seen = {phase.name: sum(o.gflop for o in operators if o.phase == phase.name) for phase in phases}
    needed = {name: gflop * share for name, share in MODEL_SHARE.items()}
    return [phase.model_copy(update={"gflop": needed.get(phase.name, seen[phase.name])}) for phase in phases]
