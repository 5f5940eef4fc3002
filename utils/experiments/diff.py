"""What differs between runs, likely causes first, and from which step on their logs differ."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from utils.config.section import MACHINE, OBSERVATION, TRAJECTORY
from utils.errors import UserError
from utils.experiments.bits import LogComparison, compare_logs
from utils.experiments.explain import settings_with_sources
from utils.files import read_bytes, read_text
from utils.runs.code import UNREAD, listed_files, open_repo
from utils.runs.identity import code_identity, differing_settings, later_code, origin_of, tokenizers_differ
from utils.runs.index import IndexedRun, resolved_setting
from utils.runs.layout import ENVIRONMENT, PATCH
from utils.runs.patch import patched_files
from utils.terminal.words import one_line

COMMIT = re.compile(r"[0-9a-f]{7,64}")
COMMITS_SHOWN = 20
PATCH_LINES_SHOWN = 60
FACTS_SHOWN = 12  # about the environment
CORPUS = ("corpus_hash", "tokenizer_hash", "vocab_size", "train_tokens", "val_tokens")
HARDWARE = ("processor", "torch")
FIRST_FACTS = ("torch", "processor", "cpu", "numpy", "python")  # shown first, because they can change the numbers
RESULTS = ("status", "steps", "val_loss", "last_val_loss", "train_loss", "duration")
RESULT_NAMES = {"val_loss": "best val loss", "train_loss": "last train loss", "bits_per_byte": "best bits per byte"}


@dataclass(frozen=True)
class Row:
    """One fact with its value in each run; None for a run that does not have it."""

    name: str
    values: list[Any]
    sources: list[str] = field(default_factory=list)  # where each value was set; empty unless it is a setting


def result_name(column: str) -> str:
    """The name of a result as people read it."""
    return RESULT_NAMES.get(column, column.replace("_", " "))


@dataclass(frozen=True)
class RunDiff:
    """What differs between runs.

    sections: title -> facts that differ, likely causes first.
    commits: the git log between the first two commits that differ.
    patch: the lines of a diff between the first two patches that differ.
    curves: (run, comparison of its log with that of the first run) for each run but the first.
    """

    runs: list[str]
    sections: dict[str, list[Row]]
    commits: list[str]
    patch: list[str]
    results: list[Row]
    curves: list[tuple[str, LogComparison]]


def diff(runs: Sequence[IndexedRun], root: Path) -> RunDiff:
    """Compare runs.

    Args:
        root: the project folder, whose git repository has the commits.

    Raises:
        UserError: a run cannot be read.
    """
    for run in runs:
        if not run.readable:
            raise UserError(f"{run.id}: {run.problem}")
    sources = [settings_with_sources(run) for run in runs]
    sections = {
        "First weights": _differing({"weights": _origin_text(run)} for run in runs),
        "Settings that change the numbers": _settings(runs, sources, TRAJECTORY),
        "Code": _differing(_code(run) for run in runs),
        "Corpus and tokenizer": _differing(_resolved(run, CORPUS) for run in runs),
        "Environment and hardware": _most_important(
            _differing({**environment_of(run), **_resolved(run, HARDWARE)} for run in runs)
        ),
        "Settings of what is recorded": _settings(runs, sources, OBSERVATION),
        "Settings of the machine": _settings(runs, sources, MACHINE),
    }
    rows = [run.row() for run in runs]
    return RunDiff(
        runs=[run.id for run in runs],
        sections={title: facts for title, facts in sections.items() if facts},
        commits=commits_between(runs, root),
        patch=patch_difference(runs),
        results=[
            Row(name, [row[name] for row in rows])
            for name in (*RESULTS, *(["bits_per_byte"] if tokenizers_differ(runs) else []))
        ],
        curves=[(run.id, compare_logs(runs[0].path, run.path)) for run in runs[1:]],
    )


def _settings(runs: Sequence[IndexedRun], sources: Sequence[Mapping[str, str]], kind: str) -> list[Row]:
    return [
        Row(key, [resolved_setting(run, key) for run in runs], [of_run.get(key, "") for of_run in sources])
        for key in differing_settings(runs, (kind,))
    ]


def _differing(facts: Iterator[dict[str, Any]]) -> list[Row]:
    """The facts that are not the same in all runs; None for a run that does not have one."""
    of_runs = list(facts)
    names = dict.fromkeys(name for of_run in of_runs for name in of_run)
    rows = (Row(name, [of_run.get(name) for of_run in of_runs]) for name in names)
    return [row for row in rows if any(value != row.values[0] for value in row.values)]


def _resolved(run: IndexedRun, names: Sequence[str]) -> dict[str, Any]:
    resolved = run.record.get("resolved") or {}
    return {name: resolved[name] for name in names if resolved.get(name) is not None}


def _origin_text(run: IndexedRun) -> str | None:
    origin = origin_of(run)
    return None if origin is None else f"{origin[0]} of {origin[1]} at step {origin[2]:,}"


def _most_important(rows: list[Row]) -> list[Row]:
    """The first FACTS_SHOWN facts of the environment: those that can change the numbers, then other packages."""
    rows = sorted(rows, key=lambda row: row.name not in FIRST_FACTS)
    more = len(rows) - FACTS_SHOWN
    rest = [Row(f"... and {more} more", [""] * len(rows[0].values))] if more > 0 else []
    return rows[:FACTS_SHOWN] + rest


def _code(run: IndexedRun) -> dict[str, Any]:
    commit, patch = code_identity(run)
    later = [
        f"{(commit or 'no commit')[:10]} from step {step:,}" for step, commit, _ in later_code(run.path, run.record)
    ]
    facts = {"commit": commit, "branch": (run.record.get("git") or {}).get("branch"), "patch (sha256)": patch}
    return {**facts, "changed during the run": ", ".join(later) or None}


def environment_of(run: IndexedRun) -> dict[str, str]:
    """The facts in env.txt of a run; empty if it is missing."""
    try:
        return parse_environment(read_text(run.path / ENVIRONMENT, run.path, "replace"))
    except OSError:
        return {}


def parse_environment(text: str) -> dict[str, str]:
    """The facts of an env.txt: "python" -> "3.11.2 (CPython)", and a package -> its version."""
    facts = {}
    for line in text.splitlines():
        name, separator, value = line.partition("==" if line.startswith("  ") else ": ")
        if separator:
            facts[name.strip()] = value.strip()
    return facts


def commits_between(runs: Sequence[IndexedRun], root: Path) -> list[str]:
    """`git log --oneline` between the first two commits of the runs that differ; [] if git does not know them."""
    commits = [commit for commit in (code_identity(run)[0] for run in runs) if commit and COMMIT.fullmatch(commit)]
    other = next((commit for commit in commits if commit != commits[0]), None)
    if other is None:
        return []
    import git

    try:
        with open_repo(root) as repo:
            lines = repo.git.log("--oneline", "--no-decorate", f"{commits[0]}...{other}", "--left-right").splitlines()
    except (git.GitError, OSError, ValueError):
        return []
    return lines[:COMMITS_SHOWN] + (
        [f"... and {len(lines) - COMMITS_SHOWN} more"] if len(lines) > COMMITS_SHOWN else []
    )


def uncommitted_code(run: IndexedRun) -> dict[str, list[str]]:
    """The changed lines of each file in the patch of a run, without the files that training could not read."""
    try:
        files = patched_files(read_bytes(run.path / PATCH, run.path))
    except OSError:
        return {}
    unread = listed_files(run.path, UNREAD)
    return {one_line(name): lines for name, lines in files.items() if one_line(name) not in unread}


def differing_files(first: Mapping[str, list[str]], second: Mapping[str, list[str]]) -> list[str]:
    """The files whose changed lines differ."""
    return [name for name in sorted(first.keys() | second.keys()) if first.get(name) != second.get(name)]


def patch_difference(runs: Sequence[IndexedRun]) -> list[str]:
    """A diff between the uncommitted code of the first run and of the next one that differs in it; [] if none does."""
    first, *others = map(uncommitted_code, runs)
    other = next((files for files in others if files != first), first)
    lines: list[str] = []
    for name in differing_files(first, other):
        before, after = first.get(name, []), other.get(name, [])
        lines += [f"@@ {name}", *list(difflib.unified_diff(before, after, lineterm="", n=1))[2:]]
    more = len(lines) - PATCH_LINES_SHOWN
    return lines[:PATCH_LINES_SHOWN] + ([f"... and {more} more lines"] if more > 0 else [])
