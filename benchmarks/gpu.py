"""How fast is the workbench on a GPU? Training, generation, start and reproducibility, measured by one command.

python -m benchmarks.gpu --nanogpt ~/nanoGPT            # 8 minutes on an H100; prints a table, writes gpu.json
python -m benchmarks.gpu --minutes 4 --parts step,loss
python -m benchmarks.gpu --dry-run                      # tiny sizes on the CPU: does everything work here?

limits: the matrix product, the copy and attention of this card. step: the preset shakespeare_gpu, with and without
CUDA graphs and tracking. loss: seconds until its validation loss is 1.47, and speedrun_gpu with three seeds. gpt2:
tokens/s of GPT-2's shape. decode: tokens/s of generation. start: seconds from the start of a process to its first
compiled step, with empty and with filled caches. tracking: a step with all tracking against one without. resume: does
a run that was killed and resumed have the bits of one that was not?

References are measured on the same card, taking turns with ours: nanoGPT in a copy of the checkout that --nanogpt
names, and the cached generate of transformers if it is installed. Each measurement is a process with a time limit, so
one that fails or hangs does not affect the others. The JSON is written after each; Ctrl-C, SIGTERM and SIGHUP print the
table of the results so far. Nothing is estimated: fields that were not measured are blank. No network is needed if
WORKBENCH_DATA names a folder with tinyshakespeare.txt.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any

from benchmarks import common
from benchmarks.gpu_figures import Figure, figures, table
from benchmarks.gpu_jobs import JOBS, PARTS, Job, chosen
from benchmarks.gpu_measure import NO_CUDA
from benchmarks.gpu_runs import fresh_caches
from benchmarks.gpu_task import Task, read_report
from utils.corpora.sources import find_source
from utils.errors import UserError
from utils.files import json_text, write_output
from utils.machine.signals import STOP_SIGNALS
from utils.runs.run import utc_now
from utils.terminal.cli import PROJECT_ROOT, Parser, place, script
from utils.terminal.console import Terminal

SCHEMA_VERSION = 1
RESERVE = 3.0  # seconds for the table and for ending the last process
LEAST = 15.0  # with fewer seconds left, no job is started
REPEATS, MINUTES_FOR_REPEATS = 2, 6
POLL_SECONDS = 1.0  # between two looks at what a job has printed
VOCABULARY, FIRST_CHARACTER = 50304, 0x20000  # as nanoGPT pads GPT-2's 50,257; Chinese characters, one token each
WIDTH = 132  # of the table if the output is not a terminal


class StoppedError(Exception):
    """A signal asked to stop."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


@dataclass
class Bench:
    """One run of the command: what is measured, how long it may take, and the results so far."""

    parts: Sequence[str]
    minutes: float
    out: Path
    task: Task
    terminal: Terminal
    began: float = field(default_factory=time.monotonic)
    began_at: str = field(default_factory=utc_now)
    jobs: dict[str, dict[str, Any]] = field(default_factory=dict)
    complete: bool = False

    @property
    def seconds(self) -> float:
        """Seconds since the command began."""
        return time.monotonic() - self.began

    @property
    def seconds_left(self) -> float:
        return 60 * self.minutes - RESERVE - self.seconds

    @property
    def results(self) -> dict[str, dict[str, Any]]:
        return {name: job["results"] for name, job in self.jobs.items() if job.get("results")}

    @property
    def figures(self) -> list[Figure]:
        """The figures of the results so far; those of a dry run are not compared with limits."""
        return [replace(figure, compared=None) if self.task.dry else figure for figure in figures(self.results)]

    def write(self) -> None:
        """Write the JSON with the results so far."""
        results = {
            "schema_version": SCHEMA_VERSION,
            "command": sys.argv,
            "commit": commit(),
            "began": self.began_at,
            "seconds": round(self.seconds, 2),
            "minutes": self.minutes,
            "parts": list(self.parts),
            "dry_run": self.task.dry,
            "repeats": self.task.repeats,
            "complete": self.complete,
            "jobs": self.jobs,
            "figures": [figure.json() for figure in self.figures],
        }
        write_output(self.out, json_text(results))


