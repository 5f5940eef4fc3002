"""What does the driver of a sweep cost, what do several jobs gain, and does a sweep survive being killed?

    python -m benchmarks.sweep                 # the figures; about five minutes on 2 CPU cores
    python -m benchmarks.sweep --kills 100     # SIGKILLs of drivers and trials at random moments

The kills: a sweep with the random sampler is started, a driver or one of its trainings is killed after a random time,
and so on; a driver that was killed is started again with --resume. At the end numbers, values, settings and logs are
compared with those of a sweep that was never disturbed.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from benchmarks import common
from utils.runs.find import list_run_paths
from utils.runs.layout import CONFIG, METRICS_LOG, NOTES, RECORD, SEAL
from utils.runs.log import read_metrics
from utils.runs.run import read_record
from utils.sweeps.folder import read_sweep
from utils.terminal.cli import PROJECT_ROOT, Parser, script
from utils.terminal.console import Terminal
from utils.terminal.words import duration

SPACE = """
metric: val/loss
learning_rate: {log: [1e-4, 1e-1]}
n_embd: {choice: [16, 32]}
"""
SETTINGS = {
    "n_layer": 1,
    "n_head": 2,
    "block_size": 16,
    "batch_size": 4,
    "eval_iters": 2,
    "sample_tokens": 0,
    "histogram_interval": 0,
    "threads": 1,
}
THOUSAND = 1000
OVERHEAD_LIMIT, LIST_LIMIT, JOBS_LIMIT = 0.3, 1.0, 1.6


@dataclass
class Killing:
    """The outcome of killed sweeps.

    drivers, trainings: how many of them were killed.
    differences: from the sweep that was never disturbed. failures: of drivers that ended with an error of their own.
    """

    drivers: int = 0
    trainings: int = 0
    differences: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    @property
    def kills(self) -> int:
        return self.drivers + self.trainings


@script
def main(argv: Sequence[str]) -> int:
    parser = Parser(prog="python -m benchmarks.sweep", description=__doc__)
    parser.add_argument("--kills", type=int, metavar="N", help="only kill processes, N times; measure nothing")
    parser.add_argument("--trials", type=int, default=8, metavar="N", help="trials of each sweep (default: 8)")
    parser.add_argument("--steps", type=int, default=400, metavar="N", help="steps of each trial (default: 400)")
    parser.add_argument(
        "--seconds", type=float, default=6.0, metavar="X", help="longest time between kills (default: 6)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the random moments (default: 0)")
    args = parser.parse(argv)
    common.at_least(
        1, trials=args.trials, steps=args.steps, **({"kills": args.kills} if args.kills is not None else {})
    )
    terminal = Terminal()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "space.yaml").write_text(SPACE)
        if args.kills is not None:
            good = kills(folder, args.trials, args.steps, args.kills, args.seconds, args.seed, terminal)
        else:
            good = figures(folder, args.trials, args.steps, terminal)
    terminal.print(f"machine: {common.machine_facts()}; {duration(time.monotonic() - began)}")
    return 0 if good else 1


def command(folder: Path, trials: int, steps: int, *flags: str, script: str = "sweep.py") -> list[str]:
    """The command line of a sweep below `folder`."""
    settings = [f"--{key.replace('_', '-')}={value}" for key, value in SETTINGS.items()]
    places = [f"--runs-dir={folder / 'runs'}", f"--aim-repo={folder}", f"--corpora-dir={folder.parent / 'corpora'}"]
    length = [
        f"--max-iters={steps}",
        f"--eval-interval={max(1, steps // 4)}",
        f"--checkpoint-interval={max(1, steps // 8)}",
    ]
    space = folder.parent / "space.yaml"
    return [
        *(sys.executable, *script.split(), os.fspath(space), f"--trials={trials}", "--sampler=random", "--resume"),
        *(*settings, *places, *length, *flags),
    ]


# ------------------------------------------------------------------------------------------------------- figures


def figures(folder: Path, trials: int, steps: int, terminal: Terminal) -> bool:
    """Print the figures against their limits; True if all are within them."""
    overhead, run = driver_overhead(folder / "overhead", trials, steps)
    first, later = list_seconds(folder / "thousand", run)
    one, two = (jobs_seconds(folder / f"jobs_{jobs}", trials, steps, jobs) for jobs in (1, 2))
    rows = [
        (f"overhead of the driver: {overhead:.3f} s a trial", OVERHEAD_LIMIT, overhead <= OVERHEAD_LIMIT),
        (
            f"list of a sweep of {THOUSAND:,} trials: {later:.2f} s ({first:.2f} s the first time)",
            LIST_LIMIT,
            later <= LIST_LIMIT,
        ),
        (
            f"two jobs are {one / two:.2f} times as fast as one ({one:.1f} s, {two:.1f} s)",
            JOBS_LIMIT,
            one / two >= JOBS_LIMIT,
        ),
    ]
    terminal.print("", *(f"{words} (limit {limit:g}): {common.verdict(good)}" for words, limit, good in rows))
    return all(good for *_, good in rows)


def driver_overhead(folder: Path, trials: int, steps: int) -> tuple[float, Path]:
    """Seconds per trial that a sweep with one job spends outside its training processes; and one of its runs."""
    from utils.sweeps.driver import Driver
    from utils.sweeps.study import Study
    from utils.sweeps.trial import POLL_SECONDS, TrialRunner

    folder.mkdir()
    subprocess.run(command(folder, 1, steps), cwd=PROJECT_ROOT, check=True, stdout=subprocess.DEVNULL)
    sweep = read_sweep(folder / "sweeps" / "space", PROJECT_ROOT)
    study, spent = Study(sweep), []
    run = TrialRunner._run

    def timed(self: TrialRunner, *args: Any) -> tuple[int, bool]:
        began = time.perf_counter()
        try:
            return run(self, *args)
        finally:
            spent.append(time.perf_counter() - began)

    setattr(TrialRunner, run.__name__, timed)
    try:
        began = time.perf_counter()
        Driver(sweep, study, trials + 1, 1, 0).run()
        seconds = time.perf_counter() - began
    finally:
        setattr(TrialRunner, run.__name__, run)
    assert len(spent) == trials
    return (seconds - sum(spent)) / trials + POLL_SECONDS, list_run_paths(folder / "runs")[0]


def list_seconds(folder: Path, run: Path) -> tuple[float, float]:
    """Seconds of `experiments.py list` for a sweep of a thousand runs, all copies of one.

    The first time, when all are read, and the median of three later times, when they are cached.
    """
    for number in range(THOUSAND):
        copy = folder / "runs" / f"20260101_000000_many-{number}"
        copy.mkdir(parents=True)
        for part in ("meta", "logs", "artifacts"):
            (copy / part).mkdir()
        for name in (NOTES, CONFIG, METRICS_LOG, SEAL):
            shutil.copyfile(run / name, copy / name)
        record = {**read_record(run), "id": copy.name, "tag": f"many-{number}"}
        record["sweep"] = {"name": "many", "id": "0", "number": number, "place": 0}
        record["place"] = None
        (copy / RECORD).write_text(json.dumps(record))
    words = [sys.executable, "experiments.py", "list", "--where", "sweep = 'many'", "--sort", "val_loss"]
    words += ["--runs-dir", os.fspath(folder / "runs")]
    time.sleep(3)  # files that changed just now are not cached (utils/runs/index_cache.py)
    first, *later = (common.launch(words, "list").seconds for _ in range(4))
    return first, statistics.median(later)


def jobs_seconds(folder: Path, trials: int, steps: int, jobs: int) -> float:
    """Seconds of a sweep with `jobs` jobs, each with its share of the cores."""
    folder.mkdir()
    words = [word for word in command(folder, trials, steps, f"--jobs={jobs}") if not word.startswith("--threads")]
    return common.launch(words, "sweep.py").seconds


# --------------------------------------------------------------------------------------------------------- kills


def kills(folder: Path, trials: int, steps: int, count: int, seconds: float, seed: int, terminal: Terminal) -> bool:
    """Print what `killed_sweep` finds; True if nothing differs."""
    found = killed_sweep(folder, trials, steps, count, seconds, seed, report=terminal.print)
    terminal.print(
        "",
        f"kills                {found.kills}: {found.drivers} of drivers, {found.trainings} of trainings",
        f"own failures         {len(found.failures)}",
        f"differences          {len(found.differences)}",
        *found.failures,
        *found.differences,
    )
    return not (found.failures or found.differences)


def killed_sweep(
    folder: Path,
    trials: int,
    steps: int,
    count: int,
    seconds: float,
    seed: int,
    report: Any = lambda line: None,
    script: str = "sweep.py",
) -> Killing:
    """Kill sweeps until there have been `count` kills, and compare each with one that was never disturbed.

    Args:
        seconds: the longest time between two kills.
        seed: of the random moments and victims.
        script: the program that stands for sweep.py.
    """
    moments = random.Random(seed)
    found = Killing()
    straight = folder / "straight"
    straight.mkdir()
    process(command(straight, trials, steps, "--jobs=2", script=script)).wait()
    expected, number = facts(straight), 0
    while found.kills < count:
        number += 1
        disturbed = folder / f"killed_{number}"
        disturbed.mkdir()
        words = command(disturbed, trials, steps, "--jobs=2", script=script)
        driver = process(words)
        while True:
            try:
                driver.wait(None if found.kills >= count else moments.uniform(0, seconds))
            except subprocess.TimeoutExpired:
                kill_one(driver, disturbed, moments, found)
                report(f"kill {found.kills}")
                if driver.poll() is None:
                    continue
            if driver.returncode == 0:
                break
            if driver.returncode != -signal.SIGKILL:
                assert driver.stderr is not None
                found.failures.append(f"status {driver.returncode}: {driver.stderr.read().decode().strip()}")
                if len(found.failures) > 3:
                    return found
            driver = process(words)
        found.differences += differences(expected, facts(disturbed))
        report(f"sweep {number} is complete after {found.kills} kills")
    return found


def process(words: list[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(words, cwd=PROJECT_ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def kill_one(driver: subprocess.Popen[bytes], folder: Path, moments: random.Random, found: Killing) -> None:
    """Kill the driver, or else one of the trainings below `folder`, of this driver or of one before it."""
    if moments.random() < 0.5:
        driver.kill()
        driver.wait()
        found.drivers += 1
        return
    while driver.poll() is None:
        if victims := trainings(folder):
            moments.choice(victims).kill()
            found.trainings += 1
            return
        time.sleep(0.02)


def trainings(folder: Path) -> list[psutil.Process]:
    """The processes that train trials below `folder`, oldest first."""
    found = []
    for candidate in psutil.process_iter(["cmdline"]):
        words = candidate.info["cmdline"] or []
        trial = any(word.startswith(("--trial=", "--resume=")) for word in words)
        if trial and any(os.fspath(folder) in word for word in words):
            found.append(candidate)
    return sorted(found, key=lambda one: one.pid)


def facts(folder: Path) -> dict[str, Any]:
    """The outcome of a sweep below `folder`: state, value and settings of each trial, and the losses of its runs."""
    path = next((folder / "sweeps").iterdir())
    out = subprocess.run(
        [sys.executable, "-c", DUMP, os.fspath(path)], cwd=PROJECT_ROOT, capture_output=True, text=True, check=True
    )
    runs = {}
    for run in list_run_paths(folder / "runs"):
        record = read_record(run)["sweep"]
        name = f"trial {record['number']}, run {record['place']}"
        name += " again" * (name in runs)
        runs[name] = read_metrics((run / METRICS_LOG).parent, "val/loss")
    return {**json.loads(out.stdout), **runs}


DUMP = """
import json, sys
from pathlib import Path
from utils.sweeps.folder import read_sweep
from utils.sweeps.study import Study
study = Study(read_sweep(Path(sys.argv[1]), Path.cwd()))
print(json.dumps({f"trial {t.number}": [t.state.name, t.value, t.params] for t in study.trials()}))
"""


def differences(expected: dict[str, Any], found: dict[str, Any]) -> list[str]:
    return [
        f"{name}: {found.get(name, 'lost')} instead of {expected.get(name, 'nothing')}"
        for name in dict.fromkeys((*expected, *found))
        if found.get(name) != expected.get(name) and json.dumps(found.get(name)) != json.dumps(expected.get(name))
    ]


if __name__ == "__main__":
    sys.exit(main())
