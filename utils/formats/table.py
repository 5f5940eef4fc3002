"""The tables of the families: which tensor of another program corresponds to which of ours, and in which layout."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from model import LanguageModel, outline
from utils.config.settings import ModelConfig
from utils.errors import UserError, shown
from utils.formats.foreign_config import ForeignConfig

Part = Literal["all", "q", "k", "v"]
Layout = Literal["same", "transposed"]
Fill = Literal["zeros", "ones"]
Shape = tuple[int, ...]


class FormatError(UserError):
    """A model cannot be represented in a format, or its files are damaged."""


@dataclass(frozen=True)
class Row:
    """A tensor of a family and its counterpart here.

    theirs, ours: names, with {} for the number of the block.
    part: the rows of our tensor that correspond to it.
    layout: transposed if it is stored as (in, out); ours is (out, in).
    fill: the value that an export writes if our model lacks the tensor, with which the family computes the same; None
        if the tensor is then left out.
    """

    theirs: str
    ours: str
    part: Part = "all"
    layout: Layout = "same"
    fill: Fill | None = None


@dataclass(frozen=True)
class Family:
    """A kind of model of the library transformers.

    architecture: the name in `architectures` of config.json.
    model_type: the name in `model_type` of config.json.
    prefix: of the names of most tensors; files that were saved from the model without its head lack it.
    rows: the table of the tensors.
    ignored: names of tensors that are not weights, or that repeat others.
    holds: for each restricted setting, the values that the family can represent.
    obstacles: anything else of a model that the family cannot represent, in words.
    read: translates their configuration into our settings.
    write: translates our configuration into theirs, without the keys that all families have.
    """

    architecture: str
    model_type: str
    prefix: str
    rows: tuple[Row, ...]
    ignored: re.Pattern[str]
    holds: Mapping[str, Sequence[Any]]
    obstacles: Callable[[ModelConfig], Iterable[str]]
    read: Callable[[ForeignConfig], dict[str, Any]]
    write: Callable[[ModelConfig], dict[str, Any]]

    def refusals(self, config: ModelConfig) -> list[str]:
        """What the family cannot represent of a model, in words; empty if there is nothing."""
        found = [
            f"{key} {value if value is not None else 'none'}"
            for key, values in self.holds.items()
            if (value := getattr(config, key)) not in values
        ]
        return [*found, *self.obstacles(config)]


@dataclass(frozen=True)
class Place:
    """A tensor of a family in a given model, and its counterpart here.

    shape: of their tensor.
    rows: the rows (start, end) of our tensor; None for all.
    """

    theirs: str
    shape: Shape
    ours: str
    rows: tuple[int, int] | None = None
    layout: Layout = "same"
    fill: Fill | None = field(default=None)

    def to_ours(self, tensor: torch.Tensor) -> torch.Tensor:
        """Their tensor in our layout, without a copy."""
        return tensor.t() if self.layout == "transposed" else tensor

    def to_theirs(self, weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Their tensor from our weights, without a copy unless it is filled in."""
        if self.fill is not None:
            return torch.full(self.shape, float(self.fill == "ones"))
        tensor = weights[self.ours].detach()
        if self.rows is not None:
            tensor = tensor[self.rows[0] : self.rows[1]]
        return tensor.t() if self.layout == "transposed" else tensor


def our_shapes(config: ModelConfig, vocab_size: int) -> dict[str, Shape]:
    """The shapes of our weights by name; no memory is allocated for them."""
    return {name: tuple(tensor.shape) for name, tensor in outline(config, vocab_size).state_dict().items()}


def places(family: Family, config: ModelConfig, vocab_size: int, *, filled: bool = False) -> list[Place]:
    """All tensors that a family has for a model of ours.

    Args:
        filled: include those that our model lacks and that an export fills in.

    Raises:
        FormatError: one of our tensors has no counterpart.
    """
    shapes = our_shapes(config, vocab_size)
    heads = [count * config.head_width for count in (config.n_head, config.kv_heads, config.kv_heads)]
    ends = {"q": heads[0], "k": heads[0] + heads[1], "v": sum(heads)}
    found: list[Place] = []
    for row in family.rows:
        for layer in range(config.n_layer) if "{}" in row.theirs else (0,):
            theirs, ours = row.theirs.format(layer), row.ours.format(layer)
            shape = shapes.get(ours)
            fill = row.fill if shape is None else None
            if shape is None and not (filled and fill):
                continue
            rows = None
            if row.part != "all":
                width = heads["qkv".index(row.part)]
                rows = (ends[row.part] - width, ends[row.part])
            shape = _filled_shape(ours, shapes, config) if shape is None else shape
            if rows is not None:
                shape = (rows[1] - rows[0], *shape[1:])
            shape = shape[::-1] if row.layout == "transposed" else shape
            found.append(Place(theirs, shape, ours, rows, row.layout, fill))
    placed = {place.ours for place in found}
    if unplaced := [name for name in shapes if name not in placed]:
        raise FormatError(f"{family.architecture} has no counterpart for {_some(unplaced)}")
    return found


def _filled_shape(name: str, shapes: Mapping[str, Shape], config: ModelConfig) -> Shape:
    """The shape of a vector that our model lacks: a bias, or the weight of a norm of queries or keys."""
    module, _, kind = name.rpartition(".")
    return shapes[f"{module}.weight"][:1] if kind == "bias" else (config.head_width,)


def names_in_table(family: Family, names: Iterable[str], expected: Iterable[Place]) -> dict[str, str]:
    """Names of tensors in the table, by their names in a file, which may lack the prefix of the family.

    Raises:
        FormatError: a tensor is not in the table, or two have the same name there.
    """
    known = {place.theirs for place in expected}
    found: dict[str, str] = {}
    taken: set[str] = set()
    unknown = []
    for name in names:
        full = name if name in known else family.prefix + name
        if full in taken:
            raise FormatError(f"{full} appears twice, with and without {family.prefix}")
        if full in known:
            found[name] = full
            taken.add(full)
        elif not family.ignored.fullmatch(name.removeprefix(family.prefix)):
            unknown.append(name)
    if unknown:
        raise FormatError(f"tensors that our model of {family.architecture} does not have: {_some(unknown)}")
    return found


def _some(names: Sequence[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(name if len(name) < 100 else shown(name) for name in names[:most]) + more


def read_places(expected: Iterable[Place], get: Callable[[str], torch.Tensor], model: LanguageModel) -> None:
    """Copy their tensors into the weights of our model, one at a time, to its device and in its precision.

    Args:
        get: returns their tensor by its name in the table.
    """
    weights = model.state_dict()
    with torch.no_grad():
        for place in expected:
            target = weights[place.ours]
            if place.rows is not None:
                target = target[place.rows[0] : place.rows[1]]
            target.copy_(place.to_ours(get(place.theirs)))


def interleaved(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorder rows (H D, ...) of queries or keys for programs that rotate the channels 2 i and 2 i + 1 of a head.

    We rotate i and i + D / 2.
    """
    return tensor.reshape(heads, 2, -1, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)


def half_split(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """The inverse of `interleaved`."""
    return tensor.reshape(heads, -1, 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
