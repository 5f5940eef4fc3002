"""LoRA adapters in the format of peft: adapter_model.safetensors and adapter_config.json, which PeftModel opens.

Layers have their names in transformers, by the tables of the families, so that peft applies the adapter to the model
that training started from. If no family can hold the model, layers have our names, and peft applies the adapter to our
LanguageModel.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from model import LanguageModel
from utils.checkpoints.tensors import write_tensors
from utils.config.settings import OptimizerConfig
from utils.files import write_json
from utils.formats.families import family_for
from utils.formats.table import FormatError, Place, places
from utils.nn.lora import LoraLinear, adapted_layers

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."  # of every name in peft's files
IN_BLOCK = re.compile(r".*?\.\d+\.")  # a name up to the number of the block, inclusive

Pair = tuple[torch.Tensor, torch.Tensor]  # A (r, in) and B (out, r)


def write_adapter(
    folder: Path, model: LanguageModel, settings: OptimizerConfig, pretrained: Mapping[str, Any] = {}
) -> None:
    """Write the adapters of a model.

    Args:
        folder: is created, and must not exist.
        settings: the LoRA settings of the run.
        pretrained: architecture, name and revision of the published model that training started from, if any.

    Raises:
        OSError: the files cannot be written.
    """
    try:
        family = family_for(model.config, pretrained.get("architecture"))
        table = {place.theirs: place for place in places(family, model.config, model.vocab_size)}
    except FormatError:
        table = {}
    pairs = their_pairs(model, table) if table else our_pairs(model)
    tensors = {}
    for name, pair in pairs.items():
        for part, tensor in zip("AB", pair, strict=True):
            tensors[f"{PREFIX}{name}.lora_{part}.weight"] = tensor.detach().cpu().contiguous()
    folder.mkdir()
    write_tensors(folder / WEIGHTS, tensors)
    layers = {place.theirs.removesuffix(".weight") for place in table.values()} or set(dict(model.named_modules()))
    write_json(folder / CONFIG, adapter_config(pairs, layers, table, settings, pretrained))


def their_pairs(model: LanguageModel, table: Mapping[str, Place]) -> dict[str, Pair]:
    """A and B of each adapted layer, by its name in the family; q, k and v are three layers if the family has three."""
    pairs = {}
    layers = adapted_layers(model)
    for theirs, place in table.items():
        layer = layers.get(place.ours.removesuffix(".weight"))
        if layer is None or not place.ours.endswith(".weight"):
            continue
        own = parts_of(layer)
        rows = place.rows or (0, layer.out_features)
        pairs[theirs.removesuffix(".weight")] = own[rows]
    return pairs


def parts_of(layer: LoraLinear) -> dict[tuple[int, int], Pair]:
    """A and B of each matrix that is stacked in a layer, by its rows (start, end)."""
    parts, first = {}, 0
    matrices = zip(layer.lora_rows, layer.lora_a.chunk(len(layer.lora_rows)), strict=True)
    for count, a in matrices:
        parts[first, first + count] = a, layer.lora_b[first : first + count]
        first += count
    return parts


def our_pairs(model: LanguageModel) -> dict[str, Pair]:
    """A and B of each of our layers; n stacked matrices get one block-diagonal B of n times the rank."""
    return {
        name: (layer.lora_a, torch.block_diag(*layer.lora_b.split(layer.lora_rows)))
        for name, layer in adapted_layers(model).items()
    }


def adapter_config(
    pairs: Mapping[str, Pair],
    layers: set[str],
    table: Mapping[str, Place],
    settings: OptimizerConfig,
    pretrained: Mapping[str, Any],
) -> dict[str, Any]:
    """The content of adapter_config.json.

    Args:
        pairs: A and B by the name of their layer.
        layers: all names of layers in the base model, among which peft looks for the targets.
        table: the tensors of the family by name; empty if the names are ours.
    """
    assert settings.lora_rank is not None
    factors = {name: len(a) // settings.lora_rank for name, (a, _) in pairs.items()}
    larger = {name: factor for name, factor in factors.items() if factor > 1}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if table else None,
        "base_model_name_or_path": pretrained.get("name"),
        "revision": pretrained.get("revision"),
        "inference_mode": True,
        "r": settings.lora_rank,
        "lora_alpha": settings.adapter_alpha,
        "lora_dropout": settings.lora_dropout,
        "target_modules": target_modules([*pairs], layers),
        "rank_pattern": {name: factor * settings.lora_rank for name, factor in larger.items()},
        "alpha_pattern": {name: factor * settings.adapter_alpha for name, factor in larger.items()},
        "fan_in_fan_out": any(table[f"{name}.weight"].layout == "transposed" for name in pairs if table),
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
    }


def target_modules(names: list[str], layers: set[str]) -> list[str]:
    """The endings of names by which peft finds exactly these layers; the whole names if blocks differ."""
    ends = sorted({IN_BLOCK.sub("", name, count=1) for name in names})
    found = {name for name in layers if any(name == end or name.endswith(f".{end}") for end in ends)}
    return ends if found == {*names} else sorted(names)
