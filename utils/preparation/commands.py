"""The commands list, show and verify of prepare.py, for existing datasets."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tokenizer import load_tokenizer
from utils.corpora.datasets import TYPES, Dataset, DatasetError, find_dataset, is_dataset, read_dataset
from utils.errors import UserError, nearest
from utils.files import read_json, read_text
from utils.folders import size_of
from utils.packing.prepared import verify_shards
from utils.preparation.report import CARD, REPORT
from utils.preparation.work import holder_text, is_being_prepared
from utils.terminal.tables import plain_table
from utils.terminal.words import counted, size


def work_folders(folder: Path) -> list[tuple[str, Path]]:
    """The name and work folder of each unfinished dataset."""
    found = sorted(folder.glob(".*.preparing"))
    return [(path.name.removeprefix(".").removesuffix(".preparing"), path) for path in found]


def list_datasets(folder: Path) -> list[dict[str, Any]]:
    """One row for each dataset in a folder, finished or not."""
    rows = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if is_dataset(path):
            try:
                rows.append(_row(read_dataset(path)))
            except DatasetError as error:
                rows.append({"name": path.name, "status": "damaged", "problem": str(error)})
    for name, path in work_folders(folder):
        status = "being prepared" if is_being_prepared(path) else "interrupted"
        rows.append({"name": name, "status": status, "disk": size_of(path), "folder": str(path)})
    return rows


def _row(dataset: Dataset) -> dict[str, Any]:
    train, val = dataset.splits["train"], dataset.splits["val"]
    tokenizer = dataset.facts.get("tokenizer", {})
    return {
        "name": dataset.name,
        "status": "ready",
        "tokenizer": tokenizer.get("kind"),
        "vocab_size": tokenizer.get("vocab_size"),
        "documents": train.documents + val.documents,
        "train_tokens": train.tokens,
        "val_tokens": val.tokens,
        "leaks": len(dataset.leaks),
        "disk": size_of(dataset.folder),
        "hash": dataset.hash,
    }


def list_lines(rows: list[dict[str, Any]], folder: Path) -> Iterator[Any]:
    """The rows as a table."""
    if not rows:
        yield f"{folder} has no datasets yet: python prepare.py SOURCE --out NAME makes one"
        return
    table = plain_table(["name", "tokenizer"], ["documents", "train tokens", "val tokens", "disk"])
    table.add_column("status")
    for row in rows:
        kind = f"{row['tokenizer']} {row['vocab_size']:,}" if row.get("tokenizer") else ""
        counts = [f"{row[key]:,}" if key in row else "" for key in ("documents", "train_tokens", "val_tokens")]
        table.add_row(row["name"], kind, *counts, size(row["disk"]) if "disk" in row else "", row["status"])
    yield table
    if any(row["status"] == "interrupted" for row in rows):
        yield "interrupted: to continue, repeat the command that began the preparation"
    yield from (row["problem"] for row in rows if "problem" in row)


def named_dataset(name: str, folder: Path) -> Dataset:
    """The dataset `name` in `folder`, or at the path `name`.

    Raises:
        UserError: there is no such dataset.
    """
    if (path := find_dataset(name, folder)) is not None:
        return read_dataset(Path(os.path.abspath(path)))
    names = [row["name"] for row in list_datasets(folder)]
    if (work := dict(work_folders(folder)).get(name)) is not None:
        if is_being_prepared(work):
            raise UserError(f"{name}: is being prepared by {holder_text(folder / name)}")
        raise UserError(f"{name}: not finished; to continue, repeat the command that began the preparation")
    raise UserError(f"no dataset {name} in {folder}: there is {', '.join(names) or 'none'}{nearest(name, names)}")


def show_dataset(dataset: Dataset) -> dict[str, Any]:
    """All facts about a dataset: its row of the list, its folder and its report."""
    try:
        report = read_json(dataset.folder / REPORT, dataset.folder)
    except (OSError, ValueError):
        report = None
    return {**_row(dataset), "folder": str(dataset.folder), "report": report}


def show_lines(dataset: Dataset) -> Iterator[str]:
    yield str(dataset.folder)
    try:
        yield read_text(dataset.folder / CARD, dataset.folder)
    except (OSError, ValueError) as error:
        yield f"{CARD} cannot be read: {error}"


def verify_dataset(dataset: Dataset) -> list[str]:
    """Read every byte of a dataset and check it.

    Returns:
        A line for each check that passed.

    Raises:
        DatasetError: a check failed.
    """
    tokenizer = load_tokenizer(dataset.tokenizer_path)
    if tokenizer.hash() != dataset.tokenizer_hash:
        raise DatasetError(f"{dataset.tokenizer_path}: not the tokenizer that the dataset was prepared with")
    verify_shards(dataset, tokenizer.vocab_size, thorough=True)
    count, total = sum(1 for _ in dataset.files()), sum(size for _, size, _ in dataset.files())
    for split in dataset.splits.values():
        for shard in split.shards:
            ids = np.memmap(dataset.path(shard), dtype=f"<u{TYPES[dataset.dtype]}", mode="r")
            ends = np.fromfile(dataset.path(shard, "ends"), dtype="<u8").astype(np.int64)
            begins = np.concatenate([[0], ends[:-1]])
            if len(ends) == 0 or ends[-1] != len(ids) or (ends <= begins).any():
                raise DatasetError(f"{dataset.path(shard, 'ends')}: the documents do not cover the shard")
            if (ids[begins] != dataset.end_of_text).any():
                raise DatasetError(f"{dataset.path(shard)}: a document does not begin with the end-of-text token")
    return [
        f"{dataset.name}: {counted(count, 'shard file')}, {size(total)}: all checksums match",
        f"tokenizer.json is the one that the dataset was prepared with ({dataset.tokenizer_hash[:16]})",
        "every document begins with end-of-text, and every token is in the vocabulary",
    ]
