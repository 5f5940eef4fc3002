"""The figures of benchmarks.gpu: what was measured, what it is compared with, and whether it reaches its limit."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from benchmarks.common import verdict

Results = Mapping[str, Mapping[str, Any]]  # by job


@dataclass(frozen=True)
class Figure:
    """One line of the table. Numbers that were not measured are None.

    ours, reference: in `unit`. compared: the number that the limit applies to, such as their ratio; None: no verdict.
    """

    part: str
    name: str
    unit: str = ""
    ours: float | None = None
    reference: float | None = None
    compared: float | None = None
    at_least: float | None = None
    at_most: float | None = None

    @property
    def reached(self) -> bool | None:
        if self.compared is None:
            return None
        return (self.at_least is None or self.compared >= self.at_least) and (
            self.at_most is None or self.compared <= self.at_most
        )

    @property
    def target(self) -> str:
        if self.at_least is not None:
            return f">= {self.at_least:,g}"
        return "" if self.at_most is None else f"<= {self.at_most:,g}"

    def json(self) -> dict[str, Any]:
        limits = {"at_least": self.at_least, "at_most": self.at_most}
        numbers = {"ours": self.ours, "reference": self.reference, "compared": self.compared, **limits}
        return {"part": self.part, "name": self.name, "unit": self.unit, **numbers, "reached": self.reached}


def ratio(one: float | None, other: float | None) -> float | None:
    return one / other if one is not None and other else None


def find(results: Results, job: str, *keys: str) -> Any:
    """The value at a path of keys in the results of a job; None if there is none."""
    found: Any = results.get(job)
    for key in keys:
        found = found.get(key) if isinstance(found, Mapping) else None
    return found


def number(results: Results, job: str, *keys: str) -> float | None:
    """The value at a path of keys in the results of a job, if it is a number."""
    found = find(results, job, *keys)
    return float(found) if isinstance(found, int | float) and not isinstance(found, bool) else None


def arm(results: Results, job: str, name: str, key: str) -> float | None:
    """The median of a value over the repeats of an arm that did not fail."""
    rows = find(results, job, "arms", name) or ()
    values = [row[key] for row in rows if isinstance(row.get(key), int | float)]
    return statistics.median(values) if values else None


def least(values: Iterable[float | None]) -> float | None:
    return min((value for value in values if value is not None), default=None)


def figures(results: Results) -> list[Figure]:
    """All figures, in the order of the table."""
    parts: Sequence[Callable[[Results], list[Figure]]] = (limits, step, loss, gpt2, decode, start, tracking, resume)
    return [figure for part in parts for figure in part(results)]


def limits(results: Results) -> list[Figure]:
    def attention(name: str) -> float | None:
        return number(results, "limits", "attention", f"{name}_ms")

    gemm, copy = number(results, "limits", "gemm", "flops"), number(results, "limits", "copy_bytes_per_second")
    rows = [
        Figure("limits", "bf16 matrix product, median", "TFLOP/s", ratio(gemm, 1e12)),
        Figure("limits", "copy, reads and writes", "GB/s", ratio(copy, 1e9)),
        Figure("limits", "attention, torch's choice", "ms", attention("default")),
    ]
    backends = ("flash", "cudnn", "efficient")
    return [
        *rows,
        *(Figure("limits", f"attention, {name}", "ms", attention(f"{name.upper()}_ATTENTION")) for name in backends),
    ]


def nanogpt_step(results: Results) -> float | None:
    """The least time that nanoGPT's step took in any of its runs."""
    return least(number(results, job, "step_ms") for job in ("nanogpt_step", "nanogpt_step_again", "nanogpt_loss"))


def step(results: Results) -> list[Figure]:
    ours, theirs = arm(results, "steps", "tracked", "step_ms"), nanogpt_step(results)
    share = ratio(ours, theirs)
    return [
        Figure("step", "step, 10.7M, 64x256, tracked, against nanoGPT", "ms", ours, theirs, share, at_most=0.5),
        Figure("step", "the same in milliseconds", "ms", ours, None, ours, at_most=4.0),
        Figure("step", "without CUDA graphs", "ms", arm(results, "steps", "tracked, no graphs", "step_ms"), theirs),
        Figure("step", "the host's time for it", "ms", arm(results, "steps", "tracked", "host_ms")),
        Figure("step", "in a whole run", "ms", number(results, "loss", "step_ms"), theirs),
    ]


