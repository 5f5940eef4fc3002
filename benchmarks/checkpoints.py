"""What do checkpoints cost, in the training loop and on the disk?

python -m benchmarks.checkpoints                 # about half an hour on 2 CPU cores
python -m benchmarks.checkpoints --parts disk    # reading and writing only

The loop: steps with a checkpoint every 50 steps against the same steps without checkpoints, alternating, for models
of 0.8M and 30M parameters. The disk: a model of 500 MB with its AdamW state (1.5 GB in all) against plain sequential
writing with fsync and plain reading of as many bytes, from a cold page cache. Plain reading discards the data; a
resume also copies it into weights and optimizer state, which is compared with plain reading into memory that is kept.
"""

from __future__ import annotations

import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from unittest.mock import patch

from rich.table import Table

from benchmarks import common
from utils.errors import UserError
from utils.terminal.cli import Parser, place, script
from utils.terminal.console import Terminal

INTERVAL = 50  # steps between checkpoints
LOOP_LIMIT = 1.03  # saving / not saving
DISK_SHARE = 0.5  # the least share of the rate of plain writing or reading
CHUNK = 1 << 24
MODELS = {
    "0.8M": {"n_layer": "4", "n_head": "4", "n_embd": "128", "batch_size": "12"},
    "30M": {"n_layer": "9", "n_head": "8", "n_embd": "512", "batch_size": "12"},
}


@script
def main(argv: Sequence[str]) -> int:
    parser = Parser(prog="python -m benchmarks.checkpoints", description=__doc__)
    parser.add_argument("--parts", default="loop,disk", metavar="A,B", help="some of loop, disk (default: both)")
    parser.add_argument(
        "--models", default="0.8M,30M", metavar="A,B", help=f"some of {', '.join(MODELS)} (default: both)"
    )
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="repeats of each measurement (default: 3)")
    parser.add_argument("--saves", type=int, default=4, metavar="N", help="checkpoints of a measured loop (default: 4)")
    parser.add_argument(
        "--megabytes", type=int, default=500, metavar="N", help="size of the weights on the disk (default: 500)"
    )
    parser.add_argument("--dir", type=place, metavar="DIR", help="a folder on the disk to measure (default: temporary)")
    common.add_config_flag(parser)
    args = parser.parse(argv)
    common.at_least(1, repeats=args.repeats, saves=args.saves, megabytes=args.megabytes)
    terminal = Terminal()
    parts, models = args.parts.split(","), args.models.split(",")
    for word, known in ((parts, ("loop", "disk")), (models, tuple(MODELS))):
        if unknown := set(word) - set(known):
            raise UserError(f"unknown: {', '.join(sorted(unknown))}; expected {', '.join(known)}")
    with tempfile.TemporaryDirectory(dir=args.dir) as name:
        if "loop" in parts:
            for model in models:
                report_loop(terminal, model, args.repeats, args.saves, args.config, Path(name))
        if "disk" in parts:
            report_disk(terminal, args.repeats, args.megabytes, Path(name))
    terminal.print(f"machine: {common.machine_facts()}")
    return 0


# ---------------------------------------------------------------------------------------------- the loop


def report_loop(terminal: Terminal, model: str, repeats: int, saves: int, files: Sequence[Path], folder: Path) -> None:
    arms: dict[str, Callable[[], float]] = {
        "saving": lambda: mean_step_ms(model, INTERVAL, saves, files, folder),
        "not saving": lambda: mean_step_ms(model, 0, saves, files, folder),
    }
    arms["saving"]()  # a warmup: modules are imported and caches filled for both
    results = common.interleaved(arms, repeats, lambda line: terminal.print(f"  {model}: {line}"))
    ratio, low, high = common.ratio_interval(results["saving"], results["not saving"])
    table = Table(title=f"{model} parameters, a checkpoint every {INTERVAL} steps", title_justify="left")
    for header in ("loop", "ms a step (median)", "least", "most"):
        table.add_column(header, justify="right")
    for arm, times in results.items():
        table.add_row(arm, *(f"{value:.2f}" for value in (statistics.median(times), min(times), max(times))))
    terminal.print(
        table,
        f"saving / not saving: {ratio:.3f} (95%: {low:.3f}-{high:.3f}), limit {LOOP_LIMIT} "
        f"{common.verdict(ratio <= LOOP_LIMIT)}",
        "",
    )


