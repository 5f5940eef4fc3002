"""Histograms of parameters and gradients, binned on their device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

BINS = 64
ROW = 256  # numbers; each tensor is padded to whole rows, so that a row belongs to one tensor
CHUNK = 1 << 22  # numbers that are binned at once: what is needed besides the tensors is bounded


def bin_tensors(tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Counts in BINS equal bins between each tensor's finite minimum and maximum.

    All tensors are binned together, by a dozen operations however many there are.

    Args:
        tensors: n tensors of one device, together about CHUNK numbers.

    Returns:
        Counts (n, BINS) int64, and (min, max) (n, 2) float64, on the device of the tensors; non-finite values
        are in no bin, and where all are non-finite min is inf and max -inf.
    """
    device = tensors[0].device
    rows = [-(-tensor.numel() // ROW) for tensor in tensors]
    padding = torch.full((ROW,), torch.nan, device=device)
    parts: list[torch.Tensor] = []
    for tensor, count in zip(tensors, rows, strict=True):
        parts += (tensor.detach().flatten().float(), padding[: count * ROW - tensor.numel()])
    values = torch.cat(parts).view(-1, ROW)  # (rows, ROW)
    owner = torch.repeat_interleave(torch.arange(len(tensors)), torch.tensor(rows)).to(device)  # (rows,)

    inf = torch.inf
    lowest, highest = values.nan_to_num(inf, inf, inf).amin(1), values.nan_to_num(-inf, -inf, -inf).amax(1)
    low = torch.full((len(tensors),), inf, device=device).scatter_reduce_(0, owner, lowest, "amin")
    high = torch.full((len(tensors),), -inf, device=device).scatter_reduce_(0, owner, highest, "amax")

    # The range of huge values must not overflow, that of tiny ones not underflow: powers of two are exact.
    factor = torch.where(torch.maximum(low.abs(), high.abs()) < 2.0**-60, 2.0**100, 0.5)
    low_scaled, high_scaled = low * factor, high * factor
    scale = BINS / (high_scaled - low_scaled).clamp_min(1e-30)
    position = values.mul_(factor[owner, None]).sub_(low_scaled[owner, None]).mul_(scale[owner, None])  # in [0, BINS]
    position = position.nan_to_num_(-1.0, -1.0, -1.0).add_(1.0).clamp_(0, BINS)  # non-finite: 0
    bins = position.int().add_(owner.int()[:, None] * (BINS + 1))
    counts = torch.bincount(bins.flatten(), minlength=len(tensors) * (BINS + 1)).view(-1, BINS + 1)
    return counts[:, 1:], torch.stack((low, high), dim=1).double()


def histogram_records(step: int, time: float, tensors: Mapping[str, torch.Tensor]) -> list[dict[str, Any]]:
    """Lines of histograms.jsonl for named tensors of one device, brought over in one transfer."""
    binned = [bin_tensors(chunk) for chunk in _chunks(list(tensors.values()))]
    packed = torch.cat([torch.cat((counts, limits.view(torch.int64)), dim=1) for counts, limits in binned]).cpu()
    counts, limits = packed[:, :BINS].tolist(), packed[:, BINS:].contiguous().view(torch.float64).tolist()
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
        for (name, tensor), row, (low, high) in zip(tensors.items(), counts, limits, strict=True)
    ]


def _chunks(tensors: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """The tensors in their order, together until there are CHUNK numbers."""
    chunk: list[torch.Tensor] = []
    size = 0
    for tensor in tensors:
        if chunk and size + tensor.numel() > CHUNK:
            yield chunk
            chunk, size = [], 0
        chunk.append(tensor)
        size += tensor.numel()
    yield chunk
