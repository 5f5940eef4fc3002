"""`--budget 5m`: how many steps fit into a time, measured before the run is made.

The measured steps and evaluation are made with a separate model, which is then dropped, so the run is the same as with
that number as --max-iters.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from utils.config.loader import LoadedConfig, rule_error
from utils.config.section import RuleError
from utils.config.settings import warmup_steps
from utils.errors import UserError, number_text
from utils.inference.evaluation import estimate_loss
from utils.machine.device import synchronize, torch_settings
from utils.optim.schedules import apply_schedules
from utils.runs.origin import Origin, put_on_top
from utils.terminal.console import Terminal
from utils.terminal.words import duration
from utils.training.batch_size import memory_explained
from utils.training.evaluate import answer_accuracy, prepare_evaluation, sample_text
from utils.training.setup import Setup, make_setup
from utils.training.state import TrainState, build_state
from utils.training.step import no_phase
from utils.training.step_graph import make_update

WARMUP_STEPS = 10  # not timed: these compile, allocate and record graphs
BLOCK = 5  # steps timed together, because waiting for a GPU after each step would slow them
LEAST_BLOCKS, MOST_BLOCKS = 5, 100
SHARE = 0.02  # of the budget is spent on measuring steps
BUDGET = "--budget"


def fit_to_budget(
    loaded: LoadedConfig, seconds: float, root: Path, origin: Origin | None, terminal: Terminal
) -> tuple[LoadedConfig, Mapping[str, Any]]:
    """Set max_iters to the number of steps that take `seconds`, evaluations included.

    Args:
        seconds: time for training, which does not include the start and the checkpoints.
        root: the folder that relative paths start from.
        origin: the run that this one starts from.

    Returns:
        The configuration, and a field for run.json about the measurement.

    Raises:
        UserError: not even one step fits, or the configuration has a mistake.
    """
    setup = make_setup(loaded, root, origin, terminal.warn, terminal.print)
    on_cuda = setup.device.type == "cuda"
    with (
        torch.random.fork_rng(devices=[setup.device] if on_cuda else []),
        torch_settings(setup.config.train, setup.device),
        memory_explained(setup.config, setup.device),
    ):
        step, evaluation, measured = measure(setup, seconds, terminal)
        gc.collect()
        if on_cuda:
            torch.cuda.empty_cache()
    steps = steps_within(seconds, step, evaluation, setup.config.train.eval_interval)
    if steps < 1:
        raise UserError(
            f"{BUDGET}: {number_text(seconds)} s are too short: a step takes {number_text(round(step, 4))} s, and each "
            f"of the two evaluations {number_text(round(evaluation, 4))} s"
        )
    found = put_on_top(setup.loaded, {"max_iters": steps, "epochs": None}, f"{BUDGET} {number_text(seconds)}s")
    try:
        warmup_steps(found.config.optimizer, steps)
    except RuleError as error:
        raise rule_error(error, found) from None
    tokens = setup.config.train.sequences * setup.config.model.block_size
    terminal.print(f"budget: {steps:,} steps in {duration(seconds)}, at {tokens / step:,.0f} tokens/s")
    return found, {
        "budget": {
            "seconds": seconds,
            "max_iters": steps,
            "seconds_per_step": round(step, 6),
            "seconds_per_evaluation": round(evaluation, 6),
            "tokens_per_second": round(tokens / step),
            "warmup_steps": WARMUP_STEPS,
            "measured_steps": measured,
        }
    }


def steps_within(seconds: float, step: float, evaluation: float, eval_interval: int) -> int:
    """The most steps that fit into `seconds` with evaluations at step 0, every `eval_interval` steps and at the end.

    >>> steps_within(seconds=10.0, step=0.1, evaluation=1.0, eval_interval=20)
    53
    """

    def total(steps: int) -> float:
        return steps * step + evaluation * (math.ceil(steps / eval_interval) + 1)

    steps = max(0, math.floor((seconds - evaluation) / (step + evaluation / eval_interval)))
    while steps > 0 and total(steps) > seconds:
        steps -= 1
    return steps


def measure(setup: Setup, seconds: float, terminal: Terminal) -> tuple[float, float, int]:
    """Seconds per step (the median) and per evaluation, and how many steps were measured."""
    config = setup.config
    state = build_state(config, setup.max_iters, setup.corpus, setup.device, setup.dtype, terminal)
    update = make_update(state, terminal.warn)
    state.model.train()

    def step() -> None:
        apply_schedules(state.optimizer, state.step, config.optimizer, max(setup.max_iters, state.step + 1))
        _, grad_norms = update.gradients(no_phase)
        update.apply(grad_norms)

    def block() -> None:
        for _ in range(BLOCK):
            step()

    for _ in range(WARMUP_STEPS):
        step()
    times: list[float] = []  # seconds per block
    while len(times) < LEAST_BLOCKS or (len(times) < MOST_BLOCKS and sum(times) < SHARE * seconds):
        times.append(_timed(block, state.device))
    if state.device.type == "cuda":
        _evaluate(state)  # not timed: the first one records graphs
    evaluation = _timed(lambda: _evaluate(state), state.device)
    return statistics.median(times) / BLOCK, evaluation, len(times) * BLOCK


def _evaluate(state: TrainState) -> None:
    """Do the work of an evaluation during training, without logging."""
    settings = state.config.train
    loss = prepare_evaluation(state)
    estimate_loss(loss, state.sampler, settings.eval_iters, settings.gradient_accumulation_steps)
    if state.questions:
        answer_accuracy(state)
    if state.config.tracking.sample_tokens:
        sample_text(state)


def _timed(action: Callable[[], None], device: torch.device) -> float:
    """Seconds that an action takes, including its work on the device."""
    synchronize(device)
    began = time.perf_counter()
    action()
    synchronize(device)
    return time.perf_counter() - began
