"""The formats of other programs that a model can be exported in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from utils.errors import UserError
from utils.formats.gguf import export_gguf
from utils.formats.huggingface import export_huggingface
from utils.formats.source import Source

GGUF_TYPES = {"float32": "F32", "float16": "F16", "q8_0": "Q8_0"}
HUGGINGFACE_TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def export_as(
    source: Source, format: str, place: Path, dtype: str, shard_bytes: int, licence: str | None
) -> dict[str, Any]:
    """Write a model in a format: hf or gguf.

    Returns:
        What was written.

    Raises:
        UserError: something of the model that the format cannot hold, before anything is written.
    """
    known = {"hf": [*HUGGINGFACE_TYPES], "gguf": [*GGUF_TYPES]}[format]
    if dtype not in known:
        raise UserError(f"--dtype {dtype}: the format {format} has {', '.join(known)}")
    if format == "gguf":
        return export_gguf(source, place, kind=GGUF_TYPES[dtype], licence=licence)
    return export_huggingface(source, place, dtype=HUGGINGFACE_TYPES[dtype], shard_bytes=shard_bytes, licence=licence)
