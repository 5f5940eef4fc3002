"""Smaller weights and a faster layout: each token reads all weights once, so their size determines its time."""

from __future__ import annotations

import copy
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from model import LanguageModel
from utils.errors import UserError
from utils.machine.device import has_bf16_units
from utils.nn.lean import may_be_plain
from utils.nn.linear import Linear
from utils.nn.private import private_operator

Weights = Literal["float32", "bfloat16", "int8"]
WeightsChoice = Literal["auto", "float32", "bfloat16", "int8"]
FEW_ROWS = 16  # the most that torch's int8 kernel gets
INT8_PRODUCT = private_operator("_weight_int8pack_mm")


@may_be_plain
class Int8Linear(nn.Module):
    """A linear layer with weights of 8 bits: each row is round(127 w / max |w|), with its own scale.

    Rounding to nearest, symmetric [Dettmers et al. 2022, section 2]; activations are bfloat16, which torch's kernel
    multiplies eight times as fast as float32.
    """

    weight: torch.Tensor  # (out, in), int8
    scales: torch.Tensor  # (out,)

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        scales = (weight.detach().float().abs().amax(1) / 127).clamp_min(torch.finfo(torch.float32).tiny)
        rounded = (weight.detach().float() / scales[:, None]).round()
        self.register_buffer("weight", rounded.to(torch.int8, memory_format=torch.contiguous_format))
        self.register_buffer("scales", scales.bfloat16())
        self.bias = bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) -> (..., out)."""
        if INT8_PRODUCT is not None and x.numel() <= FEW_ROWS * x.size(-1):
            rows = x.reshape(-1, x.size(-1))
            y = INT8_PRODUCT(rows, self.weight, self.scales).view(*x.shape[:-1], -1)
        else:  # the kernel would multiply row by row
            y = F.linear(x, self.weight.to(x.dtype)) * self.scales
        return y if self.bias is None else y + self.bias


def choose_weights(weights: WeightsChoice, device: torch.device) -> Weights:
    """The precision to generate in; `auto` is bfloat16 on a GPU with bfloat16 units, otherwise float32.

    On a CPU, `auto` does not choose smaller weights: whether they are faster depends on the model (docs/LOG.md).
    """
    if weights != "auto":
        return weights
    return "bfloat16" if device.type == "cuda" and has_bf16_units(device) else "float32"


def with_weights(model: LanguageModel, weights: Weights) -> LanguageModel:
    """Prepare a model for generation: for float32 the model itself, otherwise a copy with smaller weights in eval mode.

    float32: on a CPU, the matrices of all linear layers are changed in place to be stored by columns, still of shape
        (out, in), because multiplying few rows by them then takes up to a fifth less time.
    bfloat16: all parameters, and so the activations.
    int8: the matrices of all linear layers and of the head; the rest is bfloat16. The embedding that a tied head
        shares is kept beside the int8 head, because a token reads only one row of it.

    Raises:
        UserError: int8 on a CUDA GPU.
    """
    if weights == "int8" and next(model.parameters()).is_cuda:
        raise UserError(
            "int8 weights are for CPUs: on a GPU, torch's product of int8 weights is slower than that of bfloat16"
        )
    if weights == "float32":
        for module in model.modules():
            if isinstance(module, Linear) and module.weight.is_cpu:
                module.weight.data = module.weight.data.t().contiguous().t()
        return model
    model = copy.deepcopy(model).eval().requires_grad_(False)
    if weights == "int8":
        for module in list(model.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, Linear):
                    setattr(module, name, Int8Linear(child.weight, child.bias))
        if model.head is None:
            model.head = Int8Linear(model.token_embedding.weight, None)
    for parameter in model.parameters():  # not the buffers of rotary factors, which need their precision
        parameter.data = parameter.data.to(torch.bfloat16, memory_format=torch.contiguous_format)
    return model


def weight_bytes(model: LanguageModel) -> int:
    """The bytes that one token reads: all weights in their precision, but only one row of each embedding table."""
    tables = [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]
    if model.head is None:
        tables = [table for table in tables if table is not model.token_embedding.weight]
    looked_up = sum((table.numel() - table.size(1)) * table.element_size() for table in tables)
    return sum(weight.numel() * weight.element_size() for weight in model.state_dict().values()) - looked_up
