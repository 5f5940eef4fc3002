"""Export a model in a format of other programs: hf, gguf or onnx."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from model import LanguageModel
from utils.errors import UserError
from utils.formats.certificate import check_export
from utils.formats.gguf import export_gguf
from utils.formats.huggingface import export_huggingface
from utils.formats.onnx_export import export_onnx
from utils.formats.source import Source
from utils.formats.table import FormatError

GGUF_TYPES = {"float32": "F32", "float16": "F16", "q8_0": "Q8_0"}
HUGGINGFACE_TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def export_as(
    source: Source, format: str, folder: Path, dtype: str, shard_bytes: int, licence: str | None
) -> dict[str, Any]:
    """Write a model in a format (hf, gguf or onnx), with its certificate.

    Returns:
        What the function of the format returns, and `certificate`.

    Raises:
        UserError: the format cannot hold the model; raised before anything is written.
        DisagreementError: the program that the format is for computes something else; the export is deleted.
    """
    known = {"hf": [*HUGGINGFACE_TYPES], "gguf": [*GGUF_TYPES], "onnx": ["float32"]}[format]
    if dtype not in known:
        raise UserError(f"--dtype {dtype}: the format {format} supports {', '.join(known)}")
    check_numbers(source.model, dtype)
    certificate: dict[str, Any] = {}

    def certify(written: Path) -> None:
        certificate.update(check_export(written, source))

    if format == "onnx":
        found = export_onnx(source, folder, licence=licence, check=certify)
    elif format == "gguf":
        found = export_gguf(source, folder, kind=GGUF_TYPES[dtype], licence=licence, check=certify)
    else:
        kind = HUGGINGFACE_TYPES[dtype]
        found = export_huggingface(source, folder, dtype=kind, shard_bytes=shard_bytes, licence=licence, check=certify)
    return {**found, "certificate": certificate}


def check_numbers(model: LanguageModel, dtype: str) -> None:
    """Raises FormatError if weights are not finite, or too large for float16 if that is `dtype`."""
    largest = torch.finfo(torch.float16).max if dtype == "float16" else math.inf
    for name, tensor in model.state_dict().items():
        if not (most := float(tensor.abs().max())) < math.inf:
            raise FormatError(f"{name} has numbers that are not finite, so no program could use the export")
        if most > largest:
            raise FormatError(
                f"--dtype float16 cannot hold {name}: its largest number is {most:.4g}, that of float16 {largest:,.0f}"
            )
