"""Cleaning: named steps that remove a document, or change its text, and count what they did.

A pipeline is a file such as configs/cleaning.yaml. `Pipeline.apply` runs the steps that look at one document alone, in
worker processes if need be; `exact_duplicates` and `near_duplicates` compare documents and are for
`utils.preparation.duplicates`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from utils.corpora.steps import Step


@dataclass(frozen=True)
class Cleaned:
    """What a pipeline made of one document.

    text: the cleaned text; None if a step removed the document.
    removed_by: name of the step that removed it.
    counts: name of a step -> how many things (`Step.unit`) it removed or changed in the text; a step that found nothing
        is left out.
    examples: name of a step -> an excerpt of what it removed or changed; secrets and addresses masked.
    """

    text: str | None
    removed_by: str | None = None
    counts: Mapping[str, int] = field(default_factory=dict)
    examples: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Pipeline:
    """Steps in order; can be pickled.

    steps: those that look at one document alone.
    exact_duplicates: whether a document that equals an earlier one is removed.
    near_duplicates: the similarity from which a document repeats an earlier one and is removed; None: it stays.
    """

    steps: Sequence[Step]
    exact_duplicates: bool = False
    near_duplicates: float | None = None

    def apply(self, text: str) -> Cleaned:
        """Clean one document: a pure function of its text."""
        raise NotImplementedError

    def to_json(self) -> list[dict[str, Any]]:
        """The steps with all their thresholds, in order: what dataset.json and the caches of prepare.py record."""
        raise NotImplementedError


def load_pipeline(path: Path) -> Pipeline:
    """The pipeline of a YAML or JSON file: a list of step names, each with its thresholds.

    Raises:
        ConfigError: it cannot be read, or names an unknown step or threshold; with file and line and the nearest name.
        UserError: a package that a step needs is not installed.
    """
    raise NotImplementedError


class CleaningReport:
    """Counts and examples of a pipeline over the documents of a dataset, for report.json and CARD.md.

    Documents are added in their order in the dataset, so the same documents give the same report.
    """

    def __init__(self, pipeline: Pipeline) -> None:
        raise NotImplementedError

    def add(self, cleaned: Cleaned) -> None:
        """Count one document."""

    def add_removed(self, step: str, example: str) -> None:
        """Count a document that `exact_duplicates` or `near_duplicates` removed."""

    def to_json(self) -> list[dict[str, Any]]:
        """For each step in order: `step`, `settings`, `documents_removed`, `documents_changed`, `count`, `unit`,
        `examples`."""
        raise NotImplementedError

    def lines(self) -> list[str]:
        """The same as Markdown, which the terminal can show too."""
        raise NotImplementedError
