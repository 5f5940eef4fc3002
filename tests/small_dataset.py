"""Writes a prepared dataset from lists of short texts."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizer import Tokenizer, build_tokenizer
from utils.config.settings import DataConfig
from utils.corpora.datasets import Dataset, Shard, ShardWriter, Split

TEXTS = [f"document {i}: " + "brown fox. " * (i * i % 7) for i in range(60)]  # 12 to 57 bytes
VALIDATION = [f"validation {i}: " + "lazy dogs sleep. " * (i % 5) for i in range(16)]


def write_dataset(
    folder: Path,
    train: Sequence[str] = TEXTS,
    val: Sequence[str] = VALIDATION,
    *,
    shards: int = 2,
    kind: str = "byte",
    leaks: Sequence[int] = (),
    **config: Any,
) -> Dataset:
    """Write a dataset whose documents are lines of train.txt and val.txt, with `shards` shards in each split."""
    folder.mkdir(parents=True)
    tokenizer = build_tokenizer(DataConfig(tokenizer=kind, **config), ["\0", *train, *val])
    tokenizer.save(folder / "tokenizer.json")
    splits = {}
    for source, (name, texts) in enumerate({"train": train, "val": val}.items()):
        size = -(-len(texts) // shards)
        parts = [
            _shard(folder, tokenizer, name, number, source, texts, range(first, min(first + size, len(texts))))
            for number, first in enumerate(range(0, len(texts), size))
        ]
        splits[name] = Split(parts, sum(len(text.encode()) for text in texts))
    assert tokenizer.end_of_text is not None
    sources = [{"path": "train.txt"}, {"path": "val.txt"}]
    dataset = Dataset(folder, tokenizer.hash(), tokenizer.end_of_text, "uint16", splits, sources, list(leaks))
    dataset.save()
    return dataset


def _shard(
    folder: Path, tokenizer: Tokenizer, split: str, number: int, source: int, texts: Sequence[str], chosen: range
) -> Shard:
    writer = ShardWriter(folder, split, number)
    for place in chosen:
        ids = array("H", [tokenizer.end_of_text or 0, *tokenizer.encode(texts[place])])
        writer.add(memoryview(ids), source, place + 1)
    return writer.close()