@script
def main(argv: Sequence[str]) -> int:
    parser = Parser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument(
        "--minutes", type=float, default=8.0, metavar="X", help="time limit for everything (default: 8)"
    )
    parser.add_argument("--nanogpt", type=place, metavar="FOLDER", help="a checkout of nanoGPT, which is not changed")
    parser.add_argument(
        "--out", type=place, default=Path("gpu.json"), metavar="FILE", help="JSON with the results (default: gpu.json)"
    )
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU, less than a minute")
    parser.add_argument(
        "--parts", default=",".join(PARTS), metavar="A,B", help=f"some of {', '.join(PARTS)} (default: all)"
    )
    args = parser.parse(argv)
    parts = [part.strip() for part in args.parts.split(",") if part.strip()]
    if unknown := sorted(set(parts) - set(PARTS) - {job.name for job in JOBS}):
        raise UserError(f"--parts: unknown: {', '.join(unknown)}; expected some of {', '.join(PARTS)}")
    if args.minutes <= 0:
        raise UserError(f"--minutes must be more than 0, not {args.minutes:g}")
    if not args.out.resolve().parent.is_dir():
        raise UserError(f"--out {args.out}: there is no folder {args.out.resolve().parent}")
    terminal = Terminal()
    if not terminal.console.is_terminal:
        terminal.console.width = WIDTH
    folder = tempfile.TemporaryDirectory(prefix="gpu_benchmark_", ignore_cleanup_errors=True)
    try:
        with stop_on_signals(), folder as name:
            repeats = 1 if args.dry_run or args.minutes < MINUTES_FOR_REPEATS else REPEATS
            task = make_task(Path(name), args.nanogpt, repeats, args.dry_run)
            bench = Bench(parts, args.minutes, args.out, task, terminal)
            return measure(bench, chosen(parts, with_nanogpt=task.nanogpt is not None, dry=task.dry))
    except StoppedError as stopped:
        terminal.print(f"stopped: {stopped}, before the first measurement")
        return 128 + stopped.signum


@contextlib.contextmanager
def stop_on_signals() -> Iterator[None]:
    """The first SIGINT, SIGTERM or SIGHUP raises StoppedError; restores the previous handlers on exit.

    Later ones are ignored, so that the results are still written and shown. A SIGHUP that nohup ignores stays ignored.
    """

    def handle(signum: int, _frame: FrameType | None) -> None:
        ignore_signals()
        raise StoppedError(signum)

    before = {s: handler for s in STOP_SIGNALS if (handler := signal.getsignal(s)) != signal.SIG_IGN}
    for signum in before:
        signal.signal(signum, handle)
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def ignore_signals() -> None:
    """Ignore the signals that stop, until the end of `stop_on_signals`."""
    for signum in STOP_SIGNALS:
        signal.signal(signum, signal.SIG_IGN)


def make_task(folder: Path, checkout: Path | None, repeats: int, dry: bool) -> Task:
    """Write the corpora and the copy of nanoGPT.

    Raises:
        UserError: Tiny Shakespeare cannot be read, or `checkout` is not one of nanoGPT.
    """
    text, words = folder / "text.txt", folder / "words.txt"
    if dry and "WORKBENCH_DATA" not in os.environ:
        common.random_text(text, 20_000)
    else:
        text.write_text(find_source("shakespeare", PROJECT_ROOT / "corpora").read(), encoding="utf-8")
    vocabulary = [chr(FIRST_CHARACTER + index) for index in range(50 if dry else VOCABULARY)]
    drawn = random.Random(0).choices(vocabulary, k=10 * max(len(vocabulary), 1000))
    words.write_text("".join([*vocabulary, *drawn]), encoding="utf-8")
    copy = None
    if checkout is not None:
        from benchmarks.nanogpt import prepare

        copy = str(prepare(checkout, folder, text.read_text(encoding="utf-8")))
    return Task(str(folder), str(text), str(words), copy, repeats, dry)


