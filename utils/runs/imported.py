"""The modules that this process has imported: the files they came from, and those that git does not know."""

from __future__ import annotations

import functools
import os
import site
import sys
import sysconfig
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from utils.runs.layout import CALLBACKS


def source_of(module: str) -> Path | None:
    """The file of Python source that a module was imported from; None if it was not."""
    path = _source_of(sys.modules.get(module))
    return Path(path) if path else None


def _source_of(module: object) -> str | None:
    path = getattr(module, "__file__", None)
    return path if path and path.endswith(".py") and os.path.isabs(path) else None


def imported_files() -> dict[str, tuple[str, str]]:
    """Module -> the file of Python source that it was imported from: its path, and the same with links resolved."""

    @functools.cache  # thousands of files, few folders
    def resolved(path: str) -> str:
        folder, name = os.path.split(path)
        if name in ("", os.curdir, os.pardir) or os.path.islink(path):
            return os.path.realpath(path)
        return os.path.join(resolved(folder), name)

    paths = ((name, _source_of(module)) for name, module in list(sys.modules.items()))
    return {name: (path, resolved(path)) for name, path in paths if path is not None}


def unknown_modules(
    top: Path, known: Collection[str], imported: Mapping[str, tuple[str, str]], callbacks: Mapping[str, Path]
) -> Iterator[str]:
    """Imported modules that git does not know: files in the project that it ignores, callbacks from elsewhere.

    Args:
        known: the files that git tracks or would track, relative to `top`.
        imported: what `imported_files` returns.
        callbacks: module -> file.
    """
    libraries = {os.path.realpath(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib")}
    libraries |= {os.path.realpath(sys.prefix), *(os.path.realpath(place) for place in site.getsitepackages())}
    above = tuple(place + os.sep for place in libraries)
    root = os.path.realpath(top)
    for name, (path, real) in sorted(imported.items()):
        if real.startswith(above) or f"{os.sep}site-packages{os.sep}" in real:
            continue
        kept = f"; kept in {CALLBACKS}" if name in callbacks else ""
        if real.startswith(root + os.sep):
            relative = os.path.relpath(real, root)
            if relative not in known and os.path.relpath(path, root) not in known:
                yield f"{relative} (imported, but git ignores it{kept})"
        elif name in callbacks:
            folder, file = os.path.split(path)
            yield f"{file} (of the callback {name}, from {folder}{kept})"
