"""A mark for backward passes that have no gradient of their own."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch

R = TypeVar("R")


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
