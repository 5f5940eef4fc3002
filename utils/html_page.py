"""HTML pages from the templates beside this file, all in one style (page.css). No torch here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any


def render(template: str, filters: dict[str, Callable[[Any], str]] | None = None, **context: Any) -> str:
    """A page; whatever it is told is text there, and never markup."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(filters or {})
    return environment.get_template(template).render(**context)
