"""Activation checkpointing [Chen et al. 2016]: a block keeps only its input, and the backward pass runs it again.

A step takes about a third longer, but only the activations of one block are in memory at a time. The second run draws
the same random numbers and gives the same bits, so the gradients are the same, too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint


def recomputed(function: Callable[..., torch.Tensor], dropout: float) -> Callable[..., torch.Tensor]:
    """Wrap `function` so that the backward pass computes its activations again instead of keeping them.

    Args:
        dropout: the dropout probability in `function`. If it is not 0, the random state is saved and restored on the
            host, which a CUDA graph cannot record.
    """

    def call(*arguments: Any) -> torch.Tensor:
        if not torch.is_grad_enabled():
            return function(*arguments)
        result = checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=dropout > 0)
        assert isinstance(result, torch.Tensor)
        return result

    return call
