"""Jobs of benchmarks.gpu that measure in their own process: the device's limits, training steps, generation."""

from __future__ import annotations

import gc
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from benchmarks.gpu_task import (
    AS_NANOGPT,
    COMPILER_FACTS,
    NEVER,
    NO_CHECKPOINTS,
    QUIET,
    Overrides,
    Task,
    report,
    warnings_of,
)
from utils.config.fields import FIELDS
from utils.config.loader import LoadedConfig
from utils.errors import UserError, first_line
from utils.runs.layout import EXPORT, LOGS
from utils.runs.run import read_record

if TYPE_CHECKING:
    import torch

NO_CUDA = "no CUDA device here; --dry-run shows whether everything works"
HOST_STEPS = 3  # steps after a wait for the device, during which the host never waits
UNTRACKED: Overrides = {"histogram_interval": "0", "system_interval": "0"}
SEEDS = (1337, 1, 2)


# ------------------------------------------------------------------------------------------------- limits


def measure_limits(task: Task) -> None:
    """Job: the card, the rates of its matrix products and copies, and attention by each backend."""
    import torch

    from utils.machine.device import synchronize
    from utils.machine.limits import measure_copy, measure_read

    if not (task.dry or torch.cuda.is_available()):
        raise UserError(NO_CUDA)
    device = torch.device(task.device)
    results: dict[str, Any] = machine(device)
    report(results)
    size, dtype = (64, torch.float32) if task.dry else (8192, torch.bfloat16)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    seconds = times(lambda: a @ b, device, 3 if task.dry else 60)
    results["gemm"] = {"size": size, "dtype": str(dtype), "flops": 2 * size**3 / statistics.median(seconds)}
    results["gemm"]["best_flops"] = 2 * size**3 / min(seconds)
    report(results)
    results["copy_bytes_per_second"], results["read_bytes_per_second"] = measure_copy(device), measure_read(device)
    report(results)
    results["attention"] = attention(task, device)
    synchronize(device)
    report(results)


