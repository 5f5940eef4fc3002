"""Training with matrix products in 8 bits (FP8), on GPUs that have units for it [Micikevicius et al. 2022].

Each tensor is scaled so that its largest element becomes the largest number of the format, and rounded (dynamic scaling
per tensor): activations and weights to e4m3 (3 bits of mantissa, up to 448), gradients to e5m2 (2 bits, up to 57,344).
The products are summed in float32. Parameters, their gradients and all operations but products keep their precision.

Scaling and rounding are ordinary operators, so torch.compile fuses them into the kernels before them. Without the
compiler each is a kernel of its own, and FP8 is slower than bfloat16.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from utils.nn.linear import Linear, linear, once_differentiable, product_dtype
from utils.nn.lora import LoraLinear
from utils.nn.private import private_operator

SCALED_MM = private_operator("_scaled_mm")  # a b, with b column-major and sizes that are multiples of MULTIPLE
MULTIPLE = 16
VALUES, GRADIENTS = torch.float8_e4m3fn, torch.float8_e5m2


def use_float8(layers: nn.Module) -> None:
    """Make the linear layers inside `layers` multiply in FP8 during training.

    Layers of other types, layers whose sizes are not multiples of 16, adapters, and all parameters stay as they are.
    """
    for layer in layers.modules():
        if (
            isinstance(layer, Linear)
            and type(layer) in (Linear, LoraLinear)
            and not any(size % MULTIPLE for size in layer.weight.shape)
        ):
            layer.multiply = float8_linear


def float8_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x weight^T + bias, in FP8 if gradients are enabled and x has a multiple of 16 rows; else like `linear`.

    Args:
        x: (..., in).
        weight: (out, in).
        bias: (out,), or None.

    Returns:
        (..., out), in the precision of autocast, if that is on.
    """
    rows = x.numel() // x.size(-1)
    if not torch.is_grad_enabled() or rows == 0 or rows % MULTIPLE:
        return linear(x, weight, bias)
    y = Float8Linear.apply(x.reshape(rows, -1), weight, product_dtype(x))  # (rows, out)
    if bias is not None:
        y = y + bias.to(y.dtype)
    return y.view(*x.shape[:-1], -1)


class Float8Linear(torch.autograd.Function):
    """x weight^T and its gradients, each one product in FP8; it has no second derivative."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        x8, x_scale = rounded(x, VALUES)  # (rows, in)
        weight8, weight_scale = rounded(weight, VALUES)  # (out, in)
        # Operands must be contiguous along the dimension of the sum, so the backward pass needs transposed copies.
        ctx.save_for_backward(x8.t().contiguous(), x_scale, weight8.t().contiguous(), weight_scale)
        ctx.dtypes = x.dtype, weight.dtype
        return product(x8, weight8, x_scale, weight_scale, dtype, fast=True)  # (rows, out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x8, x_scale, weight8, weight_scale = ctx.saved_tensors  # (in, rows), (), (in, out), ()
        x_dtype, weight_dtype = ctx.dtypes
        needs_x, needs_weight, _ = ctx.needs_input_grad
        gradient8, scale = rounded(gradient, GRADIENTS)  # (rows, out)
        grad_x = product(gradient8, weight8, scale, weight_scale, gradient.dtype) if needs_x else None
        grad_weight = None
        if needs_weight:
            grad_weight = product(gradient8.t().contiguous(), x8, scale, x_scale, weight_dtype)  # (out, in)
        return grad_x if grad_x is None else grad_x.to(x_dtype), grad_weight, None


def rounded(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """x / scale, rounded to an 8-bit format, and the scale, () in float32.

    With an infinite or NaN element the scale is infinite or NaN, and so is every product.
    """
    largest = x.abs().amax().float()
    scale = largest.clamp(min=torch.finfo(torch.float32).tiny * 2**20) / torch.finfo(dtype).max
    return (x / scale.reshape(1)).to(dtype), scale  # with a dimension: as a scalar it would be rounded to x.dtype


def product(
    a: torch.Tensor,
    b: torch.Tensor,
    a_scale: torch.Tensor,
    b_scale: torch.Tensor,
    dtype: torch.dtype,
    fast: bool = False,
) -> torch.Tensor:
    """a b^T in `dtype`: (M, K) and (N, K) in 8 bits -> (M, N).

    Args:
        fast: accumulate in the tensor cores alone, with fewer bits than float32.
    """
    assert SCALED_MM is not None
    return SCALED_MM(a, b.t(), scale_a=a_scale, scale_b=b_scale, out_dtype=dtype, use_fast_accum=fast)