def loss(results: Results) -> list[Figure]:
    ours, theirs = (number(results, job, "reached", "seconds") for job in ("loss", "nanogpt_loss"))
    process = [number(results, job, "reached", "process_seconds") for job in ("loss", "nanogpt_loss")]
    best = [number(results, job, "best", "val_loss") for job in ("loss", "nanogpt_loss")]
    runs = [run for run in find(results, "speedrun", "runs") or () if "split_loss" in run]
    complete = runs if len(runs) >= 3 else []
    seconds = statistics.mean(run["seconds"] for run in complete) if complete else None
    worst = max(run["split_loss"] for run in complete) if complete else None
    return [
        Figure("loss", "shakespeare_gpu to 1.47, training", "s", ours, theirs, ratio(ours, theirs), at_most=0.33),
        Figure("loss", "the same with start and compilation", "s", *process),
        Figure("loss", "its best evaluation until then", "nats", *best),
        Figure("loss", "speedrun_gpu, mean of 3 seeds", "s", seconds, None, seconds, at_most=8.0),
        Figure("loss", "its worst loss over the whole split", "nats", worst, None, worst, at_most=1.475),
    ]


def gpt2(results: Results) -> list[Figure]:
    peak = number(results, "limits", "gemm", "flops")
    small = [number(results, job, "tokens_per_second") for job in ("start_cold", "start_warm")]
    small_ours = statistics.median(measured) if (measured := [rate for rate in small if rate]) else None
    small_theirs, large_theirs = (
        number(results, "nanogpt_gpt2", f"{batch}x1024", "tokens_per_second") for batch in (12, 64)
    )
    large, flops = (arm(results, "gpt2", "bf16", key) for key in ("tokens_per_second", "flops"))
    fp8 = arm(results, "gpt2", "fp8", "tokens_per_second")
    fp8_loss, bf16_loss = (arm(results, "gpt2", name, "last_loss") for name in ("fp8", "bf16"))
    memory, saved = (arm(results, "gpt2", name, "peak_gb") for name in ("bf16", "activation_checkpointing"))
    percent = 100 * share if (share := ratio(flops, peak)) is not None else None
    small_ratio, large_ratio = ratio(small_ours, small_theirs), ratio(large, large_theirs)
    return [
        Figure("gpt2", "GPT-2, 12x1024", "tokens/s", small_ours, small_theirs, small_ratio, at_least=1.15),
        Figure("gpt2", "GPT-2, 64x1024", "tokens/s", large, large_theirs, large_ratio, at_least=1.10),
        Figure("gpt2", "its share of the matrix product", "%", percent, None, percent, at_least=60.0),
        Figure("gpt2", "fp8 against bf16, 64x1024", "tokens/s", fp8, large, ratio(fp8, large), at_least=1.15),
        Figure("gpt2", "the same: loss of the last step", "nats", fp8_loss, bf16_loss),
        Figure("gpt2", "peak memory, 64x1024", "GB", memory, number(results, "nanogpt_gpt2", "64x1024", "peak_gb")),
        Figure("gpt2", "with activation checkpointing", "GB", saved, memory),
        *heads(results),
    ]


def heads(results: Results) -> list[Figure]:
    """The output head and its loss, forward and backward, against each other implementation that was measured."""
    found = find(results, "heads", "heads") or {}
    ours, memory = (number(results, "heads", "heads", "ours", key) for key in ("ms", "peak_gb"))
    named = {"compiled": "plain, compiled", "torch": "torch's own", "liger": "Liger's"}
    rows = [
        Figure("gpt2", f"head and loss, against {words}", "ms", ours, number(results, "heads", "heads", name, "ms"))
        for name, words in named.items()
        if name in found
    ]
    peaks = [number(results, "heads", "heads", name, "peak_gb") for name in named]
    return [*rows, Figure("gpt2", "its peak memory, against the least of the others", "GB", memory, least(peaks))]


