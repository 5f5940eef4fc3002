"""Activation checkpointing [Chen et al. 2016]: a block keeps only its input, and the backward pass runs it again.

That takes about a third more time, and of the activations only those of one block are in memory at a time. The second
run draws the same random numbers and gives the same bits, and so do the gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint


def recomputed(function: Callable[..., torch.Tensor], dropout: float) -> Callable[..., torch.Tensor]:
    """`function`, but what it computes is computed again in the backward pass, if there is to be one.

    Args:
        dropout: in it. If there is any, the state of the random numbers is saved and restored on the host, which a
            CUDA graph cannot record.
    """

    def call(*arguments: Any) -> torch.Tensor:
        if not torch.is_grad_enabled():
            return function(*arguments)
        result = checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=dropout > 0)
        assert isinstance(result, torch.Tensor)
        return result

    return call
