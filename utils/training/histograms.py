"""Histograms of parameters and gradients, binned on their device."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

BINS = 64
ROW = 256  # numbers; each tensor is padded to whole rows, so that a row belongs to one tensor
CHUNK = 1 << 22  # numbers that are binned at once, which bounds the memory needed besides the tensors
SMALLEST_RANGE = 2.0**-100  # keeps BINS / range far from overflow


class Layout:
    """Where tensors of these sizes lie in a buffer of rows, one after the other."""

    def __init__(self, sizes: Sequence[int], device: torch.device) -> None:
        self.sizes = list(sizes)
        counts = torch.tensor([-(-size // ROW) for size in sizes])
        starts = ROW * (counts.cumsum(0) - counts)
        pads = ROW * counts - torch.tensor(self.sizes)
        padded = pads > 0
        self.rows = int(counts.sum())
        self.starts: list[int] = starts.tolist()
        self.owner = torch.repeat_interleave(torch.arange(len(sizes)), counts).to(device)  # (rows,)
        self.first_bin = (self.owner * BINS).int()[:, None]
        # Padding repeats the first number of its tensor: that changes no range, and all of it falls into one bin.
        self.padded_starts, self.pads = starts[padded].to(device), pads[padded].to(device)
        ends = zip(self.starts, self.sizes, pads.tolist(), strict=True)
        self.pad_places = torch.cat([torch.arange(s + n, s + n + p) for s, n, p in ends]).to(device)
        self.pad_sources = torch.repeat_interleave(self.padded_starts, self.pads)


class Memory:
    """Buffers that binning reuses from call to call, because allocating them costs more than the arithmetic."""

    def __init__(self, rows: int, device: torch.device) -> None:
        self.values = torch.empty((rows, ROW), device=device)
        self.bins = torch.empty((rows, ROW), dtype=torch.int32, device=device)


def bin_tensors(tensors: Sequence[torch.Tensor], layout: Layout, memory: Memory) -> tuple[torch.Tensor, torch.Tensor]:
    """Count the values of each tensor in BINS equal bins between its minimum and maximum.

    All tensors are binned together, by a dozen operations whatever their number. The counts of a tensor are right if
    `is_ordinary(min, max)`.

    Args:
        tensors: n tensors on one device, with the sizes of `layout`.
        memory: buffers of at least `layout.rows` rows.

    Returns:
        Counts, (n, BINS) int64, and minima and maxima, (n, 2) float64, on the device of the tensors.
    """
    values, bins = memory.values[: layout.rows], memory.bins[: layout.rows]
    owner, flat, flat_bins = layout.owner, values.view(-1), bins.view(-1)
    places = [flat[start : start + size] for start, size in zip(layout.starts, layout.sizes, strict=True)]
    torch._foreach_copy_(places, [tensor.detach().flatten() for tensor in tensors])
    flat[layout.pad_places] = flat[layout.pad_sources]
    low = values.new_full((len(tensors),), torch.inf).scatter_reduce_(0, owner, values.amin(1), "amin")
    high = values.new_full((len(tensors),), -torch.inf).scatter_reduce_(0, owner, values.amax(1), "amax")
    scale = BINS / (high - low).clamp_min(SMALLEST_RANGE)
    values.sub_(low[owner, None]).mul_(scale[owner, None])
    bins.copy_(values).clamp_(0, BINS - 1).add_(layout.first_bin)
    counts = torch.bincount(flat_bins, minlength=len(tensors) * BINS)
    counts.index_add_(0, flat_bins[layout.padded_starts], -layout.pads)
    return counts.view(-1, BINS), torch.stack((low, high), dim=1).double()


def is_ordinary(low: float, high: float) -> bool:
    """Whether a tensor of this range can be binned in float32: it is finite, and nothing overflows or underflows."""
    return abs(low) < math.inf and (low == high or SMALLEST_RANGE <= high - low <= torch.finfo(torch.float32).max)


def bin_finite(tensor: torch.Tensor) -> tuple[list[int], float, float]:
    """Count the finite values in BINS equal bins between their minimum and maximum, which are returned as well."""
    values = tensor.detach().flatten().float().cpu().double()
    values = values[values.isfinite()]
    if not len(values):
        return [0] * BINS, 0.0, 0.0
    low, high = values.min().item(), values.max().item()
    return torch.histc(values, BINS, low, high).long().tolist(), low, high


class Histograms:
    """Makes histograms of named tensors whose sizes stay the same."""

    def __init__(self) -> None:
        self._layouts: list[Layout] = []
        self._memory: Memory | None = None

    def records(self, step: int, time: float, tensors: Mapping[str, torch.Tensor]) -> list[dict[str, Any]]:
        """Records of histograms.jsonl for tensors on one device, made with one transfer from it."""
        chunks = list(_chunks(list(tensors.values())))
        device = chunks[0][0].device
        sizes = [[tensor.numel() for tensor in chunk] for chunk in chunks]
        if sizes != [layout.sizes for layout in self._layouts]:
            self._layouts = [Layout(of_chunk, device) for of_chunk in sizes]
            self._memory = None
        rows = max(layout.rows for layout in self._layouts)
        memory = self._memory or Memory(rows, device)
        self._memory = memory if rows * ROW <= 2 * CHUNK else None  # the buffers for a huge tensor are not kept
        binned = [bin_tensors(chunk, layout, memory) for chunk, layout in zip(chunks, self._layouts, strict=True)]
        packed = torch.cat([torch.cat((counts, limits.view(torch.int64)), dim=1) for counts, limits in binned]).cpu()
        counts, limits = packed[:, :BINS].tolist(), packed[:, BINS:].contiguous().view(torch.float64).tolist()
        records = []
        for (name, tensor), row, (low, high) in zip(tensors.items(), counts, limits, strict=True):
            row, low, high = (row, low, high) if is_ordinary(low, high) else bin_finite(tensor)
            facts = {"step": step, "time": round(time, 4), "name": name, "min": low, "max": high, "counts": row}
            records.append({**facts, "nonfinite": tensor.numel() - sum(row)})
        return records


def _chunks(tensors: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """The tensors in order, in groups of up to CHUNK numbers."""
    chunk: list[torch.Tensor] = []
    size = 0
    for tensor in tensors:
        if chunk and size + tensor.numel() > CHUNK:
            yield chunk
            chunk, size = [], 0
        chunk.append(tensor)
        size += tensor.numel()
    yield chunk
