"""The screen of weights.py diff."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from rich.console import RenderableType
from rich.table import Table

from utils.formats.inspection import ranges, shape_text
from utils.formats.numbers import Change, Difference
from utils.terminal.words import counted

TENSORS = 10  # shown without --all: those that moved most
NAMES = 8  # shown without --all, of the tensors that only one has; those of several layers count as one


def screen(found: Difference, everything: bool) -> Iterator[RenderableType]:
    """Show which layers moved, and which tensors moved most; with `everything`, all tensors that differ."""
    moved = {name: change for name, change in found.tensors.items() if change.changed}
    total = Change()
    for change in found.tensors.values():
        total.add(change)
    if found.equal:
        yield f"equal: {counted(total.elements, 'number')} in {counted(len(found.tensors), 'tensor')}"
    elif not found.tensors and not found.shapes:
        yield "no tensor has the same name in both"
    elif not moved:
        yield f"the {counted(len(found.tensors), 'tensor')} that both have are equal"
    else:
        tensors, numbers = counted(len(found.tensors), "tensor"), f"{total.changed:,} of {total.elements:,} numbers"
        yield f"{len(moved):,} of {tensors} differ, {numbers}"
        yield f"largest difference {total.largest:.4g}, relative {_relative(total)}"
        yield _table("layer", _by_size(found.layers) if everything else found.layers.items())
        shown = _by_size(moved)
        yield "all tensors that differ" if everything else f"the {min(TENSORS, len(shown))} tensors that moved most"
        yield _table("tensor", shown if everything else shown[:TENSORS])
        if len(shown) > TENSORS and not everything:
            yield f"and {len(shown) - TENSORS:,} more: --all shows them"
    for title, names in ((f"only in {found.a}", found.only_a), (f"only in {found.b}", found.only_b)):
        if names:
            names = names if everything else ranges(names)
            kept = names if everything else names[:NAMES]
            more = f" and {len(names) - len(kept):,} more" if len(names) > len(kept) else ""
            yield f"{title}: {', '.join(kept)}{more}"
    named: dict[str, list[str]] = {}
    for name, (a, b) in found.shapes.items():
        named.setdefault(f"shape {shape_text(a)}, now {shape_text(b)}", []).append(name)
    for words, names in named.items():
        yield from (f"{name}: {words}" for name in (names if everything else ranges(names)))
    if found.types:
        pairs = sorted({f"{a}, now {b}" for a, b in found.types.values()})
        yield f"{counted(len(found.types), 'tensor')} of another type: {'; '.join(pairs)}"


def _by_size(changes: dict[str, Change]) -> list[tuple[str, Change]]:
    return sorted(changes.items(), key=lambda item: -item[1].relative)


def _relative(change: Change) -> str:
    return f"{change.relative:.4g}" if change.changed else "0"


def _table(name: str, changes: Iterable[tuple[str, Change]]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column(name, overflow="fold")
    for column in ("relative", "largest", "changed", "not finite"):
        table.add_column(column, justify="right", no_wrap=True)
    for key, change in changes:
        share = f"{change.changed / max(change.elements, 1):.1%}" if change.changed else ""
        bad = f"{change.nonfinite:,}" if change.nonfinite else ""
        table.add_row(key, _relative(change), f"{change.largest:.4g}", share, bad)
    return table
