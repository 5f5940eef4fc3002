"""The tables of the families: which tensor of another program is which of ours, and in which layout."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
    """Weights or a configuration that one of the two programs cannot represent, or damaged files."""


@dataclass(frozen=True)
class Row:
    """A tensor of a family and its place among ours.

    theirs, ours: names, with {} for the number of the block.
    part: the rows of our tensor that it is.
    layout: transposed if it is stored as (in, out), where ours is (out, in).
    fill: what it is in an export of a model that has no such tensor and computes as if it were this; None: the
        family has no such tensor then either.
    """

    theirs: str
    ours: str
    part: Part = "all"
    layout: Layout = "same"
    fill: Fill | None = None


@dataclass(frozen=True)
class Family:
    """A kind of model of the library transformers.

    architecture: as `architectures` in config.json names it.
    model_type: as config.json names it.
    prefix: of the names of most tensors; files made from the model without its head lack it.
    rows: the table of the tensors.
    ignored: names of tensors that are no weights, or that others hold, too.
    holds: the values of a setting that the family can represent.
    obstacles: what else of a model it cannot represent, in words.
    read: our settings of a configuration of theirs.
    write: their configuration of a model of ours, without what all families have.
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
        """What of a model the family cannot represent, in words; empty if it can represent all of it."""
        found = [
            f"{key} {value if value is not None else 'none'}"
            for key, values in self.holds.items()
            if (value := getattr(config, key)) not in values
        ]
        return [*found, *self.obstacles(config)]


@dataclass(frozen=True)
class Place:
    """One tensor of a family in one model.

    shape: of theirs.
    rows: of our tensor, from and to; None: all of it.
    """

    theirs: str
    shape: Shape
    ours: str
    rows: tuple[int, int] | None = None
    layout: Layout = "same"
    fill: Fill | None = field(default=None)

    def to_ours(self, tensor: torch.Tensor) -> torch.Tensor:
        """Their tensor in our layout; nothing is copied."""
        return tensor.t() if self.layout == "transposed" else tensor

    def to_theirs(self, weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Their tensor from our weights; nothing is copied but what is filled in."""
        if self.fill is not None:
            return torch.full(self.shape, float(self.fill == "ones"))
        tensor = weights[self.ours].detach()
        if self.rows is not None:
            tensor = tensor[self.rows[0] : self.rows[1]]
        return tensor.t() if self.layout == "transposed" else tensor


def our_shapes(config: ModelConfig, vocab_size: int) -> dict[str, Shape]:
    """The shapes of our weights by name, without memory for them."""
    return {name: tuple(tensor.shape) for name, tensor in outline(config, vocab_size).state_dict().items()}


def places(family: Family, config: ModelConfig, vocab_size: int, *, filled: bool = False) -> list[Place]:
    """Every tensor that a family has for a model of ours.

    Args:
        filled: with those that our model lacks, and that have a value which changes nothing.

    Raises:
        FormatError: one of our tensors has no place.
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
    if homeless := [name for name in shapes if name not in placed]:
        raise FormatError(f"{family.architecture} has no place for {_some(homeless)}")
    return found


def _filled_shape(name: str, shapes: Mapping[str, Shape], config: ModelConfig) -> Shape:
    """The shape that a vector would have which our model lacks: a bias, or a weight of the norm of a head."""
    module, _, kind = name.rpartition(".")
    return shapes[f"{module}.weight"][:1] if kind == "bias" else (config.head_width,)


def without_places(family: Family, names: Iterable[str], expected: Iterable[Place]) -> dict[str, str]:
    """Their names as a table has them, by the names in a file, which may lack the prefix of the family.

    Raises:
        FormatError: a tensor without a place, or two with the same.
    """
    known = {place.theirs for place in expected}
    found: dict[str, str] = {}
    taken: set[str] = set()
    strangers = []
    for name in names:
        full = name if name in known else family.prefix + name
        if full in taken:
            raise FormatError(f"{full} is there twice, with and without {family.prefix}")
        if full in known:
            found[name] = full
            taken.add(full)
        elif not family.ignored.fullmatch(name.removeprefix(family.prefix)):
            strangers.append(name)
    if strangers:
        raise FormatError(f"tensors without a place in our model of {family.architecture}: {_some(strangers)}")
    return found


def _some(names: Sequence[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(name if len(name) < 100 else shown(name) for name in names[:most]) + more


def read_places(expected: Iterable[Place], get: Callable[[str], torch.Tensor], model: LanguageModel) -> None:
    """Copy their tensors into the weights of our model, one at a time, onto its device and into its precision.

    Args:
        get: their tensor by its name in a table.
    """
    weights = model.state_dict()
    with torch.no_grad():
        for place in expected:
            target = weights[place.ours]
            if place.rows is not None:
                target = target[place.rows[0] : place.rows[1]]
            target.copy_(place.to_ours(get(place.theirs)))


def tensors_of(expected: Iterable[Place], weights: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """Their tensors from our weights, one at a time."""
    for place in expected:
        yield place.theirs, place.to_theirs(weights)
