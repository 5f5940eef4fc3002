"""weights.py inspect: list the tensors of weights by module, from the headers alone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from utils.formats.stored import Stored
from utils.terminal.words import counted, one_line, size

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")  # of a layer: a whole part of a name, between dots
SHOWN_ROWS = 400  # a table has no more rows


@dataclass(frozen=True)
class Row:
    """Tensors whose names differ only in the number of the layer, with the same type and shape."""

    name: str  # with a range instead of the number
    dtype: str
    shape: tuple[int, ...]
    count: int
    elements: int
    bytes: int


def as_json(stored: Stored, stats: Mapping[str, Mapping[str, Any]] | None = None) -> dict[str, Any]:
    """All facts about the weights, for --json."""
    tensors = {
        name: {
            "dtype": location.entry.dtype,
            "shape": list(location.entry.shape),
            "elements": location.entry.elements,
            "bytes": location.entry.bytes,
            "file": location.file.name,
            **(stats or {}).get(name, {}),
        }
        for name, location in stored.tensors.items()
    }
    return {
        "weights": stored.name,
        "files": [{"path": str(path), "bytes": bytes} for path, bytes in stored.files.items()],
        "parameters": sum(tensor["elements"] for tensor in tensors.values()),
        "bytes": sum(tensor["bytes"] for tensor in tensors.values()),
        "dtypes": _by_dtype(stored),
        "modules": _by_module(stored),
        "tensors": tensors,
    }


def _by_dtype(stored: Stored) -> dict[str, int]:
    """The number of elements of each type, most first."""
    counts: dict[str, int] = {}
    for location in stored.tensors.values():
        counts[location.entry.dtype] = counts.get(location.entry.dtype, 0) + location.entry.elements
    return dict(sorted(counts.items(), key=lambda item: -item[1]))


def module_of(name: str) -> str:
    """The module that a tensor is counted in: its layer, or else its name without the last part.

    >>> [module_of(name) for name in ("blocks.3.mlp.up.weight", "model.layers.0.input_layernorm.weight", "head.weight")]
    ['blocks.3', 'model.layers.0', 'head']
    """
    if match := NUMBER.search(name):
        return name[: match.end()]
    return name.rpartition(".")[0] or name


def _by_module(stored: Stored) -> dict[str, dict[str, int]]:
    modules: dict[str, dict[str, int]] = {}
    for name, location in stored.tensors.items():
        module = modules.setdefault(module_of(name), {"tensors": 0, "parameters": 0, "bytes": 0})
        module["tensors"] += 1
        module["parameters"] += location.entry.elements
        module["bytes"] += location.entry.bytes
    return modules


def rows(stored: Stored) -> list[Row]:
    """The tensors as rows; those of several layers share a row if their shapes and types are equal."""
    groups: dict[tuple[str, str, tuple[int, ...]], list[str]] = {}
    for name, location in stored.tensors.items():
        pattern = NUMBER.sub("*", name, count=1)
        groups.setdefault((pattern, location.entry.dtype, location.entry.shape), []).append(name)
    found = []
    for (pattern, dtype, shape), names in groups.items():
        entries = [stored.tensors[name].entry for name in names]
        name = _in_one(pattern, names)
        elements, bytes = sum(entry.elements for entry in entries), sum(entry.bytes for entry in entries)
        found.append(Row(name, dtype, shape, len(names), elements, bytes))
    return found


def ranges(names: Iterable[str]) -> list[str]:
    """Names of tensors, with those of several layers merged into one.

    >>> ranges(["blocks.0.up", "head", "blocks.1.up"])
    ['blocks.[0-1].up', 'head']
    """
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(NUMBER.sub("*", name, count=1), []).append(name)
    return [_in_one(pattern, group) for pattern, group in groups.items()]


def _in_one(pattern: str, names: Sequence[str]) -> str:
    """One name for several that match `pattern`, with a range in place of *; a single name stays as it is."""
    numbers = sorted(int(match[0]) for name in names if (match := NUMBER.search(name)) and "*" in pattern)
    return pattern.replace("*", _range(numbers), 1) if len(names) > 1 else names[0]


def _range(numbers: list[int]) -> str:
    """Sorted numbers in short: [0-11] or [0,2-5].

    >>> _range([0, 2, 3, 4])
    '[0,2-4]'
    """
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return f"[{','.join('-'.join(map(str, run)) for run in runs)}]"


def screen(stored: Stored, stats: Mapping[str, Mapping[str, Any]] | None = None) -> Iterator[RenderableType]:
    """The screen of weights.py inspect."""
    names = [path.name for path in stored.files]
    where = (
        str(next(iter(stored.files))) if len(names) == 1 else f"{next(iter(stored.files)).parent}: {len(names)} files"
    )
    elements = sum(location.entry.elements for location in stored.tensors.values())
    total = sum(location.entry.bytes for location in stored.tensors.values())
    types = ", ".join(f"{dtype} {count / max(elements, 1):.0%}" for dtype, count in _by_dtype(stored).items())
    yield one_line(where)
    yield f"{elements:,} parameters in {counted(len(stored.tensors), 'tensor')}, {size(total)} ({types or 'none'})"
    if stats is None:
        shown = rows(stored)
        yield _rows_table(shown[:SHOWN_ROWS])
        yield from _left_out(len(shown))
        return
    yield _stats_table(stored, dict(list(stats.items())[:SHOWN_ROWS]))
    yield from _left_out(len(stats))
    if bad := sum(found["nonfinite"] for found in stats.values()):
        yield f"{counted(bad, 'number')} not finite"


def _table(*numbers: str) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("tensor", overflow="fold")
    for name in ("shape", *numbers):
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _rows_table(shown: Iterable[Row]) -> Table:
    table = _table("type", "parameters", "bytes")
    for row in shown:
        table.add_row(row.name, shape_text(row.shape), row.dtype, f"{row.elements:,}", size(row.bytes))
    return table


def _stats_table(stored: Stored, stats: Mapping[str, Mapping[str, Any]]) -> Table:
    """A row for each tensor, without the columns that would be empty."""
    mixed, texts = len(_by_dtype(stored)) > 1, {}
    for name, found in stats.items():
        entry = stored.tensors[name].entry
        texts[name] = {
            "norm": f"{found['norm']:.5g}",
            "largest": f"{found['largest']:.4g}",
            "zeros": f"{found['zeros'] / max(entry.elements, 1):.1%}" if found["zeros"] else "",
            "not finite": f"{found['nonfinite']:,}" if found["nonfinite"] else "",
            "type": entry.dtype if mixed else "",
        }
    columns = [key for key in ("type", "norm", "largest", "zeros", "not finite") if any(t[key] for t in texts.values())]
    table = _table(*columns)
    for name, of_name in texts.items():
        table.add_row(name, shape_text(stored.tensors[name].entry.shape), *(of_name[key] for key in columns))
    return table


def _left_out(count: int) -> Iterator[str]:
    if count > SHOWN_ROWS:
        yield f"and {count - SHOWN_ROWS:,} more: --json has all"


def shape_text(shape: Iterable[int]) -> str:
    """A shape in words: 768 x 3072.

    >>> shape_text((768, 3072)), shape_text(())
    ('768 x 3072', 'one number')
    """
    return " x ".join(map(str, shape)) or "one number"
