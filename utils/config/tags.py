"""The names that a run may be given. Apart from the settings, which take a third of a second to import."""

from __future__ import annotations

import re

from utils.errors import shown

TAG_PATTERN = re.compile(r"[A-Za-z0-9._-]{1,64}")
RESERVED_TAGS = ("latest", "auto")


def check_tag(tag: str) -> str:
    """Returns `tag`; raises ValueError unless it can be part of a folder name and of a command line."""
    if not TAG_PATTERN.fullmatch(tag) or not tag.strip("."):
        raise ValueError(f"a tag is 1 to 64 letters, digits, '.', '_' or '-', not {shown(tag)}")
    if tag in RESERVED_TAGS:
        raise ValueError(f"the tag {shown(tag)} is reserved")
    return tag
