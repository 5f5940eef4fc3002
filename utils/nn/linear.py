"""Linear layers. On a CPU with AVX-512, their float32 matrix products are computed by oneDNN.

torch uses MKL for float32, which uses only AVX2 on AMD's processors: half the speed of AVX-512. On processors without
AVX-512, MKL makes a step an eighth faster, so there it computes the products (docs/LOG.md).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import nn

from utils.nn.lean import is_patched, may_be_plain
from utils.nn.private import private_operator
from utils.nn.roles import BIAS, MATRIX, declare

# The operator that torch.compile turns a linear layer into for inference; it has no gradient.
ONEDNN = private_operator("ops.mkldnn._linear_pointwise.default") if torch.backends.mkldnn.is_available() else None

ONEDNN_IS_FASTER = torch.backends.cpu.get_cpu_capability() != "AVX2"  # than MKL

R = TypeVar("R")

SMALL_PRODUCT = 1 << 17  # multiplications; up to here, calling oneDNN takes longer than the product itself


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x weight^T + bias.

    Args:
        x: (..., in).
        weight: (out, in).
        bias: (out,), or None.
    """
    use_onednn = (  # evaluated dozens of times a step: comparing a device's name alone takes a quarter of a microsecond
        x.is_cpu
        and x.dtype is torch.float32 is weight.dtype
        and ONEDNN is not None
        and ONEDNN_IS_FASTER
        and x.numel() * weight.shape[0] > SMALL_PRODUCT  # false for empty tensors, too
        and x.shape[-1] == weight.shape[1]  # otherwise F.linear raises the better message
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )
    if not use_onednn:
        return F.linear(x, weight, bias)
    return OneDNNLinear.apply(x, weight, bias) if torch.is_grad_enabled() else product(x, weight, bias)


@may_be_plain
class Linear(nn.Linear):
    """nn.Linear with the fastest matrix product for the device and precision."""

    multiply = staticmethod(linear)  # may be replaced by a like function, such as one in another precision

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__(in_features, out_features, bias)
        declare(self, weight=MATRIX, bias=BIAS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) -> (..., out)."""
        return self.multiply(x, self.weight, self.bias)


def matrix_of(layer: nn.Module) -> torch.Tensor | None:
    """The weight (out, in) of a layer that only multiplies by it; None for any other layer."""
    return layer.weight if type(layer) is Linear and layer.bias is None and not is_patched(layer) else None


def product(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """a b^T + bias: (..., K) and (N, K) -> (..., N)."""
    assert ONEDNN is not None
    return ONEDNN(a, b, bias, "none", [], "")


def product_dtype(x: torch.Tensor) -> torch.dtype:
    """The precision in which a linear layer multiplies x, given the current state of autocast."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def once_differentiable(backward: Callable[..., R]) -> Callable[..., R]:
    """A decorator for the backward pass of an autograd function that has no second derivative.

    With create_graph the backward pass raises a RuntimeError. torch's decorator of this name takes 10 microseconds a
    call.
    """

    @functools.wraps(backward)
    def checked(ctx: Any, *gradients: torch.Tensor) -> R:
        if torch.is_grad_enabled():  # in a backward pass, only with create_graph
            raise RuntimeError(f"{type(ctx).__name__} has no second derivative: create_graph is not supported")
        return backward(ctx, *gradients)

    return checked


class OneDNNLinear(torch.autograd.Function):
    """A linear layer and its gradients, each one matrix product of oneDNN; it has no second derivative."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, gradient: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        rows = gradient.reshape(-1, weight.size(0))  # (rows, out)
        return (
            product(gradient, weight.t()) if needs_x else None,
            weight_gradient(rows, x.reshape(-1, weight.size(1))) if needs_weight else None,
            rows.sum(0) if needs_bias else None,
        )


def weight_gradient(gradient: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """gradient^T x: (rows, out) and (rows, in) -> (out, in). oneDNN is faster with the smaller side first."""
    if gradient.size(1) <= x.size(1):
        return product(gradient.t(), x.t())
    return product(x.t(), gradient.t()).t().contiguous()