def machine(device: torch.device) -> dict[str, Any]:
    """The device, its driver, and the versions of the software."""
    import os

    import torch

    from utils.machine.device import device_facts

    facts: dict[str, Any] = dict(device_facts(device))
    facts |= {"torch": torch.__version__, "python": platform.python_version(), "cores": os.cpu_count()}
    for module in ("triton", "transformers"):
        from importlib.metadata import PackageNotFoundError, version

        try:
            facts[module] = version(module)
        except PackageNotFoundError:
            facts[module] = None
    try:
        query = ["nvidia-smi", "--query-gpu=name,driver_version,power.limit,clocks.max.sm", "--format=csv,noheader"]
        facts["nvidia-smi"] = subprocess.run(query, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        facts["nvidia-smi"] = None
    return facts


def times(call: Callable[[], object], device: torch.device, repeats: int) -> list[float]:
    """Seconds of each call until the device has finished, after a warmup."""
    from utils.machine.device import synchronize

    for _ in range(3):
        call()
    synchronize(device)
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        synchronize(device)
        seconds.append(time.perf_counter() - began)
    return seconds


def attention(task: Task, device: torch.device) -> dict[str, Any]:
    """Milliseconds of causal attention, forward and backward, by torch's choice and by each backend."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    shape, dtype = ((2, 2, 16, 8), torch.float32) if task.dry else ((64, 12, 1024, 64), torch.bfloat16)
    q, k, v = (torch.randn(shape, device=device).to(dtype).requires_grad_() for _ in range(3))  # (B, H, T, D)

    def both_passes() -> None:
        scaled_dot_product_attention(q, k, v, is_causal=True).sum().backward()

    results: dict[str, Any] = {"shape": shape}
    chosen = getattr(torch, "_fused_sdp_choice", lambda *arguments, **keywords: -1)(q, k, v, is_causal=True)
    results["chosen"] = next((name for name, one in SDPBackend.__members__.items() if one.value == chosen), None)
    results["default_ms"] = 1000 * statistics.median(times(both_passes, device, 2 if task.dry else 10))
    for name in ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION"):
        try:
            with sdpa_kernel(SDPBackend.__members__[name]):
                results[f"{name}_ms"] = 1000 * statistics.median(times(both_passes, device, 2 if task.dry else 10))
        except RuntimeError as error:  # not for this device, shape or build
            results[f"{name}_ms"], results[f"{name}_error"] = None, first_line(error)[:200]
    return results


# ------------------------------------------------------------------------------------------------- steps


@dataclass
class StepClock:
    """Times windows of training steps, waiting for the device only at the end of each; ends the run after the last.

    windows: mean milliseconds of a step in each window. host: milliseconds of a step for the host alone.
    """

    device: torch.device
    warmup: int
    steps: int
    window: int
    windows: list[float] = field(default_factory=list)
    host: list[float] = field(default_factory=list)
    _done: int = 0
    _began: float = 0.0

    def step_done(self) -> None:
        """Raises KeyboardInterrupt after the last step, so that nothing is saved and closing takes no time."""
        self._done += 1
        if self._done == 1 and self.device.type == "cuda":
            # After the evaluation, and before a CUDA graph is recorded, whose launches allocate nothing.
            import torch

            torch.cuda.reset_peak_memory_stats()
        place = self._done - self.warmup
        if place < 0:
            return
        if place == 0:
            self._restart()
        elif place % self.window == 0:
            began = self._began
            self._restart()
            self.windows.append(1000 * (self._began - began) / self.window)
        elif place % self.window == HOST_STEPS:
            self.host.append(1000 * (time.perf_counter() - self._began) / HOST_STEPS)
        if place >= self.steps:
            raise KeyboardInterrupt

    def _restart(self) -> None:
        from utils.machine.device import synchronize

        synchronize(self.device)
        self._began = time.perf_counter()

    def results(self) -> dict[str, Any]:
        """step_ms: the mean over all windows, in which histograms are as frequent as in a whole run."""
        return {
            "step_ms": statistics.mean(self.windows),
            "median_ms": statistics.median(self.windows),
            "host_ms": statistics.median(self.host) if self.host else None,
        }


def timed_training(loaded: LoadedConfig, clock: StepClock, tracked: bool = True) -> dict[str, Any]:
    """Train until the clock has its windows.

    Args:
        tracked: False: nothing is logged or tracked.

    Raises:
        UserError: the run ended before the clock had any.
    """
    import torch

    import train
    from utils.training.monitor import Monitor
    from utils.training.session import Session

    step_done = Session.step_done
    losses: dict[str, torch.Tensor] = {}

    def timed_step_done(self: Session, loss: torch.Tensor) -> None:
        losses["last"] = loss  # stays on the device until the end
        step_done(self, loss)
        clock.step_done()

    began = time.perf_counter()
    with ExitStack() as patches:
        patches.enter_context(patch.object(Session, "step_done", timed_step_done))
        if not tracked:
            for name in ("log_step", "step_done"):
                patches.enter_context(patch.object(Monitor, name, lambda *arguments, **keywords: None))
        result = train.train(loaded, quiet=True)
    if not clock.windows:
        raise UserError(f"the run ended as {result.status}: {result.exit_reason}")
    resolved = read_record(result.run_dir).get("resolved") or {}
    facts = {**{key: resolved.get(key) for key in COMPILER_FACTS}, "warnings": warnings_of(result.run_dir)}
    peak = torch.cuda.max_memory_allocated() / 1e9 if clock.device.type == "cuda" else None
    last_loss = losses["last"].item()
    return {**clock.results(), "last_loss": last_loss, "peak_gb": peak, "seconds": time.perf_counter() - began, **facts}


def forget() -> None:
    """Drop what the last run compiled and allocated, so that the next one starts like the first."""
    import torch

    if "torch._dynamo" in sys.modules:  # it takes seconds to import
        torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()  # a run decides by its peak whether to record CUDA graphs


def repeated(
    arms: Mapping[str, Callable[[], dict[str, Any]]], repeats: int, facts: Mapping[str, Any], key: str = "arms"
) -> None:
    """Measure all arms once per repeat, in rotating order, and report after each; if one fails, the others go on."""
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in arms}
    names = list(arms)
    for repeat in range(repeats):
        shift = repeat % len(names)
        for name in names[shift:] + names[:shift]:
            try:
                results[name].append(arms[name]())
            except Exception as error:  # torch can fail in any way (out of memory, a compiler)
                results[name].append({"error": f"{type(error).__name__}: {error}"[:500]})
            forget()
            report({**facts, key: results})


def time_small_steps(task: Task) -> None:
    """Job: a step of the preset shakespeare_gpu with and without tracking, with and without CUDA graphs."""
    import torch
    import torch.utils.tensorboard  # a run imports it in a thread, which would disturb the first arm

    sizes = (3, 8, 4) if task.dry else (150, 500, 50)
    graphs: dict[str, Overrides] = {"": {}}
    if "cuda_graph" in FIELDS:
        graphs = {"": {"cuda_graph": True}, ", no graphs": {"cuda_graph": False}}

    def arm(more: Overrides, tracked: bool) -> Callable[[], dict[str, Any]]:
        def measure() -> dict[str, Any]:
            overrides = (QUIET, NO_CHECKPOINTS, more, {} if tracked else UNTRACKED)
            loaded = task.load("shakespeare_gpu", task.make_folder("step"), *overrides)
            return timed_training(loaded, StepClock(torch.device(task.device), *sizes), tracked)

        return measure

    arms = {
        f"{'tracked' if tracked else 'untracked'}{name}": arm(more, tracked)
        for name, more in graphs.items()
        for tracked in (True, False)
    }
    repeated(arms, task.repeats, {"steps": sizes[1], "window": sizes[2]})


def time_gpt2(task: Task) -> None:
    """Job: GPT-2's shape with micro-batches of 64 x 1,024 tokens, in bfloat16 and with each further setting."""
    import torch

    from model import outline
    from utils.nn.costs import training_flops

    variants: dict[str, Overrides] = {"bf16": {}}
    more = ("activation_checkpointing",) if task.dry else ("fp8", "activation_checkpointing")  # a CPU has no fp8
    variants |= {name: {name: True} for name in more if name in FIELDS}
    batch_size = 64
    sizes: Overrides = {"batch_size": str(batch_size), "gradient_accumulation_steps": "1"}
    lengths = (2, 4, 2) if task.dry else (8, 24, 6)
    facts: dict[str, Any] = {}

    def arm(more: Overrides) -> Callable[[], dict[str, Any]]:
        def measure() -> dict[str, Any]:
            overrides = (QUIET, NO_CHECKPOINTS, UNTRACKED, AS_NANOGPT, sizes, more)
            loaded = task.load("gpt2_124m", task.make_folder("gpt2"), *overrides, text=task.words)
            result = timed_training(loaded, StepClock(torch.device(task.device), *lengths))
            config = loaded.config
            model = outline(config.model, len(set(Path(task.words).read_text(encoding="utf-8"))))
            T, tokens = config.model.block_size, config.train.sequences * config.model.block_size
            flops = training_flops(model, config.train.sequences, T)
            square = 12 * config.model.n_layer * config.model.n_embd * T  # attention as nanoGPT and PaLM count it
            rate = 1000 * tokens / result["median_ms"]
            return {
                **result,
                "tokens_per_second": rate,
                "flops": rate * flops / tokens,
                "flops_as_nanogpt_counts": rate * (6 * (model.num_parameters() - T * config.model.n_embd) + square),
                "vocab_size": model.vocab_size,
            }

        return measure

    repeated({name: arm(more) for name, more in variants.items()}, 1, facts)


# ------------------------------------------------------------------------------------------------- the speedrun


def time_speedrun(task: Task) -> None:
    """Job: the preset speedrun_gpu with three seeds: seconds, and the loss over the whole validation split."""
    import torch

    import train
    from benchmarks.common import split_loss
    from benchmarks.shakespeare import training_seconds
    from data import load_corpus
    from utils.inference.export import load_export

    sizes: Overrides = {"max_iters": "6", "warmup_iters": "0"} if task.dry else {}
    rows: list[dict[str, Any]] = []
    for seed in SEEDS:
        more = ({"eval_interval": NEVER, "sample_tokens": "0", "seed": str(seed)}, sizes)
        loaded = task.load("speedrun_gpu", task.make_folder("speedrun"), *more)
        began = time.perf_counter()
        try:
            result = train.train(loaded, quiet=True)
            config = loaded.config
            export = load_export(result.run_dir / EXPORT, torch.device(task.device))
            corpus = load_corpus(config.data, config.model.block_size, Path(config.data.corpora_dir))
            rows.append(
                {
                    "seed": seed,
                    "steps": result.steps,
                    "seconds": training_seconds(result.run_dir / LOGS),
                    "process_seconds": time.perf_counter() - began,
                    "split_loss": split_loss(export.model, corpus.split("val")),
                    "estimate": result.val_loss,
                }
            )
        except Exception as error:  # the other seeds are measured nevertheless
            rows.append({"seed": seed, "error": f"{type(error).__name__}: {error}"[:500]})
        forget()
        report({"runs": rows})
