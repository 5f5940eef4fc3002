"""A patch as text: cut into the files that it changes, and what each of them gains and loses."""

from __future__ import annotations

import re
from collections.abc import Iterator


def patched_files(patch: bytes) -> dict[str, list[str]]:
    """The changed lines of each file in a patch, and their context, but not the lines that name blobs and places."""
    return {file_of(part): [*_lines_of(part.decode("utf-8", "replace"))] for part in parts_of_patch(patch)}


def _lines_of(part: str) -> Iterator[str]:
    for line in part.splitlines():
        if line.startswith(("+", "-", " ")) and not line.startswith(("+++ ", "--- ")):
            yield line


def parts_of_patch(patch: bytes) -> list[bytes]:
    """A patch cut before the line `diff --git` of each file: lines of content begin with another character."""
    return [part for part in re.split(rb"^(?=diff --git )", patch, flags=re.MULTILINE) if part]


def file_of(part: bytes) -> str:
    """The name in `diff --git a/NAME b/NAME`: without renames both halves of the line name the same file.

    Git puts a name with unusual bytes in quotes, and escapes them.
    """
    names = part.partition(b"\n")[0].removeprefix(b"diff --git ")
    name = names[: len(names) // 2]
    if name.startswith(b'"'):
        name = name[1:-1].decode("unicode_escape").encode("latin-1")
    return name.removeprefix(b"a/").decode("utf-8", "surrogateescape")


def added_lines(part: bytes) -> bytes:
    """The lines that one file of a patch adds, each without its mark."""
    return b"\n".join(line[1:] for line in part.split(b"\n") if line.startswith(b"+") and not line.startswith(b"+++ "))
