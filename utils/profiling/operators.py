"""Estimating the operations and bytes of an operator from the shapes that the profiler recorded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

Argument = Sequence[Any]  # the shape of a tensor, or a list of shapes; empty for a scalar or a non-tensor

ONEDNN = "mkldnn::_linear_pointwise"
# Operator -> the position of its first matrix among the arguments; the second one follows.
FIRST_FACTOR = {"mm": 0, "addmm": 1, "bmm": 0, "baddbmm": 1, "linear": 0, ONEDNN: 0, "_scaled_mm": 0}
TRANSPOSED = ("linear", ONEDNN)  # multiply by the transpose of the second matrix
TORCH_ATTENTION, OUR_ATTENTION = "scaled_dot_product", "ShortAttention"  # parts of names; ours: utils/nn/attention.py
SMALL_RESULT = ("sum", "mean", "linalg_vector_norm", "_foreach_norm", "nll_loss", "cross_entropy_loss", "item")
VIEWS = "view _unsafe_view reshape t transpose permute expand slice select narrow split split_with_sizes chunk unbind"
MORE_VIEWS = "squeeze unsqueeze as_strided alias detach resolve_conj dropout to"  # dropout and to: if they do nothing
RESERVED = "empty empty_like empty_strided resize_"
WITHOUT_MOVING = frozenset(f"{VIEWS} {MORE_VIEWS} {RESERVED}".split())  # if one copies after all, its callees show it
LOOKUPS = ("embedding", "index_select", "gather")  # read only what they return, not the whole table
OPTIMIZERS = ("_fused_adamw_", "_fused_adam_")  # read weight, gradient, two moments; write all but the gradient
BYTES = {"double": 8, "long int": 8, "float": 4, "int": 4, "c10::BFloat16": 2, "c10::Half": 2, "bool": 1}
BYTES |= {"c10::Float8_e4m3fn": 1, "c10::Float8_e5m2": 1}
UNKNOWN_TYPE, UNKNOWN_BYTES = "", 4  # the profiler reports only the shapes of lists of tensors


def is_operator(name: str) -> bool:
    """Whether `name` is an operator of torch, a library or ours, not an annotation, autograd node or driver call."""
    return ("::" in name or is_our_attention(name)) and not name.startswith(("autograd::", "torch::autograd"))


def short_name(name: str) -> str:
    return name.removeprefix("aten::")


def is_attention(name: str) -> bool:
    return TORCH_ATTENTION in name or is_our_attention(name)


def is_our_attention(name: str) -> bool:
    """Whether `name` is the forward or backward pass of our attention, which calls operators of torch."""
    return name.startswith(OUR_ATTENTION)


def operator_flops(name: str, shapes: Sequence[Argument], values: Sequence[Any]) -> float | None:
    """Floating-point operations of a matrix product or torch's attention; None for any other operator.

    Args:
        name: torch's name of the operator, such as "aten::mm".
        shapes: the shapes of the arguments.
        values: the values of the arguments that are not tensors; the first bool of attention is whether it is causal.
    """
    short = short_name(name)
    if short in FIRST_FACTOR:
        left, right, columns = _matrices(short, shapes)
        return 2.0 * math.prod(left) * columns if left and right else None
    if not is_attention(name) or is_our_attention(name):
        return None
    backward = name.endswith("_backward")
    q, k, v = shapes[backward : backward + 3]  # (B, H, T, D), (B, K, S, D), (B, K, S, D)
    if not len(q) == len(k) == len(v) == 4:
        return None
    context = float(k[2])
    if next((value for value in values if isinstance(value, bool)), False) and q[2] == k[2]:
        context = (context + 1) / 2  # the lower triangle
    forward = 2.0 * math.prod(q[:3]) * context * (q[3] + v[3])
    return 2 * forward if backward else forward


def operator_bytes(name: str, shapes: Sequence[Argument], dtypes: Sequence[str]) -> float:
    """Bytes read and written, if each argument is read once and the result is as large as the largest argument."""
    short = short_name(name)
    sizes = [_numbers(shape) * _itemsize(dtype) for shape, dtype in zip(shapes, dtypes, strict=True) if shape]
    if short in WITHOUT_MOVING or not sizes:
        return 0.0
    if short in FIRST_FACTOR:
        left, right, columns = _matrices(short, shapes)
        if not (left and right):
            return 0.0
        result = math.prod(left[:-1]) * columns
        return (math.prod(left) + math.prod(right) + result) * _itemsize(dtypes[FIRST_FACTOR[short]])
    if short in ("fill_", "zero_"):
        return sizes[0]
    if short in ("copy_", "clone", "contiguous", "_to_copy"):
        return 2.0 * sizes[-1]
    if short in LOOKUPS:
        return _numbers(shapes[1]) * 2.0 * shapes[0][-1] * _itemsize(dtypes[0])
    if short in OPTIMIZERS:
        return sum(sizes) + 3 * sizes[0]
    if is_attention(name) and short.endswith("_backward"):
        return sum(sizes) + sum(sizes[1:4])  # the gradients of q, k and v
    return sum(sizes) + (0.0 if short.startswith(SMALL_RESULT) and not short.endswith("_backward") else max(sizes))


def _matrices(short: str, shapes: Sequence[Argument]) -> tuple[Argument, Argument, int]:
    """The shapes of both factors, and the number of columns of their product."""
    first = FIRST_FACTOR[short]
    left, right = shapes[first], shapes[first + 1]
    return left, right, (right[0] if short in TRANSPOSED else right[-1]) if right else 0


def _numbers(argument: Argument) -> float:
    """The number of elements of a tensor or a list of tensors."""
    if any(isinstance(part, Sequence) for part in argument):
        return sum(_numbers(part) for part in argument)
    return float(math.prod(argument))


def _itemsize(dtype: str) -> int:
    return BYTES.get(dtype, UNKNOWN_BYTES)
