"""What experiments.py prints: runs, differences and verdicts as tables. No torch here."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Group, JustifyMethod, RenderableType
from rich.table import Table
from rich.text import Text

from utils.checkpoints.folder import list_checkpoints
from utils.experiments.compare import SEEDS_NEEDED, Comparison
from utils.experiments.diff import RunDiff, environment_of
from utils.experiments.explain import Explanation, settings_with_sources
from utils.experiments.prune import PrunePlan
from utils.files import size_of
from utils.runs.index import DAMAGED, FACTS, IndexedRun, differing_settings, non_default_settings
from utils.runs.layout import ARTIFACTS, CHECKPOINTS, LOGS
from utils.terminal.words import CONTROL, HASH_LENGTH, facts, shown, size, span

STYLES = {
    "completed": "green",
    "running": "bold cyan",
    "interrupted": "yellow",
    "crashed": "red",
    "failed": "red",
    "diverged": "red",
    DAMAGED: "red",
}
WORDS = {"too few seeds": "too few seeds to say"}
VERDICT_STYLES = {
    "better": "green",
    "worse": "red",
    "different": "yellow",
    "within noise": "yellow",
    "too few seeds": "dim",
}
LIST_COLUMNS = ("id", "tag", "status", "age", "duration", "steps", "val_loss")  # then what differs, commit, note
MOST_WANTED = ("id", "status", "val_loss")  # where there is little room; then settings that differ, then these:
LESS_WANTED = ("steps", "commit", "note", "tag", "duration", "age")
NOTE_WIDTH = 40


def list_table(runs: Sequence[IndexedRun], columns: Sequence[str], width: int) -> RenderableType:
    """One row a run; what cannot be read is marked, with the reason.

    Args:
        width: so many characters there are; columns that do not fit are left out.
    """
    rows = [run.row() for run in runs]
    cells = {column: [_cell(column, row, run) for row, run in zip(rows, runs, strict=True)] for column in columns}
    widths = {name: _width(name, texts) for name, texts in cells.items()}
    kept = _fitting(widths, width)
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for column in kept:
        numbers = all(isinstance(row.get(column), int | float | None) for row in rows)
        justify: JustifyMethod = "right" if numbers else "left"
        if column == "note":
            table.add_column(_header(column), justify=justify)
        else:  # its width is known: rich would measure each cell again
            table.add_column(_header(column), justify=justify, no_wrap=True, width=widths[column] - 2)
    for index in range(len(runs)):
        table.add_row(*(cells[column][index] for column in kept))
    problems = [Text.assemble(("! ", "red"), (run.id, "cyan"), f": {run.problem}") for run in runs if run.problem]
    left_out = [column for column in columns if column not in kept]
    hint = [Text(f"no room for {', '.join(left_out)} (--columns A,B)", style="dim")] if left_out else []
    return Group(table, *hint, *problems)


def _cell(column: str, row: Mapping[str, Any], run: IndexedRun) -> Text:
    cell = Text(shown(column, row.get(column)))
    if column == "status":
        cell.stylize(STYLES.get(run.status, ""))
    elif column == "commit" and row["dirty"]:
        cell.append("+", style="yellow")
    elif column == "id" and row["pinned"]:
        cell.append(" pinned", style="yellow")
    return cell


def _header(column: str) -> str:
    return column.replace("_", " ") if column in FACTS else column


def _width(column: str, cells: Sequence[Text]) -> int:
    """Characters that a column takes, with the space after it."""
    longest = max((cell.cell_len for cell in cells), default=0)
    return 2 + max(len(_header(column)), min(longest, NOTE_WIDTH) if column == "note" else longest)


def _fitting(widths: Mapping[str, int], width: int) -> list[str]:
    """The columns that fit side by side: those of MOST_WANTED first, those of LESS_WANTED last."""
    settings = (column for column in widths if column not in LESS_WANTED)
    wanted = [column for column in (*MOST_WANTED, *settings, *LESS_WANTED) if column in widths]
    kept: set[str] = set()
    for column in dict.fromkeys(wanted):
        if sum(widths[name] for name in kept) + widths[column] <= width + 2:
            kept.add(column)
    return [column for column in widths if column in kept]


def columns_of(runs: Sequence[IndexedRun]) -> list[str]:
    """The columns of a list that nobody has asked for: the facts, the settings that differ, commit and note."""
    differing = [key for key in differing_settings(runs) if key not in FACTS]
    return [*LIST_COLUMNS, *differing, "commit", *(["note"] if any(run.notes["note"] for run in runs) else [])]


def show_screen(run: IndexedRun, children: Sequence[str], models: Sequence[str]) -> list[RenderableType]:
    """One run on one screen."""
    row, record = run.row(), run.record
    reason = f": {record.get('exit_reason')}" if record.get("exit_reason") else ""
    parent = record.get("parent")
    resolved = record.get("resolved") or {}
    environment = environment_of(run)
    dirty = " with uncommitted changes" if row["dirty"] else ""
    best_loss = "" if row["val_loss"] is None else f"{row['val_loss']:.4f}"
    best_loss += f" at step {row['best_step']:,}" if best_loss and row["best_step"] is not None else ""
    told = [
        ("status", run.status + reason),
        ("problem", run.problem or ""),
        ("tag", row["tag"] or ""),
        ("tags", row["tags"]),
        ("note", row["note"]),
        ("pinned", "yes" if row["pinned"] else ""),
        (
            "started",
            f"{record.get('start', '')[:19].replace('T', ' ')} UTC, {span(row['age'])} ago" if row["age"] else "",
        ),
        ("duration", "" if row["duration"] is None else span(row["duration"])),
        ("steps", f"{row['steps']:,} of {resolved['max_iters']:,}" if row["steps"] and "max_iters" in resolved else ""),
        ("best val/loss", best_loss),
        ("last val/loss", shown("val_loss", row["last_val_loss"])),
        ("parameters", shown("parameters", row["parameters"])),
        (
            "corpus",
            f"{resolved.get('dataset')}, sha256 {resolved['corpus_hash'][:HASH_LENGTH]}"
            if resolved.get("corpus_hash")
            else "",
        ),
        (
            "code",
            f"{row['commit'][:HASH_LENGTH]} on {row['branch'] or 'no branch'}{dirty}" if row["commit"] else "not known",
        ),
        ("machine", ", ".join(str(resolved[key]) for key in ("processor", "device", "dtype") if resolved.get(key))),
        ("torch", f"{row['torch']}, {resolved.get('threads')} threads" if row["torch"] else ""),
        (
            "environment",
            ", ".join(f"{name} {environment[name]}" for name in ("python", "platform") if name in environment),
        ),
        ("command", "python " + " ".join(record["argv"]) if record.get("argv") else ""),
        ("parent", f"{parent['run']} ({parent['relation']} at step {parent['step']:,})" if parent else ""),
        ("children", ", ".join(children)),
        ("promoted as", ", ".join(models)),
        ("resumed", f"{len(record['resumes'])} times" if record.get("resumes") else ""),
        ("trackers", ", ".join(f"{name} {view.get('state')}" for name, view in (record.get("views") or {}).items())),
        ("directory", str(run.path)),
    ]
    parts: list[RenderableType] = [Text(run.id, style="bold"), facts([line for line in told if line[1]])]
    sources = settings_with_sources(run)
    settings = non_default_settings(run)
    if settings:
        table = _table(show_header=False)
        for key, value in settings.items():
            table.add_row(
                Text(key, style="cyan"),
                Text(shown(key, value), overflow="fold"),
                Text(sources.get(key, ""), style="dim"),
            )
        parts += ["", _title("Settings that differ from the defaults"), table]
    files = _table(show_header=False)
    for step, path in list_checkpoints(run.path / CHECKPOINTS):
        files.add_row(f"checkpoint of step {step:,}", size(size_of(path)))
    for path in sorted((run.path / ARTIFACTS).glob("[!.]*")) if (run.path / ARTIFACTS).is_dir() else ():
        if path.name != CHECKPOINTS.name:
            files.add_row(
                Text(f"{ARTIFACTS / path.name}"), size(size_of(path) if path.is_dir() else path.stat().st_size)
            )
    files.add_row("logs", size(size_of(run.path / LOGS)))
    return [*parts, "", _title("Files"), files]


def _title(text: str) -> Text:
    return Text(text, style="bold")


def _table(left: Sequence[str] = (), right: Sequence[str] = (), show_header: bool = True) -> Table:
    """Without lines; columns of text, then columns of numbers."""
    table = Table(box=None, pad_edge=False, header_style="dim", show_header=show_header, padding=(0, 2, 0, 0))
    for header in left:
        table.add_column(Text(header), overflow="fold")
    for header in right:
        table.add_column(Text(header), justify="right")
    return table


def diff_tables(diff: RunDiff) -> Iterator[RenderableType]:
    """What differs, likely causes first, then what came of it."""
    letters = [chr(ord("A") + i) for i in range(len(diff.runs))]
    for letter, run in zip(letters, diff.runs, strict=True):
        yield Text.assemble((f"{letter}  ", "bold"), run)
    for title, rows in diff.sections.items():
        table = _table(left=["", *letters])
        for row in rows:
            sources = row.sources or [""] * len(row.values)
            cells = [
                Text.assemble(_word(row.name, value), (f"  {source}" if source else "", "dim"))
                for value, source in zip(row.values, sources, strict=True)
            ]
            table.add_row(Text(row.name, style="cyan"), *cells)
        yield Group("", _title(title), table)
        if title == "Code":
            yield from _code(diff)
    if not diff.sections:
        yield Text("\nno setting, code, corpus or environment differs", style="yellow")
    outcomes = _table(left=[""], right=letters)
    for row in diff.outcomes:
        cells = [_against(row.name, value, row.values[0], i) for i, value in enumerate(row.values)]
        outcomes.add_row(Text(row.name.replace("_", " "), style="cyan"), *cells)
    yield Group("", _title("What came of it"), outcomes, "")
    for letter, (_, logs) in zip(letters[1:], diff.curves, strict=True):
        if logs.identical:
            yield Text(f"A and {letter}: identical in all {logs.steps:,} steps that both have", style="green")
        elif logs.problem:
            yield Text(f"A and {letter}: {logs.problem}", style="red")
        elif logs.difference is None:
            yield Text(f"A and {letter}: no step that both have logged")
        else:
            yield Text(f"A and {letter}: {logs.difference}")


def _code(diff: RunDiff) -> Iterator[RenderableType]:
    if diff.commits:
        yield Group("", _title("Commits (< only in A, > only in the other)"), *map(Text, diff.commits))
    if diff.patch:
        styles = {"+": "green", "-": "red", "@": "cyan"}
        lines = [Text(line, style=styles.get(line[:1], "")) for line in diff.patch]
        yield Group("", _title("Uncommitted changes that are not the same (- A, + the other)"), *lines)


def _word(name: str, value: Any) -> str:
    return shown("commit" if len(str(value)) in (40, 64) else name, value) or "none"


def _against(name: str, value: Any, first: Any, index: int) -> Text:
    """A value, and how far it is from that of the first run."""
    text = Text(shown(name, value) or "-")
    if index and isinstance(value, float) and isinstance(first, float) and name.endswith("loss"):
        delta = value - first
        text.append(f"  {delta:+.4f}", style="green" if delta < 0 else "red" if delta > 0 else "dim")
    return text


def comparison_tables(comparison: Comparison) -> Iterator[RenderableType]:
    """Groups, verdicts, and the metric at equal steps, tokens and time."""
    groups = _table(left=["group"], right=["runs", "mean", "std", "95% of the mean"])
    for group in comparison.groups:
        runs = (
            f"{len(group.finals)} of {len(group.runs)}" if len(group.finals) < len(group.runs) else f"{len(group.runs)}"
        )
        interval = f"{group.interval[0]:.4f} to {group.interval[1]:.4f}" if group.interval else ""
        groups.add_row(Text(group.name, style="cyan"), runs, _number(group.mean), _number(group.deviation), interval)
    yield Group(_title(f"{comparison.metric} at the end"), groups)
    verdicts = _table(show_header=False)
    for pair in comparison.verdicts:
        decided = pair.difference is not None and pair.verdict in ("better", "worse", "different")
        word = WORDS.get(pair.verdict, pair.verdict) + (f" by {abs(pair.difference or 0.0):.4f}" if decided else "")
        why = f"p = {pair.p:.2g}" if pair.p is not None else f"needs {SEEDS_NEEDED} complete seeds each"
        pair_name = f"{pair.first} against {pair.second}"
        verdicts.add_row(Text(pair_name), Text(word, style=VERDICT_STYLES[pair.verdict]), Text(why, style="dim"))
    if comparison.verdicts:
        yield Group("", _title("Verdicts (Welch's t-test, 5%)"), verdicts)
    for axis, rows in comparison.at.items():
        at = _table(right=[axis, *(group.name for group in comparison.groups)])
        for place, values in rows:
            best = min((value for value in values if value is not None and math.isfinite(value)), default=None)
            cells = [Text(_number(value) or "-", style="green" if value == best else "") for value in values]
            at.add_row(_place(axis, place), *cells)
        yield Group("", _title(f"{comparison.metric} at equal {'steps' if axis == 'step' else axis}"), at)
    if comparison.left_out:
        yield Group("", *(Text.assemble(("! ", "yellow"), line) for line in comparison.left_out))


def _place(axis: str, place: float) -> str:
    if axis != "time":
        return f"{place:,.0f}"
    return f"{place:.1f} s" if place < 60 else span(place)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def explanation(e: Explanation) -> RenderableType:
    """One setting, with every layer it shadows."""
    came_to = f"  (came to {e.resolved})" if e.resolved is not None else ""
    rows = [
        ("value", f"{_value(e.value)}{came_to}"),
        ("set by", e.source),
        *(("shadows", f"{_value(value)}  {source}") for value, source in e.shadowed),
        ("default", _value(e.default)),
        ("meaning", e.meaning),
        ("expected", e.expected + (f", in {e.unit}" if e.unit else "")),
        ("kind", KINDS.get(e.kind, "")),
    ]
    title = Text(f"{e.section}.{e.key}", style="bold")
    return Group(title, facts([row for row in rows if row[1]]))


KINDS = {
    "trajectory": "trajectory: changes the numbers of a run; a resume keeps it",
    "observation": "observation: what is recorded; a resume may change it",
    "machine": "machine: where things are, who does the work; a resume may change it",
}


def _value(value: Any) -> str:
    return "none" if value is None else "on" if value is True else "off" if value is False else str(value)


def prune_table(plan: PrunePlan) -> RenderableType:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for header in ("run", "what goes", "frees"):
        table.add_column(header, justify="right" if header == "frees" else "left")
    for removal in plan.removals:
        what = "the whole run" if removal.what == "run" else "checkpoints"
        table.add_row(Text(removal.run), what, size(removal.bytes))
    checkpoints = any(removal.what == "checkpoints" for removal in plan.removals)
    hint = [Text("A run without checkpoints cannot be resumed or forked any more.", style="dim")] if checkpoints else []
    return Group(table, *hint)


def sql_table(columns: Sequence[str], rows: Sequence[Sequence[Any]], width: int) -> RenderableType:
    """Rows of a query; where they are wider than `width`, one value a line."""
    texts = [[_sql_text(value) for value in row] for row in rows]
    needed = (
        sum(
            2 + max(len(name), *(text.cell_len for text in of_column))
            for name, of_column in zip(columns, zip(*texts, strict=True), strict=True)
        )
        if texts
        else 0
    )
    if needed > width + 2:
        return Group(*(facts([*zip(columns, map(str, row), strict=True), ("", "")]) for row in texts))
    table = Table(box=None, pad_edge=False, header_style="bold")
    for index, column in enumerate(columns):
        numbers = all(isinstance(row[index], int | float | None) for row in rows)
        table.add_column(Text(column), justify="right" if numbers else "left", overflow="fold")
    for row in texts:
        table.add_row(*row)
    return table


def _sql_text(value: Any) -> Text:
    text = "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)
    return Text(CONTROL.sub(lambda found: repr(found.group())[1:-1], text))
