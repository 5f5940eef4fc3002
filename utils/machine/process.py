"""Settings that make this process fast and fair to others, made before importing torch; its standard descriptors."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import sys
from collections.abc import Iterator

# How often a waiting thread checks for work before it sleeps. libgomp's own 300,000 keep a core from other processes:
# two processes on two cores then take more than ten times as long. With 4,000 or fewer, threads fall asleep between the
# operators of a step (docs/LOG.md).
SPIN_COUNT = "6000"
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # from malloc.h
GIB, LARGEST_BEFORE_2_35 = 1 << 30, 1 << 25
_is_script = False


def tune_process() -> None:
    """Make idle threads sleep soon, and keep freed memory for the next step; the user's settings take precedence."""
    # For determinism on CUDA. cuBLAS reads it only once, maybe before the first deterministic run of the process.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # otherwise torch's profiler prints a line for each of its stages
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
    if sys.platform == "linux" and not any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        keep_freed_memory()


def keep_freed_memory() -> None:
    """Let glibc keep freed memory: each step allocates the same activations as the previous one.

    Otherwise the memory goes back to the kernel, which clears every page again: 800 to 40,000 page faults per step
    (docs/LOG.md).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_TRIM_THRESHOLD, GIB)
        mallopt(M_MMAP_THRESHOLD, GIB) or mallopt(M_MMAP_THRESHOLD, LARGEST_BEFORE_2_35)  # older glibc: 32 MiB


def available_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def hide_imports() -> None:
    """In a script, hide the imported objects from the garbage collector, which visits them in each run and at exit.

    torch has 166,000 objects: 0.4 s at exit (docs/LOG.md). Does nothing in other programs. Objects that are created
    later, such as callbacks, are not hidden, because a file in a reference cycle is written when it is collected.
    """
    if _is_script:
        gc.freeze()


def begin_script() -> None:
    """Note that this process runs one script and nothing else; called at the start of the script."""
    global _is_script
    _is_script = True
    hide_imports()


def keep_standard_descriptors() -> None:
    """Open the null device in place of stdin, stdout or stderr if the process was started without it (`2>&-`).

    Otherwise the next file to be opened, a lock perhaps, becomes descriptor 2, and messages are written into it.
    """
    for standard in range(3):
        try:
            os.fstat(standard)
        except OSError:
            fd = os.open(os.devnull, os.O_RDWR)  # gets the lowest free descriptor
            assert fd == standard
            os.set_inheritable(fd, True)  # for the programs that this process starts


@contextlib.contextmanager
def gc_frozen() -> Iterator[None]:
    """Hide existing objects, of which importing torch creates 166,000, from the garbage collector inside the block."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def several_ranks() -> bool:
    """Whether torchrun has started this process together with others."""
    return "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1"
