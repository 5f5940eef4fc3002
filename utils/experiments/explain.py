"""Where the value of a setting comes from, and what the setting means."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from utils.config.fields import FIELDS, SECTION_OF, expected, field_fact
from utils.config.loader import LoadedConfig
from utils.config.settings import Config
from utils.errors import UserError, nearest
from utils.files import read_json
from utils.runs.index import IndexedRun
from utils.runs.layout import CONFIG_SOURCES

DEFAULTS = {key: value for section in Config().model_dump(mode="json").values() for key, value in section.items()}


@dataclass(frozen=True)
class Explanation:
    """One setting: its value, where that comes from, and what the setting means.

    value, source: the value in effect, and where it was set (file:line, a flag, or "default").
    resolved: the value that none or "auto" resolved to; None if it is the same, or without a run.
    shadowed: (value, source) of every lower layer, the nearest one first.
    """

    key: str
    section: str
    value: Any
    source: str
    resolved: Any
    shadowed: list[tuple[Any, str]]
    default: Any
    meaning: str
    expected: str
    unit: str
    kind: str


def explain(key: str, loaded: LoadedConfig) -> Explanation:
    """Explain a setting of the configuration `loaded`.

    Raises:
        UserError: there is no such setting.
    """
    name = known_key(key, FIELDS)
    return _explanation(name, loaded.sources_json()[name], None)


def explain_of_run(key: str, run: IndexedRun) -> Explanation:
    """Explain a setting with the value that it had when the run was started or last resumed.

    Raises:
        UserError: the run did not record it, or the record is damaged.
    """
    path = run.path / CONFIG_SOURCES
    try:
        recorded = read_json(path, run.path)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    try:
        name = known_key(key, recorded)
        return _explanation(name, recorded[name], (run.record.get("resolved") or {}).get(name))
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None


def known_key(key: str, known: Mapping[str, Any]) -> str:
    """The leaf name that `key` stands for: `batch_size`, `batch-size` and `train.batch_size` are the same.

    Raises:
        UserError: there is no such setting; the message names the nearest one.
    """
    section, _, name = key.removeprefix("--").replace("-", "_").rpartition(".")
    if name not in known:
        raise UserError(f"no setting is named {key}{nearest(name, known)}")
    if section and section != SECTION_OF.get(name, section):
        raise UserError(f"{name} belongs to section {SECTION_OF[name]}, not {section}")
    return name


def _explanation(key: str, facts: Mapping[str, Any], resolved: Any) -> Explanation:
    value = facts["value"]
    known = key in FIELDS  # a run of an older version may have settings that no longer exist
    return Explanation(
        key=key,
        section=SECTION_OF.get(key, "unknown to this version"),
        value=value,
        source=facts["source"],
        resolved=resolved if resolved != value else None,
        shadowed=[(layer["value"], layer["source"]) for layer in facts["shadowed"]],
        default=DEFAULTS[key] if known else None,
        meaning=FIELDS[key].description or "" if known else "",
        expected=expected(key) if known else "",
        unit=field_fact(key, "unit") if known else "",
        kind=field_fact(key, "kind") if known else "",
    )


def settings_with_sources(run: IndexedRun) -> dict[str, str]:
    """Where each setting of a run was set; empty if that cannot be read."""
    path = run.path / CONFIG_SOURCES
    try:
        recorded = read_json(path, run.path)
        return {key: str(facts["source"]) for key, facts in recorded.items() if "source" in facts}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}
