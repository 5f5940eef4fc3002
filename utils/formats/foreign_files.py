"""Read files in the folder of a model of another program: of bounded size, and never through a link out of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from utils.errors import UserError
from utils.files import read_bytes


class ForeignConfigError(UserError):
    """A configuration of another program that is damaged, or that our model cannot represent."""


def boundary(folder: Path) -> Path:
    """The folder that links in the folder of a model must stay in.

    Otherwise a model could copy a file of the user, such as a private key, into what is made from it. In the cache of
    the hub the boundary is the repository, because the files of a snapshot are links to another folder in it.
    """
    return folder.parent.parent if folder.parent.name == "snapshots" else folder


def read_bounded(path: Path) -> bytes:
    """The content of a file in the folder of a model.

    Raises:
        ForeignConfigError: it is missing, too large, not a file, or a link out of the folder (see `boundary`).
    """
    try:
        return read_bytes(path, boundary(path.parent))
    except FileNotFoundError:
        raise ForeignConfigError(f"{path}: no such file") from None
    except OSError as error:
        raise ForeignConfigError(f"{path}: cannot be read: {error.strerror}") from None


def read_bounded_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of another program.

    Raises:
        ForeignConfigError: it is missing, too large, damaged or not an object.
    """
    content = read_bounded(path)
    try:
        value = json.loads(content)
    except RecursionError:
        raise ForeignConfigError(f"{path}: not valid JSON: nested too deeply") from None
    except ValueError as error:
        raise ForeignConfigError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ForeignConfigError(f"{path}: expected an object, got a {type(value).__name__}")
    return value
