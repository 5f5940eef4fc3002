"""Tensors of every type, and a bitwise comparison of tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from utils.checkpoints.tensors import DTYPES

Tensors = dict[str, torch.Tensor]
WEIGHTS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([True, False])}


def same(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    """Return whether names, types, shapes and bits are equal (NaN and -0.0 included)."""

    def facts(tensor: torch.Tensor) -> tuple[torch.dtype, torch.Size, bytes]:
        return tensor.dtype, tensor.shape, tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()

    return {name: facts(t) for name, t in one.items()} == {name: facts(t) for name, t in other.items()}


def all_kinds() -> Tensors:
    """Tensors of every type and of odd shapes."""
    values = torch.tensor([[0.0, 1.0, 3.0], [7.0, 100.0, 2.0]])
    tensors = {f"{dtype}": values.to(dtype) for dtype in DTYPES.values()}
    return tensors | {
        "0-dim": torch.tensor(3.5, dtype=torch.float64),
        "0-dim bool": torch.tensor(True),
        "empty": torch.empty(0, dtype=torch.int64),
        "empty rows": torch.empty(3, 0, 2, dtype=torch.bfloat16),
        "one byte": torch.tensor([255], dtype=torch.uint8),
        "special": torch.tensor([math.nan, math.inf, -math.inf, -0.0, 1e-45]),
        "bfloat16 special": torch.tensor([math.nan, math.inf, -0.0], dtype=torch.bfloat16),
        "name/with . and ü": torch.ones(5, dtype=torch.int16),
    }
