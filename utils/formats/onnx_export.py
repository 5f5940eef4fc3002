"""The export for programs that run ONNX: one step of the model, with a cache of fixed capacity."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from utils.errors import UserError
from utils.files import write_atomic
from utils.formats.card import model_card
from utils.formats.folder import MARKER, new_folder
from utils.formats.onnx_graph import write_graph
from utils.formats.pretrained import TOKENIZER
from utils.formats.source import Source
from utils.formats.table import FormatError
from utils.inference.evaluation import evaluating

MODEL = "model.onnx"
PACKAGES = ("onnx", "onnxscript")  # needed by torch.onnx
LOADING = """
import numpy as np
import onnxruntime
from tokenizers import Tokenizer

session = onnxruntime.InferenceSession("PATH/model.onnx")
tokenizer = Tokenizer.from_file("PATH/tokenizer.json")
shape = session.get_inputs()[2].shape  # blocks, 1, heads of keys, capacity, width of a head
keys = values = np.zeros(shape, np.float32)
ids = tokenizer.encode("The ", add_special_tokens=False).ids
new, position = ids, 0
while len(ids) < min(50, shape[3]):
    inputs = {"input_ids": [new], "position": position, "keys": keys, "values": values}
    inputs |= {name: np.array(inputs[name], np.int64) for name in ("input_ids", "position")}
    logits, keys, values = session.run(None, inputs)
    position += len(new)
    new = [int(logits[0, -1].argmax())]
    ids += new
print(tokenizer.decode(ids))
"""
NOTE = (
    "The graph computes one step: input_ids (1, T) follow `position` earlier tokens; keys and values are its cache. "
    "The cache holds {capacity:,} tokens and does not slide."
)


def export_onnx(
    source: Source,
    folder: Path,
    *,
    licence: str | None = None,
    check: Callable[[Path], None] = lambda path: None,
) -> dict[str, Any]:
    """Write a model as an ONNX graph, in float32, with its tokenizer.json.

    Args:
        folder: where to write; an older export is replaced.
        licence: of the weights, for the model card.
        check: called with the hidden folder before it is renamed; if it raises, that is deleted.

    Returns:
        What was written: architecture, folder, files, bytes, dtype, notes.

    Raises:
        UserError: the format cannot hold the model, or a package is missing; raised before anything is written.
    """
    _check_packages()
    config = source.model.config
    if config.ngram_rows:
        rows = ", ".join(map(str, config.ngram_rows))
        raise FormatError(f"an ONNX graph cannot hold this model: ngram_rows {rows}, which need earlier tokens")
    specification = source.tokenizer.huggingface()
    notes = ["The format is ONNX.", NOTE.format(capacity=config.block_size)]
    with new_folder(folder) as hidden:
        with evaluating(source.model):
            write_graph(source.model, hidden / MODEL)
        write_atomic(hidden / TOKENIZER, specification)
        card = model_card(source, "onnxruntime", LOADING.replace("PATH", folder.name), licence, notes)
        write_atomic(hidden / MARKER, card)
        check(hidden)
        files = sorted(path for path in hidden.iterdir() if path.name.startswith(MODEL))
        size = sum(path.stat().st_size for path in files)
    return {
        "architecture": "an ONNX graph",
        "folder": folder,
        "files": [path.name for path in files],
        "bytes": size,
        "dtype": "float32",
        "notes": notes,
    }


def _check_packages() -> None:
    """Raises UserError unless the packages that torch.onnx needs are installed."""
    for name in PACKAGES:
        try:
            importlib.import_module(name)
        except ImportError:
            raise UserError(
                f"the format onnx needs the packages {' and '.join(PACKAGES)}: pip install {' '.join(PACKAGES)}"
            ) from None
