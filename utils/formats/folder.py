"""Folders of exports: written beside their place under a hidden name, checked, then renamed into it."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from utils.errors import UserError
from utils.files import replace_folder

MARKER = "README.md"  # every export has a model card


@contextlib.contextmanager
def new_folder(place: Path) -> Iterator[Path]:
    """A hidden folder to write an export into. It becomes `place` at the end, and is deleted after an error.

    An older export at `place` is replaced, and stays after an error.

    Raises:
        UserError: at `place` there is something else, or it cannot be written to.
    """
    place = Path(os.path.abspath(place))
    if place.exists() and not (place.is_dir() and (not any(place.iterdir()) or (place / MARKER).is_file())):
        raise UserError(f"{place}: exists and is not an export: it is left as it is; --out names another folder")
    hidden = place.with_name(f".{place.name}.tmp")
    try:
        shutil.rmtree(hidden, ignore_errors=True)
        hidden.mkdir(parents=True)
        yield hidden
        replace_folder(place, hidden)
    except OSError as error:
        raise UserError(f"{place}: cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(hidden, ignore_errors=True)
