"""The names that a run may have. Separate from settings.py, which takes a third of a second to import."""

from __future__ import annotations

import re

from utils.errors import shown

TAG_PATTERN = re.compile(r"[A-Za-z0-9._-]{1,64}")
RESERVED_TAGS = ("latest", "auto")


def check_tag(tag: str) -> str:
    """Return `tag`; raise ValueError unless it can be used in a folder name and on a command line."""
    if not TAG_PATTERN.fullmatch(tag) or not tag.strip("."):
        raise ValueError(f"a tag is 1 to 64 letters, digits, '.', '_' or '-', not {shown(tag)}")
    if tag in RESERVED_TAGS:
        raise ValueError(f"the tag {shown(tag)} is reserved")
    return tag
