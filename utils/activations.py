"""Activations of the MLP, by name."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

# gelu_tanh(x) = x sigmoid(SLOPE x (1 + CUBIC x^2)): a tanh is a sigmoid, which torch computes in a tenth of the time.
SLOPE, CUBIC = 2 * math.sqrt(2 / math.pi), 0.044715


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    """GELU as GPT-2 approximates it [Hendrycks and Gimpel 2016]."""
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        return GeluTanh.apply(x)
    return F.gelu(x, approximate="tanh")


class GeluTanh(torch.autograd.Function):
    """gelu_tanh and its gradient in few passes over memory. It keeps its argument only, as torch's own does."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return _gate(x).mul_(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        gate = _gate(x)
        slope = torch.addcmul(x.new_tensor(SLOPE), x, x, value=3 * SLOPE * CUBIC)  # of the gate's argument
        through_gate = torch.ops.aten.sigmoid_backward(gradient * x, gate)
        return through_gate.mul_(slope).addcmul_(gradient, gate)


def _gate(x: torch.Tensor) -> torch.Tensor:
    return torch.addcmul(x.new_tensor(SLOPE), x, x, value=SLOPE * CUBIC).mul_(x).sigmoid_()


ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": F.gelu,  # Hendrycks and Gimpel 2016
    "gelu_tanh": gelu_tanh,
    "relu2": lambda x: F.relu(x).square(),  # So et al. 2021, Primer
}
