"""A job of benchmarks.gpu: GPT-2's output head with its loss, forward and backward, by several implementations."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from benchmarks.gpu_measure import times
from benchmarks.gpu_task import Task, report
from utils.errors import typed_line

if TYPE_CHECKING:
    import torch

# The mean loss, (), of hidden states (N, C), the weight of the head (V, C) and targets (N,).
HeadLoss = Callable[["torch.Tensor", "torch.Tensor", "torch.Tensor"], "torch.Tensor"]


def time_heads(task: Task) -> None:
    """Job: milliseconds and memory of each implementation, and how far its gradient is from plain cross-entropy's."""
    import torch

    device = torch.device(task.device)
    rows, width, words = (64, 16, 96) if task.dry else (64 * 1024, 768, 50_304)
    dtype = torch.float32 if task.dry else torch.bfloat16
    torch.manual_seed(0)
    hidden = torch.randn(rows, width, device=device, dtype=dtype, requires_grad=True)
    weight = (torch.randn(words, width, device=device, dtype=dtype) * 0.02).requires_grad_()
    targets = torch.randint(words, (rows,), device=device)
    few = slice(0, min(rows, 4096))
    expected = gradient(plain, hidden[few], weight, targets[few])
    results: dict[str, Any] = {"rows": rows, "width": width, "words": words, "heads": {}}
    seconds: dict[str, list[float]] = {}
    heads = implementations() if task.dry else {**implementations(), "compiled": torch.compile(plain)}
    for round_ in range(task.repeats):
        for name, loss in heads.items():
            found = results["heads"].setdefault(name, {})
            if "error" in found:
                continue
            try:
                if round_ == 0:
                    difference = gradient(loss, hidden[few], weight, targets[few]) - expected
                    found["gradient_difference"] = float(difference.norm() / expected.norm())
                    if device.type == "cuda":
                        torch.cuda.reset_peak_memory_stats(device)
                step = functools.partial(gradient, loss, hidden, weight, targets)
                seconds.setdefault(name, []).extend(times(step, device, 2 if task.dry else 10))
            except (RuntimeError, TypeError, NotImplementedError) as error:  # not in this torch, or out of memory
                found["error"] = typed_line(error)[:300]
                continue
            found["ms"] = 1000 * statistics.median(seconds[name])
            if device.type == "cuda" and round_ == 0:
                found["peak_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
            report(results)
    report(results)


def gradient(loss: HeadLoss, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Compute both gradients; returns that of the weight, (V, C)."""
    import torch

    _, grad_weight = torch.autograd.grad(loss(hidden, weight, targets), (hidden, weight))
    return grad_weight.float()


def implementations() -> dict[str, HeadLoss]:
    """The installed implementations by name: torch has its own after 2.12, and Liger is a separate package."""
    import torch
    import torch.nn.functional as F

    from utils.nn.cross_entropy import chunked_cross_entropy, rows_at_once

    def ours(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        rows = rows_at_once(hidden.device, len(targets), len(weight)) or len(targets)
        return chunked_cross_entropy(hidden, weight, targets, rows)

    heads: dict[str, HeadLoss] = {"ours": ours}
    if hasattr(F, "linear_cross_entropy"):
        options = torch.nn.LinearCrossEntropyOptions()  # type: ignore[attr-defined, unused-ignore]
        heads["torch"] = functools.partial(F.linear_cross_entropy, options=options)
    try:
        from liger_kernel.transformers import (  # type: ignore[import-not-found]
            LigerFusedLinearCrossEntropyLoss,
        )
    except ImportError:
        return heads
    liger = LigerFusedLinearCrossEntropyLoss()
    heads["liger"] = lambda hidden, weight, targets: liger(weight, hidden, targets)
    return heads


def plain(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    import torch.nn.functional as F

    return F.cross_entropy(F.linear(hidden, weight).float(), targets)
