"""The screens of experiments.py about runs themselves: list, sql, show, prune and check."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console, Group, JustifyMethod, RenderableType
from rich.table import Table
from rich.text import Text

from utils.checkpoints.folder import list_checkpoints
from utils.errors import UserError, nearest, number_text
from utils.experiments.diff import environment_of
from utils.experiments.explain import settings_with_sources
from utils.experiments.prune import PrunePlan
from utils.folders import size_of
from utils.runs.evaluations import NUMBERS, newest_evaluations
from utils.runs.identity import differing_settings, non_default_settings, tokenizers_differ
from utils.runs.index import DAMAGED, FACTS, IndexedRun
from utils.runs.layout import ARTIFACTS, BASE_WEIGHTS, CHECKPOINTS, LOGS
from utils.runs.seal import SealCheck
from utils.terminal.tables import plain_table, title
from utils.terminal.words import (
    HASH_LENGTH,
    column_text,
    counted,
    fact_lines,
    loss_text,
    one_line,
    rough_duration,
    setting_text,
    size,
    time_text,
)

UNLIMITED = 10_000  # columns of a line if no terminal limits it
STATUS_STYLES = {
    "completed": "green",
    "running": "bold cyan",
    "interrupted": "yellow",
    "crashed": "red",
    "failed": "red",
    "diverged": "red",
    DAMAGED: "red",
}
RESULTS = ("val_loss", "last_val_loss")
LIST_COLUMNS = ("id", "tag", "status", "age", "duration", "steps", *RESULTS)  # then what differs, commit, note
# If there is little room, ALWAYS comes first, then settings that differ, then columns that repeat others, LESS_WANTED.
ALWAYS = ("id", "tag", "status", *RESULTS)
LESS_WANTED = ("evaluated", "steps", "commit", "note", "duration", "age")
HEADERS = {"val_loss": "best val", "last_val_loss": "last val"}  # for columns whose name would say too little
NAME_WIDTH = 12  # the least characters of a line for an id and a tag; the rest of them continues below
FOLDED_WIDTHS = {"note": 40, "evaluated": 24}  # columns whose texts are folded to so many characters
EVALUATIONS_SHOWN = 12  # on the screen of a run


# ------------------------------------------------------------------------------------------------ list, sql and show


def chosen_columns(text: str | None, runs: Sequence[IndexedRun]) -> list[str]:
    """The columns that --columns names; [] without it.

    Raises:
        UserError: no run has such a column.
    """
    if text is None:
        return []
    known = [*FACTS, *dict.fromkeys(key for run in runs for key in run.settings if key not in FACTS)]
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise UserError(f"--columns: expected names, separated by commas, got {text!r}")
    if names == ["all"]:
        return list(FACTS)
    for name in names:
        if name not in known:
            raise UserError(f"--columns: no column {name}{nearest(name, known)}")
    return names


def columns_of(runs: Sequence[IndexedRun]) -> list[str]:
    """The default columns of a list: facts, settings that differ, commit, and the note if a run has one."""
    differing = [key for key in differing_settings(runs) if key not in FACTS]
    comparable = ["bits_per_byte"] if tokenizers_differ(runs) else []
    evaluated = ["evaluated"] if any(run.evaluations for run in runs) else []
    return [
        *LIST_COLUMNS,
        *comparable,
        *evaluated,
        *differing,
        "commit",
        *(["note"] if any(run.notes["note"] for run in runs) else []),
    ]


def list_screen(
    runs: Sequence[IndexedRun], columns: Sequence[str], console: Console, others: Sequence[IndexedRun] = ()
) -> Iterator[RenderableType]:
    """The list of runs with all of `columns` or, without them, with the default columns that fit in the terminal.

    Args:
        others: runs that are not shown but counted in a note.
    """
    if columns or not console.is_terminal:
        console.width = UNLIMITED
    yield list_table(runs, columns or columns_of(runs), console.width)
    if others:
        damaged = sum(not run.readable for run in others)
        words = f"; {damaged:,} of the others cannot be read" if damaged else ""
        yield Text(f"{len(runs):,} of {len(runs) + len(others):,} runs (--all shows all){words}", style="dim")


def list_table(runs: Sequence[IndexedRun], columns: Sequence[str], width: int) -> RenderableType:
    """A table with one row for each run; runs that cannot be read are named below it, with the reason.

    Args:
        width: of a line, in characters; columns that do not fit are left out.
    """
    rows = [run.row() for run in runs]
    cells = {column: [_cell(column, row, run) for row, run in zip(rows, runs, strict=True)] for column in columns}
    widths = {name: _width(name, texts) for name, texts in cells.items()}
    kept = _fitting(widths, width, _repeating(cells))
    names = sorted({"id", "tag"}.intersection(kept), key=lambda name: widths[name])
    room = width + 2 - sum(widths[name] for name in kept if name not in names)
    for left, column in zip(range(len(names), 0, -1), names, strict=True):  # the shorter one leaves room for the other
        widths[column] = min(widths[column], max(NAME_WIDTH, room // left))
        room -= widths[column]
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for column in kept:
        numbers = all(isinstance(row.get(column), int | float | None) for row in rows)
        justify: JustifyMethod = "right" if numbers else "left"
        if column in FOLDED_WIDTHS:
            table.add_column(_header(column), justify=justify)
        else:  # the width is known, so rich need not measure each cell again
            table.add_column(_header(column), justify=justify, overflow="fold", width=widths[column] - 2)
    for index in range(len(runs)):
        table.add_row(*(cells[column][index] for column in kept))
    problems = [
        Text.assemble(("! ", "red"), (one_line(run.id), "cyan"), f": {one_line(run.problem)}")
        for run in runs
        if run.problem
    ]
    left_out = [column for column in columns if column not in kept]
    hint = [Text(f"no room for {', '.join(left_out)} (--columns A,B)", style="dim")] if left_out else []
    return Group(table, *hint, *problems)


def _cell(column: str, row: Mapping[str, Any], run: IndexedRun) -> Text:
    cell = Text(column_text(column, row.get(column)))
    if column == "status":
        cell.stylize(STATUS_STYLES.get(run.status, ""))
    elif column == "commit" and row["dirty"]:
        cell.append("+", style="yellow")
    elif column == "id" and row["pinned"]:
        cell.append(" pinned", style="yellow")
    return cell


def _header(column: str) -> str:
    return HEADERS.get(column, column.replace("_", " ")) if column in FACTS else column


def _width(column: str, cells: Sequence[Text]) -> int:
    """The characters that a column takes, with the space after it."""
    longest = max((cell.cell_len for cell in cells), default=0)
    return 2 + max(len(_header(column)), min(longest, FOLDED_WIDTHS.get(column, longest)))


def _repeating(cells: Mapping[str, Sequence[Text]]) -> list[str]:
    """The columns that repeat another one in each row: a tag with which the id ends, a last loss equal to the best."""
    texts = {column: [cell.plain.removesuffix(" pinned") for cell in of_column] for column, of_column in cells.items()}
    ids, tags = texts.get("id", ()), texts.get("tag", ())
    found = ["tag"] if all(name.endswith(tag) for name, tag in zip(ids, tags, strict=False)) else []
    best, last = (texts.get(column) for column in RESULTS)
    return [*found, *(RESULTS[1:] if best == last else ())]


def _fitting(widths: Mapping[str, int], width: int, repeating: Sequence[str]) -> list[str]:
    """The columns that fit side by side; ALWAYS comes first, then settings (seed last), `repeating`, LESS_WANTED."""
    last = [column for column in (*repeating, *LESS_WANTED) if column in widths]
    kept = {column for column in ALWAYS if column in widths and column not in last}
    settings = sorted((column for column in widths if column not in {*kept, *last}), key="seed".__eq__)
    for column in (*settings, *last):
        if sum(widths[name] for name in kept) + widths[column] <= width + 2:
            kept.add(column)
    return [column for column in widths if column in kept]


def sql_screen(columns: Sequence[str], rows: Sequence[Sequence[Any]], console: Console) -> Iterator[RenderableType]:
    """The result of a query: a table, or one value on each line if the table would be wider than the terminal."""
    console.width = console.width if console.is_terminal else UNLIMITED
    texts = [[Text(_sql_text(value)) for value in row] for row in rows]
    by_column = zip(columns, zip(*texts, strict=True), strict=True) if texts else ()
    if sum(2 + max(len(name), *(text.cell_len for text in cells)) for name, cells in by_column) > console.width + 2:
        for row in texts:
            yield fact_lines([*zip(columns, map(str, row), strict=True), ("", "")], copied=True)
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for index, column in enumerate(columns):
        numbers = all(isinstance(row[index], int | float | None) for row in rows)
        table.add_column(Text(column), justify="right" if numbers else "left", overflow="fold")
    for row in texts:
        table.add_row(*row)
    yield table


def _sql_text(value: Any) -> str:
    return "" if value is None else number_text(value) if isinstance(value, float) else one_line(str(value))


def show_screen(run: IndexedRun, children: Sequence[str], models: Sequence[str]) -> Iterator[RenderableType]:
    """One run on one screen.

    Args:
        children: ids of the runs that continue this one or start from its weights.
        models: the names NAME@vN that it was promoted to.
    """
    yield title(one_line(run.id))
    yield fact_lines([line for line in (*result_facts(run), *provenance_facts(run, children, models)) if line[1]])
    if run.evaluations:
        yield Group(
            "", title("Evaluations"), evaluations_table(newest_evaluations(run.evaluations)[:EVALUATIONS_SHOWN])
        )
    if settings := non_default_settings(run):
        sources = settings_with_sources(run)
        table = plain_table(show_header=False)
        for key, value in settings.items():
            source = Text(sources.get(key, ""), style="dim")
            table.add_row(Text(key, style="cyan"), Text(one_line(setting_text(value)), overflow="fold"), source)
        yield Group("", title("Settings that differ from the defaults"), table)
    files = plain_table(show_header=False)
    for step, path in list_checkpoints(run.path / CHECKPOINTS):
        files.add_row(f"checkpoint of step {step:,}", size(size_of(path)))
    base = run.path / BASE_WEIGHTS
    if base.is_file():
        files.add_row("frozen weights of these", size(base.stat().st_size))
    for path in sorted((run.path / ARTIFACTS).glob("[!.]*")):
        if path.name != CHECKPOINTS.name:
            file_size = size_of(path) if path.is_dir() else path.lstat().st_size
            files.add_row(Text(one_line(str(ARTIFACTS / path.name))), size(file_size))
    files.add_row(LOGS.name, size(size_of(run.path / LOGS)))
    yield Group("", title("Files"), files)


def evaluations_table(evaluations: Sequence[Mapping[str, Any]]) -> Table:
    """A table with one row for each evaluation: the data, the type of the weights, and the results."""
    results = [name for name in NUMBERS if any(evaluation.get(name) is not None for evaluation in evaluations)]
    headers = ["step", *(name.replace("bits_per_byte", "bits/byte") for name in results), "date"]
    smaller = any(evaluation.get("weights") != "float32" for evaluation in evaluations)
    table = plain_table(left=["data", *(["weights"] if smaller else [])], right=headers)
    for evaluation in evaluations:
        step, weights = evaluation.get("step"), one_line(str(evaluation.get("weights") or ""))
        table.add_row(
            Text(one_line(evaluation["data"])),
            *([Text(weights)] if smaller else []),
            f"{step:,}" if isinstance(step, int) else "",
            *(number_cell(name, evaluation.get(name)) for name in results),
            Text(one_line(evaluation["time"][:10])),
        )
    return table


def number_cell(name: str, value: float | None) -> str:
    """A result of an evaluation; empty for None."""
    return f"{value:.2%}" if name == "accuracy" and value is not None else loss_text(value)


def result_facts(run: IndexedRun) -> Iterator[tuple[str, str]]:
    """Yield facts about the progress, notes and results of a run as (name, value); a value is empty if unknown."""
    row, record = run.row(), run.record
    resolved = record.get("resolved") or {}
    yield "status", run.status + (f": {record['exit_reason']}" if record.get("exit_reason") else "")
    yield "problem", run.problem or ""
    for name in ("tag", "tags", "note"):
        yield name, column_text(name, row[name])
    yield "pinned", "yes" if row["pinned"] else ""
    yield "started", f"{time_text(record['start'])}, {rough_duration(row['age'])} ago" if row["age"] else ""
    yield "duration", column_text("duration", row["duration"])
    yield "steps", f"{row['steps']:,} of {resolved['max_iters']:,}" if row["steps"] and "max_iters" in resolved else ""
    best = loss_text(row["val_loss"])
    yield "best val/loss", best + (f" at step {row['best_step']:,}" if best and row["best_step"] is not None else "")
    yield "bits per byte", loss_text(row["bits_per_byte"])
    yield "last val/loss", loss_text(row["last_val_loss"])
    accuracy = run.summary().get("val/accuracy")
    yield "last val/accuracy", "" if accuracy is None else f"{accuracy:.2%}"
    trained = resolved.get("trainable_parameters")  # with adapters
    yield "parameters", column_text("parameters", row["parameters"]) + (f", {trained:,} trained" if trained else "")


def provenance_facts(run: IndexedRun, children: Sequence[str], models: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield facts about the origin and place of a run as (name, value); a value is empty if unknown."""
    row, record, environment = run.row(), run.record, environment_of(run)
    resolved, parent = record.get("resolved") or {}, record.get("parent")
    corpus = resolved.get("corpus_hash")
    yield "corpus", f"{resolved.get('dataset')}, sha256 {corpus[:HASH_LENGTH]}" if corpus else ""
    dirty = " with uncommitted changes" if row["dirty"] else ""
    code = f"{(row['commit'] or '')[:HASH_LENGTH]} on {row['branch'] or 'no branch'}{dirty}"
    yield "code", code if row["commit"] else "not known"
    yield "machine", ", ".join(str(resolved[key]) for key in ("processor", "device", "dtype") if resolved.get(key))
    threads = resolved.get("threads")
    of_threads = f", {counted(threads, 'thread')}" if isinstance(threads, int) else ""
    yield "torch", f"{row['torch']}{of_threads}" if row["torch"] else ""
    known = (f"{name} {environment[name]}" for name in ("python", "platform") if name in environment)
    yield "environment", ", ".join(known)
    yield "command", "python " + shlex.join(map(str, record["argv"])) if record.get("argv") else ""
    yield "parent", f"{parent['run']} ({parent['relation']} at step {parent['step']:,})" if parent else ""
    sweep = record.get("sweep")
    yield "sweep", f"{sweep['name']}, trial {sweep['number']}" if sweep else ""
    yield "children", ", ".join(children)
    yield "promoted as", ", ".join(models)
    yield "resumed", counted(len(record["resumes"]), "time") if record.get("resumes") else ""
    views = (record.get("views") or {}).items()
    yield "trackers", ", ".join(f"{name} {view.get('state')}" for name, view in views)
    yield "directory", shlex.quote(str(run.path))


