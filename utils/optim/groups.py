"""Parameter groups, and the optimizers that update them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from utils.config.settings import OptimizerConfig
from utils.nn.roles import Group, Role, declared_roles
from utils.optim.adamw import AdamW, EagerOptimizer
from utils.optim.muon import Muon
from utils.optim.schedules import scheduled_settings, set_learning_rate, set_weight_decay


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """The trainable parameters, grouped by their roles (utils/nn/roles.py).

    The groups are matrices, embeddings, head (an untied one) and vectors (biases, norm weights); empty ones are left
    out. A parameter without a role counts as a matrix if it has two or more dimensions, else as a vector.

    Returns:
        For each group: name; params, in the order of the model; lr_scale, its learning rate as a multiple of the
        schedule's; decays, whether weight decay applies. For matrices also blocks: for each parameter, the numbers of
        rows of the matrices that are stacked in it, such as queries, keys and values.
    """
    rates: dict[Group, float | None] = {
        "matrices": None,
        "embeddings": config.embedding_lr,
        "head": config.head_lr,
        "vectors": config.vector_lr,
    }
    roles = declared_roles(model)
    members: dict[Group, list[nn.Parameter]] = {group: [] for group in rates}
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]  # each once
    for parameter in trainable:
        members[roles[parameter].group if parameter in roles else group_by_shape(parameter)].append(parameter)
    assert sum(map(len, members.values())) == len(trainable), "every parameter is in exactly one group"
    groups: list[dict[str, Any]] = [
        {
            "name": group,
            "params": parameters,
            "lr_scale": (rates[group] or config.learning_rate) / config.learning_rate,
            "decays": group != "vectors",
        }
        for group, parameters in members.items()
        if parameters
    ]
    for group in groups:
        if group["name"] == "matrices":
            group["blocks"] = [_rows(parameter, roles.get(parameter)) for parameter in group["params"]]
    return groups


def group_by_shape(parameter: torch.Tensor) -> Group:
    """The group of a parameter whose layer declares no role."""
    return "matrices" if parameter.dim() > 1 else "vectors"


def _rows(parameter: torch.Tensor, role: Role | None) -> list[int]:
    """The numbers of rows of the matrices that are stacked in a parameter."""
    rows = [parameter.size(0)] if role is None or not role.rows else list(role.rows)
    assert sum(rows) == parameter.size(0), f"{rows} rows are declared of a matrix that has {parameter.size(0)}"
    return rows


def adamw(groups: list[dict[str, Any]], config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW for all parameters."""
    return AdamW(group | _adamw_settings(config) for group in groups)


def muon(groups: list[dict[str, Any]], config: OptimizerConfig) -> torch.optim.Optimizer:
    """Muon for the matrices (q, k and v separately), AdamW for the other groups."""
    muon_settings = {"momentum": config.momentum}
    return Muon(group | (muon_settings if group["name"] == "matrices" else _adamw_settings(config)) for group in groups)


def _adamw_settings(config: OptimizerConfig) -> dict[str, Any]:
    """AdamW's settings of a group. With `fused`, torch keeps the step count on the device when it loads a state."""
    return {"betas": (config.beta1, config.beta2), "eps": config.adam_eps, "fused": True}


OPTIMIZERS: dict[str, Callable[[list[dict[str, Any]], OptimizerConfig], torch.optim.Optimizer]] = {
    "adamw": adamw,
    "muon": muon,
}


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimizer that `config` names for the parameters of `model`, with the peak learning rate and weight decay."""
    optimizer = OPTIMIZERS[config.optimizer_name](parameter_groups(model, config), config)
    set_learning_rate(optimizer, config.learning_rate)
    set_weight_decay(optimizer, config.weight_decay)
    if isinstance(optimizer, EagerOptimizer):
        optimizer.scheduled = scheduled_settings(config)
    return optimizer
