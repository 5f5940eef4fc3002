"""The options of a preparation, and its outcome."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from tokenizer import Tokenizer
from utils.config.settings import DataConfig
from utils.corpora.cleaning import CleaningReport, Pipeline
from utils.corpora.readers import Reading, where
from utils.corpora.source_files import SourceFile
from utils.preparation.documents import Documents
from utils.preparation.reading import EXAMPLES, Part

FORMAT = 1  # to be raised when the parts in the work folder, or the results of the passes, change
VERSIONS = ("numpy", "tokenizers", "tiktoken")  # packages that token ids depend on
SETTINGS = ("tokenizer", "bpe_vocab_size", "special_tokens", "unknown_token", "val_fraction")


@dataclass(frozen=True)
class Preparation:
    """The dataset to make, from the options of the command line.

    target: the folder of the dataset.
    config: gives the tokenizer and val_fraction.
    tolerated: how many records without a text may be left out.
    leaks: whether to look for validation documents that nearly equal a training document.
    notes: the user's notes on the dataset: `licence`, `origin`.
    replace: whether an existing dataset of this name may be replaced.
    """

    sources: Sequence[str]
    target: Path
    config: DataConfig
    reading: Reading = field(default_factory=Reading)
    tolerated: int = 0
    pipeline: Pipeline | None = None
    leaks: bool = True
    workers: int = 1
    notes: dict[str, str] = field(default_factory=dict)
    replace: bool = False
    dry_run: bool = False

    @property
    def work_target(self) -> Path:
        """The path from which the work folder takes its name: another one for a dry run than for the dataset."""
        return self.target.with_name(f"{self.target.name}.dry") if self.dry_run else self.target

    @property
    def fingerprints(self) -> bool:
        return self.leaks or self.threshold is not None or self.exact

    @property
    def exact(self) -> bool:
        return self.pipeline is not None and self.pipeline.exact_duplicates

    @property
    def threshold(self) -> float | None:
        return self.pipeline.near_duplicates if self.pipeline is not None else None

    def settings(self) -> dict[str, Any]:
        """All settings that the contents of the dataset depend on, except for the cleaning."""
        values = self.config.model_dump(mode="json", include=set(SETTINGS))
        reading = {key: value for key, value in asdict(self.reading).items() if key != "corpora_dir"}
        return {**values, **reading, "tolerated": self.tolerated, "leaks": self.leaks}

    def plan(self, files: Sequence[SourceFile], tokenizer: Tokenizer | None) -> dict[str, Any]:
        """Equal for two preparations that make the same dataset, as far as this is known before the files are read."""
        return {
            "format": FORMAT,
            "settings": self.settings(),
            "notes": self.notes,
            "cleaning": [] if self.pipeline is None else self.pipeline.to_json(),
            "tokenizer_hash": None if tokenizer is None else tokenizer.hash(),
            "sources": [[file.path, file.bytes] for file in files],
            "versions": versions(),
        }


@dataclass
class Outcome:
    """The outcome of a preparation for the documents, from which the report is made.

    parts: parts of the first pass. bases: for each part, the number of records before it in the same file.
    left_out: reason -> number of records, and the first places.
    duplicates: number of documents that repeat an earlier one. single: whether one text was split by position.
    """

    files: Sequence[SourceFile]
    parts: list[Part] = field(default_factory=list)
    bases: list[int] = field(default_factory=list)
    cleaning: CleaningReport | None = None
    duplicates: int = 0
    single: bool = False
    documents: Documents | None = None
    left_out: dict[str, tuple[int, list[str]]] = field(default_factory=dict)

    def place(self, options: Preparation, number: int) -> str:
        """The place of a document in its source, in words."""
        assert self.documents is not None
        part, index = self.documents.place(number)
        row = part.documents[index]
        return where(self.files[row["source"]], options.reading, int(row["record"]))

    def summary(self, options: Preparation) -> dict[str, Any]:
        """The part of report.json that does not depend on tokens."""
        assert self.documents is not None
        train, val = self.documents.kept(False), self.documents.kept(True)
        pairs = list(self.documents.leaks.items())
        return {
            "sources": [{"path": file.path, "kind": file.kind, "bytes": file.bytes} for file in self.files],
            "documents_read": sum(part.found for part in self.parts),
            "documents_kept": 1 if self.single else len(train) + len(val),
            "split": "by position" if self.single else "by the hash of each document",
            "left_out": {
                reason: {"count": count, "examples": examples[:EXAMPLES]}
                for reason, (count, examples) in self.left_out.items()
            },
            "cleaning": [] if self.cleaning is None else self.cleaning.to_json(),
            "duplicates": self.duplicates,
            "leaks": {
                "looked_for": options.leaks and not self.single,
                "documents": len(pairs),
                "share": len(pairs) / len(val) if len(val) else 0.0,
                "examples": [
                    {"val": self.place(options, int(val[a])), "train": self.place(options, int(train[b]))}
                    for a, b in pairs[:EXAMPLES]
                ],
            },
            "notes": options.notes,
        }


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that token ids depend on."""
    found = {"python": platform.python_version()}
    for name in VERSIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