def decode(results: Results) -> list[Figure]:
    def value(name: str, key: str = "tokens_per_second") -> float | None:
        return number(results, "decode", name, key)

    small = max((rate for w in ("bfloat16", "float32") if (rate := value(f"10.7M {w}"))), default=None)
    large, theirs = value("124M bfloat16"), value("124M transformers")
    times = ratio(large, theirs)
    compiled = number(results, "decode_compiled", "124M transformers, compiled", "tokens_per_second")
    ratios = {size: value(f"{size} bfloat16", "batch_ratio") for size in ("10.7M", "124M")}
    first = value("124M bfloat16", "first_token_ms")
    return [
        Figure("decode", "10.7M, one sequence, faster weights", "tokens/s", small, None, small, at_least=3000.0),
        Figure("decode", "124M, one sequence, bf16", "tokens/s", large, None, large, at_least=1500.0),
        Figure("decode", "the same against transformers", "tokens/s", large, theirs, times, at_least=5.0),
        Figure("decode", "transformers, compiled", "tokens/s", None, compiled),
        Figure("decode", "124M float32", "tokens/s", value("124M float32")),
        *(
            Figure("decode", f"{size}, 64 sequences against 1", "times", batch, None, batch, at_least=30.0)
            for size, batch in ratios.items()
        ),
        Figure("decode", "124M, first token after 200", "ms", first, None, first, at_most=30.0),
        Figure("decode", "10.7M, first token after 200", "ms", value("10.7M bfloat16", "first_token_ms")),
    ]


def start(results: Results) -> list[Figure]:
    """Seconds to the end of the first step (when the second has its gradients), and to its gradients alone."""
    cold, cold_gradients, warm, warm_gradients = (
        number(results, job, key)
        for job in ("start_cold", "start_warm")
        for key in ("seconds", "first_gradients_seconds")
    )
    if cold is None:  # then nothing had filled the caches
        warm = warm_gradients = None
    return [
        Figure("start", "12 layers compiled, cold, first step with recordings", "s", cold, None, cold, at_most=15.0),
        Figure("start", "the same, warm", "s", warm, None, warm, at_most=5.0),
        Figure("start", "cold, gradients of the first step", "s", cold_gradients),
        Figure("start", "warm, gradients of the first step", "s", warm_gradients),
        Figure("start", "compiling, cold", "s", number(results, "start_cold", "compile_seconds")),
    ]


def tracking(results: Results) -> list[Figure]:
    on, off = (arm(results, "steps", name, "step_ms") for name in ("tracked", "untracked"))
    return [Figure("tracking", "all tracking against none", "ms", on, off, ratio(on, off), at_most=1.02)]


def resume(results: Results) -> list[Figure]:
    identical = find(results, "resume", "identical")
    equal = None if identical is None else float(identical)
    return [Figure("resume", "killed and resumed: same weights", "", equal, None, equal, at_least=1.0)]


def table(rows: Sequence[Figure], title: str) -> Table:
    """All figures; numbers that were not measured are blank."""
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("part", style="cyan", no_wrap=True)
    table.add_column("figure", overflow="fold")
    for header in ("ours", "reference", "unit", "compared", "target", "verdict"):
        table.add_column(header, justify="left" if header in ("unit", "verdict") else "right", no_wrap=True)
    before = None
    for row in rows:
        if before not in (None, row.part):
            table.add_section()
        reached = row.reached if row.target else None
        table.add_row(
            row.part if row.part != before else "",
            row.name,
            *(shown(value) for value in (row.ours, row.reference)),
            row.unit,
            shown(row.compared) if row.target else "",
            row.target,
            "" if reached is None else verdict(reached),
        )
        before = row.part
    return table


def shown(value: float | None) -> str:
    """A number with four significant digits; from 1,000 on, rounded to an integer."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
