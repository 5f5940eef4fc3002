"""Which untracked files of a project count as code of a run."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import PurePath

from utils.config.parse import CONFIG_SUFFIXES

NOT_IMPORTED = frozenset(("venv", "virtualenv", "site-packages", "node_modules", "runs"))  # folders
CONFIGS = "configs"


def is_source(path: str | PurePath, named: Collection[str] = ()) -> bool:
    """Whether an untracked file counts as code: a Python file that training can import, or a configuration file.

    Args:
        path: relative to the project folder.
        named: configuration files named on the command line, also relative to the project folder.

    >>> [is_source(path) for path in ("my_loss.py", "configs/wide.yaml", "ideas.md", "venv/lib/a.py", "a.json")]
    [True, True, False, False, False]
    """
    path = PurePath(path)
    if path.as_posix() in named:
        return True
    *folders, name = path.parts
    if path.is_absolute() or any(folder.startswith(".") or folder in NOT_IMPORTED for folder in folders):
        return False
    if name.startswith("."):
        return False
    return path.suffix == ".py" or (folders[:1] == [CONFIGS] and path.suffix in CONFIG_SUFFIXES)
