"""What determines a run (settings, corpus, tokenizer, initial weights, code), and how runs differ in it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from utils.config.fields import FIELDS, derived_settings, field_fact, flat
from utils.config.section import TRAJECTORY
from utils.config.settings import Config
from utils.files import read_bytes
from utils.runs.index import IndexedRun, resolved_setting
from utils.runs.layout import PATCH
from utils.runs.run import REPRODUCTION

TRAJECTORY_KEYS = frozenset(key for key in FIELDS if field_fact(key, "kind") == TRAJECTORY)
DERIVED = derived_settings(Config(), 1).keys()  # settings that are derived from others if they are none


def differing_settings(runs: Sequence[IndexedRun], kinds: Sequence[str] = (TRAJECTORY,)) -> list[str]:
    """The settings of these kinds that differ between the readable runs, in the order of the configuration.

    A setting that is none in all runs, and so is derived from others (head_dim, for example), is left out. `dataset`
    counts as a setting that changes the numbers if the texts differ, and as a path otherwise.
    """
    readable = [run for run in runs if run.settings]
    kind_of = {key: field_fact(key, "kind") for key in FIELDS}
    if other_texts := len({corpus_of(run) for run in readable}) > 1:
        kind_of["dataset"] = TRAJECTORY
    keys = dict.fromkeys([*(key for key, kind in kind_of.items() if kind in kinds), *_unknown_settings(readable)])

    def differs(key: str) -> bool:
        knowing = [run for run in readable if key in run.settings]  # an older run may not have the setting
        if key in DERIVED and all(run.settings[key] is None for run in knowing):
            return False
        if key == "dataset" and other_texts:  # the same path may have had different texts
            return True
        return len({repr(resolved_setting(run, key)) for run in knowing}) > 1

    return [key for key in keys if differs(key)]


def tokenizers_differ(runs: Sequence[IndexedRun]) -> bool:
    """Whether these runs use different tokenizers, so that their losses per token cannot be compared."""
    hashes = {(run.record.get("resolved") or {}).get("tokenizer_hash") for run in runs}
    return len(hashes - {None}) > 1


def corpus_of(run: IndexedRun) -> str:
    """The hash of the text that a run was trained on, or `dataset` if the run ended before the hash was known."""
    corpus_hash = (run.record.get("resolved") or {}).get("corpus_hash")
    return str(corpus_hash or run.settings.get("dataset"))


def _unknown_settings(runs: Sequence[IndexedRun]) -> Iterator[str]:
    for run in runs:
        yield from (key for key in run.settings if key not in FIELDS)


def non_default_settings(run: IndexedRun) -> dict[str, Any]:
    """The settings of a run that differ from the current defaults."""
    default = json.loads(json.dumps(flat(Config())))
    return {key: value for key, value in run.settings.items() if key not in default or value != default[key]}


def origin_of(run: IndexedRun) -> tuple[str, str, int] | None:
    """(relation, run, step) of the weights that a fork or fine-tuning run began with; None for any other run."""
    parent = run.record.get("parent")
    if not parent or parent.get("relation") == REPRODUCTION:
        return None
    return str(parent.get("relation")), str(parent["run"]), int(parent.get("step", 0))


def code_identity(run: IndexedRun) -> tuple[str | None, str | None]:
    """The commit of a run (None if unknown) and a hash of its patch and callbacks (None if it has none).

    If a later session had different code, the hash covers the code of all sessions.
    """
    commit, patch = _code_of(run.record.get("git") or {}, run.path)
    if later := later_code(run.path, run.record):
        patch = hashlib.sha256(repr((patch, [code for _, *code in later])).encode()).hexdigest()
    return commit, patch


def patch_hash(path: Path) -> str | None:
    """The SHA-256 of meta/code.patch; None if it is missing or empty."""
    try:
        patch = read_bytes(path / PATCH, path)
    except OSError:
        patch = b""
    return hashlib.sha256(patch).hexdigest() if patch else None


def later_code(path: Path, record: Mapping[str, Any]) -> list[tuple[int, str | None, str | None]]:
    """(step, commit, hash of the uncommitted code) of each later session whose code differs from the one before it."""
    before, found = _code_of(record.get("git") or {}, path), []
    for session in record.get("resumes") or []:
        git = session.get("git")
        if not isinstance(git, dict):
            continue
        now = _code_of(git, path) if "code" in git else (git.get("commit"), before[1])
        if now != before:
            found.append((int(session.get("step") or 0), *now))
        before = now
    return found


def git_of_last_session(record: Mapping[str, Any]) -> dict[str, Any]:
    """The facts about the code of the newest session; in older records they lack `code`."""
    sessions = (session.get("git") for session in reversed(record.get("resumes") or []))
    return dict(next((git for git in sessions if isinstance(git, dict)), None) or record.get("git") or {})


def _code_of(git: Mapping[str, Any], path: Path) -> tuple[str | None, str | None]:
    return git.get("commit"), git["code"] if "code" in git else patch_hash(path)