# --------------------------------------------------------------------------------------------------- prune and check


WHAT = {"run": "the whole run", "checkpoints": "checkpoints"}
LEFTOVER = "what a killed process left:"


def prune_screen(plan: PrunePlan, freed: int, deleted: bool, unreached: str | None) -> Iterator[RenderableType]:
    """What was deleted, or would be.

    Args:
        freed: bytes that were freed, or would be.
        unreached: the --max-size, if the remaining runs exceed it.
    """
    if plan.removals:
        table = plain_table(left=("run", "what goes"), right=("frees",))
        for removal in plan.removals:
            what = f"{LEFTOVER} {one_line(removal.path.name)}" if removal.what == "leftover" else WHAT[removal.what]
            table.add_row(Text(one_line(removal.run or "-")), Text(what), size(removal.bytes))
        yield table
        if any(removal.what == "checkpoints" for removal in plan.removals):
            yield Text("A run without checkpoints cannot be resumed or forked any more.", style="dim")
        yield ""
    words = f"freed {size(freed)}" if deleted else f"--yes would free {size(freed)}"
    yield f"{words} of {size(plan.total)}, {size(plan.total - freed)} are left"
    if unreached:
        yield f"--max-size {unreached} cannot be reached: the rest is not touched"
    for reason, count in Counter(plan.kept.values()).items():
        yield f"{count} not touched: {reason}"


def check_screen(run: str, found: SealCheck) -> Iterator[RenderableType]:
    """The files of a run that differ from its seal."""
    for what in ("changed", "missing", "added", "damaged"):
        for name in getattr(found, what):
            yield f"{what:<8} {one_line(name)}"
    sealed = f"{counted(found.files, 'file')} sealed at {time_text(found.sealed)}"
    sealed += f", {counted(found.checkpoints, 'checkpoint')}"
    yield f"{run}: {'as sealed' if found.good else 'not as sealed'}: {sealed}"
    yield "(a seal detects accidents; it does not protect against somebody who changes the files and the seal)"
