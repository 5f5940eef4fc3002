"""Promoted runs: names NAME@v1, NAME@v2, ... for the weights of runs, kept in models.json beside the runs."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from utils.config.settings import TAG_PATTERN
from utils.errors import UserError, nearest
from utils.files import write_json
from utils.runs.layout import MODELS

VERSIONED = re.compile(r"(.+)@v(\d+)")

Models = dict[str, list[dict[str, Any]]]  # name -> its versions, v1 first


class PromotionError(UserError):
    """A name that is not valid or not known, or a models.json that cannot be used."""


def read_models(runs_dir: Path) -> Models:
    """All promoted runs: name -> its versions.

    Raises:
        PromotionError: models.json is damaged.
    """
    try:
        models = json.loads((runs_dir / MODELS).read_text(encoding="utf-8"))
        lists = all(isinstance(versions, list) for versions in models.values())
        if lists and all(isinstance(version["run"], str) for versions in models.values() for version in versions):
            return dict(models)
        raise ValueError("not a list of versions for each name")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError, TypeError, KeyError, RecursionError) as error:
        raise PromotionError(f"{runs_dir / MODELS} cannot be read: {error}") from None


def names_of_run(run: Path) -> list[str]:
    """The names NAME@vN of the run directory `run`.

    Raises:
        PromotionError: models.json is damaged.
    """
    models = read_models(run.parent).items()
    return [f"{name}@v{entry['version']}" for name, entries in models for entry in entries if entry["run"] == run.name]


def promoted_run(text: str, runs_dir: Path) -> Path | None:
    """The run directory that NAME@vN names; None if `text` is not of this form.

    Raises:
        PromotionError: there is no such name or version, or its run was deleted.
    """
    match = VERSIONED.fullmatch(text)
    if match is None:
        return None
    name, number = match.group(1), int(match.group(2)[:18])
    models = read_models(runs_dir)
    if name not in models:
        raise PromotionError(f"no model {name} in {runs_dir / MODELS}{nearest(name, models)}")
    if not 1 <= number <= len(models[name]):
        raise PromotionError(f"no version v{match.group(2)[:18]} of {name}: there are v1 to v{len(models[name])}")
    path = runs_dir / str(models[name][number - 1]["run"])
    if not path.is_dir():
        raise PromotionError(f"{text} is run {path.name}, which is no longer in {runs_dir}")
    return path


def add_version(runs_dir: Path, name: str, facts: dict[str, Any]) -> int:
    """Add a version to `name`, or keep the newest one if it is of the same run and weights.

    Args:
        facts: the entry in models.json; the id of the `run` must be among them.

    Returns:
        The number of the version.

    Raises:
        PromotionError: the name is not valid, or models.json is damaged or cannot be written.
    """
    assert isinstance(facts.get("run"), str), "a version without a run would damage the file"
    if not TAG_PATTERN.fullmatch(name):
        raise PromotionError(f"{name!r} is not a name: expected letters, digits, '.', '_' and '-', at most 64")
    try:
        with _locked(runs_dir):
            models = read_models(runs_dir)
            versions = models.setdefault(name, [])
            if versions and all(versions[-1].get(key) == facts.get(key) for key in ("run", "sha256")):
                return len(versions)
            versions.append({"version": len(versions) + 1, **facts})
            write_json(runs_dir / MODELS, models)
            return len(versions)
    except OSError as error:
        raise PromotionError(f"{runs_dir / MODELS} cannot be written: {error.strerror}") from None


@contextlib.contextmanager
def _locked(runs_dir: Path) -> Iterator[None]:
    """Hold a lock, so that no other process changes models.json at the same time."""
    handle = os.open(runs_dir / f".{MODELS}.lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
