"""Histograms of parameters and gradients, binned on their device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

BINS = 64


def bin_tensor(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Counts in BINS equal bins between the finite minimum and maximum.

    Returns:
        counts (BINS,) int64, and (min, max) float32, both on the device of `values`;
        non-finite values are in no bin.
    """
    flat = values.detach().flatten().float()
    finite = flat.isfinite()
    low = torch.where(finite, flat, torch.inf).min()
    high = torch.where(finite, flat, -torch.inf).max()
    position = (flat / 2 - low / 2) / (high / 2 - low / 2).clamp_min(1e-30)  # halves: the range must not overflow
    bins = (position * BINS).nan_to_num(0, 0, 0).long().clamp_(0, BINS - 1)
    counts = torch.bincount(torch.where(finite, bins, BINS), minlength=BINS + 1)[:BINS]
    return counts, torch.stack((low, high))


def histogram_records(step: int, time: float, tensors: Mapping[str, torch.Tensor]) -> list[dict[str, Any]]:
    """Lines of histograms.jsonl for named tensors: two transfers from the device in all."""
    binned = [bin_tensor(tensor) for tensor in tensors.values()]
    counts = torch.stack([c for c, _ in binned]).tolist()
    ranges = torch.stack([r for _, r in binned]).tolist()
    return [
        {
            "step": step,
            "time": round(time, 4),
            "name": name,
            "min": low if low <= high else 0.0,  # no finite value at all: an empty histogram
            "max": high if low <= high else 0.0,
            "counts": row,
            "nonfinite": tensor.numel() - sum(row),
        }
        for (name, tensor), row, (low, high) in zip(tensors.items(), counts, ranges, strict=True)
    ]
