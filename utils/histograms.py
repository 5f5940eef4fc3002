"""Histograms of parameters and gradients, binned on their device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

BINS = 64
ROW = 256  # numbers; each tensor is padded to whole rows, so that a row belongs to one tensor
CHUNK = 1 << 22  # numbers that are binned at once: what is needed besides the tensors is bounded


class Layout:
    """Where tensors of these sizes lie in rows, side by side."""

    def __init__(self, sizes: Sequence[int], device: torch.device) -> None:
        self.sizes = list(sizes)
        counts = [-(-size // ROW) for size in sizes]
        self.rows = sum(counts)
        self.starts = [ROW * sum(counts[:i]) for i in range(len(counts))]
        self.owner = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(counts)).to(device)  # (rows,)
        self.first_bin = (self.owner * (BINS + 1)).int()[:, None]


class Memory:
    """What binning needs besides the tensors; kept, for getting it anew costs more than the arithmetic."""

    def __init__(self, rows: int, device: torch.device) -> None:
        self.values = torch.empty((rows, ROW), device=device)
        self.scratch = torch.empty_like(self.values)
        self.bins = torch.empty((rows, ROW), dtype=torch.int32, device=device)


def bin_tensors(tensors: Sequence[torch.Tensor], layout: Layout, memory: Memory) -> tuple[torch.Tensor, torch.Tensor]:
    """Counts in BINS equal bins between each tensor's finite minimum and maximum.

    All are binned together, by a dozen operations however many there are.

    Args:
        tensors: n tensors of one device, of the sizes of `layout`.
        memory: of at least `layout.rows` rows.

    Returns:
        Counts (n, BINS) int64, and (min, max) (n, 2) float64, on the device of the tensors; non-finite values
        are in no bin, and where all are non-finite min is inf and max -inf.
    """
    values, scratch, bins = (t[: layout.rows] for t in (memory.values, memory.scratch, memory.bins))
    owner, inf = layout.owner, torch.inf
    flat = values.fill_(torch.nan).view(-1)  # what is of no tensor stays nan
    places = [flat[start : start + size] for start, size in zip(layout.starts, layout.sizes, strict=True)]
    torch._foreach_copy_(places, [tensor.detach().flatten() for tensor in tensors])
    lowest = torch.nan_to_num(values, inf, inf, inf, out=scratch).amin(1)
    highest = torch.nan_to_num(values, -inf, -inf, -inf, out=scratch).amax(1)
    low = values.new_full((len(tensors),), inf).scatter_reduce_(0, owner, lowest, "amin")
    high = values.new_full((len(tensors),), -inf).scatter_reduce_(0, owner, highest, "amax")

    # The range of huge values must not overflow, that of tiny ones not underflow: powers of two are exact.
    factor = torch.where(torch.maximum(low.abs(), high.abs()) < 2.0**-60, 2.0**100, 0.5)
    low_scaled, high_scaled = low * factor, high * factor
    scale = BINS / (high_scaled - low_scaled).clamp_min(1e-30)
    position = torch.mul(values, factor[owner, None], out=scratch)
    position.sub_(low_scaled[owner, None]).mul_(scale[owner, None])  # in [0, BINS] where finite
    position.nan_to_num_(-1.0, -1.0, -1.0).add_(1.0).clamp_(0, BINS)  # non-finite: 0
    bins.copy_(position).add_(layout.first_bin)
    counts = torch.bincount(bins.view(-1), minlength=len(tensors) * (BINS + 1)).view(-1, BINS + 1)
    return counts[:, 1:], torch.stack((low, high), dim=1).double()


class Histograms:
    """Histograms of named tensors, again and again of the same sizes."""

    def __init__(self) -> None:
        self._layouts: list[Layout] = []
        self._memory: Memory | None = None

    def records(self, step: int, time: float, tensors: Mapping[str, torch.Tensor]) -> list[dict[str, Any]]:
        """Lines of histograms.jsonl for tensors of one device, brought over in one transfer."""
        chunks = list(_chunks(list(tensors.values())))
        device = chunks[0][0].device
        sizes = [[tensor.numel() for tensor in chunk] for chunk in chunks]
        if sizes != [layout.sizes for layout in self._layouts]:
            self._layouts = [Layout(of_chunk, device) for of_chunk in sizes]
            self._memory = None
        rows = max(layout.rows for layout in self._layouts)
        memory = self._memory or Memory(rows, device)
        self._memory = memory if rows * ROW <= 2 * CHUNK else None  # that of a huge tensor is not kept
        binned = [bin_tensors(chunk, layout, memory) for chunk, layout in zip(chunks, self._layouts, strict=True)]
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
