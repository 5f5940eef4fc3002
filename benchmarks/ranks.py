"""What do several ranks on one machine gain and cost, and what is left when one of them is killed?

python -m benchmarks.ranks                 # three arms of the 10.7M-parameter model in turn, saves, then 20 kills
python -m benchmarks.ranks --rounds 3 --batch-size 8 --kills 0   # the speed, within three minutes on an idle machine

The arms train on the same global batch: 1 rank with 2 threads; 2 ranks with 1 thread each and a plain sum of gradients;
the same in exact lanes. Each is a process of its own, and the time of a step is the median over the steps after the
first two. Then a checkpoint of 500 MB in shards is saved by one process and by two, and synced. Then a small run on 2
ranks is killed at random moments (one random rank, SIGKILL) and resumed, and compared with one on a single rank that
was never stopped.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import multiprocessing
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from multiprocessing.synchronize import Barrier
from pathlib import Path

import psutil
import torch

from benchmarks import common
from utils.checkpoints.choose import newest_good
from utils.checkpoints.files import write_folder
from utils.checkpoints.folder import list_checkpoints
from utils.checkpoints.index import rows_of
from utils.checkpoints.shards import write_shards
from utils.errors import UserError
from utils.experiments.bits import compare_logs
from utils.runs.layout import CHECKPOINTS, LOGS
from utils.runs.log import read_metrics
from utils.runs.run import read_record, read_status
from utils.terminal.cli import PROJECT_ROOT, Parser, script

GPT_10M = {"n-layer": 6, "n-head": 6, "n-embd": 384, "block-size": 256, "dropout": 0.2}
SMALL = {"n-layer": 1, "n-head": 2, "n-embd": 16, "block-size": 8, "dropout": 0.1}
ARMS = {
    "1 rank x 2 threads": (1, ["--threads", "2"]),
    "2 ranks x 1 thread": (2, ["--threads", "1"]),
    "the same, lanes 2": (2, ["--threads", "1", "--lanes", "2"]),
}
SAVED = [(4096, 1024)] * 10  # rows and columns of weights; with the moments of AdamW, 503 MB
WARM_STEPS = 2
SECONDS = 20.0  # within which a rank is killed, once there is a log
END_SECONDS = 60.0  # for all processes to end once one was killed


def command(ranks: int, flags: Sequence[str]) -> list[str]:
    """The command line of a training on that many ranks."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    return [sys.executable, *torchrun, str(PROJECT_ROOT / "train.py"), *flags]


def flags_of(model: dict[str, float], folder: Path, **settings: object) -> list[str]:
    """Flags of a run in `folder` without Aim."""
    values = {
        **model,
        "dataset": common.random_text(folder / "text.txt"),
        "corpora-dir": folder / "corpora",
        "runs-dir": folder / "runs",
        "device": "cpu",
        **{name.replace("_", "-"): value for name, value in settings.items()},
    }
    return [*(word for name, value in values.items() for word in (f"--{name}", str(value))), "--no-aim-logging"]


def run_of(folder: Path, tag: str) -> Path:
    (run,) = (folder / "runs").glob(f"*_{tag}")
    return run


def time_arm(name: str, number: int, folder: Path, steps: int, batch_size: int) -> tuple[float, int]:
    """Median seconds of a step, and the bytes that a rank sends in one."""
    ranks, more = ARMS[name]
    tag = f"r{number}"
    flags = flags_of(
        GPT_10M,
        folder,
        batch_size=batch_size,
        max_iters=steps,
        eval_interval=1000000,
        eval_iters=1,
        sample_tokens=0,
        histogram_interval=0,
        flush_interval=1,
        checkpoint_interval=0,
        stop_at_step=steps - 1,
        run_tag=tag,
    )
    common.launch(command(ranks, [*flags, *more]), name)
    run = run_of(folder, tag)
    milliseconds = [value for step, value in read_metrics(run / LOGS, "step_ms") if step >= WARM_STEPS]
    resolved = read_record(run)["resolved"]
    return statistics.median(milliseconds) / 1000, resolved.get("message_bytes_per_step", 0)


