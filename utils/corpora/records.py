"""Records next to token files, thanks to which an unchanged corpus is neither read nor hashed again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from utils.files import read_json, write_json


@dataclass(frozen=True)
class TokenRecord:
    """How a text was encoded.

    stamp: state of the text's files when it was read (`Source.stamp`).
    corpus_hash: sha256 of the text.
    tokenizer: the JSON form of the tokenizer.
    n_tokens: number of tokens in the token file.
    crc32: checksum of the token file; None in older records, whose files are not trusted.
    verified: state of the token file when its checksum was last verified (`file_state`).
    byte_scale: bytes of the text divided by the bytes that its tokens decode to; None in older records.
    """

    stamp: str
    corpus_hash: str
    tokenizer: Mapping[str, Any]
    n_tokens: int
    crc32: int | None = None
    verified: str | None = None
    byte_scale: float | None = None


def file_state(path: Path) -> str:
    """A text that changes whenever the file is modified.

    Raises:
        OSError: the file cannot be accessed.
    """
    facts = path.stat()
    return f"{facts.st_ino} {facts.st_size} {facts.st_mtime_ns} {facts.st_ctime_ns}"


def record_path(folder: Path, source: str, tokenizer: str) -> Path:
    """Path of the record for a source and a tokenizer.

    Args:
        folder: folder of the token files.
        source: name of the source.
        tokenizer: hash of the tokenizer, or the settings to build it with.
    """
    key = hashlib.sha256(json.dumps([source, tokenizer]).encode()).hexdigest()
    return folder / f"{key[:16]}.json"


def read_record(path: Path, stamp: str | None) -> TokenRecord | None:
    """The record at `path`; None if it is missing or damaged, or if its stamp is not `stamp`."""
    try:
        record = TokenRecord(**read_json(path))
    except (OSError, ValueError, TypeError):
        return None
    whole = isinstance(record.corpus_hash, str) and len(record.corpus_hash) == 64 and isinstance(record.n_tokens, int)
    return record if whole and record.stamp == stamp else None


def write_record(path: Path, record: TokenRecord) -> None:
    """Replace the record at `path`.

    Raises:
        OSError: the record cannot be written.
    """
    write_json(path, asdict(record))
