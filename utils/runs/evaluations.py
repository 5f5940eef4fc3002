"""Results of evaluate.py for a run: artifacts/evaluations.jsonl, append-only, one JSON object per line.

Every evaluation has

    time                 when it was made (UTC)
    step, weights        the step and the precision of the weights
    data, data_hash      what was evaluated: a name for people, and a hash of the content

and one of

    loss, perplexity, bits_per_byte, tokens, bytes                for a text
    task, accuracy, problems                                      for a task with right answers
    task, metrics, task_version, few_shot, limit, harness, ...    for a task of lm-evaluation-harness; data_hash covers
                                                                  documents, prompts and answers, and accuracy and
                                                                  bits_per_byte repeat those in metrics, if it has them
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

READ_BYTES = 1 << 20  # read from the end of the file: some thousand evaluations
MOST_TEXTS = 3  # results that `evaluations_text` names
NUMBERS = ("loss", "perplexity", "bits_per_byte", "accuracy")


def append_evaluation(run: Path, evaluation: Mapping[str, Any]) -> None:
    """Append one evaluation to those of a run. Safe with several processes and while the run is training.

    Raises:
        OSError: the file cannot be written.
    """
    path = run / EVALUATIONS
    path.parent.mkdir(exist_ok=True)
    with folder_lock(path.parent):
        truncate(path)  # removes a line that a killed process left unfinished
        writer = LogWriter(path)
        try:
            writer.write([as_json(evaluation)])
            writer.sync()
        finally:
            writer.close()


def as_json(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """An evaluation with its numbers encoded for JSON."""
    return {
        key: encode_number(value) if isinstance(value, float) else as_json(value) if key == "metrics" else value
        for key, value in evaluation.items()
    }


def read_evaluations(run: Path) -> tuple[list[dict[str, Any]], str | None]:
    """The evaluations of a run, oldest first, and what is wrong with the file, or None.

    Lines that are not evaluations are skipped.
    """
    path = run / EVALUATIONS
    try:
        with open_regular(path, run) as file:
            start = max(0, os.fstat(file.fileno()).st_size - READ_BYTES)
            file.seek(start)
            lines = file.read(READ_BYTES).split(b"\n")[:-1]  # an incomplete last line is still being written
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
    return found, f"{EVALUATIONS} is damaged: {bad} of its lines are not evaluations" if bad else None


def _evaluation(line: bytes) -> dict[str, Any]:
    """Parse one line; raise ValueError, TypeError or LookupError if it is not an evaluation."""
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
    """The last evaluation of each text or task with each step and precision of weights, newest first."""
    found: dict[Any, Mapping[str, Any]] = {}
    for evaluation in reversed(evaluations):
        key = tuple(json.dumps(evaluation.get(name)) for name in ("data", "data_hash", "task", "step", "weights"))
        found.setdefault(key, evaluation)
    return list(found.values())


def result_text(evaluation: Mapping[str, Any]) -> str:
    """The result to compare with other runs: bits per byte of a text, the share of right answers, or a metric."""
    accuracy, bits = evaluation.get("accuracy"), evaluation.get("bits_per_byte")
    if accuracy is not None:
        return f"{accuracy:.2%}"
    if bits is None and (metrics := evaluation.get("metrics")):
        return next(f"{name} {value:.4f}" for name, value in metrics.items())
    return loss_text(bits)


def evaluations_text(evaluations: Sequence[Mapping[str, Any]]) -> str:
    """The newest result of each text or task, in short: "notes.txt 2.0145, arithmetic 99.40%"."""
    by_data: dict[str, str] = {}
    for evaluation in newest_evaluations(evaluations):
        by_data.setdefault(str(evaluation["data"]), result_text(evaluation))
    texts = [f"{data} {result}" for data, result in by_data.items()]
    return ", ".join([*texts[:MOST_TEXTS], *(["..."] if len(texts) > MOST_TEXTS else [])])