def compare_arms(folder: Path, rounds: int, steps: int, batch_size: int) -> None:
    """Print the speed of each arm, and its ratio to the first one."""
    message, numbers = 0, itertools.count()

    def timed(name: str) -> float:
        nonlocal message
        found, sent = time_arm(name, next(numbers), folder, steps, batch_size)
        message = max(message, sent)  # one rank sends nothing
        return found

    arms = {name: functools.partial(timed, name) for name in ARMS}
    seconds = common.interleaved(arms, rounds, lambda line: print(line, flush=True))
    tokens = batch_size * int(GPT_10M["block-size"])
    first = next(iter(ARMS))
    for name, values in seconds.items():
        ratio = statistics.median(one / other for one, other in zip(seconds[first], values, strict=True))
        rate = tokens / statistics.median(values)
        print(f"{name:20} {rate:8,.0f} tokens/s  {ratio:5.2f} times {first}  {[round(value, 3) for value in values]}")
    plain, exact = (seconds[name] for name in list(ARMS)[1:])
    cost = statistics.median(one / other for one, other in zip(exact, plain, strict=True)) - 1
    print(f"exact lanes cost {cost:+.1%}; a rank sends {message / 1e6:.1f} MB a step")


def write_part(
    rank: int, world_size: int, folder: str, tensors: Sequence[tuple[int, int]], start: Barrier, done: Barrier
) -> None:
    """In a process that stands for a rank: write its part of a checkpoint, between two barriers."""
    torch.set_num_threads(1)
    own = {
        f"{number}.weight": torch.randn(end - first, columns)
        for number, (rows, columns) in enumerate(tensors)
        for first, end in [rows_of(rows, rank, world_size)]
    }
    moments = {f"{name}/{key}": tensor.clone() for name, tensor in own.items() for key in ("exp_avg", "exp_avg_sq")}
    start.wait()
    write_shards(Path(folder), rank, world_size, {"model": own, "optimizer": moments})
    done.wait()


def save_seconds(world_size: int, path: Path) -> float:
    """Seconds that so many ranks take to write SAVED, from a common start until the checkpoint is complete."""
    processes = multiprocessing.get_context("spawn")
    start, done = processes.Barrier(world_size + 1), processes.Barrier(world_size + 1)
    began = 0.0

    def write(folder: Path) -> dict[str, object]:
        nonlocal began
        workers = [
            processes.Process(target=write_part, args=(rank, world_size, str(folder), SAVED, start, done))
            for rank in range(world_size)
        ]
        for worker in workers:
            worker.start()
        start.wait()
        began = time.perf_counter()
        done.wait()
        return {}

    write_folder(path, write, {}, {})
    return time.perf_counter() - began


def compare_saves(folder: Path, rounds: int) -> None:
    """Print how long one and two ranks take to save a checkpoint in shards, and the ratio."""
    megabytes = 12 * sum(rows * columns for rows, columns in SAVED) / 1e6
    seconds: dict[int, list[float]] = {1: [], 2: []}
    for number in range(rounds):
        for ranks in (1, 2) if number % 2 else (2, 1):
            path = folder / "saved" / f"step_{number:06d}"
            seconds[ranks].append(save_seconds(ranks, path))
            shutil.rmtree(path)
    for ranks, values in seconds.items():
        rate = megabytes / statistics.median(values)
        print(f"{megabytes:.0f} MB saved by {ranks}: {rate:6,.0f} MB/s  {[round(value, 2) for value in values]}")
    ratio = statistics.median(one / two for one, two in zip(seconds[1], seconds[2], strict=True))
    print(f"2 ranks save {ratio:.2f} times as fast as one")


