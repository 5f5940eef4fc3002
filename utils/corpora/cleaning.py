"""Cleaning: a pipeline of named steps that remove documents or change their text, and count what they did.

A pipeline is described by a file such as configs/cleaning.yaml. `Pipeline.apply` runs the steps that need only one
document; `exact_duplicates` and `near_duplicates` compare documents and are left to `utils.preparation.duplicates`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from utils.config.parse import ConfigError, parse_file
from utils.corpora.steps import COMPARING, STEPS, NearDuplicates, Step, example_text
from utils.errors import SHOWN, cut, nearest, shown
from utils.terminal.words import counted, setting_text

EXAMPLES = 3  # examples of each step in a report
SHOWN_VALUES = 5  # the longest list of values that CARD.md shows in full


@dataclass(frozen=True)
class Cleaned:
    """The result of a pipeline for one document.

    text: the cleaned text; None if a step removed the document.
    removed_by: name of the step that removed the document.
    counts: name of a step -> how many things (`Step.unit`) it removed or changed; omits steps that found nothing.
    examples: name of a step -> one of these things, as one short line without e-mail addresses and secrets.
    """

    text: str | None
    removed_by: str | None = None
    counts: Mapping[str, int] = field(default_factory=dict)
    examples: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Pipeline:
    """A sequence of steps. Can be pickled."""

    steps: Sequence[Step]

    @property
    def exact_duplicates(self) -> bool:
        """Whether documents that equal an earlier one are removed."""
        return any(isinstance(step, COMPARING) for step in self.steps)

    @property
    def near_duplicates(self) -> float | None:
        """The similarity to an earlier document from which a document is removed; None if near duplicates stay."""
        return next((step.threshold for step in self.steps if isinstance(step, NearDuplicates)), None)

    def apply(self, text: str) -> Cleaned:
        """Clean one document, as a pure function of its text. A document that a step leaves blank is removed."""
        counts: dict[str, int] = {}
        examples: dict[str, str] = {}
        for step in self.steps:
            if isinstance(step, COMPARING):
                continue
            result = step.apply(text)
            if result.changes:
                counts[step.name], examples[step.name] = result.changes, example_text(result.example)
            if result.text is None or (result.changes and not result.text.strip()):
                return Cleaned(None, step.name, counts, examples)
            text = result.text
        return Cleaned(text, None, counts, examples)

    def to_json(self) -> list[dict[str, Any]]:
        """The steps in order, each with all its thresholds, for the record of a dataset."""
        return [{"step": step.name, "settings": step.model_dump(mode="json")} for step in self.steps]


def load_pipeline(path: Path, name: str | None = None) -> Pipeline:
    """Load a pipeline from a YAML or JSON file: a list of steps, each a name or a name with its thresholds.

    Args:
        path: the file.
        name: its name in messages; by default the path.

    Raises:
        ConfigError: the file cannot be read, or has an unknown step or threshold; the message gives file, line and the
            nearest name.
        UserError: a package that a step needs is not installed.
    """
    name = name or str(path)
    document, lines = parse_file(path, name)
    if not isinstance(document, list) or not document:
        raise ConfigError(f"{name}:1: expected a list of steps ({', '.join(STEPS)})")
    steps: list[Step] = []
    first: dict[str, int] = {}
    for number, item in enumerate(document):
        line = lines.get(id(document), {}).get(str(number), 1)
        thresholds: Any = None
        if isinstance(item, dict) and len(item) == 1:
            line = next(iter(lines[id(item)].values()))
            ((item, thresholds),) = item.items()
        if not isinstance(item, str):
            raise ConfigError(f"{name}:{line}: expected the name of a step, or a name with its thresholds")
        if item not in STEPS:
            known = nearest(item, STEPS) or f" ({', '.join(STEPS)})"
            raise ConfigError(f"{name}:{line}: unknown step {cut(item, SHOWN)}{known}")
        if item in first:
            raise ConfigError(f"{name}:{line}: {item} is listed twice (first in line {first[item]})")
        first[item] = line
        steps.append(_step(STEPS[item], thresholds, name, line, lines.get(id(thresholds), {})))
        if len(steps) > 1 and isinstance(steps[-2], COMPARING) and not isinstance(steps[-1], COMPARING):
            raise ConfigError(
                f"{name}:{line}: {item} comes after {steps[-2].name}: steps that compare documents must come last"
            )
    if NearDuplicates.name in first and importlib.util.find_spec("rensa") is None:
        raise ConfigError(
            f"{name}:{first[NearDuplicates.name]}: near_duplicates needs the package rensa: pip install rensa"
        )
    return Pipeline(tuple(steps))


def _step(kind: type[Step], thresholds: Any, name: str, line: int, lines: Mapping[str, int]) -> Step:
    """Make a step with the thresholds that a file gives. Raises ConfigError if one is unknown or invalid."""
    if not isinstance(thresholds, dict | None):
        raise ConfigError(f"{name}:{line}: {kind.name}: expected its thresholds by name, got {shown(thresholds)}")
    given = {key: None if value in ("none", "null") else value for key, value in (thresholds or {}).items()}
    for key in given:
        if key not in kind.model_fields:
            known = f" ({', '.join(kind.model_fields)})" if kind.model_fields else ", which has no thresholds"
            raise ConfigError(
                f"{name}:{lines.get(key, line)}: unknown threshold {cut(key, SHOWN)} of {kind.name}"
                f"{nearest(key, kind.model_fields) or known}"
            )
    try:
        return kind(**given)
    except ValidationError as error:
        detail = error.errors(include_url=False)[0]
        key = str(detail["loc"][0])
        cause = detail.get("ctx", {}).get("error")
        words = str(cause) if cause else f"expected {kind.expects[key]}, got {shown(given[key])}"
        raise ConfigError(f"{name}:{lines.get(key, line)}: {kind.name}.{key}: {words}") from None


class CleaningReport:
    """Counts and examples of a pipeline over many documents, for report.json and CARD.md.

    The examples are the first ones, so the same documents in the same order give the same report.
    """

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline
        self.documents = self.kept = 0
        self._removed = dict.fromkeys((step.name for step in pipeline.steps), 0)
        self._changed, self._counts = dict(self._removed), dict(self._removed)
        self._examples: dict[str, list[str]] = {step.name: [] for step in pipeline.steps}

    def add(self, cleaned: Cleaned) -> None:
        """Count one document."""
        self.documents += 1
        self.kept += cleaned.text is not None
        for step, count in cleaned.counts.items():
            self._counts[step] += count
            (self._removed if step == cleaned.removed_by else self._changed)[step] += 1
            self._add_example(step, cleaned.examples[step])

    def add_removed(self, step: str, text: str = "") -> None:
        """Count a duplicate, which was added as kept before, as removed.

        Args:
            step: exact_duplicates or near_duplicates; if the pipeline has only one of them, that one is counted.
            text: the text of the document, for an example; needed only for the first EXAMPLES of a step.
        """
        comparing = [each.name for each in self._pipeline.steps if isinstance(each, COMPARING)]
        step = step if step in comparing else comparing[0]
        self.kept -= 1
        self._removed[step] += 1
        self._counts[step] += 1
        if text:
            self._add_example(step, example_text(text))

    def _add_example(self, step: str, example: str) -> None:
        if len(self._examples[step]) < EXAMPLES and example not in self._examples[step]:
            self._examples[step].append(example)

    def to_json(self) -> list[dict[str, Any]]:
        """For each step in order: name, settings, numbers of documents removed and changed, count, unit, examples."""
        return [
            {
                **step,
                "documents_removed": self._removed[step["step"]],
                "documents_changed": self._changed[step["step"]],
                "count": self._counts[step["step"]],
                "unit": STEPS[step["step"]].unit,
                "examples": self._examples[step["step"]],
            }
            for step in self._pipeline.to_json()
        ]

    def lines(self) -> list[str]:
        """The same as a Markdown list."""
        lines = []
        for step in self.to_json():
            settings = ", ".join(_threshold(key, value) for key, value in step["settings"].items())
            found = []
            if step["documents_removed"]:
                found.append(f"{counted(step['documents_removed'], 'document')} removed")
            if step["documents_changed"]:
                changed = counted(step["documents_changed"], "document")
                things = f"{counted(step['count'], step['unit'])} in {changed}"
                found.append(f"{changed} changed" if step["unit"] == "text" else things)
            title = f"{step['step']} ({settings})" if settings else step["step"]
            lines.append(f"- {title}: {', '.join(found) or 'nothing found'}")
            lines += [f"    - `{example.replace('`', chr(39))}`" for example in step["examples"]]
        return lines


def _threshold(key: str, value: Any) -> str:
    """A threshold as people read it; for a long list its length, since dataset.json has the list."""
    many = isinstance(value, list) and len(value) > SHOWN_VALUES
    return f"{len(value)} {key}" if many else f"{key} {setting_text(value)}"
