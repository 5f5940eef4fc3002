"""A model of another program in the names of this project, and functions that the converters share."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tokenizer import Tokenizer
from utils.config.fields import FIELDS
from utils.config.legacy import NO_COUNTERPART, RENAMED
from utils.config.loader import Setting
from utils.errors import SHOWN, UserError, cut, shown

MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW
GPT2_BLOCK = (  # GPT-2's names for the layers of a block, which its descendants have kept -> ours
    ("ln_1", "attention_norm"),
    ("attn.c_attn", "attention.qkv"),
    ("attn.c_proj", "attention.proj"),
    ("ln_2", "mlp_norm"),
    ("mlp.c_fc", "mlp.up"),
    ("mlp.c_proj", "mlp.proj"),
)


@dataclass
class Foreign:
    """A model that another program wrote.

    program: its name, for messages.
    settings: by our names; the source of each names the file and the setting there.
    weights: by our names; they may be mapped from the file.
    vocab_size: rows of the token embedding.
    step: updates that the weights have had.
    moments: AdamW's exp_avg and exp_avg_sq, each by our names of the parameters; None if the file has none.
    updates: the step count of AdamW, if there are moments.
    tokenizer: None if the file has none that can be read.
    tokenizer_kind: gpt2, if only the kind of the tokenizer is known.
    notes: a line for each thing that has no counterpart here.
    best_val_loss: as the program measured it, on its own batches.
    """

    program: str
    path: Path
    settings: dict[str, Setting]
    weights: dict[str, torch.Tensor]
    vocab_size: int
    step: int = 0
    moments: dict[str, dict[str, torch.Tensor]] | None = None
    updates: int = 0
    tokenizer: Tokenizer | None = None
    tokenizer_kind: str | None = None
    notes: list[str] = field(default_factory=list)
    best_val_loss: float | None = None


def renamed(tensors: Mapping[str, Any], names: Mapping[str, str], path: Path, model: str) -> dict[str, Any]:
    """Tensors by our names.

    Args:
        names: their name -> ours, in which `*` is the number of a layer.
        path: the file, for messages.
        model: what the file should have, for messages.

    Raises:
        UserError: a tensor is not in `names`.

    >>> renamed({"h.11.ln": 1}, {"h.*.ln": "blocks.*.norm"}, Path("model.pt"), "a GPT")
    {'blocks.11.norm': 1}
    """
    found = {}
    for name, tensor in tensors.items():
        number = re.search(r"(?<=\.)\d+(?=\.)", name)
        pattern = name if number is None else f"{name[: number.start()]}*{name[number.end() :]}"
        if pattern not in names:
            raise UserError(f"{path}: {name} is not a tensor of {model}")
        found[names[pattern] if number is None else names[pattern].replace("*", number[0])] = tensor
    return found


def unstacked(tensors: Mapping[str, torch.Tensor], names: Mapping[str, str]) -> dict[str, torch.Tensor]:
    """Tensors by our names; one whose name has `*` is that of all layers, (L, ...), and becomes one for each layer."""
    found: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if "*" in name:
            found |= {names[name].replace("*", str(layer)): part for layer, part in enumerate(tensor)}
        else:
            found[names[name]] = tensor
    return found


def settings_of(
    values: Mapping[str, Any], source: str, notes: list[str], handled: Collection[str]
) -> dict[str, Setting]:
    """The settings in a flat configuration of another program.

    Args:
        values: by the names of the program.
        source: the file, which becomes part of the source of each setting.
        notes: a line is added for each name without a counterpart.
        handled: names that the caller translates itself.
    """
    settings: dict[str, Setting] = {}
    for name, value in values.items():
        if name in handled:
            continue
        key = RENAMED.get(name, name)
        if name in NO_COUNTERPART:
            notes.append(f"{name} = {shown(value)} has no counterpart: {NO_COUNTERPART[name]}")
        elif key not in FIELDS:
            notes.append(f"{cut(str(name), SHOWN)} = {shown(value)} has no counterpart")
        elif not isinstance(value, bool | int | float | str | None):
            raise UserError(f"{source}: {name}: expected a number, a text, true or false, got {shown(value)}")
        elif value is not None:
            settings[key] = Setting(value, f"{source}: {name}")
    return settings


def number(values: Mapping[str, Any], name: str, source: str, most: int) -> int:
    """A whole number from 1 to `most` in a configuration.

    Raises:
        UserError: it is missing or anything else.
    """
    value = values.get(name)
    if type(value) is not int or not 1 <= value <= most:
        raise UserError(f"{source}: {name}: expected a whole number from 1 to {most:,}, got {shown(value)}")
    return value


def tensors_of(value: Any, source: str) -> dict[str, torch.Tensor]:
    """A state dict, without the prefixes that torch.compile and DistributedDataParallel add to its names.

    Raises:
        UserError: the value is not a state dict.
    """
    if not isinstance(value, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in value.items()
    ):
        raise UserError(f"{source}: expected tensors by name, got a {type(value).__name__}")
    return {re.sub(r"^(_orig_mod\.|module\.)+", "", name): tensor for name, tensor in value.items()}


def adamw_moments(
    optimizer: Any, orders: list[list[str]], shapes: Mapping[str, torch.Size]
) -> tuple[dict[str, dict[str, torch.Tensor]], int] | None:
    """The moments in a state dict of torch.optim.AdamW by name of the parameter, and the number of updates.

    Args:
        orders: possible orders of the parameters in the optimizer; the first whose shapes fit is taken.

    Returns:
        {exp_avg: {name: tensor}, exp_avg_sq: ...} and the updates; None if there is no such state or no order fits.
    """
    try:
        state, groups = optimizer["state"], optimizer["param_groups"]
        indices = [index for group in groups for index in group["params"]]
        of_index = [state[index] for index in indices]
        updates = {int(entry["step"]) for entry in of_index}
        moments = [[entry[key] for entry in of_index] for key in MOMENTS]
        if len(updates) != 1 or not all(isinstance(tensor, torch.Tensor) for kind in moments for tensor in kind):
            return None
    except (LookupError, TypeError, ValueError, AttributeError):
        return None
    for names in orders:
        expected = [shapes[name] for name in names]
        if all([tensor.shape for tensor in kind] == expected for kind in moments):
            found = {key: dict(zip(names, kind, strict=True)) for key, kind in zip(MOMENTS, moments, strict=True)}
            return found, updates.pop()
    return None