def kill_once(flags: list[str], folder: Path, rng: random.Random, sessions: int) -> str:
    """Train until a random rank is killed at a random moment; returns what is wrong afterwards, or "".

    Args:
        sessions: the number of sessions of the run, this one included.
    """
    process = subprocess.Popen(command(2, flags), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    runs = folder / "runs"
    workers: list[psutil.Process] = []
    while len(workers) < 2 or not any(read_metrics(run / LOGS, "train/loss") for run in runs.glob("*_kills")):
        if process.poll() is not None:
            return f"ended by itself: {process.communicate()[0][-500:]}"
        workers = [child for child in psutil.Process(process.pid).children() if "train.py" in " ".join(child.cmdline())]
        time.sleep(0.05)
    time.sleep(rng.uniform(0, SECONDS))
    rank = rng.randrange(2)
    workers[rank].send_signal(signal.SIGKILL)
    began = time.monotonic()
    try:
        printed, _ = process.communicate(timeout=END_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        return f"did not end within {END_SECONDS:.0f} s after rank {rank} was killed"
    run, ended = run_of(folder, "kills"), time.monotonic() - began
    record, status = read_record(run), read_status(run)
    begun = len(record["resumes"]) == sessions - 1  # otherwise it was killed before the ranks had met
    when = f"{status} ({record['exit_reason']})" if begun else "while it started"
    print(f"rank {rank} killed: {when}, all ended after {ended:.1f} s", flush=True)
    left = [worker for worker in workers if worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE]
    if left:
        return f"{len(left)} processes are left"
    if begun and (status not in ("failed", "crashed") or f"error: rank {rank} " not in printed):
        return f"status {status}, and no message names rank {rank}: {printed[-3000:]}"
    _, unusable = newest_good(run / CHECKPOINTS, strict=False, warn=lambda line: None, problem=lambda checkpoint: "")
    return f"{len(unusable)} damaged checkpoints" if unusable else ""


def kill_often(folder: Path, kills: int) -> None:
    """Kill and resume one run, then compare it with a run on one rank.

    Raises:
        UserError: something was wrong after a kill, or the numbers differ.
    """
    settings = {
        "batch_size": 8,
        "max_iters": 100_000,
        "lanes": 2,
        "threads": 1,
        "eval_interval": 1000,
        "checkpoint_interval": 5,
        "run_tag": "kills",
    }
    flags, rng = flags_of(SMALL, folder, **settings), random.Random(0)
    for _ in range(kills):
        before = next((folder / "runs").glob("*_kills"), None)
        sessions = 1 if before is None else len(read_record(before)["resumes"]) + 2
        again = flags if before is None else ["--resume", str(before)]
        if problem := kill_once(again, folder, rng, sessions):
            raise UserError(f"after a kill: {problem}")
    run = run_of(folder, "kills")
    end = str(list_checkpoints(run / CHECKPOINTS)[0][0] + 20)
    common.launch(command(2, ["--resume", str(run), "--stop-at-step", end]), "the last resume")
    alone = flags_of(SMALL, folder, **settings | {"run_tag": "alone", "stop_at_step": end})
    common.launch(command(1, alone), "one rank")
    compared = compare_logs(run_of(folder, "alone"), run)
    hashes = {weights_hash(path) for path in (run, run_of(folder, "alone"))}
    print(f"{kills} kills; against one rank that was never stopped: {compared.steps:,} equal steps")
    if not compared.identical or len(hashes) > 1:
        raise UserError(f"the numbers differ: {compared.difference or compared.problem or 'the weights'}")


def weights_hash(run: Path) -> str:
    """sha256 of the weights in the newest checkpoint."""
    newest = list_checkpoints(run / CHECKPOINTS)[0][1]
    return hashlib.sha256((newest / "model.safetensors").read_bytes()).hexdigest()


@script
def main(argv: Sequence[str]) -> int:
    parser = Parser(prog="python -m benchmarks.ranks", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="how often each arm is timed (default: 3)")
    parser.add_argument("--steps", type=int, default=8, help="updates of an arm (default: 8)")
    parser.add_argument("--batch-size", type=int, default=16, help="sequences of an update (default: 16)")
    parser.add_argument("--kills", type=int, default=20, help="how often a rank is killed (default: 20)")
    parser.add_argument("--saves", type=int, default=5, help="how often a checkpoint is saved (default: 5)")
    args = parser.parse(argv)
    common.at_least(0, rounds=args.rounds, kills=args.kills, saves=args.saves)
    common.at_least(WARM_STEPS + 3, steps=args.steps)
    with tempfile.TemporaryDirectory() as name:
        if args.rounds:
            compare_arms(Path(name), args.rounds, args.steps, args.batch_size)
        if args.saves:
            compare_saves(Path(name), args.saves)
        if args.kills:
            kill_often(Path(name), args.kills)
    return 0


if __name__ == "__main__":
    sys.exit(main())
