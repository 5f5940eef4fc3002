"""HTML pages from templates that share one style (page.css)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any


def render(template: Path, filters: dict[str, Callable[[Any], str]] | None = None, **context: Any) -> str:
    """Render a template file. Every value is escaped, so no text can become markup.

    Args:
        filters: additional filters for the template, by name.
        context: the variables of the template.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader([template.parent, Path(__file__).parent]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(filters or {})
    return environment.get_template(template.name).render(**context)
