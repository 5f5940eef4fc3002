"""Is a change more than noise? Train two settings with three seeds each, and print their losses.

    python -m examples.compare_seeds

For a verdict with a significance test, run `python experiments.py compare RUN ...` with the runs that it prints.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Any

from workbench import Run, train

VARIANTS: dict[str, dict[str, Any]] = {"base": {}, "faster": {"learning_rate": 3e-3}}


def train_variant(name: str, changes: dict[str, Any], seeds: Iterable[int], **settings: Any) -> list[Run]:
    """Train a run for each seed, with `changes` on top of `settings`."""
    results = [train(settings, **changes, seed=seed, run_tag=f"{name}-{seed}", quiet=True) for seed in seeds]
    return [Run(result.run_dir) for result in results]


def compare(seeds: Iterable[int] = (1, 2, 3), **settings: Any) -> dict[str, list[float]]:
    """Train all variants, then print and return their last validation losses, in nats per token."""
    seeds, losses = list(seeds), {}
    for name, changes in VARIANTS.items():
        runs = train_variant(name, changes, seeds, **settings)
        losses[name] = [run.summary["val/loss"] for run in runs]
        spread = f" +- {statistics.stdev(losses[name]):.4f}" if len(runs) > 1 else ""
        print(f"{name:<8}{statistics.mean(losses[name]):.4f}{spread}  {', '.join(run.id for run in runs)}")
    return losses


if __name__ == "__main__":
    compare(max_iters=400, eval_interval=100)
