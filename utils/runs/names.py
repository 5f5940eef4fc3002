"""Promoted runs: the weights of runs under names NAME@v1, NAME@v2, ..., stored in models.json beside the runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from utils.config.tags import TAG_PATTERN
from utils.errors import UserError, nearest
from utils.files import change_json, read_json, unwritable
from utils.runs.layout import MODELS

VERSIONED = re.compile(r"(.+)@v(\d+)")

Models = dict[str, list[dict[str, Any]]]  # name -> versions, v1 first


class PromotionError(UserError):
    """A name is invalid or unknown, or models.json cannot be used."""


def read_models(runs_dir: Path) -> Models:
    """Read all promoted runs: name -> versions.

    Raises:
        PromotionError: models.json is damaged.
    """
    models, problem = good_models(runs_dir)
    if problem:
        raise PromotionError(problem)
    return models


def good_models(runs_dir: Path) -> tuple[Models, str | None]:
    """The valid entries of models.json, and what is wrong with the file, or None."""
    path = runs_dir / MODELS
    try:
        content = read_json(path)
    except FileNotFoundError:
        return {}, None
    except OSError as error:
        return {}, f"{path} cannot be read: {error.strerror}"
    except ValueError as error:
        return {}, f"{path} cannot be read: {error}"
    if not isinstance(content, dict):
        return {}, f"{path} cannot be read: not a list of versions for each name"
    good = {name: versions for name, versions in content.items() if _are_versions(versions)}
    bad = ", ".join(name for name in content if name not in good)
    return good, f"{path} cannot be read: not a list of versions: {bad}" if bad else None


def _are_versions(versions: Any) -> bool:
    return isinstance(versions, list) and all(
        isinstance(version, dict) and isinstance(version.get("run"), str) for version in versions
    )


def names_of_run(run: Path) -> tuple[list[str], str | None]:
    """The names NAME@vN of the run directory `run`, and what is wrong with models.json, or None."""
    models, problem = good_models(run.parent)
    names = [
        f"{name}@v{number}"
        for name, versions in models.items()
        for number, version in enumerate(versions, start=1)
        if version["run"] == run.name
    ]
    return names, problem


def promoted_run(text: str, runs_dir: Path) -> Path | None:
    """The run directory that NAME@vN names; None if `text` does not have this form.

    Raises:
        PromotionError: there is no such name or version, or its run was deleted.
    """
    match = VERSIONED.fullmatch(text)
    if match is None:
        return None
    name, number = match.group(1), int(match.group(2)[:18])
    models, problem = good_models(runs_dir)
    if name not in models and problem:
        raise PromotionError(problem)
    if name not in models:
        raise PromotionError(f"no model {name} in {runs_dir / MODELS}{nearest(name, models)}")
    if not 1 <= number <= len(models[name]):
        raise PromotionError(f"no version v{match.group(2)[:18]} of {name}: there are v1 to v{len(models[name])}")
    path = runs_dir / str(models[name][number - 1]["run"])
    if not path.is_dir():
        raise PromotionError(f"{text} is run {path.name}, which is no longer in {runs_dir}")
    return path


def add_version(runs_dir: Path, name: str, facts: dict[str, Any]) -> int:
    """Add a version to `name`, unless its newest version has the same run and weights.

    Args:
        facts: the entry for models.json; must contain the id of the run as `run`.

    Returns:
        The number of the version.

    Raises:
        PromotionError: the name is invalid, or models.json is damaged or cannot be written.
        OSError: the disk is full or fails.
    """
    assert isinstance(facts.get("run"), str), "a version without a run would damage the file"
    if not TAG_PATTERN.fullmatch(name):
        raise PromotionError(f"{name!r} is not a name: expected letters, digits, '.', '_' and '-', at most 64")

    def change(models: Models) -> Models:
        versions = models.setdefault(name, [])
        if not (versions and all(versions[-1].get(key) == facts.get(key) for key in ("run", "sha256"))):
            versions.append({"version": len(versions) + 1, **facts})
        return models

    try:
        models = change_json(runs_dir / MODELS, change, lambda place: read_models(place.parent))
    except OSError as error:
        mistake = PromotionError(f"{runs_dir / MODELS} cannot be written: {error.strerror}")
        raise unwritable(runs_dir / MODELS, error, mistake) from None
    return len(models[name])
