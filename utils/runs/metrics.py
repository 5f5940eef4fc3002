"""The registry of metrics: the names that the log accepts, each with its unit, direction and views."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from utils.files import read_json, write_json

Direction = Literal["lower", "higher", "none"]  # which way is better

VIEWS = ("tensorboard", "aim", "wandb")  # the trackers that can be fed from the logs

# The same losses per byte of text instead of per token, to compare runs with different tokenizers.
BITS_PER_BYTE = {
    "train/loss": "train/bits_per_byte",
    "train/eval_loss": "train/eval_bits_per_byte",
    "val/loss": "val/bits_per_byte",
}

NOT_METRICS = frozenset(("step", "time"))  # fields that every record has
NOT_METRICS_OF_AIM = frozenset(("sample", "curves"))  # names of texts and pictures: Aim allows one type per name


@dataclass(frozen=True)
class Metric:
    """A number that a record of metrics.jsonl may have.

    name: `split/name` or `name`; the TensorBoard tag. Aim shows `split` as context {subset: split}.
    unit: unit of the value; "nats" for losses, "1" for a number without a unit.
    direction: which way is better.
    views: the views, of VIEWS, that show the metric.
    reproducible: whether repeating the run must give the same numbers; False for times and measurements of the machine.

    >>> metric = Metric("val/perplexity", unit="1", direction="lower")
    >>> metric.subset, metric.short_name
    ('val', 'perplexity')
    """

    name: str
    unit: str
    direction: Direction = "none"
    views: tuple[str, ...] = VIEWS
    reproducible: bool = True

    @property
    def subset(self) -> str | None:
        return self.name.partition("/")[0] if "/" in self.name else None

    @property
    def short_name(self) -> str:
        return self.name.partition("/")[2] or self.name


_REGISTRY: dict[str, Metric] = {}


def register_metric(metric: Metric) -> Metric:
    """Make the log accept `metric.name`; registering an equal metric again does nothing.

    Raises:
        ValueError: another metric has this name, the name is reserved (NOT_METRICS, NOT_METRICS_OF_AIM), or there is
            no such view or direction.

    >>> register_metric(Metric("val/perplexity", "1", "lower")).name
    'val/perplexity'
    """
    if metric.name in NOT_METRICS:
        raise ValueError(f"no metric can be named {metric.name}: every record already has a field of that name")
    if metric.name in NOT_METRICS_OF_AIM and "aim" in metric.views:
        raise ValueError(f"no metric in Aim can be named {metric.name}: that name is used for another part of a run")
    if unknown := set(metric.views) - set(VIEWS):
        raise ValueError(
            f"metric {metric.name}: unknown view {', '.join(sorted(unknown))}; the views are {', '.join(VIEWS)}"
        )
    if metric.direction not in get_args(Direction):
        raise ValueError(f"metric {metric.name}: direction {metric.direction!r} is not one of {get_args(Direction)}")
    if _REGISTRY.setdefault(metric.name, metric) != metric:
        known = f"metric {metric.name} is registered already, as {_REGISTRY[metric.name]}"
        raise ValueError(f"{known}; choose another name, or restart Python if you have changed this one")
    return metric


for _metric in (
    Metric("train/loss", "nats", "lower"),
    Metric("train/eval_loss", "nats", "lower"),
    Metric("val/loss", "nats", "lower"),
    Metric("lr", "1"),
    Metric("grad_norm", "1"),
    Metric("train/bits_per_byte", "bits/byte", "lower", views=()),  # no views: it is train/loss in another unit
    Metric("train/eval_bits_per_byte", "bits/byte", "lower"),
    Metric("val/bits_per_byte", "bits/byte", "lower"),
    Metric("val/loss_without_leaks", "nats", "lower"),  # last evaluation only
    Metric("val/accuracy", "1", "higher"),  # share of answers that are right in full
    Metric("tokens", "tokens", views=()),
    Metric("tokens_per_second", "tokens/s", "higher", reproducible=False),
    Metric("step_ms", "ms", "lower", views=("tensorboard",), reproducible=False),  # 1 / tokens_per_second
    Metric("system/process_cpu", "%", reproducible=False),  # 100% means one core
    Metric("system/process_memory", "MiB", reproducible=False),
    Metric("system/gpu_utilization", "%", reproducible=False),
    Metric("system/gpu_memory", "MiB", reproducible=False),
    Metric("system/disk_free", "GiB", reproducible=False),
):
    register_metric(_metric)


def metric(name: str) -> Metric:
    """The registered metric of this name.

    Raises:
        KeyError: there is no such metric.
    """
    if name not in _REGISTRY:
        raise KeyError(f"metric {name!r} is not registered: call register_metric(Metric({name!r}, unit))")
    return _REGISTRY[name]


def registered_metrics() -> list[str]:
    """The names that the log accepts."""
    return list(_REGISTRY)


def is_reproducible(name: str) -> bool:
    """Whether repeating the run must give the same numbers for this metric; True for an unknown name."""
    return name not in _REGISTRY or _REGISTRY[name].reproducible


def shown_metrics(record: Mapping[str, Any], view: str) -> Iterator[tuple[Metric, float]]:
    """Yield the metrics of a record of metrics.jsonl that a view shows, with their values.

    Raises:
        KeyError: a name is not registered.
    """
    for name, value in record.items():
        if name not in NOT_METRICS and view in (registered := metric(name)).views:
            yield registered, decode_number(value)


def write_registry(path: Path) -> None:
    """Save all registered metrics as JSON, so that the logs can be read without the code that registered them."""
    write_json(path, [asdict(facts) for facts in _REGISTRY.values()])


def read_registry(path: Path) -> None:
    """Register the metrics in a file of `write_registry`, except known names; does nothing if there is no file."""
    if path.exists():
        for facts in read_json(path):
            _REGISTRY.setdefault(facts["name"], Metric(**{**facts, "views": tuple(facts["views"])}))


def bits_per_byte(loss: float, bytes_per_token: float) -> float:
    """Convert a loss in nats per token to bits per byte of text; infinity if the tokens have no bytes."""
    return loss / math.log(2) / bytes_per_token if bytes_per_token else math.inf


def encode_number(value: float) -> float | str:
    """`value`, or the string "nan", "inf" or "-inf" if it is not finite, which JSON cannot express."""
    return value if math.isfinite(value) else str(float(value))


def decode_number(value: float | str) -> float:
    """The number that `encode_number` has encoded."""
    return float(value)


def metric_record(step: int, time: float, values: Mapping[str, float]) -> dict[str, Any]:
    """The record of metrics.jsonl for `step`.

    Args:
        time: seconds since the epoch.
        values: metrics by registered name.

    Raises:
        KeyError: a name is not registered.
    """
    record: dict[str, Any] = {"step": step, "time": round(time, 4)}
    for name, value in values.items():
        if name not in _REGISTRY:
            metric(name)  # raises
        record[name] = value if math.isfinite(value) else encode_number(value)
    return record
