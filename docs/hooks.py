"""What mkdocs reads differently from the files: the first page is README.md, and recipes get a title."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

README = Path(__file__).resolve().parents[1] / "README.md"


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Returns the text of a page; that of index.md comes from README.md, with links as they are seen from docs/."""
    if page.file.src_uri == "index.md":
        return README.read_text(encoding="utf-8").replace("](docs/", "](")
    return re.sub(r"^```diff recipe=(\w+)$", r'```diff title="recipe: \1"', markdown, flags=re.MULTILINE)
