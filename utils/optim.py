"""Parameter groups, optimizers, and learning-rate schedules (pure functions of the step)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from utils.config import OptimizerConfig, warmup_steps

# A schedule maps the progress of the decay (0 at its start, 1 at its end) to a factor (1 to 0).
SCHEDULES: dict[str, Callable[[float], float]] = {
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),  # Loshchilov and Hutter 2017, SGDR
    "linear": lambda progress: 1 - progress,
    "constant": lambda progress: 1.0,
}


def learning_rate_at(step: int, config: OptimizerConfig, max_iters: int) -> float:
    """The learning rate of update `step` (0-based) in a run of `max_iters` updates.

    Linear warmup to `learning_rate` (update 0 has a rate above zero), then the schedule, which is at
    its end at `lr_decay_iters` (default: the end of the run) and stays there: cosine and linear at
    `final_lr`, constant at `learning_rate`.
    """
    warmup = warmup_steps(config, max_iters)
    if step < warmup:
        return config.learning_rate * (step + 1) / (warmup + 1)
    decay_end = config.lr_decay_iters or max_iters
    progress = min((step - warmup) / max(decay_end - warmup, 1), 1.0)
    return config.final_lr + (config.learning_rate - config.final_lr) * SCHEDULES[config.schedule](progress)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices (and embeddings) decay; vectors, that is biases and norm weights, do not."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"name": "matrices", "params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"name": "vectors", "params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]


def adamw(groups: list[dict[str, Any]], config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW [Loshchilov and Hutter 2019], one fused kernel a group where the device has it."""
    device_type = groups[0]["params"][0].device.type
    return torch.optim.AdamW(
        groups,
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.adam_eps,
        fused=device_type in ("cpu", "cuda", "mps"),
    )


OPTIMIZERS: dict[str, Callable[[list[dict[str, Any]], OptimizerConfig], torch.optim.Optimizer]] = {
    "adamw": adamw,
}


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimizer that `config` names, over the parameter groups of `model`."""
    return OPTIMIZERS[config.optimizer_name](parameter_groups(model, config.weight_decay), config)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
