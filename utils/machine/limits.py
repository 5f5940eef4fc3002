"""The limits of this machine, measured: its fastest matrix product, copy and read."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from utils.machine.device import synchronize

Product = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

REPEATS = 5
SECONDS = 0.25  # per size; larger matrices are not tried if one product would take longer
GEMM_SIZES = {"cpu": (512, 1024, 2048), "cuda": (2048, 4096, 8192), "mps": (1024, 2048, 4096)}
COPY_MIB = {"cpu": (32, 64), "cuda": (128, 256), "mps": (64, 128)}  # more than fits into the caches
CALLS = {"cpu": 1, "cuda": 10, "mps": 10}  # between two readings of the clock: a GPU works asynchronously


def measure_gemm(device: torch.device, dtype: torch.dtype, product: Product = F.linear) -> float:
    """Floating-point operations per second of the fastest square matrix product; a multiply-add counts as two.

    Args:
        product: multiplies a (n, n) with the transpose of b (n, n), as the layers of the model do.
    """
    generator = torch.Generator(device).manual_seed(0)  # a GPU multiplies zeros or ones faster than random numbers
    best = 0.0
    for n in GEMM_SIZES[device.type]:
        flops = 2.0 * n**3
        if best and CALLS[device.type] * flops / best > SECONDS:
            break
        a, b = (torch.randn(n, n, device=device, generator=generator).to(dtype) for _ in range(2))
        best = max(best, flops / _least_seconds(lambda a=a, b=b: product(a, b), device))  # type: ignore[misc]
    return best


def measure_copy(device: torch.device) -> float:
    """Bytes per second of a copy on the device, counting both reads and writes."""
    best = 0.0
    for mebibytes in COPY_MIB[device.type]:
        source = torch.ones(mebibytes * 2**18, device=device)
        target = torch.ones_like(source)
        seconds = _least_seconds(lambda source=source, target=target: target.copy_(source), device)  # type: ignore[misc]
        best = max(best, 2.0 * mebibytes * 2**20 / seconds)
    return best


def measure_read(device: torch.device) -> float:
    """Bytes per second that a sum over a large tensor reads, the upper limit for decoding."""
    best = 0.0
    for mebibytes in COPY_MIB[device.type]:
        source = torch.ones(4 * mebibytes * 2**18, device=device)
        best = max(best, 4.0 * mebibytes * 2**20 / _least_seconds(lambda source=source: source.sum(), device))  # type: ignore[misc]
    return best


def _least_seconds(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest call, after a warmup; as many of REPEATS as fit into SECONDS, but at least two."""
    calls = CALLS[device.type]
    call()
    synchronize(device)
    best, end = float("inf"), time.perf_counter() + SECONDS
    for repeat in range(REPEATS):
        began = time.perf_counter()
        for _ in range(calls):
            call()
        synchronize(device)
        now = time.perf_counter()
        best = min(best, (now - began) / calls)
        if repeat and now > end:
            break
    return best
