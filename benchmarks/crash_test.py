"""Does a run survive being killed? SIGKILL at random moments, the same command again, and a comparison of all bits.

python -m benchmarks.crash_test --kills 50       # about six minutes on 2 CPU cores

`train.py --resume auto` is started, killed after a random time (uniform from 0 to --seconds, so also while Python
starts, while a checkpoint is written and while the run ends) and started again until the run is complete. Further runs
follow until there have been enough kills. After every kill all checkpoints are read. At the end each run is compared
with one that was never stopped.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks import common
from utils.errors import UserError
from utils.runs.find import list_run_paths
from utils.runs.layout import CHECKPOINTS
from utils.runs.run import RunError, read_record, read_status
from utils.terminal.cli import PROJECT_ROOT, Parser, script
from utils.terminal.console import Terminal
from utils.terminal.words import duration

SETTINGS = {
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 32,
    "block_size": 32,
    "batch_size": 8,
    "gradient_accumulation_steps": 2,
    "dropout": 0.1,
    "patience": 1000,
    "eval_interval": 100,
    "eval_iters": 2,
    "histogram_interval": 100,
    "sample_tokens": 20,
    "checkpoint_interval": 7,
    "threads": 1,
}


@dataclass
class Result:
    """Counts over all processes."""

    kills: int = 0
    failures: list[str] = field(default_factory=list)  # the errors of processes that failed by themselves
    checkpoints: int = 0  # the number that was read after kills
    damaged: list[str] = field(default_factory=list)
    runs: list[tuple[Path, int]] = field(default_factory=list)  # complete runs, and how often each was resumed
    before_a_run: int = 0  # kills before there was a run to resume


@script
def main(argv: Sequence[str]) -> int:
    parser = Parser(prog="python -m benchmarks.crash_test", description=__doc__)
    parser.add_argument("--kills", type=int, default=50, metavar="N", help="SIGKILLs in all (default: 50)")
    parser.add_argument("--steps", type=int, default=6000, metavar="N", help="steps of a run (default: 6000)")
    parser.add_argument(
        "--seconds", type=float, default=10, metavar="X", help="longest life of a process (default: 10)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the random moments (default: 0)")
    args = parser.parse(argv)
    common.at_least(1, kills=args.kills, steps=args.steps)
    terminal = Terminal()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        terminal.print("a run that is never stopped")
        straight = folder / "straight"
        if process(command(straight, args.steps)).wait():
            raise UserError("the run that is never stopped failed")
        result = kill_and_resume(folder / "killed", args.kills, args.steps, args.seconds, args.seed, terminal)
        from benchmarks.run_equality import differences

        (reference,) = list_run_paths(straight)
        found = [differences(reference, run) for run, _ in result.runs]
    if not found:
        raise UserError("no run was completed: " + "; ".join(result.failures))
    resumed = result.kills - len(result.failures)
    for line in (*result.failures, *result.damaged):
        terminal.print(line)
    resumes = ", ".join(str(count) for _, count in result.runs)
    terminal.print(
        "",
        f"kills                    {result.kills}, of which {result.before_a_run} before there was a run to resume",
        f"resumed                  {resumed} of {result.kills}",
        f"complete runs compared   {len(result.runs)} of {args.steps:,} steps, resumed {resumes} times",
        *(f"{f'differing {key}':<24} {sum(d[key] for d in found)}" for key in found[0]),
        f"checkpoints              {len(result.damaged)} damaged of {result.checkpoints} read after a kill",
        f"machine: {common.machine_facts()}; {duration(time.monotonic() - began)}",
    )
    return int(bool(result.failures or result.damaged or any(sum(d.values()) for d in found)))


def command(runs_dir: Path, steps: int) -> list[str]:
    """The command line of a preemptible job, which never changes."""
    flags = [f"--{key.replace('_', '-')}={value}" for key, value in SETTINGS.items()]
    places = [f"--runs-dir={runs_dir}", f"--aim-repo={runs_dir.parent}", "--no-aim-logging"]
    return [
        *(sys.executable, os.fspath(PROJECT_ROOT / "train.py"), "--resume=auto", "--run-tag=job"),
        *(f"--max-iters={steps}", *flags, *places),
    ]


def process(words: list[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def kill_and_resume(runs_dir: Path, kills: int, steps: int, seconds: float, seed: int, terminal: Terminal) -> Result:
    """Start the command and kill it, again and again; the last run is allowed to finish."""
    moments = random.Random(seed)
    result = Result()
    while True:
        trainer = process(command(runs_dir, steps))
        try:
            if result.kills < kills:
                trainer.wait(timeout=moments.uniform(0, seconds))
            else:
                trainer.wait()
        except subprocess.TimeoutExpired:
            trainer.send_signal(signal.SIGKILL)
            trainer.wait()
            result.kills += 1
            newest = newest_run(runs_dir)
            check_checkpoints(newest, result)
            where = f"{newest.name}, {newest_step(newest)}" if newest else "no run yet"
            result.before_a_run += newest is None
            terminal.print(f"kill {result.kills}: {where}")
            continue
        if trainer.returncode:
            assert trainer.stderr is not None
            result.failures.append(f"status {trainer.returncode}: {trainer.stderr.read().decode().strip()}")
            terminal.print(result.failures[-1])
            if len(result.failures) > 3:
                return result
            continue
        run = newest_run(runs_dir)
        assert run is not None
        result.runs.append((run, len(read_record(run)["resumes"])))
        terminal.print(f"{run.name} is complete")
        if result.kills >= kills:
            return result


def newest_run(runs_dir: Path) -> Path | None:
    """The newest run directory with a readable status."""
    found = None
    for path in list_run_paths(runs_dir) if runs_dir.is_dir() else []:
        try:
            read_status(path)
            found = path
        except RunError:
            continue
    return found


def newest_step(run: Path) -> str:
    from utils.checkpoints.folder import list_checkpoints

    checkpoints = list_checkpoints(run / CHECKPOINTS)
    return f"checkpoint of step {checkpoints[0][0]:,}" if checkpoints else "no checkpoint yet"


def check_checkpoints(run: Path | None, result: Result) -> None:
    """Read every checkpoint that the killed process left behind, and count the damaged ones."""
    from utils.checkpoints.files import read_checkpoint
    from utils.checkpoints.folder import CheckpointError, list_checkpoints

    for _, path in list_checkpoints(run / CHECKPOINTS) if run else []:
        result.checkpoints += 1
        try:
            read_checkpoint(path)
        except CheckpointError as error:
            result.damaged.append(str(error))


if __name__ == "__main__":
    sys.exit(main())
