"""Rotary positions [Su et al. 2021, RoFormer]."""

from __future__ import annotations

import math

import torch

from utils.config.settings import ModelConfig


def rope_factors(config: ModelConfig, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The cosines and sines for `rotate`, each (..., 1, D) for positions (...) [Su et al. 2021, RoFormer].

    Both channels of a pair have the cosine of its angle; the first has minus its sine, the second its sine.
    """
    channels = torch.arange(0, config.head_width, 2, dtype=positions.dtype, device=positions.device)
    frequencies = config.rope_theta ** -(channels / config.head_width)  # (D / 2,), in radians per token
    if config.rope_scaling != "none":
        frequencies = scaled(frequencies, config)
    angles = positions[..., None, None] * frequencies  # (..., 1, D / 2)
    cos, sin = angles.cos(), angles.sin()
    if config.rope_scaling == "yarn":  # equation 25: larger queries and keys sharpen the attention
        scale = 0.1 * math.log(config.rope_factor) + 1
        cos, sin = scale * cos, scale * sin
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


def scaled(frequencies: torch.Tensor, config: ModelConfig) -> torch.Tensor:
    """Frequencies (D / 2,) for a longer context than the one that the model was originally trained with.

    linear: all are divided by the factor [Chen et al. 2023]. llama3: frequencies with few rotations within the original
    context are divided, those with many are kept, and those in between are mixed in proportion to their rotations
    [Grattafiori et al. 2024, The Llama 3 Herd of Models; llama-models]. yarn: likewise, but mixed in proportion to the
    index of the channel pair [Peng et al. 2023, YaRN, section 3.2].
    """
    slow = frequencies / config.rope_factor
    if config.rope_scaling == "linear":
        return slow
    context, low, high = config.rope_original_context, config.rope_low_freq, config.rope_high_freq
    assert context is not None
    if config.rope_scaling == "llama3":
        rotations = context / (2 * math.pi / frequencies)
        share = ((rotations - low) / (high - low)).clamp(0, 1)  # the share that is kept
    else:
        first, last = (
            config.head_width * math.log(context / (rotations * 2 * math.pi)) / (2 * math.log(config.rope_theta))
            for rotations in (high, low)
        )  # the channel pairs with this many rotations
        first, last = max(math.floor(first), 0), min(math.ceil(last), config.head_width - 1)
        pairs = torch.arange(len(frequencies), dtype=frequencies.dtype, device=frequencies.device)
        share = 1 - ((pairs - first) / (last - first or 0.001)).clamp(0, 1)
    return slow * (1 - share) + frequencies * share


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the pairs of channels i and i + D / 2 (the half-split layout of GPT-NeoX and Llama).

    Args:
        x: (B, T, H, D).
        cos, sin: (T, 1, D) or (B, T, 1, D), from `rope_factors`.
    """
    return torch.addcmul(x * cos, x.roll(x.size(-1) // 2, dims=-1), sin).type_as(x)  # (B, T, H, D)
