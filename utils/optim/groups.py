"""Parameter groups, optimizers, and schedules (pure functions of the step)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from model import Attention
from utils.config.settings import OptimizerConfig
from utils.optim.adamw import AdamW
from utils.optim.muon import Muon
from utils.optim.schedules import set_learning_rate, set_weight_decay


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Every parameter in one group: hidden matrices, embeddings, an untied head, and vectors (biases, norm weights).

    `lr_scale` is a group's learning rate over that of the schedule. All but vectors decay. `blocks` says of how many
    rows the matrices are that a parameter is made of: q, k and v lie in one.
    """
    names = {parameter: name for name, parameter in model.named_parameters() if parameter.requires_grad}
    rates: dict[str, float | None] = {
        "matrices": None,
        "embeddings": config.embedding_lr,
        "head": config.head_lr,
        "vectors": config.vector_lr,
    }
    members: dict[str, list[nn.Parameter]] = {group: [] for group in rates}
    for parameter, name in names.items():
        members[group_of(name, parameter)].append(parameter)
    assert sum(map(len, members.values())) == len(names), "every parameter is in exactly one group"
    fused = {
        module.qkv.weight: [heads * module.head_width for heads in (module.n_head, module.kv_heads, module.kv_heads)]
        for module in model.modules()
        if isinstance(module, Attention)
    }
    groups = [
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
            group["blocks"] = [fused.get(p, [p.size(0)]) for p in members["matrices"]]
    return groups


def group_of(name: str, parameter: torch.Tensor) -> str:
    """The parameter group of a parameter of the model, by its name and number of dimensions."""
    if parameter.dim() < 2:
        return "vectors"
    if "embedding" in name:
        return "embeddings"
    return "head" if name.startswith("head.") else "matrices"


def adamw(groups: list[dict[str, Any]], config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW for all parameters."""
    return AdamW(group | _of_adamw(config) for group in groups)


def muon(groups: list[dict[str, Any]], config: OptimizerConfig) -> torch.optim.Optimizer:
    """Muon for the hidden matrices (q, k and v each by itself), AdamW for all else."""
    of_muon = {"momentum": config.momentum}
    return Muon(group | (of_muon if group["name"] == "matrices" else _of_adamw(config)) for group in groups)


def _of_adamw(config: OptimizerConfig) -> dict[str, Any]:
    """`fused` tells torch to keep the step on the device when a state is loaded."""
    return {"betas": (config.beta1, config.beta2), "eps": config.adam_eps, "fused": True}


OPTIMIZERS: dict[str, Callable[[list[dict[str, Any]], OptimizerConfig], torch.optim.Optimizer]] = {
    "adamw": adamw,
    "muon": muon,
}


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimizer that `config` names, over the parameter groups of `model`, as in its first step."""
    optimizer = OPTIMIZERS[config.optimizer_name](parameter_groups(model, config), config)
    set_learning_rate(optimizer, config.learning_rate)
    set_weight_decay(optimizer, config.weight_decay)
    return optimizer
