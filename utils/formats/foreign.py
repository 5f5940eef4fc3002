"""A model of another program, in the words of this project: what a converter returns."""

from __future__ import annotations

import re
from collections.abc import Mapping
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
GPT2_BLOCK = (  # GPT-2's names of the layers of a block, which its descendants have kept -> ours
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

    program: its name, for people.
    settings: by our names, with the file and the name that each has there.
    weights: by our names; their numbers may be mapped from the file.
    vocab_size: rows of the token embedding.
    step: updates that they have seen.
    moments: of AdamW, by our names of parameters: exp_avg and exp_avg_sq; None: the file has none.
    updates: of AdamW for each parameter, where it has moments.
    tokenizer: None: the file has none that can be read.
    tokenizer_kind: gpt2, if that is all that is known of it.
    notes: a line for each thing that has no counterpart here.
    best_val_loss: as the program found it, by its own batches.
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


def renamed(names: Mapping[str, str], name: str) -> str | None:
    """Our name of a tensor by a table of patterns, where `*` is the number of a layer; None: it is not in the table.

    >>> renamed({"h.*.ln_1.weight": "blocks.*.attention_norm.weight"}, "h.11.ln_1.weight")
    'blocks.11.attention_norm.weight'
    """
    number = re.search(r"(?<=\.)\d+(?=\.)", name)
    pattern = name if number is None else f"{name[: number.start()]}*{name[number.end() :]}"
    if pattern not in names:
        return None
    return names[pattern] if number is None else names[pattern].replace("*", number[0])


def settings_of(
    values: Mapping[str, Any], source: str, notes: list[str], handled: Mapping[str, str | None]
) -> dict[str, Setting]:
    """The settings in a flat configuration of another program.

    Args:
        values: as the program names them.
        source: the file, for the source of each setting.
        notes: gets a line for each name without a counterpart.
        handled: our names of the entries that mean something else here than the table of renamed settings says; None:
            the caller looks after it.
    """
    settings: dict[str, Setting] = {}
    for name, value in values.items():
        key = handled[name] if name in handled else RENAMED.get(name, name)
        if key is None:
            continue
        if name in NO_COUNTERPART and name not in handled:
            notes.append(f"{name} = {shown(value)} has no counterpart: {NO_COUNTERPART[name]}")
        elif key not in FIELDS:
            notes.append(f"{cut(str(name), SHOWN)} = {shown(value)} has no counterpart")
        elif not isinstance(value, bool | int | float | str | None):
            raise UserError(f"{source}: {name}: expected a number, a text or true or false, got {shown(value)}")
        elif value is not None:
            settings[key] = Setting(value, f"{source}: {name}")
    return settings


def number(values: Mapping[str, Any], name: str, source: str, most: int) -> int:
    """A whole number from 1 to `most` in a configuration.

    Raises:
        UserError: it is missing, or something else.
    """
    value = values.get(name)
    if type(value) is not int or not 1 <= value <= most:
        raise UserError(f"{source}: {name}: expected a whole number from 1 to {most:,}, got {shown(value)}")
    return value


def tensors_of(value: Any, source: str) -> dict[str, torch.Tensor]:
    """A state dict, without what torch.compile and DistributedDataParallel put before its names.

    Raises:
        UserError: it is something else.
    """
    if not isinstance(value, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in value.items()
    ):
        raise UserError(f"{source}: expected tensors by name, got a {type(value).__name__}")
    return {re.sub(r"^(_orig_mod\.|module\.)+", "", name): tensor for name, tensor in value.items()}


def adamw_moments(
    optimizer: Any, orders: list[list[str]], shapes: Mapping[str, torch.Size]
) -> tuple[dict[str, dict[str, torch.Tensor]], int] | None:
    """The moments of a torch.optim.AdamW state by name, and the number of its updates.

    Args:
        orders: names of the parameters in the order of the optimizer; the first whose shapes fit is the one.

    Returns:
        {exp_avg: {name: tensor}, exp_avg_sq: ...}; None: there is no state, or no order fits.
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
