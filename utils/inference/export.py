"""The export of a run (artifacts/export): everything that inference needs, as safetensors and JSON.

model.safetensors holds each weight once (a tied embedding is one tensor), config.json the architecture and the origin
of the weights, tokenizer.json the tokenizer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from model import LanguageModel, outline
from tokenizer import Tokenizer, load_tokenizer
from utils.checkpoints.files import Checkpoint, weight_differences
from utils.checkpoints.folder import EXPORT_CONFIG_FILE, TOKENIZER_FILE, WEIGHTS_FILE, CheckpointError
from utils.checkpoints.header import read_header
from utils.checkpoints.tensors import Outlines, open_tensors, write_stream, write_tensors
from utils.config.settings import ModelConfig
from utils.crc32 import file_crc32
from utils.errors import UserError
from utils.files import is_regular, open_regular, read_json, write_json
from utils.folders import remove, replace_folder, restore_folder
from utils.inference.evaluation import evaluating
from utils.nn.lora import adapted_layers, merged_weights
from utils.nn.roles import declared_roles
from utils.runs.metrics import decode_number

FORMAT_VERSION = 1
MERGED_TOLERANCE = 1e-4  # of logits, relative to the largest if that is above 1, because merging rounds the weights
LOSSES = {"val/loss", "train/eval_loss"}
METADATA = {"format": "pt"}  # of model.safetensors; transformers requires it
EXPORT_FILES = (WEIGHTS_FILE, EXPORT_CONFIG_FILE, TOKENIZER_FILE)


class ExportError(UserError):
    """An export that is missing, damaged, or does not fit its configuration."""


@dataclass(frozen=True)
class Export:
    """An export in memory: the model in eval mode, its tokenizer, and the rest of config.json."""

    model: LanguageModel
    tokenizer: Tokenizer
    training: Mapping[str, Any]  # run id, step, losses, corpus

    @property
    def document_token(self) -> int | None:
        """The `LanguageModel.document_token` of training, for evaluations on rows of documents; unset in `model`."""
        return document_token(self.tokenizer, self.training)


def document_token(tokenizer: Tokenizer, training: Mapping[str, Any]) -> int | None:
    """The token that each text began with in training on whole documents; None after another kind of training."""
    return tokenizer.end_of_text if training.get("packing", "random") != "random" else None


def save_export(
    folder: Path,
    model: LanguageModel,
    tokenizer: Tokenizer,
    training: Mapping[str, Any],
    write_more: Callable[[Path], None] = lambda folder: None,
) -> None:
    """Write an export, reload it, compare its logits with those of `model`, then move it into place.

    Adapters are merged into the weights.

    Args:
        folder: the export; an older one is replaced.
        training: facts about the training of the weights.
        write_more: writes further files into the export before it is moved.

    Raises:
        RuntimeError: the reloaded model gives other logits; an older export is kept.
        OSError: it cannot be written; an older export is kept.
    """
    with _new_export(folder) as temporary:
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in merged_weights(model).items()}
        crc32 = write_tensors(temporary / WEIGHTS_FILE, weights, METADATA)["crc32"]
        del weights  # the only reference to the merged matrices
        _describe(temporary, model.config, model.vocab_size, crc32, training)
        tokenizer.save(temporary / TOKENIZER_FILE)
        write_more(temporary)
        reopened = load_export(temporary, next(model.parameters()).device).model
        reopened.document_token = model.document_token
        _check_logits(model, reopened)


def stream_export(
    folder: Path,
    model: LanguageModel,
    tokenizer: Tokenizer,
    training: Mapping[str, Any],
    pieces: Callable[[str], Iterable[torch.Tensor]],
) -> None:
    """Write an export whose weights are not in memory all at once, then check the header and checksum of the file.

    Args:
        folder: the export; an older one is replaced.
        model: gives the names, types and shapes of the weights.
        pieces: yields the values of the weight of that name, in host memory; called for each in `stream_order`.

    Raises:
        RuntimeError: the file is not as it was written; an older export is kept.
        OSError: it cannot be written; an older export is kept.
    """
    with _new_export(folder) as temporary:
        path = temporary / WEIGHTS_FILE
        crc32 = write_stream(path, outlines_of(model), pieces, METADATA)["crc32"]
        _describe(temporary, model.config, model.vocab_size, crc32, training)
        tokenizer.save(temporary / TOKENIZER_FILE)
        if weight_differences(read_header(path).tensors, model) or _crc32(path) != crc32:
            raise RuntimeError("the exported weights are not those that were written")


def outlines_of(model: LanguageModel) -> Outlines:
    """The type and shape of each weight in an export of `model`."""
    return {name: (tensor.dtype, tensor.shape) for name, tensor in model.named_parameters()}


@contextlib.contextmanager
def _new_export(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder that replaces the export `folder` at the end, or is deleted after an error."""
    restore_folder(folder)
    temporary = folder.with_name(f".{folder.name}.tmp")
    remove(temporary)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        replace_folder(folder, temporary)
    finally:
        remove(temporary)


def _describe(folder: Path, config: ModelConfig, vocab_size: int, crc32: str, training: Mapping[str, Any]) -> None:
    """Write config.json into an export, once its weights are written."""
    content = {
        "format_version": FORMAT_VERSION,
        "model": config.model_dump(mode="json"),
        "vocab_size": vocab_size,
        "weights_crc32": crc32,
        "training": dict(training),
    }
    write_json(folder / EXPORT_CONFIG_FILE, content)


