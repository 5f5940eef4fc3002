"""The keys by which requests name runs and files: they are plain in every URL, and never paths."""

from __future__ import annotations

import os
import re

PLAIN = re.compile(r"[A-Za-z0-9_.\-]{1,200}")


def key_of(name: str) -> str:
    """The key of a name in the file system: the name itself if it is plain, otherwise its bytes in hexadecimal.

    >>> key_of("20260131_baseline"), key_of("a/<b>")
    ('20260131_baseline', '~612f3c623e')
    """
    return name if PLAIN.fullmatch(name) else f"~{os.fsencode(name).hex()}"
