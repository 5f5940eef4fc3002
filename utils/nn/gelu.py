"""GPT-2's GELU, computed with a sigmoid instead of a tanh, which is slow on a CPU."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F

from utils.nn.linear import once_differentiable
from utils.nn.private import private_operator

CUBIC = 0.044715
FEW_ELEMENTS = 1 << 13  # up to here, the calls take longer than a tanh
SCALE = 2 * math.sqrt(2 / math.pi)
SIGMOID_BACKWARD = private_operator("ops.aten.sigmoid_backward.grad_input")


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    """x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2 [Hendrycks and Gimpel 2016], any shape."""
    use_sigmoid = (
        x.numel() > FEW_ELEMENTS
        and x.is_cpu
        and x.dtype is torch.float32
        and SIGMOID_BACKWARD is not None
        and not torch.compiler.is_compiling()
    )
    if use_sigmoid:
        return SigmoidGELU.apply(x)
    return F.gelu(x, approximate="tanh")


class SigmoidGELU(torch.autograd.Function):
    """x sigmoid(z) with z = 2 sqrt(2 / pi) (x + 0.044715 x^3): the same, since (1 + tanh(y)) / 2 = sigmoid(2 y).

    torch's sigmoid takes a tenth of the time of its tanh. The forward pass also computes the derivative, while its
    inputs are in the cache, and keeps only that for the backward pass. Allocating memory takes most of the time, so
    operations are in place where possible. There is no second derivative.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        assert SIGMOID_BACKWARD is not None
        z = torch.addcmul(torch.tensor(SCALE), x, x, value=CUBIC * SCALE).mul_(x)
        sigmoid = z.sigmoid()
        y = x * sigmoid
        if ctx.needs_input_grad[0]:
            third = z.sub_(x, alpha=SCALE * 2 / 3)  # a third of x dz/dx
            SIGMOID_BACKWARD(third, sigmoid, grad_input=third)  # times sigmoid (1 - sigmoid)
            ctx.save_for_backward(sigmoid.add_(third, alpha=3))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        (derivative,) = ctx.saved_tensors
        return gradient * derivative
