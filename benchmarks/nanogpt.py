"""nanoGPT as a reference: its own train.py in a process, and its model in a bare loop.

The needed files of a checkout are copied, and the character-level corpus is written into the copy; the checkout is
never changed. nanoGPT [Karpathy 2022, github.com/karpathy/nanoGPT] needs only torch and numpy for this.
"""

from __future__ import annotations

import gc
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gpu_task import Task, median, report
from utils.errors import UserError

FILES = ("train.py", "model.py", "configurator.py", "config/train_shakespeare_char.py")
VOCABULARY = "meta_vocab_size = None"  # a line of its train.py
EVALUATION = re.compile(r"step (\d+): train loss ([\d.]+), val loss ([\d.]+)")
ITERATION = re.compile(r"iter (\d+): loss ([\d.]+), time ([\d.]+)ms")
TINY = {"device": "cpu", "dtype": "float32", "compile": False, "n_layer": 1, "n_head": 2, "n_embd": 16}
TINY_RUN = {**TINY, "batch_size": 4, "block_size": 16, "eval_iters": 1, "warmup_iters": 1}
SETTLED = 100  # iterations before those that are timed
PATIENCE = 4  # evaluations in a row without a better loss, after which the target is given up


def prepare(checkout: Path, folder: Path, text: str) -> Path:
    """A copy of the files that are needed, with `text` as its corpus shakespeare_char; returns its folder.

    Raises:
        UserError: `checkout` is not a checkout of nanoGPT, or of another version of it.
    """
    copy = folder / "nanoGPT"
    try:
        for name in FILES:
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(checkout / name, copy / name)
    except OSError as error:
        problem = f"{error.filename}: {error.strerror}"
        raise UserError(f"--nanogpt {checkout}: not a checkout of nanoGPT: {problem}") from None
    data = copy / "data" / "shakespeare_char"
    data.mkdir(parents=True)
    characters = sorted(set(text))
    ids = {character: index for index, character in enumerate(characters)}
    tokens = np.array([ids[character] for character in text], dtype=np.uint16)
    n_train = int(0.9 * len(tokens))  # as its data/shakespeare_char/prepare.py splits
    tokens[:n_train].tofile(data / "train.bin")
    tokens[n_train:].tofile(data / "val.bin")
    # Its train.py reads the size of the vocabulary from a pickle; here it is written into the script.
    script = (copy / "train.py").read_text(encoding="utf-8")
    if VOCABULARY not in script:
        raise UserError(f"--nanogpt {checkout}: train.py has no line {VOCABULARY!r}: of another version")
    script = script.replace(VOCABULARY, VOCABULARY.replace("None", str(len(characters))), 1)
    (copy / "train.py").write_text(script, encoding="utf-8")
    return copy


# --------------------------------------------------------------------------------------------- its train.py


