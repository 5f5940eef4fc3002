"""The jobs of benchmarks.gpu, the most valuable first.

Each is a process: python -m benchmarks.gpu_jobs NAME TASK.json
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import gpu_decode, gpu_head, gpu_measure, gpu_runs, nanogpt
from benchmarks.gpu_task import Task
from utils.errors import UserError
from utils.machine.process import tune_process

PARTS = ("limits", "step", "loss", "gpt2", "decode", "start", "tracking", "resume")


@dataclass(frozen=True)
class Job:
    """One process.

    parts: the parts that need it. seconds: the longest that it may take.
    nanogpt: whether it is a run of nanoGPT. instead_of: a part that makes this job needless, as it measures the same.
    caches: the name of the compiler's caches, which are empty at first. dry: whether a dry run includes it.
    """

    name: str
    parts: tuple[str, ...]
    seconds: float
    work: Callable[[Task], None]
    nanogpt: bool = False
    instead_of: str = ""
    caches: str = "shared"
    dry: bool = True


# Our jobs and nanoGPT's take turns. nanoGPT's run to the target loss measures the time of its steps once more.
JOBS: Sequence[Job] = (
    Job("limits", ("limits", "gpt2"), 60, gpu_measure.measure_limits),
    Job("nanogpt_step", ("step",), 90, nanogpt.time_steps, nanogpt=True),
    Job("steps", ("step", "tracking"), 150, gpu_measure.time_small_steps),
    Job("loss", ("loss",), 90, gpu_runs.time_loss),
    Job("nanogpt_loss", ("loss",), 150, nanogpt.time_loss, nanogpt=True),
    Job("nanogpt_step_again", ("step",), 60, nanogpt.time_steps, nanogpt=True, instead_of="loss"),
    Job("speedrun", ("loss",), 120, gpu_measure.time_speedrun),
    Job("start_cold", ("gpt2", "start"), 90, functools.partial(gpu_runs.time_start, kind="cold"), caches="start"),
    Job("nanogpt_gpt2", ("gpt2",), 120, nanogpt.time_gpt2, nanogpt=True),
    Job("start_warm", ("gpt2", "start"), 60, functools.partial(gpu_runs.time_start, kind="warm"), caches="start"),
    Job("gpt2", ("gpt2",), 150, gpu_measure.time_gpt2),
    Job("decode", ("decode",), 100, gpu_decode.time_decode),
    Job("resume", ("resume",), 90, gpu_runs.check_resume),
    Job("decode_compiled", ("decode",), 90, gpu_decode.time_compiled_decode, dry=False),
    Job("heads", ("gpt2",), 60, gpu_head.time_heads),
)


def chosen(parts: Sequence[str], *, with_nanogpt: bool, dry: bool) -> list[Job]:
    """The jobs that `parts` need or name."""
    needed = [job for job in JOBS if {job.name, *job.parts} & set(parts) and job.instead_of not in parts]
    return [job for job in needed if (with_nanogpt or not job.nanogpt) and (job.dry or not dry)]


def main(name: str, task_file: str) -> int:
    """Run a job in this process; the last line of results that it prints counts."""
    tune_process()
    task = Task(**json.loads(Path(task_file).read_text(encoding="utf-8")))
    (job,) = (job for job in JOBS if job.name == name)
    try:
        job.work(task)
    except UserError as error:
        print(f"{error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
