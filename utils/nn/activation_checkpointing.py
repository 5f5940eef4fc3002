"""Activation checkpointing [Chen et al. 2016]: a block keeps only its input, and the backward pass runs it again.

That takes about a third more time, and of the activations only those of one block are in memory at a time. The second
run draws the same random numbers and gives the same bits, and so do the gradients.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def checkpoint_activations(blocks: nn.ModuleList) -> None:
    """Let each block keep only its input for the backward pass. What compiles a block's `forward` comes before this.

    With dropout, the state of the random numbers is saved and restored on the host, which a CUDA graph cannot record.
    """
    for block in blocks:
        has_dropout = any(isinstance(layer, nn.Dropout) and layer.p > 0 for layer in block.modules())
        block.forward = functools.partial(_recomputed, block.forward, has_dropout)


def _recomputed(forward: Callable[..., torch.Tensor], has_dropout: bool, *arguments: Any) -> torch.Tensor:
    """forward(*arguments), whose activations are computed again in the backward pass if there is to be one."""
    if not torch.is_grad_enabled():
        return forward(*arguments)
    result = checkpoint(forward, *arguments, use_reentrant=False, preserve_rng_state=has_dropout)
    assert isinstance(result, torch.Tensor)
    return result