@dataclass
class Progress:
    """What a run has printed so far, with the moments at which it was read (time.time()).

    evaluations: (iteration, validation loss, moment). iterations: (iteration, milliseconds as printed, moment).
    """

    began: float
    evaluations: list[tuple[int, float, float]] = field(default_factory=list)
    iterations: list[tuple[int, float, float]] = field(default_factory=list)

    def add(self, line: str, now: float) -> None:
        if found := EVALUATION.match(line):
            self.evaluations.append((int(found[1]), float(found[3]), now))
        elif found := ITERATION.match(line):
            self.iterations.append((int(found[1]), float(found[3]), now))

    @property
    def printed_ms(self) -> float | None:
        """Median of the times that it prints, which are those of single steps with --log_interval=1."""
        return median([ms for iteration, ms, _ in self.iterations if iteration >= min(SETTLED, self._last // 2)])

    @property
    def mean_ms(self) -> float | None:
        """Milliseconds of a step from the moments of its lines: the median over stretches between evaluations."""
        stretches: dict[int, list[tuple[int, float]]] = {}
        for iteration, _, moment in self.iterations:
            if iteration:  # the first one compiles
                stretches.setdefault(sum(step <= iteration for step, *_ in self.evaluations), []).append(
                    (iteration, moment)
                )
        means = [
            1000 * (last[1] - first[1]) / (last[0] - first[0])
            for first, *_, last in (stretch for stretch in stretches.values() if len(stretch) > 1)
        ]
        return median(means)

    @property
    def _last(self) -> int:
        return self.iterations[-1][0] if self.iterations else 0

    def loss_results(self, target: float) -> dict[str, Any]:
        """When the target was reached; seconds of training begin after the first iteration, which compiles."""
        first = next((moment for _, _, moment in self.iterations), None)
        if first is None or not self.evaluations:
            return {}
        rows = [
            {"step": step, "val_loss": loss, "seconds": moment - first, "process_seconds": moment - self.began}
            for step, loss, moment in self.evaluations
            if step
        ]
        reached = next((row for row in rows if row["val_loss"] <= target), None)
        return {
            "evaluations": rows,
            "reached": reached,
            "best": min(rows, key=lambda row: row["val_loss"], default=None),
        }


def given_up(losses: list[float]) -> bool:
    """Whether the loss has not improved for PATIENCE evaluations."""
    return len(losses) > PATIENCE and min(losses[-PATIENCE:]) > min(losses[:-PATIENCE])


def run(task: Task, settings: dict[str, Any], done: Callable[[Progress], bool]) -> Progress:
    """Run its train.py with the GPU recipe for Tiny Shakespeare until it ends or `done`.

    Raises:
        UserError: it fails.
    """
    assert task.nanogpt is not None
    flags = [f"--{key}={value}" for key, value in (settings | (TINY_RUN if task.dry else {})).items()]
    command = [sys.executable, "train.py", "config/train_shakespeare_char.py", *flags]
    errors = Path(task.folder) / "nanogpt_errors.txt"
    progress = Progress(time.time())
    with errors.open("w") as stderr:
        process = subprocess.Popen(
            command,
            cwd=task.nanogpt,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
        assert process.stdout is not None
        stopped = False
        try:
            for line in process.stdout:
                progress.add(line, time.time())
                if stopped := done(progress):
                    break
        finally:
            process.kill()
            process.wait()
    if not stopped and not progress.iterations:
        raise UserError(f"nanoGPT's train.py: {(errors.read_text().strip().splitlines() or ['no message'])[-1]}")
    return progress


def time_steps(task: Task) -> None:
    """Job: milliseconds of a step of its GPU recipe, as its train.py prints them at every step."""
    steps = 12 if task.dry else 400
    progress = run(
        task,
        {"log_interval": 1, "eval_interval": 10**9, "eval_iters": 1, "max_iters": steps, "lr_decay_iters": 5000},
        lambda progress: False,
    )
    report({"step_ms": progress.printed_ms, "mean_ms": progress.mean_ms, "steps": steps, "log_interval": 1})


def time_loss(task: Task) -> None:
    """Job: its GPU recipe until an evaluation is at or below the target."""
    intervals = {"eval_interval": 4, "log_interval": 1, "max_iters": 8} if task.dry else {}
    seen = 0

    def done(progress: Progress) -> bool:
        nonlocal seen
        if len(progress.evaluations) == seen:
            return False
        seen = len(progress.evaluations)
        results = progress.loss_results(task.target)
        facts = {"step_ms": progress.mean_ms, "eval_iters": 200, "log_interval": 10, "target": task.target}
        report({**facts, **results})
        losses = [loss for step, loss, _ in progress.evaluations if step]
        return results.get("reached") is not None or given_up(losses)

    run(task, intervals, done)


# --------------------------------------------------------------------------------------------- its model


def time_gpt2(task: Task) -> None:
    """Job: tokens/s of its GPT-2 with fused AdamW and clipping, compiled, on random tokens that stay on the device.

    Measured twice: waiting for the loss of each step, as its bench.py and train.py do, and never waiting.
    """
    import torch

    results: dict[str, Any] = {}
    for batch_size in (12, 64):
        try:
            results[f"{batch_size}x1024"] = loop(task, batch_size)
        except Exception as error:  # out of memory, say: the other batch size is measured nevertheless
            results[f"{batch_size}x1024"] = {"error": f"{type(error).__name__}: {error}"[:500]}
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        report(results)


def loop(task: Task, batch_size: int) -> dict[str, Any]:
    """The loop of its bench.py, with the clipping of its train.py."""
    import torch

    assert task.nanogpt is not None
    if task.nanogpt not in sys.path:
        sys.path.insert(0, task.nanogpt)
    from importlib import import_module

    theirs = import_module("model")
    device = torch.device(task.device)
    if not task.dry:
        torch._dynamo.reset()
    torch.manual_seed(1337)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    sizes = {"block_size": 16, "n_layer": 1, "n_head": 2, "n_embd": 16, "vocab_size": 50} if task.dry else {}
    config = theirs.GPTConfig(**{"block_size": 1024, "dropout": 0.0, "bias": False, "vocab_size": 50304, **sizes})
    model = theirs.GPT(config).to(device)
    optimizer = model.configure_optimizers(1e-1, 6e-4, (0.9, 0.95), device.type)
    forward = model if task.dry else torch.compile(model)
    tokens = torch.randint(config.vocab_size, (2, batch_size, config.block_size), device=device)

    def step() -> Any:
        with torch.autocast(device.type, torch.bfloat16, enabled=not task.dry):
            _, loss = forward(tokens[0], tokens[1])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    began = time.perf_counter()
    step().item()
    compile_seconds = time.perf_counter() - began
    for _ in range(1 if task.dry else 8):
        step().item()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    steps = 2 if task.dry else max(8, 480 // batch_size)
    waiting = [stretch(step, steps // 2, True) for _ in range(2)]
    free = [stretch(step, steps // 2, False) for _ in range(2)]
    tokens_per_step = batch_size * config.block_size
    return {
        "tokens_per_second": tokens_per_step / statistics.median(waiting),
        "tokens_per_second_without_waiting": tokens_per_step / statistics.median(free),
        "first_step_seconds": compile_seconds,
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else None,
    }


def stretch(step: Callable[[], Any], steps: int, waits: bool) -> float:
    """Mean seconds of a step over `steps` steps; with `waits` the host reads the loss of each."""
    began = time.perf_counter()
    for _ in range(steps):
        loss = step()
        if waits:
            loss.item()
    loss.item()
    return (time.perf_counter() - began) / steps
