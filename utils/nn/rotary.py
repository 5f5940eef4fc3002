"""Rotary positions [Su et al. 2021, RoFormer]."""

from __future__ import annotations

import torch

from utils.config.settings import ModelConfig


def rope_factors(config: ModelConfig, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The cosines and sines for `rotate`, each (..., 1, D) for positions (...) [Su et al. 2021, RoFormer].

    Both channels of a pair have the cosine of its angle; the first has minus its sine, the second its sine.
    """
    channels = torch.arange(0, config.head_width, 2, dtype=positions.dtype, device=positions.device)
    angles = positions[..., None, None] * config.rope_theta ** -(channels / config.head_width)  # (..., 1, D / 2)
    return torch.cat((angles.cos(), angles.cos()), -1), torch.cat((-angles.sin(), angles.sin()), -1)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the pairs of channels i and i + D / 2 (the half-split layout of GPT-NeoX and Llama).

    Args:
        x: (B, T, H, D).
        cos, sin: (T, 1, D) or (B, T, 1, D), from `rope_factors`.
    """
    return torch.addcmul(x * cos, x.roll(x.size(-1) // 2, dims=-1), sin).type_as(x)  # (B, T, H, D)
