"""Whether two runs are equal bit by bit: weights, optimizer state, export, and everything logged but times."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from utils.checkpoints.files import Checkpoint, read_checkpoint
from utils.checkpoints.folder import WEIGHTS_FILE, list_checkpoints
from utils.runs.layout import CHECKPOINTS, EXPORT, LOGS
from utils.runs.log import LOG_FILES, read_records
from utils.runs.metrics import NOT_METRICS

TIMINGS = frozenset(("time", "step_ms", "tokens_per_second"))
STATE_TIMINGS = frozenset(("time", "log_offsets", "config_hash"))  # offsets depend on the digits of times


def last_checkpoint(run: Path) -> Checkpoint:
    """The newest checkpoint of a run."""
    return read_checkpoint(list_checkpoints(run / CHECKPOINTS)[0][1])


def log_without_times(run: Path) -> list[dict[str, Any]]:
    """All records of all logs of a run, without values that depend on the clock or the machine."""
    return [
        {"log": name, **{key: value for key, value in record.items() if key not in TIMINGS}}
        for name in LOG_FILES
        for record in read_records(run / LOGS / name)
        if not is_system_record(record)
    ]


def is_system_record(record: Mapping[str, Any]) -> bool:
    """Whether a record holds system metrics and nothing else."""
    numbers = record.keys() - NOT_METRICS
    return bool(numbers) and all(name.startswith("system/") for name in numbers)


def differing_bits(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> int:
    """The number of bits that differ between tensors of the same name; all bits of a tensor that only one side has."""
    count = 0
    for name in one.keys() | other.keys():
        a, b = one.get(name), other.get(name)
        if a is None or b is None or a.shape != b.shape or a.dtype != b.dtype:
            count += 8 * sum(t.numel() * t.element_size() for t in (a, b) if t is not None)
            continue
        different = a.reshape(-1).view(torch.uint8) ^ b.reshape(-1).view(torch.uint8)
        count += int(sum(((different >> bit) & 1).sum() for bit in range(8)))
    return count


def differences(one: Path, other: Path) -> dict[str, int]:
    """How two runs differ: bits of weights, optimizer state and export; records of the logs; facts of the state."""
    a, b = last_checkpoint(one), last_checkpoint(other)
    log_a, log_b = log_without_times(one), log_without_times(other)
    exports = [load_file(run / EXPORT / WEIGHTS_FILE) for run in (one, other)]
    states = [{k: v for k, v in c.state.items() if k not in STATE_TIMINGS} for c in (a, b)]
    return {
        "weight bits": differing_bits(a.weights, b.weights),
        "optimizer bits": differing_bits(a.optimizer_tensors, b.optimizer_tensors),
        "export bits": differing_bits(*exports),
        "log records": sum(x != y for x, y in zip(log_a, log_b, strict=False)) + abs(len(log_a) - len(log_b)),
        "state facts": sum(states[0].get(key) != states[1].get(key) for key in states[0].keys() | states[1].keys()),
    }
