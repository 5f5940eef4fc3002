"""What makes a process that computes fast, and a good neighbour; set before torch is imported."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import sys
from collections.abc import Iterator

# Turns of the loop in which a thread waits for its next piece of work before it sleeps. libgomp's own 300,000 keep a
# core from other processes: two of them on two cores then take ten times as long and more. With 4,000 and fewer threads
# fall asleep between the operators of a step (docs/LOG.md).
SPIN_COUNT = "6000"
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
GIB, LARGEST_OF_OLD = 1 << 30, 1 << 25


def tune_process() -> None:
    """Threads that wait briefly, and freed memory that is kept for the next step; what the user has set stays."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler says what it does, line by line
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
    if sys.platform == "linux" and not any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        keep_freed_memory()


def keep_freed_memory() -> None:
    """Let glibc keep what is freed: a step frees and takes the same activations as the one before.

    Otherwise they go back to the kernel, which clears each page anew: 800 to 40,000 page faults a step (docs/LOG.md).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_TRIM_THRESHOLD, GIB)
        mallopt(M_MMAP_THRESHOLD, GIB) or mallopt(M_MMAP_THRESHOLD, LARGEST_OF_OLD)  # glibc before 2.35 allows 32 MiB


@contextlib.contextmanager
def gc_frozen() -> Iterator[None]:
    """Within it the garbage collector leaves alone what exists at its start: torch alone makes 166,000 objects."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
