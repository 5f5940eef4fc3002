"""LoRA: trained low-rank products beside frozen linear layers [Hu et al. 2021].

    y = x W^T + b + alpha / r * dropout(x) A^T B^T        A: (r, in), B: (out, r)

Only A and B are trained; B starts at zero, so at step 0 the model equals its base. Frozen weights have no gradients and
no optimizer state, and checkpoints do not repeat them.

q, k and v are stacked in one matrix. With learned positions this is GPT-2's c_attn and gets one adapter; with rotary
positions it stands for Llama's q_proj, k_proj and v_proj, each of which gets its own A and B. So the trained parameters
are those that peft trains on the same model in transformers.
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
BLOCKS = "blocks."  # the prefix of the names of layers in blocks


@may_be_plain
class LoraLinear(Linear):
    """A linear layer to which `add_adapters` has added an adapter.

    lora_a: (n r, in), for n matrices that are stacked in the weight.
    lora_b: (out, r).
    lora_rows: the rows of each of these n matrices.
    """

    multiply = staticmethod(linear)  # repeated, because plain objects (utils/nn/lean.py) do not inherit

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
    """Freeze `model` and add an adapter to each layer that `lora_targets` names; do nothing without a `lora_rank`.

    A is initialised like the weight of an nn.Linear, as in peft; B is zero.

    Raises:
        UserError: a target names no layer of the model.
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
    """The settings of adapters as JSON, which `OptimizerConfig.model_validate` reads again for `add_adapters`."""
    return {key: value for key, value in settings.model_dump(mode="json").items() if key.startswith("lora_")}


def targeted_layers(model: nn.Module, targets: tuple[str, ...]) -> dict[str, nn.Linear]:
    """The linear layers whose names end in one of `targets`, as in peft; without targets, all those in blocks.

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
                f"lora_targets: the model has no linear layer {target}; it has {', '.join(known)}"
                f"{nearest(target, known)}"
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
    """The frozen weights of a model with adapters, by name; empty for a model without adapters."""
    if not adapted_layers(model):
        return {}
    return {name: p.detach() for name, p in model.named_parameters() if not p.requires_grad}


def merged_weights(model: nn.Module, weights: Mapping[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    """The state dict of a model without adapters that computes the same; merged matrices are rounded once.

    Args:
        model: a model with or without adapters.
        weights: a state dict that fits `model`; None: that of `model` itself.
    """
    weights = model.state_dict() if weights is None else weights
    merged = {name: tensor for name, tensor in weights.items() if not is_adapter(name)}
    for name, layer in adapted_layers(model).items():
        weight, a, b = (weights[f"{name}.{part}"].detach().cpu().double() for part in ("weight", *PARTS))
        parts = zip(a.chunk(len(layer.lora_rows)), b.split(layer.lora_rows), strict=True)
        change = torch.cat([b_block @ a_block for a_block, b_block in parts])  # (out, in)
        merged[f"{name}.weight"] = torch.add(weight, change, alpha=layer.lora_scale).to(weights[f"{name}.weight"].dtype)
    return merged


@dataclasses.dataclass(frozen=True)
class ParameterCounts:
    """How many parameters of a model are trained, and how many are not."""

    trainable: int
    frozen: int

    @property
    def total(self) -> int:
        return self.trainable + self.frozen

    @property
    def words(self) -> str:
        """Both numbers and the trainable share, as text."""
        return f"{self.trainable:,} trainable ({self.trainable / self.total:.2%}), {self.frozen:,} frozen"


def count_parameters(model: nn.Module) -> ParameterCounts:
    """The parameter counts of a model; a shared parameter counts once."""
    sizes = [(parameter.requires_grad, parameter.numel()) for parameter in model.parameters()]
    return ParameterCounts(sum(n for trained, n in sizes if trained), sum(n for trained, n in sizes if not trained))
