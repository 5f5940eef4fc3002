"""/metrics: counters of the server in the text format of Prometheus."""

from __future__ import annotations

from collections.abc import Iterator

from utils.serving.engine import Engine, ModelQueue

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
METRICS = (  # name, kind, meaning, value
    ("slots", "gauge", "Texts that can be generated at once.", lambda queue: queue.batch.slots),
    ("running", "gauge", "Texts that are being generated.", lambda queue: len(queue.batch)),
    ("waiting", "gauge", "Texts that wait for a slot.", lambda queue: len(queue.waiting)),
    ("finished_total", "counter", "Texts that reached their end.", lambda queue: queue.counters.finished),
    ("cancelled_total", "counter", "Texts whose client disconnected.", lambda queue: queue.counters.cancelled),
    ("failed_total", "counter", "Texts that ended with an error.", lambda queue: queue.counters.failed),
    ("prompt_tokens_total", "counter", "Tokens of prompts.", lambda queue: queue.counters.prompt_tokens),
    ("generated_tokens_total", "counter", "Tokens generated.", lambda queue: queue.counters.generated_tokens),
    ("steps_total", "counter", "Passes of the model over a batch.", lambda queue: queue.counters.steps),
)


def metrics_text(engine: Engine) -> str:
    """All metrics, labelled by model."""
    lines: list[str] = []
    for name, kind, meaning, value in METRICS:
        lines += _head(name, kind, meaning)
        lines += (f"workbench_{name}{_label(model)} {value(queue)}" for model, queue in engine.queues.items())
    lines += _head("first_token_seconds", "summary", "From the request to its first token.")
    for model, queue in engine.queues.items():
        lines += _summary(model, queue)
    return "\n".join([*lines, ""])


def _head(name: str, kind: str, meaning: str) -> list[str]:
    return [f"# HELP workbench_{name} {meaning}", f"# TYPE workbench_{name} {kind}"]


def _summary(model: str, queue: ModelQueue) -> Iterator[str]:
    yield f"workbench_first_token_seconds_sum{_label(model)} {queue.counters.first_token_seconds:.6f}"
    yield f"workbench_first_token_seconds_count{_label(model)} {queue.counters.first_tokens}"


def _label(model: str) -> str:
    escaped = model.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
    return f'{{model="{escaped}"}}'
