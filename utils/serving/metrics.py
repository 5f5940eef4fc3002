"""/metrics: what the server has done, as text that Prometheus reads."""

from __future__ import annotations

from collections.abc import Iterator

from utils.serving.engine import Engine, Lane

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
METRICS = (  # name, kind, meaning, value
    ("slots", "gauge", "Texts that can be generated at a time.", lambda lane: lane.batch.slots),
    ("running", "gauge", "Texts that are being generated.", lambda lane: len(lane.batch)),
    ("waiting", "gauge", "Texts that wait for a slot.", lambda lane: len(lane.waiting)),
    ("finished_total", "counter", "Texts that reached their end.", lambda lane: lane.counters.finished),
    ("cancelled_total", "counter", "Texts whose reader went away.", lambda lane: lane.counters.cancelled),
    ("failed_total", "counter", "Texts that ended with an error.", lambda lane: lane.counters.failed),
    ("prompt_tokens_total", "counter", "Tokens of prompts.", lambda lane: lane.counters.prompt_tokens),
    ("generated_tokens_total", "counter", "Tokens generated.", lambda lane: lane.counters.generated_tokens),
    ("steps_total", "counter", "Passes of the model over a batch.", lambda lane: lane.counters.steps),
)


def metrics_text(engine: Engine) -> str:
    """All metrics, a label for each model."""
    lines: list[str] = []
    for name, kind, meaning, value in METRICS:
        lines += _head(name, kind, meaning)
        lines += (f"workbench_{name}{_label(model)} {value(lane)}" for model, lane in engine.lanes.items())
    lines += _head("first_token_seconds", "summary", "From the request to its first token.")
    for model, lane in engine.lanes.items():
        lines += _summary(model, lane)
    return "\n".join([*lines, ""])


def _head(name: str, kind: str, meaning: str) -> list[str]:
    return [f"# HELP workbench_{name} {meaning}", f"# TYPE workbench_{name} {kind}"]


def _summary(model: str, lane: Lane) -> Iterator[str]:
    yield f"workbench_first_token_seconds_sum{_label(model)} {lane.counters.first_token_seconds:.6f}"
    yield f"workbench_first_token_seconds_count{_label(model)} {lane.counters.first_tokens}"


def _label(model: str) -> str:
    escaped = model.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
    return f'{{model="{escaped}"}}'
