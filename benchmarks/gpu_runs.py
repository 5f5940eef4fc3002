"""Jobs of benchmarks.gpu that start train.py as a user does, and follow its log from outside."""

from __future__ import annotations

import hashlib
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu_task import (
    AS_NANOGPT,
    COMPILER_FACTS,
    NEVER,
    NO_CHECKPOINTS,
    QUIET,
    Overrides,
    Task,
    median,
    report,
    warnings_of,
)
from benchmarks.nanogpt import given_up
from utils.config.fields import FIELDS
from utils.errors import UserError
from utils.runs.layout import CHECKPOINTS, METRICS_LOG
from utils.runs.log import read_from
from utils.runs.run import RunError, read_record
from utils.terminal.cli import PROJECT_ROOT

POLL_SECONDS = 0.005
SETTLED = 250  # steps of the small model before those that are timed


@dataclass
class Followed:
    """A run of train.py in a process of its own.

    began: when the process was started (time.time()). records: its metrics so far. run: its directory, once known.
    """

    process: subprocess.Popen[bytes]
    folder: Path
    began: float
    run: Path | None = None
    records: list[dict[str, Any]] = field(default_factory=list)
    _offset: int = 0

    def read(self) -> bool:
        """Read the new records of the log; returns whether there were any."""
        if self.run is None:
            runs = self.folder / "runs"
            self.run = next((path for path in runs.iterdir() if path.is_dir()), None) if runs.is_dir() else None
        if self.run is None or not (self.run / METRICS_LOG).exists():
            return False
        new, self._offset = read_from(self.run / METRICS_LOG, self._offset)
        self.records += new
        return bool(new)

    @property
    def steps(self) -> list[dict[str, Any]]:
        """The records of updates."""
        return [record for record in self.records if "step_ms" in record]

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        return [record for record in self.records if "val/loss" in record]

    def step_ms(self, first: int) -> float | None:
        """Median milliseconds of the steps from `first` on, or of the second half of all steps if that is more."""
        steps = self.steps
        return median([record["step_ms"] for record in steps[min(first, len(steps) // 2) :]])

    def facts(self) -> dict[str, Any]:
        """What run.json says about the compiler, and the warnings of the run."""
        if self.run is None:
            return {}
        try:
            resolved = read_record(self.run).get("resolved") or {}
        except RunError:
            return {}
        return {**{key: resolved.get(key) for key in COMPILER_FACTS}, "warnings": warnings_of(self.run)}


@contextmanager
def training(command: Sequence[str], folder: Path) -> Iterator[Followed]:
    """Start train.py; it is killed at the end of the block unless it has ended."""
    with (folder / "output.txt").open("ab") as output:
        process = subprocess.Popen(command, cwd=PROJECT_ROOT, stdout=output, stderr=subprocess.STDOUT)
        try:
            yield Followed(process, folder, time.time())
        finally:
            process.kill()
            process.wait()


def follow(followed: Followed, done: Callable[[Followed], bool]) -> bool:
    """Read the log until `done`, which is called after new records; returns False if the run ends before that.

    Raises:
        UserError: the run fails.
    """
    while True:
        ended = followed.process.poll() is not None
        if followed.read() and done(followed):
            return True
        if ended:
            wait(followed)
            return False
        time.sleep(POLL_SECONDS)


def wait(followed: Followed) -> None:
    """Wait until the run ends.

    Raises:
        UserError: it fails.
    """
    if status := followed.process.wait():
        lines = (followed.folder / "output.txt").read_text(errors="replace").strip().splitlines()
        raise UserError(f"train.py ended with {status}: {' | '.join(lines[-3:])}")


# ------------------------------------------------------------------------------------------------- the jobs


def time_loss(task: Task) -> None:
    """Job: the preset shakespeare_gpu with all tracking until an evaluation is at or below the target."""
    folder = task.make_folder("loss")
    sizes: Overrides = {"eval_interval": "4", "max_iters": "200"} if task.dry else {}
    seen = 0

    def done(followed: Followed) -> bool:
        nonlocal seen
        evaluations = followed.evaluations
        if len(evaluations) == seen:
            return False
        seen = len(evaluations)
        start = evaluations[0]["time"]
        rows = [
            {
                "step": record["step"],
                "val_loss": record["val/loss"],
                "seconds": record["time"] - start,
                "process_seconds": record["time"] - followed.began,
            }
            for record in evaluations
            if record["step"]
        ]
        reached = next((row for row in rows if row["val_loss"] <= task.target), None)
        best = min(rows, key=lambda row: row["val_loss"], default=None)
        facts = {"step_ms": followed.step_ms(SETTLED), "eval_iters": 50, "target": task.target, **followed.facts()}
        report({**facts, "evaluations": rows, "reached": reached, "best": best})
        return reached is not None or given_up([row["val_loss"] for row in rows])

    with training(task.command("shakespeare_gpu", folder, sizes), folder) as followed:
        follow(followed, done)


def time_start(task: Task, kind: str) -> None:
    """Job: seconds from the start of a process to its first step, for GPT-2's shape, compiled; then tokens/s.

    Batches of 12 x 1,024 tokens. The first step is done when the record of the second one is made, which includes the
    recording of a CUDA graph.

    Args:
        kind: cold or warm, for the name of the folder; the caches are those of the environment.
    """
    settled, steps = (2, 6) if task.dry else (20, 80 if kind == "cold" else 60)
    sizes: Overrides = {"batch_size": "12", "gradient_accumulation_steps": "1", "max_iters": "20000"}
    tracking: Overrides = {"histogram_interval": "0", "flush_interval": "2" if task.dry else "10"}
    more = (QUIET, NO_CHECKPOINTS, AS_NANOGPT, sizes, tracking)
    folder = task.make_folder(f"start_{kind}")
    with training(task.command("gpt2_124m", folder, *more, text=task.words), folder) as followed:

        def done(followed: Followed) -> bool:
            records = followed.steps
            if len(records) > 1:
                report(
                    {
                        "seconds": records[1]["time"] - followed.began,
                        "first_gradients_seconds": records[0]["time"] - followed.began,
                        "step_ms": followed.step_ms(settled),
                        "tokens_per_second": median([r["tokens_per_second"] for r in records[settled:]]),
                        "kind": kind,
                        **followed.facts(),
                    }
                )
            return len(records) >= steps

        follow(followed, done)


def check_resume(task: Task) -> None:
    """Job: the final weights of a run that was killed at about half of its steps, and of one that was not.

    Both run at the same time, since nothing is timed. They are deterministic, and use CUDA graphs if there is the
    setting.
    """
    steps = 300 if task.dry else 120  # in a dry run a step takes a millisecond
    model: Overrides = {"n_layer": "4", "n_head": "4", "n_embd": "128", "block_size": "64", "batch_size": "12"}
    exact: Overrides = {"compile": False, "deterministic": True, "cuda_graph": True, "dropout": "0.2"}
    logging: Overrides = {"flush_interval": "1", "max_iters": str(steps), "warmup_iters": "10"}
    more = (QUIET, {"eval_interval": NEVER, "checkpoint_interval": "25"}, model, exact, logging)
    whole, killed = task.make_folder("whole"), task.make_folder("killed")
    with (
        training(task.command("shakespeare_gpu", whole, *more), whole) as straight,
        training(task.command("shakespeare_gpu", killed, *more), killed) as victim,
    ):
        ended_early = follow(victim, lambda followed: len(followed.steps) >= 60)
        victim.process.kill()
        victim.process.wait()
        victim.read()
        killed_at = len(victim.steps)
        assert victim.run is not None
        last = f"--resume={victim.run}"
        again = [*task.command("shakespeare_gpu", killed)[:2], last, f"--runs-dir={killed / 'runs'}"]
        with training(again, killed) as resumed:
            wait(resumed)  # without reading its log, which it first cuts back to the checkpoint
        wait(straight)
        straight.read()
        assert straight.run is not None
        hashes = [weights_hash(run) for run in (straight.run, victim.run)]
    report(
        {
            "killed_after_steps": killed_at if ended_early else None,
            "steps": steps,
            "sha256": hashes,
            "identical": hashes[0] == hashes[1] if ended_early and killed_at < steps else None,
            "cuda_graph": "cuda_graph" in FIELDS,
            **straight.facts(),
        }
    )


def weights_hash(run: Path) -> str:
    """SHA-256 of the tensors of a run's newest checkpoint: their names, types, shapes and bytes."""
    import json

    from utils.checkpoints.folder import WEIGHTS_FILE, list_checkpoints

    data = (list_checkpoints(run / CHECKPOINTS)[0][1] / WEIGHTS_FILE).read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")  # of the header, in which the metadata names the run
    header = {name: fact for name, fact in json.loads(data[8:end]).items() if name != "__metadata__"}
    return hashlib.sha256(json.dumps(header, sort_keys=True).encode() + data[end:]).hexdigest()


def fresh_caches(folder: Path) -> dict[str, str]:
    """Environment variables with which the compiler's caches are in `folder`: empty, or as earlier jobs left them."""
    names = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}
    return {**os.environ, **{variable: str(folder / name) for variable, name in names.items()}}
