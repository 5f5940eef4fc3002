"""What evaluate.py found about a run: artifacts/evaluations.jsonl, one JSON object a line, which is only appended to.

Every evaluation has

    time                 when it was made (UTC)
    step, weights        of the weights, and their precision
    data, data_hash      what was evaluated, for people and by its content
    loss, perplexity, bits_per_byte, tokens, bytes      of a text, or
    task, accuracy, problems                            of a task with a right answer, or
    task, metrics, task_version, few_shot, limit, harness, ...    of lm-evaluation-harness; data_hash is of the
                                                        documents, prompts and answers, and accuracy and bits_per_byte
                                                        are those of metrics, where a task has them
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from utils.files import open_regular
from utils.locks import folder_lock
from utils.runs.layout import EVALUATIONS
from utils.runs.log import LogWriter, truncate
from utils.runs.metrics import encode_number
from utils.terminal.words import loss_text

READ_BYTES = 1 << 20  # from the end of the file: some thousand evaluations
MOST_TEXTS = 3  # that are named in a few words
NUMBERS = ("loss", "perplexity", "bits_per_byte", "accuracy")


def append_evaluation(run: Path, evaluation: Mapping[str, Any]) -> None:
    """Add one line to the evaluations of a run; other processes may do the same, and the run may be in training.

    Raises:
        OSError: it cannot be written.
    """
    path = run / EVALUATIONS
    path.parent.mkdir(exist_ok=True)
    with folder_lock(path.parent):
        truncate(path)  # a line that a killed process left unfinished
        writer = LogWriter(path)
        try:
            writer.write([as_json(evaluation)])
            writer.sync()
        finally:
            writer.close()


def as_json(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """An evaluation with its numbers as JSON can hold them."""
    return {
        key: encode_number(value) if isinstance(value, float) else as_json(value) if key == "metrics" else value
        for key, value in evaluation.items()
    }


def read_evaluations(run: Path) -> tuple[list[dict[str, Any]], str | None]:
    """The evaluations of a run, oldest first, and what is wrong with the file; None: nothing.

    A line that is no evaluation hides no other one.
    """
    path = run / EVALUATIONS
    try:
        with open_regular(path, run) as file:
            start = max(0, os.fstat(file.fileno()).st_size - READ_BYTES)
            file.seek(start)
            lines = file.read(READ_BYTES).split(b"\n")[:-1]  # a torn last line is being written
    except FileNotFoundError:
        return [], None
    except OSError as error:
        return [], f"{EVALUATIONS} cannot be read: {error.strerror}"
    found, bad = [], 0
    for line in lines[int(start > 0) :]:
        try:
            found.append(_evaluation(line))
        except (ValueError, TypeError, LookupError, RecursionError):
            bad += 1
    return found, f"{EVALUATIONS} is damaged: {bad} of its lines are no evaluations" if bad else None


def _evaluation(line: bytes) -> dict[str, Any]:
    """The evaluation in a line; raises ValueError, TypeError or LookupError if it is something else."""
    record = json.loads(line)
    for key in ("time", "data"):
        if not isinstance(record[key], str):
            raise ValueError(key)
    for key in NUMBERS:
        if record.get(key) is not None:
            record[key] = float(record[key])
    if not {"accuracy", "loss", "metrics"} & record.keys():
        raise ValueError("no result")
    if "metrics" in record:
        record["metrics"] = {str(name): float(value) for name, value in record["metrics"].items()}
    return dict(record)


def newest_evaluations(evaluations: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The last evaluation of each text and task by each kind of weights, newest first."""
    found: dict[Any, Mapping[str, Any]] = {}
    for evaluation in reversed(evaluations):
        key = tuple(json.dumps(evaluation.get(name)) for name in ("data", "data_hash", "task", "step", "weights"))
        found.setdefault(key, evaluation)
    return list(found.values())


def result_text(evaluation: Mapping[str, Any]) -> str:
    """The result that compares with other runs: bits per byte of a text, the share of right answers, or a metric."""
    accuracy, bits = evaluation.get("accuracy"), evaluation.get("bits_per_byte")
    if accuracy is not None:
        return f"{accuracy:.2%}"
    if bits is None and (metrics := evaluation.get("metrics")):
        return next(f"{name} {value:.4f}" for name, value in metrics.items())
    return loss_text(bits)


def evaluations_text(evaluations: Sequence[Mapping[str, Any]]) -> str:
    """The newest results in a few words, each text once: "notes.txt 2.0145, arithmetic 99.40%"."""
    by_data: dict[str, str] = {}
    for evaluation in newest_evaluations(evaluations):
        by_data.setdefault(str(evaluation["data"]), result_text(evaluation))
    texts = [f"{data} {result}" for data, result in by_data.items()]
    return ", ".join([*texts[:MOST_TEXTS], *(["..."] if len(texts) > MOST_TEXTS else [])])
