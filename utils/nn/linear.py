"""Linear layers. On a CPU in float32 their matrix products are oneDNN's, which knows AVX-512 on every processor.

torch takes MKL for float32, which on AMD's processors stays with AVX2 and so with half of the speed (docs/LOG.md).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import nn

from utils.nn.lean import may_be_plain
from utils.nn.private import private_operator
from utils.nn.roles import BIAS, MATRIX, declare

# The operator that torch.compile makes of a linear layer for inference; it has no gradient of its own.
ONEDNN = private_operator("ops.mkldnn._linear_pointwise.default") if torch.backends.mkldnn.is_available() else None

R = TypeVar("R")

SMALL = 1 << 17  # multiplications; below, a call of oneDNN takes longer than the product


@may_be_plain
class Linear(nn.Linear):
    """nn.Linear, by the fastest matrix product that the device has for its precision."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__(in_features, out_features, bias)
        declare(self, weight=MATRIX, bias=BIAS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) -> (..., out)."""
        return linear(x, self.weight, self.bias)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x weight^T + bias.

    Args:
        x: (..., in).
        weight: (out, in).
        bias: (out,), or None.
    """
    by_onednn = (  # asked dozens of times a step: a device as a string alone takes a quarter of a microsecond
        x.is_cpu
        and x.dtype is torch.float32 is weight.dtype
        and ONEDNN is not None
        and x.numel() * weight.shape[0] > SMALL  # also where nothing is to be multiplied
        and x.shape[-1] == weight.shape[1]  # torch says better what is wrong
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )
    if not by_onednn:
        return F.linear(x, weight, bias)
    return OneDNNLinear.apply(x, weight, bias) if torch.is_grad_enabled() else product(x, weight, bias)


def product(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """a b^T + bias: (..., K) and (N, K) -> (..., N)."""
    assert ONEDNN is not None
    return ONEDNN(a, b, bias, "none", [], "")


def first_order(backward: Callable[..., R]) -> Callable[..., R]:
    """Refuse gradients of gradients at once; torch's once_differentiable takes 10 microseconds a call.

    Raises:
        RuntimeError: when called with create_graph.
    """

    @functools.wraps(backward)
    def checked(ctx: Any, *gradients: torch.Tensor) -> R:
        if torch.is_grad_enabled():  # autograd turns it off but for create_graph
            raise RuntimeError(f"{type(ctx).__name__} has no gradient of its gradient: no create_graph here")
        return backward(ctx, *gradients)

    return checked


class OneDNNLinear(torch.autograd.Function):
    """A linear layer and its gradients, each one matrix product of oneDNN. Gradients of gradients it has none."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    @first_order
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