def measure(bench: Bench, jobs: Sequence[Job]) -> int:
    """Run the jobs, print the table; returns the exit status."""
    status = 0
    try:
        bench.write()
        for job in jobs:
            seconds = min(job.seconds, bench.seconds_left)
            if seconds < LEAST:
                bench.jobs[job.name] = {"status": "skipped", "error": "no time left"}
            else:
                run_job(job, bench, seconds)
            bench.write()
            bench.terminal.print(progress_line(bench, job.name))
            if NO_CUDA in bench.jobs[job.name].get("error", ""):
                raise UserError(NO_CUDA)
        ignore_signals()
        bench.complete = True
    except StoppedError as stopped:
        status = 128 + stopped.signum
    bench.write()  # before anything is printed: the terminal may be gone
    if status:
        bench.terminal.print(f"stopped: {signal.Signals(status - 128).name}")
    title = "Dry run on the CPU: the numbers mean nothing" if bench.task.dry else card(bench)
    bench.terminal.print("", table(bench.figures, title))
    if skipped := [name for name, job in bench.jobs.items() if job["status"] == "skipped"]:
        bench.terminal.print(f"no time was left for: {', '.join(skipped)} (--minutes, --parts)")
    bench.terminal.print(f"written: {bench.out}, after {bench.seconds:.0f} s")
    return status


def run_job(job: Job, bench: Bench, limit: float) -> None:
    """Run a job in a process group of its own for at most `limit` seconds; what it reports is written at once."""
    folder = Path(bench.task.folder)
    (folder / "task.json").write_text(json.dumps(asdict(bench.task)), encoding="utf-8")
    output, errors = folder / f"{job.name}.out", folder / f"{job.name}.err"
    bench.jobs[job.name] = entry = {"status": "running", "limit": round(limit, 1), "results": {}}
    began, status = time.monotonic(), "stopped"
    process: subprocess.Popen[bytes] | None = None
    try:
        with output.open("wb") as stdout, errors.open("wb") as stderr:
            process = subprocess.Popen(
                job_command(job.name, folder / "task.json"),
                cwd=PROJECT_ROOT,
                stdout=stdout,
                stderr=stderr,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                env={
                    **fresh_caches(folder / "caches" / job.caches),
                    **({"OMP_NUM_THREADS": "1"} if bench.task.dry else {}),
                },
            )
        while (left := began + limit - time.monotonic()) > 0:
            with contextlib.suppress(subprocess.TimeoutExpired):
                status = "failed" if process.wait(min(POLL_SECONDS, left)) else "done"
                break
            if (results := last_report(output)) != entry["results"]:
                entry["results"] = results
                bench.write()
        else:
            status = "timed out"
    finally:
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # the job and the processes that it has started
            process.wait()
        entry |= {"status": status, "seconds": round(time.monotonic() - began, 2), "results": last_report(output)}
        if message := errors.read_text(errors="replace").strip()[-2000:]:
            entry["stderr" if status == "done" else "error"] = message


def job_command(name: str, task_file: Path) -> list[str]:
    return [sys.executable, "-m", "benchmarks.gpu_jobs", name, str(task_file)]


def last_report(output: Path) -> dict[str, Any]:
    """The last results that a job has printed; empty if there are none."""
    reports = map(read_report, reversed(output.read_text(errors="replace").splitlines()))
    return next((report for report in reports if report is not None), {})


def progress_line(bench: Bench, name: str) -> str:
    """The outcome of a job in one line."""
    job = bench.jobs[name]
    seconds = f" {job['seconds']:.0f} s" if "seconds" in job else ""
    lines = job.get("error", "").splitlines()
    reason = f": {lines[-1][:200]}" if lines else ""
    return f"{bench.seconds:4.0f} s  {name}: {job['status']}{seconds}{reason}"


def card(bench: Bench) -> str:
    """The card and the versions in one line."""
    facts = bench.results.get("limits", {})
    names = [facts.get("cuda:0"), f"torch {facts['torch']}" if "torch" in facts else None]
    return ", ".join(filter(None, names)) or "GPU"


def commit() -> str | None:
    """The commit of this checkout, if it is one of git."""
    command = ["git", "-C", str(PROJECT_ROOT), "rev-parse", "HEAD"]
    with contextlib.suppress(OSError):
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None
    return None


if __name__ == "__main__":
    sys.exit(main())