def mean_step_ms(model: str, interval: int, saves: int, files: Sequence[Path], folder: Path) -> float:
    """Milliseconds of wall time per step, over `saves` intervals, each including the whole write of its checkpoint."""
    import train
    from benchmarks.callbacks import StepListener

    warmup = 10  # steps, in which memory is allocated
    last = warmup + saves * INTERVAL
    clock: dict[int, float] = {}

    def step_done(step: int) -> None:
        clock[step] = time.perf_counter()

    overrides: dict[str, str | bool] = {
        **MODELS[model],
        "max_iters": str(last + 1),  # the last step always has an evaluation and a checkpoint
        "eval_interval": str(last + 1),
        "eval_iters": "1",
        "histogram_interval": "0",
        "sample_tokens": "0",
        "checkpoint_interval": str(interval),
        "checkpoint_minutes": "none",
        "keep_best": False,
        "aim_logging": False,
        "callbacks": "benchmarks.callbacks:StepListener",
    }
    with patch.object(StepListener, "step_done", step_done, create=True):
        result = train.train(common.load_config(files, folder, overrides), quiet=True)
    if result.status != "completed":
        raise UserError(f"the run ended as {result.status}: {result.exit_reason}")
    return (clock[last] - clock[warmup]) / (last - warmup) * 1000


# ---------------------------------------------------------------------------------------------- the disk


def report_disk(terminal: Terminal, repeats: int, megabytes: int, folder: Path) -> None:
    import torch

    from utils.checkpoints.files import read_checkpoint, write_checkpoint

    numbers = megabytes * 1_000_000 // 4
    shape = (numbers // 20,)
    weights = {f"layer_{i}": torch.randn(shape) for i in range(20)}
    state = {f"{name}/{key}": torch.randn(shape) for name in weights for key in ("exp_avg", "exp_avg_sq")}
    total = 3 * sum(tensor.numel() * 4 for tensor in weights.values())
    checkpoint, plain = folder / "step_000001", folder / "plain"
    tokenizer, facts = {"type": "char"}, {"step": 1}

    def write() -> float:
        shutil.rmtree(checkpoint, ignore_errors=True)
        return common.timed(lambda: write_checkpoint(checkpoint, weights, state, tokenizer, facts))

    def write_plain() -> float:
        plain.unlink(missing_ok=True)  # a checkpoint is a new file, too; overwriting would be faster
        return common.timed(lambda: write_file(plain, [t.numpy().data for t in (*weights.values(), *state.values())]))

    def read() -> float:
        for path in checkpoint.iterdir():
            forget(path)
        return common.timed(lambda: read_checkpoint(checkpoint))

    def read_plain() -> float:
        forget(plain)
        return common.timed(lambda: read_file(plain))

    def take_over() -> float:
        for path in checkpoint.iterdir():
            forget(path)

        def load() -> list[torch.Tensor]:
            found = read_checkpoint(checkpoint)
            for name, tensor in weights.items():
                tensor.copy_(found.weights[name])
            return [tensor.clone() for tensor in found.optimizer_tensors.values()]

        return common.timed(load)

    def keep_plain() -> float:
        forget(plain)
        return common.timed(plain.read_bytes)

    write(), write_plain()  # a warmup
    arms = {"write": write, "plain write": write_plain, "read": read, "plain read": read_plain}
    arms |= {"read and copy": take_over, "plain read, kept": keep_plain}
    seconds = common.interleaved(arms, repeats, lambda line: terminal.print(f"  disk: {line}"))
    print_disk_rates({name: [total / 1e9 / time for time in times] for name, times in seconds.items()}, total, terminal)


def print_disk_rates(rates: Mapping[str, Sequence[float]], total: int, terminal: Terminal) -> None:
    """Print GB/s of each arm, and the share of plain writing or reading that checkpoints reach."""
    table = Table(title=f"{total / 1e9:.2f} GB, from a cold page cache", title_justify="left")
    for header in ("", "GB/s (median)", "least", "most"):
        table.add_column(header, justify="right")
    for name, values in rates.items():
        table.add_row(name, *(f"{value:.2f}" for value in (statistics.median(values), min(values), max(values))))
    terminal.print(table)
    for action, base in (("write", "plain write"), ("read", "plain read"), ("read and copy", "plain read, kept")):
        share = statistics.median(rates[action]) / statistics.median(rates[base])
        reached = common.verdict(share >= DISK_SHARE)
        terminal.print(f"{action} / {base}: {share:.2f}, at least {DISK_SHARE} {reached}")


def write_file(path: Path, parts: Sequence[memoryview]) -> None:
    with open(path, "wb", buffering=0) as file:
        for part in parts:
            data = part.cast("B")
            while data:
                data = data[file.write(data[:CHUNK]) :]
        os.fsync(file.fileno())


def read_file(path: Path) -> None:
    """Read at full speed, into the same buffer again and again."""
    buffer = bytearray(CHUNK)
    with open(path, "rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def forget(path: Path) -> None:
    """Drop a file from the page cache."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(handle)


if __name__ == "__main__":
    sys.exit(main())