def _check_logits(model: LanguageModel, reopened: LanguageModel) -> None:
    """Raises RuntimeError unless both models give the same logits."""
    device = next(model.parameters()).device
    length = model.config.block_size
    idx = (torch.arange(length, device=device) % model.vocab_size)[None]  # (1, T)
    with evaluating(model), _full_precision():
        logits = model(idx)[0]
        tolerance = 1e-5  # not 0, because kernels of a GPU may not be deterministic
        if adapted_layers(model):
            tolerance = MERGED_TOLERANCE * max(1.0, logits.abs().max().item())
        same = torch.allclose(logits, reopened(idx)[0], rtol=0, atol=tolerance)
    if not same:
        raise RuntimeError("the exported weights do not give the logits of the trained model")


@contextlib.contextmanager
def _full_precision() -> Iterator[None]:
    """Turn TF32 off on CUDA: with it, a product differs in the fourth digit from the same product in two parts."""
    products = torch.backends.cuda.matmul
    before, products.fp32_precision = products.fp32_precision, "ieee"
    try:
        yield
    finally:
        products.fp32_precision = before


def load_export(folder: Path, device: torch.device) -> Export:
    """Read an export and check the names and shapes of all weights.

    On a CPU the weights are the memory-mapped file, so it may be replaced while they are in use, but not written to.
    Weights at addresses that are not aligned for kernels are copied.

    Raises:
        ExportError: a file is missing or damaged, or the weights do not fit the configuration.
        TokenizerError: a damaged tokenizer file.
    """
    if missing := [name for name in EXPORT_FILES if not is_regular(folder / name)]:
        raise ExportError(f"{folder}: no complete export: {', '.join(missing)} missing")
    config_path, weights_path = folder / EXPORT_CONFIG_FILE, folder / WEIGHTS_FILE
    try:
        config = read_json(config_path)
        version = config["format_version"]
        if version != FORMAT_VERSION:
            raise ExportError(f"{config_path}: format version {version}, this workbench reads {FORMAT_VERSION}")
        vocab_size = config["vocab_size"]
        if not isinstance(vocab_size, int) or isinstance(vocab_size, bool) or vocab_size < 1:
            raise ExportError(f"{config_path}: vocab_size: expected a whole number >= 1, got {vocab_size!r}")
        model_config = ModelConfig.model_validate(config["model"])
        training, crc32 = _training_facts(config["training"]), config["weights_crc32"]
    except ValidationError as error:
        detail = error.errors()[0]
        raise ExportError(f"{config_path}: {'.'.join(map(str, detail['loc']))}: {detail['msg']}") from None
    except ExportError:
        raise
    except (OSError, LookupError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise ExportError(f"{config_path}: damaged ({type(error).__name__}: {error})") from None
    with _damage(weights_path), open_tensors(weights_path, crc32) as weights:  # threads begin to read
        model = _outline(weights_path, model_config, vocab_size)
        tokenizer = load_tokenizer(folder / TOKENIZER_FILE)
        own = {name: tensor.dtype for name, tensor in model.state_dict().items()}
        model.load_state_dict({name: tensor.to(device, own[name]) for name, tensor in weights.items()}, assign=True)
    model.initialised = declared_roles(model)
    if tokenizer.vocab_size != model.vocab_size:
        raise ExportError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens, the model {model.vocab_size}: "
            "they are not from the same run"
        )
    return Export(model.to(device).eval(), tokenizer, training)


def _outline(path: Path, config: ModelConfig, vocab_size: int) -> LanguageModel:
    """The model without memory for its weights, because a damaged configuration may describe a huge one.

    Raises:
        CheckpointError: the file of weights at `path` is damaged.
        ExportError: its weights are those of another model.
    """
    model = outline(config, vocab_size)
    if differences := weight_differences(read_header(path).tensors, model):
        raise ExportError(f"{path} does not fit its config.json: {differences}")
    return model


@contextlib.contextmanager
def _damage(path: Path) -> Iterator[None]:
    """Turn a CheckpointError about the file of weights at `path` into an ExportError."""
    try:
        yield
    except CheckpointError as error:
        reason = str(error).removeprefix(f"{path}: ").removeprefix("damaged: ")
        raise ExportError(f"{path}: damaged: {reason}") from None


def export_as_checkpoint(folder: Path) -> Checkpoint:
    """Read an export in the form of a checkpoint, for training that starts from its weights.

    Raises:
        ExportError, TokenizerError: see `load_export`.
    """
    export = load_export(folder, torch.device("cpu"))
    step = export.training.get("step")
    state = {
        "model": export.model.config.model_dump(mode="json"),
        "run": str(export.training.get("run") or folder.name),
        "export": _crc32(folder / WEIGHTS_FILE),
    }
    step = step if isinstance(step, int) and step >= 0 else 0
    return Checkpoint(folder, step, export.model.state_dict(), {}, export.tokenizer.to_json(), state)


def _training_facts(training: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return `training`; raises ValueError unless its losses are numbers."""
    for name in LOSSES & training.keys():
        decode_number(training[name])
    return training


def _crc32(path: Path) -> str:
    with open_regular(path) as file:
        return f"{file_crc32(file):08x}"
