"""CUDA graphs: kernels that are recorded once, and from then on launched as one."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar

import torch

R = TypeVar("R")


def record(work: Callable[[], R], device: torch.device) -> Callable[[], R]:
    """A function that repeats the kernels of `work` on the same tensors, for one launch's worth of the host's time.

    `work` runs here once, and nothing is computed by that: call the result for that. It reads and writes tensors that
    stay where they are, returns tensors that the next call overwrites, and neither waits for the device nor decides
    anything by a value of it. What it needs once only (a compiler, a handle, a buffer that stays) it has done in an
    earlier call. Random numbers continue from call to call, as they would without a graph.

    On another device than CUDA the result is `work`: what is written for graphs can be run, and tested, anywhere.

    Raises:
        RuntimeError: CUDA cannot record it.
    """
    if device.type != "cuda":
        return work
    graph = torch.cuda.CUDAGraph()
    # Other threads (a checkpoint being written, say) go on using the device meanwhile.
    with torch.cuda.device(device), torch.cuda.graph(graph, stream=_stream(device), capture_error_mode="thread_local"):
        result = work()

    def repeat() -> R:
        graph.replay()
        return result

    return repeat


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """The stream to record on: torch's own is on the device that first recorded, so it sees no other device's work."""
    return torch.cuda.Stream(device)
