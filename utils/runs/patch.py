"""Parse a patch of git: the files that it changes, and the lines that each of them gains and loses."""

from __future__ import annotations

import re
from collections.abc import Iterator


def patched_files(patch: bytes) -> dict[str, list[str]]:
    """The changed and context lines of each file in a patch, without headers and line numbers."""
    return {file_of(part): [*_lines_of(part.decode("utf-8", "replace"))] for part in parts_of_patch(patch)}


def _lines_of(part: str) -> Iterator[str]:
    for line in part.splitlines():
        if line.startswith(("+", "-", " ")) and not line.startswith(("+++ ", "--- ")):
            yield line


def parts_of_patch(patch: bytes) -> list[bytes]:
    """Split a patch by file, at the lines that begin with `diff --git`, which no line of content does."""
    return [part for part in re.split(rb"^(?=diff --git )", patch, flags=re.MULTILINE) if part]


def file_of(part: bytes) -> str:
    """The name in `diff --git a/NAME b/NAME`; as the patch has no renames, both halves of the line name the same file.

    Git quotes a name with unusual bytes and escapes these.
    """
    names = part.partition(b"\n")[0].removeprefix(b"diff --git ")
    name = names[: len(names) // 2]
    if name.startswith(b'"'):
        name = name[1:-1].decode("unicode_escape").encode("latin-1")
    return name.removeprefix(b"a/").decode("utf-8", "surrogateescape")


def added_lines(part: bytes) -> bytes:
    """The lines that the patch of one file adds, without their `+`."""
    return b"\n".join(line[1:] for line in part.split(b"\n") if line.startswith(b"+") and not line.startswith(b"+++ "))
