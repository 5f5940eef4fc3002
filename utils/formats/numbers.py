"""Statistics of stored tensors and differences between them, read a part at a time so that memory is bounded."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from utils.checkpoints.tensors import DTYPES
from utils.errors import UserError
from utils.files import open_named
from utils.formats.inspection import module_of
from utils.formats.stored import Location, Stored

PART_ELEMENTS = 1 << 20  # elements that are read at a time


def parts(name: str, location: Location) -> Iterator[torch.Tensor]:
    """The elements of a tensor as float64 (n,), n <= PART_ELEMENTS. Only integers beyond 2**53 are rounded.

    Raises:
        UserError: torch does not have the type, or the file cannot be read.
    """
    path, entry = location.file, location.entry
    if entry.dtype not in DTYPES:
        raise UserError(f"{path}: {name}: torch has no type for {entry.dtype}")
    dtype = DTYPES[entry.dtype]
    with ExitStack() as stack:
        ranges = iter(location.ranges)
        file, left = None, 0
        for start in range(0, entry.elements, PART_ELEMENTS):
            buffer = torch.empty(min(PART_ELEMENTS, entry.elements - start), dtype=dtype)
            memory = buffer.view(torch.uint8).numpy().data
            while memory:
                if not left:
                    path, begin, end = next(ranges)
                    file, left = stack.enter_context(_opened(path, begin)), end - begin
                assert file is not None
                count = _read(file, path, memory[:left])
                memory, left = memory[count:], left - count
            yield buffer.double()


@contextlib.contextmanager
def _opened(path: Path, begin: int) -> Iterator[BinaryIO]:
    """A file, opened at byte `begin`."""
    try:
        with open_named(path) as file:
            file.seek(begin)
            yield file
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def _read(file: BinaryIO, path: Path, memory: memoryview) -> int:
    """Fill `memory` from a file and return its length."""
    if file.readinto(memory) < len(memory):  # type: ignore[attr-defined]
        raise UserError(f"{path}: became shorter while it was read")
    return len(memory)


def statistics(stored: Stored) -> dict[str, dict[str, float | int]]:
    """For each tensor: the norm and the largest absolute value of its finite elements, and the number of zeros and of
    elements that are not finite.
    """
    found: dict[str, dict[str, float | int]] = {}
    for name, location in stored.tensors.items():
        squares = largest = 0.0
        zeros = nonfinite = 0
        for part in parts(name, location):
            finite = part.isfinite()
            nonfinite += part.numel() - int(finite.sum())
            part = part.where(finite, 0.0).abs_()
            squares += float(part.dot(part))
            largest = max(largest, float(part.max()))
            zeros += int((part == 0).sum()) - int((~finite).sum())
        found[name] = {"norm": math.sqrt(squares), "largest": largest, "zeros": zeros, "nonfinite": nonfinite}
    return found


@dataclass
class Change:
    """How the elements of two tensors, or of all tensors of a layer, differ.

    a_squares, change_squares: sums of squares of A and of B - A, over the elements that are finite in both.
    nonfinite: elements that differ and are not finite in A or in B.
    """

    elements: int = 0
    changed: int = 0
    largest: float = 0.0
    a_squares: float = 0.0
    change_squares: float = 0.0
    nonfinite: int = 0

    @property
    def relative(self) -> float:
        """The norm of B - A over the norm of A; infinite if A is all zeros and B is not."""
        if self.change_squares == 0:
            return 0.0
        return math.sqrt(self.change_squares / self.a_squares) if self.a_squares else math.inf

    def add(self, other: Change) -> None:
        self.elements += other.elements
        self.changed += other.changed
        self.largest = max(self.largest, other.largest)
        self.a_squares += other.a_squares
        self.change_squares += other.change_squares
        self.nonfinite += other.nonfinite


def change(name: str, a: Location, b: Location) -> Change:
    """How tensor B differs from tensor A; they have the same shape."""
    found = Change(elements=a.entry.elements)
    for of_a, of_b in zip(parts(name, a), parts(name, b), strict=True):
        finite = of_a.isfinite() & of_b.isfinite()
        same = (of_a == of_b) | (of_a.isnan() & of_b.isnan())
        found.changed += int((~same).sum())
        found.nonfinite += int((~finite & ~same).sum())
        of_a, of_b = of_a.where(finite, 0.0), of_b.where(finite, 0.0)
        found.a_squares += float(of_a.dot(of_a))
        of_b -= of_a
        found.change_squares += float(of_b.dot(of_b))
        found.largest = max(found.largest, float(of_b.abs_().max()))
    return found


@dataclass(frozen=True)
class Difference:
    """How weights B differ from weights A, by tensor and by layer."""

    a: str
    b: str
    tensors: dict[str, Change]
    layers: dict[str, Change]
    only_a: list[str]
    only_b: list[str]
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]  # of tensors whose shapes differ
    types: dict[str, tuple[str, str]]

    @property
    def equal(self) -> bool:
        return not (self.only_a or self.only_b or self.shapes or any(found.changed for found in self.tensors.values()))

    def as_json(self) -> dict[str, Any]:
        def facts(found: Change) -> dict[str, Any]:
            return {
                "elements": found.elements,
                "changed": found.changed,
                "largest": found.largest,
                "relative": found.relative,
                "nonfinite": found.nonfinite,
            }

        return {
            "a": self.a,
            "b": self.b,
            "equal": self.equal,
            "layers": {name: facts(found) for name, found in self.layers.items()},
            "tensors": {name: facts(found) for name, found in self.tensors.items()},
            "only_a": self.only_a,
            "only_b": self.only_b,
            "shapes": self.shapes,
            "types": self.types,
        }


def difference(a: Stored, b: Stored) -> Difference:
    """Compare two sets of weights, tensor by tensor."""
    shared = [name for name in a.tensors if name in b.tensors]
    shapes = {name: (a.tensors[name].entry.shape, b.tensors[name].entry.shape) for name in shared}
    types = {name: (a.tensors[name].entry.dtype, b.tensors[name].entry.dtype) for name in shared}
    other_shapes = {name: pair for name, pair in shapes.items() if pair[0] != pair[1]}
    tensors: dict[str, Change] = {}
    layers: dict[str, Change] = {}
    for name in shared:
        if name not in other_shapes:
            tensors[name] = change(name, a.tensors[name], b.tensors[name])
            layers.setdefault(module_of(name), Change()).add(tensors[name])
    return Difference(
        a.name,
        b.name,
        tensors,
        layers,
        [name for name in a.tensors if name not in b.tensors],
        [name for name in b.tensors if name not in a.tensors],
        other_shapes,
        {name: pair for name, pair in types.items() if pair[0] != pair[1]},
    )
