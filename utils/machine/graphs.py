"""CUDA graphs: kernels that are recorded once, and from then on launched together."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import TypeVar

import torch

R = TypeVar("R")


def capture_graph(work: Callable[[], R], device: torch.device) -> Callable[[], R]:
    """Record `work`; returns a function that replays its kernels on the same tensors with a single launch.

    `work` runs once here, which records its kernels but computes nothing: call the result to compute. `work` must read
    and write tensors that stay where they are, and must neither wait for the device nor make decisions by values on it.
    The next call overwrites the tensors that it returns. One-time preparations (a compiler, a handle, a permanent
    buffer) must have been made by an earlier call. Random numbers continue from call to call, as without a graph.

    On devices other than CUDA the result is `work` itself, so code written for graphs can be run and tested anywhere.

    Raises:
        RuntimeError: CUDA cannot record `work`.
    """
    if device.type != "cuda":
        return work
    graph, pool, before = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle(), torch.cuda.current_stream(device)
    # Other threads may use the device meanwhile (to write a checkpoint, say).
    recording = torch.cuda.graph(graph, pool=pool, stream=_stream(device), capture_error_mode="thread_local")
    try:
        with torch.cuda.device(device), recording:
            result = work()
    except BaseException:
        _end_recording(device, pool, before)
        raise

    def repeat() -> R:
        graph.replay()
        return result

    return repeat


def _end_recording(device: torch.device, pool: tuple[int, int], before: torch.cuda.Stream) -> None:
    """Clean up after a failed recording, which leaves its stream as the current one and its memory pool open.

    Before torch 2.11 the random generator stays marked as being recorded, too, and the next dropout raises
    (pytorch/pytorch#171263). The end of a successful recording removes the mark.
    """
    with torch.cuda.device(device):
        torch.cuda.set_stream(before)
        with contextlib.suppress(RuntimeError):  # it is closed already
            torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
        if torch.__version__ < "2.11":
            with contextlib.suppress(RuntimeError):  # the first failure is the one that is reported
                number, stream = torch.zeros((), device=device), _stream(device)
                with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream, capture_error_mode="thread_local"):
                    number.add_(1)
            torch.cuda.set_stream(before)


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """The stream to record on: torch's own is on the device that recorded first, so it sees no other device's work."""
    return torch.cuda.Stream(device)
