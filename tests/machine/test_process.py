"""Settings of a computing process, each tested in a new process."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest

from utils.machine.process import gc_frozen, hide_imports

ROOT = Path(__file__).resolve().parents[2]
PAGES = 64 * 2**20 // os.sysconf("SC_PAGE_SIZE")  # of the memory that is allocated and freed
ALLOCATE_AND_FREE = f"""
import resource
from utils.machine.process import tune_process
tune_process()
for _ in range(10):
    memory = bytearray({PAGES} * {os.sysconf("SC_PAGE_SIZE")})
    del memory
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
"""


def run(code: str, **environment: str) -> str:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GOMP_", "OMP_", "CUBLAS_"))}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, env=inherited | environment
    )
    return done.stdout.strip()


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is glibc's")
def test_freed_memory_is_reused_without_page_faults() -> None:
    """Ten allocations cause the page faults of one, unless the user has set a limit for freed memory."""
    assert int(run(ALLOCATE_AND_FREE)) < 2 * PAGES
    assert int(run(ALLOCATE_AND_FREE, MALLOC_TRIM_THRESHOLD_="131072")) > 8 * PAGES


@pytest.mark.parametrize(
    ("environment", "expected"),
    [({}, "6000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")],
)
def test_idle_threads_sleep_soon_unless_the_user_decides_otherwise(environment: dict[str, str], expected: str) -> None:
    code = (
        "import os; from utils.machine.process import tune_process as t; t(); print(os.environ.get('GOMP_SPINCOUNT'))"
    )
    assert run(code, **environment) == expected


@pytest.mark.parametrize(
    ("environment", "expected"), [({}, ":4096:8"), ({"CUBLAS_WORKSPACE_CONFIG": ":16:8"}, ":16:8")]
)
def test_cublas_gets_a_fixed_workspace_unless_the_user_decides_otherwise(
    environment: dict[str, str], expected: str
) -> None:
    code = "import os; from utils.machine.process import tune_process as t; t(); print(os.environ[{!r}])"
    assert run(code.format("CUBLAS_WORKSPACE_CONFIG"), **environment) == expected


def test_objects_are_hidden_from_the_garbage_collector_only_inside_the_block() -> None:
    with gc_frozen():
        assert gc.get_freeze_count() > 0
    assert gc.get_freeze_count() == 0


@pytest.mark.parametrize("library", ["json", "duckdb", "triton._C.libtriton"])  # the last two report leaks at exit
def test_a_script_hides_its_imports_but_no_later_objects_from_the_garbage_collector(
    library: str, tmp_path: Path
) -> None:
    code = (
        "import gc, sys; from utils.machine.process import begin_script; begin_script()\n"
        "print(gc.get_freeze_count() > 1000)\n"
        f"import {library}\n"
        "class Callback: file = open(sys.argv[1], 'w')\n"  # part of a reference cycle, like every class
        "Callback.file.write('kept')"
    )
    command = [sys.executable, "-c", code, tmp_path / "a.txt"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert (result.stdout, result.stderr) == ("True\n", "")
    assert (tmp_path / "a.txt").read_text() == "kept"


def test_nothing_is_hidden_in_another_program() -> None:
    hide_imports()
    assert gc.get_freeze_count() == 0
