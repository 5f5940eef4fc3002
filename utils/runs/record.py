"""The types of the fields of run.json, to detect a record that is damaged or that this workbench did not write."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, ValidationError

Whole = Annotated[int, Field(ge=0, lt=2**63)]


class _Git(BaseModel):
    commit: str | None = None
    branch: str | None = None
    dirty: bool | None = None


class _Parent(BaseModel):
    run: str
    path: str = ""
    step: Whole = 0
    relation: str = ""


class _Sweep(BaseModel):
    name: str
    id: str
    number: Whole
    place: Whole = 0


class _Resolved(BaseModel):
    parameters: Whole | None = None
    max_iters: Whole | None = None
    corpus_hash: str | None = None
    torch: str | None = None
    processor: str | None = None


class _Session(BaseModel):
    step: Whole | None = None
    before: dict[str, Any] | None = None


class _Record(BaseModel, strict=True):
    """The fields of run.json that the workbench reads, with their types."""

    status: Literal["running", "completed", "interrupted", "failed", "diverged"]
    git: _Git | None = None
    parent: _Parent | None = None
    sweep: _Sweep | None = None
    resolved: _Resolved | None = None
    summary: dict[str, float | Literal["nan", "inf", "-inf"]] | None = None
    last_step: Whole | None = None
    best_step: Whole | None = None
    host: str | None = None
    end: str | None = None
    seconds: float | None = None
    config_hash: str | None = None
    exit_reason: str | None = None
    argv: list[str] = []
    resumes: list[_Session] = []
    views: dict[str, dict[str, Any]] = {}


def wrong_fields(record: Mapping[str, Any]) -> list[str]:
    """The fields of run.json whose type or value is invalid."""
    try:
        _Record.model_validate(record)
    except ValidationError as error:
        details = error.errors(include_url=False, include_input=False)
        return list(dict.fromkeys(str(detail["loc"][0]) for detail in details))
    return []
