"""The cost of a training step by batch and block size: one shape after the other, without a profiler."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.table import Table

from utils.config.settings import Config
from utils.errors import UserError, is_out_of_memory
from utils.files import json_text, write_output
from utils.machine.ranks import ONE
from utils.nn.costs import training_flops
from utils.profiling.measure import time_steps, training_step
from utils.profiling.memory import activation_phase
from utils.terminal.console import Terminal
from utils.training.batch_size import micro_batch_of
from utils.training.setup import Setup
from utils.training.state import build_state
from utils.training.step import no_phase

SWEEP_FILE = "sweep.json"
BATCH_FACTORS = (0.25, 0.5, 1, 2, 4)  # times the configured sizes; the batch is that of a micro-step
BLOCK_FACTORS = (0.5, 1, 2)


@dataclass(frozen=True)
class ShapeTiming:
    """The training step of one shape.

    step_ms: the median over stretches of steps.
    gflops: GFLOP/s, counting the operations that the matrix products need (utils/nn/costs.py).
    activation_mb: what the forward pass keeps for the backward pass; None for a compiled model.
    """

    batch_size: int
    block_size: int
    step_ms: float
    tokens_per_second: float
    gflops: float
    activation_mb: float | None


def with_shape(config: Config, batch_size: int, block_size: int) -> Config:
    """The same experiment with other sizes, and one micro-step per batch, which no lanes share."""
    one = {"batch_size": batch_size, "gradient_accumulation_steps": 1, "lanes": None}
    train = config.train.model_copy(update=one)
    return config.model_copy(
        update={"train": train, "model": config.model.model_copy(update={"block_size": block_size})}
    )


def default_batch_sizes(config: Config) -> list[int]:
    """Micro-batches around the configured one."""
    return sizes_around(micro_batch_of(config, ONE), BATCH_FACTORS)


def default_block_sizes(config: Config) -> list[int]:
    """Blocks around the configured one."""
    return sizes_around(config.model.block_size, BLOCK_FACTORS)


def sizes_around(configured: int, factors: Sequence[float]) -> list[int]:
    """The configured size times each factor, ascending and without duplicates."""
    return sorted({max(1, round(configured * factor)) for factor in factors})


def time_shape(setup: Setup, config: Config, steps: int, warmup: int, terminal: Terminal) -> ShapeTiming:
    """Time `steps` training steps, after one in which activations are counted and `warmup` more.

    Args:
        setup: corpus, device and precision; the caller has made torch's settings.
        config: of a new model with random weights, which is timed.

    Raises:
        RuntimeError, MemoryError: the device cannot hold it.
    """
    state = build_state(config, setup.max_iters, setup.corpus, setup.device, setup.dtype, terminal)
    step = training_step(state, terminal.warn)
    activations = activation_phase(state)
    step(activations or no_phase)
    for _ in range(warmup):
        step(no_phase)
    step_ms = time_steps(step, state.device, steps)
    if config.train.compile:
        torch.compiler.reset()  # the compiler has a limit of models per code
    operations = training_flops(state.model, config.train.sequences, config.model.block_size)
    return ShapeTiming(
        batch_size=config.train.sequences,
        block_size=config.model.block_size,
        step_ms=step_ms,
        tokens_per_second=state.tokens_per_step / step_ms * 1000,
        gflops=operations / step_ms / 1e6,
        activation_mb=activations.bytes / 1e6 if activations else None,
    )


def sweep_shapes(
    setup: Setup, batch_sizes: Sequence[int], block_sizes: Sequence[int], steps: int, warmup: int, terminal: Terminal
) -> list[ShapeTiming]:
    """Time every batch size at every block size; warns of shapes that do not fit into memory, and skips them.

    Raises:
        UserError: the corpus is too short for a block.
    """
    if (longest := max(block_sizes)) >= setup.corpus.n_train:
        raise UserError(f"--block-sizes: {longest:,} is too long for {setup.corpus.n_train:,} training tokens")
    timings = []
    for block_size in block_sizes:
        for batch_size in batch_sizes:
            config = with_shape(setup.config, batch_size, block_size)
            try:
                timings.append(time_shape(setup, config, steps, warmup, terminal))
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                terminal.warn(f"batch {batch_size:,} x block {block_size:,}: does not fit into the device's memory")
    return timings


def sweep_table(timings: Sequence[ShapeTiming]) -> Table:
    """One row per shape, one section per block size; the shape with the most tokens per second is marked."""
    table = Table(title="A training step by batch and block size", title_justify="left", title_style="bold")
    for header in ("block", "batch", "ms/step", "tokens/s", "GFLOP/s", "activations MB"):
        table.add_column(header, justify="right")
    table.add_column("", style="green")
    best = max(timings, key=lambda timing: timing.tokens_per_second, default=None)
    last = None
    for timing in timings:
        if last not in (None, timing.block_size):
            table.add_section()
        last = timing.block_size
        table.add_row(
            f"{timing.block_size:,}",
            f"{timing.batch_size:,}",
            f"{timing.step_ms:,.2f}",
            f"{timing.tokens_per_second:,.0f}",
            f"{timing.gflops:,.1f}",
            "" if timing.activation_mb is None else f"{timing.activation_mb:,.1f}",
            "best" if timing is best else "",
            style="bold" if timing is best else "",
        )
    return table


def save_sweep(timings: Sequence[ShapeTiming], folder: Path) -> list[Path]:
    """Write sweep.json into `folder`; returns where it is.

    Raises:
        OSError: it cannot be written.
    """
    write_output(folder / SWEEP_FILE, json_text({"shapes": [asdict(timing) for timing in timings]}))
    return [folder / SWEEP_FILE]
