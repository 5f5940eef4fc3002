"""LoRA: trained products of low rank beside frozen linear layers [Hu et al. 2021].

    y = x W^T + b + alpha / r * dropout(x) A^T B^T        A: (r, in), B: (out, r)

Only A and B are trained; B starts at zero, so at step 0 the model equals its base. A frozen weight has no gradient and
no state of the optimizer, and a checkpoint does not repeat it.

q, k and v are stacked in one matrix. With learned positions they are one matrix of GPT-2 (c_attn), which has one
adapter; with rotary positions they are three of Llama (q_proj, k_proj, v_proj), and each has an A and a B of its own.
So what is trained is what peft trains on the same model in transformers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from utils.config.settings import ModelConfig, OptimizerConfig
from utils.errors import UserError, nearest
from utils.nn.lean import may_be_plain
from utils.nn.linear import Linear, linear
from utils.nn.roles import ADAPTER, declare, declared_roles

PARTS = ("lora_a", "lora_b")  # the parameters of an adapter
BLOCKS = "blocks."  # what the names of the layers of blocks begin with


@may_be_plain
class LoraLinear(Linear):
    """A linear layer that an adapter was added to, by `add_adapters`.

    lora_a: (n r, in), for n matrices that are stacked in the weight.
    lora_b: (out, r).
    lora_rows: the rows of each of these n matrices.
    """

    multiply = staticmethod(linear)  # once more: a plain object (utils/nn/lean.py) does not inherit

    lora_a: nn.Parameter
    lora_b: nn.Parameter
    lora_dropout: nn.Dropout
    lora_rows: tuple[int, ...]
    lora_scale: float

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) -> (..., out)."""
        y = self.multiply(x, self.weight, self.bias)
        low = linear(self.lora_dropout(x), self.lora_a)  # (..., n r)
        if len(self.lora_rows) == 1:
            return torch.add(y, linear(low, self.lora_b), alpha=self.lora_scale)
        parts = zip(low.chunk(len(self.lora_rows), -1), self.lora_b.split(self.lora_rows), strict=True)
        return torch.add(y, torch.cat([linear(a, b) for a, b in parts], -1), alpha=self.lora_scale)


def add_adapters(model: nn.Module, config: ModelConfig, settings: OptimizerConfig) -> None:
    """Freeze `model` and add an adapter to each layer that `lora_targets` names; nothing without a `lora_rank`.

    A is drawn as torch draws the weight of a linear layer, which is peft's choice; B is zero.

    Raises:
        UserError: the model has no such layer.
    """
    rank = settings.lora_rank
    if rank is None:
        return
    layers, roles = targeted_layers(model, settings.lora_targets), declared_roles(model)
    model.requires_grad_(False)
    for layer in layers.values():
        weight = layer.get_parameter("weight")
        role, (out_features, in_features) = roles.get(weight), weight.shape
        rows = role.rows if role is not None and role.rows and config.position == "rope" else (out_features,)
        layer.__class__ = LoraLinear  # as torch.nn.utils.parametrize does: hooks and attributes stay
        assert isinstance(layer, LoraLinear)
        a = weight.new_empty(len(rows) * rank, in_features)  # the distribution depends on the number of columns only
        layer.lora_a = nn.Parameter(nn.init.kaiming_uniform_(a, math.sqrt(5)))
        layer.lora_b = nn.Parameter(weight.new_zeros(out_features, rank))
        layer.lora_dropout = nn.Dropout(settings.lora_dropout).train(layer.training)
        layer.lora_rows, layer.lora_scale = rows, settings.adapter_alpha / rank
        declare(layer, lora_a=ADAPTER.stacked(*[rank] * len(rows)), lora_b=ADAPTER.stacked(*rows))


def adapter_settings(settings: OptimizerConfig) -> dict[str, Any]:
    """The settings of adapters, as JSON: `add_adapters` takes them again by `OptimizerConfig.model_validate`."""
    return {key: value for key, value in settings.model_dump(mode="json").items() if key.startswith("lora_")}


def targeted_layers(model: nn.Module, targets: tuple[str, ...]) -> dict[str, nn.Linear]:
    """The linear layers by name that `targets` name by the end of their names, as in peft; no targets: all of blocks.

    Raises:
        UserError: a target names no layer.
    """
    layers = {name: layer for name, layer in model.named_modules() if type(layer) in (Linear, nn.Linear)}
    if not targets:
        return {name: layer for name, layer in layers.items() if name.startswith(BLOCKS)}
    found: set[str] = set()
    for target in targets:
        named = {name for name in layers if name == target or name.endswith(f".{target}")}
        if not named:
            known = dict.fromkeys(name.rpartition(".")[2] for name in layers)
            raise UserError(
                f"lora_targets: the model has no linear layer {target}, but {', '.join(known)}{nearest(target, known)}"
            )
        found |= named
    return {name: layer for name, layer in layers.items() if name in found}


def adapted_layers(model: nn.Module) -> dict[str, LoraLinear]:
    """The layers with an adapter, by name."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLinear)}


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name is part of an adapter."""
    return name.rpartition(".")[2] in PARTS


def frozen_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """The weights that adapters leave as they are; none without adapters."""
    if not adapted_layers(model):
        return {}
    return {name: p.detach() for name, p in model.named_parameters() if not p.requires_grad}


def merged_weights(model: nn.Module, weights: Mapping[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    """The state dict of the model without adapters that computes the same; merged matrices are rounded once.

    Args:
        model: with or without adapters.
        weights: a state dict of such a model; None: its own.
    """
    weights = model.state_dict() if weights is None else weights
    merged = {name: tensor for name, tensor in weights.items() if not is_adapter(name)}
    for name, layer in adapted_layers(model).items():
        weight, a, b = (weights[f"{name}.{part}"].detach().cpu().double() for part in ("weight", *PARTS))
        parts = zip(a.chunk(len(layer.lora_rows)), b.split(layer.lora_rows), strict=True)
        change = torch.cat([of_b @ of_a for of_a, of_b in parts])  # (out, in)
        merged[f"{name}.weight"] = torch.add(weight, change, alpha=layer.lora_scale).to(weights[f"{name}.weight"].dtype)
    return merged


@dataclasses.dataclass(frozen=True)
class ParameterCounts:
    """Numbers of parameters of a model."""

    trainable: int
    frozen: int

    @property
    def total(self) -> int:
        return self.trainable + self.frozen

    @property
    def words(self) -> str:
        """The numbers, and the share that is trained."""
        return f"{self.trainable:,} trainable ({self.trainable / self.total:.2%}), {self.frozen:,} frozen"


def count_parameters(model: nn.Module) -> ParameterCounts:
    """How many parameters are trained, and how many are not; a shared one counts once."""
    sizes = [(parameter.requires_grad, parameter.numel()) for parameter in model.parameters()]
    return ParameterCounts(sum(n for trained, n in sizes if trained), sum(n for trained, n in sizes if not trained))
