"""Schedules of learning rate, weight decay and momentum: pure functions of the step."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from utils.config.settings import OptimizerConfig, warmup_steps

# A schedule maps the progress of the decay (0 at its start, 1 at its end) to a factor (1 to 0).
SCHEDULES: dict[str, Callable[[float], float]] = {
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),  # Loshchilov and Hutter 2017, SGDR
    "linear": lambda progress: 1 - progress,
    "constant": lambda progress: 1.0,
}

FIRST_MOMENTUM = 0.85  # of Muon, at the start of its momentum warmup


def learning_rate_at(step: int, config: OptimizerConfig, max_iters: int) -> float:
    """The learning rate of update `step` (0-based) in a run of `max_iters` updates.

    A linear warmup to `learning_rate` (update 0 has a rate above zero), then the schedule, which ends at
    `lr_decay_iters` (default: the end of the run): cosine and linear at `final_lr`, constant at `learning_rate`.
    """
    warmup = warmup_steps(config, max_iters)
    if step < warmup:
        return config.learning_rate * (step + 1) / (warmup + 1)
    decay_end = config.lr_decay_iters or max_iters
    progress = min((step - warmup) / max(decay_end - warmup, 1), 1.0)
    return config.final_lr + (config.learning_rate - config.final_lr) * SCHEDULES[config.schedule](progress)


def weight_decay_at(step: int, config: OptimizerConfig, max_iters: int) -> float:
    """The weight decay of update `step`: constant, or falling to zero at the end of the run."""
    return config.weight_decay * SCHEDULES[config.weight_decay_schedule](min(step / max_iters, 1.0))


def momentum_at(step: int, config: OptimizerConfig) -> float:
    """Muon's momentum at update `step`: it rises linearly from 0.85, since the first gradients soon become outdated."""
    if step >= config.momentum_warmup_iters:
        return config.momentum
    first = min(FIRST_MOMENTUM, config.momentum)
    return first + (config.momentum - first) * step / config.momentum_warmup_iters


def apply_schedules(optimizer: torch.optim.Optimizer, step: int, config: OptimizerConfig, max_iters: int) -> float:
    """Set learning rates, weight decay and momentum of update `step`; returns the learning rate of the schedule."""
    lr = learning_rate_at(step, config, max_iters)
    set_learning_rate(optimizer, lr)
    set_weight_decay(optimizer, weight_decay_at(step, config, max_iters))
    for group in optimizer.param_groups:
        if "momentum" in group:
            group["momentum"] = momentum_at(step, config)
    return lr


def scheduled_settings(config: OptimizerConfig) -> tuple[str, ...]:
    """The settings of a parameter group that `apply_schedules` changes from step to step."""
    changing = {
        "weight_decay": config.weight_decay_schedule != "constant",
        "momentum": config.momentum_warmup_iters > 0,
    }
    return ("lr", *(name for name, changes in changing.items() if changes))


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of each group to its multiple (`lr_scale`) of `lr`."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def set_weight_decay(optimizer: torch.optim.Optimizer, weight_decay: float) -> None:
    """Set the weight decay of the groups that decay."""
    for group in optimizer.param_groups:
        group["weight_decay"] = weight_decay if group["decays"] else 0.0
