"""Helpers of the benchmarks: machine facts, ratios with intervals, interleaving, configurations, processes."""

from __future__ import annotations

import random
import statistics
import string
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from utils.config.loader import ConfigLoader, LoadedConfig
from utils.errors import UserError
from utils.terminal.cli import PROJECT_ROOT, Parser, place

if TYPE_CHECKING:
    import numpy as np

    from model import LanguageModel
    from utils.packing.joined import Joined

T = TypeVar("T")
RESAMPLES = 2000
ALPHABET = string.printable[:64] + "\n"  # as many different characters as in Tiny Shakespeare
# A small process starts each command, because the peak memory of a child is at least that of its parent, and this
# process has imported torch.
LAUNCHER = """
import resource, subprocess, sys, time
began = time.perf_counter()
status = subprocess.run(sys.argv[1:]).returncode
print(time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, file=sys.stderr)
sys.exit(status)
"""


@dataclass(frozen=True)
class Launched:
    """The result of a command. memory_mb: its peak resident memory."""

    output: str
    seconds: float
    memory_mb: float


def add_config_flag(parser: Parser) -> None:
    parser.add_argument(
        "--config", metavar="FILE", action="append", default=[], type=place, help="further settings (repeatable)"
    )


def at_least(least: int, **flags: int) -> None:
    """Check the values of numeric flags.

    Raises:
        UserError: one is smaller than `least`.
    """
    for name, value in flags.items():
        if value < least:
            raise UserError(f"--{name} must be at least {least}, not {value}")


def load_config(files: Iterable[Path], folder: Path, overrides: Mapping[str, str | bool]) -> LoadedConfig:
    """Merge configs/, `files` and `overrides`, in this order; runs and the Aim repository go into `folder`."""
    places = {"runs_dir": str(folder / "runs"), "aim_repo": str(folder)}
    return ConfigLoader(PROJECT_ROOT).load(files, {**places, **overrides})


def random_text(path: Path, characters: int = 200_000) -> Path:
    """Write a corpus for timing steps: random characters from an alphabet of 65, all equally frequent."""
    path.write_text("".join(random.Random(0).choices(ALPHABET, k=characters)), encoding="utf-8")
    return path


def launch(words: Sequence[str], name: str) -> Launched:
    """Run a command in the project's folder and measure it.

    Args:
        name: the command's name in error messages.

    Raises:
        UserError: it fails.
    """
    command = [sys.executable, "-c", LAUNCHER, *words]
    result = subprocess.run(command, cwd=PROJECT_ROOT, capture_output=True, text=True)
    *errors, measured = result.stderr.strip().splitlines()
    if result.returncode:
        raise UserError(f"{name}: {errors[-1] if errors else f'ended with {result.returncode}'}")
    seconds, memory = map(float, measured.split())
    return Launched(result.stdout, seconds, memory * (1 if sys.platform == "darwin" else 1024) / 1e6)


def machine_facts() -> str:
    """The machine in one line: its processor with generation and measured speed, its GPUs, the threads, the torch.

    Call it after the measurements, so that the thread count is the one that they used. It takes two seconds.
    """
    import torch

    from utils.machine.device import choose_device, cpu_generation, device_facts
    from utils.machine.limits import measure_gemm
    from utils.nn.linear import linear

    facts, cpu = device_facts(choose_device("auto")), torch.device("cpu")
    processor = ", ".join(filter(None, (facts["cpu"], cpu_generation())))
    gpus = [value for name, value in facts.items() if name.startswith("cuda:")]
    by_torch, by_us = (
        measure_gemm(cpu, torch.float32, product) / 1e9 for product in (torch.nn.functional.linear, linear)
    )
    rates = f"float32 matrix product {by_torch:,.0f} GFLOP/s by F.linear, {by_us:,.0f} by utils/nn/linear.py"
    return ", ".join((processor, *gpus, f"{facts['torch threads']} threads", rates, f"torch {torch.__version__}"))


def interleaved(
    arms: Mapping[str, Callable[[], T]], repeats: int, report: Callable[[str], None] = lambda line: None
) -> dict[str, list[T]]:
    """Measure every arm once per repeat, so that a drift of the machine's speed affects all of them alike.

    The order rotates by one place with each repeat.
    """
    results: dict[str, list[T]] = {name: [] for name in arms}
    names = list(arms)
    for repeat in range(repeats):
        shift = repeat % len(names)
        for name in names[shift:] + names[:shift]:
            report(f"{repeat + 1}/{repeats}: {name}")
            results[name].append(arms[name]())
    return results


def ratio_interval(new: Sequence[float], old: Sequence[float]) -> tuple[float, float, float]:
    """median(new) / median(old) with its 95% interval, by a percentile bootstrap that resamples pairs."""
    return _bootstrap(
        lambda sample: statistics.median(a for a, _ in sample) / statistics.median(b for _, b in sample), new, old
    )


def median_ratio(new: Sequence[float], old: Sequence[float]) -> tuple[float, float, float]:
    """The median of new / old over pairs with its 95% interval: for pairs measured one right after the other."""
    return _bootstrap(lambda sample: statistics.median(a / b for a, b in sample), new, old)


def _bootstrap(
    statistic: Callable[[Sequence[tuple[float, float]]], float], new: Sequence[float], old: Sequence[float]
) -> tuple[float, float, float]:
    """A statistic of pairs with its 95% interval, by a percentile bootstrap."""
    generator = random.Random(0)
    pairs = list(zip(new, old, strict=True))
    resampled = sorted(statistic(generator.choices(pairs, k=len(pairs))) for _ in range(RESAMPLES))
    return statistic(pairs), resampled[round(0.025 * RESAMPLES)], resampled[round(0.975 * RESAMPLES) - 1]


def timed(action: Callable[[], object]) -> float:
    """Seconds that an action takes."""
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def verdict(reached: bool) -> str:
    return "reached" if reached else "missed"


def split_loss(model: LanguageModel, tokens: np.ndarray | Joined, batch_size: int = 64) -> float:
    """Mean loss over all tokens of a split except the first, in nats per token.

    The split is cut into adjacent windows of block_size tokens, and a token attends only to the tokens
    before it in its own window. The last window may be shorter.
    """
    import numpy as np
    import torch
    import torch.nn.functional as F

    from utils.inference.evaluation import evaluating

    block_size = model.config.block_size
    device = next(model.parameters()).device
    ids = torch.from_numpy(np.array(tokens, dtype=np.int64))
    n_windows = (len(ids) - 1) // block_size
    end = n_windows * block_size
    inputs = list(ids[:end].view(-1, block_size).split(batch_size)) if n_windows else []  # (n, T) each
    targets = list(ids[1 : end + 1].view(-1, block_size).split(batch_size)) if n_windows else []
    if end + 1 < len(ids):
        inputs.append(ids[None, end:-1])
        targets.append(ids[None, end + 1 :])
    total = torch.zeros((), dtype=torch.float64)
    with evaluating(model):
        for x, y in zip(inputs, targets, strict=True):
            logits, _ = model(x.to(device))
            loss = F.cross_entropy(logits.flatten(0, 1).float(), y.to(device).flatten(), reduction="sum")
            total += loss.cpu().double()
    return float(total) / (len(ids) - 1)
