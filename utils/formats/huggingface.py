"""The export for transformers: a folder that AutoModelForCausalLM and AutoTokenizer open as it stands."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from model import outline
from utils.files import write_atomic, write_json
from utils.formats.card import model_card
from utils.formats.families import family_for
from utils.formats.folder import MARKER, new_folder
from utils.formats.gguf_tokenizer import pattern_of
from utils.formats.pretrained import CHAT_TEMPLATE, CONFIG, GENERATION, TOKENIZER, TOKENIZER_CONFIG, open_pretrained
from utils.formats.qwen import QWEN2, QWEN2_AS_LLAMA
from utils.formats.shards import Entry, write_shards
from utils.formats.source import Source
from utils.formats.table import Family, FormatError, Place, places
from utils.inference.evaluation import evaluating
from utils.inference.export import document_token

TOLERANCE = 1e-4  # of logits in float32, relative to the largest one (at least 1)
LOADING = """
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("PATH")
model = AutoModelForCausalLM.from_pretrained("PATH")
inputs = tokenizer("The ", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))
"""
# Keys in the config.json of the model that training started from which are set here, or which follow from others.
REPLACED = (
    *("rope_parameters", "rope_scaling", "layer_types", "dtype", "torch_dtype", "_name_or_path"),
    *("transformers_version", "auto_map", "quantization_config"),
)


def export_huggingface(
    source: Source,
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    shard_bytes: int = 5 * 10**9,
    licence: str | None = None,
    check: Callable[[Path], None] = lambda path: None,
) -> dict[str, Any]:
    """Write a model in the format of transformers.

    Args:
        folder: where to write; an older export is replaced.
        dtype: of the weights in the files.
        shard_bytes: largest size of one file of weights.
        licence: of the weights, for the model card.
        check: called with the hidden folder before it is renamed; if it raises, that is deleted.

    Returns:
        What was written: architecture, folder, files, bytes, dtype, largest_logit_difference, notes.

    Raises:
        UserError: the format cannot hold the model, which is raised before anything is written; or the folder cannot
            be written.
    """
    model = source.model
    specification = source.tokenizer.huggingface()
    family = _family(source, specification)
    expected = places(family, model.config, model.vocab_size, filled=True)
    notes = _notes(source, family, expected)
    weights = model.state_dict()
    entries = [Entry(found.theirs, found.shape, partial(found.to_theirs, weights)) for found in expected]
    with new_folder(folder) as hidden:
        files = write_shards(hidden, entries, dtype, shard_bytes)
        write_json(hidden / CONFIG, their_config(source, family, dtype))
        write_json(hidden / GENERATION, generation_config(source))
        write_atomic(hidden / TOKENIZER, specification)
        write_json(hidden / TOKENIZER_CONFIG, tokenizer_config(source))
        if template := source.pretrained.get("chat_template"):
            write_atomic(hidden / CHAT_TEMPLATE, template)
        card = model_card(source, "transformers", LOADING.replace("PATH", folder.name), licence, notes)
        write_atomic(hidden / MARKER, card)
        difference = check_written(source, hidden, dtype)
        check(hidden)
        size = sum(path.stat().st_size for path in files)
    return {
        "architecture": family.architecture,
        "folder": folder,
        "files": [path.name for path in files],
        "bytes": size,
        "dtype": str(dtype).removeprefix("torch."),
        "largest_logit_difference": difference,
        "notes": notes,
    }


def _family(source: Source, specification: str) -> Family:
    """The family of an export; Qwen 2 only if the tokenizer is Qwen's or training started from a Qwen 2.

    AutoTokenizer takes every tokenizer of a Qwen 2 for Qwen's: it reads the vocabulary in tokenizer.json but finds
    words by Qwen's pattern, whatever tokenizer_config.json says.

    Raises:
        FormatError: no family can represent the model.
    """
    family = family_for(source.model.config, source.pretrained.get("architecture"))
    started_there = source.pretrained.get("architecture") == QWEN2.architecture
    if family is not QWEN2 or started_there or _is_of_qwen(json.loads(specification)):
        return family
    if refusals := QWEN2_AS_LLAMA.refusals(source.model.config):
        raise FormatError(
            f"transformers would read this tokenizer as one of Qwen 2, and the alternative, "
            f"{QWEN2_AS_LLAMA.architecture}, cannot hold: {', '.join(refusals)}"
        )
    return QWEN2_AS_LLAMA


def _is_of_qwen(specification: Mapping[str, Any]) -> bool:
    """Whether a tokenizer.json finds words as Qwen 2 does."""
    if specification["model"].get("type", "BPE") != "BPE" or specification.get("normalizer") != {"type": "NFC"}:
        return False
    try:
        return specification.get("pre_tokenizer") is not None and pattern_of(specification) == "qwen2"
    except FormatError:
        return False


def their_config(source: Source, family: Family, dtype: torch.dtype) -> dict[str, Any]:
    """config.json: our keys, on top of those of the model that training started from if it is of the same family."""
    base: Mapping[str, Any] = source.pretrained.get("config") or {}
    base = base if source.pretrained.get("architecture") == family.architecture else {}
    kept = {key: value for key, value in base.items() if key not in REPLACED}
    config = source.model.config
    ours = family.write(config)
    context = base.get("max_position_embeddings")
    if config.position == "rope" and isinstance(context, int) and context > config.block_size:
        ours["max_position_embeddings"] = context  # training used only part of it
    end = source.tokenizer.end_of_text
    tokens = {"bos_token_id": None, "eos_token_id": end, "pad_token_id": None}
    return {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        **tokens,
        **kept,
        **ours,
        "vocab_size": source.model.vocab_size,
        "tie_word_embeddings": config.tie_embeddings,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


def generation_config(source: Source) -> dict[str, Any]:
    """generation_config.json: that of the model that training started from, or else the token that ends a text.

    Training on whole documents teaches a model to end a text with end-of-text, whatever token ended it before.
    """
    if base := source.pretrained.get("generation_config"):
        kept = {key: value for key, value in base.items() if key != "transformers_version"}
        ends = kept.get("eos_token_id")
        ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
        learned = document_token(source.tokenizer, source.training)
        return kept if learned is None or learned in ends else kept | {"eos_token_id": [*ends, learned]}
    end = source.tokenizer.end_of_text
    return {} if end is None else {"eos_token_id": end, "pad_token_id": end}


def tokenizer_config(source: Source) -> dict[str, Any]:
    """tokenizer_config.json. Its class uses tokenizer.json as it is; others rebuild the tokenizer from parts of it."""
    base = source.pretrained.get("tokenizer_config") or {}
    kept = {key: value for key, value in base.items() if key not in ("auto_map", "tokenizer_class", "backend")}
    common = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    added = json.loads(source.tokenizer.huggingface()).get("added_tokens") or []
    ends = [token["content"] for token in added if token["id"] == source.tokenizer.end_of_text]
    end = {"eos_token": ends[0]} if ends else {}
    context = source.model.config.block_size
    if not kept:
        # Our tokenizers treat a special token that is written out in a text as text.
        return {**common, "model_max_length": context, **end, "split_special_tokens": True}
    if source.model.config.position == "learned":  # there are no positions beyond
        given = kept.get("model_max_length")
        kept["model_max_length"] = min(given, context) if isinstance(given, int | float) else context
    return end | {key: value for key, value in kept.items() if key != "eos_token" or value} | common


def _notes(source: Source, family: Family, expected: list[Place]) -> list[str]:
    notes = [f"The architecture is {family.architecture}."]
    if any(place.fill == "zeros" for place in expected):
        notes.append("This format has biases that the model does not have: they are zeros.")
    if any(place.fill == "ones" for place in expected):
        notes.append("This format has norm weights of queries and keys that the model does not have: they are ones.")
    if not source.pretrained:
        notes.append("A special token that is written in a text is encoded as text, as in training.")
    return notes


def check_written(source: Source, folder: Path, dtype: torch.dtype) -> float:
    """The largest difference between the logits of the export, read again, and those of the model.

    The weights in the files are compared exactly, one tensor at a time. The logits of the model that the files describe
    are then computed with our own weights, so no second copy is needed.

    Raises:
        RuntimeError: they differ.
    """
    reopened, weights = open_pretrained(folder), source.model.state_dict()
    config = reopened.with_context(source.model.config.block_size)
    state = {}
    for name, stored in reopened.weights(config).items():
        ours = weights.get(name, stored)  # a weight that our model lacks, which is zeros or ones
        if not torch.equal(stored, ours.to("cpu", dtype)):
            raise RuntimeError(f"the exported weights are not those of the model: {name}")
        state[name] = ours.to("cpu", torch.float32)
    described = outline(config, source.model.vocab_size)
    described.load_state_dict(state, assign=True)
    length = min(source.model.config.block_size, 64)
    idx = (torch.arange(length) * 7 % source.model.vocab_size)[None]  # (1, T)
    with evaluating(source.model), evaluating(described):
        theirs, ours = described(idx)[0], source.model(idx)[0]
    difference = float((theirs - ours).abs().max())
    if not difference <= TOLERANCE * max(1.0, float(ours.abs().max())):
        raise RuntimeError(f"the exported weights do not give the logits of the model: they differ by {difference:.2g}")
    return difference
