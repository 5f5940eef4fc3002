"""CUDA graphs: kernels that are recorded once, and from then on launched as one."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import TypeVar

import torch

R = TypeVar("R")


def capture_graph(work: Callable[[], R], device: torch.device) -> Callable[[], R]:
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
    graph, pool, before = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle(), torch.cuda.current_stream(device)
    # Other threads (a checkpoint being written, say) go on using the device meanwhile.
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
    """Undo what torch leaves of a failed recording: its stream as the current one, its memory pool open.

    Before torch 2.11 the random numbers stay marked as being recorded, too, and the next dropout raises
    (pytorch/pytorch#171263). The end of a recording that succeeds removes the mark.
    """
    with torch.cuda.device(device):
        torch.cuda.set_stream(before)
        with contextlib.suppress(RuntimeError):  # closed already
            torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
        if torch.__version__ < "2.11":
            with contextlib.suppress(RuntimeError):  # the first failure is the one that is reported
                number, stream = torch.zeros((), device=device), _stream(device)
                with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream, capture_error_mode="thread_local"):
                    number.add_(1)
            torch.cuda.set_stream(before)


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """The stream to record on: torch's own is on the device that first recorded, so it sees no other device's work."""
    return torch.cuda.Stream(device)
