"""The screens of experiments.py about differences: diff, compare and explain."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from utils.config.section import MACHINE, OBSERVATION, TRAJECTORY
from utils.experiments.compare import SEEDS_NEEDED, Comparison, PairVerdict, SeedGroup
from utils.experiments.diff import RunDiff, result_name
from utils.experiments.explain import Explanation
from utils.terminal.tables import plain_table, title
from utils.terminal.words import column_text, fact_lines, loss_text, rough_duration, setting_text

VERDICT_STYLES = {
    "better": "green",
    "worse": "red",
    "different": "yellow",
    "within noise": "yellow",
    "not finite": "red",
    "too few seeds": "dim",
}
KINDS: dict[str, str] = {
    TRAJECTORY: "trajectory: changes the numbers of a run; a resume keeps it",
    OBSERVATION: "observation: what is recorded; a resume may change it",
    MACHINE: "machine: where things are, what does the work; a resume may change it",
}


def diff_screen(diff: RunDiff) -> Iterator[RenderableType]:
    """What differs between runs, likely causes first, and then their results."""
    letters = [column_name(i) for i in range(len(diff.runs))]
    for letter, run in zip(letters, diff.runs, strict=True):
        yield Text.assemble((f"{letter}  ", "bold"), run)
    for name, rows in diff.sections.items():
        table = plain_table(left=["", *letters])
        for row in rows:
            sources = row.sources or [""] * len(row.values)
            cells = [
                Text.assemble(_diff_text(row.name, value), (f"  {source}" if source else "", "dim"))
                for value, source in zip(row.values, sources, strict=True)
            ]
            table.add_row(Text(row.name, style="cyan"), *cells)
        yield Group("", title(name), table)
        if name == "Code":
            yield from _code_diff(diff)
    if not diff.sections:
        yield Text("\nno setting, code, corpus or environment differs", style="yellow")
    results = plain_table(left=[""], right=letters)
    for row in diff.results:
        cells = [_against_first(row.name, value, row.values[0], i) for i, value in enumerate(row.values)]
        results.add_row(Text(result_name(row.name), style="cyan"), *cells)
    yield Group("", title("Results"), results, "")
    for letter, (_, logs) in zip(letters[1:], diff.curves, strict=True):
        style = "green" if logs.identical else "red" if logs.problem else ""
        yield Text(f"A and {letter}: {logs}", style=style)


def column_name(index: int) -> str:
    """The name of a column: A, B, ..., Z, AA, AB, ..."""
    return (column_name(index // 26 - 1) if index >= 26 else "") + chr(ord("A") + index % 26)


def _code_diff(diff: RunDiff) -> Iterator[RenderableType]:
    if diff.commits:
        yield Group("", title("Commits (< only in A, > only in the other)"), *map(Text, diff.commits))
    if diff.patch:
        styles = {"+": "green", "-": "red", "@": "cyan"}
        lines = [Text(line, style=styles.get(line[:1], ""), no_wrap=True) for line in diff.patch]
        yield Group("", title("Uncommitted changes that differ (- A, + the other)"), *lines)


def _diff_text(name: str, value: Any) -> str:
    is_hash = len(str(value)) in (40, 64)
    return column_text("commit" if is_hash else name, value) or "none"


def _against_first(name: str, value: Any, first: Any, index: int) -> Text:
    """A result of run number `index`; for a loss, also its difference from that of the first run."""
    text = Text(column_text(name, value) or "-")
    if index and isinstance(value, float) and isinstance(first, float) and name.endswith(("loss", "bits_per_byte")):
        delta = value - first
        if math.isfinite(delta):
            text.append(f"  {delta:+.4f}", style="green" if delta < 0 else "red" if delta > 0 else "dim")
    return text


def comparison_screen(comparison: Comparison) -> Iterator[RenderableType]:
    """The groups of runs, the verdicts, and the metric at equal steps, tokens and time."""
    if comparison.note:
        yield Group(Text.assemble(("! ", "yellow"), comparison.note), "")
    groups = plain_table(left=["group"], right=["runs", "mean", "std", "95% of the mean"])
    for group in comparison.groups:
        groups.add_row(Text(group.name, style="cyan"), *group_cells(group))
    yield Group(title(f"{comparison.metric} at the end"), groups)
    for line in comparison.splits:
        yield Text(line, style="dim")
    verdicts = plain_table(show_header=False)
    for pair in comparison.verdicts:
        word, why = verdict_words(pair)
        pair_name = f"{pair.first} against {pair.second}"
        verdicts.add_row(Text(pair_name), Text(word, style=VERDICT_STYLES[pair.verdict]), Text(why, style="dim"))
    if comparison.verdicts:
        yield Group("", title("Verdicts (Welch's t-test, 5%)"), verdicts)
    best_of = {True: min, False: max, None: None}[comparison.lower_is_better]
    for axis, rows in comparison.at.items():
        table = plain_table(right=[axis, *(group.name for group in comparison.groups)])
        for place, values in rows:
            finite = [value for value in values if value is not None and math.isfinite(value)]
            best = best_of(finite, default=None) if best_of else None
            styles = ["green" if value is not None and value == best else "" for value in values]
            cells = [Text(loss_text(value) or "-", style=style) for value, style in zip(values, styles, strict=True)]
            table.add_row(place_text(axis, place), *cells)
        yield Group("", title(title_at(comparison, axis)), table)
    if comparison.left_out:
        yield Group("", *(Text.assemble(("! ", "yellow"), line) for line in comparison.left_out))


def title_at(comparison: Comparison, axis: str) -> str:
    """The title of the table with the values at equal places of an axis."""
    between = ", interpolated between evaluations" if axis in comparison.interpolated else ""
    return f"{comparison.metric} at equal {'steps' if axis == 'step' else axis}{between}"


def verdict_words(pair: PairVerdict) -> tuple[str, str]:
    """The verdict on two groups, and the evidence for it."""
    word: str = "too few seeds to say" if pair.verdict == "too few seeds" else pair.verdict
    if pair.difference is not None and pair.verdict in ("better", "worse", "different"):
        word += f" by {loss_text(abs(pair.difference))}"
    if pair.verdict == "not finite":
        return word, "a mean is infinite or not a number"
    return word, f"p = {pair.p:.2g}" if pair.p is not None else f"needs {SEEDS_NEEDED} complete seeds each"


def group_cells(group: SeedGroup) -> list[str]:
    """The number of runs, mean, standard deviation and interval of a group, as text."""
    counted, runs = len(group.finals), len(group.runs)
    interval = f"{loss_text(group.interval[0])} to {loss_text(group.interval[1])}" if group.interval else ""
    number = f"{counted} of {runs}" if counted < runs else f"{runs}"
    return [number, loss_text(group.mean), loss_text(group.deviation), interval]


def place_text(axis: str, place: float) -> str:
    """A place on an axis as text."""
    if axis != "time":
        return f"{place:,.0f}"
    return f"{place:.1f} s" if place < 60 else rough_duration(place)


def explanation_screen(found: Explanation) -> Iterator[RenderableType]:
    """One setting with its meaning, and the value in every layer that it shadows."""
    resolved = f"  (resolved to {setting_text(found.resolved)})" if found.resolved is not None else ""
    rows = [
        ("value", f"{setting_text(found.value)}{resolved}"),
        ("set by", found.source),
        *(("shadows", f"{setting_text(value)}  {source}") for value, source in found.shadowed),
        ("default", setting_text(found.default)),
        ("meaning", found.meaning),
        ("expected", found.expected + (f", in {found.unit}" if found.unit else "")),
        ("kind", KINDS.get(found.kind, "")),
    ]
    yield title(f"{found.section}.{found.key}")
    yield fact_lines([row for row in rows if row[1]])
